"""The gate: transformers' names stand in one file, are found in a model's own classes, and what is unknown is refused."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
from models import DECODER_LAYERS, build, make_inputs, shared
from pickers import BoundaryPicker, DecoderPicker
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import vtc
from vtc.engine import cache as cache_module
from vtc.engine import upstream
from vtc.engine.patch import handle_of
from vtc.engine.text import TextSide
from vtc.engine.upstream import Call, Names
from vtc.errors import NotReducedError, UnsupportedFeatureError, UnsupportedModelError

ROOT = Path(__file__).parents[1]
CACHE = upstream.ROLES["kv"].names[0] if "cache" in upstream.parameters(type(build("llava").model)) else "past_key_values"

# ------------------------------------------------------------------------------------------------------ one gate
FILES_WE_WRITE = {"vtc/pocket/model.py": {"use_cache", "input_ids", "attention_mask"}}
"""Keys of configuration files that vtc writes: a file format, not an argument."""
OUR_PARAMETERS = {"pixel_values", "input_ids", "hidden_states"}
"""Also names of parameters of our own functions: as parameters they may stand anywhere."""


def names_in(source: str) -> set[tuple[str, int]]:
    """Upstream's names in a file: as a string, an attribute, a keyword of a call, or an imported class."""
    known, found = upstream.known_names(), set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        said: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = [node.value]
        elif isinstance(node, ast.Attribute):
            said = [node.attr] if node.attr != "cache" else []  # functools.cache, and words of our own
        elif isinstance(node, ast.keyword) and node.arg:
            said = [node.arg]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            said = [alias.name for alias in node.names]
        found |= {(name, node.lineno if hasattr(node, "lineno") else 0) for name in said if name in known}
    return found


def test_upstreams_names_stand_at_one_gate():
    wrong = []
    for folder in ("vtc", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if place.startswith(("vtc/families/", "vtc/verify/")) or place == "vtc/engine/upstream.py":
                continue
            for name, line in sorted(names_in(path.read_text("utf-8"))):
                if name not in FILES_WE_WRITE.get(place, ()):
                    wrong.append(f"{place}:{line} says '{name}'")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        'kwargs.get("past_key_values")',
        "out.past_key_values",
        "model(**inputs, use_cache=True)",
        "from transformers.cache_utils import DynamicLayer",
        'kwargs["cache"]',
        'if config._attn_implementation == "eager": pass',
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert names_in(line)


def test_no_version_is_compared():
    for path in sorted((ROOT / "vtc" / "engine").glob("*.py")):
        assert not re.search(r"version(_info)?\(?\)? *[<>=]=? *[(\d]", path.read_text("utf-8")), path.name


# ------------------------------------------------------------------------------------------------------ names and calls
class Plain(nn.Module):
    def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, position_embeddings=None, **kwargs):
        return hidden_states


class Older(nn.Module):
    def forward(self, hidden_states, attention_mask=None, past_key_values=None, *, use_cache=False):
        return hidden_states


class Both(nn.Module):
    def forward(self, hidden_states, cache=None, past_key_values=None):
        return hidden_states


class Renamed(nn.Module):
    def forward(self, hidden_states, attention_mask=None, position_ids=None, kv_store=None, position_embeddings=None, **kwargs):
        return hidden_states


def test_names_are_found_by_class():
    assert Names.of(Plain()).roles["kv"] == "cache" and Names.of(Older()).roles["kv"] == "past_key_values"
    assert Names.of(Older()).roles["caching"] == "use_cache" and not Names.of(Older()).open
    assert "positions" not in Names.of(Older()).roles
    with pytest.raises(UnsupportedModelError, match="Both .* takes both 'cache' and 'past_key_values' for the KV cache"):
        Names.of(Both())
    with pytest.raises(UnsupportedModelError, match="Renamed .* looked for 'cache' or .* found hidden_states, .*kv_store"):
        Names.of(Renamed()).need("hidden", "kv")


