"""The models lmms-eval sees: any of its own classes patched by vtc (``vtc``), and our batching chat model (``vtc_hf``).

Both go the way lmms-eval goes: ``create_from_arg_string`` builds the object from ``--model_args``, and nothing of lmms-eval or
transformers is replaced. What the command line does not offer is done on the objects of the call at hand: its task manager gets the
name whose prompts the tasks should use, and its tasks carry reducer and code version, which puts them into cache keys and results.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from lmms_eval import models, utils
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

import vtc
from vtc.core import Reducer
from vtc.doors import as_rgb, open_image
from vtc.engine import upstream
from vtc.errors import ConfigError, UnknownArgumentError, VtcError, did_you_mean, shown
from vtc.eval import env
from vtc.eval.lmms.benchmarks import known_tasks
from vtc.eval.lmms.locks import require_locks
from vtc.eval.lmms.meter import GenerateFailedError, Meter, SampleCounts
from vtc.inspect import read_config
from vtc.pocket import POCKET_MODELS, load_pocket, pocket_path

UNREDUCED = "none"
"""Value of ``reducer=`` for the model as it is."""

PROMPTS = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl_hf",
}
"""``config.model_type`` -> lmms-eval's class for it, whose prompt variants the tasks should use."""

MAX_NEW_TOKENS = 128
"""Longest answer of ``vtc_hf`` where neither the task nor our table of benchmarks sets one."""


# ------------------------------------------------------------------------------------------------ the patched instance
class Measured:
    """Mixed in front of a model class of lmms-eval: patches its model, counts and times, lets no error pass for an answer."""

    handle: vtc.Handle | None = None
    reducer: Reducer | None = None
    prompts = "default"
    identity: Mapping[str, Any] = {}

    def reduce(self, reducer: str | Reducer | None, **options: Any) -> None:
        """Put a reducer on the model, in place of the one there was; ``None`` or ``"none"`` takes it off."""
        if reducer is None or reducer == UNREDUCED:
            if options:
                raise UnknownArgumentError(
                    f"{', '.join(options)}: there is no reducer to take these options, name one with reducer="
                )
            vtc.unpatch(self.model)
            self.handle = self.reducer = None
        else:
            self.handle = vtc.patch(self.model, reducer, **options)
            self.reducer = self.handle.reducer
        self.identity = {
            **{k: v for k, v in self.identity.items() if k not in ("reducer", "options", "code")},
            "reducer": UNREDUCED if self.reducer is None else self.reducer.name,
            "options": {} if self.reducer is None else _options(self.reducer),
            "code": [env.engine_version(), env.reducer_version(self.reducer)],
        }

    def __str__(self) -> str:
        """Return model, reducer, options and code version: lmms-eval puts this text into its cache keys."""
        return "vtc:" + json.dumps(self.identity, sort_keys=True, default=str)

    def clean(self) -> None:
        """Do nothing: lmms-eval calls this after generating and would delete the model, which the next call needs."""

    def close(self) -> None:
        """Take the reducer off and free the model."""
        self.reduce(None)
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer as the base class does; every answer comes with its token counts and times.

        Raises
        ------
        RuntimeError
            At the first error inside ``generate`` (``SystemExit`` on lmms-eval's command line, which would exit with 0 otherwise).
        """
        meter = Meter(self.model, self.handle)
        task_dict = self.task_dict
        self.task_dict = meter.documents(task_dict)
        try:
            with meter.watching():
                outputs = super().generate_until([_with_own_kwargs(request) for request in requests])
        except GenerateFailedError:
            pass
        except Exception as error:
            _fail(error)
        finally:
            self.task_dict = task_dict
        if meter.error is not None:
            _fail(meter.error)
        return [
            _counted(output, meter.records[task, split, number])
            for (*_, number, task, split), output in zip((r.args for r in requests), outputs, strict=True)
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer as the base class does, in a form that lmms-eval takes: 0.7 makes a text of a bare pair, and then fails."""
        try:
            answers = super().loglikelihood(requests)
        except Exception as error:
            _fail(error)
        return [answer if isinstance(answer, GenerationResult) else GenerationResult(answer) for answer in answers]


def _options(reducer: Reducer) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(reducer).items() if not k.startswith("_")}


