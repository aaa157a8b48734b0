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
from models import build, make_inputs
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import vtc
from vtc.core import Reducer, Selection, Signals, Stage
from vtc.engine import parallel
from vtc.engine.patch import bind
from vtc.errors import VtcError
from vtc.families import family_of
from vtc.pocket import load_pocket, pocket_path

KEEP, WORDS = 48, 8
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
    written: list[list[int]] | None = None

    def same(self, other: Ran, atol: float = 1e-4) -> bool:
        alike = self.kept == other.kept and self.written == other.written
        return alike and torch.allclose(self.logits, other.logits, atol=atol, rtol=0)


@torch.no_grad()
def call(model: nn.Module, reducer: Any, inputs: dict[str, Tensor] | None = None, words: int = 0, **options: Any) -> Ran:
    """Patch, run once, generate some ``words`` if asked, unpatch."""
    options = options or ({"keep": KEEP} if isinstance(reducer, str) else {})
    inputs = inputs or rows(0, 2)
    with vtc.patch(model, reducer, **options) as handle:
        ran = Ran([], model(**inputs).logits[:, -1].clone())
        ran.kept = [k.entries.tolist() for k in handle.stats.kept]
        if words:
            ran.written = model.generate(**inputs, max_new_tokens=words, do_sample=False, eos_token_id=None)[
                :, -words:
            ].tolist()
        return ran


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
    plan = {name: kind() for name, kind in LINEAR.items()}

    def layer(module: nn.Module) -> None:
        names = dict(module.named_modules())
        parallelize_module(module, mesh, {name: kind for name, kind in plan.items() if name in names})

    for module in model.model.language_model.layers if text else ():
        layer(module)
    if tower:
        base = model.model
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
    return {name: told(lambda name=name: call(model, name, words=WORDS)) for name in vtc.list_reducers()}


def spread_by_transformers() -> dict[str, Any]:
    return everything(spread)


def spread_with_tower() -> dict[str, Any]:
    return everything(lambda: split(whole(), line(), tower=True))


@functools.cache
def readers() -> list[str]:
    """Reducers that read attention, keys or neurons of decoder layers."""
    family = family_of(alone())
    parts = {name: bind(vtc.create(name, keep=KEEP), family.facts).parts() for name in vtc.list_reducers()}
    return [name for name, own in parts.items() if any(read.source == "text" for read in parallel.reads(family, own))]


@functools.cache
def tiny(name: str, heads: int) -> nn.Module:
    """A tiny random model of a family, in one process."""
    return build(
        name, text={} if heads == 4 else {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "hidden_size": 64}
    )


def tried(model: nn.Module, name: str) -> dict[str, Any]:
    """The reducers that read the decoder, on a model of a family: two rows, one padded."""
    inputs = make_inputs(name, model, 2)
    return {r: told(lambda r=r: call(model, r, inputs, keep=0.4, words=4)) for r in readers()}


def families_spread(names: tuple[str, ...], heads: int) -> dict[str, Any]:
    """Tiny models of several families, whose decoders torch splits over all ranks."""
    size = distributed.get_world_size()
    return {name: tried(split(copy.deepcopy(tiny(name, heads)), line(size)), name) for name in names}


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
def unspread(reducer: str, words: int = 0) -> Ran:
    """A single process."""
    return call(alone(), reducer, words=words)


LATER = ("fastv", "pyramiddrop", "corematching", "visionzip", "tome", "zooprune", "divprune")


def sharded_later() -> list[Any]:
    """Patched whole, spread afterwards; then taken off, which works, and run."""
    found: list[Any] = []
    for reducer in LATER:
        model = whole()
        handle = vtc.patch(model, reducer, keep=KEEP)
        split(model, line(), tower=True)
        with torch.no_grad():
            found.append(told(lambda model=model: Ran([], model(**rows(0)).logits[:, -1].clone())))
            if isinstance(found[-1], Ran):
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
    handle = vtc.patch(late, "fastv", keep=KEEP)
    split(late, mesh["tensor"])
    for layer in late.model.language_model.layers:
        fully_shard(layer, mesh=mesh["data"])
    with torch.no_grad():
        logits = late(**mine).logits[:, -1].clone()
        found.append(Ran([k.entries.tolist() for k in handle.stats.kept], logits))
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


def neurons_split() -> list[Any]:
    """Decode steps on some of the neurons, of MLPs that are split; and of MLPs that are whole."""
    model, other = split(whole(), line()), whole()
    for layer in other.model.language_model.layers:
        plan = {name: kind() for name, kind in LINEAR.items() if name.startswith("self_attn") and "out_proj" not in name}
        parallelize_module(layer, line(), plan)
    return [told(lambda m=m: call(m, "corematching", keep=KEEP, neurons=0.4, words=WORDS)) for m in (model, other)]


def few_key_heads() -> Any:
    """One key head, and two ranks."""
    model = build("llava", text={"num_attention_heads": 4, "num_key_value_heads": 1})
    plan = {name: kind() for name, kind in LINEAR.items() if "k_proj" not in name and "v_proj" not in name}
    for layer in model.model.language_model.layers:
        names = dict(layer.named_modules())
        parallelize_module(layer, line(), {name: kind for name, kind in plan.items() if name in names})
    return told(lambda: call(model, "fastv", make_inputs("llava", model, 2), keep=0.4))


