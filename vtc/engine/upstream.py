"""The gate: what vtc relies on in transformers stands here and nowhere else (adapters keep the names of their own models).

Releases rename arguments, output fields and cache methods. Everything of that kind is looked up here, when a model is patched, in
the signatures of its own classes: by class, never by version. A role (the KV cache, the attention mask ...) that a class must have
is met by exactly one of the names known for it, or the model is refused; what is absent and what was renamed never look alike.
:data:`ROLES` and :data:`RELIANCE` are also what ``docs/upstream.md`` prints.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtc.errors import NotReducedError, UnsupportedFeatureError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers.cache_utils import Cache as AnyCache

_THEIRS = {
    "AnyCache": ("transformers.cache_utils", "Cache"),
    "GrowingLayer": ("transformers.cache_utils", "DynamicLayer"),
    "WindowLayer": ("transformers.cache_utils", "DynamicSlidingWindowLayer"),
    "FixedLayer": ("transformers.cache_utils", "StaticLayer"),
    "ATTENTION": ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
}
"""What vtc calls classes and tables of transformers: imported when first asked for; whoever needs a name only does not wait."""


_loaded: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    """Import the classes a reduced cache layer stands for (plain, sliding window, preallocated), and the table of attentions."""
    if name not in _THEIRS:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _theirs(name)


def _theirs(name: str) -> Any:
    if name not in _loaded:  # a plain table: compiled code looks into it
        module, theirs = _THEIRS[name]
        _loaded[name] = getattr(importlib.import_module(module), theirs)
    return _loaded[name]


CONTEXT = "_vtc"
"""Our own keyword argument, which text models hand on to their layers."""


@functools.cache
def version() -> str:
    """Return the installed transformers version, for messages."""
    import transformers

    return transformers.__version__


# ------------------------------------------------------------------------------------------------------ argument names
@dataclass(frozen=True)
class Role:
    """One thing that forwards are given.

    Attributes
    ----------
    what : str
        What it is, for messages and the documentation.
    names : tuple of str
        Every name it is known to have had, the newest first.
    """

    what: str
    names: tuple[str, ...]


ROLES: dict[str, Role] = {
    "kv": Role("the KV cache", ("cache", "past_key_values", "past_key_value")),
    "hidden": Role("the hidden states", ("hidden_states", "x")),
    "mask": Role("the attention mask", ("attention_mask", "attn_mask")),
    "positions": Role("the position ids", ("position_ids",)),
    "rotary": Role("the rotary cosines and sines", ("position_embeddings", "position_embeddings_global")),
    "rotary_local": Role("those of sliding-window layers, where they come apart", ("position_embeddings_local",)),
    "ids": Role("the token ids", ("input_ids",)),
    "embeds": Role("the input embeddings", ("inputs_embeds",)),
    "caching": Role("whether to keep a KV cache", ("use_cache",)),
    "encoded": Role("image features that `generate` made before the first forward", ("mm_encoder_outputs",)),
    "pixels": Role("the pictures", ("pixel_values",)),
    "clips": Role("the clips", ("pixel_values_videos",)),
    "patches": Role("pictures cut into patches", ("image_patches",)),
    "features": Role("ready-made image features", ("image_hidden_states",)),
    "interpolate": Role("whether the tower stretches its position embeddings", ("interpolate_pos_encoding",)),
    "blocks": Role("where the blocks of a packed sequence end", ("cu_seqlens",)),
    "longest": Role("its longest block", ("max_seqlen",)),
    "shared_kv": Role("keys and values some layers share, which vtc refuses where one reads them", ("shared_kv_states",)),
    "step_positions": Role("physical positions in older releases", ("cache_position",)),
}
"""What vtc reads or writes among the arguments of base models, text models, decoder layers and tower layers."""

PER_TOKEN = ("per_layer_input", "moe_mm_token_type_ids")
"""Arguments of decoder layers with one entry for each token ``(B or 1, q, ...)``, which are shortened with the states."""

IDS, MASK, POSITIONS, EMBEDS, PIXELS, HIDDEN, USE_CACHE = (
    ROLES[role].names[0] for role in ("ids", "mask", "positions", "embeds", "pixels", "hidden", "caching")
)
GIVEN = {False: ("pixels", "patches", "features"), True: ("clips",)}
"""By "is a video": roles whose presence makes a call one with new visual tokens."""
ENCODED = {False: "image", True: "video"}
"""Keys of the features that ``generate`` made before the first forward."""
ENCODE = {False: "get_image_features", True: "get_video_features"}
"""Methods of the base model that make the features."""
PACKED = "cu_seq_lens"
"""What the arguments of packed sequences begin with."""
FULL = "full_attention"
"""Key of the plain mask where a model makes several, and the type of a layer that sees everything."""

RELIANCE: dict[str, str] = {
    "`get_image_features`, `get_video_features`": "wrapped on the instance; their result has the features, in `pooler_output` "
    "where it is an output object, or 4.57's tuple",
    "`language_model` or `text_model` with `.layers`, `.norm`, `.rotary_emb`, `get_input_embeddings()`": "looked for when patching",
    "`**kwargs` of text models": "reach every decoder layer; asserted after each prefill, layer by layer",
    "`config._attn_implementation`, `ALL_ATTENTION_FUNCTIONS`, `eager_attention_forward`": "taps put a name of their own in front",
    "`Cache.layers`, `DynamicLayer`, `DynamicSlidingWindowLayer`, `StaticLayer`": "replaced in the cache object by subclasses; the "
    "methods they override are checked when vtc is imported",
    "`generate(prefill_chunk_size=, cache_implementation=, generation_config=)`": "read to refuse what cannot work",
    "every other argument that a decoder layer or a module in it names": "its tensors are looked at in each shortened prefill: "
    f"{', '.join(f'`{name}`' for name in PER_TOKEN)} are shortened, and another one as long as the sequence is refused",
    "`position_ids` of decoder layers": "shortened with the states; under FlashAttention left out, since gaps look like packed "
    "sequences to transformers",
    "`gradient_checkpointing`, `training`": "of layers; whether hooks run again is seen from `GradientCheckpointingLayer`",
    "`last_hidden_state`": "of text models: expanded to logical length",
    "`num_attention_heads` (`num_heads`), `num_hidden_layers`": "compared with what a rank has, where there are several ranks",
}
"""What else vtc relies on, and how."""

_METHODS_AND_FIELDS = (
    *("pooler_output", "last_hidden_state", "mm_encoder_outputs", "eager_attention_forward", "_attn_implementation"),
    *("layer_types", "rotary_emb", "rotary_emb_local", "layer_class_to_replicate", "cu_seq_lens", "full_attention"),
    *("gradient_checkpointing", "generation_config", "cache_implementation", "prefill_chunk_size", "output_attentions"),
    *("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "DynamicCache", "StaticCache", "ALL_ATTENTION_FUNCTIONS"),
    *("eager", "sdpa", "flash", "flash_attention_2", "get_image_features", "get_video_features", "cumulative_length"),
)


def known_names() -> frozenset[str]:
    """Return every name of transformers' that may stand in this file only (a test looks for them elsewhere)."""
    arguments = (name for role in ROLES.values() for name in role.names)
    return frozenset({*arguments, *PER_TOKEN, *_METHODS_AND_FIELDS, *BATCHING} - {"x"})


