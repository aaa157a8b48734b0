"""The vocabulary of vtc: stages, needs, signals, layouts, selections, budgets and the reducer base classes.

A **reducer** is a frozen dataclass with one pure function, :meth:`Reducer.select`: tensors in (:class:`Signals`), surviving slots
out (:class:`Selection`). It never sees a model, a processor or token ids. It declares at which :class:`Stage` it acts and which
signals it :attr:`~Reducer.needs`; the engine taps them, asks the reducer, and makes the sequence physically shorter.

Shapes: ``B`` images that share one :class:`Layout`, ``N`` candidate visual tokens per image, ``K`` survivors, ``D`` feature
width, ``d`` head dimension, ``H`` heads, ``V`` views (crops) of an image, ``P`` patches of a view.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import (
    BudgetError,
    InvalidSignalError,
    UnknownArgumentError,
    UnsupportedFeatureError,
    UnsupportedSignalError,
    shown,
)

Positions = Literal["original", "compact"]
Newlines = Literal["compete", "all", "with_row", "none"]
Per = Literal["image", "frame"]


class Stage(enum.Enum):
    """Where in the model a reducer acts, in the order data passes."""

    IMAGE = "image"
    """On the pixels, before the vision tower: the tower itself sees fewer patches."""
    ENCODER = "encoder"
    """Between layers of the vision tower: later layers of the tower run on fewer tokens."""
    VISION = "vision"
    """On the tower's output, before the projector: the projector and everything after run on fewer tokens."""
    BOUNDARY = "boundary"
    """Between the projector and the first decoder layer of the language model."""
    DECODER = "decoder"
    """Before one decoder layer: this layer and all later ones, and their KV caches, hold fewer tokens."""

    @property
    def in_tower(self) -> bool:
        """Whether the stage comes before the projector (at most one reducer may act there)."""
        return self in (Stage.IMAGE, Stage.ENCODER, Stage.VISION)


