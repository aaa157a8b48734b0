"""Generated document pages with known text, and the training of docprune's small default classifier on them.

``python -m vtc.train_docprune --out vtc/assets/docprune`` makes the shipped weights and the figures of their card again, on one
core in minutes; without ``--out`` it measures the weights that are shipped. Needs the extras ``pocket`` (a photograph for
training and one for the test, from scikit-learn) and ``plot`` (matplotlib's fonts).

A page is cut into cells, and a cell holds a paragraph, a table, form lines, a photograph, a chart or nothing. Text is drawn into a
mask first, so the label of a block is exact: it is text if the mask covers at least :data:`INK` of it. Pages for the test use
fonts (DejaVu Serif, Computer Modern Sans, Pillow's own), a photograph and random streams of their own.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

from vtc.reducers.docprune import BLOCK, PatchClassifier, TextClassifier, contrast, fit, trained

SIDE = 12 * BLOCK
"""Side of a page in pixels: 336, or 12 x 12 blocks."""
INK = 0.01
"""Share of a block that text must cover."""
BLANK, LINES, PHOTO = range(3)
"""What a block without text shows."""
TRAIN_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral",
               "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10", "cmtt10")  # fmt: skip
TEST_FONTS = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "cmss10", "")
"""Files of matplotlib; the empty name is Pillow's own font."""
NORMS = (((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)), ((0.5,) * 3, (0.5,) * 3))
"""Mean and deviation of CLIP's and SigLIP's image processors."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""
SYLLABLES = "a e i o u en er in on at st re th nd ti es or te of it ma co pro sch ung qu ch ly x z K M S T A B".split()


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes
    ----------
    image : Tensor
        ``(3, SIDE, SIDE)`` uint8.
    ink : Tensor
        ``(SIDE / BLOCK, SIDE / BLOCK)`` share of each block that text covers.
    kind : Tensor
        ``(SIDE / BLOCK, SIDE / BLOCK)`` what else the block shows: blank paper, lines and areas, or a photograph.
    """

    image: Tensor
    ink: Tensor
    kind: Tensor


@functools.lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if not name:
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


