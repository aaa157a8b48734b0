"""``patch``, ``unpatch`` and the handle that undoes one patch."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vtc import _window, saved
from vtc.core import Compose, Facts, Need, Reducer, Stage, Usual
from vtc.engine import parallel, upstream
from vtc.engine.cache import check_cache
from vtc.engine.context import LABELS
from vtc.engine.handle import ATTRIBUTE, BaseHandle
from vtc.engine.neurons import NeuronSide
from vtc.engine.retriever import RetrieverHandle
from vtc.engine.text import TextSide
from vtc.engine.tower import MADE, TowerSide
from vtc.engine.undo import sweep
from vtc.engine.vit import VitHandle, bind_vit
from vtc.errors import (
    NotReducedError,
    PatchError,
    UnknownArgumentError,
    UnsupportedFeatureError,
    UnsupportedSignalError,
    VtcError,
    shown,
)
from vtc.families import family_of, unwrap
from vtc.families.base import Family, Retriever, Transformer
from vtc.registry import create, entries, resolve
from vtc.retrieval import check_vector_reducer
from vtc.verify.memory import ensure


class Handle(BaseHandle):
    """A patch on a vision-language model: :attr:`reducer`, :attr:`stats`, :meth:`remove`, as every patch has them."""

    family: Family

    def __init__(self, model: nn.Module, family: Family, reducer: Reducer, strict: bool) -> None:
        super().__init__(model, family, reducer, strict)
        parts = tuple(reducer.parts())  # made once: the engine tells parts apart by identity
        self.tower = TowerSide(family, parts)
        self.text = TextSide(family, parts, self.tower, self.stats, strict)
        self.neurons = NeuronSide(family, parts, self.text)
        self._told = False  # whether embeddings without pictures need no (further) remark

    def attach(self, model: nn.Module) -> None:
        """Put all hooks on."""
        undo = self._undo
        undo.step(_forget_graphs)
        for side in (self.tower, self.text, self.neurons):
            side.install(undo)
        undo.pre_hook(model, self.before_model, with_kwargs=True)
        undo.hook(model, self.forget_labels, always_call=True)
        for name, guard in {
            upstream.GENERATE: self.guard_generate,
            **dict.fromkeys(upstream.BATCHING, self.refuse_batching),
        }.items():
            original = getattr(model, name, None)
            if original is not None:
                undo.attribute(model, name, functools.wraps(original)(functools.partial(guard, original)))
        _forget_graphs()

    def check_idle(self) -> None:
        """Raise :class:`PatchError` while a call is running."""
        super().check_idle()
        if self.text.running:
            raise PatchError("the model is running: patch and unpatch between calls, not during one")

    # --------------------------------------------------------------------------------------------------------- answers
    @property
    def prompt_length(self) -> int | tuple[int, ...] | None:
        """How many tokens of each row are the prompt, where a call brings prompt and answer together.

        Reducers that look at the question or at the last token then see what they see in ``generate``: answer tokens decide
        nothing, and a forward over prompt and answer gives the logits of generating it. Padding and placeholders count. Give a
        number for all rows, or one for each; it holds until it is set again. ``None``, the default: ``labels`` say it, if the call
        has them and they are masked (-100) between a row's last picture and its answer.
        """
        lengths = self.text.prompt_length
        return lengths if lengths is None or len(lengths) > 1 else lengths[0]

    @prompt_length.setter
    def prompt_length(self, value: int | Sequence[int] | torch.Tensor | None) -> None:
        if value is not None:
            given = torch.as_tensor(value)
            if (
                given.dtype.is_floating_point
                or given.dtype == torch.bool
                or given.dim() > 1
                or not given.numel()
                or (given < 1).any()
            ):
                raise UnknownArgumentError(
                    f"prompt_length={shown(value)}: give the number of prompt tokens, or one for each row, or None"
                )
            value = tuple(given.reshape(-1).tolist())
        self.text.prompt_length = value

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the labels of a call of the whole model for its base, which is not given them; say once if embeddings come alone."""
        if not self._told and kwargs.get(upstream.EMBEDS) is not None and upstream.brings_nothing(kwargs):
            self._told = True
            warnings.warn(
                "inputs_embeds came without pixel_values: if image features are merged into them already, this call is not "
                "reduced (it counts as text_only): pass input_ids and pixel_values instead",
                stacklevel=2,
            )
        labels = kwargs.get(upstream.LABELS)
        if labels is None and len(args) > 1:
            names = list(inspect.signature(module.forward).parameters)
            labels = args[names.index(upstream.LABELS)] if upstream.LABELS in names[: len(args)] else None
        if labels is not None:
            LABELS.set(labels)

    @staticmethod
    def forget_labels(*_: Any) -> None:
        """Leave none behind, also where the forward raised."""
        if LABELS.get() is not None:
            LABELS.set(None)

    # --------------------------------------------------------------------------------------------------------- export
    def export(self, path: str | Path) -> Path:
        """Write which visual tokens of the most recent call's images survived, for engines that serve the model without vtc.

        ``<path>.safetensors`` holds for image ``i``, in the order of the prompt, ``image.<i>.keep`` (bool, one entry per
        placeholder token: it is in the last decoder layer) and, where tokens were merged, ``image.<i>.owner`` (int64: the
        placeholder whose token each one went into, -1 if dropped). ``<path>.json`` says which reducer and model it was, whether
        positions are kept or renumbered, and for every image its grids, and its tokens in each decoder layer. An engine that takes
        precomputed image embeddings applies a mask by handing over the embeddings it marks; that is all of a reducer's work if it
        acts before the language model and merges nothing.

        Parameters
        ----------
        path : str or Path
            Where to; a suffix is replaced.

        Returns
        -------
        Path
            The safetensors file.

        Raises
        ------
        VtcError
            If no call with images has been made yet.
        """
        call = next((c for c in reversed(list(self.stats)) if c.images), None)
        if call is None:
            raise VtcError("there is nothing to export yet: run the patched model on an image first")
        tensors, images = {}, []
        for i, (image, kept) in enumerate(zip(call.images, self.stats.kept, strict=True)):
            tensors[f"image.{i}.keep"] = kept.mask
            if kept.owner is not None:
                tensors[f"image.{i}.owner"] = kept.owner
            images.append({"grids": kept.layout.grids, "merged": kept.owner is not None, **dataclasses.asdict(image)})
        described = {
            "reducer": repr(self.reducer),
            "model": self.family.name,
            "positions": sorted({part.position_policy for part in self.reducer.parts()}),
            "images": images,
        }
        file = Path(path).with_suffix(".safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
        file.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        return file

    # --------------------------------------------------------------------------------------------------------- guards
    def guard_generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Refuse what cannot work before anything runs; otherwise ``generate`` as it is."""
        check_cache(upstream.check_generation(self._model(), original, args, kwargs))
        self.text.check_implementation()
        told = self.check_merged(args, kwargs)
        token = MADE.set([])
        try:
            with self.running():
                return original(*args, **kwargs)
        finally:
            self._told = told
            MADE.reset(token)

    def check_merged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Refuse embeddings whose ids show placeholders where no pictures are given: these are in the embeddings already.

        Returns
        -------
        bool
            What ``_told`` is to be afterwards; meanwhile it is True where the ids show that there is no picture.
        """
        told, ids = self._told, kwargs.get(upstream.IDS, args[0] if args else None)
        if ids is None or kwargs.get(upstream.EMBEDS) is None or not upstream.brings_nothing(kwargs):
            return told
        marks = torch.tensor([token for tokens in self.text.token_ids.values() for token in tokens])
        count = int(torch.isin(ids.cpu(), marks).sum())
        if count:
            self._unreduced(
                f"the prompt has {count} visual tokens whose features are already in inputs_embeds, where nothing can be reduced: "
                "pass input_ids and pixel_values instead"
            )
        self._told = True
        return told

    def _unreduced(self, message: str) -> None:
        if self.strict:
            raise NotReducedError(message)
        warnings.warn(message, stacklevel=4)

    @staticmethod
    def refuse_batching(original: Callable[..., Any], *_args: Any, **_kwargs: Any) -> Any:
        """Continuous batching keeps a paged cache that cannot be shortened."""
        raise UnsupportedFeatureError(
            f"continuous batching ({original.__name__}) cannot be used with a reducer: use generate()"
        )


def patch(
    model: nn.Module,
    reducer: str | Reducer | Sequence[str | Reducer],
    *,
    strict: bool = True,
    **options: Any,
) -> BaseHandle:
    """Attach a visual-token reducer to one model instance.

    The model keeps its interface: prompts, ``generate``, logits and labels stay as they are; only the decoder layers (and, for
    reducers that act there, the vision tower) run on fewer tokens, and the KV cache is really shorter. Patching a patched model
    replaces the reducer. Other instances of the class are not affected.

    Parameters
    ----------
    model : Module
        A Hugging Face vision-language model (PEFT, DDP and ``torch.compile`` wrappers are looked through), a vision transformer
        of timm (``"tome"``, ``"tokenpooling"``, ``"skipspan"``), or a multi-vector retriever (``"hierpool"``; see
        :mod:`vtc.retrieval`).
    reducer : str, Reducer or list
        A method's name, ``"method.preset"``, a :class:`vtc.Reducer`, a list of reducers of different stages, or a folder with a
        setting in it (:func:`patch_from`).
    strict : bool, default True
        Raise :class:`vtc.errors.NotReducedError` when a call with images was not reduced; ``False`` warns instead.
    **options
        The reducer's options: ``keep=64`` (tokens per image) or ``keep=0.25`` (share), ``avg_tokens``, ``positions``,
        ``newlines`` and those of the method (``vtc info NAME``).

    Returns
    -------
    Handle
        With :attr:`~Handle.stats` and :meth:`~Handle.remove`; usable in a ``with`` statement.

    Raises
    ------
    UnsupportedModelError, UnsupportedSignalError, UnsupportedFeatureError
        The model, a signal of it, its attention implementation, or how it is spread over ranks cannot serve the reducer; or a
        small copy of the model failed the check that is made where neither an adapter nor a tested version vouches for it
        (:func:`vtc.verify.memory.ensure`).
    UnknownReducerError, UnknownArgumentError, BudgetError
        The request makes no sense; the message says what would.
    PatchError
        The model is running.
    """
    _window.warn("transformers")
    parallel.check_copies(model)
    given, model = model, unwrap(model)
    if saved.is_saved(reducer):
        if options:
            raise UnknownArgumentError(
                f"options {sorted(options)} came with the saved setting '{reducer}', which has its own: name the reducer instead"
            )
        wanted, strict = saved.load(reducer, saved.kind_of(model))  # type: ignore[arg-type]
    else:
        wanted = resolve(reducer, **options)  # type: ignore[arg-type]
    old: BaseHandle | None = vars(model).get(ATTRIBUTE)
    if old is not None:
        old.check_idle()
    family = family_of(model)
    if isinstance(family, Transformer):
        bound = bind_vit(wanted, family)
        parallel.check(family, bound.parts(), given)
        handle: BaseHandle = VitHandle(model, family, bound, strict)
    elif isinstance(family, Retriever):
        handle = RetrieverHandle(model, family, check_vector_reducer(wanted), strict)
    else:
        bound = bind(wanted, family.facts)
        for part in bound.parts():
            if part.wants_clips and family.frames:
                warnings.warn(
                    f"'{part.name}' compares the frames of a clip, and to '{family.name}' they are {family.frames}, each a picture "
                    "of its own: the tokens of every frame are spread evenly",
                    stacklevel=2,
                )
        upstream.check_cache_classes()
        parallel.check_stages(family)
        parallel.check(family, bound.parts(), given)
        handle = Handle(model, family, bound, strict)  # what is not there is said before anything runs
        handle.text.check_implementation()
        ensure(model, family, bound)
    try:
        if old is not None:
            old.remove()
        else:
            sweep(model)
        handle.install(model)
    except BaseException:
        if old is not None and not old.active:  # nothing half-done: the previous patch is back
            old.install(model)
        raise
    return handle


def patch_from(folder: str | Path, model: nn.Module) -> BaseHandle:
    """Patch a model as a folder's ``vtc_config.json`` says, which :meth:`Handle.save_pretrained` wrote.

    Parameters
    ----------
    folder : str or Path
        Its folder, for example the one the model was loaded from.
    model : Module
        As in :func:`patch`.

    Returns
    -------
    Handle

    Raises
    ------
    InputFileError, ConfigError
        There is no such file, it is damaged, of another version of vtc, or for another kind of model.
    VtcError
        What :func:`patch` refuses.
    """
    reducer, strict = saved.load(folder, saved.kind_of(unwrap(model)))
    return patch(model, reducer, strict=strict)


def bind(reducer: Reducer, facts: Facts) -> Reducer:
    """Resolve a reducer for a model; raise where stage, layer, signal or positions cannot be served."""
    reducer = late_enough(reducer, facts.first_layer)
    bound = (keep_positions(reducer) if facts.mrope else reducer).bind(facts)
    for part in bound.parts():
        reason = facts.stages.get(part.stage, "not known to this adapter")
        if reason:
            raise UnsupportedFeatureError(
                f"'{part.name}' acts at the stage '{part.stage.value}', which this model refuses: {reason}"
            )
        if part.stage is Stage.DECODER and not facts.first_layer <= part.layer < facts.layers:
            raise UnknownArgumentError(
                f"'{part.name}': layer {part.layer} is out of range, use {facts.first_layer}..{facts.layers - 1} (reducers before "
                "the first layer act at the boundary)"
            )
        if getattr(part, "weighs_pool", False):
            raise UnknownArgumentError(
                f"'{part.name}': a head's average is weighted by size in a vision transformer without language model only: drop "
                "the option"
            )
        if part.position_policy == "compact" and facts.mrope:
            raise UnknownArgumentError(f"'{part.name}': positions cannot be compacted under M-RoPE, pass positions='original'")
        for need in part.needs:
            try:
                check_signal(need, facts)
            except UnsupportedSignalError as error:
                raise UnsupportedSignalError(
                    f"'{part.name}': {error}; these reducers work here: {', '.join(usable(facts))}"
                ) from None
            count = facts.layers if need.source == "text" else facts.encoder_layers
            if not -count <= need.layer < count:
                raise UnknownArgumentError(
                    f"'{part.name}' taps '{need.name}' of {need.source} layer {need.layer}, which is out of range: use "
                    f"{-count}..{count - 1}"
                )
    shrinks = next((p for p in bound.parts() if p.stage is Stage.IMAGE), None)
    for part in bound.parts():
        if shrinks is not None and any(need.source == "vision" for need in part.needs):
            raise UnsupportedFeatureError(
                f"'{part.name}' reads signals of the full-size vision tower, which '{shrinks.name}' shrinks: compose "
                f"'{shrinks.name}' with a reducer that needs none of them (`vtc list` shows what each needs)"
            )
    return bound


def check_signal(need: Need, facts: Facts) -> None:
    """Raise :class:`UnsupportedSignalError` if a model with these facts cannot give a signal."""
    used = need.resolve(facts.provides)
    if used.source == "vision" and used.of in facts.missing:
        raise UnsupportedSignalError(f"signal '{need.name}' is read from the vision tower, but {facts.missing[used.of]}")
    if used.source == "vision" and used.of == "attention" and used.layer % facts.encoder_layers in facts.windowed:
        whole = [str(i) for i in range(facts.encoder_layers) if i not in facts.windowed]
        raise UnsupportedSignalError(
            f"signal '{need.name}' is read from tower layer {used.layer}, where attention sees only a window: choose one of the "
            f"layers {', '.join(whole)} where the method has an option for it"
        )


def late_enough(reducer: Reducer, first: int) -> Reducer:
    """Return a reducer whose decoder layer, where it is not asked for, is not before the ``first`` that can be shortened."""
    if isinstance(reducer, Compose):
        return dataclasses.replace(reducer, members=tuple(late_enough(m, first) for m in reducer.members))
    moves = isinstance(reducer.layer, Usual) and reducer.layer < first
    return dataclasses.replace(reducer, layer=first) if moves else reducer  # type: ignore[call-arg]


def keep_positions(reducer: Reducer) -> Reducer:
    """Return a reducer whose positions, where they are not asked for, are the original ones: M-RoPE has no others."""
    if isinstance(reducer, Compose):
        return dataclasses.replace(reducer, members=tuple(keep_positions(m) for m in reducer.members))
    possible = reducer.positions is None and "original" in reducer.allowed_positions
    return dataclasses.replace(reducer, positions="original") if possible else reducer


def usable(facts: Facts, fits: Callable[[tuple[Reducer, ...]], bool] | None = None) -> list[str]:
    """Return the names of the registered reducers whose stages and signals a model with these facts can serve.

    ``fits`` says of the parts of one whether something else stands against it.
    """
    names = []
    for name in entries():
        try:
            bound = create(name, keep=0.5).bind(facts)
            for part in bound.parts():
                if facts.stages.get(part.stage, "unknown"):
                    raise UnsupportedFeatureError(part.stage.value)
                for need in part.needs:
                    check_signal(need, facts)
        except VtcError:  # refused: not usable here
            continue
        if fits is None or fits(bound.parts()):
            names.append(name)
    return names


def unpatch(model: nn.Module) -> nn.Module:
    """Remove vtc from a model, bit for bit; a model that is not patched is returned as it is.

    It may be called again after anything, an interrupt in the middle of ``patch`` or ``unpatch`` included.
    """
    inner = unwrap(model)
    handle: Handle | None = vars(inner).get(ATTRIBUTE)
    if handle is not None:
        handle.remove()
    else:
        sweep(inner)
    return model


def handle_of(model: nn.Module) -> Handle | None:
    """Return the handle of a patched model, or None."""
    return vars(unwrap(model)).get(ATTRIBUTE)


def _forget_graphs() -> None:
    """Drop compiled graphs: dynamo does not guard on hooks, so a graph made before would go on without (or with) ours."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
