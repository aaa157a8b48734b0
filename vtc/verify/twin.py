"""A tiny random model of the same classes: few layers, small widths, the same special token ids and geometry, nothing downloaded.

A configuration is made smaller field by field, by what the fields are called and how their numbers hang together: widths that
agree go on agreeing, a choice of layers keeps every kind of layer there is, the heads keep the sizes that rotations need. What a
name says nothing about stays as it is. A class that cannot be built from the result is refused with the reason.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vtc.errors import UnverifiableError, VtcError

LARGEST = 40_000_000
"""Parameters that a twin may have at most: a model whose configuration cannot be made smaller than that is refused."""
GRID = 4
"""Rows and columns of visual tokens that a picture of the tower's own size becomes."""
WINDOW = 12
"""Tokens of a sliding window, chunk, or other stretch of positions: fewer than a prompt has, so that it matters."""
SEED = 20


@dataclass(frozen=True, eq=False)
class Twin:
    """A tiny model.

    Attributes
    ----------
    model : Module
        In eval mode, on the CPU, in float64.
    special : tuple of int
        Token ids with a meaning, which prompts must not hold by chance.
    words : tuple of int
        Token ids without one.
    """

    model: nn.Module
    special: tuple[int, ...]
    words: tuple[int, ...]


# ------------------------------------------------------------------------------------------------------------- building
def build(
    config: Any,
    kind: type[nn.Module] | None = None,
    cache_implementation: str | None = None,
    *,
    whole_heads: bool = False,
    grid: int = GRID,
) -> Twin:
    """Build the twin of a model.

    Parameters
    ----------
    config : PretrainedConfig
        Configuration of the model; left as it is.
    kind : type, optional
        Class of the model; that of ``AutoModelForImageTextToText`` if not given, or if it cannot generate.
    cache_implementation : str, optional
        What the model's generation config says of its cache.
    whole_heads : bool
        Heads of attention keep their sizes, for rotations of an unusual kind.
    grid : int
        Rows and columns of visual tokens of a picture, as far as the configuration tells how patches become tokens.

    Raises
    ------
    UnverifiableError
        It cannot be built, or not small enough.
    """
    from transformers import AutoModelForImageTextToText

    small = shrink(config, whole_heads, grid)
    makes = kind is not None and getattr(kind, "can_generate", bool)() and hasattr(kind, "generate")
    make: Callable[[], nn.Module] = lambda: kind(small)  # type: ignore[misc]  # noqa: E731
    if not makes:
        make = lambda: AutoModelForImageTextToText.from_config(small, dtype=torch.float32, trust_remote_code=False)  # noqa: E731
    size = _size_of(make, config)
    if size > LARGEST:
        raise UnverifiableError(
            f"a small {_name(kind, config)} has {size / 1e6:.0f} million parameters: its configuration has no fields that make it "
            "smaller"
        )
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(SEED)
        try:
            model = make()
        except Exception as error:
            if not makes and "Unrecognized configuration class" in str(error):
                raise UnverifiableError(
                    f"transformers has no AutoModelForImageTextToText of type '{config.model_type}': only such models are checked"
                ) from None
            raise UnverifiableError(f"a small {_name(kind, config)} cannot be built: {said(error)}") from error
        finally:
            torch.set_default_dtype(before)
        randomize(model)
        if callable(getattr(model, "set_experts_implementation", None)):
            model.set_experts_implementation("eager")  # the others' fast paths know no float64
        model = model.double().eval().requires_grad_(False)
    special = special_ids(model.config)
    _greedy(model, special, cache_implementation)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    words = tuple(itertools.islice((i for i in range(min(3, vocabulary), vocabulary) if i not in special), 96))
    return Twin(model, special, words)


def _size_of(make: Callable[[], nn.Module], config: Any) -> int:
    """Parameters of a model, without building it."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(p.numel() for p in make().parameters())
    except Exception:  # not every class can be built there; what is wrong shows when it is built
        return 0


def _greedy(model: Any, special: tuple[int, ...], cache_implementation: str | None) -> None:
    """Let ``generate`` take the likeliest token that has no special meaning, and nothing else."""
    from transformers import GenerationConfig

    known = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    size = known.weight.shape[0] if known is not None else math.inf
    cache = cache_implementation or getattr(model.generation_config, "cache_implementation", None)
    model.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=None, suppress_tokens=[i for i in special if i < size], cache_implementation=cache
    )


def randomize(model: nn.Module) -> None:
    """Fill a model with numbers that make attention far from uniform, so that dropped tokens matter."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() >= 2 and "embed" in name and weight.dim() == 2:
                weight.copy_(noise)
            elif weight.dim() >= 2:
                fan = weight[0].numel() if weight.dim() != 3 or "expert" not in name else max(weight.shape[1:])
                weight.copy_(noise * 1.6 / math.sqrt(fan))
            elif weight.numel() and bool(torch.isfinite(weight).all()) and bool((weight == weight.flatten()[0]).all()):
                weight.copy_(weight + 0.1 * noise)  # norms, scales and biases as they begin
            else:
                weight.copy_(0.1 * noise)


