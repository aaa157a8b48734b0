"""Models spread over ranks: a reducer is right, or refused in one sentence; real processes (gloo), the pocket model."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from typing import Any

import pytest
import rank_jobs as jobs
import ranks
import torch
import transformers
from models import build, make_inputs, where
from pickers import BoundaryPicker
from rank_jobs import KEEP, Passing, Ran, alone, call, rows, unspread
from torch import Tensor, nn

import vtc
from vtc.engine import parallel
from vtc.engine.patch import handle_of
from vtc.errors import UnsupportedFeatureError

TEXT_READERS = ("aim", "corematching", "dart", "fastv", "framefusion", "holitom", "ptp", "pyramiddrop", "sparsevlm", "todre")
TEXT_READERS += ("transprune",)
"""Reducers that read attention, keys or neurons of decoder layers."""
# the CLIP of 4.57 takes all heads for its own: it cannot be split, patched or not
SPLITS_TOWERS = int(transformers.__version__.split(".")[0]) >= 5
TOWER_READERS = (
    "fastervlm",
    "fastvid",
    "flowcut",
    "globalcom2",
    "hiprune",
    "prumerge",
    "prumerge_plus",
    "skipspan",
    "tokencorr",
)
TOWER_READERS += ("tokenpooling", "tome", "visionzip", "vispruner", "zooprune")
"""Reducers that read attention of the vision tower, or the projector, and nothing of decoder layers."""
SPLIT = "whose weights are split over ranks"


# -------------------------------------------------------------------------------------------------------- the harness
def test_a_run_that_hangs_is_killed():
    ranks.run(jobs.rank_of, ranks=2)  # the server is up
    with pytest.raises(ranks.RankError, match=r"ranks \[(0, )?1\] of 2 did not end in time"):
        ranks.run(jobs.hanging, limit=4)
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("rank")]


def test_a_rank_that_raises_ends_the_run():
    with pytest.raises(ranks.RankError, match="(?s)rank 1:.*on purpose"):
        ranks.run(jobs.failing)


def test_ranks_know_their_place():
    assert ranks.run(jobs.rank_of, ranks=4) == [(r, 4) for r in range(4)]


# ------------------------------------------------------------------------------------------------- tensor parallelism
def check_refusal(got: Any, name: str, what: str, works: tuple[str, ...] = ()) -> None:
    """One sentence that names what would work, among it ``works`` and of the other readers of decoder layers nothing else."""
    kind, message = got
    assert kind == "UnsupportedFeatureError", message
    assert f"'{name}' reads {what}" in message and SPLIT in message and "load the model whole" in message
    others = message.partition("use one of ")[2].split(", ")
    assert "divprune" in others and set(TEXT_READERS) & set(others) == set(works), others


def test_every_reducer_under_tensor_parallelism():
    """Those that read the decoder are refused; all others keep, on every rank, what a single process keeps."""
    found = ranks.run(jobs.spread_by_transformers)
    for name in vtc.list_reducers():
        for got in (rank[name] for rank in found):
            if name in TEXT_READERS:
                check_refusal(got, name, "the neurons of" if name == "corematching" else "the attention of decoder layer")
            else:
                assert isinstance(got, Ran), f"{name}: {got}"
                assert got.same(unspread(name)), name


@where(SPLITS_TOWERS)
def test_every_reducer_where_tower_and_projector_are_split_too():
    found = ranks.run(jobs.spread_with_tower)
    for name in vtc.list_reducers():
        for got in (rank[name] for rank in found):
            if name in (*TEXT_READERS, *TOWER_READERS):
                assert got[0] == "UnsupportedFeatureError" and SPLIT in got[1] and f"'{name}' reads the " in got[1], name
                others = got[1].partition("use one of ")[2].split(", ")
                assert {"divprune", "cdpruner", "downsample"} <= set(others) and not set(TOWER_READERS) & set(others)
            else:
                assert isinstance(got, Ran), f"{name}: {got}"
                assert got.same(unspread(name)), name


def test_embeddings_and_generation_under_tensor_parallelism():
    (one, written), other = ranks.run(jobs.spread_embeddings)
    assert [one, written] == [one, other[1]] and one.same(other[0])
    assert one.same(call(alone(), "divprune", rows(0, 2), keep=KEEP))
    with vtc.patch(alone(), "divprune", keep=KEEP), torch.no_grad():
        want = alone().generate(**rows(0, 2), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert written == want[:, -6:].tolist()


@where(SPLITS_TOWERS)
def test_a_model_sharded_after_it_was_patched_is_refused_when_called():
    reads = {
        "fastv": "the attention of decoder layer 1",
        "pyramiddrop": "the attention of decoder layer 2",
        "corematching": "the neurons of decoder layer 0",
        "visionzip": "the attention of tower layer 3",
        "tome": "the attention of tower layer 0",
        "zooprune": "the projector",
    }
    with torch.no_grad():
        want = alone()(**rows(0)).logits[:, -1]
    for found in ranks.run(jobs.sharded_later):
        for name, got, after in zip(reads, found[::2], found[1::2], strict=False):
            check_refusal(got, name, reads[name])
            assert torch.allclose(after.logits, want, atol=2e-5)
        assert found[-2].same(call(alone(), "divprune", rows(0), keep=KEEP))


def test_slices_that_are_plain_tensors_are_seen():
    for found in ranks.run(jobs.slices_without_dtensor):
        check_refusal(found[0], "fastv", "the attention of decoder layer 1", works=("corematching",))  # MLPs are whole
        check_refusal(found[2], "fastv", "the attention of decoder layer 1")
        assert all(isinstance(got, Ran) and got.same(unspread("divprune")) for got in found[1::2])


# -------------------------------------------------------------------------------------------------------- agreement
def test_ranks_that_keep_other_tokens_raise_on_every_rank():
    first, second = ranks.run(jobs.ranks_apart)
    for found in (first, second):
        assert len(found) == 7
        for kind, message in found[:-1]:
            assert kind == "NotReducedError" and "kept different visual tokens" in message
        assert found[-1].same(unspread("divprune"))


def test_ranks_compare_once_per_prefill_and_only_where_a_model_is_shared():
    assert ranks.run(jobs.collectives_spread) == [[1, 1, 0]] * 2
    assert ranks.run(jobs.collectives_of_data) == [[0, 0, 0]] * 2


def test_nothing_is_compared_in_a_single_process(monkeypatch):
    monkeypatch.setattr(parallel, "Peers", None)
    monkeypatch.setattr(parallel, "groups_of", None)
    assert unspread.__wrapped__("fastv").kept == unspread("fastv").kept


@pytest.mark.parametrize("change", [lambda e: e.flip(0), lambda e: e + 1, lambda e: e[:-1], lambda e: e.roll(1)])
def test_the_number_compared_tells_choices_apart(change):
    @dataclass
    class One:
        entries: Tensor
        merges: tuple = ()

    def mark(*images: Tensor) -> int:
        peers = parallel.Peers()
        peers.note([One(i) for i in images])
        return int(peers._mark)

    a, b = torch.arange(0, 60, 3), torch.arange(40)
    assert mark(a, b) == mark(a.clone(), b.clone()) != mark(b, a)
    assert mark(a, b) != mark(change(a), b) and mark(a, b) != mark(a, change(b))


# ---------------------------------------------------------------------------------------------------- data parallelism
def test_fsdp2_and_ddp_are_right_with_other_prompts_on_every_rank():
    names = jobs.DATA
    for found, mine in zip(ranks.run(jobs.data_parallel), (rows(1), rows(0, 2)), strict=True):
        wanted = {name: call(alone(), name, mine, keep=KEEP) for name in names}
        for name, got in zip((*names, *names, "fastv"), found, strict=True):
            assert got.same(wanted[name]), name


def test_fsdp2_over_tensor_parallelism():
    for half_, early, right, tower, late, apart in ranks.run(jobs.both, ranks=4):
        mine = rows(half_, 2)
        check_refusal(early, "fastv", "the attention of decoder layer 1")
        check_refusal(late, "fastv", "the attention of decoder layer 1")
        assert right.same(call(alone(), "divprune", mine, keep=KEEP))
        assert tower.same(call(alone(), "visionzip", mine, keep=KEEP))
        assert isinstance(apart, Ran) and apart.kept[0] == list(range(half_, half_ + KEEP))


def test_data_parallel_is_refused():
    model = build("llava")
    for wrapped in (nn.DataParallel(model), nn.Sequential(nn.DataParallel(model.model.vision_tower))):
        with pytest.raises(UnsupportedFeatureError, match=r"nn\.DataParallel .* use nn\.parallel\.DistributedDataParallel"):
            vtc.patch(wrapped, "divprune", keep=0.5)
    assert handle_of(model) is None
    handle = vtc.patch(model, "divprune", keep=0.5)  # wrapped afterwards: it comes off through the wrapper
    wrapped = nn.DataParallel(model)
    assert vtc.unpatch(wrapped) is wrapped and not handle.active


def replica(model: nn.Module) -> nn.Module:
    """A copy as torch.nn.parallel.replicate makes them: modules of their own, hooks and instance attributes shared."""
    copies = {id(m): m._replicate_for_data_parallel() for m in model.modules()}
    for module in model.modules():
        copy = copies[id(module)]
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else copies[id(child)]
        for name, weight in module._parameters.items():
            if weight is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, weight.detach().clone())
    return copies[id(model)]


def test_replicas_of_a_patched_model_are_refused_when_called():
    model = build("llava")
    inputs = make_inputs("llava", model)
    with torch.no_grad():
        want = replica(model)(**inputs).logits
        assert torch.equal(want, model(**inputs).logits)
        with vtc.patch(model, BoundaryPicker(keep=0.5)):
            with pytest.raises(UnsupportedFeatureError, match=r"copies of the model .*DistributedDataParallel"):
                replica(model)(**inputs)
            assert not torch.equal(model(**inputs).logits, want)


def test_replicas_of_a_vision_transformer_are_refused_when_called():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, num_classes=3).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with vtc.patch(model, "tome", keep=0.5), torch.no_grad():
        with pytest.raises(UnsupportedFeatureError, match="copies of the model"):
            replica(model)(pixels)
        model(pixels)


# ------------------------------------------------------------------------------------------ pipelines and sequences
def test_parts_of_layers_and_sequences_are_refused():
    for found in ranks.run(jobs.parts_of_it):
        missing, replaced, ids, states = (message for kind, message in found if kind == "UnsupportedFeatureError")
        assert "3 of its 6 decoder layers on this rank (pipeline parallelism)" in missing
        assert "3 of its 6 decoder layers on this rank (pipeline parallelism)" in replaced
        assert "the prompt has 200 tokens where its attention mask has 208: sequence and context parallelism" in ids
        assert "decoder layer 0 is given 104 of 208 tokens: sequence and context parallelism" in states


@pytest.mark.parametrize("absent", [Passing(), None])
def test_layers_of_other_stages_are_seen_without_ranks(absent):
    model = build("llava")
    model.model.language_model.layers[2] = absent
    with pytest.raises(UnsupportedFeatureError, match="only some of its decoder layers on this rank"):
        vtc.patch(model, "divprune", keep=0.5)
    assert handle_of(model) is None