def _with_own_kwargs(request: Instance) -> Instance:
    """Copy a request with its generation arguments: base classes write into them, and the cache key is made of them twice."""
    own = copy.copy(request)
    own.arguments = tuple(dict(a) if isinstance(a, dict) else a for a in request.args)
    return own


def _counted(output: Any, record: Mapping[str, Any]) -> GenerationResult:
    inside = record["prompt_tokens"] - record["slots"] + record["kept"]
    return GenerationResult(
        unwrap_generation_output(output)[0],
        SampleCounts(input_tokens=inside, output_tokens=record["new_tokens"], record=record),
    )


# ------------------------------------------------------------------------------------------------------------- vtc_hf
class _Chat(lmms):
    """A chat model for any ``AutoModelForImageTextToText``: images and video, left-padded batches."""

    is_simple = False
    accelerator: Any = None

    def __init__(
        self,
        pretrained: Any,
        processor: Any = None,
        *,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        batch_size: int = 1,
        max_frames: int = 8,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_new_tokens: int | None = None,
        max_batch_size: int | None = None,  # lmms-eval passes it; batches are never sized by themselves here
    ) -> None:
        super().__init__()
        self.device_map = device_map
        self._device = self._place(device)
        self.batch_size, self.max_frames, self.max_new_tokens = _batch_size(batch_size), max_frames, max_new_tokens
        self.progress: Callable[[int, int], object] | None = None
        if processor is not None:
            self._model, self.processor = pretrained, processor
            self._device = pretrained.device
        elif pretrained in POCKET_MODELS:
            self._model, self.processor = load_pocket(
                pretrained, None if dtype == "auto" else dtype, self._device, attn_implementation
            )
        else:
            self._model, self.processor = self._load(
                pretrained,
                trust_remote_code is True,
                {"revision": revision},
                {"dtype": dtype, "attn_implementation": attn_implementation},
                {k: v for k, v in {"min_pixels": min_pixels, "max_pixels": max_pixels}.items() if v is not None},
            )

    @property
    def rank(self) -> int:
        """Number of this process, 0 where there is only one."""
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def _place(self, device: str | None) -> torch.device:
        """Device of this process; joins the process group that lmms-eval's launcher set up."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            if self.accelerator.num_processes == 1:
                raise ConfigError(
                    "several processes were started, but accelerate has not connected them: on CPUs set ACCELERATE_USE_CPU=true"
                )
            return self.accelerator.device
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _load(
        self, pretrained: str, trusted: bool, where: dict[str, Any], how: dict[str, Any], pixels: dict[str, Any]
    ) -> tuple[Any, Any]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if "/" in (how["attn_implementation"] or "") and not trusted:
            raise ConfigError(
                f"attn_implementation={how['attn_implementation']} is code from the hub: give trust_remote_code=True, or sdpa"
            )
        try:
            with contextlib.suppress(FileNotFoundError):  # of an adapter's folder there is no config.json
                read_config(pretrained, pretrained, trust_remote_code=trusted, **where)
            processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=trusted, **where, **pixels)
            model = AutoModelForImageTextToText.from_pretrained(
                pretrained, trust_remote_code=trusted, **where, **how, device_map=self.device_map
            )
        except VtcError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"pretrained={pretrained}: {str(error).strip().splitlines()[0]} (give {' or '.join(POCKET_MODELS)}, a local "
                "folder, or the name of an image-text-to-text model on the hub)"
            ) from error
        if self.device_map is None:
            model.to(self._device)
        return model.eval(), processor

    model = property(lambda self: self._model, doc="The transformers model; one replica per process, never wrapped.")
    config = property(lambda self: self._model.config, doc="Its configuration.")
    tokenizer = property(lambda self: self.processor.tokenizer, doc="The processor's tokenizer.")
    device = property(lambda self: self._device, doc="Where this process computes.")

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer requests in batches of similar prompt length, one set of generation arguments per batch."""
        order = utils.Collator(
            [request.args for request in requests],
            lambda a: (len(a[0].split()), a[3]),
            group_fn=lambda a: {**self._asked(a), "task": a[4]},
            grouping=True,
        )
        answers: list[str] = []
        seconds, tokens = 0.0, 0
        bar = tqdm(total=len(requests), desc="vtc", disable=self.rank != 0 or self.progress is not None)
        for chunk in order.get_batched(n=self.batch_size):
            inputs = self._inputs([self._messages(arguments) for arguments in chunk])
            asked = self._asked(chunk[0])
            start = time.perf_counter()
            output = self.model.generate(**inputs, **self._generation(asked, chunk[0][4]))
            seconds += time.perf_counter() - start
            new = output[:, inputs[upstream.IDS].shape[1] :]
            tokens += new.numel() if self._pad is None else int((new != self._pad).sum())
            answers += self._answers(new, _stops(asked))
            bar.update(len(chunk))
            if self.progress is not None:
                self.progress(len(answers), len(requests))
        bar.close()
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"num_requests": len(requests), "rank": self.rank},
        )
        return order.get_original(answers)

    @staticmethod
    def _asked(arguments: tuple[Any, ...]) -> Mapping[str, Any]:
        """Return what a request asks of ``generate``."""
        return arguments[2]

    def _messages(self, arguments: tuple[Any, ...]) -> list[Mapping[str, Any]]:
        """Return a request's conversation."""
        _, to_messages, _, number, task, split = arguments
        return to_messages(self.task_dict[task][split][number])

    @property
    def _pad(self) -> int | None:
        return self.tokenizer.pad_token_id

    def _generation(self, asked: Mapping[str, Any], task: str) -> dict[str, Any]:
        """Arguments of ``generate`` from those of a task: greedy unless it asks to sample with a temperature."""
        known = known_tasks().get(task)
        limit = self.max_new_tokens or asked.get("max_new_tokens") or (known and known.max_new_tokens) or MAX_NEW_TOKENS
        kwargs: dict[str, Any] = {"max_new_tokens": limit, "num_beams": asked.get("num_beams") or 1, "do_sample": False}
        if asked.get("do_sample") and (asked.get("temperature") or 0) > 0:
            kwargs |= {"do_sample": True}
            kwargs |= {k: asked[k] for k in ("temperature", "top_p", "top_k") if asked.get(k) is not None}
        return kwargs if self._pad is None else {**kwargs, "pad_token_id": self._pad}

    def _answers(self, new: torch.Tensor, stops: Sequence[str]) -> list[str]:
        """Text of the generated tokens ``(B, n)``, each up to the first of the ``stops``; one may be a special token, not shown."""
        marks = [self.tokenizer.convert_tokens_to_ids(s) for s in stops if s in self.tokenizer.all_special_tokens]
        ended = torch.isin(new, new.new_tensor(marks)).cumsum(1) > 0
        said = [row[~past] for row, past in zip(new, ended, strict=True)]
        return [before(text, stops) for text in self.tokenizer.batch_decode(said, skip_special_tokens=True)]

    def _inputs(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Prompts, images and videos of a batch as arguments of ``generate``."""
        images, videos, prompts = [], [], []
        for messages in conversations:
            pictures = []
            for part in (part for message in messages for part in message["content"]):
                kind = part["type"]
                if kind == "image":
                    pictures.append(_image(part["url"]))
                elif kind == "video":
                    videos.append(_video(part["url"], self.max_frames))
                elif kind != "text":
                    raise ConfigError(f"this task shows the model {kind}, and vtc_hf takes text, images and video")
            prompts.append(self.processor.apply_chat_template(_placed(messages), add_generation_prompt=True))
            images.append(pictures)
        # one list per row, empty where there is no picture: some processors compare them with the prompts row by row
        extra: dict[str, Any] = {"images": images} if any(images) else {}
        if videos:
            frames, times = zip(*videos, strict=True)
            extra |= {"videos": list(frames), "video_metadata": list(times), "do_sample_frames": False}
        if (start := self.tokenizer.bos_token) and prompts[0].startswith(start):
            extra["add_special_tokens"] = False  # the template has written it
        inputs = self.processor(text=prompts, return_tensors="pt", padding=True, padding_side="left", **extra)
        return dict(inputs.to(self._device, self.model.dtype))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval makes no such requests of chat models."""
        raise NotImplementedError("tasks scored by likelihood are for lmms-eval's simple models: add --force_simple")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("vtc_hf answers one question at a time: use a task of output_type generate_until")


class _Simple(_Chat):
    """The same under ``--force_simple``: requests bring pictures and text apart, and may ask how likely an answer is."""

    is_simple = True

    @staticmethod
    def _asked(arguments: tuple[Any, ...]) -> Mapping[str, Any]:
        """Return what a request asks of ``generate``."""
        return arguments[1]

    def _messages(self, arguments: tuple[Any, ...]) -> list[Mapping[str, Any]]:
        """Return a request's conversation."""
        text, _, to_visual, number, task, split = arguments
        return self._turn(to_visual(self.task_dict[task][split][number]) or (), text)

    @staticmethod
    def _turn(visuals: Sequence[Any], text: str) -> list[Mapping[str, Any]]:
        """Return one question; a path names a video, as lmms-eval's tasks have it, unless its ending is a picture's."""
        shown = []
        for visual in visuals:
            film = isinstance(visual, (list, tuple)) or (isinstance(visual, str) and not is_picture(visual))
            shown.append({"type": "video" if film else "image", "url": visual})
        return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return how likely each answer is, and whether it is the one greedy decoding gives.

        The number is the mean negative logarithm per token, as lmms-eval's own models give and its tasks expect: the smallest wins.
        Prompt and answer go through the model together, and reducers see the prompt alone (:attr:`vtc.Handle.prompt_length`): the
        same tokens stay as where the answer is generated.
        """
        out = []
        handle = getattr(self, "handle", None)
        for request in tqdm(requests, desc="vtc", disable=self.rank != 0 or self.progress is not None):
            if len(request.args) != 6:
                raise ConfigError(
                    "acc_mutual_info asks how likely an answer is without its question, which vtc_hf does not answer"
                )
            text, answer, to_visual, number, task, split = request.args
            document = self.task_dict[task][split][number]
            answer = answer if isinstance(answer, str) else answer(document)
            messages = self._turn(to_visual(document) or (), text)
            inputs = self._inputs([messages])
            new = self._continuation(messages, answer)
            start = inputs[upstream.IDS].shape[1]
            try:
                if handle is not None:
                    handle.prompt_length = start
                with torch.inference_mode():
                    logits = self.model(**_with_answer(inputs, new)).logits[0, start - 1 : -1].float()
            finally:
                if handle is not None:
                    handle.prompt_length = None
            new = new.to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits, new)
            out.append((float(loss), bool((logits.argmax(-1) == new).all())))
            if self.progress is not None:
                self.progress(len(out), len(requests))
        return out

    def _continuation(self, messages: Sequence[Mapping[str, Any]], answer: str) -> torch.Tensor:
        """Token ids of an answer behind its prompt ``(n,)``: what it adds to the prompt's, where they stay as they were."""
        prompt = self.processor.apply_chat_template(_placed(messages), add_generation_prompt=True)
        before, both, alone = (
            self.tokenizer(t, add_special_tokens=False)[upstream.IDS] for t in (prompt, prompt + answer, answer)
        )
        new = both[len(before) :] if both[: len(before)] == before else alone
        if not new:
            raise ConfigError(f"the answer {shown(answer)} has no tokens, so nothing can be said about it: mend the task")
        return torch.tensor(new)


def _placed(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation with placeholders for what is shown, as chat templates take it."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": p["text"]} if p["type"] == "text" else {"type": p["type"]} for p in message["content"]
            ],
        }
        for message in messages
    ]