# ------------------------------------------------------------------------------------------------------------- needs
@dataclass(frozen=True)
class Need:
    """One signal a reducer asks for.

    Parameters
    ----------
    name : str
        Key under which the signal appears in :class:`Signals` (see :mod:`vtc.signals` for the ready-made ones).
    source : {"vision", "text"}
        Which attention stack is tapped: the vision tower or the language model.
    layer : int
        Layer whose attention is tapped; negative counts from the end.
    measure : callable
        Pure function of a :class:`vtc.signals.AttentionTap` that reduces q, k, v to a small tensor.
    requires : str
        What the model must offer: ``"attention"`` or ``"cls"`` (a class token in the vision tower).
    axis : {"keys", "row"}
        ``"keys"``: the result has one entry per token, ``(B, K, ...)``, and is narrowed to each image's tokens.
        ``"row"``: one entry per sequence (text) or view (vision), ``(B, ...)``.
    substitute : Need or None
        Signal used instead, under the same name, where ``requires`` is not met. The substitution shows in the statistics.
    of : {"attention", "preview", "hidden", "rotation", "attention_update", "mlp_update", "neurons", "projection", "pixels"}
        What the measure is given; a tower offers ``"attention"`` and the last two, a language model all but these two.

        - ``"attention"``: q, k, v as the layer's attention uses them (:class:`vtc.signals.AttentionTap`);
        - ``"preview"``: the same for the tokens there *before* the reducers of this very layer act: the layer's norm and
          projections run once more, on the longer sequence, which methods that rank with the next layer's attention pay for;
        - ``"hidden"``: the states entering the layer, before its reducers act (:class:`vtc.signals.StateTap`);
        - ``"rotation"``: cosines and sines of the positions of these tokens (:class:`vtc.signals.RotationTap`);
        - ``"attention_update"``, ``"mlp_update"``: what the layer's attention or MLP is given and what it returns;
        - ``"neurons"``: what the MLP's last projection is given;
        - ``"projection"``: what the projector is given, and the projector itself as a function
          (:class:`vtc.signals.ProjectionTap`); ``layer`` means nothing;
        - ``"pixels"``: the views as the tower is given them (:class:`vtc.signals.PixelTap`); ``layer`` means nothing.
    uses : tuple of Need
        Signals of earlier layers the measure reads, by name, from the tap's ``given``, narrowed to the tokens of this tap.
    """

    name: str
    source: Literal["vision", "text"]
    layer: int
    measure: Callable[..., Tensor]
    requires: str = "attention"
    axis: Literal["keys", "row"] = "keys"
    substitute: Need | None = None
    of: Literal[
        "attention", "preview", "hidden", "rotation", "attention_update", "mlp_update", "neurons", "projection", "pixels"
    ] = "attention"
    uses: tuple[Need, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        """Identity of the signal: two reducers that ask for the same one share a tap."""
        return self.name, self.source, self.layer

    def resolve(self, provides: frozenset[str]) -> Need:
        """Return this need or its substitute, whichever the model ``provides``; raise if neither."""
        if self.requires in provides:
            return self
        if self.substitute is not None:
            return dataclasses.replace(self.substitute.resolve(provides), name=self.name)
        raise UnsupportedSignalError(f"signal '{self.name}' needs '{self.requires}', which this model does not have")


# ------------------------------------------------------------------------------------------------------------ layout
class Kind(enum.IntEnum):
    """What a visual slot stands for."""

    PATCH = 0
    NEWLINE = 1
    SEPARATOR = 2


@dataclass(frozen=True, eq=False)
class Layout:
    """Geometry of one image's visual entries, in the order the model lists them. All tensors are ``(N,)``, int64.

    Adapters make layouts on the CPU; :meth:`on` gives copies on other devices, made once: moving a tensor to a GPU makes the host
    wait for all the GPU has to do.

    Adapters return the *same object* for images of the same geometry: the engine batches images whose layouts are identical.

    Two kinds of layout exist: the *slot* layout (one entry per placeholder token, what the language model sees) and the *view*
    layout (one entry per patch of every view, what the tower sees; padding patches have ``slot == -1``).

    Attributes
    ----------
    kind : Tensor
        :class:`Kind` of each entry.
    view : Tensor
        View (crop or frame) the entry belongs to; 0 is the thumbnail where there is one. -1 for newlines.
    row, col : Tensor
        Position within the view's own patch grid.
    y, x : Tensor
        Position within the stitched picture of all crops (equal to ``row``, ``col`` for the thumbnail and plain images). For a
        newline: ``y`` of the row it closes.
    slot : Tensor
        Index into the image's run of placeholder tokens, or -1.
    grids : tuple of (int, int)
        Rows and columns of each view's patch grid.
    thumbnail : bool
        Whether view 0 is a low-resolution copy of the whole image and the other views are its crops.
    video : bool
        Whether the views are frames of one clip, in temporal order.
    """

    kind: Tensor
    view: Tensor
    row: Tensor
    col: Tensor
    y: Tensor
    x: Tensor
    slot: Tensor
    grids: tuple[tuple[int, int], ...]
    thumbnail: bool = False
    video: bool = False

    def __len__(self) -> int:
        """Return the number of entries."""
        return self.kind.shape[0]

    @functools.cached_property
    def _copies(self) -> dict[torch.device, Layout]:
        return {self.kind.device: self}

    @torch.inference_mode(False)  # what is kept may serve a later call that wants gradients
    def on(self, device: torch.device) -> Layout:
        """Return this layout with its tensors on ``device``, the same object every time."""
        if device not in self._copies:
            names = ("kind", "view", "row", "col", "y", "x", "slot")
            tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
            made = dataclasses.replace(self, **tensors)
            # found here, not there: what the host reads from a GPU it waits for
            made.__dict__.update({k: getattr(self, k).to(device, non_blocking=True) for k in ("patches", "newlines")})
            self._copies[device] = made
        return self._copies[device]

    @functools.cached_property
    @torch.inference_mode(False)
    def patches(self) -> Tensor:
        """Ascending ``(n,)`` entries that are patches with a slot."""
        return self.is_patch.nonzero()[:, 0]

    @functools.cached_property
    @torch.inference_mode(False)
    def every(self) -> Tensor:
        """All entries, ``(N,)``."""
        return torch.arange(len(self))

    @functools.cached_property
    @torch.inference_mode(False)
    def newlines(self) -> Tensor:
        """Ascending ``(n,)`` entries that are newlines."""
        return (self.kind == Kind.NEWLINE).nonzero()[:, 0]

    @property
    def views(self) -> int:
        """Number of views of the image."""
        return len(self.grids)

    @functools.cached_property
    def has_newlines(self) -> bool:
        """Whether the image has newline tokens."""
        return len(self.newlines) > 0

    @property
    def is_patch(self) -> Tensor:
        """Boolean ``(N,)``: the entry is a patch that has a slot (neither newline nor padding)."""
        return (self.kind == Kind.PATCH) & (self.slot >= 0)

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def grid(rows: int, cols: int) -> Layout:
        """Return the layout of one plain image: ``rows * cols`` patches in raster order, one slot each. Always the same object."""
        n = torch.arange(rows * cols)
        r, c = n // cols, n % cols
        zero = torch.zeros_like(n)
        return Layout(zero, zero, r, c, r, c, n, ((rows, cols),))

    @staticmethod
    def flat(n: int) -> Layout:
        """Return the layout of ``n`` tokens whose geometry is unknown (one row)."""
        return Layout.grid(1, n)


# ----------------------------------------------------------------------------------------------------------- signals
@dataclass(frozen=True, eq=False)
class Signals:
    """What a reducer sees: tensors of ``B`` images that share one layout.

    Attributes
    ----------
    features : Tensor
        ``(B, N, D)``. At ``VISION``: the tower's patch features (all views, view-major). At ``BOUNDARY``: projected features.
        At ``DECODER``: the hidden states entering the layer.
    layout : Layout
        Geometry of the image (slot layout; at ``VISION`` and ``ENCODER`` the view layout).
    entries : Tensor
        ``(B, N)`` index into ``layout`` of every token: which slot it is. Not simply ``0..N-1`` once an earlier stage has
        dropped tokens or newlines do not compete.
    budget : int
        Tokens to keep of these ``N`` (already resolved and clamped to ``N``).
    slots : int
        Visual slots the unreduced image has.
    taps : mapping
        The tapped signals by name: ``(B, N, ...)``, or ``(B, ...)`` for row signals.
    cls : Tensor or None
        ``VISION`` only: ``(B, V, D)`` class-token features of each view.
    text, text_mask : Tensor or None
        ``(B, T, D)`` embeddings of the prompt's text tokens and their validity, where the reducer asked for them.
    fingerprint : tuple of int
        One integer per image, an exact function of its pixels: seeds for reproducible per-image randomness.
    listed : Tensor or None
        ``(N,)`` on the CPU: the entries of every image, where the engine knows them (read :attr:`known`).
    history : tuple
        Per image, for every earlier stage of the same method in this forward: how many tokens it was shown and how many it kept.
    """

    features: Tensor
    layout: Layout
    entries: Tensor
    budget: int
    slots: int
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    cls: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    fingerprint: tuple[int, ...] = ()
    listed: Tensor | None = None
    history: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def known(self) -> Tensor | None:
        """``(N,)`` on the CPU: the entries of every image. ``None``: only the device knows them, the host would have to wait."""
        n = self.entries.shape[1]
        if n == len(self.layout):
            return self.layout.every
        return self.listed if self.listed is not None and len(self.listed) == n else None

    def __getattr__(self, name: str) -> Tensor:
        """Give tapped signals as attributes (``signals.cls_attn``); an absent one raises with its name."""
        taps = self.__dict__.get("taps", {})
        if name in taps:
            return taps[name]
        raise AttributeError(f"no signal '{name}': declare it in the reducer's `needs` (present: {sorted(taps) or 'none'})")

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, N)``."""
        return self.features.shape[0], self.features.shape[1]

    def of(self, attribute: str) -> Tensor:
        """Return a layout attribute (``"row"``, ``"view"`` ...) of every token, ``(B, N)`` on the features' device."""
        return getattr(self.layout.on(self.entries.device), attribute)[self.entries]

    def check(self, where: str, later: list[tuple[str, Tensor]] | None = None) -> Signals:
        """Raise :class:`InvalidSignalError` if a signal holds NaN or infinite values; return ``self``.

        Parameters
        ----------
        where : str
            The place, for the message.
        later : list or None
            A GPU's answers are appended here, for :func:`settle` to look at when all work is under way: reading them at once would
            make the host wait. ``None``: wait.
        """
        answers = [
            (f"signal '{name}' at {where}", all_finite(value))
            for name, value in {"features": self.features, **self.taps}.items()
            if value.is_floating_point()
        ]
        tell(answers, later)
        return self


