"""Train the pocket models: ``python -m vtc.pocket.train --recipe cpu --out DIR``.

A recipe (`vtc.pocket.recipes`) is a row of stages, and exports ``from_pretrained`` folders to ``DIR/export`` and
``DIR/export-next``.

Runs are deterministic: a batch depends on (seed, stage, step) only, and a checkpoint holds float32 master weights,
optimizer and step, so on one machine with one build and thread count, a repeated or resumed run is bit-equal.

What the shipped checkpoints used
---------------------------------
The ``refine`` recipe: 4,100 steps on one CPU core, then 400 for pocket-next. It goes on from the checkpoint that the
``grow`` recipe made, which is in the repository and pinned by its SHA-256::

    python -m vtc.pocket.train --recipe refine --start results/pocket-grown.safetensors --out DIR --threads 1

``grow`` in turn starts from the first pocket checkpoint (four decoder layers; 60,000 images on two CPU cores), adds two
decoder layers and trains on (before photographs stood behind some of the scenes)::

    python -m vtc.pocket.train --recipe grow --start results/pocket-first.safetensors --out DIR

The first checkpoint itself came from restarts with changing settings and no single command repeats it; it also trained
on the handwritten digits and the easy-VQA images that ``"val"`` now holds out (never on those of ``"test"``). The
``cpu`` recipe starts from random weights instead. It has not been run to its end, and nothing is claimed for its result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from vtc.pocket.batches import training_batch, validation_batches, wide_validation_batches
from vtc.pocket.errors import PocketError
from vtc.pocket.model import PocketConfig, build_model, grow, portable_name, write_folder
from vtc.pocket.recipes import RECIPES, STAGE_NAMES, Recipe, Stage, fingerprint, stage_config
from vtc.pocket.trainer import Trainer

START_NAME = "start.safetensors"


@dataclass(frozen=True)
class RunOptions:
    """What does not influence the result of a run.

    Attributes
    ----------
    log_every, validate_every, checkpoint_every
        In steps; the last step of a run is always validated and saved.
    stop_at
        Save and stop after this many steps of each stage, with the schedule unchanged; None runs to the end.
    """

    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 100
    stop_at: int | None = None


class _Log:
    """JSON lines in a file and on stdout; lines past the step a run resumes from are dropped first."""

    def __init__(self, path: Path, resumed_step: int, silent: bool = False) -> None:
        self._path, self._silent = path, silent
        if silent:
            return
        kept = []
        if path.exists() and resumed_step:
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= resumed_step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, **entry: Any) -> None:
        if self._silent:
            return
        line = json.dumps(entry)
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def run_stage(
    recipe: Recipe, stage_name: str, out: Path, seed: int = 0, resume: bool = False, options: RunOptions | None = None
) -> Path:
    """Run one stage of a recipe.

    Parameters
    ----------
    recipe
        Which holds the stage.
    stage_name
        One of the recipe's; each but the first starts from the checkpoint of the one before it, in the same folder.
    out
        Folder of the run; the stage writes ``<stage>/checkpoint.pt`` and ``<stage>/log.jsonl``.
    seed
        Seed of start weights and data.
    resume
        Continue from the stage's checkpoint if there is one.
    options
        Logging and checkpoint intervals.

    Returns
    -------
    Path
        The stage's checkpoint.

    Raises
    ------
    PocketError
        If the recipe lacks the stage, if a checkpoint is there and `resume` is false, if it was written with other
        settings, or if the stage before has not finished.
    """
    options = options or RunOptions()
    stages = [stage for stage in recipe.stages if stage.name == stage_name]
    if not stages:
        raise PocketError(f"this recipe has no stage {stage_name!r}")
    stage, folder = stages[0], Path(out) / stage_name
    checkpoint = folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.ranks > 1 and not torch.distributed.is_initialized():
        with tempfile.TemporaryDirectory() as meeting:
            arguments = (f"{meeting}/store", recipe, stage_name, out, seed, resume, options)
            torch.multiprocessing.spawn(_run_rank, arguments, nprocs=recipe.ranks)
        return checkpoint
    rank = torch.distributed.get_rank() if recipe.ranks > 1 else 0
    if checkpoint.exists():
        if not resume:
            raise PocketError(f"{checkpoint} exists: continue with resume (--resume), or use another folder")
        trainer = Trainer.load(checkpoint, recipe, stage, seed)
    else:
        trainer = Trainer(recipe, stage, seed, _start_weights(recipe, stage, Path(out), seed))
    end = stage.length if options.stop_at is None else min(stage.length, options.stop_at)
    log = _Log(folder / "log.jsonl", trainer.step, silent=rank > 0)
    if trainer.step >= end:
        return checkpoint

    log.write(kind="start", step=trainer.step, seed=seed, dtype=recipe.dtype, **asdict(stage))
    if stage.name == "N":
        validation = wide_validation_batches(recipe.validation_scenes // 2)
    else:
        validation = validation_batches(recipe.validation_scenes, recipe.validation_easy if stage.easy_images else 0)
    if rank:
        validation = []
    losses: dict[str, list[float]] = defaultdict(list)
    began = time.perf_counter()
    while trainer.step < end:
        n_scenes = stage.batch_size - stage.easy_images
        batch = training_batch(stage.name, trainer.step, n_scenes, stage.easy_images, seed, rank, recipe.ranks)
        for name, value in trainer.train_step(batch).items():
            losses[name].append(value)
        step, is_last = trainer.step, trainer.step == end
        if step % options.log_every == 0 or is_last:
            means = {name: round(sum(values) / len(values), 4) for name, values in losses.items()}
            seconds = round(time.perf_counter() - began, 1)
            log.write(kind="train", step=step, rate=stage.rate(step - 1), losses=means, seconds=seconds)
            losses.clear()
        if rank:
            continue
        if step % options.checkpoint_every == 0 or is_last:
            trainer.save(checkpoint, recipe)
        if step % options.validate_every == 0 or is_last:
            log.write(kind="validate", step=step, **trainer.validate(validation))
    return checkpoint


def _run_rank(
    rank: int, store: str, recipe: Recipe, stage: str, out: Path, seed: int, resume: bool, options: RunOptions
) -> None:
    """Run a stage as one of several processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=recipe.ranks)
    run_stage(recipe, stage, out, seed, resume, options)
    torch.distributed.destroy_process_group()