_TABLE: dict[type, Names] = {}


@dataclass(frozen=True, eq=False)
class Names:
    """What one class's ``forward`` calls its arguments.

    Attributes
    ----------
    kind : type
        The class.
    order : tuple of str
        Its parameters in order.
    roles : mapping
        Role to parameter.
    defaults : mapping
        Role to what the parameter is when it is not given.
    open : bool
        Whether it takes any further keyword.
    """

    kind: type
    order: tuple[str, ...]
    roles: Mapping[str, str]
    defaults: Mapping[str, Any]
    open: bool
    at: Mapping[str, int] = field(repr=False)

    @staticmethod
    def of(module: nn.Module) -> Names:
        """Return the names of a module's class, found once.

        Raises
        ------
        UnsupportedModelError
            Two known names for one role.
        """
        kind = type(module)
        if kind not in _TABLE:
            _TABLE[kind] = Names._find(kind)
        return _TABLE[kind]

    @staticmethod
    def _find(kind: type) -> Names:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # follows decorators to the function itself
        order = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        roles = {}
        for role, known in ROLES.items():
            found = [name for name in known.names if name in named]
            if len(found) > 1:
                raise UnsupportedModelError(
                    f"{kind.__name__} (transformers {version()}) takes both '{found[0]}' and '{found[1]}' for {known.what}, and "
                    "vtc cannot tell which of them counts: this class is not supported"
                )
            if found:
                roles[role] = found[0]
        defaults = {
            role: None if named[n].default is inspect.Parameter.empty else named[n].default for role, n in roles.items()
        }
        at = {role: order.index(name) for role, name in roles.items() if name in order}
        return Names(kind, order, roles, defaults, any(p.kind is p.VAR_KEYWORD for p in parameters), at)

    def need(self, *roles: str) -> Names:
        """Return ``self``; raise :class:`UnsupportedModelError` where one of ``roles`` has no argument."""
        for role in roles:
            if role not in self.roles:
                known = ROLES[role]
                looked = " or ".join(f"'{name}'" for name in known.names)
                raise UnsupportedModelError(
                    f"{self.kind.__name__} (transformers {version()}) has no argument that vtc knows for {known.what}: looked for "
                    f"{looked}, found {', '.join(self.order) or 'none'}{' and **kwargs' if self.open else ''}; use a release "
                    "inside the tested window (`vtc doctor`)"
                )
        return self

    @property
    def rotary(self) -> tuple[str, ...]:
        """Roles under which this class takes rotary cosines and sines."""
        return tuple(role for role in ("rotary", "rotary_local") if role in self.roles)


