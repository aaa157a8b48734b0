"""What the ranks of tests/test_parallel.py run: functions that start one model in some way and say what came of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import vtc
from vtc.core import Reducer, Selection, Signals, Stage
from vtc.engine import parallel
from vtc.errors import VtcError
from vtc.pocket import load_pocket, pocket_path

KEEP = 48
DATA = ("fastv", "pyramiddrop", "corematching", "transprune", "visionzip", "tome", "zooprune")
"""Reducers that read every kind of thing."""


@functools.cache
def prompts() -> dict[str, Tensor]:
    """Three prompts with random pictures, the last one left padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 90, (3, 12 + 196), generator=generator)
    ids[:, 3:199] = 4
    mask = torch.ones_like(ids)
    ids[2, :2], mask[2, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 112, 112, generator=generator)}


def rows(*which: int) -> dict[str, Tensor]:
    """Some of them."""
    return {name: value[list(which)] for name, value in prompts().items()}


@dataclass
class Ran:
    """What one call kept, and its last logits."""

    kept: list[list[int]]
    logits: Tensor

    def same(self, other: Ran) -> bool:
        return self.kept == other.kept and torch.allclose(self.logits, other.logits, atol=1e-4, rtol=0)


@torch.no_grad()
def call(model: nn.Module, reducer: Any, inputs: dict[str, Tensor] | None = None, **options: Any) -> Ran:
    """Patch, run once, unpatch."""
    options = options or ({"keep": KEEP} if isinstance(reducer, str) else {})
    with vtc.patch(model, reducer, **options) as handle:
        logits = model(**(inputs or rows(0, 2))).logits[:, -1].clone()
        return Ran([k.entries.tolist() for k in handle.stats.kept], logits)


def told(action: Callable[[], Any]) -> Any:
    """What an action returned, or the error it raised on purpose as (class, message)."""
    try:
        return action()
    except VtcError as error:
        return type(error).__name__, str(error)


def spread() -> nn.Module:
    """The pocket model as transformers spreads it (tensor parallelism of the language model)."""
    from transformers import AutoModelForImageTextToText
    from transformers.distributed import DistributedConfig

    plan = {"tp_plan": "auto"}  # 4.57 has no such field
    if "tp_plan" in {f.name for f in dataclasses.fields(DistributedConfig)}:
        plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
    return AutoModelForImageTextToText.from_pretrained(pocket_path(), dtype=torch.float32, **plan).eval()


@functools.cache
def alone() -> nn.Module:
    """The pocket model in one process."""
    return load_pocket()[0]


def whole() -> nn.Module:
    """The same, to be changed."""
    return copy.deepcopy(alone())


LINEAR = {
    **{f"self_attn.{name}": ColwiseParallel for name in ("q_proj", "k_proj", "v_proj")},
    **{f"self_attn.{name}": RowwiseParallel for name in ("o_proj", "out_proj")},
    **{f"mlp.{name}": ColwiseParallel for name in ("gate_proj", "up_proj", "fc1")},
    **{f"mlp.{name}": RowwiseParallel for name in ("down_proj", "fc2")},
}


def split(model: nn.Module, mesh: Any, text: bool = True, tower: bool = False) -> nn.Module:
    """Spread a model with torch's own tensor parallelism."""
    base, plan = model.model, {name: kind() for name, kind in LINEAR.items()}

    def layer(module: nn.Module) -> None:
        names = dict(module.named_modules())
        parallelize_module(module, mesh, {name: kind for name, kind in plan.items() if name in names})

    for module in base.language_model.layers if text else ():
        layer(module)
    if tower:
        for module in getattr(base.vision_tower, "vision_model", base.vision_tower).encoder.layers:
            layer(module)
        halves = {"linear_1": ColwiseParallel(), "linear_2": RowwiseParallel()}
        parallelize_module(base.multi_modal_projector, mesh, halves)
    return model


def line(n: int = 2, **options: Any) -> Any:
    return init_device_mesh("cpu", (n,), **options)


def everything(model_of: Callable[[], nn.Module]) -> dict[str, Any]:
    """Every reducer of the registry, on a model that is spread."""
    model = model_of()
    return {name: told(lambda name=name: call(model, name)) for name in vtc.list_reducers()}


def spread_by_transformers() -> dict[str, Any]:
    return everything(spread)


def spread_with_tower() -> dict[str, Any]:
    return everything(lambda: split(whole(), line(), tower=True))