def test_decorated_forwards_are_looked_through():
    class Wrapped(nn.Module):
        @functools.wraps(Older.forward)
        def forward(self, *args, **kwargs):
            return Older.forward(self, *args, **kwargs)

    assert Names.of(Wrapped()).roles["kv"] == "past_key_values"


def test_a_call_reads_by_position_and_by_keyword():
    names = Names.of(Plain())
    by_position = Call(names, (1, 2, 3, 4), {"position_embeddings": 5})
    by_keyword = Call(names, (1,), {"attention_mask": 2, "position_ids": 3, "cache": 4, "position_embeddings": 5})
    for call in (by_position, by_keyword):
        assert [call[r] for r in ("hidden", "mask", "positions", "kv", "rotary")] == [1, 2, 3, 4, 5]
        call.set("mask", 20), call.update({"kv": 40, "rotary": 50})
        args, kwargs = call.result()
        assert Plain.forward.__code__.co_varnames[1:4] == ("hidden_states", "attention_mask", "position_ids")
        got = dict(zip(names.order, args, strict=False)) | kwargs
        assert got == {"hidden_states": 1, "attention_mask": 20, "position_ids": 3, "cache": 40, "position_embeddings": 50}
        assert len(args) == (4 if call is by_position else 1), "what came by position goes on by position"


def test_a_call_leaves_what_it_was_given():
    kwargs = {"cache": 1}
    call = Call(Names.of(Plain()), (0,), kwargs)
    call.set("kv", 2), call.set("hidden", 3), call.set("mask", 4)
    assert kwargs == {"cache": 1} and call["kv"] == 2 and call["hidden"] == 3


def test_what_is_not_given_is_the_default_and_what_the_class_lacks_is_an_error():
    call = Call(Names.of(Older()), (1,), {})
    assert call["kv"] is None and call["caching"] is False
    with pytest.raises(KeyError):
        call["positions"]


def test_the_older_name_of_an_argument_counts_too():
    """Forwards of 5.24 take the cache under its old name, which hooks see before it is renamed."""
    assert Call(Names.of(Plain()), (0,), {"past_key_values": 7})["kv"] == 7
    assert Call(Names.of(Older()), (0,), {"use_cache": True})["kv"] is None


# ------------------------------------------------------------------------------------------------------ refusals
def renamed_layer(layer: nn.Module) -> type:
    """A subclass of a decoder layer whose cache argument has another name, as a release might."""
    theirs = Names.of(layer).roles["kv"]

    class NextYears(type(layer)):
        def forward(
            self, hidden_states, attention_mask=None, position_ids=None, kv_store=None, position_embeddings=None, **kwargs
        ):
            given = {"attention_mask": attention_mask, "position_ids": position_ids, theirs: kv_store}
            return super().forward(hidden_states, **given, position_embeddings=position_embeddings, **kwargs)

    return NextYears


@pytest.mark.parametrize("at", [0, DECODER_LAYERS - 1])
def test_a_renamed_cache_argument_is_refused_when_patching(at):
    model = build("llava")
    layer = model.model.language_model.layers[at]
    layer.__class__ = renamed_layer(layer)
    with pytest.raises(UnsupportedModelError, match=r"NextYears \(transformers .*\) has no argument .* for the KV cache"):
        vtc.patch(model, "fastv", keep=0.5, layer=2)
    assert handle_of(model) is None


def test_a_text_model_that_hands_nothing_on_is_refused():
    model = build("llava")
    text = model.model.language_model

    class Closed(type(text)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None):
            raise AssertionError("not run")

    text.__class__ = Closed
    with pytest.raises(UnsupportedModelError, match="Closed .* no further keyword arguments"):
        vtc.patch(model, "divprune", keep=0.5)


def test_a_base_and_a_text_model_that_differ_are_refused():
    model = build("llava")
    other = {"cache": "past_key_values", "past_key_values": "cache"}[CACHE]
    text = model.model.language_model
    source = (
        f"def forward(self, input_ids=None, attention_mask=None, position_ids=None, {other}=None, inputs_embeds=None, **kw): 0"
    )
    space: dict = {}
    exec(source, space)
    text.__class__ = type("Torn", (type(text),), {"forward": space["forward"]})
    with pytest.raises(UnsupportedModelError):
        vtc.patch(model, "divprune", keep=0.5)