def _with_answer(inputs: Mapping[str, Any], new: torch.Tensor) -> dict[str, Any]:
    """Return the inputs of one prompt with ``new (n,)`` tokens behind it; what else has a value per token says text of them."""
    ids = inputs[upstream.IDS]
    out = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:
            fill = {upstream.IDS: new.to(value), upstream.MASK: torch.ones_like(new).to(value)}.get(
                name, torch.zeros_like(new).to(value)
            )
            out[name] = torch.cat([value, fill[None]], 1)
    return out


class SimpleModel(Measured, _Simple):
    """``vtc_hf`` under ``--force_simple``."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> lmms:
        """Build from ``--model_args``."""
        return _from_command_line(arg_string, additional_config, base="vtc_hf", force_simple=True)


class ChatModel(Measured, _Chat):
    """``vtc_hf``: our batching chat model, measured; takes ``reducer=`` and its options like ``vtc``."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> lmms:
        """Build from ``--model_args``."""
        return _from_command_line(arg_string, additional_config, base="vtc_hf")


def _batch_size(given: Any) -> int:
    try:
        size = int(given)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size={given}: give a positive number of questions")
    return size


def is_picture(name: str) -> bool:
    """Whether a file's ending is that of a picture."""
    from PIL import Image

    Image.init()
    return os.path.splitext(name)[1].lower() in Image.registered_extensions()


