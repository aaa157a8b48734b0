"""What ranks send each other so that a reducer is right under tensor parallelism.

``torchrun --standalone --nproc-per-node 2 -m vtc.eval.gathered --output results/gathered.csv``: one prefill of the embedded model
(one picture, 208 tokens, 196 of them visual, 48 kept) for every reducer of the registry, its decoder split over the ranks. Counted
are calls and bytes of what vtc itself gathers, broadcasts and compares, on one rank; the model's own sums are not in it.
Counts, not times: they are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import vtc
from vtc.engine import upstream
from vtc.eval.env import versions
from vtc.eval.hooks import markdown
from vtc.pocket import load_pocket

KEEP, VISUAL, TEXT = 48, 196, 12
PLAN = {
    **{f"self_attn.{name}": ColwiseParallel for name in ("q_proj", "k_proj", "v_proj")},
    "self_attn.o_proj": RowwiseParallel,
    **{f"mlp.{name}": ColwiseParallel for name in ("gate_proj", "up_proj")},
    "mlp.down_proj": RowwiseParallel,
}
"""How the decoder layers are split: as every plan of transformers does it."""


@dataclass(frozen=True)
class Traffic:
    """One row of the result.

    Attributes
    ----------
    reducer : str
        Its name.
    ranks : int
        Number of ranks.
    gathers, gathered_bytes : int
        Signals put together from all ranks.
    broadcasts, broadcast_bytes : int
        Choices taken from the first rank.
    comparisons, compared_bytes : int
        Numbers that stand for prompts and choices.
    """

    reducer: str
    ranks: int
    gathers: int = 0
    gathered_bytes: int = 0
    broadcasts: int = 0
    broadcast_bytes: int = 0
    comparisons: int = 0
    compared_bytes: int = 0


def split(model: nn.Module, ranks: int) -> nn.Module:
    """Split the decoder layers over all ranks."""
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, {name: kind() for name, kind in PLAN.items()})
    return model


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Count the collectives that are called by name while it lasts; the model's own run inside torch and are not among them."""
    found: dict[str, list[int]] = {"all_gather": [], "broadcast": [], "all_reduce": []}
    real = {name: getattr(distributed, name) for name in found}
    whole = DTensor.full_tensor

    def counting(name: str) -> Callable[..., Any]:
        def call(first: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
            parts = first if isinstance(first, list) else [first]
            found[name].append(sum(t.numel() * t.element_size() for t in parts))
            return real[name](first, *args, **kwargs)

        return call

    def gathering(part: DTensor, **options: Any) -> Tensor:
        found["all_gather"].append(part.numel() * part.element_size())
        return whole(part, **options)

    DTensor.full_tensor = gathering  # type: ignore[method-assign]
    for name in real:
        setattr(distributed, name, counting(name))
    try:
        yield found
    finally:
        DTensor.full_tensor = whole  # type: ignore[method-assign]
        for name, function in real.items():
            setattr(distributed, name, function)


@torch.no_grad()
def measure(ranks: int) -> list[Traffic]:
    """Run every reducer once, on all ranks."""
    model = split(load_pocket()[0], ranks)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 90, (1, TEXT + VISUAL), generator=generator)
    ids[:, 3 : 3 + VISUAL] = model.config.image_token_id
    inputs = upstream.prompt(ids, pixels=torch.randn(1, 3, 112, 112, generator=generator))
    rows = []
    for name in vtc.list_reducers():
        with vtc.patch(model, name, keep=KEEP), counted() as found:
            model(**inputs)
        counts = [n for calls in found.values() for n in (len(calls), sum(calls))]
        rows.append(Traffic(name, ranks, *counts))
    return rows


def main(
    output: Annotated[
        Path | None, typer.Option(help="CSV file to write (by the first rank); a .md file is written beside it.")
    ] = None,
) -> None:
    """Print (and write) what vtc sends between the ranks in one prefill."""
    import pandas

    distributed.init_process_group("gloo")
    try:
        table = pandas.DataFrame([asdict(row) for row in measure(distributed.get_world_size())])
        if distributed.get_rank() == 0:
            print(table.to_string(index=False))
            if output is not None:
                table.assign(**versions()).to_csv(output, index=False)
                some = table[table.gathers > 0].drop(columns=["ranks"])  # the others send their one comparison
                output.with_suffix(".md").write_text(markdown(some.columns, some.itertuples(index=False)) + "\n")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
