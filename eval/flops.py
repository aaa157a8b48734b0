"""FLOPs of a forward, by torch's counter and by a closed formula.

Convention: one multiply-accumulate is 2 FLOPs; matrix products, convolutions and attention products count, everything else
(norms, activations, softmax, RoPE, pooling) does not. Attention counts the full query x key rectangle, as torch's counter does,
without the factor 1/2 some papers take for causality. The language-model head runs on the last position only, as in ``generate``.

The formula is fed with the tokens each layer really had: for the decoder from ``handle.stats``, for the tower from the shapes seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vtc import Handle, kernels
from vtc.engine import upstream
from vtc.errors import VtcError
from vtc.families import family_of
from vtc.kernels.ref.linear import ONEDNN
from vtc.stats import Clock

TOLERANCE = 0.02
"""Largest accepted relative difference between counter and formula."""


@dataclass(frozen=True)
class Flops:
    """FLOPs by part of the model.

    Attributes
    ----------
    tower, projector, decoder, head : int
        Vision tower, projector, decoder layers, language-model head.
    reducer : int
        Matrix products of the reducer itself (signals, similarities); 0 in the formula, which knows no method.
    """

    tower: int
    projector: int
    decoder: int
    head: int
    reducer: int = 0

    @property
    def model(self) -> int:
        """FLOPs of the model's own layers."""
        return self.tower + self.projector + self.decoder + self.head

    @property
    def total(self) -> int:
        """FLOPs of the model's own layers and of the reducer."""
        return self.model + self.reducer

    def to_dict(self) -> dict[str, int]:
        """Return plain data with the total."""
        return {**asdict(self), "total": self.total}


@dataclass
class Tokens:
    """Tokens every layer ran on (one prompt).

    Attributes
    ----------
    patches : int
        Patches the tower embedded.
    tower : list of int
        Tokens of each tower layer, class token included.
    projector : int
        Tokens the projector ran on.
    decoder : list of int
        Tokens of each decoder layer, text included.
    tower_mlp : list of int
        Tokens of each tower layer's MLP, where methods may merge between attention and MLP; those of the layer when empty.
    """

    patches: int = 0
    tower: list[int] = field(default_factory=list)
    projector: int = 0
    decoder: list[int] = field(default_factory=list)
    tower_mlp: list[int] = field(default_factory=list)


def language_flops(config: Any, decoder: Sequence[int]) -> Flops:
    """FLOPs of the decoder layers, run on so many tokens each, and of the head for one position; see :func:`closed_form`.

    Parameters
    ----------
    config : PretrainedConfig
        Of the vision-language model.
    decoder : sequence of int
        Tokens of each decoder layer, text included.
    """
    text = config.text_config
    d, f = text.hidden_size, text.intermediate_size
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    h = getattr(text, "head_dim", None) or d // heads
    layers = sum(2 * n * d * h * (2 * heads + 2 * groups) + 4 * n * n * heads * h + 2 * n * d * f * 3 for n in decoder)
    return Flops(0, 0, layers, 2 * d * text.vocab_size)


def closed_form(model: Any, tokens: Tokens) -> Flops:
    """FLOPs of one forward of a LLaVA-like model (CLIP or SigLIP tower, two-layer projector, Llama-like decoder).

    With ``n`` tokens in a layer, width ``d``, ``H`` query heads and ``G`` key-value heads of width ``h``, and MLP width ``f``::

        decoder layer   2 n d h (2 H + 2 G)  +  4 n^2 H h  +  2 n d f * 3
        tower layer     2 n d d * 4          +  4 n^2 d    +  2 n d f * 2
        patch embedding 2 patches d (channels * side^2)
        projector       2 m (d_v d + d d)          for m tokens
        head            2 d vocabulary             for the last position

    Parameters
    ----------
    model : Module or PretrainedConfig
        Gives the widths.
    tokens : Tokens
        What each layer ran on.

    Raises
    ------
    VtcError
        For a vision tower the formula does not describe.
    """
    config = getattr(model, "config", model)
    language, vision = language_flops(config, tokens.decoder), config.vision_config
    if not describes(config):
        raise VtcError(f"the FLOPs formula does not describe a '{vision.model_type}' tower: it knows CLIP and SigLIP")
    d = config.text_config.hidden_size
    dv, fv = vision.hidden_size, vision.intermediate_size
    tower = 2 * tokens.patches * dv * (vision.num_channels * vision.patch_size**2)
    tower += sum(2 * n * dv * dv * 4 + 4 * n * n * dv for n in tokens.tower)
    tower += sum(2 * n * dv * fv * 2 for n in tokens.tower_mlp or tokens.tower)
    layers = config.vision_feature_layer
    inputs = dv * (1 if isinstance(layers, int) else len(layers))
    projector = 2 * tokens.projector * (inputs * d + d * d)
    return replace(language, tower=tower, projector=projector)


def describes(config: Any) -> bool:
    """Whether the formula knows the model's vision tower (its language model it always knows)."""
    return config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model")