def _stops(asked: Mapping[str, Any]) -> list[str]:
    """Return the strings a task's answers end at.

    A paragraph's end is none of them: lmms-eval puts it where a task names nothing, and its own classes for current models, too,
    leave it out.
    """
    given = asked.get("until")
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
        raise ConfigError(f"until={shown(given)} of this task is neither a text nor a list of them: mend its generation_kwargs")
    return [s for s in stops if s not in ("", "\n\n")]


def before(text: str, stops: Sequence[str]) -> str:
    """Return ``text`` up to the first place where one of ``stops`` begins."""
    return text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))]


def _image(source: Any) -> Any:
    return open_image(source) if isinstance(source, str) else as_rgb(source)


def _video(source: Any, frames: int) -> tuple[Any, Any]:
    """Frames of a video ``(n, h, w, 3)``, uniformly spread over it, and when they were taken; given frames are one per second."""
    from transformers.video_utils import VideoMetadata, load_video

    if isinstance(source, str):
        return load_video(source, num_frames=frames, backend="pyav")
    stack = np.stack([np.asarray(frame) for frame in source])
    return stack, VideoMetadata(total_num_frames=len(stack), fps=1.0, frames_indices=list(range(len(stack))))


# ------------------------------------------------------------------------------------------------------ building models
class _Factory(lmms):
    """What the names stand for in lmms-eval's registry: it builds a patched instance of another class."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> lmms:
        """Build from ``--model_args``."""
        return _from_command_line(arg_string, additional_config, force_simple=cls.is_simple)

    generate_until = loglikelihood = generate_until_multi_round = None


class PatchedChat(_Factory):
    """``vtc``."""

    is_simple = False


class PatchedSimple(_Factory):
    """``vtc`` under ``--force_simple``."""

    is_simple = True


def build(arguments: Mapping[str, Any], extra: Mapping[str, Any] | None = None, force_simple: bool = False) -> lmms:
    """Build a model class of lmms-eval and patch its model.

    Parameters
    ----------
    arguments : mapping
        ``base`` (a model name of lmms-eval; ``vtc_hf`` by default), ``reducer``, its options by name or as ``reducer_args``
        (JSON or a mapping), ``prompts`` (whose prompt variants the tasks should use), and the arguments of the base class.
    extra : mapping, optional
        What lmms-eval adds: device, batch_size. ``None`` values are dropped.
    force_simple : bool
        Take the base's simple variant.

    Raises
    ------
    UnknownArgumentError
        An argument that neither the reducer nor the base has; close matches are named.
    ConfigError
        An unknown base, one that cannot be imported, or options that are not JSON.
    VtcError
        What :func:`vtc.patch` refuses.
    """
    rest = dict(arguments)
    base, reducer, prompts = rest.pop("base", "vtc_hf"), rest.pop("reducer", UNREDUCED), rest.pop("prompts", None)
    options = _json_options(rest.pop("reducer_args", None))
    cls = _base_class(base, force_simple)
    accepted = {n for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind is not p.VAR_KEYWORD} - {"self"}
    possible = set() if reducer == UNREDUCED else set(vtc.info(str(reducer).partition(".")[0]).options)
    for name in list(rest):
        if name in accepted and name in possible:
            raise UnknownArgumentError(
                f"both '{reducer}' and '{base}' have an option '{name}': write the reducer's as reducer_args={{\"{name}\":...}}"
            )
        if name in possible:
            options[name] = rest.pop(name)
        elif name not in accepted:
            raise UnknownArgumentError(
                f"neither the reducer '{reducer}' nor the model '{base}' has an option '{name}'"
                f"{did_you_mean(name, possible | accepted)} (reducer: {', '.join(sorted(possible)) or 'none'}; "
                f"model: {', '.join(sorted(accepted))})"
            )
    given = {**rest, **{k: v for k, v in (extra or {}).items() if v is not None and k in accepted}}
    if "pretrained" in accepted and "pretrained" not in given:
        raise ConfigError(f"which model? give pretrained=NAME ({', '.join(POCKET_MODELS)}, a local folder, or one of the hub)")
    if issubclass(cls, Measured):
        lm = cls(**given)
    else:
        lm = type(f"Patched{cls.__name__}", (Measured, cls), {})(**_stock_arguments(base, given, accepted))
    if not isinstance(getattr(lm, "model", None), torch.nn.Module):
        raise ConfigError(
            f"base={base} keeps no transformers model in this process, so there is nothing to patch: use base=vtc_hf"
        )
    lm.identity = {"base": base, **{k: v for k, v in given.items() if k not in ("device", "device_map", "batch_size")}}
    lm.prompts = prompts or (prompts_for(lm.model) if base == "vtc_hf" else base)
    lm.reduce(reducer, **options)
    return lm


def prompts_for(model: Any) -> str:
    """Return the name whose prompt variants suit a model: lmms-eval's own class for its type; the embedded ones have none."""
    config = model.config
    embedded = config.name_or_path in {str(pocket_path(name)) for name in POCKET_MODELS}
    return "default" if embedded else PROMPTS.get(config.model_type, "default")


