"""FLOPs: the closed formula against torch's counter, on the pocket model, for every reducer there is."""

from __future__ import annotations

import pytest
import torch
from torch.utils import flop_counter

import vtc
from vtc.engine.patch import usable
from vtc.errors import VtcError
from vtc.eval import flops
from vtc.eval.speed import kv_cache_bytes
from vtc.families import family_of
from vtc.pocket import encode_questions, scene_questions
from vtc.stats import Clock


@pytest.fixture(scope="module")
def pocket():
    torch.set_num_threads(1)
    model, processor = vtc.load_pocket()
    questions = scene_questions("test", 3)
    return model, encode_questions(processor, questions[:1], 1)[0].inputs, encode_questions(processor, questions, 3)[0].inputs


def counted(pocket, reducer=None, **options):
    model, inputs, _ = pocket
    if reducer is None:
        return flops.count(model, inputs, None)
    with vtc.patch(model, reducer, **options) as handle:
        return flops.count(model, inputs, handle)


def test_the_formula_is_what_one_can_work_out_by_hand(pocket):
    """Width 128, MLP 352 and 512, 4 heads of 32, 96 words; one token more or less is visible."""
    model = pocket[0]
    tokens = flops.Tokens(patches=10, tower=[11], projector=10, decoder=[7, 3])
    found = flops.closed_form(model, tokens)
    vision = model.config.vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.patch_size) == (128, 512, 8)
    assert found.tower == 2 * 10 * 128 * 192 + 11 * 2 * 128 * 128 * 4 + 11 * 11 * 4 * 128 + 11 * 2 * 2 * 128 * 512
    assert found.projector == 10 * 2 * 2 * 128 * 128
    assert found.decoder == sum(n * 2 * 4 * 128 * 128 + n * n * 4 * 128 + n * 2 * 3 * 128 * 352 for n in (7, 3))
    assert found.head == 2 * 128 * 96
    assert found.total == found.tower + found.projector + found.decoder + found.head


def test_grouped_heads_make_smaller_key_and_value_projections(pocket):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, head_dim=8
    )
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(hidden_size=36, patch_size=4))
    model = torch.nn.Module()
    model.config = config
    found = flops.closed_form(model, flops.Tokens(decoder=[5]))
    assert found.decoder == 5 * 2 * 64 * 8 * (4 + 2 + 2 + 4) + 25 * 4 * 4 * 8 + 5 * 2 * 3 * 64 * 96
    config.vision_config.model_type = "pixtral"
    with pytest.raises(VtcError, match="pixtral"):
        flops.closed_form(model, flops.Tokens())


def test_both_ways_agree_unreduced(pocket):
    found = counted(pocket)
    assert found.mismatch < 1e-4  # some transformers releases write RoPE's angles as a matrix product
    for part in ("tower", "projector", "head"):
        assert getattr(found.counted, part) == getattr(found.formula, part)
    text = pocket[1]["input_ids"].shape[1]
    assert found.tokens == flops.Tokens(196, [197] * 5, 196, [text] * 6, [197] * 5)


@pytest.mark.parametrize("keep", [98, 22])
@pytest.mark.parametrize("name", vtc.list_reducers())
def test_both_ways_agree_for_every_reducer(pocket, name, keep):
    if name not in usable(family_of(pocket[0]).facts):
        with pytest.raises(VtcError):
            counted(pocket, name, keep=keep)
        return
    found = counted(pocket, name, keep=keep)
    full = counted(pocket)
    assert found.mismatch <= 0.001 < flops.TOLERANCE
    assert found.counted.reducer >= 0
    assert found.counted.model < full.counted.model
    # the counter looked at what ran, the formula at what the statistics say: both saw the same shorter layers
    if name == "skipspan":  # its tokens come back after the span of tower layers they skip
        assert found.tokens.decoder == full.tokens.decoder and found.counted.tower < full.counted.tower
    else:
        assert found.counted.decoder < full.counted.decoder
        assert found.tokens.decoder[-1] <= full.tokens.decoder[-1] - (196 - keep)
    assert kv_cache_bytes(found.cache) == sum(found.tokens.decoder) * 2 * 128 * 4


def test_a_wrong_token_count_is_noticed(pocket):
    model = pocket[0]
    found = counted(pocket, "random", keep=49)
    tokens = flops.Tokens(196, [197] * 5, 196, [n + 40 for n in found.tokens.decoder])
    wrong = flops.Count(found.counted, flops.closed_form(model, tokens), tokens, None)
    assert wrong.mismatch > flops.TOLERANCE


def test_the_tower_is_cheaper_only_for_reducers_in_it(pocket):
    full, boundary, image = counted(pocket), counted(pocket, "random", keep=49), counted(pocket, "downsample", keep=49)
    assert boundary.counted.tower == full.counted.tower
    assert image.counted.tower < 0.3 * full.counted.tower and image.tokens.tower == [50] * 5 and image.tokens.patches == 49


def test_a_reducers_own_products_are_set_apart(pocket):
    """DivPrune compares every pick with 196 tokens of width 128; fastv scores one row of 4 heads."""
    assert counted(pocket, "divprune", keep=49).counted.reducer >= 2 * 48 * 196 * 128
    assert counted(pocket, "uniform", keep=49).counted.reducer == 0
    text = pocket[1]["input_ids"].shape[1]
    assert counted(pocket, "fastv", keep=49, layer=2).counted.reducer == 2 * text * 128


def test_eager_attention_counts_the_same(pocket):
    eager, _ = vtc.load_pocket(attn_implementation="eager")
    assert flops.count(eager, pocket[1], None).counted == counted(pocket).counted
    with vtc.patch(eager, "fastv", keep=49) as handle:
        assert flops.count(eager, pocket[1], handle).counted == counted(pocket, "fastv", keep=49).counted


def test_looking_ahead_costs_the_reducer_not_the_model(pocket):
    """PyramidDrop computes q, k, v of a layer before it cuts: three products of 128 x 128 for every token there."""
    found = counted(pocket, "pyramiddrop", keep=49)
    layers = found.tokens.decoder
    assert found.counted.reducer >= sum(layers[i] * 3 * 2 * 128 * 128 for i in range(3) if layers[i + 1] < layers[i])


def test_torch_releases_without_a_formula_for_cpu_attention_count_it_too(pocket, monkeypatch):
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    expected = counted(pocket).counted
    if op in flop_counter.flop_registry:
        monkeypatch.delitem(flop_counter.flop_registry, op)
    assert op not in flop_counter.flop_registry
    assert counted(pocket).counted == expected


def test_one_prompt_at_a_time(pocket):
    with pytest.raises(VtcError, match="batch of one"):
        flops.count(pocket[0], pocket[2], None)


def test_counting_leaves_no_hook_behind(pocket):
    """Transformers keeps hooks of its own on the tower's layers from the first call on; ours are gone."""

    def hooks():
        return [(*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in pocket[0].modules()]

    counted(pocket)
    before = hooks()
    counted(pocket, "fastv", keep=49)
    assert hooks() == before and not Clock.observers
