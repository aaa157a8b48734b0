"""Tables and report from a fixed store: golden files in all formats, hostile strings, missing speed.

``python tests/test_eval_tables.py`` rewrites the golden files after an intended change; look at the difference.
"""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vtc.errors import StoreError
from vtc.eval.report import render_report, summary, write_report
from vtc.eval.store import SCHEMA, Store, cell_id
from vtc.eval.tables import FORMATS, collect, render

GOLDEN = Path(__file__).parent / "eval_tables"
ENDING = {"terminal": "txt", "md": "md", "csv": "csv", "latex": "tex"}
ENV = {
    "commit": {"id": "0123456789abcdef", "dirty": False},
    "machine": {"cpu": "Example CPU", "cores": 2, "torch_threads": 1, "gpu": None, "system": "Linux"},
    "versions": {"python": "3.11.7", "vtc": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0", "numpy": "2.0.0"},
    "seed": 0,
}
TYPES = ("color", "count")
# label, reducer, budget, right answers of 40, tokens kept, layer average, FLOPs, prefill ms (None: not timed)
CELLS = (
    ("none", "none", "", 36, 196, 196.0, 930_000_000, 12.0),
    ("random", "random", "49", 27, 49, 49.0, 613_000_000, 6.0),
    ("uniform", "uniform", "49", 28, 49, 49.0, 613_000_000, 6.2),
    ("downsample", "downsample", "49", 24, 49, 49.0, 214_000_000, 6.1),
    ("fastv layer=2", "fastv", "49", 34, 49, 122.5, 771_000_000, None),
    ("random", "random", "11", 20, 11, 11.0, 545_000_000, 4.0),
    ("divprune", "divprune", "11", 0, 0, 0.0, 0, None),  # failed
)


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.2 * value}


def timings(ms: float, kv: int) -> dict:
    parts = {f"{p}_ms": interval(x) for p, x in (("vision", 14.0), ("prefill", ms), ("ttft", 14.5 + ms), ("decode", 1.25))}
    return {**parts, "reducer_ms": interval(0.4), "kv_bytes": kv, "peak_bytes": None}


def fixed_store(root: Path, cells=CELLS, types=TYPES, mismatch: float = 0.0) -> Store:
    store = Store(root, create=True)
    listed = []
    for label, reducer, budget, right, kept, avg, count, ms in cells:
        config = {"schema": SCHEMA, "reducer": [label, budget]}
        cell = cell_id(config)
        listed.append({"id": cell, "label": label, "reducer": reducer, "budget": budget})
        if not count:
            store.put_failure(cell, config, ENV, "RuntimeError: out of luck")
            continue
        marks = [(7 * i) % 40 < right for i in range(40)]
        samples = [
            {"id": f"scene/{i // 4}/{i}", "image": f"scene/{i // 4}", "type": types[i % 2], "correct": ok}
            for i, ok in enumerate(marks)
        ]
        by_type = {t: {"n": 20, "correct": sum(marks[j::2]), "accuracy": sum(marks[j::2]) / 20} for j, t in enumerate(types)}
        parts = {"tower": 1, "projector": 1, "decoder": 1, "head": 1, "reducer": 0, "total": count}
        metrics = {
            "n": 40,
            "correct": right,
            "accuracy": right / 40,
            "by_type": by_type,
            "tokens": {"slots": 196.0, "kept": float(kept), "avg": avg},
            "flops": {"counted": parts, "formula": parts, "mismatch": mismatch if reducer == "random" else 0.0, "tokens": {}},
            "kv_bytes": int(avg * 4096),
        }
        store.put(cell, config, ENV, metrics, samples)
        if ms is not None:
            ratio = {p: interval(12.0 / ms) for p in ("vision", "prefill", "ttft", "decode")}
            store.put_speed(
                cell,
                {
                    "settings": {"repeats": 7, "warmup": 2, "decode_steps": 4, "batch_size": 1, "threads": 1},
                    "host": {},
                    "env": ENV,
                    "batch_size": 1,
                    "prompt_tokens": 207,
                    "unreduced": timings(12.0, 1),
                    "reduced": timings(ms, int(avg * 4096)),
                    "speedup": ratio,
                },
            )
    store.write_sweep(
        {
            "schema": SCHEMA,
            "source": "demo.yaml",
            "written": "2026-11-21T12:00:00+00:00",
            "config": {"seed": 0, "bootstrap": {"resamples": 500, "confidence": 0.95}},
            "env": ENV,
            "model": {"name": "pocket", "parameters": 1_902_848, "decoder_layers": 4, "visual_tokens": 196},
            "questions": {"scenes": 40, "easy_vqa": 0, "images": 10},
            "constant_guess": {t: 0.25 for t in types},
            "cells": listed,
        }
    )
    return store


