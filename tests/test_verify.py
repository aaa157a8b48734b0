"""``vtc.verify``: every family proves itself on a tiny twin, and an engine that is wrong in one way is caught in that one."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import json
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from family_cases import CASES, TEXT, VISION
from models import build, make_inputs, shared, where
from torch import nn

import vtc
from vtc import cli
from vtc.errors import UnsupportedModelError
from vtc.verify import Item, Verdict, check
from vtc.verify.reference import NAME, Plan, hidden_copy, hide_in

FAMILIES = [name for name in CASES if ":" not in name]
"""A twin runs clips, too, where its family takes them."""


def config_of(name: str, **over: Any) -> Any:
    return CASES[name].make(TEXT, VISION, over)[1]


@functools.cache
def verdict_of(name: str) -> Verdict:
    return vtc.verify(config_of(name))


def states(verdict: Verdict) -> dict[str, str]:
    return {item.name: item.state for item in verdict.items}


# ------------------------------------------------------------------------------------------------------------ families
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_verified(name):
    verdict = verdict_of(name)
    assert verdict.ok, str(verdict)
    found = states(verdict)
    for stage in ("boundary", "decoder"):
        for what in ("", ": KV cache", ": layer arguments"):
            assert found[f"{stage}, original positions{what}"] == "ok"
        compact = "not checked" if name.startswith("qwen") else "ok"
        assert found[f"{stage}, compact positions"] == compact
        assert found[f"{stage}, clips"] == ("ok" if f"{name}:clips" in CASES else "not checked")
    assert found["unpatch"] == found["small copy"] == found["reference"] == "ok"
    assert all(item.error < item.limit < 1e-2 for item in verdict.items if item.limit)
    assert verdict.model_type == CASES[name].family


def test_a_model_a_patched_model_and_a_name_are_taken():
    model = build("llava")
    with vtc.patch(model, "uniform", keep=0.5):
        assert vtc.verify(model, stages=("boundary",)).ok
    verdict = vtc.verify("pocket", stages=("decoder",))
    assert verdict.ok and not [i for i in verdict.items if i.stage == "boundary"]


@pytest.mark.parametrize("thing", [3, nn.Linear(2, 2), {"model_type": "llava"}])
def test_other_things_are_refused(thing):
    with pytest.raises(UnsupportedModelError, match="give a transformers vision-language model"):
        vtc.verify(thing)


def test_a_name_that_is_not_here():
    with pytest.raises(vtc.VtcError, match="no model 'nobody/nothing' here"):
        vtc.verify("nobody/nothing")


def test_nothing_of_the_process_is_changed():
    torch.manual_seed(3)
    state, level = torch.get_rng_state(), hf.logging.get_verbosity()
    vtc.verify(config_of("llava"), stages=("boundary",))
    assert torch.equal(torch.get_rng_state(), state) and hf.logging.get_verbosity() == level
    assert torch.get_default_dtype() == torch.float32


def test_package_and_function_of_one_name():
    """Python binds a package's name once a part of it is imported, which hides the function."""
    assert isinstance(vtc.verify, types.ModuleType) and callable(vtc.verify) and vtc.verify.Verdict is Verdict
    assert callable(vtc.__getattr__("verify"))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vtc.verify.nothing  # noqa: B018


# ------------------------------------------------------------------------------------------------------------- mutants
def test_a_layer_with_a_renamed_cache_argument_is_not_verified():
    """What transformers 5.24 did, as a model of today: nobody who asks for the old name finds a cache."""
    verdict = vtc.verify(Renamed(config_of("llava")))
    assert not verdict.ok and states(verdict)["reference"] in ("ok", "not checked")
    assert verdict.failed or "vtc refuses" in verdict.reason, str(verdict)


class RenamedLayer(hf.models.llama.modeling_llama.LlamaDecoderLayer):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for name in ("past_key_values", "cache"):
            if name in kwargs:
                kwargs["memory"] = kwargs.pop(name)
                self.cache_name = name
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states, attention_mask=None, memory=None, position_embeddings=None, **kwargs):
        kwargs = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
        return super().forward(hidden_states, **kwargs, **{self.cache_name: memory})