def _json_options(given: Any) -> dict[str, Any]:
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    try:
        options = json.loads(given)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(f'reducer_args={given}: write a JSON object, for example reducer_args={{"keep":64}}')
    return options


def _base_class(base: str, force_simple: bool) -> type[lmms]:
    names = [n for n in models.MODEL_REGISTRY_V2.list_model_names() if n != "vtc"]
    if base not in names:
        raise ConfigError(
            f"base={base}: lmms-eval has no such model{did_you_mean(base, names)} (`lmms-eval models` lists its own)"
        )
    try:
        return models.get_model(base, force_simple=force_simple)
    except ImportError as error:
        missing = getattr(error, "name", None)
        fix = f"pip install {missing}" if missing else "install what it asks for"
        raise ConfigError(f"base={base} cannot be imported ({error}): {fix}, or use base=vtc_hf") from error


def _stock_arguments(base: str, given: dict[str, Any], accepted: set[str]) -> dict[str, Any]:
    """Mend the defaults of lmms-eval's classes: an empty device map and "auto" on a CPU do not work, some run a model's code."""
    if "trust_remote_code" in accepted:
        given = {"trust_remote_code": False, **given}
    if "device_map" not in accepted or given.get("device_map"):
        return given
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if str(device).startswith("cpu") or base == "llava_hf" and alone:
        return {**given, "device": str(device), "device_map": str(device)}
    return given


