"""Train the pocket models: ``python -m vtc.pocket.train --recipe cpu --out DIR``.

Stage A trains the vision tower on dense per-patch labels and on what the image contains. Stages B to I train on
answers, with auxiliary read-outs of what the noun phrases of a question refer to and of where visual tokens lie. Stage N
turns the result into a LLaVA-NeXT model that sees wide scenes as thumbnail and crops. A recipe exports
``from_pretrained`` folders to ``DIR/export`` and ``DIR/export-next``.

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
import math
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
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vtc.pocket.batches import IGNORE, Batch, prefix_tokens, training_batch, validation_batches, wide_validation_batches
from vtc.pocket.errors import PocketError
from vtc.pocket.model import (
    GRID,
    MENTION_TARGET_SIZES,
    N_PATCHES,
    PATCH_TARGET_SIZES,
    AuxiliaryHeads,
    MentionHeads,
    PocketConfig,
    PocketNextConfig,
    PositionHead,
    RelationHead,
    arrange_crops,
    build_model,
    decode_packed,
    encode_images,
    grow,
    portable_name,
    write_folder,
)

_PATCH_TARGET_NAMES = ("color", "shape", "digit", "word", "partner", "center")
START_NAME = "start.safetensors"
STAGE_NAMES = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "N")
_MENTION_TARGET_NAMES = ("count", "column", "row", "digit", "color", "shape")
_RELATION_TARGET_NAMES = ("is right", "is below", "asks vertical", "asks far", "agrees")
_NONE_WEIGHTS = (0.15, 0.15, 0.15, 0.15, 0.15, 0.3)  # most patches show nothing: count class 0 less
_WEIGHT_DECAY = 0.05
_BETAS = (0.9, 0.98)
_GRADIENT_NORM = 1.0
_FINAL_RATE = 0.02  # of the peak learning rate


@dataclass(frozen=True)
class Stage:
    """Settings of one training stage.

    Attributes
    ----------
    name
        ``"A"`` (tower only), ``"B"`` to ``"I"`` (answers, each on scenes of its own), or ``"N"`` (answers about wide
        scenes seen as crops, which makes the model a LLaVA-NeXT one).
    steps
        Length of the schedule.
    batch_size, easy_images
        Images per step, and how many of them come from easy-VQA; at least one must be a scene.
    learning_rate
        Peak rate, after a linear warm-up of a tenth of the steps, within 20..150.
    muon_rate
        Peak rate, on the same schedule, of the Muon optimizer (Jordan et al., 2024), which then updates the decoder's
        matrices in place of AdamW; 0 for AdamW throughout.
    end
        Stop after this many steps of the schedule; None runs all of it.
    restore_tower
        Start from the vision tower that the recipe's first stage started from.
    constant
        Hold the peak rate, after a warm-up of 100 steps; otherwise a cosine takes it down to 2 %.
    vision_rates
        (first step, factor on the learning rate of the tower and the heads), in order; factor 0 freezes them.
    patch_weight, content_weight, mention_weight, position_weight, relation_weight
        Weights of the auxiliary losses, the first two while the tower is trained, the others where the stage asks; the
        answer loss has weight 1.
    warm_heads
        For this many steps only the read-outs learn, the tower's too: fresh ones would send noise to what they read.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    easy_images: int = 0
    vision_rates: tuple[tuple[int, float], ...] = ((0, 1.0),)
    patch_weight: float = 1.0
    content_weight: float = 2.0
    mention_weight: float = 0.0
    constant: bool = False
    muon_rate: float = 0.0
    position_weight: float = 0.0
    end: int | None = None
    restore_tower: bool = False
    relation_weight: float = 0.0
    warm_heads: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        if self.name not in STAGE_NAMES:
            raise PocketError(f"a stage is named {', '.join(STAGE_NAMES)}, not {self.name!r}")
        if not 0 <= self.easy_images < self.batch_size:
            raise PocketError("a batch needs at least one scene: easy_images must be below batch_size")

    @property
    def length(self) -> int:
        """Number of steps to run."""
        return self.steps if self.end is None else min(self.steps, self.end)

    @property
    def asks(self) -> bool:
        """Whether this stage trains on answers."""
        return self.name != "A"

    def vision_rate(self, step: int) -> float:
        """Factor on the tower's learning rate at a step."""
        return [factor for first, factor in self.vision_rates if first <= step][-1]

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        if self.constant:
            return self.learning_rate * min(1.0, (step + 1) / 100)
        warm_up = max(20, min(150, self.steps // 10))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.learning_rate * min(1.0, (step + 1) / warm_up) * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Attributes
    ----------
    model
        Its size.
    stages
        Run in order; each starts from the weights of the one before.
    dtype
        Type of weights and activations during forward and backward; master weights are float32 throughout.
    ranks
        Processes that share each batch, with one thread each: on a machine with other work, two such processes get more
        done than one with two threads that wait for each other.
    start_sha256
        Digest of the first pocket checkpoint (``model.safetensors``), from which the first stage then grows its start
        weights; None starts from random ones.
    validation_scenes, validation_easy
        Images of the val split that are scored.
    """

    model: PocketConfig
    stages: tuple[Stage, ...]
    dtype: str = "bfloat16"
    ranks: int = 1
    start_sha256: str | None = None
    validation_scenes: int = 240
    validation_easy: int = 96


RECIPES: dict[str, Recipe] = {
    # From random weights. On two idle cores stage A takes about 0.09 s per step and the others about 0.25 s, so about an
    # hour; stages A and B have been run in part only.
    "cpu": Recipe(
        PocketConfig(),
        (
            Stage("A", steps=3000, batch_size=10, learning_rate=2.5e-3),
            Stage(
                "B",
                steps=4000,
                batch_size=8,
                easy_images=2,
                learning_rate=1.5e-3,
                vision_rates=((0, 0.0),),
                mention_weight=1.0,
                position_weight=0.3,
                constant=True,
            ),
            Stage(
                "C",
                steps=2000,
                batch_size=8,
                easy_images=2,
                learning_rate=1.5e-3,
                vision_rates=((0, 0.5),),
                patch_weight=0.14,
                content_weight=0.7,
                mention_weight=1.0,
                position_weight=0.3,
            ),
            Stage("N", steps=400, batch_size=8, learning_rate=5e-4, vision_rates=((0, 0.0),), mention_weight=1.0),
        ),
        ranks=2,
    ),
    # What the start of the next recipe comes from: 33 minutes for pocket and 9 for pocket-next, at 0.3 to 1.5 s per step on two
    # cores with much other work. The stages record what it took. B: the tower stays frozen, because fresh read-outs and
    # decoder layers send it noise. C, D: the position head makes the projector pass on where things are; the tower was
    # trained on answers alone there, which cost it words and digits. E therefore takes the first tower back, and F goes on
    # with it frozen. A next recipe should keep the tower's own targets whenever it trains it.
    "grow": Recipe(
        PocketConfig(),
        (
            Stage(
                "B",
                steps=500,
                batch_size=8,
                easy_images=2,
                learning_rate=1e-3,
                vision_rates=((0, 0.0),),
                mention_weight=1.0,
                constant=True,
            ),
            Stage(
                "C",
                steps=300,
                batch_size=8,
                easy_images=2,
                learning_rate=1e-3,
                vision_rates=((0, 0.25),),
                patch_weight=0.0,
                content_weight=0.0,
                mention_weight=1.0,
                position_weight=0.3,
                constant=True,
            ),
            Stage(
                "D",
                steps=700,
                batch_size=8,
                easy_images=2,
                learning_rate=1e-3,
                vision_rates=((0, 0.25),),
                patch_weight=0.0,
                content_weight=0.0,
                mention_weight=1.0,
                position_weight=0.3,
                end=400,
            ),
            Stage(
                "E",
                steps=500,
                batch_size=8,
                easy_images=2,
                learning_rate=8e-4,
                vision_rates=((0, 0.0),),
                mention_weight=1.0,
                position_weight=0.3,
                restore_tower=True,
            ),
            Stage(
                "F",
                steps=1000,
                batch_size=8,
                easy_images=2,
                learning_rate=1e-3,
                vision_rates=((0, 0.0),),
                mention_weight=1.0,
                position_weight=0.3,
            ),
            Stage(
                "N",
                steps=500,
                batch_size=4,
                learning_rate=5e-4,
                vision_rates=((0, 0.0),),
                mention_weight=1.0,
                end=400,
            ),
        ),
        ranks=2,
        start_sha256="83f971f9501b1f3a214738117564d1b4ecc05ff6b2122c90db45e9387af3ddf8",
        validation_scenes=120,
        validation_easy=48,
    ),
    # What the shipped checkpoints come from. G: the relation read-outs take spatial questions, at chance until then, to
    # 96 % of the val split within 1,200 steps. H: more ordinary questions again; digits gain from the tower's own targets,
    # words and counts stay where the constant rate of G had brought them. I: scenes with many words, more weight on the
    # tower's targets, and a rate that falls to its end. A step takes 0.4 s on an idle core, 0.5 to 1.4 s on a busy one.
    "refine": Recipe(
        PocketConfig(),
        (
            Stage(
                "G",
                steps=1200,
                batch_size=8,
                easy_images=2,
                learning_rate=1e-3,
                vision_rates=((0, 0.0), (300, 0.5)),
                patch_weight=0.14,
                content_weight=0.7,
                mention_weight=1.0,
                position_weight=0.3,
                relation_weight=3.0,
                warm_heads=100,
                constant=True,
            ),
            Stage(
                "H",
                steps=2600,
                batch_size=8,
                easy_images=2,
                learning_rate=1e-3,
                vision_rates=((0, 0.5),),
                patch_weight=0.14,
                content_weight=0.7,
                mention_weight=1.0,
                position_weight=0.3,
                relation_weight=3.0,
                end=700,
            ),
            Stage(
                "I",
                steps=2200,
                batch_size=8,
                easy_images=2,
                learning_rate=8e-4,
                vision_rates=((0, 0.5),),
                patch_weight=0.3,
                content_weight=0.7,
                mention_weight=1.0,
                position_weight=0.3,
                relation_weight=3.0,
            ),
            Stage(
                "N",
                steps=400,
                batch_size=4,
                learning_rate=5e-4,
                vision_rates=((0, 0.0),),
                mention_weight=1.0,
                relation_weight=1.0,
            ),
        ),
        start_sha256="feec2b20c51f4ee01fb316fe5bf9efa937686d4e02f85a87ae93e9db78e24879",
        validation_scenes=120,
        validation_easy=48,
    ),
    # A few seconds; the result knows nothing. Covers every code path of the real one.
    "smoke": Recipe(
        PocketConfig(width=32, vision_layers=2, text_layers=1),
        (
            Stage("A", steps=4, batch_size=2, learning_rate=1e-3),
            Stage(
                "B",
                steps=6,
                batch_size=3,
                easy_images=1,
                learning_rate=1e-3,
                vision_rates=((0, 1.0), (2, 0.0), (4, 1.0)),
                patch_weight=0.14,
                content_weight=0.7,
                mention_weight=1.0,
            ),
            Stage("N", steps=4, batch_size=2, learning_rate=1e-3, vision_rates=((0, 0.0),), mention_weight=1.0),
        ),
        validation_scenes=6,
        validation_easy=4,
    ),
}


# ---------------------------------------------------------------------------------------------- one training state


class Trainer:
    """Model, heads, float32 master weights and optimizer of one stage.

    Forward and backward run in the recipe's dtype on working copies; the optimizer updates the masters, which are then
    copied back. Without masters, bfloat16 weights would swallow most updates.
    """

    def __init__(self, recipe: Recipe, stage: Stage, seed: int, weights: dict[str, dict[str, Tensor]] | None) -> None:
        self.stage = stage
        self.seed = seed
        self.step = 0
        self.dtype = getattr(torch, recipe.dtype)
        self.model = build_model(_stage_config(recipe.model, stage.name), seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.heads = AuxiliaryHeads(recipe.model.width)
            self.mentions = MentionHeads(recipe.model.width)
            self.positions = PositionHead(recipe.model.width)
            self.relations = RelationHead(recipe.model.width)
        if weights is not None:
            missing, unexpected = self.model.load_state_dict(weights["model"], strict=False)
            if unexpected or [name for name in missing if not (stage.name == "N" and name.endswith("image_newline"))]:
                raise PocketError(f"these weights are of another model: missing {missing}, unexpected {unexpected}")
            if "heads" in weights:  # grown weights come without
                self.heads.load_state_dict(weights["heads"])
                self.mentions.load_state_dict(weights["mentions"])
            if "positions" in weights:
                self.positions.load_state_dict(weights["positions"])
            if "relations" in weights:
                self.relations.load_state_dict(weights["relations"])
        self.model.train()
        self._modules = {
            "model": self.model,
            "heads": self.heads,
            "mentions": self.mentions,
            "positions": self.positions,
            "relations": self.relations,
        }
        # Stage A never runs projector and decoder: their gradients stay None and the optimizer passes them over.
        self._working = {
            f"{part}.{name}": weight for part, module in self._modules.items() for name, weight in module.named_parameters()
        }
        self._masters = {name: weight.detach().clone().float().requires_grad_() for name, weight in self._working.items()}
        by_muon = [w for n, w in self._masters.items() if stage.muon_rate and ".language_model.layers." in n and w.dim() == 2]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self._parameter_groups(by_muon), lr=stage.learning_rate, betas=_BETAS, foreach=True)
        ]
        if by_muon:
            self.optimizers.append(torch.optim.Muon(by_muon, lr=stage.muon_rate, weight_decay=0.0, momentum=0.95))
        for module in self._modules.values():
            module.to(self.dtype)
        self._prefix = prefix_tokens()

    def _parameter_groups(self, others: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Tower, read-outs, the rest; each with and without weight decay (matrices that are not embeddings)."""
        groups: dict[tuple[bool, bool, bool], list[Tensor]] = defaultdict(list)
        for name, weight in self._masters.items():
            if any(weight is other for other in others):
                continue
            is_vision = "vision_tower" in name or name.startswith("heads.")
            is_head = not name.startswith("model.")
            groups[is_vision, is_head, weight.dim() >= 2 and "embed" not in name].append(weight)
        return [
            {"params": weights, "weight_decay": _WEIGHT_DECAY * decays, "is_vision": is_vision, "is_head": is_head}
            for (is_vision, is_head, decays), weights in sorted(groups.items())
        ]

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Make one update and return the losses."""
        stage, vision_rate = self.stage, self.stage.vision_rate(self.step)
        warming = self.step < stage.warm_heads
        for group in self.optimizers[0].param_groups:
            group["lr"] = stage.rate(self.step) * (vision_rate if group["is_vision"] else 1.0)
            if warming:
                group["lr"] = stage.learning_rate if group["is_head"] else 0.0
        for optimizer in self.optimizers[1:]:
            optimizer.param_groups[0]["lr"] = stage.rate(self.step) * stage.muon_rate / stage.learning_rate
        with torch.set_grad_enabled(vision_rate > 0 and not warming):
            features, pooled = self._encode(batch)
        losses: dict[str, Tensor] = {}
        total = torch.zeros(())
        if vision_rate > 0 or warming:
            losses["patch"], losses["content"] = self._auxiliary_losses(features, pooled, batch)
            total = stage.patch_weight * losses["patch"] + stage.content_weight * losses["content"]
        if stage.asks:
            visual, asked = self._project(features, batch), batch.answer_targets != IGNORE
            hidden, states = self._decode(visual, batch)
            logits = self.model.lm_head(hidden[asked]).float()
            losses["answer"] = F.cross_entropy(logits, batch.answer_targets[asked])
            total = total + losses["answer"]
            losses["mention"] = self._mention_loss(states[_middle(states)], batch)
            total = total + stage.mention_weight * losses["mention"]
            related = batch.relation_targets != IGNORE
            if stage.relation_weight and related.any():
                truths = batch.relation_targets[related].float()
                losses["relation"] = F.binary_cross_entropy_with_logits(self.relations(states)[related], truths)
                total = total + stage.relation_weight * losses["relation"]
            if stage.position_weight and batch.grid is None:
                losses["position"] = self._position_loss(visual)
                total = total + stage.position_weight * losses["position"]
        total.backward()
        self._update()
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def _update(self) -> None:
        for name, master in self._masters.items():
            gradient = self._working[name].grad
            master.grad = None if gradient is None else gradient.float()
            self._working[name].grad = None
        self._average_gradients()
        trained = [master for master in self._masters.values() if master.grad is not None]
        nn.utils.clip_grad_norm_(trained, _GRADIENT_NORM, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for name, master in self._masters.items():
                self._working[name].copy_(master)

    def _average_gradients(self) -> None:
        """Average over the processes of the run; all of them train the same weights at any step."""
        if not torch.distributed.is_initialized():
            return
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.flatten(0, -4)
        return encode_images(self.model, (images.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1).contiguous())

    def _project(self, features: Tensor, batch: Batch) -> Tensor:
        visual = self.model.model.multi_modal_projector(features)
        if batch.grid is not None:
            visual = arrange_crops(self.model, visual.unflatten(0, (len(batch.images), -1)), *batch.grid)
        return visual

    def _decode(self, visual: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        return decode_packed(self.model, visual, self._prefix, batch.tokens, batch.segments, batch.positions)

    def _mention_loss(self, middle: Tensor, batch: Batch) -> Tensor:
        said = batch.mention_targets[..., 0] != IGNORE
        targets, loss = batch.mention_targets[said], torch.zeros(())
        parts = self.mentions(middle[said]).split(MENTION_TARGET_SIZES, dim=-1)
        for kind, logits in enumerate(parts):
            if (targets[:, kind] != IGNORE).any():
                loss = loss + F.cross_entropy(logits, targets[:, kind], ignore_index=IGNORE)
        return loss / len(parts)

    def _position_loss(self, visual: Tensor) -> Tensor:
        cells = torch.arange(N_PATCHES).repeat(len(visual))
        columns, rows = (logits.flatten(0, 1) for logits in self.positions(visual))
        return F.cross_entropy(columns, cells % GRID) + F.cross_entropy(rows, cells // GRID)

    def _auxiliary_losses(self, features: Tensor, pooled: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        patch_logits, content_logits = self.heads(features, pooled)
        patch_loss = torch.zeros(())
        parts = patch_logits.split(PATCH_TARGET_SIZES, dim=-1)
        for kind, (logits, none_weight) in enumerate(zip(parts, _NONE_WEIGHTS, strict=True)):
            weights = logits.new_ones(logits.shape[-1])
            weights[0] = none_weight
            targets = batch.patch_targets[..., kind].reshape(-1)
            patch_loss = patch_loss + F.cross_entropy(logits.reshape(len(targets), -1), targets, weights)
        known = batch.contents[:, 0] >= 0
        return patch_loss, F.binary_cross_entropy_with_logits(content_logits[known], batch.contents[known])

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
        """Accuracy per question type (stage B) and of the patch heads on patches that show something."""
        hits: dict[str, list[bool]] = defaultdict(list)
        probes: dict[str, list[bool]] = defaultdict(list)
        said: dict[str, list[bool]] = defaultdict(list)
        for batch in batches:
            features, pooled = self._encode(batch)
            patch_logits, _ = self.heads(features, pooled)
            for kind, logits in enumerate(patch_logits.split(PATCH_TARGET_SIZES, dim=-1)):
                if batch.grid is not None:
                    break
                targets = batch.patch_targets[..., kind]
                shown = targets > 0
                probes[_PATCH_TARGET_NAMES[kind]] += (logits.argmax(-1)[shown] == targets[shown]).tolist()
            if self.stage.asks:
                hidden, states = self._decode(self._project(features, batch), batch)
                predicted = self.model.lm_head(hidden).argmax(-1)
                guesses = self.mentions(states[_middle(states)]).split(MENTION_TARGET_SIZES, dim=-1)
                for kind, logits in enumerate(guesses):
                    targets = batch.mention_targets[..., kind]
                    known = targets != IGNORE
                    said[_MENTION_TARGET_NAMES[kind]] += (logits.argmax(-1)[known] == targets[known]).tolist()
                found = self.relations(states) > 0
                for name, guess, truth in zip(
                    _RELATION_TARGET_NAMES, found.unbind(-1), batch.relation_targets.unbind(-1), strict=True
                ):
                    known = truth != IGNORE
                    said[name] += (guess[known] == (truth[known] == 1)).tolist()
                for row, types in enumerate(batch.question_types):
                    # Two targets per question: the answer, and the end after it.
                    places = (batch.answer_targets[row] != IGNORE).nonzero()[::2, 0].tolist()
                    for place, kind_name in zip(places, types, strict=True):
                        hits[kind_name].append(bool(predicted[row, place] == batch.answer_targets[row, place]))
        return {
            "answers": {kind: round(sum(v) / len(v), 4) for kind, v in sorted(hits.items())},
            "mentions": {kind: round(sum(v) / max(1, len(v)), 4) for kind, v in said.items()},
            "patches": {kind: round(sum(v) / max(1, len(v)), 4) for kind, v in probes.items()},
        }

    # ------------------------------------------------------------------------------------------ persistence

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Float32 state dicts of model and heads."""
        return {
            part: {
                name: self._masters.get(f"{part}.{name}", value).detach().float().clone()
                for name, value in module.state_dict().items()
            }
            for part, module in self._modules.items()
        }

    def save(self, path: Path, recipe: Recipe) -> None:
        """Write a checkpoint; a crash half-way leaves the previous one in place."""
        contents = {
            "fingerprint": _fingerprint(recipe, self.stage, self.seed),
            "stage": self.stage.name,
            "step": self.step,
            "seed": self.seed,
            "model_config": asdict(recipe.model),
            "weights": self.weights(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        unfinished = path.with_suffix(".tmp")
        torch.save(contents, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path, recipe: Recipe, stage: Stage, seed: int) -> Trainer:
        """Continue from a checkpoint.

        Raises
        ------
        PocketError
            If it was written with other settings.
        """
        saved = torch.load(path, weights_only=True)
        if saved["fingerprint"] != _fingerprint(recipe, stage, seed):
            raise PocketError(f"{path} was written with another recipe or seed; use another --out")
        trainer = cls(recipe, stage, seed, saved["weights"])
        for optimizer, state in zip(trainer.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        trainer.step = saved["step"]
        return trainer


def _middle(states: Sequence[Tensor]) -> int:
    """Number of the states that noun phrases are read from: after half of the layers."""
    return (len(states) - 1) // 2


def _stage_config(config: PocketConfig, stage: str) -> PocketConfig:
    """Size of the model that a stage trains."""
    return PocketNextConfig(**asdict(config)) if stage == "N" else config


def _fingerprint(recipe: Recipe, stage: Stage, seed: int) -> str:
    """Return, as text, the settings that must not change between a checkpoint and its continuation.

    The length of a stage with constant rate is not among them: its steps do not depend on it.
    """
    settings = asdict(stage)
    if stage.constant:
        settings.pop("steps")
    else:
        settings.pop("constant")
    start = [] if recipe.start_sha256 is None else [recipe.start_sha256]
    settings.pop("end")  # what a step does is independent of it
    if not stage.restore_tower:
        settings.pop("restore_tower")
    if not stage.position_weight:
        settings.pop("position_weight")
    for name in ("muon_rate", "relation_weight", "warm_heads"):
        if not settings[name]:
            settings.pop(name)
    return json.dumps([asdict(recipe.model), recipe.dtype, recipe.ranks, settings, seed, *start], sort_keys=True)


# ---------------------------------------------------------------------------------------------- runs


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
    if saved["fingerprint"] != _fingerprint(recipe, before, seed):
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
    config = _stage_config(PocketConfig(**saved["model_config"]), saved["stage"])
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