def _grown_weights(recipe: Recipe, path: Path, seed: int) -> dict[str, dict[str, Tensor]]:
    """Weights of the pinned checkpoint, which has to lie in the run's folder; grown if it has fewer decoder layers."""
    from safetensors.torch import load_file

    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != recipe.start_sha256:
        raise PocketError(f"this recipe needs the pocket checkpoint it is pinned to as {path}: pass it with --start")
    state = load_file(path)
    if f"language_model.model.layers.{recipe.model.text_layers - 1}.input_layernorm.weight" not in state:
        return {"model": grow(state, recipe.model, seed)}
    return {"model": {name: state[portable_name(name)].float() for name in build_model(recipe.model, seed).state_dict()}}


def _start_weights(recipe: Recipe, stage: Stage, out: Path, seed: int) -> dict[str, dict[str, Tensor]] | None:
    """Weights of the finished stage before this one, or None for the first stage."""
    index = recipe.stages.index(stage)
    if index == 0:
        return None if recipe.start_sha256 is None else _grown_weights(recipe, out / START_NAME, seed)
    before = recipe.stages[index - 1]
    path = out / before.name / "checkpoint.pt"
    if not path.exists():
        raise PocketError(f"stage {stage.name} starts from {path}, which does not exist: run stage {before.name} first")
    saved = torch.load(path, weights_only=True)
    if saved["fingerprint"] != fingerprint(recipe, before, seed):
        raise PocketError(f"{path} was written with another recipe or seed; use another --out")
    if saved["step"] < before.length:
        raise PocketError(f"stage {before.name} stopped at step {saved['step']} of {before.length}: resume it first")
    if stage.restore_tower:
        first = _start_weights(recipe, recipe.stages[0], out, seed)
        if first is None:
            raise PocketError("restore_tower needs a recipe that starts from a checkpoint")
        tower = {name: value for name, value in first["model"].items() if "vision_tower" in name}
        saved["weights"]["model"].update(tower)
    return saved["weights"]


def run_recipe(recipe: Recipe, out: Path, seed: int = 0, resume: bool = False, options: RunOptions | None = None) -> Path:
    """Run all stages of a recipe and export the results; finished stages are skipped when resuming.

    Returns
    -------
    Path
        The exported ``from_pretrained`` folder of the LLaVA model; that of the LLaVA-NeXT model, where the recipe has a
        stage N, is ``export-next`` beside it.
    """
    out = Path(out)
    for stage in recipe.stages:
        checkpoint = run_stage(recipe, stage.name, out, seed, resume, options)
        export(checkpoint, out / ("export-next" if stage.name == "N" else "export"))
    return out / "export"


def export(checkpoint: Path, folder: Path) -> Path:
    """Turn a checkpoint into a ``from_pretrained`` folder (float16 weights; the heads are left out).

    Writes a ``MANIFEST.json`` with the SHA-256 of the weights and where they come from.
    """
    saved = torch.load(checkpoint, weights_only=True)
    config = stage_config(PocketConfig(**saved["model_config"]), saved["stage"])
    write_folder(saved["weights"]["model"], folder, config)
    weights = Path(folder) / "model.safetensors"
    manifest = {
        "sha256": {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()},
        "provenance": {key: saved[key] for key in ("stage", "step", "seed")},
        "settings": json.loads(saved["fingerprint"]),
        "torch": str(torch.__version__),
    }
    (Path(folder) / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser("python -m vtc.pocket.train", description="Train a pocket model from scratch.")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="cpu", help="settings of model and schedule")
    parser.add_argument("--stage", choices=STAGE_NAMES, help="run one stage only, without exporting")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--start", type=Path, help="checkpoint that the recipe is pinned to, if it is to one")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="type of the forward pass, else the recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads, else torch's default; part of bit-equality")
    parser.add_argument("--log-every", type=int, default=RunOptions.log_every)
    parser.add_argument("--validate-every", type=int, default=RunOptions.validate_every)
    parser.add_argument("--checkpoint-every", type=int, default=RunOptions.checkpoint_every)
    parser.add_argument("--stop-at", type=int, help="with --stage: save and stop after this step")
    values = parser.parse_args(arguments)
    if values.stop_at is not None and values.stage is None:
        parser.error("--stop-at needs --stage")
    if values.start is not None:
        values.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(values.start, values.out / START_NAME)
    if values.threads is not None:
        torch.set_num_threads(values.threads)
    recipe = RECIPES[values.recipe]
    if values.dtype is not None:
        recipe = replace(recipe, dtype=values.dtype)
    options = RunOptions(values.log_every, values.validate_every, values.checkpoint_every, values.stop_at)
    if values.stage is not None:
        run_stage(recipe, values.stage, values.out, values.seed, values.resume, options)
    else:
        print(run_recipe(recipe, values.out, values.seed, values.resume, options))


if __name__ == "__main__":
    main()