def all_finite(value: Tensor) -> Tensor:
    """A number that is finite exactly if all of a tensor's are: 0-dimensional, on its device, in one pass over memory."""
    value = value.detach()
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    if value.device.type != "cpu":
        return torch.linalg.vector_norm(value, torch.inf, dtype=wide) if value.numel() else value.new_zeros((), dtype=wide)
    total = value.sum(dtype=wide)  # on a CPU over 30 times as fast; one that is not finite may have overflowed
    return total if torch.isfinite(total) or not torch.isfinite(value).all() else torch.zeros_like(total)


def tell(answers: list[tuple[str, Tensor]], later: list[tuple[str, Tensor]] | None) -> None:
    """:func:`settle` at once what the CPU knows, or everything where there is no ``later`` list that takes a GPU's answers."""
    settle([a for a in answers if later is None or a[1].device.type == "cpu"])
    if later is not None:
        later += [a for a in answers if a[1].device.type != "cpu"]


@contextlib.contextmanager
def explained(answers: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Where the body of a ``with`` block raises, let numbers that are not finite explain it, if there are any (:func:`settle`)."""
    try:
        yield
    except Exception:
        settle(answers)
        raise


def settle(answers: list[tuple[str, Tensor]]) -> None:
    """Raise :class:`InvalidSignalError` for the first signal that was not finite. One host synchronisation, if any answer waits."""
    if not answers:
        return
    numbers, device = [number for _, number in answers], answers[0][1].device
    if any(n.dtype != numbers[0].dtype or n.device != device for n in numbers):  # (a model may be spread over several GPUs)
        numbers = [n.to(device, torch.float64) for n in numbers]
    for (what, _), number in zip(answers, torch.stack(numbers).tolist(), strict=True):
        if not math.isfinite(number):
            raise InvalidSignalError(
                f"{what} contains NaN or infinite values: run the model in bfloat16 or float32, or check the input image"
            )


# --------------------------------------------------------------------------------------------------------- selection
@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens survive.

    Attributes
    ----------
    index : Tensor
        ``(B, K)`` int64, ascending and unique per image: positions within the ``N`` tokens the reducer was shown.
    features : Tensor or None
        ``(B, K, D)`` new features of the survivors, in sequence order (mergers); ``None`` keeps their own.
    owner : Tensor or None
        ``(B, N)`` int64: the survivor (``0..K-1``) each token was merged into, -1 if it was discarded. For pictures and for
        conservation tests; ``None`` means that every survivor stands for itself alone.
    valid : Tensor or None
        ``(B, K)`` bool, where images keep different numbers: False entries of ``index`` are padding. ``None``: all count.
    note : str
        Anything the user should read in the statistics (for example a substituted signal).
    weight : Tensor or None
        ``DECODER`` only: ``(B, K)`` float32 of at least 1, how many tokens each survivor counts for: its logarithm is added to the
        attention logits of the survivor's key from this layer on. ``None``: one.
    slotted : bool
        Promise that no survivor is a padding patch (one without a slot): otherwise the host must wait for a GPU to count them.
    """

    index: Tensor
    features: Tensor | None = None
    owner: Tensor | None = None
    valid: Tensor | None = None
    note: str = ""
    slotted: bool = False
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes early, so that a faulty reducer fails at its own door."""
        if self.index.dim() != 2 or self.index.dtype != torch.int64:
            raise ValueError(f"Selection.index must be (B, K) int64, got {tuple(self.index.shape)} {self.index.dtype}")
        if self.features is not None and self.features.shape[:2] != self.index.shape:
            raise ValueError(f"Selection.features {tuple(self.features.shape)} does not match index {tuple(self.index.shape)}")

    @staticmethod
    def all(n: int, batch: int, device: torch.device | str = "cpu") -> Selection:
        """Return the selection that keeps every one of ``n`` tokens."""
        return Selection(torch.arange(n, device=device).expand(batch, n).contiguous())


# ------------------------------------------------------------------------------------------------------------ budget
@dataclass(frozen=True)
class Budget:
    """How many visual tokens may stay.

    Exactly one of the two is given.

    Parameters
    ----------
    keep : int or float or None
        Visual tokens per image that enter the stage; a float in (0, 1] is a share of the image's visual tokens.
    avg_tokens : int or float or None
        Visual tokens averaged over the decoder layers (the compute-equivalent budget); a float in (0, 1] is a share.
    """

    keep: int | float | None = None
    avg_tokens: int | float | None = None

    def __post_init__(self) -> None:
        """Refuse anything that is not a usable number."""
        if (self.keep is None) == (self.avg_tokens is None):
            raise BudgetError("give exactly one of keep= (tokens entering the stage) and avg_tokens= (average over the layers)")
        name, value = ("keep", self.keep) if self.keep is not None else ("avg_tokens", self.avg_tokens)
        check_amount(name, value)

    @property
    def amount(self) -> int | float:
        """The number given, whichever of the two it is."""
        return self.keep if self.keep is not None else self.avg_tokens  # type: ignore[return-value]

    def exceeds(self, n: int) -> bool:
        """Whether the budget is a number of tokens above ``n``: an image with so few is kept whole."""
        return isinstance(self.amount, int) and self.amount > n

    def tokens(self, n: int, *, start: int = 0, layers: int = 1, rounding: Callable[[float], int] = round) -> int:
        """Return the number of tokens to keep of an image with ``n`` visual tokens, at least 1 and at most ``n``.

        ``start`` is the first decoder layer that runs on the shorter sequence and ``layers`` the number of decoder layers; they
        matter for ``avg_tokens`` only: ``avg = (start * n + (layers - start) * keep) / layers``.
        """
        amount = self.amount
        target = rounding(amount * n) if isinstance(amount, float) else amount
        if self.avg_tokens is not None and start > 0:
            exact = amount * n if isinstance(amount, float) else amount
            target = rounding((exact * layers - start * n) / (layers - start))
            if target < 1:
                raise BudgetError(
                    f"avg_tokens={amount} cannot be met when the first {start} of {layers} layers run on all {n} tokens: "
                    f"use at least {math.ceil((start * n + layers - start) / layers)} or an earlier layer"
                )
        return max(1, min(int(target), n))


def amount(value: Any) -> Any:
    """Return a budget as a number where it came as text: ``"64"`` is a number of tokens, ``"0.25"`` and ``"25%"`` are shares.

    Anything else comes back as it is, for :func:`check_amount` to refuse.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        return value


def check_amount(name: str, value: Any) -> None:
    """Raise :class:`BudgetError` unless ``value`` is a positive int or a float in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BudgetError(f"{name}={shown(value)} is not a number: use tokens, as in 64, or a share, as in 0.25 or 25%")
    if isinstance(value, float) and not 0.0 < value <= 1.0:  # NaN fails both comparisons
        raise BudgetError(f"{name}={shown(value)} is out of range: a float is a share in (0, 1], an int is a number of tokens")
    if isinstance(value, int) and value < 1:
        raise BudgetError(f"{name}={shown(value)} is out of range: keep at least one visual token")


# ------------------------------------------------------------------------------------------------------- model facts
@dataclass(frozen=True)
class Facts:
    """What a reducer may know about a model: numbers, never modules.

    Attributes
    ----------
    family : str
        Name of the family adapter.
    layers, encoder_layers : int
        Decoder layers of the language model, layers of the vision tower.
    feature_layer : int
        Index (non-negative) of the tower layer whose output feeds the projector.
    tokens : int or None
        Visual tokens of one image where that is fixed, ``None`` where it depends on the image.
    max_tokens : int or None
        Largest number of visual tokens one image can have, where known.
    max_views : int
        Largest number of views one image can have.
    grid : tuple of (int, int)
        Patch grid of one view.
    has_cls : bool
        Whether the tower has a class token.
    provides : frozenset of str
        Signals requirements met by the model: ``"attention"``, ``"cls"`` ...
    stages : mapping from Stage to str
        Supported stages map to ``""``; refused ones to the reason.
    merge : int
        Patches that a module at the end of the tower merges into one visual token, where reducers act in front of it.
    no_merging : str
        Why tokens cannot be merged inside the tower's layers; empty if they can.
    anyres : bool
        Whether one image is cut into several views.
    mrope : bool
        Whether positions are multi-dimensional (then they cannot be compacted).
    first_layer : int
        First decoder layer at which a ``DECODER`` reducer may act.
    missing : mapping
        Vision signals that cannot be tapped, by what they are ``of`` (:class:`Need`), and the reason.
    windowed : tuple of int
        Tower layers whose attention sees only a window: no signals of attention there.
    """

    family: str
    layers: int
    encoder_layers: int
    feature_layer: int
    tokens: int | None
    max_tokens: int | None
    grid: tuple[int, int]
    has_cls: bool
    provides: frozenset[str]
    stages: Mapping[Stage, str]
    max_views: int = 1
    merge: int = 1
    no_merging: str = ""
    anyres: bool = False
    mrope: bool = False
    first_layer: int = 1
    missing: Mapping[str, str] = field(default_factory=dict)
    windowed: tuple[int, ...] = ()


# ---------------------------------------------------------------------------------------------------------- reducers
@dataclass(frozen=True, kw_only=True)
class Reducer:
    """Base class: a frozen dataclass with one pure function.

    Subclasses set :attr:`stage`, implement :meth:`select` (or, for ``IMAGE``, :meth:`resize`; for ``ENCODER``, :meth:`step`) and
    declare :attr:`needs`. Instances hold options only, never state: everything of one call arrives in :class:`Signals`.

    Parameters
    ----------
    keep : int or float or None
        Visual tokens per image that enter the stage (int), or the share of them (float in (0, 1]).
    avg_tokens : int or float or None
        Alternative to ``keep``: visual tokens averaged over the decoder layers.
    positions : {"original", "compact"} or None
        RoPE positions of the survivors: ``"original"`` keeps the gaps, ``"compact"`` renumbers ``0..n-1`` from this stage on, as
        splicing shortened features into the prompt does. ``None``: what the method's release does.
    newlines : {"compete", "all", "with_row", "none"} or None
        AnyRes newline tokens: ordinary candidates, always kept, kept where their row keeps a patch, or dropped. ``None``: what
        the method's release does. Newlines kept by ``"all"`` and ``"with_row"`` come on top of the budget and are reported.
    per : {"image", "frame"}
        What the budget counts the tokens of: an image or a whole clip, or every frame of a clip (an image is one frame).
    """

    stage: ClassVar[Stage]
    default_positions: ClassVar[Positions] = "compact"
    allowed_positions: ClassVar[tuple[Positions, ...]] = ("original", "compact")
    default_newlines: ClassVar[Newlines] = "none"
    decides_itself: ClassVar[bool] = False
    """The stage finds its own number of survivors; ``budget`` means nothing to it."""
    budget_options: ClassVar[tuple[str, ...]] = ("keep", "avg_tokens")
    """Options of which exactly one says how much to keep: one given replaces a preset's."""
    wants_text: ClassVar[bool] = False
    wants_cls: ClassVar[bool] = False
    wants_fingerprint: ClassVar[bool] = False
    wants_clips: ClassVar[bool] = False
    """The method compares the frames of a clip; a picture alone gives it nothing to go by."""
    kind: ClassVar[str] = "select"
    name: ClassVar[str] = ""

    keep: int | float | None = None
    avg_tokens: int | float | None = None
    positions: Positions | None = None
    newlines: Newlines | None = None
    per: Per = "image"

    def __post_init__(self) -> None:
        """Refuse unknown policies at once."""
        for option, known in (
            ("positions", self.allowed_positions),
            ("newlines", ("compete", "all", "with_row", "none")),
            ("per", ("image", "frame")),
        ):
            value = getattr(self, option)
            if value is not None and value not in known:
                raise UnknownArgumentError(
                    f"{self.name or type(self).__name__}: {option}={shown(value)} is not possible; use one of {', '.join(known)}"
                )

    @property
    def position_policy(self) -> Positions:
        """The positions in force: the option, or the method's own."""
        return self.positions or self.default_positions

    @property
    def newline_policy(self) -> Newlines:
        """The newline rule in force: the option, or the method's own."""
        return self.newlines or self.default_newlines

    @property
    def budget(self) -> Budget:
        """The budget; raises :class:`BudgetError` if neither or both of ``keep`` and ``avg_tokens`` are given."""
        return Budget(self.keep, self.avg_tokens)

    @property
    def needs(self) -> tuple[Need, ...]:
        """Signals to tap; may depend on the options (for example on ``layer``)."""
        return ()

    def decode_neurons(self, facts: Facts) -> tuple[Need, ...]:
        """MLP neurons that decoder layers go on with after the prompt: needs ``of="neurons"`` that give indices ``(B, M)``."""
        return ()

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence (0 for everything before the decoder)."""
        return 0

    @property
    def tower_layer(self) -> int | None:
        """``VISION`` in a vision transformer without language model: first block that runs on fewer tokens. ``None``: cannot."""
        return None

    def parts(self) -> tuple[Reducer, ...]:
        """The single-stage reducers this one consists of, in the order data passes them."""
        return (self,)

    def bind(self, facts: Facts) -> Reducer:
        """Return the reducer resolved for one model (fractions to layers, checks). Called once, when patching."""
        check_bounds(self.budget, facts)
        return self

    def count(self, n: int, facts: Facts) -> int:
        """Return how many of an image's ``n`` visual tokens to keep."""
        return self.budget.tokens(n, start=self.layer, layers=facts.layers)

    def wanted(self, layout: Layout, facts: Facts) -> int:
        """Return how many visual tokens to keep of the image or clip with this slot layout."""
        frames = layout.views if self.per == "frame" and layout.video else 1
        return frames * self.count(len(layout) // frames, facts)

    def select(self, signals: Signals) -> Selection:
        """Choose the survivors. Pure: depends on ``signals`` and the options only."""
        raise TypeError(f"{type(self).__name__} does not implement select()")

    def select_frames(self, signals: Signals) -> Selection | None:
        """Choose the survivors of every frame of clips; ``None``: each frame is to be shown to :meth:`select` by itself."""
        return None


def check_bounds(budget: Budget, facts: Facts) -> None:
    """Raise :class:`BudgetError` if an integer budget exceeds the tokens any image of this model can have."""
    if isinstance(budget.amount, int) and facts.max_tokens is not None and budget.amount > facts.max_tokens:
        name = "keep" if budget.keep is not None else "avg_tokens"
        raise BudgetError(
            f"{name}={budget.amount} is above the {facts.max_tokens} visual tokens an image can have on this model: "
            f"use at most {facts.max_tokens}, or a share such as {name}=0.25"
        )


class Scorer(Reducer):
    """A reducer that gives every token one number; the highest scores stay, ties go to the lowest index."""

    kind: ClassVar[str] = "score"

    def score(self, signals: Signals) -> Tensor:
        """Return scores ``(B, N)``, float32."""
        raise TypeError(f"{type(self).__name__} does not implement score()")

    def select(self, signals: Signals) -> Selection:
        """Keep the ``signals.budget`` highest scores."""
        from vtc.kernels import topk_sorted

        with torch.no_grad():
            return Selection(topk_sorted(self.score(signals), signals.budget))


class Merger(Reducer):
    """A reducer that assigns every token to one of ``K`` groups; a group becomes the weighted mean of its tokens.

    The merged token sits in the slot :meth:`anchors` names for its group.
    """

    kind: ClassVar[str] = "merge"

    def assign(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Return ``anchors (B, K)`` (ascending slots of the groups) and ``owner (B, N)`` (group of every token, -1 = discard)."""
        raise TypeError(f"{type(self).__name__} does not implement assign()")

    def select(self, signals: Signals) -> Selection:
        """Average the tokens of each group."""
        from vtc.kernels import merge_scatter

        with torch.no_grad():
            anchors, owner = self.assign(signals)
        merged = merge_scatter(signals.features, owner, anchors.shape[1])
        return Selection(anchors, merged, owner)


class Schedule(Reducer):
    """A method with several stages: :meth:`parts` lists them. The parts share the method's name and budget."""

    kind: ClassVar[str] = "schedule"

    def parts(self) -> tuple[Reducer, ...]:
        """The single-stage reducers, in the order data passes them."""
        raise TypeError(f"{type(self).__name__} does not implement parts()")


class Usual(int):
    """The decoder layer a method acts at where nobody asks for one: on a model that allows only later ones, its first possible."""


@dataclass(frozen=True, kw_only=True)
class Compose(Schedule):
    """Several reducers at different stages, for example ``divprune`` before the language model and ``fastv`` inside it."""

    members: tuple[Reducer, ...] = ()
    name: ClassVar[str] = "compose"

    def __post_init__(self) -> None:
        """Refuse empty compositions."""
        super().__post_init__()
        if not self.members:
            raise UnknownArgumentError("an empty list of reducers was given: name at least one")

    def parts(self) -> tuple[Reducer, ...]:
        """All members' parts."""
        return tuple(p for m in self.members for p in m.parts())

    def bind(self, facts: Facts) -> Reducer:
        """Bind every member; refuse two members at one stage."""
        bound = tuple(m.bind(facts) for m in self.members)
        seen: dict[str, str] = {}
        for member in bound:
            places = {"before the projector" if p.stage.in_tower else p.stage.value for p in member.parts()}
            for place in sorted(places):
                if place in seen:
                    raise UnknownArgumentError(
                        f"'{seen[place]}' and '{member.name}' both act at the stage '{place}': compose reducers of different "
                        "stages, such as ['divprune', 'fastv']"
                    )
                seen[place] = member.name
        return dataclasses.replace(self, members=bound)


class ImageReducer(Reducer):
    """A reducer of the pixels themselves (``Stage.IMAGE``)."""

    stage: ClassVar[Stage] = Stage.IMAGE

    def target_grid(self, grid: tuple[int, int], facts: Facts) -> tuple[int, int]:
        """Return the patch grid (rows, columns) every view is shrunk to; must not depend on the other views of the call."""
        raise TypeError(f"{type(self).__name__} does not implement target_grid()")

    def resize(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Return ``pixels (V, 3, H, W)`` resized to ``size`` (height, width)."""
        raise TypeError(f"{type(self).__name__} does not implement resize()")


@dataclass(frozen=True, eq=False)
class EncoderState:
    """What an :class:`EncoderReducer` is given after each tower layer.

    Attributes
    ----------
    layer : int
        Index of the layer that has just run.
    taps : mapping
        The tapped signals of this layer, each ``(V, n, ...)`` over the patches still alive (the class token is stripped).
    valid : Tensor
        ``(V, n)`` bool: real patches (views may hold different counts; the rest is padding).
    image : Tensor
        ``(V,)`` int64: which image of the call each view belongs to.
    carry : mapping
        The tensors the reducer returned after the previous layer, each ``(V, n, ...)``, already narrowed to the survivors.
    target : Tensor
        ``(V,)`` int64: patches each view is to end with.
    size : Tensor or None
        Mergers only: ``(V, n)`` float32, how many patches each token stands for.
    counts, targets : tuple of int
        Real patches of each view, and :attr:`target`, as the host knows them: read these instead of the tensors. Looked up in the
        tensors where they are not given.
    """

    layer: int
    taps: Mapping[str, Tensor]
    valid: Tensor
    image: Tensor
    carry: Mapping[str, Tensor]
    target: Tensor
    size: Tensor | None = None
    counts: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Fill in what was not given."""
        if not self.counts:
            object.__setattr__(self, "counts", tuple(self.valid.sum(1).tolist()))
        if not self.targets:
            object.__setattr__(self, "targets", tuple(self.target.tolist()))


class EncoderReducer(Reducer):
    """A reducer that drops tokens between the layers of the vision tower (``Stage.ENCODER``)."""

    stage: ClassVar[Stage] = Stage.ENCODER

    @property
    def returns(self) -> int | None:
        """Tower layer before which dropped patches come back, with the state they had when they left; ``None``: never."""
        return None

    @property
    def fills_first_slots(self) -> bool:
        """Towers that merge squares of patches: the tokens left stand in the image's first slots, not where they were."""
        return False

    def view_budget(self, patches: int, facts: Facts) -> int:
        """Return how many of a view's ``patches`` survive the tower; must not depend on the other views of the call."""
        return self.budget.tokens(patches)

    def view_budgets(self, views: int, patches: int, facts: Facts) -> list[int]:
        """Return how many of the ``patches`` of each of an image's ``views`` survive the tower."""
        return [self.view_budget(patches, facts)] * views

    def patch_budgets(self, views: int, patches: int, facts: Facts, *, video: bool) -> list[int]:
        """:meth:`view_budgets`; the budget is one of every frame of a clip where the reducer says so."""
        if video and self.per == "frame":
            return self.view_budgets(1, patches, facts) * views
        return self.view_budgets(views, patches, facts)

    def note(self, asked: int, slots: int) -> str:
        """What the statistics should say of an image with ``slots`` visual tokens when ``asked`` patches stay in the tower."""
        return ""

    def encoder_needs(self, layer: int) -> tuple[Need, ...]:
        """Signals to tap in tower layer ``layer``."""
        raise TypeError(f"{type(self).__name__} does not implement encoder_needs()")

    def step(self, state: EncoderState) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the tensors to carry to the next layer and ``alive (V, n)`` bool, or ``None`` to drop nothing here."""
        raise TypeError(f"{type(self).__name__} does not implement step()")


class EncoderMerger(EncoderReducer):
    """A reducer that merges tokens inside the layers of the vision tower, between attention and MLP (``Stage.ENCODER``).

    A merged token is the mean of its tokens weighted by their sizes. It stands at the first of its patches that has a slot.
    """

    kind: ClassVar[str] = "merge"

    @property
    def weighs_sizes(self) -> bool:
        """Whether attention counts a token as often as it has patches (the logarithm of its size is added to its logits)."""
        return True

    @property
    def weighs_pool(self) -> bool:
        """Whether a head that averages the tokens of a vision transformer counts each as often as it has patches."""
        return False

    def bind(self, facts: Facts) -> Reducer:
        """Refuse towers whose layers cannot merge."""
        if facts.no_merging:
            raise UnsupportedFeatureError(
                f"'{self.name}' merges tokens inside the layers of the vision tower, {facts.no_merging}: use a reducer that merges "
                "behind the tower, such as 'hierpool'"
            )
        return super().bind(facts)

    def merge(self, state: EncoderState) -> tuple[Tensor, Tensor] | None:
        """Return ``owner (V, n)`` int64, the place of the token each one is merged into, and the tokens left, ``(V,)`` int64.

        The engine looks at the tokens left: best given on the CPU.

        The places of a view are ``0 .. left - 1``, in the order the next layer lists them; padding has -1. ``None``: no change.
        """
        raise TypeError(f"{type(self).__name__} does not implement merge()")