# ------------------------------------------------------------------------------------------------- the call at hand
def _from_command_line(arg_string: str, extra: Mapping[str, Any] | None, **fixed: Any) -> lmms:
    """Build for ``simple_evaluate``, and tell its task manager about prompts and code version."""
    force_simple = fixed.pop("force_simple", False)
    try:
        require_locks()
        lm = build({**utils.simple_parse_args_string(arg_string), **fixed}, extra, force_simple)
    except Exception as error:
        _fail(error)
    frame = _caller("simple_evaluate")
    manager = frame.f_locals.get("task_manager") if frame is not None else None
    if manager is not None:
        introduce(lm, manager)
    return lm


def introduce(lm: Any, manager: Any) -> None:
    """Make a task manager load tasks with the prompts of ``lm`` and with its identity in their metadata.

    lmms-eval makes cache keys of a task's configuration and writes it into the results, so both then name the reducer, its options
    and the version of its code. Only this manager object is changed.
    """
    manager.model_name = lm.prompts
    load = manager.load_task_or_group

    def load_stamped(*args: Any, **kwargs: Any) -> Any:
        tasks = load(*args, **kwargs)
        for task in leaves(tasks):
            metadata = task.config.metadata
            stamp = {"vtc": dict(lm.identity)}
            task.set_config("metadata", [*metadata, stamp] if isinstance(metadata, list) else {**(metadata or {}), **stamp})
        return tasks

    manager.load_task_or_group = load_stamped


def leaves(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the task objects of what lmms-eval loads, which nests the members of groups."""
    for task in tasks.values():
        if isinstance(task, Mapping):
            yield from leaves(task)
        else:
            yield task


def _caller(function: str) -> FrameType | None:
    """Return the innermost running call of one of lmms-eval's functions."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function and "lmms_eval" in frame.f_code.co_filename:
            return frame
        frame = frame.f_back
    return None


def _fail(error: Exception) -> None:
    """Raise ``error``; on lmms-eval's command line, which prints exceptions and exits with 0, leave with a message and status 1."""
    if _caller("cli_evaluate") is None:
        raise error
    if not isinstance(error, VtcError):
        traceback.print_exception(error)
    raise SystemExit(f"vtc: {error}") from error
