"""The HTML report: complete, inert whatever a store holds, readable by machines and in a real browser.

The tests in Chromium run where one is found (``chromium``, ``chromium-browser``, ``google-chrome`` or ``chrome`` on the path, or
the environment variable ``CHROMIUM``); no package of PyPI brings one along. ``make browser`` installs Debian's.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from stores import cell, finish, fixed_store, marks

from vtc.eval.browser import browse
from vtc.eval.report import render_report, summary, write_report
from vtc.eval.results import collect
from vtc.eval.run import Sweep
from vtc.eval.store import Store
from vtc.eval.sweepfile import parse_sweep

EVIL = '"><script>document.title="PWNED"</script><img src=x onerror="document.title=\'PWNED\'">\x1b\u202e{{7*7}}'
"""In labels, questions, answers, file names."""
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: `make browser` installs one")
YAML = """\
data: {scenes: {n: 8, types: [color, count]}}
budgets: [49]
reducers: [fastv, visionzip]
threads: 1
speed: false
"""


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    VOID = {"meta", "br", "img", "link", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, *names: str) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.tags if tag in names]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A real sweep, so that pictures and kept tokens are there."""
    store = Store(tmp_path_factory.mktemp("report") / "store", create=True)
    Sweep(parse_sweep(YAML), "tiny.yaml").run(store, Console(quiet=True))
    return store


@pytest.fixture(scope="module")
def page(swept):
    return write_report(swept).read_text(encoding="utf-8")


@functools.cache
def hostile_page(root: Path) -> str:
    store, listed = Store(root / "hostile", create=True), []
    cell(store, listed, "none", "none", "", marks(22), task=EVIL)
    for label, budget in ((EVIL, "49"), ("fastv", "49"), (EVIL, "11")):
        cell(store, listed, label, "fastv", budget, marks(12), task=EVIL)
    config = {"seed": 0, "bootstrap": {"resamples": 400, "confidence": 0.95}, "tasks": [{"name": EVIL}]}
    finish(store, listed, config=config, source=EVIL, written=EVIL, constant_guess={EVIL: 0.5})
    found = browse(store)
    for sample in found.samples:
        sample.question, sample.gold, sample.kind, sample.image = EVIL, EVIL, EVIL, "data:image/png;base64,"
        for entry in sample.entries.values():
            entry.text = EVIL
    found.notes.append(EVIL)
    return render_report(collect(store), browser=found)


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    return hostile_page(tmp_path_factory.mktemp("evil"))


# ------------------------------------------------------------------------------------------------------------- contents
def test_one_file_with_everything_in_it(swept, page):
    read = Page(page)
    assert (swept.root / "report.html").is_file() and read.open == []
    text = " ".join(read.text)
    for part in ("Summary", "Tables", "Plots", "Samples", "Conditions", "fastv", "to random", "VTC-Bench", "seed 0", "torch "):
        assert part in text
    assert len(read.all("svg")) > 5 and len(read.all("details")) == 8
    # xmlns declarations are names, not addresses that a browser would open
    links = [a[name] for a in read.all("a", "img", "image", "use", "link", "script") for name in ("src", "href") if name in a]
    links += [a["xlink:href"] for _, a in read.tags if "xlink:href" in a]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in page and not re.search(r"url\((?!#|&quot;#)", page)


def test_size_is_reasonable_and_the_cap_is_stated(swept, page):
    assert len(page) < 2_000_000 and "8 of 8 questions are shown (at most 24" in page
    few = browse(swept, 3)
    assert len(few.samples) == 3 and few.notes[0].startswith("3 of 8 questions")


def test_pictures_answers_and_kept_tokens_of_every_method(swept):
    found = browse(swept)
    assert len(found.samples) == 8 and {s.kind for s in found.samples} == {"color", "count"}
    stored = {c["label"]: {s["id"]: s for s in swept.get(c["id"]).samples} for c in swept.read_sweep()["cells"]}
    for sample in found.samples:
        assert sample.image.startswith("data:image/png") and sample.question.endswith("?") and sample.grid == (14, 14)
        for (label, _), entry in sample.entries.items():
            assert entry.text == stored[label][sample.id]["answer"]
            cells = {
                m: sum(int(n) for n in re.findall(r"h(\d+)v1", path)) for m, path in (("d", entry.dropped), ("m", entry.merged))
            }
            if label == "visionzip":
                assert cells["m"] > 0 and 0 <= cells["d"] < 196 - 49  # what it merges is not shown as dropped
            elif label in ("random", "uniform", "fastv"):
                assert cells == {"d": 196 - 49, "m": 0}


def test_kept_tokens_are_left_out_with_a_reason(swept, tmp_path, monkeypatch):
    assert any("without running the model" in n for n in browse(swept, overlays=False).notes)
    monkeypatch.setattr("vtc.eval.env.engine_version", lambda: "another")
    found = browse(swept)
    assert not any(e.dropped for s in found.samples for e in s.entries.values())
    assert any("the code has changed" in n for n in found.notes)
    store = fixed_store(tmp_path / "s")
    notes = browse(store).notes
    assert any("pictures and questions cannot be shown" in n for n in notes)


