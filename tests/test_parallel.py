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
from rank_jobs import KEEP, WORDS, Passing, Ran, alone, call, readers, rows, unspread
from torch import Tensor, nn

import vtc
from vtc.engine import parallel
from vtc.engine.patch import handle_of
from vtc.errors import UnsupportedFeatureError

# the CLIP of 4.57 takes all heads for its own: it cannot be split, patched or not
SPLITS_TOWERS = int(transformers.__version__.split(".")[0]) >= 5
SHAPES = ("llava_next", "qwen2_5_vl", "internvl", "gemma3")
"""Tiny models with grouped keys (four query heads, two key heads), AnyRes crops, packed towers, tiles, windows."""
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
    assert "divprune" in others and name not in others and set(readers()) & set(others) == set(works), others


@pytest.mark.parametrize("job", [jobs.spread_by_transformers, *([jobs.spread_with_tower] if SPLITS_TOWERS else [])])
def test_every_reducer_under_tensor_parallelism(job):
    """On every rank what a single process keeps, and what it writes; whether tower and projector are split or not."""
    found = ranks.run(job)
    for name in vtc.list_reducers():
        for got in (rank[name] for rank in found):
            assert isinstance(got, Ran), f"{name}: {got}"
            assert got.same(unspread(name, WORDS)), name


@pytest.mark.parametrize(("size", "heads", "families"), [(2, 4, SHAPES), (4, 8, SHAPES[1:3])])
def test_reducers_that_read_the_decoder_on_other_families(size, heads, families):
    """Grouped keys, crops, packed towers, tiles and windows; float64, so that every choice is the single process's."""
    found = ranks.run(jobs.families_spread, families, heads, ranks=size)
    for name in families:
        wanted = jobs.tried(jobs.tiny(name, heads), name)
        for reducer, want in wanted.items():
            for rank in found:
                got = rank[name][reducer]
                assert (type(got) is type(want) is tuple) or got.same(want, atol=1e-8), (name, reducer, got)
        assert sum(isinstance(want, Ran) for want in wanted.values()) > 6, name


def test_more_ranks_than_key_heads_are_refused():
    for found in ranks.run(jobs.few_key_heads):
        check_refusal(found, "fastv", "the attention of decoder layer 1", works=("corematching",))


def test_decoding_on_some_neurons_needs_whole_mlps():
    want = call(alone(), "corematching", keep=KEEP, neurons=0.4, words=WORDS)
    for split, whole in ranks.run(jobs.neurons_split):
        check_refusal(split, "corematching", "the neurons of decoder layer 0", works=tuple(set(readers()) - {"corematching"}))
        assert whole.same(want)


def test_ranks_with_other_prompts_are_told_so():
    for (got,) in ranks.run(jobs.other_prompts):
        assert got[0] == "NotReducedError" and "give all of them the same inputs" in got[1]


def test_embeddings_and_generation_under_tensor_parallelism():
    (one, written), other = ranks.run(jobs.spread_embeddings)
    assert [one, written] == [one, other[1]] and one.same(other[0])
    assert one.same(call(alone(), "divprune", rows(0, 2), keep=KEEP))
    with vtc.patch(alone(), "divprune", keep=KEEP), torch.no_grad():
        want = alone().generate(**rows(0, 2), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert written == want[:, -6:].tolist()


@where(SPLITS_TOWERS)
def test_a_model_sharded_after_it_was_patched():
    with torch.no_grad():
        want = alone()(**rows(0)).logits[:, -1]
    for found in ranks.run(jobs.sharded_later):
        for name, got, after in zip(jobs.LATER, found[::2], found[1::2], strict=True):
            assert isinstance(got, Ran) and got.same(call(alone(), name, rows(0), keep=KEEP)), (name, got)
            assert torch.allclose(after.logits, want, atol=2e-5)


def test_slices_that_are_plain_tensors_are_seen():
    for found in ranks.run(jobs.slices_without_dtensor):
        check_refusal(found[0], "fastv", "the attention of decoder layer 1", works=("corematching",))  # MLPs are whole
        check_refusal(found[2], "fastv", "the attention of decoder layer 1")
        assert all(isinstance(got, Ran) and got.same(unspread("divprune")) for got in found[1::2])


# -------------------------------------------------------------------------------------------------------- agreement
def test_ranks_that_keep_other_tokens_raise_on_every_rank():
    for found in ranks.run(jobs.ranks_apart):
        assert len(found) == 7
        for kind, message in found[:4]:
            assert kind == "NotReducedError" and "kept different visual tokens" in message
        for got in found[4:6]:  # inside the decoder the first rank's choice is everybody's
            assert isinstance(got, Ran) and got.kept[0] == list(range(KEEP)), got
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


def test_fsdp2_computes_in_bfloat16():
    """Two ranks as one: the context of a call is no dataclass, which FSDP2 would take apart for every layer."""
    (single,) = ranks.run(jobs.half_precision, ranks=1)
    for found in ranks.run(jobs.half_precision):
        for name, after, (before, layers), want, (_, wanted) in zip(
            jobs.DATA, found[::2], found[1::2], single[::2], single[1::2], strict=True
        ):
            assert isinstance(after, Ran) and after.same(want, atol=0.0) and before.same(want, atol=0.0), name
            assert layers == wanted and all(len(image) == 6 for image in layers), name


def test_fsdp2_of_attention_modules_alone_with_eager_attention():
    model = jobs.whole()
    model.set_attn_implementation("eager")
    for found in ranks.run(jobs.attention_alone):
        for name, got in zip(("fastv", "visionzip"), found, strict=True):
            assert got.same(call(model, name, rows(0, 2), keep=KEEP)), name


def test_training_on_two_ranks_is_training_on_one():
    """Losses and gradients of five steps, against one process with the lessons of both."""
    wanted = {name: jobs.train(jobs.whole(), slice(0, 4), name) for name in jobs.TRAINED}
    for found in ranks.run(jobs.trained):
        assert len(found) == 3 * len(jobs.TRAINED)
        for how, (losses, norms) in found.items():
            want_losses, want_norms = wanted[how.partition(",")[0]]
            assert losses == pytest.approx(want_losses, rel=1e-4) and norms == pytest.approx(want_norms, rel=1e-3), how
            assert losses[-1] < losses[0]


def test_fsdp2_over_tensor_parallelism():
    for half_, early, right, tower, late, apart in ranks.run(jobs.both, ranks=4):
        mine = rows(half_, 2)
        assert early.same(call(alone(), "fastv", mine, keep=KEEP))
        assert late.same(Ran(early.kept, early.logits))
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