class Renamed(hf.LlavaForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.language_model.layers:
            layer.__class__ = RenamedLayer


class PerTokenText(hf.LlamaModel):
    """Hands its layers one number per token, as models with inputs per layer do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        embeds = self.embed_tokens(kwargs["input_ids"]) if embeds is None else embeds
        return super().forward(*args, **kwargs, per_token=1.5 + embeds.sum(-1, keepdim=True).sin())


class PerTokenLayer(hf.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, per_token=None, **kwargs):
        return super().forward(hidden_states * per_token, attention_mask=attention_mask, **kwargs)


class PerToken(hf.LlavaForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model.__class__ = PerTokenText
        for layer in self.model.language_model.layers:
            layer.__class__ = PerTokenLayer


def test_an_argument_that_nobody_shortens_is_named():
    """Unless somebody shortens it, or refuses the model."""
    verdict = vtc.verify(PerToken(config_of("llava")))
    assert states(verdict)["reference"] == "ok"
    assert verdict.ok or "per_token" in verdict.reason or "vtc refuses" in verdict.reason, str(verdict)


@contextlib.contextmanager
def real(model: nn.Module, reducer: Any) -> Iterator[Any]:
    with PATCH(model, reducer) as handle:
        yield handle


PATCH = vtc.patch


CALL: dict[str, Any] = {}
"""Arguments of the call of ``generate`` that runs."""


class Boast:
    """Statistics of an engine that did nothing: what a patched copy would have kept."""

    def __init__(self, model: nn.Module, reducer: Any) -> None:
        self.twin, self.reducer, self.stats = copy.deepcopy(model), reducer, self

    @property
    def kept(self) -> list[Any]:
        with PATCH(self.twin, self.reducer) as handle, torch.no_grad():
            self.twin(**CALL)
            return handle.stats.kept


@contextlib.contextmanager
def idle(model: nn.Module, reducer: Any) -> Iterator[Any]:
    """Nothing is reduced, and the statistics say it was."""
    yield Boast(model, reducer)


@contextlib.contextmanager
def masking(model: nn.Module, reducer: Any) -> Iterator[Any]:
    """Dropped tokens are masked out: right answers, and a cache as long as ever."""
    handle, text = Boast(model, reducer), model.model.language_model
    with hidden_copy(model, Plan(), "model.language_model"):  # (registers the attention function)
        pass
    before = model.config._attn_implementation

    def hide(_text, _args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            ids = CALL["input_ids"]
            gone, start = torch.zeros(ids.shape, dtype=torch.bool), collections.Counter()
            for kept in handle.kept:
                columns = (ids[kept.row] == model.config.image_token_id).nonzero()[:, 0]
                at = columns[start[kept.row] :][: len(kept.mask)]
                start[kept.row] += len(at)
                gone[kept.row, at] = ~kept.mask
            for block in list(text.layers)[reducer.layer :]:
                hide_in(block, gone)

    hook = text.register_forward_pre_hook(hide, with_kwargs=True)
    model.set_attn_implementation(NAME)
    try:
        yield handle
    finally:
        model.set_attn_implementation(before)
        hook.remove()
        for module in model.modules():
            vars(module).pop("_vtc_gone", None), vars(module).pop("_vtc_seen", None)


@contextlib.contextmanager
def late(model: nn.Module, reducer: Any) -> Iterator[Any]:
    """Generated tokens stand one place further on than they do."""

    def shift(_text, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] == 1:
            kwargs = {**kwargs, "position_ids": kwargs["position_ids"] + 1}
        return args, kwargs

    hook = model.model.language_model.register_forward_pre_hook(shift, with_kwargs=True)
    try:
        with PATCH(model, reducer) as handle:
            yield handle
    finally:
        hook.remove()


@contextlib.contextmanager
def long_argument(model: nn.Module, reducer: Any) -> Iterator[Any]:
    """An argument nobody reads comes back as long as it was."""
    text, given = model.model.language_model, []

    def keep(_text, _args, kwargs):
        given[:] = [kwargs["position_ids"]]

    def give_back(_layer, args, kwargs):
        return args, {**kwargs, "position_ids": given[0]}

    hooks = [text.register_forward_pre_hook(keep, with_kwargs=True)]
    try:
        with PATCH(model, reducer) as handle:
            hooks += [layer.register_forward_pre_hook(give_back, with_kwargs=True) for layer in text.layers]
            yield handle
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def sloppy(model: nn.Module, reducer: Any) -> Iterator[Any]:
    """Un-patching forgets an attribute."""
    with PATCH(model, reducer) as handle:
        yield handle
    model.left_behind = True


MUTANTS: dict[str, tuple[Callable[..., Any], set[str], set[str]]] = {
    # engine, what must fail, what must not (of "", "KV cache", "layer arguments", for the boundary at original positions)
    "idle": (idle, {"", "KV cache", "layer arguments"}, set()),
    "masking": (masking, {"KV cache", "layer arguments"}, {""}),
    "late": (late, {""}, {"KV cache", "layer arguments"}),
    "long_argument": (long_argument, {"layer arguments"}, {"", "KV cache"}),
    "sloppy": (sloppy, {"unpatch"}, {"", "KV cache", "layer arguments"}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_engine_is_caught_in_what_is_wrong(name, monkeypatch):
    engine, wrong, right = MUTANTS[name]
    monkeypatch.setattr(vtc, "patch", engine)
    generate = check._generate

    def noted(model, family, prompt, seen):
        CALL.clear(), CALL.update(prompt.call)
        generate(model, family, prompt, seen)

    monkeypatch.setattr(check, "_generate", noted)
    verdict = vtc.verify(config_of("llava"), stages=("boundary",))
    found = states(verdict)

    def of(what: str) -> str:
        title = "boundary, original positions"
        return found[what if what == "unpatch" else f"{title}: {what}" if what else title]

    assert not verdict.ok and verdict.state == "failed" and verdict.reason
    assert {what for what in wrong | right if of(what) == "failed"} == wrong, str(verdict)


def test_the_real_engine_is_fine_through_the_same_door(monkeypatch):
    """The mutants fail for what they do, not for how they are put in."""
    monkeypatch.setattr(vtc, "patch", real)
    assert vtc.verify(config_of("llava"), stages=("boundary",)).ok


def test_a_crash_names_the_argument_that_is_missing(monkeypatch):
    """Ministral 3 scales its queries by their positions: layers that are not told any cannot run."""

    @contextlib.contextmanager
    def forgetful(model, reducer):
        with PATCH(model, reducer) as handle:
            hooks = [
                layer.register_forward_pre_hook(lambda m, a, k: (a, {**k, "position_embeddings": None}), with_kwargs=True)
                for layer in model.model.language_model.layers
            ]
            try:
                yield handle
            finally:
                for hook in hooks:
                    hook.remove()

    monkeypatch.setattr(vtc, "patch", forgetful)
    verdict = vtc.verify(config_of("llava"), stages=("boundary",))
    first = next(i for i in verdict.items if i.state == "failed")
    assert "TypeError" in first.text and "'position_embeddings[0]'" in first.text


def test_a_refusal_of_vtc_is_no_proof(monkeypatch):
    def refuses(model, reducer):
        raise vtc.UnsupportedFeatureError("not today")

    monkeypatch.setattr(vtc, "patch", refuses)
    verdict = vtc.verify(config_of("llava"), stages=("boundary",))
    assert not verdict.ok and verdict.state == "not checked" and "vtc refuses: not today" in verdict.reason


# ----------------------------------------------------------------------------------------------------------- no twin
class Stubborn(hf.LlavaForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        if config.text_config.hidden_size < 64:
            raise ValueError("a Stubborn is never smaller than 64")
        super().__init__(config)


class Demanding(hf.LlavaForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = DemandingModel


class DemandingModel(hf.LlavaModel):
    def get_image_features(self, pixel_values, moon_phase, **kwargs):
        return super().get_image_features(pixel_values, **kwargs)


class Blind(hf.LlavaForConditionalGeneration):
    """An attention of its own, which no registry knows."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.language_model.layers:
            layer.self_attn.__class__ = BlindAttention


class BlindAttention(hf.models.llama.modeling_llama.LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Stubborn, "a small Stubborn cannot be built: ValueError: a Stubborn is never smaller than 64"),
        (Demanding, "get_image_features of Demanding asks for 'moon_phase', which vtc.verify cannot make"),
        (Blind, "does not take its function from transformers' registry"),
    ],
)
def test_what_cannot_be_checked_says_why(kind, words):
    big = config_of("llava")
    big.text_config.hidden_size = 64
    verdict = vtc.verify(kind(big))
    assert not verdict.ok and verdict.state == "not checked" and not verdict.failed
    assert words in verdict.reason, verdict.reason
    assert verdict.model == kind.__name__