def golden_texts(root: Path) -> dict[str, str]:
    results = collect(fixed_store(root))
    found = {f"full.{ENDING[f]}": render(results, f, by_type=f != "latex") for f in FORMATS}
    return found | {f"accuracy.{ENDING[f]}": render(results, f, accuracy_only=True) for f in FORMATS}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return golden_texts(tmp_path_factory.mktemp("golden") / "s")


@pytest.mark.parametrize("name", [f"{kind}.{ending}" for kind in ("full", "accuracy") for ending in ENDING.values()])
def test_golden(texts, name):
    assert texts[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_two_stores_with_the_same_answers_give_the_same_accuracy_table(tmp_path):
    slow = [(*c[:7], None if c[7] is None else 3 * c[7]) for c in CELLS]
    for fmt in FORMATS:
        one = render(collect(fixed_store(tmp_path / f"1{fmt}")), fmt, accuracy_only=True, by_type=True)
        two = render(collect(fixed_store(tmp_path / f"2{fmt}", slow)), fmt, accuracy_only=True, by_type=True)
        assert one == two and "ms" not in one.split() and "Example CPU" not in one


def test_speed_that_was_not_measured_is_a_dash(tmp_path):
    lines = render(collect(fixed_store(tmp_path / "s")), "terminal").splitlines()
    fastv = next(line for line in lines if line.strip().startswith("fastv"))
    assert fastv.count("–  ") >= 3 and "85.0" in fastv  # accuracy and FLOPs are there, timings are not
    rows = list(csv.DictReader(io.StringIO(render(collect(Store(tmp_path / "s")), "csv"))))
    untimed = next(r for r in rows if r["reducer"] == "fastv layer=2")
    assert (
        untimed["prefill_ms"] == untimed["prefill_speedup"] == untimed["reduction_ms"] == "" and untimed["flops"] == "771000000"
    )


def test_the_unreduced_row_comes_first_and_shares_are_of_it(tmp_path):
    results = collect(fixed_store(tmp_path / "s"))
    assert results.rows[0].reducer == "none" and results.unreduced is results.rows[0]
    random = results.rows[1]
    assert random.accuracy.value == 27 / 40 and random.paired.ratio.value == pytest.approx(27 / 36)
    assert random.paired.difference.value == pytest.approx(-9 / 40) and random.flops_share == pytest.approx(613 / 930)


def test_failed_and_missing_cells_are_named(tmp_path):
    store = fixed_store(tmp_path / "s")
    sweep = store.read_sweep()
    sweep["cells"].append({"id": "e" * 16, "label": "todre", "reducer": "todre", "budget": "11"})
    store.write_sweep(sweep)
    text = render(collect(store), "terminal")
    assert "Failed: divprune 11: RuntimeError: out of luck" in text and "Not run yet: todre 11" in text
    assert next(line for line in text.splitlines() if line.strip().startswith("divprune")).split()[2] == "failed"


def test_a_disagreement_of_the_flops_is_marked(tmp_path):
    text = " ".join(render(collect(fixed_store(tmp_path / "s", mismatch=0.05)), "terminal").split())
    assert "613! (66%)" in text and "! marks a disagreement above 2 % with the closed formula (worst: 5.0 %)" in text
    assert "!" not in render(collect(fixed_store(tmp_path / "t", mismatch=0.001)), "terminal")


def test_a_narrow_terminal_folds_entries_and_loses_none(tmp_path):
    results = collect(fixed_store(tmp_path / "s"))
    narrow = render(results, "terminal", width=122)
    assert max(map(len, narrow.splitlines())) <= 122
    wide = render(results, "terminal")
    assert max(map(len, wide.splitlines())) > 125
    assert sorted(w for w in narrow.split() if "─" not in w) == sorted(w for w in wide.split() if "─" not in w)
    assert "\x1b[" in render(results, "terminal", color=True)


def test_damage_is_reported_not_skipped(tmp_path):
    store = fixed_store(tmp_path / "s")
    cell = store.read_sweep()["cells"][1]["id"]
    (store.cells / cell / "samples.jsonl").write_text("")
    with pytest.raises(StoreError, match="damaged"):
        collect(store)
    (store.root / "sweep.json").write_text("{}")
    with pytest.raises(StoreError, match="sweep.json is damaged"):
        collect(store)


# ---------------------------------------------------------------------------------------------------- hostile strings
EVIL = '=<script>alert("x")</script>|a_b^{c}$d$%&#~\\e`*!\x1b[31m\u202e\n[red]'
EVIL_TYPE = "<img src=x onerror=alert(1)>|_"


@pytest.fixture
def hostile(tmp_path):
    cells = [CELLS[0], (EVIL, "fastv", "49", *CELLS[4][3:]), (EVIL, "divprune", "11", 0, 0, 0.0, 0, None)]
    return collect(fixed_store(tmp_path / "s", cells, (EVIL_TYPE, "count")))


def test_no_format_passes_on_control_characters(hostile):
    for text in (*(render(hostile, f, by_type=True) for f in FORMATS), render_report(hostile)):
        assert "\x1b" not in text and "\u202e" not in text


def test_html_is_escaped(hostile):
    page = render_report(hostile)
    tags: list[str] = []
    text: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            assert not any(
                name.startswith("on") or name in ("src", "href") and "#" not in (value or "") for name, value in attrs
            )

        def handle_data(self, data):
            text.append(data)

    Reader().feed(page)
    assert "script" not in tags and "img" not in tags
    assert any('=<script>alert("x")</script>|a_b' in piece for piece in text)


def test_markdown_keeps_its_columns_and_its_text(hostile):
    text = render(hostile, "md", by_type=True)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "<script" not in re.sub(r"\\.", "", text) and "<img" not in re.sub(r"\\.", "", text)


def test_latex_has_no_bare_special_character(hostile):
    text = render(hostile, "latex")
    body = [line for line in text.splitlines() if "alert" in line]
    assert len(body) >= 2
    for line in body:
        line = line.removesuffix(" \\\\").replace(r"$\times$", "")
        line = re.sub(
            r"\\(textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar|textquotedbl)\{\}", "", line
        )
        line = re.sub(r"^\\parbox\{\\linewidth\}\{\\footnotesize (.*)\}\\par$", r"\1", line)
        line = line.replace("{[}", "").replace("{]}", "")
        assert not re.search(r"(?<!\\)[$#_%^~{}|<>\"]", line), line
        assert not re.search(r"\\[^$&#_%{}]", line), line


def test_csv_reads_back_and_spreadsheets_do_not_run_it(hostile):
    rows = list(csv.DictReader(io.StringIO(render(hostile, "csv", by_type=True))))
    assert rows[1]["reducer"].startswith("'=<script>") and f"accuracy:{EVIL_TYPE}" in rows[1]
    assert len(rows) == 3 and all(None not in row for row in rows)


# ------------------------------------------------------------------------------------------------------------- report
def test_the_report_is_one_file_with_everything_in_it(tmp_path):
    store = fixed_store(tmp_path / "s")
    path = write_report(store)
    page = path.read_text(encoding="utf-8")
    assert path == store.root / "report.html"
    assert page.count("<svg") == 1 and "fastv layer=2" in page and "Example CPU" in page and "66%" in page
    # xmlns declarations are names, not addresses that a browser would open
    assert not re.search(r"(src|href)=\"(?!#)", page) and "@import" not in page and "url(http" not in page


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


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for file, content in golden_texts(Path(folder) / "s").items():
            (GOLDEN / file).write_text(content, encoding="utf-8")
