"""docprune's own classifier: what it was trained on, that it is as good as its card says, and that docprune uses it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make_inputs, shared
from safetensors import safe_open

import vtc
from vtc import train_docprune as pages
from vtc.reducers.docprune import TextClassifier, contrast, trained

ASSETS = Path(vtc.__file__).parent / "assets" / "docprune"
CARD = (ASSETS / "README.md").read_text()


@pytest.fixture(scope="module")
def held_out():
    return [pages.held_out_page(seed) for seed in range(24)]


def test_weights_are_small_and_those_of_the_card():
    file = ASSETS / "classifier.safetensors"
    with safe_open(file, "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert file.stat().st_size < 300_000 and {t.dtype for t in tensors} == {torch.float16}
    assert f"{sum(t.numel() for t in tensors):,} weights" in CARD
    assert sum(t.numel() for t in tensors) == sum(p.numel() for p in TextClassifier().parameters())
    assert trained("cpu") is trained("cpu") and not any(p.requires_grad for p in trained().parameters())


def test_classifier_is_as_good_as_its_card_says(held_out):
    """On the first 24 of the card's 300 pages; the margin is three times what a bootstrap gives for so few."""
    said, true = (float(x) / 100 for x in re.search(r"\| this classifier \| ([\d.]+) .*?\| ([\d.]+) ", CARD).groups())
    precision, recall = pages.precision_recall(*pages.judge(trained(), held_out))
    assert precision > said - 0.08 and recall > true - 0.08
    plain, _ = pages.precision_recall(*pages.judge(contrast, held_out))
    assert precision > plain + 0.3, "it tells text from lines and photographs"


def test_intervals_hold_the_value(held_out):
    said, true = pages.judge(trained(), held_out)
    for value, (low, high) in zip(pages.precision_recall(said, true), pages.intervals(said, true), strict=True):
        assert low < value < high
    assert pages.intervals(true, true) == [(1.0, 1.0), (1.0, 1.0)]


def test_pages_are_repeatable_and_their_splits_differ():
    same, again = pages.train_page(3), pages.train_page(3)
    assert torch.equal(same.image, again.image) and torch.equal(same.ink, again.ink)
    assert not torch.equal(same.image, pages.validation_page(3).image)
    assert not set(pages.TRAIN_FONTS) & set(pages.TEST_FONTS)


def test_labels_are_where_the_text_is():
    canvas = pages._Canvas(np.random.default_rng(0), ["DejaVuSans"], "china.jpg", (20, 20))
    canvas.scale, canvas.side = 1.0, pages.SIDE
    for name in ("image", "ink", "kind"):
        layer = getattr(canvas, name)
        setattr(canvas, name, layer.resize((pages.SIDE, pages.SIDE)))
    canvas.write((5 * pages.BLOCK, 3 * pages.BLOCK, 9 * pages.BLOCK, 5 * pages.BLOCK))
    page = canvas.page()
    assert (page.ink[3:5, 5:9] > 0).any() and int((page.ink > 0).sum()) == int((page.ink[3:5, 5:9] > 0).sum())
    assert not page.kind.any()


def test_training_command(tmp_path, capsys):
    pages.main(["--out", str(tmp_path), "--pages", "2", "--test-pages", "3", "--authors"])
    out = capsys.readouterr().out
    report = json.loads(out[out.index("{") :])
    assert {"contrast", "authors", "trained"} <= set(report) and report["pages"] == 3
    assert 0 <= report["trained"]["precision"] <= 1 and len(report["trained"]["recall_by_font_size"]) == 5
    assert (tmp_path / "classifier.safetensors").stat().st_size == (ASSETS / "classifier.safetensors").stat().st_size


def test_training_repeats():
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        classifier = TextClassifier()
        pages.train(classifier, 2, log=lambda _: None)
        made.append(classifier.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize(("options", "said"), [({}, "vtc's own"), ({"classifier": "contrast"}, "contrast of the blocks")])
def test_docprune_uses_it_by_default_and_says_so(options, said):
    model = shared("llava", dtype=torch.float32)
    inputs = make_inputs("llava", model, 2)
    with vtc.patch(model, "docprune", keep=1.0, **options) as handle, torch.no_grad():
        model(**inputs)
    assert all(said in image.stages[0].note for image in handle.stats.last.images)


def test_docprune_drops_what_is_blank():
    """A page half text, half blank, as the tower of a patched model would be given it."""
    page = pages.held_out_page(0, (12, 16))
    (need,) = vtc.create("docprune.mask-only").needs
    pixels = pages.cut(page, 0).view(12, 12, 3, 28, 28).permute(2, 0, 3, 1, 4).reshape(1, 3, pages.SIDE, pages.SIDE)
    own = need.measure(vtc.signals.PixelTap(pixels, (24, 24)))[0, :, 0].view(24, 24)[::2, ::2] > 0
    assert torch.equal(own.flatten(), trained()(pages.cut(page, 0)) > 0)
