"""Small copies of real-size configurations keep what matters: kinds of layers, heads that rotations fit, special ids, geometry."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers as hf
from family_cases import CASES, TEXT, VISION
from models import where

from vtc.errors import UnverifiableError
from vtc.families import family_of
from vtc.families.base import Family
from vtc.verify.check import half
from vtc.verify.inputs import prompt_for
from vtc.verify.twin import LARGEST, WINDOW, build, divisor, levels, parameters, shrink, special_ids

NEWER = int(hf.__version__.split(".")[0]) >= 5


def qwen3_vl(**text: Any) -> Any:
    """Numbers as Qwen3-VL-4B has them."""
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}
    words = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8)
    words |= dict(head_dim=128, vocab_size=151936, rope_scaling=dict(rope), rope_parameters=dict(rope)) | text
    eyes = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560)
    eyes |= dict(deepstack_visual_indexes=[5, 11, 17], num_position_embeddings=2304, patch_size=16)
    return hf.Qwen3VLConfig(text_config=words, vision_config=eyes)


def gemma3() -> Any:
    """Numbers as Gemma 3 4B has them."""
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)]
    text = hf.Gemma3TextConfig(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        sliding_window=1024, layer_types=kinds, vocab_size=262208,
    )  # fmt: skip
    tower = hf.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=896, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    return hf.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=256, image_token_index=262144)


def mistral3() -> Any:
    return hf.Mistral3Config(
        image_token_index=10,
        text_config=hf.MistralConfig(
            hidden_size=5120, num_hidden_layers=40, head_dim=128, sliding_window=None, vocab_size=131072
        ),
        vision_config=hf.PixtralVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=1540),
    )


def vipllava() -> Any:
    return hf.VipLlavaConfig(vision_feature_layers=[-2, -5, -8, -11, 6])


def llava_next() -> Any:
    points = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return hf.LlavaNextConfig(image_grid_pinpoints=points, image_token_index=32000)


def qwen2_vl() -> Any:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    words = dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, vocab_size=151936)
    words |= dict(rope_scaling=dict(rope), rope_parameters=dict(rope))
    return hf.Qwen2VLConfig(text_config=words, vision_config=dict(hidden_size=1536, embed_dim=1280, depth=32, num_heads=16))


REAL = {
    "qwen3_vl": qwen3_vl,
    "qwen2_vl": qwen2_vl,
    "gemma3": gemma3,
    "mistral3": mistral3,
    "vipllava": vipllava,
    "llava_next": llava_next,
}


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_become_small_copies_that_run(name):
    config = REAL[name]()
    before = config.to_dict()
    twin = build(config)
    assert config.to_dict() == before, "the model's own configuration is left alone"
    family = family_of(twin.model)
    assert parameters(twin.model) < LARGEST and 4 <= family.facts.layers <= 8
    assert set(special_ids(config)) <= set(twin.special), "the same special ids"
    assert twin.model.get_input_embeddings().weight.shape[0] > max(twin.special)
    assert not set(twin.words) & set(twin.special)
    assert family.image_token_ids == ((config.image_token_id,) if hasattr(config, "image_token_id") else family.image_token_ids)
    prompt = prompt_for(twin, family, [1, 2])
    assert [row for row, _ in prompt.images] == [0, 1, 1]
    assert (prompt.call["attention_mask"] == 0).any(), "padded"
    assert all(torch.isin(prompt.call["input_ids"][r, c], torch.tensor(family.image_token_ids)).all() for r, c in prompt.images)


def test_deepstack_keeps_its_layers():
    small = shrink(qwen3_vl())
    eyes, words = small.vision_config, small.text_config
    assert len(eyes.deepstack_visual_indexes) == 3 and max(eyes.deepstack_visual_indexes) < eyes.depth <= 6
    assert words.num_hidden_layers >= 3 + 2
    assert eyes.out_hidden_size == words.hidden_size


def test_heads_keep_what_rotations_need():
    for config in (qwen3_vl(), qwen2_vl()):
        words = shrink(config).text_config
        rope = getattr(words, "rope_parameters", None) or words.rope_scaling
        each = getattr(words, "head_dim", None) or words.hidden_size // words.num_attention_heads
        assert sum(rope["mrope_section"]) == each // 2
        assert (
            words.num_attention_heads % words.num_key_value_heads == 0 and words.num_key_value_heads < words.num_attention_heads
        )
    old = qwen3_vl().text_config
    assert shrink(qwen3_vl(), whole_heads=True).text_config.head_dim == old.head_dim == 128


@pytest.mark.parametrize(
    ("sizes", "sections", "shares", "by"),
    [
        ([128], [], [], 16),
        ([128], [24, 20, 20], [], 4),
        ([128], [16, 24, 24], [], 8),
        ([128], [8, 12, 12], [0.5], 4),
        ([512, 256], [], [0.25], 16),
        ([72], [], [], 9),
        ([192, 128, 64], [], [], 8),
        ([20], [], [], 1),
        ([6], [], [], 1),
    ],
)
def test_divisor_of_heads(sizes, sections, shares, by):
    assert divisor(sizes, sections, shares) == by


def test_every_kind_of_layer_stays():
    small = shrink(gemma3())
    words = small.text_config
    assert (
        set(words.layer_types) == {"sliding_attention", "full_attention"} and len(words.layer_types) == words.num_hidden_layers
    )
    assert words.sliding_window == WINDOW
    assert small.vision_config.image_size // small.vision_config.patch_size == 16 and small.mm_tokens_per_image == 16


def test_features_of_several_tower_layers_stay_inside():
    small = shrink(vipllava())
    layers = small.vision_config.num_hidden_layers
    assert len(small.vision_feature_layers) == 5 and small.vision_feature_layers[0] == -2
    assert all(-layers - 1 <= i <= layers for i in small.vision_feature_layers)


def test_crops_follow_the_tower():
    small = shrink(llava_next())
    side = small.vision_config.image_size
    assert side == 4 * small.vision_config.patch_size
    assert small.image_grid_pinpoints == [[side * h, side * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def test_experts_stay_experts():
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20]}
    words = dict(
        num_experts=128, num_experts_per_tok=8, rope_scaling=dict(rope), rope_parameters=dict(rope), num_hidden_layers=48
    )
    small = shrink(hf.Qwen3VLMoeConfig(text_config=words | dict(vocab_size=151936)))
    assert small.text_config.num_experts == 4 and small.text_config.num_experts_per_tok == 2


@where(NEWER and hasattr(hf, "Gemma4Config"))
def test_layers_with_settings_of_their_own():
    """Layers that share keys and values, heads of another size in layers of one kind, inputs per layer: as in Gemma 4 E2B."""
    kinds = ["full_attention" if i % 5 == 4 else "sliding_attention" for i in range(35)]
    text = dict(hidden_size=1536, num_hidden_layers=35, layer_types=kinds, num_kv_shared_layers=20, num_attention_heads=8)
    text |= dict(num_key_value_heads=1, head_dim=256, global_head_dim=512, hidden_size_per_layer_input=256, sliding_window=512)
    small = shrink(hf.Gemma4Config(text_config=text)).text_config
    shared = small.num_kv_shared_layers
    mine, theirs = small.layer_types[: small.num_hidden_layers - shared], small.layer_types[-shared:]
    assert set(mine) == set(theirs) == set(kinds)
    sizes = {kind: small.per_layer_config[i].head_dim for i, kind in enumerate(small.layer_types)}
    assert sizes == {"sliding_attention": 8, "full_attention": 16} or sizes["full_attention"] == 2 * sizes["sliding_attention"]


@where(hasattr(hf, "Ministral3Config"))
def test_positions_that_scale_queries_matter():
    rope = dict(rope_type="yarn", factor=16.0, llama_4_scaling_beta=0.1, original_max_position_embeddings=16384, rope_theta=1e6)
    text = hf.Ministral3Config(rope_parameters=rope, num_hidden_layers=26)
    small = shrink(hf.Mistral3Config(text_config=text, image_token_index=10))
    assert small.text_config.rope_parameters["original_max_position_embeddings"] == WINDOW


def test_quantization_and_dtype_of_a_checkpoint_are_forgotten():
    config = CASES["llava"].make(TEXT, VISION, {})[1]
    config.quantization_config = {"quant_method": "fp8", "activation_scheme": "static"}
    twin = build(config)
    assert {p.dtype for p in twin.model.parameters()} == {torch.float64}


def test_two_twins_are_the_same():
    a, b = (build(CASES["llava"].make(TEXT, VISION, {})[1]).model.state_dict() for _ in range(2))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_model_that_stays_large_is_refused(monkeypatch):
    monkeypatch.setattr("vtc.verify.twin.LARGEST", 1000)
    with pytest.raises(UnverifiableError, match="million parameters: its configuration has no fields that make it smaller"):
        build(CASES["llava"].make(TEXT, VISION, {})[1])


def test_levels_and_special_ids():
    config = qwen3_vl()
    assert set(levels(config)) == {"", "text_config", "vision_config"}
    assert {config.image_token_id, config.video_token_id, config.vision_start_token_id} <= set(special_ids(config))


# --------------------------------------------------------------------------------------------------------------- inputs
def test_clips_are_written_as_the_model_reads_them():
    """Qwen3-VL wants a run of placeholders for every frame, Qwen2-VL one for a clip."""
    for config, runs in ((qwen3_vl(), 2), (qwen2_vl(), 1)):
        twin = build(config)
        prompt = prompt_for(twin, family_of(twin.model), [1], video=True)
        kinds = prompt.kinds[0].tolist()
        assert sum(a != b == 2 for a, b in zip([0, *kinds], kinds, strict=False)) == runs


def test_a_prompt_is_followed_by_text():
    config = CASES["gemma3"].make(TEXT, VISION, {})[1]
    twin = build(config)
    family = family_of(twin.model)
    assert isinstance(family, Family)
    prompt = prompt_for(twin, family, [1, 1])
    longer = prompt.followed_by(torch.full((2, 3), twin.words[0]))
    length = prompt.kinds.shape[1]
    assert all(longer[k].shape[1] == length + 3 for k in ("input_ids", "attention_mask", "token_type_ids"))
    assert not longer["token_type_ids"][:, length:].any() and longer["pixel_values"] is prompt.call["pixel_values"]


def test_features_that_are_not_at_the_placeholders_are_noticed():
    config = CASES["llava"].make(TEXT, VISION, {})[1]
    twin = build(config)
    family = family_of(twin.model)
    honest = family.base.get_image_features

    @functools.wraps(honest)
    def dishonest(*args: Any, **kwargs: Any) -> Any:
        out = copy.deepcopy(honest(*args, **kwargs))
        if calls.append(1) is None and len(calls) == 2:  # what the model itself takes is something else
            features = out.pooler_output if hasattr(out, "pooler_output") else out
            (features if isinstance(features, torch.Tensor) else features[0]).mul_(-1)
        return out

    calls: list[int] = []
    family.base.get_image_features = dishonest
    with pytest.raises(UnverifiableError, match="is not what stands at the placeholders"):
        prompt_for(twin, family, [1])


def test_half_is_robust_to_rounding():
    features = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = half(features)
    assert 17 <= len(kept) <= 20 and torch.equal(kept, kept.unique())
    for seed in range(20):
        noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.equal(half(features + 1e-6 * noise), kept)
    assert half(features[:1]).tolist() == [0] and len(half(features[:2])) == 1
