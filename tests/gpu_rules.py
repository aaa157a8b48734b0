"""On a GPU that is pretended (see :mod:`pretend_gpu`): every reducer gives what it gives on the CPU, mixes no devices, and waits
for the GPU only where its number of tokens depends on what the GPU finds.

`test_gpu_rules.py` runs this file in a process of its own.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch
from cases import CASES
from models import build, make_inputs
from plain_timm import timm
from pretend_gpu import CUDA, OnGPU, PretendGPU, move
from torch import Tensor, nn

import vtc
from vtc.core import Layout, Selection, Signals, all_finite, settle
from vtc.errors import InvalidSignalError
from vtc.kernels import topk_sorted
from vtc.views import each_view

FAMILIES = ("llava", "llava_next")
ANSWERING = ("divprune", "visionzip", "tome", "flowcut", "pyramiddrop")
"""Reducers that are to generate: of every stage, cutting and merging."""

FIRST = {"placeholders", "real_tokens", "fingerprints", "describe", "resize"}
"""Looks at ids, padding, picture sizes and pixels before the tower has begun: the GPU has nothing to do yet."""
LAST = "settle"
"""The look at whether all signals were finite, behind the last layer."""


@functools.cache
def models(family: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Return a model on the CPU, the same on the pretended GPU, and inputs: two rows, one image each."""
    host = build(family, dtype=torch.float32)
    inputs = make_inputs(family, host, images=[1, 1])
    with PretendGPU():
        return host, move(copy.deepcopy(host)), inputs


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], name: str) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and the slots kept of every image."""
    with vtc.patch(model, name, **CASES[name].mild) as handle:
        logits = model(**inputs).logits
        return logits, [it.entries for it in handle.stats.kept]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_what_the_cpu_gives(name: str, family: str) -> None:
    """The same tokens stay, the logits are the same, and no operation is given tensors of both devices."""
    host, there, inputs = models(family)
    want, slots = run(host, inputs, name)
    with PretendGPU():
        got, kept = run(there, {k: v.to("cuda") for k, v in inputs.items()}, name)
        assert isinstance(got, OnGPU)
        assert [k.tolist() for k in kept] == [s.tolist() for s in slots]
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def waits(there: nn.Module, inputs: dict[str, Tensor], name: str) -> Counter[str]:
    """Return the functions in which a forward waits for the GPU, and how often. The forward before it filled the caches."""
    with PretendGPU() as gpu, vtc.patch(there, name, **CASES[name].mild):
        given = {k: v.to("cuda") for k, v in inputs.items()}
        there(**given)
        gpu.syncs.clear()
        there(**given)
        found: Counter[str] = Counter()
        for place, times in gpu.syncs.items():  # "file:line function (what)"
            found[place.split()[1]] += times
        return found


@pytest.mark.parametrize("name", CASES)
def test_who_waits(name: str) -> None:
    """A batch whose images keep equally many tokens is read before the tower and behind the last layer, and not in between."""
    between: set[str] = set()
    for family in FAMILIES:
        _, there, inputs = models(family)
        found = waits(there, inputs, name)
        assert found[LAST] <= 1 and all(found[f] <= 1 for f in FIRST), found
        between |= set(found) - FIRST - {LAST}
    assert between == set(CASES[name].waits)


@pytest.mark.parametrize("name", ANSWERING)
def test_answers(name: str) -> None:
    """Decoding on caches of different lengths gives the same tokens."""
    host, there, inputs = models("llava_next")
    with vtc.patch(host, name, **CASES[name].mild):
        want = host.generate(**inputs, max_new_tokens=3, do_sample=False)
    with PretendGPU(), vtc.patch(there, name, **CASES[name].mild):
        got = there.generate(**{k: v.to("cuda") for k, v in inputs.items()}, max_new_tokens=3, do_sample=False)
        assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", ["flowcut", "skipspan", "tokenpooling", "tome"])
@torch.no_grad()
def test_a_vision_transformer(name: str) -> None:
    """Without a language model, too; NaN are told at the end of its forward."""
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with vtc.patch(host, name, keep=8):
        want = host(pixels)
    with PretendGPU():
        there = move(copy.deepcopy(host))
        with vtc.patch(there, name, keep=8):
            torch.testing.assert_close(there(pixels.to("cuda")).cpu(), want)
            with pytest.raises(InvalidSignalError, match="NaN or infinite"):
                there(pixels.to("cuda") * float("nan"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["visionzip", "flowcut", "divprune", "fastv"])
def test_a_broken_tower_is_told(name: str, family: str) -> None:
    """What is not finite is told although nobody waited for it: by a forward, by ``generate``, and by the tower alone."""
    _, there, inputs = models(family)
    with PretendGPU(), vtc.patch(there, name, **CASES[name].mild), torch.no_grad():
        given = {k: v.to("cuda") for k, v in inputs.items()}
        given["pixel_values"] = given["pixel_values"] * float("nan")
        with pytest.raises(InvalidSignalError, match="NaN or infinite"):
            there(**given)
        with pytest.raises(InvalidSignalError, match="NaN or infinite"):
            there.generate(**given, max_new_tokens=1)
        if name in ("visionzip", "flowcut"):
            given = {k: v for k, v in given.items() if k in ("pixel_values", "image_sizes")}
            with pytest.raises(InvalidSignalError, match="NaN or infinite"):
                there.model.get_image_features(**given)


@pytest.mark.parametrize("name", ["aim", "gridpool"])
def test_what_is_kept_serves_training(name: str) -> None:
    """Index tensors made in inference mode, and kept for later calls, do not stand in the way of gradients."""
    model, _, inputs = models("llava_next")
    model = copy.deepcopy(model)
    with vtc.patch(model, name, **CASES[name].mild):
        with torch.inference_mode():
            model(**inputs)
        model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


def test_rules() -> None:
    """The pretended GPU itself: tensors of both devices raise, and looking at values is counted where vtc does it."""
    with PretendGPU() as gpu:
        here = torch.ones(4)
        there = here.to("cuda")
        assert there.device == CUDA and (there + 1).device == CUDA and (there * here.sum()).device == CUDA
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + here
        with pytest.raises(RuntimeError, match="topk_sorted"):
            topk_sorted([here[None], there[None]], 2)
        assert there.sum().item() == 4 and not gpu.syncs  # nobody's code but this test's
        chosen = topk_sorted(torch.rand(2, 8, device="cuda"), 3)
        assert chosen.shape == (2, 3) and not gpu.syncs
        settle([("a signal", all_finite(there))] * 2)
        assert sum(gpu.syncs.values()) == 1 and "settle" in next(iter(gpu.syncs))
        settle([("a signal", all_finite(there)), ("one of another device", all_finite(here))])


@pytest.mark.parametrize("some", [False, True], ids=["whole", "some"])
def test_views(some: bool) -> None:
    """Views are told apart without a wait while all entries of a layout are there, and with one where some are missing."""
    layout = Layout.grid(4, 4)
    with PretendGPU() as gpu:
        entries = torch.arange(16)[: 12 if some else 16].expand(2, -1).to("cuda")
        features = torch.rand(*entries.shape, 3).to("cuda")
        chosen = each_view(
            Signals(features, layout, entries, 5, 16), lambda s: Selection(topk_sorted(s.features[..., 0], s.budget))
        )
        want = topk_sorted(features[..., 0].cpu(), 5)
        assert sum(gpu.syncs.values()) == some
        assert chosen.index.tolist() == want.tolist()
