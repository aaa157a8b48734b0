"""A model spread over ranks: what of it a rank holds whole, and whether the ranks of one model choose alike.

Under tensor parallelism a rank holds some heads and some neurons of a layer. Hidden states, what attention and MLP add to them,
and the projector's features are whole on every rank, since each of these modules adds up its parts before it returns; queries, keys
and the inputs of an MLP's last projection are not. A reducer that read its rank's share would keep other tokens than the next rank,
and the next sum would add up different tokens without a word. So what a signal needs is gathered from the ranks that share the
module, in the prefills of prompts with pictures only; and where that cannot be done (weights cut into plain tensors, or split over
several groups at once) the reducer is refused: when patching, and again when the module runs, since a model may be sharded after it
was patched.

FSDP2's parameters are sharded, too, but whole while their module runs: not concerned. When patching, the two are told apart by what
FSDP2 adds to a parameter's mesh (its own dimensions come first); in a module that runs, what is sharded still is split for good.

Nothing here is done in a process that has no other ranks, and nothing in decode steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from vtc.core import EncoderReducer, Need, Reducer, Selection, Stage
from vtc.engine import upstream
from vtc.errors import NotReducedError, UnsupportedFeatureError
from vtc.families.base import Family, Transformer

if TYPE_CHECKING:
    from vtc.engine.context import Instance


def several() -> bool:
    """Whether this process is one of several ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


# ------------------------------------------------------------------------------------------------------- what is read
@dataclass(frozen=True, eq=False)
class Read:
    """A module whose inner values a reducer is shown.

    Attributes
    ----------
    part : str
        Name of the reducer.
    what : str
        Which module it is, for messages.
    module : Module
        The module.
    source, of : str
        As in :class:`vtc.core.Need`.
    later : bool
        Decode steps will run on a part of the module: what is shown is not all that is needed of it.
    """

    part: str
    what: str
    module: nn.Module
    source: str
    of: str = "attention"
    later: bool = False


def reads(family: Family | Transformer, parts: Iterable[Reducer]) -> Iterator[Read]:
    """Yield what the ``parts`` of a bound reducer read that is split where a module's weights are.

    Not among them: hidden states, and what a layer's attention and MLP add to them.
    """
    tower = family.attention if isinstance(family, Transformer) else family.encoder_attention
    for part in parts:
        needs = [(need, False) for need in part.needs]
        needs += [(need, True) for need in part.decode_neurons(family.facts)]
        if isinstance(part, EncoderReducer):
            needs += [(need, False) for i in range(len(tower)) for need in part.encoder_needs(i)]
        for need, later in ((n, later) for wanted, later in needs for n in _with_uses([wanted], family.facts.provides)):
            layer = need.layer
            if need.source == "vision" and need.of == "attention":
                if isinstance(family, Transformer) and part.stage is Stage.VISION:  # acts between two blocks
                    layer = part.tower_layer - 1
                what, module = f"the attention of tower layer {layer % len(tower)}", tower[layer]
            elif need.of == "projection":
                what, module = "the projector", family.projector
            elif need.source == "text" and need.of in ("attention", "preview"):
                what, module = f"the attention of decoder layer {layer % len(family.layers)}", family.text_attention[layer]
            elif need.of == "neurons":
                what, module = f"the neurons of decoder layer {layer % len(family.layers)}", family.layers[layer].mlp
            else:
                continue
            yield Read(part.name, what, module, need.source, "attention" if need.of == "preview" else need.of, later)


def _with_uses(needs: Iterable[Need], provides: frozenset[str]) -> Iterator[Need]:
    for need in needs:
        yield need.resolve(provides)
        yield from _with_uses(need.uses, provides)


# ------------------------------------------------------------------------------------------------------ what is split
def _parameters(module: nn.Module, held: bool) -> Iterator[tuple[nn.Module, Tensor, bool]]:
    """Yield a module, each of its own parameters, and whether FSDP2 shards it; below a module that itself is whole right now."""
    from torch.distributed.fsdp import FSDPModule

    for parameter in module.parameters(recurse=False):
        yield module, parameter, held
    for child in module.children():
        yield from _parameters(child, held or isinstance(child, FSDPModule))


def _dimensions(parameter: Tensor, held: bool) -> list[int]:
    """Return the dimensions of a parameter's device mesh over which it is split while its module runs."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return []
    split = [not placement.is_replicate() for placement in parameter.placements]
    own = split.index(True) + 1 if held and True in split else 0  # replicas, then the shards FSDP2 gathers
    return [d for d in range(own, len(split)) if split[d]]


def _is_slice(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a linear layer holds a plain tensor that is part of its weight (some plans leave DTensor out)."""
    if not isinstance(module, nn.Linear) or parameter is not module.weight or not parameter.is_floating_point():
        return False
    whole, here = (module.out_features, module.in_features), tuple(parameter.shape)
    return len(here) == 2 and here != whole and all(0 < a <= b for a, b in zip(here, whole, strict=True))


