"""The check itself: a patched twin against the slow reference, item by item."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtc
from vtc.core import Reducer, Selection, Signals, Stage
from vtc.errors import (
    UnknownArgumentError,
    UnsupportedFeatureError,
    UnsupportedModelError,
    UnsupportedSignalError,
    UnverifiableError,
)
from vtc.families import family_of, unwrap
from vtc.families.base import Family
from vtc.verify.inputs import Prompt, prompt_for
from vtc.verify.memory import BUSY
from vtc.verify.reference import NoReferenceError, Plan, logits_after
from vtc.verify.twin import GRID, Twin, build, parameters, said
from vtc.verify.verdict import Item, State, Verdict

STEPS = 8
"""Decode steps after the prefill."""
LIMIT = 1e-5
"""Difference from the reference that is allowed at logits of the size of 1, where rounding alone does not explain more."""
STAGES = ("boundary", "decoder")
_ROWS = {"batch": [1, 2], "single": [1], "clips": [1, 1]}
_ATTEMPTS = ((False, GRID), (False, 4 * GRID), (True, GRID))  # heads of their own size, rows of visual tokens
_OF_THE_CACHE = ("cache_position",)  # where older releases write into a cache: dynamic ones append, whatever it says
_REFUSALS = (UnsupportedFeatureError, UnsupportedModelError, UnsupportedSignalError)


# ------------------------------------------------------------------------------------------------------------ reducers
def half(features: Tensor) -> Tensor:
    """Positions (ascending) of about half of the rows of ``features (n, D)``: those that point most in one direction.

    The cut is where two neighbours in the ranking differ most, so that rounding does not move it: ``n // 2`` or up to 3 fewer.
    """
    direction = torch.cos(torch.arange(features.shape[1], dtype=torch.float64))
    score = features.double() @ direction
    ranked, order = score.sort(descending=True, stable=True)
    most = max(1, len(score) // 2)
    least = max(1, most - 3)
    if len(score) == 1:
        return order
    gaps = ranked[least - 1 : most] - ranked[least : most + 1]
    return order[: least + int(gaps.argmax())].sort().values


@dataclass(frozen=True, kw_only=True)
class _Half(Reducer):
    """Keep :func:`half` of every image."""

    allowed_positions: ClassVar[tuple[Any, ...]] = ("original", "compact")

    def select(self, signals: Signals) -> Selection:
        chosen = [half(f) for f in signals.features]
        longest = max(map(len, chosen))
        index = torch.stack([torch.cat([i, i.new_zeros(longest - len(i))]) for i in chosen])
        valid = torch.stack([torch.arange(longest) < len(i) for i in chosen])
        return Selection(index, valid=None if valid.all() else valid)


@dataclass(frozen=True, kw_only=True)
class _AtBoundary(_Half):
    stage: ClassVar[Stage] = Stage.BOUNDARY
    name: ClassVar[str] = "verify_boundary"


@dataclass(frozen=True, kw_only=True)
class _InDecoder(_Half):
    stage: ClassVar[Stage] = Stage.DECODER
    name: ClassVar[str] = "verify_decoder"

    layer: int = 2


# --------------------------------------------------------------------------------------------------------- observation
@dataclass(eq=False)
class _Observed:
    """What a run of ``generate`` showed from outside.

    Attributes
    ----------
    tokens, logits : Tensor
        ``(B, STEPS + 1)`` and ``(B, STEPS + 1, V)``.
    cache : object
        KV cache of the output.
    positions : list of (Tensor or None)
        Position ids the text model was given, by call.
    entering : dict
        Decoder layer -> hidden states ``(B, S, D)`` that entered it in the prefill.
    embeds : Tensor or None
        Input embeddings of the prefill.
    arguments : dict
        Decoder layer -> shapes of all tensors among its arguments in the prefill, by name.
    """

    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    cache: Any = None
    positions: list[Tensor | None] = field(default_factory=list)
    entering: dict[int, Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None
    arguments: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def all_positions(self) -> Tensor | None:
        """Position ids of the whole sequence, where the text model was given any."""
        return None if any(p is None for p in self.positions) else torch.cat(self.positions, -1)  # type: ignore[arg-type]


def _generate(model: Any, family: Family, prompt: Prompt, seen: _Observed) -> None:
    """Run ``generate`` and fill ``seen``, also where the run fails half-way."""
    hooks = [family.text.register_forward_pre_hook(_text_watch(seen), with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(_layer_watch(seen, i, layer), with_kwargs=True) for i, layer in enumerate(family.layers)
    ]
    try:
        with torch.no_grad():
            out = model.generate(
                **prompt.call, max_new_tokens=STEPS + 1, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    finally:
        for hook in hooks:
            hook.remove()
    seen.tokens = out.sequences[:, prompt.kinds.shape[1] :]
    seen.logits = torch.stack(list(out.logits), 1)
    seen.cache = next((out[name] for name in ("cache", "past_key_values") if name in out), None)


def _text_watch(seen: _Observed) -> Callable[..., None]:
    def watch(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen.positions:
            seen.embeds = kwargs.get("inputs_embeds")
        positions = kwargs.get("position_ids")
        seen.positions.append(positions if isinstance(positions, Tensor) else None)

    return watch


def _layer_watch(seen: _Observed, i: int, layer: nn.Module) -> Callable[..., None]:
    names = list(inspect.signature(layer.forward).parameters)

    def watch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if i not in seen.arguments:
            call = dict(zip(names, args, strict=False)) | kwargs
            seen.entering[i] = call[names[0]]
            seen.arguments[i] = {name: tuple(t.shape) for name, t in _tensors_of(call)}

    return watch


def _traces(model: nn.Module) -> dict[str, Any]:
    """What un-patching must restore: classes, hooks, names of attributes, and functions set on instances."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        mine = vars(module)
        hooks = {k: list(v) for k, v in mine.items() if "_hooks" in k and isinstance(v, dict)}
        functions = {k: id(v) for k, v in mine.items() if callable(v)}
        made = {k: id(v) for k, v in vars(type(module)).items() if callable(v)}
        seen[name] = (type(module), sorted(mine), hooks, functions, made)
    return seen