def test_models_that_do_not_generate_are_not_checked():
    verdict = vtc.verify(hf.ColPaliConfig())
    assert verdict.state == "not checked" and "no AutoModelForImageTextToText of type 'colpali'" in verdict.reason


@where(hasattr(hf, "Gemma4Config"))
def test_layers_that_use_the_keys_of_others_are_refused_with_the_reason():
    kinds = ["full_attention" if i % 5 == 4 else "sliding_attention" for i in range(20)]
    text = dict(
        num_hidden_layers=20, layer_types=kinds, num_kv_shared_layers=10, vocab_size=300, vocab_size_per_layer_input=300
    )
    tower = dict(num_hidden_layers=4, pooling_kernel_size=3)
    tokens = ("image", "video", "audio", "boi", "eoi", "boa", "eoa")
    config = hf.Gemma4Config(text_config=text, vision_config=tower, **{f"{k}_token_id": 290 + i for i, k in enumerate(tokens)})
    with pytest.raises(UnsupportedModelError, match="read keys and values that an earlier layer stored"):
        vtc.verify(config)


def test_a_model_that_takes_no_part_in_dropping_is_no_proof(monkeypatch):
    """Where dropped tokens change next to nothing, equal logits say nothing."""
    from vtc.verify import twin

    monkeypatch.setattr(
        twin, "randomize", lambda model: [p.data.mul_(1e-4) for n, p in model.named_parameters() if "o_proj" in n]
    )
    verdict = vtc.verify(config_of("llava"), stages=("boundary",))
    assert not verdict.ok and "too little to tell" in verdict.reason