@functools.lru_cache(maxsize=2)
def _photo(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


class _Canvas:
    """Draws one page at ``scale`` times its final size: picture, text mask and kinds side by side."""

    def __init__(self, rng: np.random.Generator, fonts: Sequence[str], photo: str, height: tuple[float, float]) -> None:
        self.rng, self.fonts, self.photo, self.height = rng, fonts, photo, height
        self.scale = float(rng.choice([1.0, 1.0, 1.5, 2.0, 3.0]))
        self.side = round(SIDE * self.scale)
        self.paper = self._paper()
        self.image = Image.new("RGB", (self.side, self.side), self.paper)
        self.ink = Image.new("L", (self.side, self.side), 0)
        self.kind = Image.new("L", (self.side, self.side), BLANK)
        if rng.random() < 0.25:  # paper whose brightness changes
            other = Image.new(
                "RGB", self.image.size, tuple(int(np.clip(c + rng.integers(-40, 41), 0, 255)) for c in self.paper)
            )
            slope = Image.linear_gradient("L").resize(self.image.size).rotate(90 * int(rng.integers(4)))
            self.image.paste(other, (0, 0), slope)

    def _paper(self) -> tuple[int, int, int]:
        light, dark, between = 255 - abs(self.rng.normal(0, 18)), self.rng.uniform(0, 70), self.rng.uniform(70, 255)
        base = self.rng.choice([light, light, light, dark, between])
        return tuple(int(np.clip(base + self.rng.normal(0, 10), 0, 255)) for _ in range(3))

    def colour(self, away: float, around: Sequence[int] | None = None) -> tuple[int, int, int]:
        """Return a colour whose brightness differs from ``around`` (else the paper) by at least ``away``."""
        base = float(np.mean(self.paper if around is None else around))
        while True:
            colour = self.rng.integers(0, 256, 3)
            if self.rng.random() < 0.6:
                colour[:] = colour[0]
            if abs(colour.mean() - base) >= away:
                return tuple(int(c) for c in colour)

    def word(self) -> str:
        """Return a made-up word, a number, or now and then Greek or Cyrillic."""
        kind = self.rng.random()
        if kind < 0.2:
            return f"{self.rng.integers(0, 10 ** int(self.rng.integers(1, 7))):,}" + str(self.rng.choice(["", ".", "%", ",-"]))
        if kind < 0.28:
            first = int(self.rng.choice([0x3B1, 0x430]))
            return "".join(chr(first + int(i)) for i in self.rng.integers(0, 17, int(self.rng.integers(2, 8))))
        text = "".join(self.rng.choice(SYLLABLES, int(self.rng.integers(1, 5))))
        return str(self.rng.choice([text, text, text.capitalize(), text.upper()])) + str(
            self.rng.choice(["", "", "", ".", ","])
        )

    def write(self, box: Box, lines: int = 99, colour: tuple[int, int, int] | None = None) -> None:
        """Fill ``box`` with words, left to right."""
        if min(box[2] - box[0], box[3] - box[1]) < 1:
            return
        lo, hi = (math.log(h * self.scale) for h in self.height)
        size = max(5, round(math.exp(self.rng.uniform(lo, hi))))
        name = str(self.rng.choice(self.fonts))
        if name.startswith("cm"):  # these have no letters beyond ASCII
            words = iter(lambda: self.word().encode("ascii", "ignore").decode() or "and", None)
        else:
            words = iter(self.word, None)
        font, colour = _font(name, size), colour or self.colour(75)
        mask = Image.new("L", self.image.size, 0)
        draw = ImageDraw.Draw(mask)
        y, step = box[1], size * self.rng.uniform(1.1, 1.7)
        while y + size * 1.25 <= box[3] and lines > 0:
            line = ""
            for word in words:
                longer = f"{line} {word}" if line else word
                if draw.textlength(longer, font) > box[2] - box[0]:
                    break
                line = longer
                if self.rng.random() < 0.06:
                    break
            draw.text((box[0], y), line, 255, font)
            y, lines = y + step, lines - 1
        self.stamp(mask, box, colour, self.ink, 255)

    def stamp(self, mask: Image.Image, box: Box, colour: tuple[int, int, int], layer: Image.Image, value: int) -> None:
        """Colour the picture where ``mask`` is set, inside ``box`` only, and note it on ``layer``."""
        mask = mask.crop(box)
        self.image.paste(colour, box[:2], mask)
        layer.paste(value, box[:2], mask)

    def paragraph(self, box: Box) -> None:
        """Words, sometimes in a coloured box or next to a bullet."""
        if self.rng.random() < 0.2:
            fill = self.colour(15)
            ImageDraw.Draw(self.image).rectangle(box, fill)
            self.write(box, colour=self.colour(75, fill))
        else:
            self.write(box, int(self.rng.choice([1, 2, 3, 99, 99])))

    def table(self, box: Box) -> None:
        """Rules with entries between some of them."""
        rows, cols = (int(n) for n in self.rng.integers(1, 6, 2))
        ys, xs = np.linspace(box[1], box[3], rows + 1), np.linspace(box[0], box[2], cols + 1)
        mask = Image.new("L", self.image.size, 0)
        draw, width = ImageDraw.Draw(mask), int(self.rng.integers(1, 4))
        for y in ys:
            draw.line((box[0], y, box[2], y), 255, width)
        for x in xs if self.rng.random() < 0.7 else ():
            draw.line((x, box[1], x, box[3]), 255, width)
        self.stamp(mask, box, self.colour(40), self.kind, LINES)
        pad = 3 * self.scale
        for i in range(rows):
            for j in range(cols):
                if self.rng.random() < 0.6:
                    self.write((int(xs[j] + pad), int(ys[i] + pad), int(xs[j + 1] - pad), int(ys[i + 1] - pad)), 1)

    def chart(self, box: Box) -> None:
        """Bars, curves, circles, crossed lines, a frame: what is drawn but not written."""
        what, width = int(self.rng.integers(5)), int(self.rng.integers(1, 6))
        x0, y0, x1, y1 = box
        points = [(self.rng.uniform(x0, x1), self.rng.uniform(y0, y1)) for _ in range(int(self.rng.integers(2, 9)))]
        radius = self.rng.uniform(2, 30) * self.scale
        mask = Image.new("L", self.image.size, 0)
        draw = ImageDraw.Draw(mask)
        if what == 0:
            for x, y in points:
                draw.rectangle((x, y, x + radius, y1), 255)
        elif what == 1:
            draw.line(sorted(points), 255, width)
        elif what == 2:
            for x, y in points:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), None if width > 3 else 255, 255, width)
        elif what == 3:
            for (ax, ay), (bx, by) in itertools.pairwise(points):
                draw.line((ax, ay, bx, ay), 255, width)
                draw.line((bx, ay, bx, by), 255, width)
        else:
            draw.rectangle(box, None, 255, width)
        self.stamp(mask, box, self.colour(40), self.kind, LINES)

    def picture(self, box: Box) -> None:
        """A piece of the photograph, or coloured noise with as much power on every scale as photographs have."""
        w, h = box[2] - box[0], box[3] - box[1]
        if self.rng.random() < 0.5:
            source = _photo(self.photo)
            zoom = self.rng.uniform(0.15, 1.0)
            cw, ch = int(source.width * zoom), int(source.height * zoom)
            x, y = int(self.rng.integers(0, source.width - cw + 1)), int(self.rng.integers(0, source.height - ch + 1))
            piece = source.crop((x, y, x + cw, y + ch)).resize((w, h))
            if self.rng.random() < 0.5:
                piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if self.rng.random() < 0.3:
                piece = piece.convert("L").convert("RGB")
        else:
            fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
            power = 1 / np.maximum(np.hypot(fy, fx), 1 / max(h, w)) ** self.rng.uniform(0.9, 1.6)
            noise = np.fft.irfft2(np.fft.rfft2(self.rng.normal(size=(3, h, w))) * power, (h, w))
            noise = (noise - noise.mean()) / (noise.std() + 1e-9)
            if self.rng.random() < 0.5:
                noise[:] = noise[:1]
            if self.rng.random() < 0.3:
                noise = np.round(noise)  # flat patches with edges
            pixels = 128 + self.rng.uniform(15, 60) * noise + self.rng.normal(0, 25, (3, 1, 1))
            piece = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        self.image.paste(piece, box[:2])
        self.kind.paste(PHOTO, box)

    def nothing(self, box: Box) -> None:
        """Leave the cell blank."""

    def fill(self, box: Box, depth: int = 0) -> None:
        """Cut ``box`` into cells and fill each."""
        x0, y0, x1, y1 = box
        if depth < 4 and (depth < 2 or self.rng.random() < 0.5) and max(x1 - x0, y1 - y0) > 60 * self.scale:
            at = self.rng.uniform(0.3, 0.7)
            if x1 - x0 > y1 - y0:
                middle = int(x0 + at * (x1 - x0))
                cells = ((x0, y0, middle, y1), (middle, y0, x1, y1))
            else:
                middle = int(y0 + at * (y1 - y0))
                cells = ((x0, y0, x1, middle), (x0, middle, x1, y1))
            for cell in cells:
                self.fill(cell, depth + 1)
            return
        margin = int(self.rng.uniform(1, 14) * self.scale)
        inner = (x0 + margin, y0 + margin, x1 - margin, y1 - margin)
        if min(inner[2] - inner[0], inner[3] - inner[1]) < 8 * self.scale:
            return
        actions = [self.paragraph, self.table, self.chart, self.picture, self.nothing]
        actions[int(self.rng.choice(5, p=(0.42, 0.14, 0.12, 0.18, 0.14)))](inner)

    def page(self) -> Page:
        """Shrink to the final size, then blur, add noise and compress as scanners and cameras do."""
        rng = self.rng
        image = self.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        ink = np.asarray(self.ink.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
        kind = np.asarray(self.kind.resize((SIDE, SIDE), Image.Resampling.NEAREST))
        if rng.random() < 0.15:  # patches of fewer pixels than a block has are enlarged
            small = round(SIDE * rng.uniform(0.5, 0.9))
            image = image.resize((small, small), Image.Resampling.BICUBIC).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if rng.random() < 0.25:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
        if rng.random() < 0.5:
            pixels = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(1, 14), (SIDE, SIDE, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if rng.random() < 0.5:
            with io.BytesIO() as file:
                image.save(file, "JPEG", quality=int(rng.integers(30, 96)))
                image = Image.open(file, formats=("JPEG",)).convert("RGB")
        n = SIDE // BLOCK
        cells = kind.reshape(n, BLOCK, n, BLOCK).transpose(0, 2, 1, 3).reshape(n, n, -1)
        return Page(
            torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()),
            torch.from_numpy(ink).view(n, BLOCK, n, BLOCK).mean((1, 3)),
            torch.from_numpy(cells.max(2).astype(np.int64)),
        )


def make_page(seed: Sequence[int], fonts: Sequence[str], photo: str, height: tuple[float, float] = (7.0, 60.0)) -> Page:
    """Return the page of ``seed``; ``height``: smallest and largest font size, in pixels of the finished page."""
    canvas = _Canvas(np.random.default_rng(seed), fonts, photo, height)
    canvas.fill((0, 0, canvas.side, canvas.side))
    return canvas.page()


def train_page(seed: int) -> Page:
    """Page for training."""
    return make_page((0, seed), TRAIN_FONTS, "china.jpg")


def validation_page(seed: int) -> Page:
    """Page to choose the best epoch with: the fonts and the photograph of training, other random streams."""
    return make_page((1, seed), TRAIN_FONTS, "china.jpg")


def held_out_page(seed: int, height: tuple[float, float] = (7.0, 60.0)) -> Page:
    """Page for the test: fonts, photograph and random streams that training has not seen."""
    return make_page((2, seed), TEST_FONTS, "flower.jpg", height)


def cut(page: Page, norm: int) -> Tensor:
    """Return the normalised blocks ``(M, 3, BLOCK, BLOCK)`` of a page, in raster order."""
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in NORMS[norm])
    pixels = (page.image / 255 - mean) / deviation
    n = SIDE // BLOCK
    return pixels.view(3, n, BLOCK, n, BLOCK).permute(1, 3, 0, 2, 4).flatten(0, 1)


