"""The questions about one pocket scene, balanced within each type."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from vtc.pocket.objects import COLOR_NAMES, PLURALS, RELATIONS, SHAPES, WORDS, Focus, Mention, QuestionText, SceneObject

_TEST_PER_TYPE = {"presence": 2}  # asked about one val or test scene; 1 for every other type
# Hard types come first in the training mix, because only so many questions fit behind one image.
_TRAIN_PRIORITY = {"digit": 0.6, "spatial": 0.6, "lookup": 0.5, "presence": 0.5, "count_sub": 0.5, "word": 0.5}
_DEFAULT_PRIORITY = 0.3
_COUNT_SHARE = {2: 0.8, 3: 0.6, 4: 0.6, 5: 0.8}


class Asker:
    """Asks about one scene.

    Prompts are written with their noun phrases in braces; each phrase comes with the objects that it fits.
    """

    def __init__(self, rng: random.Random, objects: Sequence[SceneObject], asking_all: bool) -> None:
        self.rng = rng
        self.objects = objects
        self.asking_all = asking_all
        self.shapes = [o for o in objects if o.shape is not None]
        self.digits = [o for o in objects if o.digit is not None]
        self.words = [o for o in objects if o.word is not None]
        self._asked: list[tuple[QuestionText, tuple[Mention, ...]]] = []

    def ask(self, focus: Focus | None = None) -> list[tuple[QuestionText, tuple[Mention, ...]]]:
        """Ask questions of every type that the scene allows, each at most once, in random order.

        A val or test scene gets one or two per type, a training scene all that fit its objects, hard types first.
        With a focus, only types of that focus are asked.
        """
        if focus in ("reading", "words"):
            self._ask_digits()
            if focus == "reading":
                self._ask_word()
            self.rng.shuffle(self._asked)
            return self._asked
        if focus == "places":
            self._ask_spatial(attempts=24, wanted=14)
            return list({question[1]: (question, mentions) for question, mentions in self._asked}.values())
        self._ask_about_big_shape()
        self._ask_properties()
        self._ask_presence()
        self._ask_counts()
        self._ask_digits()
        self._ask_word()
        self._ask_spatial()
        self.rng.shuffle(self._asked)
        kept, prompts, per_type = [], set(), defaultdict(int)
        for (kind, prompt, answer), mentions in self._asked:
            limit = 99 if self.asking_all else _TEST_PER_TYPE.get(kind, 1)
            if prompt not in prompts and per_type[kind] < limit:
                prompts.add(prompt)
                per_type[kind] += 1
                kept.append(((kind, prompt, answer), mentions))
        if self.asking_all:
            kept.sort(key=lambda q: -self.rng.random() - _TRAIN_PRIORITY.get(q[0][0], _DEFAULT_PRIORITY))
        return kept

    def _add(self, kind: str, template: str, answer: str, *fitting: Sequence[SceneObject]) -> None:
        """Add a question; `fitting` holds, for each phrase in braces, the objects it fits."""
        places = [place for place, word in enumerate(template.replace("?", " ?").split()) if word.endswith("}")]
        numbers = [tuple(next(i for i, o in enumerate(self.objects) if o is target) for target in f) for f in fitting]
        prompt = template.replace("{", "").replace("}", "")
        self._asked.append(((kind, prompt, answer), tuple(zip(places, numbers, strict=True))))

    def _ask_about_big_shape(self) -> None:
        for big in (o for o in self.shapes if o.big):
            noun = self.rng.choice((SHAPES[big.shape], "shape"))
            self._add("color_big", f"what color is the {{big {noun}}}?", COLOR_NAMES[big.color], [big])
            self._add("shape_big", "what shape is the {big object}?", SHAPES[big.shape], [big])

    def _ask_properties(self) -> None:
        """Ask for a property only where the words single out one small object."""
        for target in (o for o in self.shapes if not o.big):
            if sum(p.shape == target.shape for p in self.shapes) == 1:
                self._add("color", f"what color is the {{{SHAPES[target.shape]}}}?", COLOR_NAMES[target.color], [target])
            if sum(p.color == target.color for p in self.shapes) == 1:
                self._add("shape", f"what is the {{{COLOR_NAMES[target.color]} shape}}?", SHAPES[target.shape], [target])

    def _ask_presence(self) -> None:
        """Ask for objects that are there, and for some that are not but share a colour or shape with one that is."""
        rng, present = self.rng, {(o.color, o.shape) for o in self.shapes}
        for _ in range(4 if self.asking_all else 2):
            if self.shapes and rng.random() < 0.5:
                target = rng.choice(self.shapes)
                self._add("presence", f"is there a {{{target.name}}}?", "yes", [target])
                continue
            while True:
                color, shape = rng.randrange(len(COLOR_NAMES)), rng.randrange(len(SHAPES))
                if self.shapes and rng.random() < 0.7:
                    if rng.random() < 0.5:
                        color = rng.choice(self.shapes).color
                    else:
                        shape = rng.choice(self.shapes).shape
                if (color, shape) not in present:
                    break
            self._add("presence", f"is there a {{{COLOR_NAMES[color]} {SHAPES[shape]}}}?", "no", [])

    def _ask_counts(self) -> None:
        rng = self.rng
        # The frequent totals are asked for less often, so that the answers 2 to 6 come up about equally often.
        if self.asking_all or rng.random() < _COUNT_SHARE.get(len(self.shapes), 1.0):
            self._add("count", "how many {shapes} are there?", str(len(self.shapes)), self.shapes)
        by_kind = [[o for o in self.shapes if o.shape == kind] for kind in range(len(SHAPES))]
        by_count: dict[int, list[int]] = defaultdict(list)
        for kind, fitting in enumerate(by_kind):
            by_count[len(fitting)].append(kind)
        for wanted in range(4) if self.asking_all else (rng.randrange(4),):
            if by_count[wanted]:
                kind = rng.choice(by_count[wanted])
                self._add("count_sub", f"how many {{{PLURALS[kind]}}} are there?", str(wanted), by_kind[kind])
        first, second = rng.sample(range(len(SHAPES)), 2)
        if len(by_kind[first]) != len(by_kind[second]):
            prompt = f"are there more {{{PLURALS[first]}}} than {{{PLURALS[second]}}}?"
            answer = "yes" if len(by_kind[first]) > len(by_kind[second]) else "no"
            self._add("compare", prompt, answer, by_kind[first], by_kind[second])

    def _ask_digits(self) -> None:
        for target in self.digits:
            color, shape = divmod(target.partner, len(SHAPES))
            partner = next(o for o in self.shapes if (o.color, o.shape) == (color, shape))
            name = partner.name
            self._add("digit", f"which digit is next to the {{{name}}}?", str(target.digit), [partner])
            prompt = f"what color is the shape next to the {{digit {target.digit}}}?"
            self._add("lookup", prompt, COLOR_NAMES[color], [target])

    def _ask_word(self) -> None:
        if self.words:
            self._add("word", "what does the {word} say?", WORDS[self.words[-1].word], self.words)

    def _ask_spatial(self, attempts: int = 6, wanted: int = 4) -> None:
        """Ask how two shapes lie to each other, if they are at least 14 pixels apart along the axis."""
        if len(self.shapes) < 2:
            return
        for _ in range(attempts):
            first, second = self.rng.sample(self.shapes, 2)
            relation = self.rng.randrange(len(RELATIONS))
            axis = 0 if relation < 2 else 1
            distance = first.center[axis] - second.center[axis]
            if abs(distance) < 14:
                continue
            answer = "yes" if (distance < 0) == (relation in (0, 2)) else "no"
            prompt = f"is the {{{first.name}}} {RELATIONS[relation]} the {{{second.name}}}?"
            self._add("spatial", prompt, answer, [first], [second])
            if not self.asking_all or sum(q[0][0] == "spatial" for q in self._asked) == wanted:
                return