# ---------------------------------------------------------------------------------------------------------------- runs
@dataclass(eq=False)
class _Bench:
    """A twin, ready: unpatched runs of its prompts, and how far the reference is from them.

    Attributes
    ----------
    twin, family : Twin, Family
        The model.
    prompts, plain : dict
        Prompts, and what the unpatched model does with them, by name.
    limits, steps : dict
        Difference allowed for each prompt, and how many steps the reference can follow.
    single : set of str
        Prompts after which a model without a KV cache lets earlier tokens see later ones: each step is a run of its own.
    no_clips : str
        Why there is no prompt with clips; empty if there is one.
    calibration : Item
        What came out of :meth:`calibrate`.
    """

    twin: Twin
    family: Family
    prompts: dict[str, Prompt]
    plain: dict[str, _Observed]
    limits: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    single: set[str] = field(default_factory=set)
    no_clips: str = ""
    calibration: Item = Item("reference", "not checked")

    @property
    def text(self) -> str:
        """Path of the text model."""
        return next(name for name, module in self.twin.model.named_modules() if module is self.family.text)

    @property
    def layer(self) -> int:
        """Where the decoder reducer acts."""
        return min(max(self.family.facts.first_layer, 2), self.family.facts.layers - 1)

    def reference(self, name: str, plan: Plan, tokens: Tensor) -> Tensor:
        """Logits of the slow reference, told which tokens were generated."""
        prompt, positions = self.prompts[name], self.plain[name].all_positions
        run = functools.partial(logits_after, self.twin.model, plan, self.text)
        if name not in self.single:
            return run(prompt.followed_by(tokens[:, :-1]), positions, STEPS + 1)
        whole, made = prompt.kinds.shape[1], []
        for n in range(self.steps.get(name, STEPS + 1)):
            here = None if positions is None else positions[..., : whole + n]
            made.append(run(prompt.followed_by(tokens[:, :n]), here, 1))
        return torch.cat(made, 1)

    def calibrate(self) -> bool:
        """Compare the unpatched twin with the reference: what rounding does, and how many steps can be followed."""
        notes, worst = [], 0.0
        for name, prompt in self.prompts.items():
            logits, why = self.plain[name].logits, ""
            try:
                wanted = self.reference(name, Plan(), self.plain[name].tokens)
                if not alike(logits, wanted):
                    self.single.add(name)
                    wanted = self.reference(name, Plan(), self.plain[name].tokens)
            except NoReferenceError as error:
                why = str(error)
            except Exception as error:
                why = f"the reference raised {said(error)}"
            else:
                steps = alike(logits, wanted)
                if not steps:
                    why = "without a KV cache the unpatched model computes something else: there is nothing to compare with"
            if why and name == "clips":
                self.no_clips = why
                continue
            if why:
                self.calibration = Item("reference", "not checked", why)
                return False
            error_ = float((logits - wanted)[:, :steps].abs().max())
            self.steps[name], worst = steps, max(worst, error_)
            self.limits[name] = max(LIMIT * max(1.0, float(wanted.abs().max())), 8 * error_)
            if steps <= STEPS:
                notes.append(f"{prompt.name}: only the first {steps} of {STEPS + 1} steps can be followed without a KV cache")
        self.calibration = Item("reference", "ok", "; ".join(["agrees with the unpatched small copy", *notes]), error=worst)
        return True