def _name(kind: type | None, config: Any) -> str:
    return kind.__name__ if kind is not None else f"model of type '{getattr(config, 'model_type', '?')}'"


def said(error: BaseException) -> str:
    """Return the first line of an error, with its kind where it is none of vtc's own."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, VtcError):
        return str(error)
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


# --------------------------------------------------------------------------------------------------------- special ids
_TOKEN = re.compile(r"(token_id|token_index|token_ids|_id|_ids)$")


def special_ids(config: Any) -> tuple[int, ...]:
    """Return every token id that a configuration names."""
    found: set[int] = set()
    for level in levels(config).values():
        for name, value in vars(level).items():
            if _TOKEN.search(name):
                values = value if isinstance(value, (list, tuple)) else [value]
                found |= {v for v in values if _whole(v) and v >= 0}
    return tuple(sorted(found))


def levels(config: Any, path: str = "") -> dict[str, Any]:
    """Return a configuration and all inside it, by dotted path (``""``: itself)."""
    found = {path: config}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found |= levels(value, f"{path}.{name}".strip("."))
    return found


def vision_of(config: Any) -> Any:
    """Return the configuration of the vision tower, if there is one of its own."""
    return next((c for path, c in levels(config).items() if path.rpartition(".")[2].startswith("vis")), None)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------------------- shrinking
_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "resampler_depth",
    "conf_num_hidden_layers",
)
_INDEXES = re.compile(r"(layers|indexes|indices|idxs|layer_ids)$")
_BEGIN = ("first_k_dense_replace", "moe_layer_start_index", "max_window_layers")  # how many layers come before something
_END = ("num_kv_shared_layers",)  # how many layers at the end are something
_STEP = re.compile(r"(_step|_interval|_frequency)$")
_FEATURE_LAYER = re.compile(r"^(vision_feature_layers?|vit_layers|spatial_vision_layer)$")
_TARGETS = re.compile(r"_target_layers$")  # decoder layers that features of the tower enter
_PAIRS = "deepstack_layer_map"  # of a layer of the tower and the decoder layer its features enter
_HEADS = re.compile(r"heads$")
_HEAD_DIM = re.compile(r"(head_dim|^rotary_dim)$")
_WIDTH = re.compile(
    r"((^|_)(hidden|intermediate)_size\w*|(^|_)(embed|embedding|mlp|ffn|inner|input|output|projection|proj|hidden|expert)_dims?"
    r"|_hidden_dim|token_embed_dim|d_model|merged_hidden_size|hidden_size_per_layer_input|_rank)$"
)
_EXPERTS = re.compile(r"(^num_experts|num_local_experts|n_routed_experts|moe_num_experts)$")
_TOP = re.compile(r"(num_experts_per_tok|moe_k|moe_topk|top_k_experts)$")
_MERGE = ("spatial_merge_size", "merge_size", "downsample_factor", "scale_factor", "projector_pooling_ratio", "hidden_stride")
_RATIO = ("downsample_ratio", "pixel_shuffle_ratio")
_TOKENS = re.compile(r"(num_image_tokens|image_seq_len|image_seq_length|mm_tokens_per_image|num_patches)$")
_STRETCH = ("sliding_window", "attention_chunk_size", "floor_scale")


def shrink(config: Any, whole_heads: bool = False, grid: int = GRID) -> Any:
    """Return a small configuration of the same kind; the options are those of :func:`build`.

    Raises
    ------
    UnverifiableError
        There is none.
    """
    plain = config.to_dict()
    _forget(plain)
    try:
        small = type(config).from_dict(copy.deepcopy(plain))
        _Shrinking(small, whole_heads, grid).run()
    except UnverifiableError:
        raise
    except Exception as error:
        raise UnverifiableError(f"a small {_name(type(config), config)} cannot be made: {said(error)}") from error
    return small


def _forget(plain: dict[str, Any]) -> None:
    """Remove what concerns a checkpoint's weights, at every depth."""
    for name in ("quantization_config", "dtype", "torch_dtype", "_attn_implementation", "auto_map", "id2label", "label2id"):
        plain.pop(name, None)
    for value in plain.values():
        if isinstance(value, dict):
            _forget(value)


