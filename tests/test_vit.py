"""Vision transformers of timm: token counts, equality with a plain loop, nothing left behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import shared as vlm
from plain_timm import timm
from torch import Tensor, nn

import vtc
from vtc.errors import BudgetError, UnknownArgumentError, UnsupportedFeatureError, UnsupportedModelError
from vtc.kernels import k_medoids
from vtc.reducers.tome import match, most

DEPTH = 5
KINDS = {
    "cls": {"class_token": True, "global_pool": "token"},
    "avg": {"class_token": False, "global_pool": "avg"},
    "norms": {"class_token": True, "global_pool": "avg", "qk_norm": True, "init_values": 0.5},
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def build(kind: str, **more: Any) -> nn.Module:
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(
        img_size=24, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3, num_classes=7, **{**KINDS[kind], **more}
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.3)
    return model.double().eval()


@functools.cache
def shared(kind: str) -> nn.Module:
    return build(kind)


def pictures(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def attend(block: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention branch of a block, its keys (mean over heads), and its maps."""
    a = block.attn
    batch, n, _ = x.shape
    q, k, v = a.qkv(block.norm1(x)).view(batch, n, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = a.q_norm(q), a.k_norm(k)
    logits = q @ k.transpose(-1, -2) * a.scale
    if size is not None:
        logits = logits + size.log()[:, None, None]
    maps = logits.softmax(-1)
    mixed = a.proj((maps @ v).transpose(1, 2).reshape(batch, n, -1))
    return block.drop_path1(block.ls1(mixed)), k.mean(1), maps


def finish(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_head(model.norm(x))


def finish_by_size(model: nn.Module, x: Tensor, size: Tensor) -> Tensor:
    """What :func:`finish` gives if every merged token is written down as often as it has patches."""
    head, x = model.num_prefix_tokens, model.norm(x)
    rows = [torch.cat([r[:head], r[head:].repeat_interleave(s[head:].long(), 0)]) for r, s in zip(x, size, strict=True)]
    return model.forward_head(torch.stack(rows))


def start(model: nn.Module, pixels: Tensor) -> Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))


def branch(block: nn.Module, x: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def plain_loop(model: nn.Module, pixels: Tensor, change: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """All blocks; ``change`` makes the input of block ``i`` of what it was and of the attention maps of the block before."""
    x, maps = start(model, pixels), torch.empty(0)
    for i, block in enumerate(model.blocks):
        x = change(i, x, maps)
        out, _, maps = attend(block, x, None)
        x = x + out
        x = x + branch(block, x)
    return finish(model, x)


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {"r": 5},
        {"r": 4, "inflect": -1.0},
        {"r": 60},
        {"r": 5, "proportional": False},
        {"r": 5, "size_pool": True},
        {"r": 60, "size_pool": True},
    ],
    ids=str,
)
def test_tome_equals_a_plain_loop(kind: str, options: dict[str, Any]) -> None:
    model, pixels = shared(kind), pictures()
    if options.get("size_pool") and model.global_pool != "avg":
        with pytest.raises(UnsupportedFeatureError, match="head takes none"):
            vtc.patch(model, "tome", **options)
        return
    head = model.num_prefix_tokens
    rates = (
        [int(2 * options["r"] * (1 - i / (DEPTH - 1))) for i in range(DEPTH)]
        if options.get("inflect")
        else [options["r"]] * DEPTH
    )
    lengths = []
    with torch.no_grad():
        x = start(model, pixels)
        size = torch.ones(x.shape[:2], dtype=x.dtype)
        for block, rate in zip(model.blocks, rates, strict=True):
            lengths.append(x.shape[1] - head)
            out, key, _ = attend(block, x, size if options.get("proportional", True) else None)
            x = x + out
            r = min(rate, most(lengths[-1]))
            if r:
                valid = torch.ones(3, lengths[-1], dtype=torch.bool)
                owner, left = match(key[:, head:].float(), valid, torch.full((3,), r), has_cls=bool(head))
                total = torch.zeros(3, int(left[0]), x.shape[2], dtype=x.dtype)
                weight = torch.zeros(3, int(left[0]), dtype=x.dtype)
                for b in range(3):
                    for n, o in enumerate(owner[b].tolist()):
                        total[b, o] += x[b, head + n] * size[b, head + n]
                        weight[b, o] += size[b, head + n]
                x = torch.cat([x[:, :head], total / weight[..., None]], 1)
                size = torch.cat([size[:, :head], weight], 1)
            x = x + branch(block, x)
        want = finish_by_size(model, x, size) if options.get("size_pool") else finish(model, x)
        with vtc.patch(model, "tome", **options) as handle:
            got = model(pixels)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
        assert not torch.allclose(got, model(pixels), atol=1e-3)
    for image in handle.stats.last.images:
        assert image.tokens_per_layer == lengths
        assert (image.slots, image.kept) == (36, x.shape[1] - head)
    for kept in handle.stats.kept:
        ((_, anchors, owner),) = kept.merges
        assert owner.unique().tolist() == list(range(len(anchors))), "every patch is in a token, every token has a patch"


