"""Released checkpoints: their configurations (``released.json``, facts gathered from the hub), and what vtc does with each.

``python tests/released.py`` (``make released``) works through all of them, minutes of one core, and renews this release's part of
``results/released.json`` and the list ``results/released.md`` made of it, which docs/families.md shows. ``test_released.py`` checks
a sample against it.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import vtc
from vtc.core import Stage
from vtc.counts import count, image_processor
from vtc.errors import UnverifiableError, VtcError
from vtc.inspect import examine, load_config
from vtc.verify import check
from vtc.verify.reference import Plan
from vtc.verify.twin import shrink

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT.parent / "results"
SIZES = ((640, 480), (224, 224), (1000, 300), (336, 672), (1280, 960), (90, 120))
"""Width and height of the pictures that are counted."""
REDUCERS = ("uniform", "divprune", "fastv", "visionzip")
_LIMIT = 1e-5


@functools.cache
def checkpoints() -> dict[str, dict[str, Any]]:
    """Return the files of every checkpoint, by its name on the hub."""
    return json.loads((ROOT / "released.json").read_text())


@contextmanager
def folder_of(name: str) -> Iterator[str]:
    """Write the files of a checkpoint to a folder."""
    with tempfile.TemporaryDirectory() as folder:
        for file, content in checkpoints()[name].items():
            (Path(folder) / file).write_text(json.dumps(content))
        yield folder


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        yield


def structure(name: str) -> dict[str, Any]:
    """Return what ``vtc check`` says of a checkpoint: family, counts for :data:`SIZES`, or the reason against it."""
    with folder_of(name) as folder, _quiet():
        try:
            report = examine(folder, SIZES[0])
            if report.retriever:
                return {"family": report.family.name, "retriever": True}
            counts = [report.count]
            if report.count.tokens is not None and not report.family.probed:
                fixed = report.family.unit == "image" and report.family.facts.tokens or report.family.example
                processor = None if fixed else image_processor(folder)
                counts += [count(report.family, size, processor) for size in SIZES[1:]]
        except VtcError as error:
            return {"refused": re.sub(r" \(supported: .*?\)", "", str(error).replace(folder, name))}
    facts = report.family.facts
    return {
        "family": facts.family,
        "adapter": not report.family.probed,
        "stages": [stage.value for stage in Stage if not facts.stages[stage]],
        "counts": [c.tokens for c in counts] if len(counts) == len(SIZES) else counts[0].why.replace(folder, name),
    }


def small_copy(name: str) -> dict[str, str]:
    """Run the reducers of :data:`REDUCERS` at half of the tokens on a small copy; return what came out, by reducer."""
    with folder_of(name) as folder:
        config = load_config(folder)
    with _quiet():
        same = json.dumps(shrink(config).to_dict(), sort_keys=True, default=str)
    if same not in _copies:  # checkpoints of several sizes often have one small copy
        _copies[same] = compared(config)
    return _copies[same]


_copies: dict[str, dict[str, str]] = {}


def compared(config: Any) -> dict[str, str]:
    """Compare patched and reference logits of a small copy: ``"ok"``, ``"refused: ..."`` or what is wrong, by reducer."""
    from vtc.verify.memory import BUSY

    token = BUSY.set(True)
    try:
        with check._calm():
            try:
                bench = check._prepare(config, None, None)
            except UnverifiableError as error:
                return dict.fromkeys(REDUCERS, f"not checked: {error}")
            if bench.calibration.state != "ok":
                return dict.fromkeys(REDUCERS, f"not checked: {bench.calibration.text}")
            return {reducer: _one(bench, reducer) for reducer in REDUCERS}
    finally:
        BUSY.reset(token)


def _one(bench: Any, reducer: str) -> str:
    prompt, plain, got = bench.prompts["batch"], bench.plain["batch"], check._Observed()
    try:
        with vtc.patch(bench.twin.model, reducer, keep=0.5) as handle:
            (part,) = handle.reducer.parts()
            check._generate(bench.twin.model, bench.family, prompt, got)
            kept = [(k.row, k.mask) for k in handle.stats.kept]
    except check._REFUSALS as error:
        return f"refused: {error}".partition("; these reducers work here")[0]
    gone = torch.zeros_like(prompt.real)
    for (row, mask), (where, columns) in zip(kept, prompt.images, strict=True):
        if row != where or len(mask) != len(columns) or not 0 < int(mask.sum()) <= -(-len(mask) // 2):
            return f"{int(mask.sum())} of {len(columns)} tokens kept"
        gone[row, columns] = ~mask
    hide = dict.fromkeys(range(part.layer, bench.family.facts.layers), gone)
    write = {0: functools.partial(_written, got.embeds, prompt.kinds > 0)} if part.layer == 0 else {}
    compact = hide if part.position_policy == "compact" else {}
    wanted = bench.reference("batch", Plan(hide=hide, compact=compact, write=write), got.tokens)[:, : bench.steps["batch"]]
    error = float((got.logits[:, : wanted.shape[1]] - wanted).abs().max())
    effect = float((wanted[:, 0] - plain.logits[:, 0]).abs().max())
    limit = max(_LIMIT * max(1.0, float(wanted.abs().max())), bench.limits["batch"])
    if not error <= limit or effect < 50 * limit:
        return f"off by {error:.1e} where dropping changes {effect:.1e}"
    layers = got.cache.layers
    if max(layer.keys.shape[-2] for layer in layers[part.layer :]) > int((prompt.real & ~gone).sum(1).max()) + check.STEPS:
        return "the KV cache holds what was dropped"
    return "ok"


def _written(embeds: torch.Tensor, visual: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """States entering the first layer, with what the reducer merged into visual tokens."""
    out = states.clone()
    out[:, : visual.shape[1]][visual] = embeds[visual].to(states.dtype)
    return out


def outcome(name: str) -> dict[str, Any]:
    """Return everything about one checkpoint."""
    found = structure(name)
    return found if "refused" in found or found.get("retriever") else {**found, "reducers": small_copy(name)}


# ----------------------------------------------------------------------------------------------------------------- list
def table(data: dict[str, dict[str, Any]]) -> str:
    """Return the list of all checkpoints in Markdown; ``data``: outcomes by release of transformers."""
    newest = max(data, key=lambda v: [int(p) for p in v.split(".")])
    head = "| checkpoint | family | tokens of 640 x 480 | " + " | ".join(f"`{r}`" for r in REDUCERS) + " |"
    lines = [head, "|---|---|--:|" + ":-:|" * len(REDUCERS)]
    notes: dict[str, list[str]] = {}
    for name, found in sorted(data[newest].items(), key=lambda item: item[0].lower()):
        if "refused" in found:
            notes.setdefault(found["refused"].replace(name, "..."), []).append(name)
            continue
        if found.get("retriever"):
            notes.setdefault(f"a retriever (`{found['family']}`): its vectors are pooled, see docs/cookbook.md", []).append(
                name
            )
            continue
        counts = found["counts"]
        family = f"`{found['family']}`" + ("" if found["adapter"] else ", no adapter")
        marks = ["✓" if found["reducers"][r] == "ok" else "–" for r in REDUCERS]
        lines.append(f"| {name} | {family} | {counts[0] if isinstance(counts, list) else '?'} | {' | '.join(marks)} |")
    what = "✓ a small copy with the checkpoint's own settings, half of the tokens dropped, equals the reference (transformers "
    what += f"{newest}); – refused, for the reason `vtc check` gives; ? the processor's settings or tokenizer were not there."
    lines += ["", what, "", "Not served:", ""]
    lines += [f"* {', '.join(names)}: {reason}" for reason, names in sorted(notes.items(), key=lambda item: item[1])]
    return "\n".join(lines)


def main() -> None:
    """Renew the files; further arguments name checkpoints that are worked through again, by a part of their name."""
    file = RESULTS / "released.json"
    data = json.loads(file.read_text()) if file.exists() else {}
    mine = data.setdefault(transformers.__version__, {})
    for name in checkpoints():
        if len(sys.argv) < 2 or any(part in name for part in sys.argv[1:]):
            mine[name] = outcome(name)
            print(name, mine[name], flush=True)
            file.write_text(json.dumps({v: dict(sorted(run.items())) for v, run in sorted(data.items())}, indent=1) + "\n")
    (RESULTS / "released.md").write_text(table(data) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