class Mine(DynamicCache):
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def test_a_users_cache_class_with_its_own_lengths_is_refused():
    model, inputs = shared("llava"), make_inputs("llava", shared("llava"))
    with (
        vtc.patch(model, "divprune", keep=0.5),
        pytest.raises(UnsupportedFeatureError, match="Mine with its own get_seq_length"),
    ):
        model(**inputs, **{CACHE: Mine()})


def test_a_users_subclass_that_changes_nothing_is_served():
    class Named(DynamicCache):
        pass

    model = shared("llava")
    inputs, cache = make_inputs("llava", model), Named()
    with vtc.patch(model, BoundaryPicker(keep=0.5)), torch.no_grad():
        model(**inputs, **{CACHE: cache})
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] > cache.layers[0].keys.shape[-2]


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_cache_given_by_position(name):
    """Everything the base model takes, by position: logits and cache are those of the call by keyword."""
    model = shared(name)
    inputs, base = make_inputs(name, model), model.model
    order = Names.of(base).order
    with vtc.patch(model, [BoundaryPicker(keep=0.6), DecoderPicker(keep=0.3)]), torch.no_grad():
        one, two = DynamicCache(), DynamicCache()
        given = inputs | {CACHE: one}
        want = base(**given).last_hidden_state
        given[CACHE] = two
        last = max(order.index(k) for k in given)
        got = base(*[given.get(k) for k in order[: last + 1]]).last_hidden_state
    assert torch.equal(got, want) and one.get_seq_length() == two.get_seq_length() == inputs["input_ids"].shape[1]
    assert [layer.keys.shape[-2] for layer in one.layers] == [layer.keys.shape[-2] for layer in two.layers]
    assert two.layers[-1].keys.shape[-2] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["past_key_values", CACHE])
def test_both_names_on_the_way_in_and_out(name):
    model = shared("llava")
    inputs, cache = make_inputs("llava", model), DynamicCache()
    with vtc.patch(model, BoundaryPicker(keep=0.5)), torch.no_grad():
        out = model(**inputs, **{name: cache})
        direct = model.model(**inputs, **{name: DynamicCache()})
    assert out.past_key_values is cache and upstream.cache_of(out) is cache
    assert cache.layers[0].keys.shape[-2] < cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert upstream.cache_of(direct).layers[0].keys.shape[-2] == cache.layers[0].keys.shape[-2]


# ------------------------------------------------------------------------------------------------------ assertions
PARTS = {"boundary": BoundaryPicker(keep=0.5), "decoder": DecoderPicker(keep=0.5)}


def silent(monkeypatch):
    """The engine believes there is no cache, as with 5.24's new name before it was known."""
    monkeypatch.setattr(TextSide, "hold", staticmethod(lambda ctx, i, cache, seg: (None, None)))


def forgetful(monkeypatch):
    """The cache is replaced by vtc's, and somebody puts plain layers back while the layers run."""
    real = TextSide.hold

    def hold(ctx, i, cache, seg):
        found = real(ctx, i, cache, seg)
        if i == DECODER_LAYERS - 1 and cache is not None:
            cache.layers[DECODER_LAYERS - 2] = DynamicLayer()
        return found

    monkeypatch.setattr(TextSide, "hold", staticmethod(hold))


def too_long(monkeypatch):
    """A layer's cache stores more than survived."""
    real = cache_module.Pruned.begin

    def begin(self, seg, q):
        real(self, seg, q)
        self.end += 1

    monkeypatch.setattr(cache_module.Pruned, "begin", begin)


