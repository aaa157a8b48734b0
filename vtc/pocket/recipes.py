"""What a pocket model is trained on and how: the stages of every recipe.

Stage A trains the vision tower on dense per-patch labels and on what the image contains. Stages B to I train on
answers, with auxiliary read-outs of what the noun phrases of a question refer to and of where visual tokens lie. Stage N
turns the result into a LLaVA-NeXT model that sees wide scenes as thumbnail and crops.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace

from vtc.pocket.errors import PocketError
from vtc.pocket.model import PocketConfig, PocketNextConfig

STAGE_NAMES = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "N")
_FINAL_RATE = 0.02  # of the peak learning rate


@dataclass(frozen=True)
class Stage:
    """Settings of one training stage.

    Attributes
    ----------
    name
        ``"A"`` (tower only), ``"B"`` to ``"I"`` (answers, each on scenes of its own), or ``"N"`` (answers about wide
        scenes seen as crops, which makes the model a LLaVA-NeXT one).
    steps
        Length of the schedule.
    batch_size, easy_images
        Images per step, and how many of them come from easy-VQA; at least one must be a scene.
    learning_rate
        Peak rate, after a linear warm-up of a tenth of the steps, within 20..150.
    end
        Stop after this many steps of the schedule; None runs all of it.
    restore_tower
        Start from the vision tower that the recipe's first stage started from.
    constant
        Hold the peak rate, after a warm-up of 100 steps; otherwise a cosine takes it down to 2 %.
    vision_rates
        (first step, factor on the learning rate of the tower and the heads), in order; factor 0 freezes them.
    patch_weight, content_weight, mention_weight, position_weight, relation_weight
        Weights of the auxiliary losses, the first two while the tower is trained, the others where the stage asks; the
        answer loss has weight 1.
    warm_heads
        For this many steps only the read-outs learn, the tower's too: fresh ones would send noise to what they read.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    easy_images: int = 0
    vision_rates: tuple[tuple[int, float], ...] = ((0, 1.0),)
    patch_weight: float = 1.0
    content_weight: float = 2.0
    mention_weight: float = 0.0
    constant: bool = False
    position_weight: float = 0.0
    end: int | None = None
    restore_tower: bool = False
    relation_weight: float = 0.0
    warm_heads: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        if self.name not in STAGE_NAMES:
            raise PocketError(f"a stage is named {', '.join(STAGE_NAMES)}, not {self.name!r}")
        if not 0 <= self.easy_images < self.batch_size:
            raise PocketError("a batch needs at least one scene: easy_images must be below batch_size")

    @property
    def length(self) -> int:
        """Number of steps to run."""
        return self.steps if self.end is None else min(self.steps, self.end)

    @property
    def asks(self) -> bool:
        """Whether this stage trains on answers."""
        return self.name != "A"

    def vision_rate(self, step: int) -> float:
        """Factor on the tower's learning rate at a step."""
        return [factor for first, factor in self.vision_rates if first <= step][-1]

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        if self.constant:
            return self.learning_rate * min(1.0, (step + 1) / 100)
        warm_up = max(20, min(150, self.steps // 10))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.learning_rate * min(1.0, (step + 1) / warm_up) * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Attributes
    ----------
    model
        Its size.
    stages
        Run in order; each starts from the weights of the one before.
    dtype
        Type of weights and activations during forward and backward; master weights are float32 throughout.
    ranks
        Processes that share each batch, with one thread each: on a machine with other work, two such processes get more
        done than one with two threads that wait for each other.
    start_sha256
        Digest of the checkpoint (``model.safetensors``) that the first stage goes on from, with new decoder layers where
        that has fewer; None starts from random weights.
    validation_scenes, validation_easy
        Images of the val split that are scored.
    """

    model: PocketConfig
    stages: tuple[Stage, ...]
    dtype: str = "bfloat16"
    ranks: int = 1
    start_sha256: str | None = None
    validation_scenes: int = 240
    validation_easy: int = 96


# Stages that others vary. _ANSWERS: the tower stays as it is; _WITH_TOWER: it goes on learning its own targets, too.
_FROZEN = ((0, 0.0),)
_QUARTER = ((0, 0.25),)
_HALF = ((0, 0.5),)
_ANSWERS = Stage(
    "B",
    steps=500,
    batch_size=8,
    learning_rate=1e-3,
    easy_images=2,
    vision_rates=_FROZEN,
    mention_weight=1.0,
    position_weight=0.3,
)
_WITH_TOWER = replace(_ANSWERS, vision_rates=_HALF, patch_weight=0.14, content_weight=0.7)
_RELATIONS = replace(_WITH_TOWER, relation_weight=3.0)
_CROPS = Stage("N", steps=400, batch_size=4, learning_rate=5e-4, vision_rates=_FROZEN, mention_weight=1.0)

RECIPES: dict[str, Recipe] = {
    # From random weights. On two idle cores stage A takes about 0.09 s per step and the others about 0.25 s, so about an
    # hour; stages A and B have been run in part only.
    "cpu": Recipe(
        PocketConfig(),
        (
            Stage("A", steps=3000, batch_size=10, learning_rate=2.5e-3),
            replace(_ANSWERS, name="B", steps=4000, learning_rate=1.5e-3, constant=True),
            replace(_WITH_TOWER, name="C", steps=2000, learning_rate=1.5e-3),
            replace(_CROPS, batch_size=8),
        ),
        ranks=2,
    ),
    # What the start of the next recipe comes from: 33 minutes for pocket and 9 for pocket-next, at 0.3 to 1.5 s per step on two
    # cores with much other work. The stages record what it took. B: the tower stays frozen, because fresh read-outs and
    # decoder layers send it noise. C, D: the position head makes the projector pass on where things are; the tower was
    # trained on answers alone there, which cost it words and digits. E therefore takes the first tower back, and F goes on
    # with it frozen. A next recipe should keep the tower's own targets whenever it trains it.
    "grow": Recipe(
        PocketConfig(),
        (
            replace(_ANSWERS, name="B", position_weight=0.0, constant=True),
            replace(_ANSWERS, name="C", steps=300, vision_rates=_QUARTER, patch_weight=0.0, content_weight=0.0, constant=True),
            replace(_ANSWERS, name="D", steps=700, vision_rates=_QUARTER, patch_weight=0.0, content_weight=0.0, end=400),
            replace(_ANSWERS, name="E", learning_rate=8e-4, restore_tower=True),
            replace(_ANSWERS, name="F", steps=1000),
            replace(_CROPS, steps=500, end=400),
        ),
        ranks=2,
        start_sha256="83f971f9501b1f3a214738117564d1b4ecc05ff6b2122c90db45e9387af3ddf8",
        validation_scenes=120,
        validation_easy=48,
    ),
    # What the shipped checkpoints come from. G: the relation read-outs take spatial questions, at chance until then, to
    # 96 % of the val split within 1,200 steps. H: more ordinary questions again; digits gain from the tower's own targets,
    # words and counts stay where the constant rate of G had brought them. I: scenes with many words, more weight on the
    # tower's targets, and a rate that falls to its end. A step takes 0.4 s on an idle core, 0.5 to 1.4 s on a busy one.
    "refine": Recipe(
        PocketConfig(),
        (
            replace(_RELATIONS, name="G", steps=1200, vision_rates=((0, 0.0), (300, 0.5)), warm_heads=100, constant=True),
            replace(_RELATIONS, name="H", steps=2600, end=700),
            replace(_RELATIONS, name="I", steps=2200, learning_rate=8e-4, patch_weight=0.3),
            replace(_CROPS, relation_weight=1.0),
        ),
        start_sha256="feec2b20c51f4ee01fb316fe5bf9efa937686d4e02f85a87ae93e9db78e24879",
        validation_scenes=120,
        validation_easy=48,
    ),
    # A few seconds; the result knows nothing. Covers every code path of the real one.
    "smoke": Recipe(
        PocketConfig(width=32, vision_layers=2, text_layers=1),
        (
            Stage("A", steps=4, batch_size=2, learning_rate=1e-3),
            Stage(
                "B",
                steps=6,
                batch_size=3,
                easy_images=1,
                learning_rate=1e-3,
                vision_rates=((0, 1.0), (2, 0.0), (4, 1.0)),
                patch_weight=0.14,
                content_weight=0.7,
                mention_weight=1.0,
            ),
            Stage("N", steps=4, batch_size=2, learning_rate=1e-3, vision_rates=((0, 0.0),), mention_weight=1.0),
        ),
        validation_scenes=6,
        validation_easy=4,
    ),
}


def stage_config(config: PocketConfig, stage: str) -> PocketConfig:
    """Size of the model that a stage trains."""
    return PocketNextConfig(**asdict(config)) if stage == "N" else config


def fingerprint(recipe: Recipe, stage: Stage, seed: int) -> str:
    """Return, as text, the settings that must not change between a checkpoint and its continuation.

    The length of a stage with constant rate is not among them: its steps do not depend on it.
    """
    settings = asdict(stage)
    settings.pop("steps" if stage.constant else "constant")
    settings.pop("end")  # what a step does is independent of it
    for name in ("restore_tower", "position_weight", "relation_weight", "warm_heads"):  # younger than the first checkpoints
        if not settings[name]:
            settings.pop(name)
    start = [] if recipe.start_sha256 is None else [recipe.start_sha256]
    return json.dumps([asdict(recipe.model), recipe.dtype, recipe.ranks, settings, seed, *start], sort_keys=True)