def spread_embeddings() -> list[Any]:
    """Prompts given as embeddings, and generation, with a reducer that works."""
    model = spread()
    table = model.get_input_embeddings()
    inputs = dict(rows(0, 2))
    with torch.no_grad():
        given = {"inputs_embeds": table(inputs.pop("input_ids")), **inputs}
        with vtc.patch(model, "divprune", keep=KEEP):
            written = model.generate(**rows(0, 2), max_new_tokens=6, do_sample=False, eos_token_id=None)
    return [told(lambda: call(model, "divprune", given)), written[:, -6:].tolist()]


@functools.cache
def unspread(reducer: str) -> Ran:
    """A single process."""
    return call(alone(), reducer)


def sharded_later() -> list[Any]:
    """Patched whole, spread afterwards; then taken off, which works, and run."""
    found: list[Any] = []
    for reducer in ("fastv", "pyramiddrop", "corematching", "visionzip", "tome", "zooprune", "divprune"):
        model = whole()
        handle = vtc.patch(model, reducer, keep=KEEP)
        split(model, line(), tower=True)
        with torch.no_grad():
            found.append(told(lambda model=model: Ran([], model(**rows(0)).logits[:, -1].clone())))
            if reducer == "divprune":
                found[-1].kept = [k.entries.tolist() for k in handle.stats.kept]
            vtc.unpatch(model)
            found.append(Ran([], model(**rows(0)).logits[:, -1].clone()))
    return found


def slices_without_dtensor() -> list[Any]:
    """Weights cut by hand into plain tensors: linear layers that say so, and an attention whose heads are all that shows."""
    found, rank = [], distributed.get_rank()
    for hide in (False, True):
        model = whole()
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(attention, name)
                linear.weight = nn.Parameter(linear.weight.detach().chunk(2)[rank].clone())
                linear.out_features = 64 if hide else linear.out_features
            attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach().chunk(2, 1)[rank].clone())
            attention.o_proj.in_features = 64 if hide else attention.o_proj.in_features
            attention.o_proj.register_forward_hook(lambda _m, _a, out: distributed.all_reduce(out) or out)
        found += [told(lambda model=model, name=name: call(model, name)) for name in ("fastv", "divprune")]
    return found


def data_parallel() -> list[Any]:
    """FSDP2 (patched before and after) and DDP, with other prompts on every rank: nothing is split, nothing is compared."""
    mine = rows(0, 2) if distributed.get_rank() else rows(1)

    def sharded(model: nn.Module) -> nn.Module:
        base = model.model
        fully_shard(base.language_model.layers[1].self_attn, mesh=line())
        for layer in base.language_model.layers:
            fully_shard(layer, mesh=line())
        fully_shard(base.multi_modal_projector, mesh=line())
        return fully_shard(model, mesh=line())  # the tower is left to the root

    after = sharded(whole())
    found = [call(after, reducer, mine, keep=KEEP) for reducer in DATA]
    for reducer in DATA:
        before = whole()
        handle = vtc.patch(before, reducer, keep=KEEP)
        with torch.no_grad():
            logits = sharded(before)(**mine).logits[:, -1].clone()
        found.append(Ran([k.entries.tolist() for k in handle.stats.kept], logits))
    wrapped = nn.parallel.DistributedDataParallel(whole())
    found.append(call(wrapped, "fastv", mine, keep=KEEP))
    return found