def _split(module: nn.Module, held: bool = False) -> bool:
    return any(_dimensions(p, under) or _is_slice(own, p) for own, p, under in _parameters(module, held))


def _held(root: nn.Module) -> set[int]:
    """Return the ``id`` of every module in which FSDP2 shards."""
    from torch.distributed.fsdp import FSDPModule

    found: set[int] = set()
    for module in root.modules():
        if isinstance(module, FSDPModule) and id(module) not in found:
            found |= {id(m) for m in module.modules()}
    return found


def _first_split(family: Family | Transformer, parts: Iterable[Reducer], held: set[int]) -> Read | None:
    """Return the first module that is split so that what is read of it cannot be gathered."""
    for read in reads(family, parts):
        inside = id(read.module) in held
        if _split(read.module, inside) and (isinstance(family, Transformer) or not _gathers(read, inside)):
            return read
    return None


# ---------------------------------------------------------------------------------------------------------- gathering
def _groups(module: nn.Module, held: bool = False) -> list[Any]:
    """Return the process groups over which a module's weights are split while it runs."""
    found = {}
    for _, parameter, under in _parameters(module, held):
        for d in _dimensions(parameter, under):
            group = parameter.device_mesh.get_group(d)
            found[id(group)] = group
    return list(found.values())


def _one_group(module: nn.Module, held: bool = False) -> Any | None:
    """Return the group whose ranks together hold a module; ``None``: weights that are plain slices, or several groups."""
    groups = _groups(module, held)
    plain = any(_is_slice(own, p) for own, p, _ in _parameters(module, held))
    return groups[0] if len(groups) == 1 and not plain else None


def _gathers(read: Read, held: bool) -> bool:
    """Whether what is read of a module that is split can be made whole."""
    group = _one_group(read.module, held)
    if group is None or read.later:
        return False
    if read.of != "attention":
        return True
    size = distributed.get_world_size(group)
    return all(n is not None and n % size == 0 for n in upstream.heads_of(read.module))


def gather(part: Tensor, dim: int, whole: int | None, group: Any) -> Tensor | None:
    """Return what the ranks of a group hold one after the other along ``dim``, ``whole`` long; ``None``: it does not add up."""
    if hasattr(part, "full_tensor"):  # handed from module to module as a distributed tensor
        part = part.detach().full_tensor()
    if part.shape[dim] == whole:
        return part
    size = distributed.get_world_size(group)
    if whole is None or part.shape[dim] * size != whole:
        return None
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    distributed.all_gather(parts, part.detach().contiguous(), group=group)
    return torch.cat(parts, dim)