def alike(logits: Tensor, wanted: Tensor) -> int:
    """How many leading steps of ``(B, steps, V)`` are the same but for rounding."""
    scale = max(1.0, float(wanted.abs().max()))
    steps = min(logits.shape[1], wanted.shape[1])
    return int(((logits - wanted)[:, :steps].abs().flatten(2).amax((0, 2)) < 1e-3 * scale).long().cumprod(0).sum())


def _prepare(config: Any, kind: type[nn.Module] | None, cache: str | None) -> _Bench:
    """Build a twin and prompts it can run on.

    Raises
    ------
    UnverifiableError
        None was found; the message is that of the first attempt.
    """
    first: UnverifiableError | None = None
    unlike: _Bench | None = None  # runs, but not as the reference does
    for whole_heads, grid in _ATTEMPTS:
        try:
            twin = build(config, kind, cache, whole_heads=whole_heads, grid=grid)
            family = family_of(twin.model)
            if not isinstance(family, Family):
                raise UnverifiableError(f"a {type(twin.model).__name__} has no language model that generates")
            for dtype in (torch.float64, torch.float32):
                try:
                    bench = _fed(dataclasses.replace(twin, model=twin.model.to(dtype)), family)
                except UnverifiableError as error:
                    first = first or error
                else:
                    if bench.calibrate():
                        return bench
                    unlike = bench
        except UnverifiableError as error:
            first = first or error
        if unlike is not None:
            return unlike
    assert first is not None
    raise first


def _fed(twin: Twin, family: Family) -> _Bench:
    """Prompts for a twin, and what it does with them."""
    bench = _Bench(twin, family, {}, {})
    for name, rows in _ROWS.items():
        if name == "clips" and family.describe_video is None:
            bench.no_clips = "this model takes no clips"
            continue
        try:
            prompt, seen = prompt_for(twin, family, rows, video=name == "clips"), _Observed()
            if name != "clips" and min(len(columns) for _, columns in prompt.images) < 4:
                raise UnverifiableError(f"a picture becomes {len(prompt.images[0][1])} tokens, too few to drop some")
            try:
                _generate(twin.model, family, prompt, seen)
            except Exception as error:
                raise UnverifiableError(f"generate of the unpatched small model raised {said(error)}") from error
        except UnverifiableError as error:
            if name != "clips":
                raise
            bench.no_clips = str(error)
            continue
        bench.prompts[name], bench.plain[name] = prompt, seen
    return bench


@dataclass(frozen=True)
class _Run:
    """What came out of one reducer on one prompt.

    Attributes
    ----------
    state, text, error, limit
        As in :class:`~vtc.verify.Item`.
    cache : (bool, str) or None
        Whether the KV cache is right, and a sentence about it; ``None``: the run did not come that far.
    arguments : list of str
        What is wrong with the arguments of the decoder layers.
    """

    state: State
    text: str
    error: float | None = None
    limit: float | None = None
    cache: tuple[bool, str] | None = None
    arguments: list[str] = field(default_factory=list)