def dataset(make: Callable[[int], Page], pages: int) -> tuple[Tensor, Tensor]:
    """Return float16 blocks and labels of many pages, normalised in turn as for the two kinds of tower."""
    made = [make(seed) for seed in range(pages)]
    blocks = torch.cat([cut(page, i % len(NORMS)).half() for i, page in enumerate(made)])
    return blocks, torch.cat([(page.ink >= INK).flatten() for page in made])


def train(classifier: nn.Module, pages: int, seed: int = 0, log: Callable[[str], None] = print) -> None:
    """Train a classifier on generated pages, with a rate that falls in three steps."""
    data, check = dataset(train_page, pages), dataset(validation_page, max(1, pages // 8))
    log(f"{len(data[0])} blocks of {pages} pages, {float(data[1].double().mean()):.1%} of them text")
    for rate, epochs in ((3e-3, 10), (1e-3, 4), (2e-4, 3)):
        best = fit(classifier, data, (check[0].float(), check[1]), epochs=epochs, rate=rate, seed=seed)
        log(f"{epochs} epochs at rate {rate:g}: best accuracy on validation pages {best:.4f}")


def judge(classify: Callable[[Tensor], Tensor], pages: Sequence[Page]) -> tuple[Tensor, Tensor]:
    """Return ``(pages, M)`` what the classifier says (text or not) and what is true."""
    with torch.no_grad():
        said = [classify(cut(page, i % len(NORMS))) > 0 for i, page in enumerate(pages)]
    return torch.stack(said), torch.stack([(page.ink >= INK).flatten() for page in pages])


def precision_recall(said: Tensor, true: Tensor) -> tuple[float, float]:
    """Share of the blocks called text that are, and of the text blocks that are called so."""
    right = float((said & true).sum())
    return right / max(1, int(said.sum())), right / max(1, int(true.sum()))


def intervals(said: Tensor, true: Tensor, draws: int = 2000) -> list[tuple[float, float]]:
    """Return 95 % bootstrap intervals of precision and recall; whole pages are drawn, since blocks of a page are alike."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([(said & true).sum(1), said.sum(1), true.sum(1)], 1).double()
    drawn = torch.randint(len(counts), (draws, len(counts)), generator=generator)
    right, called, text = counts[drawn].sum(1).unbind(1)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return [tuple(torch.quantile(right / of.clamp(min=1), levels).tolist()) for of in (called, text)]


def measure(classify: Callable[[Tensor], Tensor], pages: Sequence[Page]) -> dict[str, Any]:
    """Return precision and recall on held-out pages with their intervals, and false alarms by what the blocks show."""
    said, true = judge(classify, pages)
    kind = torch.stack([page.kind.flatten() for page in pages])
    (precision, recall), (p, r) = precision_recall(said, true), intervals(said, true)
    alarms = {name: float(said[~true & (kind == k)].double().mean()) for k, name in enumerate(("blank", "lines", "photo"))}
    return {"precision": precision, "precision_95": p, "recall": recall, "recall_95": r, "false_alarms": alarms}


def report(classifiers: dict[str, Callable[[Tensor], Tensor]], count: int = 300) -> dict[str, Any]:
    """Measure classifiers on ``count`` held-out pages, and the recall of text of some sizes on a third as many each."""
    pages = [held_out_page(seed) for seed in range(count)]
    out: dict[str, Any] = {"pages": count, "blocks": count * len(pages[0].ink.flatten())}
    out["text"] = float(torch.stack([p.ink >= INK for p in pages]).double().mean())
    for name, classify in classifiers.items():
        out[name] = measure(classify, pages)
    for low, high in ((5, 7), (7, 10), (10, 20), (20, 40), (40, 60)):
        sized = [held_out_page(10_000 * high + seed, (low, high)) for seed in range(count // 3)]
        for name, classify in classifiers.items():
            said, true = judge(classify, sized)
            out[name].setdefault("recall_by_font_size", {})[f"{low}-{high} px"] = precision_recall(said, true)[1]
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser("python -m vtc.train_docprune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="train, and write classifier.safetensors into this folder; else measure only")
    parser.add_argument("--pages", type=int, default=800, help="pages to train on")
    parser.add_argument("--test-pages", type=int, default=300, help="pages to measure on")
    parser.add_argument("--authors", action="store_true", help="train and measure the authors' one-layer classifier, too")
    parser.add_argument("--seed", type=int, default=0)
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    classifiers: dict[str, Callable[[Tensor], Tensor]] = {"contrast": contrast}
    if values.authors:
        torch.manual_seed(values.seed)
        classifiers["authors"] = one_layer = PatchClassifier()
        train(one_layer, values.pages, values.seed)
    if values.out is None:
        classifiers["trained"] = trained()
    else:
        torch.manual_seed(values.seed)
        classifiers["trained"] = classifier = TextClassifier()
        train(classifier, values.pages, values.seed)
        weights = {name: weight.half() for name, weight in classifier.state_dict().items()}
        classifier.load_state_dict(weights)  # what is measured is what is written
        save_file(weights, values.out / "classifier.safetensors")
        print(f"{sum(w.numel() for w in weights.values())} weights, trained in {time.perf_counter() - start:.0f} s")
    print(json.dumps(report(classifiers, values.test_pages), indent=2))


if __name__ == "__main__":
    main()