@kinds
def test_skipspan_equals_a_plain_loop(kind: str) -> None:
    model, pixels = shared(kind), pictures()
    head = model.num_prefix_tokens
    left = []

    def skip(i: int, x: Tensor, maps: Tensor) -> Tensor:
        if i == 2:
            score = (maps[:, :, 0] if head else maps.mean(2)).mean(1)[:, head:]
            top = score.sort(dim=1, descending=True, stable=True).indices[:, :9].sort().values + head
            at = torch.cat([torch.arange(head).expand(3, -1), top], 1)[..., None].expand(-1, -1, x.shape[2])
            left[:] = x, at
            return x.gather(1, at)
        return left[0].scatter(1, left[1], x) if i == 4 else x

    with torch.no_grad():
        want = plain_loop(model, pixels, skip)
        with vtc.patch(model, "skipspan", keep=9, start=2, stop=4) as handle:
            torch.testing.assert_close(model(pixels), want, atol=1e-9, rtol=1e-9)
    assert [i.tokens_per_layer for i in handle.stats.last.images] == [[36, 36, 9, 9, 36]] * 3


@kinds
def test_token_pooling_equals_a_plain_loop(kind: str) -> None:
    model, pixels = shared(kind), pictures()
    head = model.num_prefix_tokens

    def pool(i: int, x: Tensor, maps: Tensor) -> Tensor:
        if i != 3:
            return x
        weight = maps.mean((1, 2))[:, head:]
        first = weight.sort(dim=1, descending=True, stable=True).indices[:, :8]
        chosen = k_medoids(x[:, head:], first, 5, weight=weight)[0].sort().values + head
        return torch.cat([x[:, :head], x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))], 1)

    with torch.no_grad():
        want = plain_loop(model, pixels, pool)
        with vtc.patch(model, "tokenpooling", keep=8, block=3) as handle:
            torch.testing.assert_close(model(pixels), want, atol=1e-6, rtol=1e-6)
        assert [i.tokens_per_layer for i in handle.stats.last.images] == [[36, 36, 36, 8, 8]] * 3
        with vtc.patch(model, "tokenpooling", keep=8, method="kmeans"):
            assert torch.isfinite(model(pixels)).all()