class _Checks:
    """Runs the checks of one bench and collects the items."""

    def __init__(self, bench: _Bench, stages: Sequence[str]) -> None:
        self.bench, self.stages = bench, tuple(stages)
        self.model, self.family = bench.twin.model, bench.family
        self.items: list[Item] = []

    def run(self) -> list[Item]:
        """Everything, in order."""
        before = _traces(self.model)
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        facts = self.family.facts
        size = f"{parameters(self.model) / 1e6:.1f} M parameters, {facts.layers} decoder layers, {dtype}"
        self.items.append(Item("small copy", "ok", f"{size}; " + " and ".join(p.name for p in self.bench.prompts.values())))
        self.items.append(self.bench.calibration)
        if self.bench.calibration.state != "ok":
            return self.items
        for stage in self.stages:
            policies = ["original"] if facts.mrope else ["original", "compact"]
            for policy in policies:
                self.compare(stage, policy, ("batch", "single"), f"{stage}, {policy} positions")
            if facts.mrope:
                why = "this model's positions have several dimensions, which cannot be compacted"
                self.items.append(Item(f"{stage}, compact positions", "not checked", why, stage, "compact", optional=True))
            if self.bench.no_clips:
                self.items.append(Item(f"{stage}, clips", "not checked", self.bench.no_clips, stage, optional=True))
            elif "clips" in self.bench.steps:
                self.compare(stage, "original", ("clips",), f"{stage}, clips")
        self.unpatched(before)
        return self.items

    # ------------------------------------------------------------------------------------------------------- one reducer
    def compare(self, stage: str, policy: str, names: tuple[str, ...], title: str) -> None:
        """Run a reducer on several prompts; one item for logits, one for the KV cache, one for the layers' arguments."""
        layer = 0 if stage == "boundary" else self.bench.layer
        options: dict[str, Any] = {"keep": 0.5, "positions": policy, "newlines": "compete"}
        reducer: Reducer = _AtBoundary(**options) if stage == "boundary" else _InDecoder(**options, layer=layer)
        clips = names == ("clips",)
        runs: list[_Run] = []
        for name in names:
            runs.append(self.one(name, layer, policy, reducer))
            if runs[-1].state != "ok":
                break
        worst = max(runs, key=lambda run: (run.state != "ok", run.error or 0.0))
        make = functools.partial(Item, stage=stage, positions="" if clips else policy, optional=clips)
        self.items.append(make(title, worst.state, worst.text, error=worst.error, limit=worst.limit))
        known = [run for run in runs if run.cache is not None]
        if known:
            wrong = [run.cache[1] for run in known if run.cache and not run.cache[0]]
            told = "; ".join(wrong or [run.cache[1] for run in known if run.cache])
            self.items.append(make(f"{title}: KV cache", "failed" if wrong else "ok", told))
            long = [text for run in known for text in run.arguments]
            self.items.append(
                make(f"{title}: layer arguments", "failed" if long else "ok", "; ".join(long) or self.shortened(layer))
            )

    def one(self, name: str, layer: int, policy: str, reducer: Reducer) -> _Run:
        """Run a reducer on one prompt and compare."""
        prompt, plain, got = self.bench.prompts[name], self.bench.plain[name], _Observed()
        try:
            with vtc.patch(self.model, reducer) as handle:
                _generate(self.model, self.family, prompt, got)
                told = [(kept.row, kept.mask) for kept in handle.stats.kept]
        except _REFUSALS as error:
            return _Run("not checked", f"vtc refuses: {error}")
        except Exception as error:
            return _Run("failed", "; ".join([f"{prompt.name}: {said(error)}", *self.arguments(name, layer, got, 0)]))
        plan, held, why = self.plan(name, layer, policy, told)
        if why:
            return _Run("failed", f"{prompt.name}: {why}")
        long = [f"{prompt.name}: {text}" for text in self.arguments(name, layer, got, held)]
        run = functools.partial(_Run, cache=self.cache(name, layer, got, held), arguments=long)
        try:
            wanted = self.bench.reference(name, plan, got.tokens)
        except NoReferenceError as error:
            return run("not checked", str(error))
        except Exception as error:
            return run("not checked", f"the reference raised {said(error)}")
        steps, limit = self.bench.steps[name], self.bench.limits[name]
        effect = float((wanted[:, 0] - plain.logits[:, 0]).abs().max())
        if effect < max(1e-3, 50 * limit):
            why = f"dropping half of the tokens moves the logits by {effect:.1e} only, too little to tell"
            return run("not checked", f"{prompt.name}: {why}")
        wanted = wanted[:, :steps]
        errors = (got.logits[:, :steps] - wanted).abs().flatten(2).amax((0, 2))
        error = float(errors.max())
        if not error <= limit:  # (so that NaN is none)
            at = int((~(errors <= limit)).long().argmax())
            where = "the prefill" if at == 0 else f"decode step {at}"
            text = f"{prompt.name}: logits differ from {where} on (dropping moves them by {effect:.1e})"
            return run("failed", "; ".join([text, *self.arguments(name, layer, got, 0)]), error, limit)
        if not self.greedy(wanted, got.tokens[:, :steps], limit):
            return run("failed", f"{prompt.name}: generate chose another token than the likeliest", error, limit)
        text = f"half of the visual tokens dropped, prefill and {steps - 1} decode steps equal the reference"
        return run("ok", text, error, limit)

    def plan(self, name: str, layer: int, policy: str, told: list[tuple[int, Tensor]]) -> tuple[Plan, int, str]:
        """What the reducer does to a prompt, worked out from the unpatched run; how many tokens a layer then holds at most.

        ``told``: row and kept slots of every image, as the patched model reports them; only how the placeholders are divided
        into images is taken from it. The last entry says what is wrong with it.
        """
        prompt, plain, layers = self.bench.prompts[name], self.bench.plain[name], self.family.facts.layers
        if not told:
            return Plan(), 0, "nothing was reduced: the statistics list no image, and nobody complained"
        states = plain.embeds if layer == 0 else plain.entering[layer]
        assert states is not None
        gone = torch.zeros_like(prompt.real)
        places = {row: (prompt.kinds[row] > 0).nonzero()[:, 0] for row in range(len(gone))}
        start = dict.fromkeys(places, 0)
        for n, (row, mask) in enumerate(told):
            columns = places[row][start[row] : start[row] + len(mask)]
            start[row] += len(mask)
            if len(columns) != len(mask):
                return Plan(), 0, f"the images reported have more tokens than row {row} has placeholders"
            kept = torch.zeros_like(mask).index_fill(0, half(states[row, columns]), True)
            if not torch.equal(kept, mask):
                return Plan(), 0, f"image {n} keeps other tokens than the reducer chose"
            gone[row, columns] = ~kept
        if any(start[row] != len(columns) for row, columns in places.items()):
            return Plan(), 0, "not every placeholder belongs to an image that was reported"
        hide = dict.fromkeys(range(layer, layers), gone)
        held = int((prompt.real & ~gone).sum(1).max())
        return Plan(hide=hide, compact=hide if policy == "compact" else {}), held, ""

    def greedy(self, logits: Tensor, tokens: Tensor, limit: float) -> bool:
        """Whether every token is the likeliest one by the reference, among those without a special meaning."""
        special = [i for i in self.bench.twin.special if i < logits.shape[-1]]
        likely = logits.index_fill(2, torch.tensor(special, dtype=torch.long), -torch.inf).amax(2)
        return bool((logits.gather(2, tokens[..., None])[..., 0] >= likely - 2 * limit).all())

    def cache(self, name: str, layer: int, got: _Observed, held: int) -> tuple[bool, str]:
        """Whether every layer of the KV cache stores what it should, and reports the logical length."""
        prompt, plain = self.bench.prompts[name], self.bench.plain[name]
        logical = prompt.kinds.shape[1] + STEPS
        if got.cache is None or not hasattr(got.cache, "layers"):
            return False, f"{prompt.name}: generate returned no KV cache with layers"
        if len(got.cache.layers) != len(plain.cache.layers):
            return False, f"{prompt.name}: a KV cache of {len(got.cache.layers)} layers, not {len(plain.cache.layers)}"
        for i, entry in enumerate(got.cache.layers):
            keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
            before = getattr(plain.cache.layers[i], "keys", None)
            if not isinstance(before, Tensor) or not before.numel():  # a layer that uses another one's
                continue
            if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
                return False, f"{prompt.name}: layer {i} stores nothing"
            stored, whole = keys.shape[-2], before.shape[-2]
            wanted = whole if i < layer else held + STEPS
            windowed = whole < logical  # a window may evict more than was dropped
            if values.shape[-2] != stored or stored > wanted or (stored < wanted and not windowed):
                return False, f"{prompt.name}: layer {i} stores {stored} tokens, not {wanted} ({whole} unpatched)"
            if int(got.cache.get_seq_length(i)) != logical:
                return False, f"{prompt.name}: layer {i} reports {int(got.cache.get_seq_length(i))} tokens, not {logical}"
        return True, f"{prompt.name}: layers hold {held + STEPS} and report {logical} tokens"

    # ---------------------------------------------------------------------------------------------------------- arguments
    def axes(self, name: str) -> dict[int, dict[str, list[int]]]:
        """Arguments of every decoder layer with the sequence's length on an axis: those that follow the prompt's length."""
        plain, length = self.bench.plain[name], self.bench.prompts[name].kinds.shape[1]
        other = next((n for n in self.bench.plain if n != name and self.bench.prompts[n].kinds.shape[1] != length), None)
        found: dict[int, dict[str, list[int]]] = {}
        for i, shapes in plain.arguments.items():
            others = {} if other is None else self.bench.plain[other].arguments[i]
            another = 0 if other is None else self.bench.prompts[other].kinds.shape[1]
            for argument, shape in shapes.items():
                at = [a for a, n in enumerate(shape) if n == length and argument not in _OF_THE_CACHE]
                if argument in others and len(others[argument]) == len(shape):
                    at = [a for a in at if others[argument][a] == another]
                if at:
                    found.setdefault(i, {})[argument] = at
        return found

    def arguments(self, name: str, layer: int, got: _Observed, held: int) -> list[str]:
        """What is wrong with the arguments of the layers that run on fewer tokens; ``held`` 0: name what is gone, too."""
        length = self.bench.prompts[name].kinds.shape[1]
        long: dict[str, int] = {}
        lost: dict[str, int] = {}
        for i, wanted in sorted(self.axes(name).items()):
            shapes = got.arguments.get(i)
            if i < layer or shapes is None:
                continue
            for argument, axes in wanted.items():
                if argument not in shapes:
                    lost.setdefault(argument, i)
                elif any(a < len(shapes[argument]) and shapes[argument][a] == length for a in axes) or (
                    held and any(a < len(shapes[argument]) and shapes[argument][a] != held for a in axes)
                ):
                    long.setdefault(argument, i)
        wrong = [f"'{a}' of decoder layer {i} is not shortened with the tokens" for a, i in long.items()]
        if not held:
            names = {a: i for a, i in lost.items() if a.partition("[")[0] != "attention_mask"}
            wrong += [
                f"the unpatched model gives '{a}' to decoder layer {i}, the patched one does not" for a, i in names.items()
            ]
        return wrong

    def shortened(self, layer: int) -> str:
        """Say which arguments were looked at."""
        names = {a.partition("[")[0] for i, found in self.axes("batch").items() if i >= layer for a in found}
        return f"shortened: {', '.join(sorted(names))}"

    # -------------------------------------------------------------------------------------------------------------- unpatch
    def unpatched(self, before: dict[str, Any]) -> None:
        """Whether the twin is what it was, bit for bit."""
        after = _traces(self.model)
        left = [name or "the model" for name, traces in after.items() if before.get(name) != traces]
        left += [f"{name} is gone" for name in before if name not in after]
        if left:
            self.items.append(Item("unpatch", "failed", f"something is left behind on {left[0]}"))
            return
        for name, prompt in self.bench.prompts.items():
            seen = _Observed()
            try:
                _generate(self.model, self.family, prompt, seen)
            except Exception as error:
                self.items.append(Item("unpatch", "failed", f"{prompt.name}: {said(error)}"))
                return
            plain = self.bench.plain[name]
            if not (torch.equal(seen.tokens, plain.tokens) and torch.equal(seen.logits, plain.logits)):
                error_ = float((seen.logits - plain.logits).abs().max())
                self.items.append(Item("unpatch", "failed", f"{prompt.name}: not what it was before", error=error_, limit=0.0))
                return
        self.items.append(Item("unpatch", "ok", "no hook or attribute left, logits bit for bit as before"))