def test_samples_that_divide_the_rows_come_first(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", [1.0] * 8)
    for i, label in enumerate("abcd"):
        cell(store, listed, label, "fastv", "49", [1.0, 1.0, 1.0, float(i < 2), 1.0, 1.0, float(i < 2), 1.0])
    chosen = browse(finish(store, listed), 2).samples
    assert {s.id for s in chosen} == {"scenes/1/3", "scenes/3/6"} and all(s.right == 2 for s in chosen)


def test_the_summary_compares_like_with_like(tmp_path):
    lines = summary(collect(fixed_store(tmp_path / "s")))
    assert lines[0].startswith("Unreduced, the model answers 90.0 %")
    assert "uniform is ahead with 70.0 %" in lines[1] and "no method at a like number of tokens" in lines[1]
    assert "apart, because more tokens per layer are at work: fastv layer=2 (85.0 % from 122 tokens per layer)" in lines[1]


def test_the_report_without_matplotlib_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render_report(collect(fixed_store(tmp_path / "s")))
    assert "<svg" not in page and "matplotlib is not installed" in page


def test_a_report_that_cannot_be_written_says_where(tmp_path):
    from vtc.errors import StoreError

    store = fixed_store(tmp_path / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--output"):
        write_report(store, tmp_path / "file" / "r.html", samples=0)


# --------------------------------------------------------------------------------------------------------- accessibility
def test_headings_captions_and_texts_for_those_who_cannot_see(page):
    read = Page(page)
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert len(read.all("caption")) == len(read.all("table"))
    assert all("scope" in a for a in read.all("th"))
    assert all(a.get("alt") for a in read.all("img"))
    assert all(a.get("aria-label") for _, a in read.tags if a.get("role") in ("img", "region"))
    assert read.all("html")[0]["lang"] == "en" and read.all("main")
    scrolling = [a for _, a in read.tags if "scroll" in a.get("class", "").split()]
    assert scrolling and all(a.get("tabindex") == "0" for a in scrolling)  # reachable by keyboard
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))  # the plots' ids do not collide
    targets = [a["href"][1:] for a in read.all("a") if a.get("href", "").startswith("#")]
    assert targets and set(targets) <= set(ids)


# ------------------------------------------------------------------------------------------------------ hostile strings
def test_hostile_strings_are_text(evil):
    read = Page(evil)
    assert read.open == [] and len(read.all("script")) == 1
    assert all(not name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert all(a["src"].startswith("data:") for a in read.all("img"))
    assert "\x1b" not in evil and "\u202e" not in evil and "{{7*7}}" in evil
    assert sum('<script>document.title="PWNED"</script>' in piece for piece in read.text) > 10


def test_the_policy_allows_our_script_only(page):
    policy = Page(page).all("meta")[1]["content"]
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "script-src 'sha256-" in policy


# -------------------------------------------------------------------------------------------------------- real browser
def chromium(*arguments: str, folder: Path) -> str:
    run = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@in_chromium
def test_the_page_works_in_a_browser(page, tmp_path):
    """The script runs under the policy: headings became buttons, and a click sorts inside a budget."""
    probe = """<script>addEventListener("load", () => {
      const table = document.querySelector("table.sortable"), button = table.tHead.rows[0].cells[2].querySelector("button");
      button.click();
      const read = (body) => [...body.rows].filter((r) => !r.classList.contains("group")).map((r) => r.cells[2].textContent);
      document.title = JSON.stringify([...table.tBodies].map(read)) + table.tHead.rows[0].cells[2].getAttribute("aria-sort");
    });</script></body>"""
    text = re.search(r"<script>(addEventListener.*?)</script>", probe, re.DOTALL)[1]
    allowed = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    probed = page.replace("script-src '", f"script-src 'sha256-{allowed}' '", 1).replace("</body>", probe)
    (tmp_path / "page.html").write_text(probed, encoding="utf-8")
    dom = chromium("--dump-dom", (tmp_path / "page.html").as_uri(), folder=tmp_path)
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    assert title.endswith("descending")
    accuracies = [float(x) for x in re.findall(r'(?:&quot;|")([\d.]+) ', title)]
    assert len(accuracies) == 6 and accuracies[1:] == sorted(accuracies[1:], reverse=True)
    assert 'id="controls" class="controls"' in dom or 'class="controls" id="controls">' in dom  # no longer hidden


@in_chromium
def test_nothing_hostile_runs_in_a_browser(evil, tmp_path):
    (tmp_path / "page.html").write_text(evil, encoding="utf-8")
    dom = chromium("--dump-dom", (tmp_path / "page.html").as_uri(), folder=tmp_path)
    assert "<button" in dom  # our script ran
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]
    assert title.startswith("vtc sweep: ") and len(Page(dom).all("script")) == 1


@in_chromium
@pytest.mark.parametrize("width", [1400, 520])  # as narrow as a headless window gets
def test_a_screenshot_shows_the_page(page, tmp_path, width):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    picture = tmp_path / "page.png"
    chromium(f"--window-size={width},2400", f"--screenshot={picture}", (tmp_path / "page.html").as_uri(), folder=tmp_path)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (2400, width, 3)
    dark = (pixels.sum(-1) < 250).mean()
    assert 0.005 < dark < 0.4 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200  # text and plots on a light ground
    assert (pixels[:, -4:].sum(-1) > 600).all()  # nothing sticks out to the right