@dataclass(frozen=True, eq=False)
class ModelNames:
    """The names of one model: of its base, its text model, and every decoder layer.

    ``read`` are the arguments that each layer or a module in it names, beyond those with a role here: what else comes down with the
    keywords of a call is looked at by nobody.
    """

    base: Names
    text: Names
    layers: tuple[Names, ...]
    read: tuple[frozenset[str], ...]

    @staticmethod
    def of(base: nn.Module, text: nn.Module, layers: Iterable[nn.Module]) -> ModelNames:
        """Find them, or raise :class:`UnsupportedModelError` that says what was looked for and what was found."""
        each = tuple(Names.of(layer).need("hidden", "kv", "mask", "rotary") for layer in layers)
        for names in each:
            if not names.open:  # else they come with the further keywords, as Cohere 2's layers take them
                names.need("positions")
        inner, outer = Names.of(text).need("kv", "mask", "positions", "embeds"), Names.of(base)
        if not inner.open:
            raise UnsupportedModelError(
                f"{inner.kind.__name__} (transformers {version()}) takes no further keyword arguments to hand on to its layers, "
                "through which vtc tells them what was dropped: this text model is not supported"
            )
        if not outer.open:
            outer.need("kv", "mask", "positions", "embeds")
        elif "kv" in outer.roles and outer.roles["kv"] != inner.roles["kv"]:
            raise UnsupportedModelError(
                f"{outer.kind.__name__} calls {ROLES['kv'].what} '{outer.roles['kv']}' and its text model "
                f"{inner.kind.__name__} '{inner.roles['kv']}' (transformers {version()}): vtc cannot tell which of them counts"
            )
        found = dict.fromkeys(name for role in ROLES.values() for name in role.names)
        named = (frozenset(n for m in layer.modules() for n in _parameters(type(m)) if n not in found) for layer in layers)
        return ModelNames(outer, inner, each, tuple(named))