def whole_attention(
    family: Family, parts: Iterable[Reducer], module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v ``(B, H, N, d)`` with the heads of all ranks that share an attention module that runs.

    Raises
    ------
    UnsupportedFeatureError
        If heads are missing that no group is known to hold.
    """
    if not several():
        return query, key, value
    heads, key_heads = upstream.heads_of(module)
    group = _one_group(module)
    if group is None:
        check_running(family, parts, module, query)
        return query, key, value
    found = [gather(t, 1, n, group) for t, n in ((query, heads), (key, key_heads), (value, key_heads))]
    if any(t is None for t in found):
        raise _unread(family, parts, module)
    return found[0], found[1], found[2]


def whole_neurons(family: Family, parts: Iterable[Reducer], mlp: nn.Module, inner: Tensor, whole: int) -> Tensor:
    """Return ``inner (B, N, I)``, what the last projection of an MLP that runs is given, with the neurons of all ranks."""
    if not several():
        return inner
    group = _one_group(mlp)
    if group is None:
        check_running(family, parts, mlp)
        return inner
    found = gather(inner, 2, whole, group)
    if found is None:
        raise _unread(family, parts, mlp)
    return found


def check_projector(family: Family, parts: Iterable[Reducer], projector: nn.Module) -> None:
    """Refuse a projector that runs, and whose weights cannot be put together."""
    if several() and _one_group(projector) is None:
        check_running(family, parts, projector)


# ------------------------------------------------------------------------------------------------------------ refusing
def check(family: Family | Transformer, parts: Iterable[Reducer], root: nn.Module) -> None:
    """Raise :class:`UnsupportedFeatureError` where the ``parts`` read what is split over ranks; when patching.

    Parameters
    ----------
    family : Family or Transformer
        Of the model.
    parts : iterable of Reducer
        Of the bound reducer.
    root : Module
        The model as it was given, wrappers included: they may be what FSDP2 shards.
    """
    if not several():
        return
    held = _held(root)
    read = _first_split(family, parts, held)
    if read is not None:
        raise _refusal(read, family, lambda others: not _first_split(family, others, held))


def check_running(
    family: Family | Transformer, parts: Iterable[Reducer], module: nn.Module, query: Tensor | None = None
) -> None:
    """The same for one ``module`` while it runs; ``query``: ``(B, H, N, d)`` as its attention is given it."""
    if not several():
        return
    heads = upstream.heads_of(module)[0] if query is not None else None
    if _split(module) or (heads is not None and query.shape[1] < heads):
        raise _unread(family, parts, module)


def _unread(family: Family | Transformer, parts: Iterable[Reducer], module: nn.Module) -> UnsupportedFeatureError:
    read = next(r for r in reads(family, parts) if r.module is module)
    # what is plain shows in what it computes only: name nothing that reads the same side of the model
    return _refusal(
        read, family, lambda others: all(r.source != read.source and not _split(r.module) for r in reads(family, others))
    )


def _refusal(read: Read, family: Family | Transformer, fits: Callable[[tuple[Reducer, ...]], bool]) -> UnsupportedFeatureError:
    from vtc.engine.patch import usable

    names = [] if isinstance(family, Transformer) else [n for n in usable(family.facts, fits) if n != read.part]
    others = f"use one of {', '.join(names)}, or " if names else ""
    return UnsupportedFeatureError(
        f"'{read.part}' reads {read.what}, whose weights are split over ranks (tensor parallelism) in a way that vtc cannot put "
        f"together, so that every rank would keep other tokens: {others}load the model whole on every rank"
    )


def check_copies(root: Any) -> None:
    """Refuse :class:`torch.nn.DataParallel`, around the model or inside."""
    if isinstance(root, nn.Module) and any(isinstance(m, nn.DataParallel) for m in root.modules()):
        raise _copied("nn.DataParallel runs")


def check_original(module: nn.Module, known: nn.Module | None) -> None:
    """Raise :class:`UnsupportedFeatureError` if the ``module`` that runs only shares its hooks with the one that was patched."""
    if module is not known:
        raise _copied("this call runs")


def _copied(what: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"{what} copies of the model (replicas) that share the hooks and wrapped methods of the original, which a reducer cannot "
        "tell apart: use nn.parallel.DistributedDataParallel, one process and one model per device"
    )


def check_stages(family: Family) -> None:
    """Refuse a model of which this rank has only some decoder layers (pipeline parallelism)."""
    if not several():
        return
    asked = getattr(family.text.config, upstream.LAYERS, len(family.layers))
    absent = [i for i, layer in enumerate(family.layers) if layer is None or isinstance(layer, nn.Identity)]
    if absent or len(family.layers) < asked:
        here = len(family.layers) - len(absent)
        raise UnsupportedFeatureError(
            f"{type(family.text).__name__} has {here} of its {asked} decoder layers on this rank (pipeline parallelism), and a "
            "reducer needs them all: load the model whole on every rank, or spread it with tensor parallelism"
        )


def check_sequence(mask: Any, cache: Any, length: int) -> None:
    """Refuse prompts whose attention mask is longer than they are: the sequence is split over ranks."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] <= length:
        return
    seen = 0 if cache is None else int(cache.get_seq_length())
    if mask.shape[1] > seen + length:
        raise split_sequence(f"the prompt has {length} tokens where its attention mask has {mask.shape[1] - seen}")


def check_states(hidden: Tensor, length: int, where: str) -> None:
    """Refuse states ``(B, length, D)`` given to a layer or text model that are a part of the sequence, or a distributed tensor."""
    plain = not hasattr(hidden, "device_mesh")
    if hidden.shape[1] != length or not plain:
        found = f"{hidden.shape[1]} of {length} tokens" if plain else "a distributed tensor"
        raise split_sequence(f"{where} is given {found}")


def split_sequence(found: str) -> UnsupportedFeatureError:
    """Return the error for a sequence of which a rank has only a part."""
    return UnsupportedFeatureError(
        f"{found}: sequence and context parallelism split the sequence that a reducer shortens, so use data or tensor parallelism "
        "that leaves it whole"
    )


# ----------------------------------------------------------------------------------------------------------- agreement
def groups_of(layer: nn.Module) -> tuple[Any, ...]:
    """Return the process groups over which the linear layers of a decoder layer that runs are split.

    Their ranks work on the same tokens. Experts (three dimensions) do not count: they may be spread over ranks with other tokens.
    """
    from torch.distributed.tensor import DTensor

    if not any(isinstance(m.weight, DTensor) for m in layer.modules() if isinstance(m, nn.Linear)):  # in every prefill: quickly
        return ()
    found = {}
    for _, parameter, held in _parameters(layer, False):
        for d in _dimensions(parameter, held) if parameter.dim() == 2 else ():
            group = parameter.device_mesh.get_group(d)
            found[id(group)] = group
    return tuple(found.values())


def count_may_differ(part: Reducer) -> bool:
    """Whether the number of tokens a part keeps follows from what it sees: ranks that disagree then break in the next layer."""
    return part.decides_itself or part.stage is Stage.ENCODER or part.newline_policy == "with_row"


class Peers:
    """Whether the ranks that share a model keep the same tokens in one prefill.

    Attributes
    ----------
    groups : tuple of ProcessGroup
        Of the ranks that hold parts of the same layers; empty until a layer that is split was entered.
    """

    def __init__(self) -> None:
        self.groups: tuple[Any, ...] = ()
        self._mark: Tensor | None = None
        self._asked: list[Tensor] = []

    def note(self, instances: list[Instance]) -> None:
        """Take what is alive, and what was merged into what, into the number that ranks compare. The host does not wait."""
        told = [t for it in instances for t in (it.entries, *(owner for _, _, owner in it.merges))]
        if not told:
            return
        total = _number(told)
        self._mark = total if self._mark is None else _mixed(self._mark.to(total.device) + total)

    def compare_prompts(self, instances: list[Instance]) -> None:
        """Raise :class:`NotReducedError` if the ranks were given other prompts, before any of them waits for what another sends."""
        if self.groups and instances:
            self._send(_number([(it.columns.long() << 16) + it.row for it in instances]))
            self.agree()

    def share(self, selection: Selection) -> Selection:
        """Return what the first rank of the group chose: a difference in a last bit must not part the ranks."""
        for group in self.groups:
            first = distributed.get_global_rank(group, 0)
            index, valid = selection.index, selection.valid
            told = torch.tensor([index.shape[1], valid is not None], device=index.device)
            distributed.broadcast(told, first, group=group)
            kept, ragged = told.tolist()
            features, owner, weight = selection.features, selection.owner, selection.weight
            index = _from(first, group, index, (len(index), kept))
            valid = _from(first, group, valid if valid is not None else index.bool(), index.shape) if ragged else None
            features = None if features is None else _from(first, group, features, (*index.shape, features.shape[2]))
            owner = None if owner is None else _from(first, group, owner, owner.shape)
            weight = None if weight is None else _from(first, group, weight, index.shape)
            selection = replace(selection, index=index, valid=valid, features=features, owner=owner, weight=weight)
        return selection

    def ask(self) -> None:
        """Send the number round, if it has changed; the answer is looked at by :meth:`agree`."""
        if self._mark is not None:
            self._send(self._mark)
        self._mark = None

    def _send(self, number: Tensor) -> None:
        for group in self.groups:
            ends = torch.stack([number, -number])
            distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=group)
            self._asked.append(ends.sum() != 0)  # the largest, and minus the smallest

    def agree(self) -> None:
        """Raise :class:`NotReducedError`, on every rank, if an answer says that ranks differ."""
        asked, self._asked = self._asked, []
        if any(bool(differ) for differ in asked):
            raise NotReducedError(
                "the ranks that share this model kept different visual tokens of the same prompt, and what they add up belongs to "
                "different tokens: give all of them the same inputs, on devices of the same kind"
            )


def _from(first: int, group: Any, mine: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the first rank's tensor, of that shape and of the kind of ``mine``; gradients stay with what is its own."""
    mine = mine.contiguous() if tuple(mine.shape) == tuple(shape) else mine.new_zeros(shape)
    told = mine.detach().clone()
    distributed.broadcast(told, first, group=group)
    return told if not mine.requires_grad else mine + (told - mine).detach()


def _number(told: list[Tensor]) -> Tensor:
    """Return one 64-bit number that stands for whole numbers in order."""
    values = torch.cat([t.long() + (i << 32) for i, t in enumerate(told)])
    return _mixed(values * 0x9E3779B1 + torch.arange(len(values), device=values.device)).sum()


def _mixed(x: Tensor) -> Tensor:
    """Spread every bit over 64 (products wrap)."""
    x = (x ^ (x >> 31)) * 0x7FB5D329728EA185
    x = (x ^ (x >> 27)) * 0x01DADEF4BC2DD44D
    return x ^ (x >> 33)