# ------------------------------------------------------------------------------------------------------------- verdict
def test_json_holds_everything_and_comes_back():
    verdict = verdict_of("llava")
    data = json.loads(verdict.to_json())
    assert data["ok"] is True and data["state"] == "ok" and data["reason"] == ""
    assert set(data["versions"]) == {"vtc", "transformers", "torch", "python"}
    assert Verdict.from_dict(data) == verdict
    assert all(item.name in str(verdict) and item.state in str(verdict) for item in verdict.items)
    with pytest.raises(KeyError):
        Verdict.from_dict({"model": "x"})


def test_what_counts_as_verified():
    def verdict(*items: Item) -> Verdict:
        return Verdict("M", "m", "t", items)

    fine, wrong = Item("a", "ok"), Item("b", "failed", "is 3", error=1.0, limit=0.1)
    unknown, absent = Item("c", "not checked", "no twin"), Item("d", "not checked", "no clips", optional=True)
    assert verdict(fine, absent).ok and not verdict(absent).ok and not verdict().ok
    assert verdict(fine, unknown).state == "not checked" and verdict(fine, unknown).reason == "c: no twin"
    assert verdict(fine, wrong, unknown).state == "failed"
    assert verdict(wrong).reason == "b: is 3; error 1.0e+00 (limit 1.0e-01)"
    staged = verdict(Item("x", "failed", stage="decoder", positions="compact"), fine)
    assert staged.about({"decoder"}, {"original"}).ok and staged.about({"boundary"}, {"compact"}).ok
    assert not staged.about({"decoder"}, {"compact"}).ok


# ------------------------------------------------------------------------------------------------------- command line
def run(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return int(stop.value.code or 0), capsys.readouterr().out


def test_check_verify_exits_by_the_verdict(capsys, monkeypatch):
    code, out = run(capsys, "check", "pocket", "--verify")
    assert code == 0 and "verified on this machine" in out and "decoder, compact positions: KV cache" in out
    bad = Verdict("M", "llava", "llama", (Item("boundary", "failed", "is wrong"),))
    monkeypatch.setattr(check, "verify", lambda model, **_: bad)
    code, out = run(capsys, "check", "pocket", "--verify")
    assert code == 1 and "FAILED (1 of 1)" in out
    code, out = run(capsys, "check", "pocket", "--verify", "--json")
    assert code == 1 and json.loads(out)["verify"]["reason"] == "boundary: is wrong"
    code, out = run(capsys, "check", "pocket", "--json")
    assert code == 0 and "verify" not in json.loads(out)


def test_check_verify_with_a_reducer(capsys):
    code, out = run(capsys, "check", "pocket", "fastv", "--verify", "--json")
    data = json.loads(out)
    assert code == 0 and data["asked"]["runs"] and data["verify"]["ok"] and data["verify"]["state"] == "ok"


def test_shared_models_stay_unpatched():
    """A check of a live model leaves the model itself alone."""
    model = shared("llava")
    inputs = make_inputs("llava", model)
    with torch.no_grad():
        before = model(**inputs).logits
        vtc.verify(model, stages=("boundary",))
        assert torch.equal(model(**inputs).logits, before)