class Call:
    """The arguments of one forward, by role: whether they came by position or by keyword does not matter.

    Parameters
    ----------
    names : Names
        Of the class whose forward it is.
    args, kwargs : tuple, dict
        As hooks are given them; neither is changed.
    """

    __slots__ = ("args", "kwargs", "names")

    def __init__(self, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.names, self.args, self.kwargs = names, args, kwargs

    def __getitem__(self, role: str) -> Any:
        """Return what was given for a role the class has, or its default.

        A keyword of the role's other names counts, too: forwards rename what they are given under an older one.
        """
        names = self.names
        name = names.roles.get(role)
        if name is None and names.open:
            return self.beside(role)
        name = names.roles[role]
        if name in self.kwargs:
            return self.kwargs[name]
        if len(self.args) > names.at.get(role, sys.maxsize):
            return self.args[names.at[role]]
        if len(ROLES[role].names) > 1 and names.open:
            return self.beside(role, names.defaults[role])
        return names.defaults[role]

    def beside(self, role: str, default: Any = None) -> Any:
        """Return what was given for a role under any of its names, also one that is handed on with ``**kwargs``."""
        if role in self.names.at and len(self.args) > self.names.at[role]:
            return self.args[self.names.at[role]]
        for name in ROLES[role].names:
            if name in self.kwargs:
                return self.kwargs[name]
        return default

    def set(self, role: str, value: Any) -> None:
        """Give something else for a role the class has, or that came with its further keywords."""
        at = self.names.at.get(role, sys.maxsize)
        if len(self.args) > at:
            self.args = (*self.args[:at], value, *self.args[at + 1 :])
            return
        self.kwargs = {**self.kwargs, **self._named({role: value})}

    def set_beside(self, role: str, value: Any) -> None:
        """Give something else for a role that was given, under the name it came with."""
        if role in self.names.roles:
            self.set(role, value)
            return
        name = next(name for name in ROLES[role].names if name in self.kwargs)
        self.kwargs = {**self.kwargs, name: value}

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values by the class's names; what the class has no name for stands under the one it came with, or nowhere."""
        roles, named = self.names.roles, {}
        for role, value in values.items():
            name = roles.get(role) or next((n for n in ROLES[role].names if n in self.kwargs), None)
            if name is not None:
                named[name] = value
            elif value is not None:
                raise KeyError(role)
        return named

    def update(self, values: Mapping[str, Any]) -> None:
        """Give something else for several roles at once."""
        if len(self.args) > 1:
            for role, value in values.items():
                self.set(role, value)
        else:  # all but the hidden states come by keyword: one copy
            self.kwargs = {**self.kwargs, **self._named(values)}

    def others(self, names: frozenset[str]) -> Iterator[tuple[str, Any]]:
        """Yield name and value of each of these arguments that was given."""
        for name, value in zip(self.names.order, self.args, strict=False):
            if name in names:
                yield name, value
        for name in names & self.kwargs.keys():
            yield name, self.kwargs[name]

    def set_other(self, name: str, value: Any) -> None:
        """Give something else for an argument without a role."""
        at = self.names.order.index(name) if name in self.names.order else sys.maxsize
        if len(self.args) > at:
            self.args = (*self.args[:at], value, *self.args[at + 1 :])
        else:
            self.kwargs = {**self.kwargs, name: value}

    def without_context(self) -> None:
        """Take out vtc's own argument, which modules further down would not know."""
        if CONTEXT in self.kwargs:
            self.kwargs = {k: v for k, v in self.kwargs.items() if k != CONTEXT}

    def result(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a hook returns."""
        return self.args, self.kwargs


def given(call: Call, video: bool) -> bool:
    """Whether a base model is given new pictures (or clips), as pixels or as features made before."""
    return encoded(call, video) is not None or any(call.beside(role) is not None for role in GIVEN[video])


_NEW = tuple(name for role in ("encoded", *GIVEN[False], *GIVEN[True]) for name in ROLES[role].names)


def brings_nothing(kwargs: Mapping[str, Any]) -> bool:
    """Whether no keyword of a base model's can hold new pictures or clips (a quick look: :func:`given` decides)."""
    return all(kwargs.get(name) is None for name in _NEW)


def encoded(call: Call, video: bool) -> Any:
    """Return the features that ``generate`` made before this forward, or None."""
    made = call.beside("encoded")
    return made[ENCODED[video]] if isinstance(made, Mapping) and ENCODED[video] in made else None


def is_packed(call: Call) -> bool:
    """Whether several prompts stand in one row."""
    return any(name.startswith(PACKED) and value is not None for name, value in call.kwargs.items())


def plain_mask(mask: Any) -> Any:
    """Return the mask of layers that see everything, where a model makes several."""
    return mask[FULL] if isinstance(mask, Mapping) and FULL in mask else mask


def bound(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names of the method's parameters, those of ``**kwargs`` beside them."""
    call = inspect.signature(method).bind(*args, **kwargs)
    rest = next((p.name for p in call.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return {**call.arguments, **call.arguments.get(rest, {})}


# -------------------------------------------------------------------------------------------------------------- outputs
def features_of(out: Any) -> Any:
    """Return the features of every image or video from what ``get_image_features`` or ``get_video_features`` returned."""
    features = getattr(out, "pooler_output", out)
    deep = isinstance(features, tuple) and len(features) == 2 and isinstance(features[1], list)
    return features[0] if deep else features  # 4.57 puts DeepStack features beside those of the last layer


def carries_record(out: Any) -> bool:
    """Whether something can ride along on what the feature method returned."""
    return hasattr(out, "pooler_output")


def states_of(out: Any) -> Tensor:
    """Return the hidden states a module returned, alone, first in a tuple, or in an output object."""
    if isinstance(out, Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.last_hidden_state


def all_states(out: Any) -> tuple[Tensor, ...]:
    """Return the hidden states in front of and behind every layer, where they were asked for."""
    return out.hidden_states


def with_states(out: Any, states: Tensor) -> Any:
    """Put other hidden states into what a module returned."""
    if isinstance(out, Tensor):
        return states
    if isinstance(out, tuple):
        return states, *out[1:]
    out.last_hidden_state = states
    return out


def cache_of(out: Any) -> AnyCache | None:
    """Return the KV cache in a model's output, found by its type.

    Raises
    ------
    NotReducedError
        Two different ones.
    """
    return _one(out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else ())


def cache_in(call: Call, out: Any) -> AnyCache | None:
    """Return the KV cache among the arguments and outputs of a text model, found by its type (see :func:`cache_of`)."""
    returned = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else ()
    return _one((*call.args, *call.kwargs.values(), *returned))


def _one(values: Iterable[Any]) -> AnyCache | None:
    kind = _theirs("AnyCache")
    found = {id(v): v for v in values if isinstance(v, kind)}
    if len(found) > 1:
        raise NotReducedError(
            f"this forward has {len(found)} different KV caches ({', '.join(type(c).__name__ for c in found.values())}), and vtc "
            f"cannot tell which one its decoder layers fill (transformers {version()}): pass one, or none"
        )
    return next(iter(found.values()), None)


# ---------------------------------------------------------------------------------------------------------- KV caches
_CACHE_KINDS = {None, "dynamic", "dynamic_full", "hybrid"}
"""What `generate` may be asked for. Files of models with sliding windows still say "hybrid", which transformers takes for unset;
4.57 makes a static cache of it where the call itself asks, which :func:`check_cache` refuses when the model is called."""
_FIXED_KIND = "static"


def fixed_layers_count() -> bool:
    """Whether preallocated layers count their own tokens; those of older releases write at a logical position they are told."""
    return "cache_kwargs" not in inspect.signature(_theirs("FixedLayer").update).parameters


_OVERRIDDEN: dict[str, int] = {
    "update": 2,
    "get_seq_length": 0,
    "get_mask_sizes": 1,
    "reorder_cache": 1,
    "batch_repeat_interleave": 1,
    "batch_select_indices": 1,
    "crop": 1,
    "reset": 0,
}
"""Methods of cache layers that ours override, with the number of arguments they are called with."""
_INHERITED = {
    "lazy_initialization",
    "offload",
    "prefetch",
    "get_max_cache_shape",
    "get_max_length",
    "activate_past_recording",
}
"""Methods that are right for a reduced layer as they are."""
_NOT_YET = ("batch_repeat_interleave", "batch_select_indices", "crop")
"""Methods that preallocated layers lack in some releases, which then never call them."""
_problems: list[str] = []


def check_overrides(ours: type) -> type:
    """Compare a reduced cache layer with the class it extends, when it is defined (a decorator).

    What it overrides must exist there and take as many arguments, or every patch is refused. What the base has and vtc does not
    know raises when it is called, instead of working on keys that are not all there.
    """
    base = next(kind for kind in ours.__mro__ if _is_theirs(kind))
    for name, count in _OVERRIDDEN.items():
        theirs = getattr(base, name, None)
        if theirs is None:
            if not (issubclass(base, _theirs("FixedLayer")) and name in _NOT_YET):
                _problems.append(f"{base.__name__}.{name}() is gone")
            continue
        taken = list(inspect.signature(theirs).parameters.values())[1:]
        plain = [p for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if not len([p for p in plain if p.default is p.empty]) <= count <= len(plain):
            _problems.append(
                f"{base.__name__}.{name}({', '.join(p.name for p in taken)}) takes other arguments than vtc serves"
            )
    for name, _ in inspect.getmembers(base, inspect.isfunction):
        if not name.startswith("__") and name not in _INHERITED and name not in _OVERRIDDEN:
            setattr(ours, name, functools.partialmethod(_unknown, f"{base.__name__}.{name}"))
    return ours


def _unknown(_layer: Any, name: str, *_args: Any, **_kwargs: Any) -> Any:
    raise UnsupportedFeatureError(
        f"{name}() of a reduced KV cache is not known to vtc (transformers {version()}): use a release inside the tested window "
        "(`vtc doctor`), or a call without this feature"
    )


def check_cache_classes() -> None:
    """Raise :class:`UnsupportedFeatureError` if a cache class of this release cannot be stood in for."""
    if _problems:
        raise UnsupportedFeatureError(
            f"the cache classes of transformers {version()} are not those vtc knows ({'; '.join(_problems)}): install a release "
            "inside the tested window (`vtc doctor`)"
        )


def check_cache(cache: Any, kinds: Iterable[type], ours: type) -> None:
    """Raise :class:`UnsupportedFeatureError`, before anything runs, if a layer of ``cache`` cannot be shortened.

    Parameters
    ----------
    cache : Cache or None
        As the caller gave it.
    kinds : iterable of type
        Cache layers that can be replaced.
    ours : type
        What replaces them.
    """
    check_cache_classes()
    if cache is None:
        return
    if not isinstance(cache, _theirs("AnyCache")):
        raise UnsupportedFeatureError(
            f"the KV cache passed in is a {type(cache).__name__}: pass a transformers DynamicCache, or nothing"
        )
    changed = next((m for m in ("update", "get_seq_length", "get_mask_sizes") if not _is_theirs(getattr(type(cache), m))), None)
    if changed is not None:
        raise UnsupportedFeatureError(
            f"the KV cache passed in is a {type(cache).__name__} with its own {changed}(), whose lengths vtc cannot keep: pass a "
            "transformers DynamicCache, or nothing"
        )
    held = {type(layer) for layer in cache.layers}
    replicate = getattr(cache, "layer_class_to_replicate", None)
    for kind in held if replicate is None else {*held, replicate}:
        if not issubclass(kind, ours) and kind not in kinds:
            raise UnsupportedFeatureError(
                f"cache layers of type {kind.__name__} cannot hold a reduced sequence: use the default DynamicCache"
                + (" (StaticCache needs transformers >= 5.23)" if kind is _theirs("FixedLayer") else "")
            )
    if getattr(cache, "offloading", False):
        raise UnsupportedFeatureError("an offloaded KV cache cannot hold a reduced sequence: use the default DynamicCache")


def _is_theirs(method: Any) -> bool:
    return getattr(method, "__module__", "").partition(".")[0] == "transformers"


def seen_by_window(layer: Any) -> int:
    """Return how many tokens a plain sliding-window layer was given, whatever it still holds."""
    return layer.cumulative_length


def window_of_layer(layer: Any) -> int:
    """Return how many tokens back a token looks in a sliding-window layer, itself included."""
    return layer.sliding_window


def fixed_length(layer: Any) -> Any:
    """Return how many tokens a preallocated layer holds (a tensor once it runs)."""
    return layer.cumulative_length


def shorten_fixed(layer: Any, n: int) -> None:
    """Take the last ``n`` tokens out of a preallocated layer: they will be overwritten (in place, for compiled steps)."""
    layer.cumulative_length.sub_(n)


def cache_layer(cache: AnyCache, i: int) -> Any:
    """Return layer ``i`` of a cache, made first where the cache makes its layers as they are needed."""
    while len(cache.layers) <= i and getattr(cache, "layer_class_to_replicate", None) is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[i]


# ------------------------------------------------------------------------------------------- attention implementations
IMPLEMENTATION = "_attn_implementation"
EAGER, SDPA = "eager", "sdpa"
FLASH = "flash"
"""What the names of FlashAttention's implementations contain; transformers looks for it, too."""
_REFUSED = ("flex", "paged")
LAYERS = "num_hidden_layers"
_HEADS = ("num_attention_heads", "num_heads")
_KEY_HEADS = ("num_key_value_heads",)
"""What configurations call the number of query heads; the second in towers that pack all images in one sequence."""


def implementations() -> list[str]:
    """Return the attention implementations that can be used here."""
    return [EAGER, SDPA] + (["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])


def attention_of(config: Any) -> str:
    """Return the name of the attention implementation a configuration asks for."""
    return getattr(config, IMPLEMENTATION, None) or EAGER


def heads_of(attention: nn.Module) -> tuple[int | None, int | None]:
    """Return how many query heads and key heads the configuration of an attention module says it has; ``None``: it does not."""
    config = getattr(attention, "config", None)
    heads, keys = (
        next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int)), None)
        for names in (_HEADS, _KEY_HEADS)
    )
    return heads, heads if keys is None else keys


def is_flash(implementation: str) -> bool:
    """Whether masks have two dimensions (or none): only padding is told."""
    return FLASH in implementation


def is_eager(implementation: str) -> bool:
    """Whether masks are added to the logits: they are floats."""
    return implementation == EAGER


def needs_no_mask(implementation: str) -> bool:
    """Whether ``None`` stands for a causal mask."""
    return is_flash(implementation) or SDPA in implementation


def check_implementation(config: Any) -> None:
    """Refuse attention implementations that cannot be tapped and whose masks cannot be shortened."""
    implementation = attention_of(config)
    if any(word in implementation for word in _REFUSED):
        raise UnsupportedFeatureError(
            f"attn_implementation='{implementation}' cannot be tapped or shortened: load the model with "
            f"attn_implementation='{SDPA}'"
        )


def attend(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """Return the attention function an attention module would use: its own file's for ``eager``, else the registered one."""
    if implementation != EAGER:
        return _theirs("ATTENTION")[implementation]
    for kind in type(module).__mro__:  # FSDP2 makes a subclass in a file of its own
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise UnsupportedFeatureError(
        f"the eager attention of {type(module).__name__} was not found in its file (transformers {version()}): load the model with "
        f"attn_implementation='{SDPA}'"
    )


def attention_arguments(query: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, float]:
    """Return the mask that an attention function is given behind query, key and value, and what it multiplies logits by."""
    mask = args[0] if args else kwargs[MASK]
    scaling = args[1] if len(args) > 1 else kwargs.get("scaling")
    return mask, query.shape[-1] ** -0.5 if scaling is None else scaling


# ------------------------------------------------------------------------------------------------- rotations and layers
def layer_type(config: Any, i: int) -> str | None:
    """Return what kind of attention decoder layer ``i`` has, where a model has several."""
    kinds = getattr(config, "layer_types", None)
    return kinds[i] if kinds else None


def window_of(config: Any, i: int) -> int | None:
    """Return how many tokens back, itself included, decoder layer ``i`` looks at most; ``None``: at everything."""
    kind = layer_type(config, i)
    if kind is None:
        return getattr(config, "sliding_window", None)
    return getattr(config, _WINDOWS[kind], None) if kind in _WINDOWS else None


def has_windows(config: Any) -> bool:
    """Whether some decoder layer does not see everything."""
    return any(window_of(config, i) is not None for i in range(config.num_hidden_layers))


_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""By type of a layer: where a configuration says how far it looks."""


def rotary_of(text: nn.Module, role: str) -> nn.Module:
    """Return the module that makes the cosines and sines of a role."""
    return text.rotary_emb_local if role == "rotary_local" else text.rotary_emb


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)


def needs_positions(attention: nn.Module) -> bool:
    """Whether an attention reads position ids itself (to scale its queries): its ``forward`` cannot be called without."""
    given = inspect.signature(type(attention).forward).parameters.get(POSITIONS)
    return given is not None and given.default is given.empty


def rotate_at(rotary: nn.Module, hidden: Tensor, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of ``positions``; ``kind``: of the layer, where a model has several rotations."""
    return rotary(hidden, positions, *((kind,) if "layer_type" in _parameters(type(rotary)) else ()))


def one_rotation(table: Any, attention: Any) -> Any:
    """Return cosines and sines with one row per token; under M-RoPE, 4.57 hands three to the layers, which take a part of each."""
    if table[0].dim() == 3:
        return table
    sections = list(attention.rope_scaling["mrope_section"]) * 2
    return tuple(torch.cat([part[i % 3] for i, part in enumerate(t.split(sections, -1))], -1) for t in table)


@functools.cache
def checkpoint_repeats_hooks() -> bool:
    """Whether gradient checkpointing wraps a layer together with its hooks, so that a recomputation runs them again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__init_subclass__" not in vars(GradientCheckpointingLayer)


_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""Names of the flag of a layer that is to be run again for the backward pass, today's and the one its methods have already."""


def checkpointed(layer: nn.Module) -> bool:
    """Whether a layer will be run again for the backward pass."""
    return layer.training and any(getattr(layer, name, False) for name in _CHECKPOINTING)


# ----------------------------------------------------------------------------------------------------------- supervision
LABELS = "labels"
"""What a whole model takes beside its prompt and answer: the answer's tokens, and :data:`MASKED` where none is to be predicted."""
MASKED = -100


# ----------------------------------------------------------------------------------------------------------- generation
GENERATE = "generate"
BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods that keep a paged cache."""


def check_generation(model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Refuse what ``generate`` is asked for and a reduced sequence cannot do; return the KV cache it is given, or None."""
    call = inspect.signature(original).bind_partial(*args, **kwargs).arguments
    call = {**call, **call.get("kwargs", {}), **kwargs}
    config = call.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> Any:
        value = call.get(name)
        return value if value is not None else getattr(config, name, None)

    if asked("prefill_chunk_size"):
        raise UnsupportedFeatureError(
            "prefill_chunk_size cannot be used with a reducer, since a chunk holds only part of an image: drop the option"
        )
    kind = asked("cache_implementation")
    if kind not in _CACHE_KINDS and not (kind == _FIXED_KIND and fixed_layers_count()):
        raise UnsupportedFeatureError(
            f"cache_implementation='{kind}' cannot hold a reduced sequence: drop the option (DynamicCache is the default)"
        )
    if kind == _FIXED_KIND and has_windows(model.config.get_text_config()):
        raise UnsupportedFeatureError(
            f"cache_implementation='{kind}' cannot hold a reduced sequence on a model with sliding-window layers: drop the option "
            "(DynamicCache is the default)"
        )
    return next((call[name] for name in ROLES["kv"].names if call.get(name) is not None), None)


def generation_option(model: nn.Module, name: str) -> Any:
    """Return an option of the model's own generation settings, or None."""
    return getattr(model.generation_config, name, None)


# ----------------------------------------------------------------------------------------- running a model, for eval/
def prefill(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Run a prompt with a KV cache and the logits of its last token only; return the model's output."""
    return model(**inputs, **{USE_CACHE: True, "logits_to_keep": 1, **options})


def cache_argument(model: nn.Module) -> str:
    """Return what the model's ``forward`` calls its KV cache."""
    return Names.of(model).need("kv").roles["kv"]


def decode(model: nn.Module, token: Tensor, cache: AnyCache, mask: Tensor | None = None, **options: Any) -> Any:
    """Run one more token ``(B, 1)`` on a KV cache; return the model's output."""
    return model(**{IDS: token, MASK: mask, cache_argument(model): cache, USE_CACHE: True, "logits_to_keep": 1, **options})


def first_tokens(
    text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], n: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a text model's arguments with the first ``n`` tokens of each sequence only."""
    call = Call(Names.of(text), args, kwargs)
    for role, axis in (("embeds", 1), ("mask", 1), ("positions", -1), ("step_positions", 0)):
        value = call.beside(role)
        if isinstance(value, Tensor):
            call.set_beside(role, value.narrow(axis, 0, n))
    return call.result()


def prompt(ids: Tensor, mask: Tensor | None = None, pixels: Tensor | None = None) -> dict[str, Tensor]:
    """Return the arguments of a forward with these ids, mask (all ones by default) and pixels."""
    out = {IDS: ids, MASK: torch.ones_like(ids) if mask is None else mask}
    return out if pixels is None else {**out, PIXELS: pixels}


def parameters(kind: type | Callable[..., Any]) -> Sequence[str]:
    """Return the names of the parameters of a class's ``forward`` (or of a function)."""
    return tuple(inspect.signature(kind.forward if isinstance(kind, type) else kind).parameters)