class _Shrinking:
    """Makes a configuration smaller in place."""

    def __init__(self, config: Any, whole_heads: bool, grid: int) -> None:
        self.config, self.whole_heads, self.grid = config, whole_heads, grid
        self.levels = levels(config)
        self.special_layers = {id(level): _take_overrides(level) for level in self.levels.values()}
        self.text = config.get_text_config()
        self.vision = vision_of(config)
        self.special = special_ids(config)
        self.widths: dict[int, int] = {}  # of a language model, of a tower ... as they were, as they are

    def run(self) -> None:
        """Do everything."""
        ordered = [self.text, *([self.vision] if self.vision is not None else [])]
        ordered += [level for level in self.levels.values() if all(level is not other for other in ordered)]
        for level in ordered:
            if getattr(level, "model_type", "") == "timm_wrapper":
                self.timm_tower(level)
            elif level is not self.config or level is self.text:
                self.layers(level)
                self.heads_and_widths(level)
        for level in ordered:
            self.other_widths(level)
            self.experts(level)
            self.vocabulary(level)
        self.stretches(self.text)
        self.geometry()
        for level in ordered:
            if self.special_layers[id(level)]:
                level.per_layer_config = self.special_layers[id(level)]

    def timm_tower(self, level: Any) -> None:
        """Make a tower of the package timm small: its arguments are timm's, of which those of one family are known here."""
        name = str(level.architecture)
        if not name.startswith("fastvit"):
            raise UnverifiableError(f"its vision tower is timm's '{name}', which vtc.verify cannot make small")
        stages = 5 if name.endswith(("mci3", "mci4")) else 4
        widths = (16, 16, 32, 32, 32)[-stages:]
        level.model_args = {**(level.model_args or {}), "layers": (1,) * stages, "embed_dims": widths}
        self.widths[level.hidden_size] = level.hidden_size = 2 * widths[-1]
        level.image_size = self.grid * 2 ** (stages + 1)  # each stage halves the sides, the stem in front twice

    # ------------------------------------------------------------------------------------------------------- layers
    def layers(self, level: Any) -> None:
        """Choose a few layers of every kind, and rewrite all that is said by layer."""
        name = next((n for n in _COUNTS if _whole(vars(level).get(n))), None)
        if name is None:
            return
        count, fields = getattr(level, name), vars(level)
        lists = {n: v for n, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == count and count > 4}
        indexes = {
            n: list(v)
            for n, v in fields.items()
            if n not in lists and isinstance(v, (list, tuple)) and _INDEXES.search(n) and all(_whole(i) for i in v)
        }
        indexes = {n: v for n, v in indexes.items() if all(0 <= i < count for i in v)}
        full = {n: v for n, v in lists.items() if _INDEXES.search(n) and sorted(v) == list(range(count)) and _whole(v[0])}
        lists = {n: v for n, v in lists.items() if n not in full}
        begins = {n: fields[n] for n in _BEGIN if _whole(fields.get(n)) and 0 < fields[n]}
        ends = {n: fields[n] for n in _END if _whole(fields.get(n)) and 0 < fields[n] < count}
        steps = {n: v for n, v in fields.items() if _STEP.search(n) and _whole(v) and 1 < v < count and not lists}
        special = self.special_layers[id(level)]
        must = set(fields.get("deepstack_visual_indexes") or ()) & set(range(count))
        if level is self.text:
            must |= self.entered() & set(range(count))
        least = 4 if level is self.text else 3
        if level is self.text:
            least = max(least, self.deep() + 2)

        def kind(i: int) -> tuple[Any, ...]:
            marks = [str(v[i]) for v in lists.values()] + [i in v for n, v in indexes.items()] + [str(special.get(i))]
            return *marks, *(i < v for v in begins.values()), *(i >= count - v for v in ends.values())

        if steps:
            picks = list(range(min(count, max(least, *(v + 1 for v in steps.values())))))
        else:
            picks = self.picked(level, [kind(i) for i in range(count)], must, least)
        place = {old: new for new, old in enumerate(picks)}
        for n, v in lists.items():
            setattr(level, n, type(v)(v[i] for i in picks))
        for n, v in indexes.items():
            setattr(level, n, [place[i] for i in v if i in place])
        for n in full:
            setattr(level, n, list(range(len(picks))))
        for n, v in begins.items():
            setattr(level, n, sum(i < v for i in picks))
        for n, v in ends.items():
            setattr(level, n, sum(i >= count - v for i in picks))
        setattr(level, name, len(picks))
        self.special_layers[id(level)] = {place[i]: v for i, v in special.items() if i in place}
        if level is self.vision:
            self.feature_layers(count, len(picks))
        if level is self.text:
            self.rewrite_entered(place)

    def picked(self, level: Any, kinds: list[tuple[Any, ...]], must: set[int], least: int) -> list[int]:
        """Return layers, ascending: the first and the last of every kind where that is not too much."""
        first = {k: i for i, k in reversed(list(enumerate(kinds)))}
        last = {k: i for i, k in enumerate(kinds)}
        picks = set(first.values()) | must
        if len(picks | set(last.values())) <= 8:
            picks |= set(last.values())
        if len(picks) > 12:
            raise UnverifiableError(
                f"'{getattr(level, 'model_type', '?')}' has {len(set(kinds))} kinds of layers, too many for a small copy"
            )
        for i in range(len(kinds)):
            if len(picks) >= least:
                break
            picks.add(i)
        return sorted(picks)

    def deep(self) -> int:
        """How many layers of the tower hand features to decoder layers."""
        return max((len(getattr(level, "deepstack_visual_indexes", None) or ()) for level in self.levels.values()), default=0)

    def entered(self) -> set[int]:
        """Decoder layers that features of the tower enter, where a configuration names them."""
        fields = vars(self.config)
        targets = [v for n, v in fields.items() if _TARGETS.search(n) and isinstance(v, (list, tuple))]
        return {i for v in targets for i in v} | {pair[1] for pair in fields.get(_PAIRS) or ()}

    def rewrite_entered(self, place: dict[int, int]) -> None:
        """Give those layers their new numbers."""
        for name, value in list(vars(self.config).items()):
            if _TARGETS.search(name) and isinstance(value, (list, tuple)):
                setattr(self.config, name, [place[i] for i in value])
            elif name == _PAIRS and value:
                setattr(self.config, name, [[tower, place[decoder]] for tower, decoder in value])

    def feature_layers(self, before: int, after: int) -> None:
        """Rewrite which of the tower's hidden states (the input and one per layer) are used."""

        def moved(i: int) -> int:
            if -3 <= i < 0:
                return max(i, -after - 1)
            share = (i if i >= 0 else before + 1 + i) / before
            return round(share * after) - (0 if i >= 0 else after + 1)

        for level in self.levels.values():
            for name, value in list(vars(level).items()):
                if _FEATURE_LAYER.match(name) and value is not None:
                    setattr(level, name, moved(value) if _whole(value) else type(value)(moved(i) for i in value))
                elif name == _PAIRS and value:
                    setattr(level, name, [[moved(tower), decoder] for tower, decoder in value])

    # -------------------------------------------------------------------------------------------------------- widths
    def heads_and_widths(self, level: Any) -> None:
        """Set the number of heads, their sizes, and the width of the residual stream."""
        fields = vars(level)
        heads = {n: v for n, v in fields.items() if _HEADS.search(n) and _whole(v) and v > 0}
        known = ("num_attention_heads", "num_heads", "encoder_attention_heads")
        own = next((n for n in (*known, *heads) if n in heads and "key_value" not in n), None)
        width = self.own_width(level)
        if own is None or width is None:
            return
        old_heads, old_width = heads[own], fields[width]
        sizes = {n: v for n, v in fields.items() if _HEAD_DIM.search(n) and _whole(v) and v > 0}
        derived = old_width // old_heads if old_width % old_heads == 0 else 0
        special = self.special_layers[id(level)]
        all_sizes = [*sizes.values(), *(v for each in special.values() for n, v in each.items() if _HEAD_DIM.search(n))]
        all_sizes += [derived] if derived and "head_dim" not in sizes else []
        by = 1 if self.whole_heads else divisor(all_sizes, self.sections(level), self.partial(level))
        each = max(sizes.values(), default=derived) // by if sizes or derived else 8
        few = 3 if level is self.vision else 2 if each >= 32 else 4
        for n, v in heads.items():
            setattr(level, n, _fewer(v, old_heads, few, "key_value" in n or "kv" in n))
        for n, v in sizes.items():
            setattr(level, n, v // by)
        for override in special.values():
            for n, v in override.items():
                if n in heads:
                    override[n] = _fewer(v, old_heads, few, "key_value" in n or "kv" in n)
                elif _HEAD_DIM.search(n):
                    override[n] = v // by
        for rope in self.ropes(level):
            if rope.get("mrope_section"):
                rope["mrope_section"] = [s // by for s in rope["mrope_section"]]
        free = "head_dim" in sizes and sizes["head_dim"] != derived
        new = 32 if free else few * (derived // by if derived else each)
        if level is not self.text and level is not self.vision:
            new = self.widths.get(old_width, new)
        setattr(level, width, new)
        if old_width not in self.widths:
            self.widths[old_width] = new
        if level is self.text:
            self.wide = old_width, new

    def own_width(self, level: Any) -> str | None:
        """Name of the field with the width of the level's own layers."""
        fields = vars(level)
        others = (None, vars(self.text).get("hidden_size"), *self.widths)
        if _whole(fields.get("embed_dim")) and fields.get("hidden_size") in others:
            return "embed_dim"
        return next((n for n in ("hidden_size", "d_model", "embed_dim") if _whole(fields.get(n))), None)

    def ropes(self, level: Any) -> list[dict[str, Any]]:
        """Return the settings of a level's rotations: one dictionary, or one for each kind of layer."""
        found = []
        for name in ("rope_parameters", "rope_scaling"):
            rope = vars(level).get(name)
            if isinstance(rope, dict) and all(rope is not other for other in found):
                found += [rope, *(v for v in rope.values() if isinstance(v, dict))]
        return found

    def sections(self, level: Any) -> list[int]:
        """Sizes of the sections that positions of several dimensions rotate."""
        return [s for rope in self.ropes(level) for s in rope.get("mrope_section") or ()]

    def partial(self, level: Any) -> list[float]:
        """Shares of a head that are rotated."""
        shares = [rope.get("partial_rotary_factor") for rope in self.ropes(level)]
        return [float(s) for s in [*shares, vars(level).get("partial_rotary_factor")] if s]

    def other_widths(self, level: Any) -> None:
        """Set all other widths: those that were equal to one that is known, or a small multiple of it, go on being so."""
        if _whole(vars(level).get("base_channels")):
            level.base_channels = min(level.base_channels, 32)  # (group norms have 32 groups)
        done = self.own_width(level) if level is not self.config or level is self.text else None
        mine = self.widths
        for name, value in list(vars(level).items()):
            if name == done or not _WIDTH.search(name) or _HEAD_DIM.search(name):
                continue
            if _whole(value) and value > 8:
                setattr(level, name, self.translated(level, name, value, mine))
                for override in self.special_layers[id(level)].values():
                    if name in override:
                        override[name] = self.translated(level, name, override[name], mine)
            elif isinstance(value, (list, tuple)) and value and all(_whole(v) and v > 64 for v in value):
                setattr(level, name, type(value)(32 for _ in value))

    def translated(self, level: Any, name: str, value: int, known: dict[int, int]) -> int:
        """Small form of one width."""
        old, new = getattr(self, "wide", (0, 0))
        if name == "hidden_size_per_layer_input":
            return 8  # (there is one for every layer and word)
        if value == old and (level is not self.vision or re.search("out|text|proj|hidden_size", name)):
            return new
        if value in known:
            return known[value]
        for was, now in known.items():
            if value > was and value % was == 0 and value // was <= 16:
                return value // was * now
        return 16 if name.endswith("_rank") else 48

    # --------------------------------------------------------------------------------------------------------- others
    def experts(self, level: Any) -> None:
        """Leave four experts, of which at most two work on a token."""
        fields = vars(level)
        if any(_EXPERTS.search(n) and _whole(v) and v > 4 for n, v in fields.items()):
            for name, value in list(fields.items()):
                if not _whole(value):
                    continue
                if _EXPERTS.search(name):
                    setattr(level, name, min(value, 4))
                elif _TOP.search(name):
                    setattr(level, name, min(value, 2))
                elif name == "n_group":
                    setattr(level, name, min(value, 2))
                elif name == "topk_group":
                    setattr(level, name, 1)

    def vocabulary(self, level: Any) -> None:
        """Leave as many words as the special ids need."""
        needed = max((*self.special, 127)) + 1
        for name, value in list(vars(level).items()):
            if name in ("vocab_size", "vocab_size_per_layer_input") and _whole(value):
                setattr(level, name, needed)

    def stretches(self, level: Any) -> None:
        """Make windows, chunks and scales of positions so short that a prompt is longer."""
        for place in (vars(level), *self.special_layers[id(level)].values()):
            for name in _STRETCH:
                if _whole(place.get(name)) and place[name] > WINDOW:
                    place[name] = WINDOW
        for rope in self.ropes(level):
            if rope.get("llama_4_scaling_beta") and _whole(rope.get("original_max_position_embeddings")):
                rope["original_max_position_embeddings"] = WINDOW

    def geometry(self) -> None:
        """Make pictures so small that each becomes a grid of few tokens, merged as before."""
        vision = self.vision
        size, patch = (vars(vision).get(n) if vision is not None else None for n in ("image_size", "patch_size"))
        old_side, side = side_of(size), side_of(patch)
        if old_side is None or side is None:
            return
        outer = self.config
        per = old_side // side
        merge = next((v for level in (outer, vision) for n in _MERGE if _whole(v := vars(level).get(n)) and v > 1), None)
        if merge is None:
            ratio = next((v for level in (outer, vision) for n in _RATIO if (v := vars(level).get(n))), None)
            merge = round(1 / ratio) if ratio else 1
        asked = vars(outer).get("mm_tokens_per_image")
        if _whole(asked):
            merge = max(1, per // math.isqrt(asked))
        new = self.grid * merge * side
        vision.image_size = type(size)(new for _ in size) if isinstance(size, (list, tuple)) else new
        was, now = {per * per: (new // side) ** 2, (per // merge) ** 2: self.grid**2}, self.grid**2
        for level in self.levels.values():
            other, each = side_of(vars(level).get("image_size")), side_of(vars(level).get("patch_size"))
            if level is not vision and other and each and other > 2 * GRID * each:  # a second tower
                level.image_size = 2 * GRID * each
            for name, value in list(vars(level).items()):
                if _TOKENS.search(name) and _whole(value) and value in was:
                    setattr(level, name, now if name == "mm_tokens_per_image" else was[value])
                elif name == "image_grid_pinpoints" and value:
                    setattr(level, name, _pinpoints(value, old_side, new))
                elif name == "projector_patch_to_query_dict" and isinstance(value, dict):
                    setattr(level, name, {(new // side) ** 2: self.grid**2 // 2})


def _take_overrides(level: Any) -> dict[int, dict[str, Any]]:
    """Return what a level says of single layers only, and let it say so no more."""
    if not getattr(level, "is_heterogeneous", False):
        return {}
    given = level.to_dict().get("per_layer_config") or {}
    level.per_layer_config = None
    return {int(i): dict(v) for i, v in given.items()}


def divisor(sizes: list[int], sections: list[int], shares: list[float]) -> int:
    """Return by how much all sizes of heads can be divided, leaving at least 8 of each and even pieces to rotate."""

    def fits(by: int) -> bool:
        if any(s % by for s in (*sizes, *sections)):
            return False
        left = [s // by for s in sizes]
        rotated = [s * share for s in left for share in shares if s == max(left) or share < 1]
        return all(s >= 8 and s % 4 == 0 for s in left) and all(r >= 4 and r % 2 == 0 for r in rotated)

    return max((by for by in range(1, max(sizes, default=1) + 1) if fits(by)), default=1)


def _fewer(value: int, all_heads: int, few: int, shared: bool) -> int:
    """Heads left of ``value``, where ``few`` are left of ``all_heads``."""
    if value == all_heads:
        return few
    if shared:
        return 1 if value == 1 or few % 2 else few // 2
    return few * (value // all_heads) if value > all_heads and value % all_heads == 0 else min(few, value)


def side_of(value: Any) -> int | None:
    """Length of the side of something square, if it has one: of a number, or of the first of several."""
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if _whole(value) and value > 0 else None


def _pinpoints(value: Any, old: int, new: int) -> list[list[int]]:
    """Shapes of pictures of at most four crops."""
    crops = dict.fromkeys((h // old, w // old) for h, w in value)
    return [[h * new, w * new] for h, w in crops if 0 < h * w <= 4]


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())