@pytest.mark.parametrize("break_it", [silent, forgetful, too_long])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("stage", PARTS)
def test_a_broken_promise_raises(monkeypatch, stage, strict, break_it):
    model = build("llava")
    inputs = make_inputs("llava", model)
    with vtc.patch(model, PARTS[stage], strict=strict) as handle, torch.no_grad():
        model(**inputs, use_cache=True)  # in order before it is broken
        handle.stats.clear()
        break_it(monkeypatch)
        if break_it is too_long:
            monkeypatch.setattr(TextSide, "hold", staticmethod(recounted))
        with pytest.raises(NotReducedError, match=r"did not keep what vtc promises \(transformers"):
            model(**inputs, use_cache=True)
        assert len(handle.stats) == 0, "no statistics of a call that is not as they would say"


def recounted(ctx, i, cache, seg, real=TextSide.hold):
    layer, before = real(ctx, i, cache, seg)
    if layer is not None and seg is not None:
        ctx.promises[i] = (ctx.promises[i][0], ctx.promises[i][1] - 1)
    return layer, before


def test_a_layer_that_is_not_told_raises(monkeypatch):
    """One decoder layer gets no context (a text model that keeps its keyword arguments to itself)."""
    model = build("llava")
    inputs, layers = make_inputs("llava", model), model.model.language_model.layers
    real = type(layers[3]).forward

    with vtc.patch(model, PARTS["boundary"]), torch.no_grad():
        hooks = layers[3]._forward_pre_hooks
        taken = {k: hooks.pop(k) for k in list(hooks)}
        with pytest.raises((NotReducedError, RuntimeError)):
            model(**inputs, use_cache=True)
        hooks.update(taken)
    assert type(layers[3]).forward is real


# ------------------------------------------------------------------------------------------------------ cache classes
def defined(base: type, **methods) -> list[str]:
    """What is noted when a reduced layer extends a class with these methods."""
    before = list(upstream._problems)
    theirs = type("TheirLayer", (base,), {"__module__": "transformers.cache_utils", **methods})
    try:
        upstream.check_overrides(type("OurLayer", (cache_module.Pruned, theirs), {}))
        return upstream._problems[len(before) :]
    finally:
        upstream._problems[:] = before


def test_cache_classes_of_this_release_are_served():
    assert not upstream._problems
    upstream.check_cache_classes()


def test_a_cache_method_with_other_arguments_is_noted():
    def reorder_cache(self, beam_idx, groups):
        return None

    def get_seq_length(self):
        return 0

    assert defined(DynamicLayer, get_seq_length=get_seq_length) == []
    (problem,) = defined(DynamicLayer, reorder_cache=reorder_cache)
    assert "reorder_cache(beam_idx, groups) takes other arguments" in problem


def test_a_cache_method_that_is_gone_is_noted(monkeypatch):
    monkeypatch.setitem(upstream._OVERRIDDEN, "evaporate", 0)
    assert defined(DynamicLayer) == ["TheirLayer.evaporate() is gone"]


def test_patching_is_refused_where_cache_classes_do_not_fit(monkeypatch):
    monkeypatch.setattr(upstream, "_problems", ["DynamicLayer.crop() is gone"])
    model = build("llava")
    with pytest.raises(UnsupportedFeatureError, match=r"crop\(\) is gone"):
        vtc.patch(model, "divprune", keep=0.5)
    assert handle_of(model) is None


def test_an_unknown_method_of_a_cache_layer_raises_when_called():
    def squeeze(self, n):
        self.keys = self.keys[..., :n, :]

    theirs = type("TheirLayer", (DynamicLayer,), {"__module__": "transformers.cache_utils", "squeeze": squeeze})
    ours = upstream.check_overrides(type("OurLayer", (cache_module.Pruned, theirs), {}))
    with pytest.raises(UnsupportedFeatureError, match=r"TheirLayer\.squeeze\(\) of a reduced KV cache is not known"):
        ours().squeeze(3)


def test_two_caches_in_one_forward_are_an_error():
    with pytest.raises(NotReducedError, match="2 different KV caches"):
        upstream.cache_in(Call(Names.of(Plain()), (0,), {"cache": DynamicCache()}), (DynamicCache(),))
    one = DynamicCache()
    assert upstream.cache_in(Call(Names.of(Plain()), (0,), {"cache": one}), (torch.ones(1), one)) is one
    assert upstream.cache_of((torch.ones(1),)) is None