def both() -> list[Any]:
    """Four ranks: FSDP2 over tensor parallelism, other prompts on the two data-parallel halves."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    mine = rows(mesh.get_local_rank("data"), 2)

    def made() -> nn.Module:
        model = split(whole(), mesh["tensor"])
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        return model

    model = made()
    found = [mesh.get_local_rank("data"), *(told(lambda n=n: call(model, n, mine)) for n in ("fastv", "divprune", "visionzip"))]
    late = whole()
    vtc.patch(late, "fastv", keep=KEEP)
    split(late, mesh["tensor"])
    for layer in late.model.language_model.layers:
        fully_shard(layer, mesh=mesh["data"])
    with torch.no_grad():
        found.append(told(lambda: late(**mine)))
    return [*found, told(lambda: call(model, Apart(keep=KEEP, by=2), mine))]  # both ranks of a half agree


@dataclass(frozen=True, kw_only=True)
class Apart(Reducer):
    """Ranks keep different tokens, and where it ``decides_itself`` different numbers of them."""

    stage: ClassVar[Stage] = Stage.BOUNDARY
    name: ClassVar[str] = "apart"

    by: int = 1

    def select(self, signals: Signals) -> Selection:
        shift = distributed.get_rank() // self.by
        n = signals.budget - (shift if self.decides_itself else 0)
        return Selection((torch.arange(n) + shift).expand(signals.shape[0], -1).clone())


@dataclass(frozen=True, kw_only=True)
class ApartInside(Apart):
    stage: ClassVar[Stage] = Stage.DECODER
    name: ClassVar[str] = "apart_inside"
    layer: int = 2


@dataclass(frozen=True, kw_only=True)
class ApartInNumber(Apart):
    name: ClassVar[str] = "apart_in_number"
    decides_itself: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ApartInNumberInside(ApartInNumber):
    stage: ClassVar[Stage] = Stage.DECODER
    name: ClassVar[str] = "apart_in_number_inside"
    layer: int = 3


@dataclass(frozen=True, kw_only=True)
class ApartInOwners(Apart):
    """The same slots, but other tokens are merged into them."""

    name: ClassVar[str] = "apart_in_owners"

    def select(self, signals: Signals) -> Selection:
        at = torch.arange(signals.budget).expand(signals.shape[0], -1).clone()
        owner = (torch.arange(signals.shape[1]) + distributed.get_rank()) % signals.budget
        return Selection(at, signals.features[:, : signals.budget], owner.expand(signals.shape[0], -1).clone())


def ranks_apart() -> list[Any]:
    """Reducers that keep other tokens on every rank; strict and not; then a call that is right, on the same model."""
    model = spread()
    kinds = (Apart, ApartInside, ApartInNumber, ApartInNumberInside, ApartInOwners)
    found = [told(lambda kind=kind: call(model, kind(keep=KEEP))) for kind in kinds]
    found.append(told(lambda: call(model, Apart(keep=KEEP), strict=False)))
    return [*found, call(model, "divprune")]


def collectives(model_of: Callable[[], nn.Module], reducer: str) -> list[int]:
    """Numbers that ranks compared in a prefill, in five decode steps, and in a prompt without pictures."""
    counted: list[tuple[int, ...]] = []
    real = distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.int64:
            counted.append(tuple(tensor.shape))
        return real(tensor, *args, **kwargs)

    model, found = model_of(), []
    parallel.distributed.all_reduce = counting
    text = {"input_ids": torch.full((1, 9), 20), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    with vtc.patch(model, reducer, keep=KEEP), torch.no_grad():
        for tokens, inputs in ((1, rows(0)), (6, rows(0)), (3, text)):
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
            found.append(len(counted))
            counted.clear()
    return found


def collectives_spread() -> list[int]:
    return collectives(spread, "divprune")


def collectives_of_data() -> list[int]:
    def made() -> nn.Module:
        model = whole()
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=line())
        return model

    return collectives(made, "divprune")


def parts_of_it() -> list[Any]:
    """Pipeline stages and split sequences, at patch time and afterwards."""
    found, rank = [], distributed.get_rank()

    model = whole()  # only its half of the layers
    layers = model.model.language_model.layers
    del layers[3:]
    found.append(told(lambda: vtc.patch(model, "divprune", keep=KEEP)))

    model = whole()  # identity layers after patching
    vtc.patch(model, "divprune", keep=KEEP)
    for i in range(6):
        if i // 3 != rank:
            model.model.language_model.layers[i] = Passing()
    found.append(told(lambda: model(**rows(0))))

    model, inputs = whole(), rows(0)  # ids split, the mask whole, on the rank that has the pictures' tokens
    vtc.patch(model, "divprune", keep=KEEP)
    inputs["input_ids"] = inputs["input_ids"][:, :200]
    found.append(told(lambda: model(**inputs)))

    model = whole()  # states split before the layers
    vtc.patch(model, "divprune", keep=KEEP)
    halve = functools.partial(half, rank)
    model.model.language_model.layers[0].register_forward_pre_hook(halve, prepend=True, with_kwargs=True)
    found.append(told(lambda: model(**rows(0))))
    return found


class Passing(nn.Identity):
    """What stands for the layers of other stages."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def half(rank: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0].chunk(2, 1)[rank], *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].chunk(2, 1)[rank]}


def hanging() -> None:
    if distributed.get_rank():
        time.sleep(600)


def failing() -> None:
    if distributed.get_rank():
        raise ValueError("on purpose")
    time.sleep(600)


def rank_of() -> tuple[int, int]:
    return distributed.get_rank(), distributed.get_world_size()
