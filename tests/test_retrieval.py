"""Multi-vector retrievers: pooled document vectors, as a function and inside the model; scores against the unpooled ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vtc
from vtc.errors import InvalidSignalError, UnsupportedFeatureError

KINDS = [
    k for k in ("colpali", "colqwen2") if hasattr(transformers, {"colpali": "ColPaliConfig", "colqwen2": "ColQwen2Config"}[k])
]
IMAGE = 90


@functools.cache
def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    text: dict[str, Any] = dict(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    if kind == "colpali":
        vision = dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
        )
        vlm = transformers.PaliGemmaConfig(
            text_config=dict(text, model_type="gemma"),
            vision_config=dict(vision, model_type="siglip_vision_model", projection_dim=16),
            image_token_index=IMAGE,
            projection_dim=16,
            hidden_size=16,
        )
        model = transformers.ColPaliForRetrieval(transformers.ColPaliConfig(vlm_config=vlm, embedding_dim=12))
    else:
        vision = dict(
            depth=1,
            embed_dim=16,
            hidden_size=16,
            num_heads=2,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            mlp_ratio=1,
        )
        text |= dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, model_type="qwen2_vl_text")
        vlm = transformers.Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=91,
            vision_start_token_id=92,
            vision_end_token_id=93,
        )
        model = transformers.ColQwen2ForRetrieval(transformers.ColQwen2Config(vlm_config=vlm, embedding_dim=12))
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.3)
    return model.double().eval()


def pages(kind: str) -> dict[str, Tensor]:
    """Two pages of one size, prompts of two lengths, left padded."""
    generator = torch.Generator().manual_seed(1)
    n = 16 if kind == "colpali" else 4
    ids = torch.tensor([[0, 0, *[IMAGE] * n, 5, 6], [7, 8, *[IMAGE] * n, 5, 6]])
    if kind == "colqwen2":
        ids = torch.tensor([[0, 92, *[IMAGE] * n, 93, 5, 6], [7, 92, *[IMAGE] * n, 93, 5, 6]])
    mask = (ids != 0).long()
    if kind == "colpali":
        pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)}
    else:
        pixels = {
            "pixel_values": torch.randn(2, 16, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        }
    return {"input_ids": ids, "attention_mask": mask, **pixels}


def queries() -> dict[str, Tensor]:
    ids = torch.tensor([[11, 12, 13], [14, 15, 16]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_inside_the_model(kind: str) -> None:
    model, inputs = build(kind), pages(kind)
    with torch.no_grad():
        plain, asked = model(**inputs).embeddings, model(**queries()).embeddings
        with vtc.patch(model, "hierpool", keep=1 / 3) as handle:
            pooled = model(**inputs).embeddings
            assert torch.equal(model(**queries()).embeddings, asked), "queries stay as they are"
        assert torch.equal(model(**inputs).embeddings, plain), "and the model is as it was"
    lengths = inputs["attention_mask"].sum(1).tolist()
    kept = [round(n / 3) for n in lengths]
    assert pooled.shape == (2, max(kept), 12)
    own = vtc.pool_vectors(plain, "hierpool", keep=1 / 3, mask=inputs["attention_mask"])
    for row, k in zip(pooled, kept, strict=True):
        assert (row.norm(dim=-1) > 0).tolist() == [False] * (max(kept) - k) + [True] * k, "padding on the side of the prompt's"
        torch.testing.assert_close(row[-k:].norm(dim=-1), torch.ones(k).double())
    for row, want in zip(pooled, own, strict=True):
        assert torch.equal(row[-len(want) :], want)
    page, query = handle.stats[0], handle.stats[1]
    assert [(i.slots, i.kept) for i in page.images] == list(zip(lengths, kept, strict=True))
    assert query.text_only


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_pooled_pages_stay_close(kind: str) -> None:
    model, inputs = build(kind), pages(kind)
    with torch.no_grad():
        plain, asked = model(**inputs).embeddings, model(**queries()).embeddings
    documents = [v[m.bool()] for v, m in zip(plain, inputs["attention_mask"], strict=True)]
    full = vtc.maxsim(asked, documents)
    worst = []
    for keep in (1.0, 0.75, 0.5, 0.2):
        pooled = vtc.pool_vectors(plain, keep=keep, mask=inputs["attention_mask"])
        worst.append(float((vtc.maxsim(asked, pooled) - full).abs().max()))
    assert worst[0] == 0.0
    assert worst[1] <= worst[3]
    assert worst[3] > 0


def test_maxsim_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    documents = [torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.0, 1.0]])]
    # first: best for (1, 0) is 1.0, for (0, 1) is 0.8; second: 0 and 1
    assert vtc.maxsim([query], documents).tolist() == [[pytest.approx(1.8), 1.0]]


def test_pooling_by_hand() -> None:
    angle = torch.tensor([0.0, 2.0, 88.0, 92.0, 180.0]) * torch.pi / 180
    vectors = torch.stack([angle.cos(), angle.sin()], -1)
    # three clusters: {0, 1}, {2, 3}, {4}; unit means point at 1, 90 and 180 degrees
    (pooled,) = vtc.pool_vectors([vectors], keep=3)
    want = torch.tensor([1.0, 90.0, 180.0]) * torch.pi / 180
    torch.testing.assert_close(pooled, torch.stack([want.cos(), want.sin()], -1), atol=1e-6, rtol=0)
    (plain,) = vtc.pool_vectors([vectors], keep=3, normalize=False)
    assert plain.norm(dim=-1)[0] < 1
    (same,) = vtc.pool_vectors([vectors], keep=9)
    assert same is vectors
    assert vtc.pool_vectors([vectors[:0]], keep=0.5)[0].shape == (0, 2)


@pytest.mark.parametrize("reducer", ["hierpool", "divprune", "uniform"])
@pytest.mark.parametrize("as_list", [False, True])
def test_rows_of_zeros_are_padding(reducer: str, as_list: bool) -> None:
    """Batches of retrievers are padded with zeros, on either side: with or without a mask the vectors that are there count."""
    real = nn.functional.normalize(torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    padded = torch.zeros(3, 15, 8)
    padded[0, 3:], padded[1, :12], padded[2, 1:8] = real[0], real[1], real[2, :7]
    want = vtc.pool_vectors([real[0], real[1], real[2, :7]], reducer, keep=0.5)
    mask = (padded != 0).any(-1)
    for options in ({}, {"mask": mask}, {"mask": torch.ones(3, 15)}):
        got = vtc.pool_vectors(list(padded) if as_list else padded, reducer, keep=0.5, **options)
        assert [len(v) for v in got] == [6, 6, 4]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert vtc.pool_vectors(torch.zeros(1, 4, 8), reducer, keep=0.5)[0].shape == (0, 8)


def test_a_document_without_vectors_has_no_score() -> None:
    documents = [torch.ones(2, 3), torch.ones(0, 3)]
    with pytest.raises(UnsupportedFeatureError, match="document 1 has no vectors"):
        vtc.maxsim(torch.ones(1, 2, 3), documents)
    assert vtc.maxsim([torch.ones(0, 3), torch.ones(1, 3)], documents[:1]).tolist() == [[0.0], [3.0]]
    assert vtc.maxsim(torch.ones(2, 1, 3), []).shape == (2, 0)


def test_the_release_rounds_down() -> None:
    vectors = nn.functional.normalize(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert len(vtc.pool_vectors([vectors], "hierpool", keep=1 / 3)[0]) == 11
    assert len(vtc.pool_vectors([vectors], "hierpool.factor3", official=True)[0]) == 10


@pytest.mark.parametrize("reducer", ["hierpool", "divprune", "uniform", "random", "zooprune"])
def test_other_reducers_of_vectors(reducer: str) -> None:
    vectors = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    if vtc.info(reducer).cls(keep=5).needs or vtc.info(reducer).cls.wants_fingerprint:
        with pytest.raises(UnsupportedFeatureError, match="needs more than a document's vectors"):
            vtc.pool_vectors(vectors, reducer, keep=5)
    else:
        assert [len(v) for v in vtc.pool_vectors(vectors, reducer, keep=5)] == [5, 5]


def test_bad_vectors_and_reducers() -> None:
    vectors = torch.randn(2, 20, 8)
    for reducer in ("fastv", "tome", "visionzip", "pyramiddrop", "todre"):
        with pytest.raises(UnsupportedFeatureError, match=f"'{reducer}' needs more than a document's vectors"):
            vtc.pool_vectors(vectors, reducer, keep=0.5)
    vectors[1, 3] = torch.nan
    with pytest.raises(InvalidSignalError, match="a document"):
        vtc.pool_vectors(vectors, keep=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_call_leaves_the_handle_idle(kind: str) -> None:
    model, inputs = build(kind), pages(kind)
    with vtc.patch(model, "hierpool", keep=0.5) as handle, torch.no_grad():
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever the model says of a missing prompt
            model(pixel_values=inputs["pixel_values"], input_ids=None, attention_mask=inputs["attention_mask"])
        handle.check_idle()
        assert model(**inputs).embeddings.shape[1] < inputs["input_ids"].shape[1]