def _uncounted() -> dict[Any, Callable[..., int]]:
    """Formulas for products the counter passes over: with a vector, and by oneDNN."""
    aten = torch.ops.aten

    def product(matrix: Any, vector: Any, **_: Any) -> int:
        return 2 * math.prod(matrix)

    def added(total: Any, matrix: Any, vector: Any, **_: Any) -> int:
        return 2 * math.prod(matrix)

    def linear(tokens: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(tokens) * weight[0]

    formulas = {
        ONEDNN: linear,
        aten.mv: product,
        aten.dot: product,
        aten.addmv: added,
    }
    return {op: formula for op, formula in formulas.items() if op is not None and op not in flop_registry}


def _attention_seen(device: torch.device) -> AbstractContextManager[Any]:
    """Let the counter see attention: it knows the fused one of GPUs, and on a CPU only the products attention is made of."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@contextmanager
def _watch(model: nn.Module, seen: Tokens) -> Iterator[None]:
    """Record the tokens of tower and projector while the body runs. Hooks run after vtc's own, so they see what the layers see."""
    family = family_of(model)

    def length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        hidden = args[0] if args else kwargs[upstream.HIDDEN]
        return int(hidden.shape[:-1].numel())

    def layer(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.tower.append(length(args, kwargs))

    def projector(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.projector += int(args[0].shape[:-1].numel())

    def embedding(_: nn.Module, _args: tuple[Any, ...], out: Tensor) -> None:
        seen.patches += int(out.shape[0] * out.shape[-2:].numel())

    def mlp(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.tower_mlp.append(length(args, kwargs))

    patch = next(m for m in family.tower.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    hooks = [m.register_forward_pre_hook(layer, with_kwargs=True) for m in family.encoder_layers]
    branches = [b[0] for m in family.encoder_layers if (b := family.mlp_branch(m)) is not None]
    hooks += [m.register_forward_pre_hook(mlp, with_kwargs=True) for m in branches]
    hooks.append(patch.register_forward_hook(embedding))
    if family.projector is not None:
        hooks.append(family.projector.register_forward_pre_hook(projector))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Count:
    """One forward, counted both ways.

    Attributes
    ----------
    counted, formula : Flops
        By torch's counter, by the closed formula.
    tokens : Tokens
        What each layer ran on.
    cache : Cache
        The KV cache the forward returned.
    """

    counted: Flops
    formula: Flops
    tokens: Tokens
    cache: Any = field(repr=False)

    @property
    def mismatch(self) -> float:
        """Relative difference of the model's own FLOPs, 0 where both agree."""
        return abs(self.counted.model - self.formula.model) / max(1, self.formula.model)


def count(model: nn.Module, inputs: Mapping[str, Tensor], handle: Handle | None) -> Count:
    """Count one forward of one prompt both ways.

    Parameters
    ----------
    model : Module
        Patched with ``handle``, or unpatched.
    inputs : mapping
        Arguments of ``forward`` for a single prompt with one image.
    handle : Handle or None
        The patch in force.

    Returns
    -------
    Count
        Both results, what each layer ran on, and the KV cache.
    """
    if inputs[upstream.IDS].shape[0] != 1:
        raise VtcError("FLOPs are counted on one prompt: pass inputs with a batch of one")
    family = family_of(model)
    seen = Tokens()
    counter = FlopCounterMode(display=False, depth=None, custom_mapping=_uncounted())
    parts = _Parts(model, counter)
    # torch's counter sees torch's products only: the reducer's are counted as its torch twins make them, on every device
    seeing = _attention_seen(inputs[upstream.IDS].device)
    with torch.no_grad(), kernels.use("torch"), _watch(model, seen), seeing, counter, parts.observing():
        out = upstream.prefill(model, inputs)
    total = inputs[upstream.IDS].shape[1]
    if handle is None or not handle.stats.last.images:
        seen.decoder = [total] * family.facts.layers
    else:
        images = handle.stats.last.images
        text = total - sum(i.slots for i in images)
        seen.decoder = [text + sum(n) for n in zip(*(i.tokens_per_layer for i in images), strict=True)]
    counted = parts.result()
    if describes(model.config):
        formula = closed_form(model.config, seen)
    else:  # the language model is checked; tower and projector are the counter's
        formula = replace(language_flops(model.config, seen.decoder), tower=counted.tower, projector=counted.projector)
    return Count(counted, formula, seen, upstream.cache_of(out))


class _Parts:
    """Splits the counter's numbers: what is counted while a span of the engine's clock is open is the reducer's."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        family, names = family_of(model), {id(m): n for n, m in model.named_modules()}
        parts = {
            "tower": family.tower,
            "projector": family.projector,
            "decoder": family.text,
            "head": model.get_output_embeddings(),
        }
        # a tower that merges patches inside its last module has no projector of its own
        self.names = {part: f"{type(model).__name__}.{names[id(m)]}" for part, m in parts.items() if m is not None}
        self.counter = counter
        self.depth = 0
        self.before: dict[str, int] = {}
        self.reducer = dict.fromkeys((*self.names, "all"), 0)

    def now(self) -> dict[str, int]:
        """Numbers so far, by part and in all."""
        counts = self.counter.get_flop_counts()
        found = {part: sum(counts.get(name, {}).values()) for part, name in self.names.items()}
        return {**found, "all": sum(counts.get("Global", {}).values())}

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Listen to the engine's clock while the body runs."""
        Clock.observers.append(self.span)
        try:
            yield
        finally:
            Clock.observers.remove(self.span)

    def span(self, begins: bool) -> None:
        """A span began or ended; nested ones belong to the outermost."""
        self.depth += 1 if begins else -1
        if begins and self.depth == 1:
            self.before = self.now()
        elif not begins and self.depth == 0:
            after = self.now()
            for part in self.reducer:
                self.reducer[part] += after[part] - self.before[part]

    def result(self) -> Flops:
        """The split; products outside every part (there are none in the models known) count as the decoder's."""
        total = self.now()
        model = {part: total[part] - self.reducer[part] for part in total}
        rest = model.pop("all") - sum(model.values())
        return Flops(model["tower"], model.get("projector", 0), model["decoder"] + rest, model["head"], self.reducer["all"])