@kinds
@pytest.mark.parametrize("reducer", ["tome", "skipspan", "tokenpooling", "flowcut"])
def test_keeping_everything_changes_nothing_and_unpatching_leaves_nothing(kind: str, reducer: str) -> None:
    model, pixels = build(kind), pictures()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        want = model(pixels)
        with vtc.patch(model, reducer, keep=1.0):
            assert torch.equal(model(pixels), want)
            assert torch.equal(model.forward_features(pixels), vtc.unpatch(copy.deepcopy(model)).forward_features(pixels))
        handle = vtc.patch(model, reducer, keep=10)
        assert handle.active
        assert not torch.equal(model(pixels), want)
        twin = copy.deepcopy(model)
        vtc.unpatch(model)
        assert not handle.active
        assert torch.equal(model(pixels), want)
        assert not torch.equal(twin(pixels), want), "a copy keeps its patch"
        vtc.unpatch(twin)
        assert torch.equal(twin(pixels), want)
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("reducer", ["tome", "skipspan", "tokenpooling", "flowcut"])
def test_pictures_do_not_depend_on_each_other(reducer: str) -> None:
    model, pixels = shared("cls"), pictures(4)
    with torch.no_grad(), vtc.patch(model, reducer, keep=11):
        together = model(pixels)
        for i in range(4):
            torch.testing.assert_close(model(pixels[i : i + 1])[0], together[i], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prefix", [False, True])
def test_an_average_by_size_is_of_the_tokens_just_made(prefix: bool) -> None:
    """``size_pool``: features of the patched model in its own head; others are refused; with the class token where timm asks so."""
    model, pixels = build("norms", pool_include_prefix=prefix), pictures()
    with torch.no_grad():
        before, plain = model(pixels), {}
        for option in (False, True):
            with vtc.patch(model, "tome", r=4, size_pool=option):
                plain[option] = model(pixels)
                features = model.forward_features(pixels)
                assert torch.equal(model.forward_head(features), plain[option])
                if option:
                    with pytest.raises(UnsupportedFeatureError, match="forward_features"):
                        model.forward_head(features.clone())
                    with pytest.raises(UnsupportedFeatureError, match="forward_features"):
                        model.forward_features(pixels[:1])
                        model.forward_head(features)
        assert not torch.equal(plain[True], plain[False])
        with vtc.patch(model, "tome", keep=1.0, size_pool=True):
            assert torch.equal(model(pixels), before)
        assert torch.equal(model(pixels), before)
        twin = copy.deepcopy(model)
        vtc.patch(twin, "tome", r=4, size_pool=True)
        assert torch.equal(copy.deepcopy(twin)(pixels), plain[True])
    with pytest.raises(UnknownArgumentError, match="without language model only"):
        vtc.patch(vlm("llava"), "tome", keep=0.5, size_pool=True)


def test_training_reaches_every_patch() -> None:
    model, pixels = build("cls").train(), pictures(2).requires_grad_()
    with vtc.patch(model, "tome", r=6):
        model(pixels).sum().backward()
    assert (pixels.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)) > 0).all()
    model.set_grad_checkpointing(True)
    with vtc.patch(model, "tome", r=6), pytest.raises(UnsupportedFeatureError, match="set_grad_checkpointing"):
        model(pixels)


def test_a_model_from_the_zoo() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    with vtc.patch(model, "tome", r=8) as handle, torch.no_grad():
        assert model(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
    assert handle.stats.last.images[0].tokens_per_layer == [196 - 8 * i for i in range(12)]
    assert handle.stats.last.images[0].kept == 196 - 8 * 12


def test_refusals_say_what_to_do() -> None:
    model = shared("cls")
    for reducer in ("fastv", "divprune", "visionzip", "pyramiddrop", "downsample", ["tome", "fastv"]):
        with pytest.raises(
            (UnsupportedFeatureError, UnknownArgumentError), match=r"'tome', 'tokenpooling', 'skipspan' and 'flowcut' can"
        ):
            vtc.patch(model, reducer, keep=8)
    with pytest.raises(BudgetError, match="above the 36 visual tokens"):
        vtc.patch(model, "tome", keep=37)
    with pytest.raises(UnknownArgumentError, match=r"block=5 is out of range, use 1\.\.4"):
        vtc.patch(model, "tokenpooling", keep=8, block=5)
    with pytest.raises(UnsupportedModelError, match="register"):
        vtc.patch(build("cls", reg_tokens=4), "tome", r=2)
    with pytest.raises(UnsupportedModelError, match="ResNet of timm is not a vision transformer"):
        vtc.patch(timm.create_model("resnet10t", pretrained=False), "tome", r=2)
    with vtc.patch(model, "tome", r=2), torch.no_grad():
        with pytest.raises(UnsupportedFeatureError, match="forward_intermediates"):
            model.forward_intermediates(pictures())
        with pytest.raises(UnsupportedFeatureError, match="attention mask"):
            model.forward_features(pictures(), attn_mask=torch.zeros(1, 1, 37, 37))
    assert not vtc.engine.patch.handle_of(model)