# ----------------------------------------------------------------------------------------------------------------- entry
def verify(model: Any, *, stages: Sequence[str] = STAGES) -> Verdict:
    """Check on a tiny random twin that reducing this model computes what it should, on this machine, with these versions.

    From the model's own classes and configuration a small copy is built on the CPU (nothing is downloaded, the model is not run).
    It is patched with a reducer that drops half of the visual tokens, before and inside the language model, with both position
    policies where the model allows them, on a padded batch, on a single prompt, and on clips where it takes them; a prefill and
    eight decode steps of ``generate`` are compared with a slow reference that hides the dropped tokens. The KV cache must hold
    fewer tokens and report the logical length, every argument of a decoder layer with the sequence's length on an axis must be
    shortened, and un-patching must leave nothing behind.

    Parameters
    ----------
    model : Module, PretrainedConfig or str
        A model (patched or not, on any device), its configuration, or what ``vtc check`` takes: a folder, ``"pocket"``, or the id
        of a model in the local cache.
    stages : sequence of {"boundary", "decoder"}
        Where to drop tokens.

    Returns
    -------
    Verdict
        Truth value in :attr:`~vtc.verify.Verdict.ok`; ``print`` shows every item.

    Raises
    ------
    UnsupportedModelError
        vtc does not support this kind of model at all.
    InputFileError
        Nothing of that name here.
    UnknownArgumentError
        A stage that is none.
    """
    begin = time.perf_counter()
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise UnknownArgumentError(f"vtc.verify: there is no stage '{unknown[0]}' to check: use {', '.join(STAGES)}")
    config, kind, cache = _subject(model)
    items: list[Item]
    token = BUSY.set(True)
    try:
        with _calm():
            try:
                bench = _prepare(config, kind, cache)
            except UnverifiableError as error:
                items = [Item("small copy", "not checked", str(error))]
                items += [Item(stage, "not checked", "there is no small copy", stage) for stage in stages]
                name = (
                    kind.__name__
                    if kind is not None
                    else (getattr(config, "architectures", None) or [type(config).__name__])[0]
                )
            else:
                items, name = _Checks(bench, stages).run(), type(bench.twin.model).__name__
    finally:
        BUSY.reset(token)
    return Verdict(
        model=name,
        model_type=str(getattr(config, "model_type", "?")),
        text_type=str(getattr(config.get_text_config(), "model_type", "?")),
        items=tuple(items),
        versions=versions(),
        seconds=round(time.perf_counter() - begin, 2),
    )