def gathered() -> dict[str, int]:
    """Bytes that every rank is sent for one prefill, by reducer."""
    found, real = {}, distributed.all_gather

    def counting(parts: list[Tensor], tensor: Tensor, **options: Any) -> Any:
        found[name] += sum(t.numel() * t.element_size() for t in parts)
        return real(parts, tensor, **options)

    parallel.distributed.all_gather = counting
    model = split(whole(), line())
    for name in vtc.list_reducers():
        found[name] = 0
        call(model, name, rows(0), keep=KEEP)
    return found


def other_prompts() -> list[Any]:
    """Ranks that share a model are given prompts of their own: seen before one waits for what another sends."""
    model = spread()
    mine = rows(2) if distributed.get_rank() else rows(0)
    mine["input_ids"] = mine["input_ids"].roll(distributed.get_rank() * 3, 1)
    return [told(lambda: call(model, "fastv", mine, keep=KEEP))]


def ranks_apart() -> list[Any]:
    """Reducers that keep other tokens on every rank; strict and not; then a call that is right, on the same model."""
    model = spread()
    found = [told(lambda kind=kind: call(model, kind(keep=KEEP))) for kind in (Apart, ApartInNumber, ApartInOwners)]
    found.append(told(lambda: call(model, Apart(keep=KEEP), strict=False)))
    found += [told(lambda kind=kind: call(model, kind(keep=KEEP))) for kind in (ApartInside, ApartInNumberInside)]
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


# ------------------------------------------------------------------------------------------------------------ training
TRAINED = ("fastv", "divprune", "visionzip", "aim")


def lessons() -> dict[str, Tensor]:
    """Four prompts of one length, the last twelve tokens of each to be learned."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 90, (4, 212), generator=generator)
    ids[:, 3:199] = 4
    labels = ids.masked_fill(torch.arange(212) < 200, -100)
    pixels = torch.randn(4, 3, 112, 112, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


def train(model: nn.Module, mine: slice, reducer: str, steps: int = 5) -> tuple[list[float], list[float]]:
    """Five steps at a budget; return the losses (the mean over ranks) and the norms of gradients, summed over the model."""
    inputs = {name: value[mine] for name, value in lessons().items()}
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, norms = [], []
    handle = vtc.patch(model, reducer, keep=KEEP)
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        told_ = loss.detach().clone()
        if ranks > 1:
            distributed.all_reduce(told_)
        losses.append(float(told_) / ranks)
        squares = [p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None]
        norms.append(float(sum(s.full_tensor() if hasattr(s, "full_tensor") else s for s in squares)) ** 0.5)
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return losses, norms


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2: every decoder layer, the projector and the rest."""
    size = distributed.get_world_size()
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=line(size), **options)
    fully_shard(model.model.multi_modal_projector, mesh=line(size), **options)
    return fully_shard(model, mesh=line(size), **options)


def trained() -> dict[str, Any]:
    """Half of the lessons on every rank: FSDP2, with activation checkpointing, and DDP."""
    rank = distributed.get_rank()
    mine, found = slice(2 * rank, 2 * rank + 2), {}
    for reducer in TRAINED:
        found[reducer] = told(lambda reducer=reducer: train(sharded(whole()), mine, reducer))
        again = whole().train()
        again.gradient_checkpointing_enable({"use_reentrant": False})
        found[f"{reducer}, checkpoints"] = told(lambda reducer=reducer, again=again: train(sharded(again), mine, reducer))
        copies = nn.parallel.DistributedDataParallel(whole(), find_unused_parameters=True)  # the tower's last layer is unused
        found[f"{reducer}, DDP"] = told(lambda reducer=reducer, copies=copies: train(copies, mine, reducer))
    return found


def half_precision() -> list[Any]:
    """FSDP2 that computes in bfloat16 (patched before and after), and in float32 around attention modules alone, eager."""
    found = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for reducer in DATA:
        found.append(told(lambda reducer=reducer: call(sharded(whole(), mp_policy=policy), reducer, rows(0, 2), keep=KEEP)))
        model = whole()
        handle = vtc.patch(model, reducer, keep=KEEP)
        with torch.no_grad():
            logits = sharded(model, mp_policy=policy)(**rows(0, 2)).logits[:, -1].clone()
        stats = handle.stats
        found.append(
            (Ran([k.entries.tolist() for k in stats.kept], logits), [image.tokens_per_layer for image in stats.last.images])
        )
    return found


def attention_alone() -> list[Any]:
    """FSDP2 around attention modules alone, with eager attention."""
    found = []
    for reducer in ("fastv", "visionzip"):
        model = whole()
        model.set_attn_implementation("eager")
        for module in (
            *(layer.self_attn for layer in model.model.language_model.layers),
            *(m for n, m in model.model.vision_tower.named_modules() if n.endswith("self_attn")),
        ):
            fully_shard(module, mesh=line())
        found.append(told(lambda m=model, r=reducer: call(m, r, rows(0, 2), keep=KEEP)))
    return found