def versions() -> dict[str, str]:
    """Return the versions that a verdict is about."""
    import transformers

    return {
        "vtc": vtc.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _subject(model: Any) -> tuple[Any, type[nn.Module] | None, str | None]:
    """Configuration, class and cache implementation of what a user gave."""
    if isinstance(model, str):
        from vtc.inspect import load_config, vision_language

        return vision_language(load_config(model)), None, None
    if isinstance(model, nn.Module):
        inner = unwrap(model)
        config = getattr(inner, "config", None)
        if hasattr(config, "get_text_config"):
            wanted = getattr(inner, "generation_config", None)
            return config, type(inner), getattr(wanted, "cache_implementation", None)
    elif hasattr(model, "get_text_config"):
        return model, None, None
    raise UnsupportedModelError(
        f"vtc.verify cannot check a {type(model).__name__}: give a transformers vision-language model, its configuration, or a name"
    )


@contextmanager
def _calm() -> Iterator[None]:
    """Run in plain surroundings, and leave the process as it was: random numbers, defaults, warnings, transformers' words."""
    from transformers.utils import logging

    level, dtype = logging.get_verbosity(), torch.get_default_dtype()
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
    ):
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            logging.set_verbosity(level)


def _tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested tuples, lists and dictionaries, with the way to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for i, v in enumerate(value):
            yield from _tensors_of(v, f"{name}[{i}]")
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _tensors_of(v, f"{name}[{k!r}]" if name else str(k))
