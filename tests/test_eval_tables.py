"""Tables from fixed stores: golden files in all formats, comparisons, mixed code, size, hostile strings, published numbers.

``python tests/test_eval_tables.py`` rewrites the golden files after an intended change; look at the difference. With a number it
measures how long a store of so many cells takes.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import yaml
from stores import CELLS, ENV, STORE, bless, cell, finish, fixed_store, golden_store, marks

from vtc.cli import main
from vtc.errors import ConfigError, StoreError
from vtc.eval.browser import browse
from vtc.eval.formats import FORMATS
from vtc.eval.paper import load_paper, render_paper
from vtc.eval.report import render_report
from vtc.eval.results import collect
from vtc.eval.stats import Bootstrap
from vtc.eval.store import Store
from vtc.eval.tables import render
from vtc.eval.vtcbench import render_vtc

GOLDEN = Path(__file__).parent / "eval_tables"
ENDING = {"terminal": "txt", "md": "md", "csv": "csv", "latex": "tex"}


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
    narrow = render(results, "terminal", width=140)
    assert max(map(len, narrow.splitlines())) <= 140
    wide = render(results, "terminal")
    assert max(map(len, wide.splitlines())) > 145
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
        line = line.removesuffix(" \\\\").replace(r"$\times$", "").replace("$-$", "")
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


# ---------------------------------------------------------------------------------------------------- several of everything
def store_texts() -> dict[str, str]:
    store = Store(STORE / "store")
    results = collect(store)
    paper = load_paper(str(STORE / "paper.yaml"))
    out = {}
    for fmt in ("md", "csv", "latex"):
        out[f"table.{ENDING[fmt]}"] = render(results, fmt, by_type=True)
        out[f"vtc.{ENDING[fmt]}"] = render_vtc(store, fmt)
        out[f"paper.{ENDING[fmt]}"] = render_paper(paper, results, fmt, name="golden")
    return out


@pytest.fixture(scope="module")
def stored_texts():
    return store_texts()


@pytest.mark.parametrize("name", [f"{kind}.{ending}" for kind in ("table", "vtc", "paper") for ending in ("md", "csv", "tex")])
def test_the_committed_store_gives_the_committed_tables_byte_for_byte(stored_texts, name):
    assert stored_texts[name].encode() == (STORE / "expected" / name).read_bytes()


def test_averages_over_tasks_and_seeds():
    results = collect(Store(STORE / "store"))
    assert results.tasks == ["scenes", "reading"] and results.seeds == [0, 1]
    random = next(r for r in results.rows if r.label == "random" and r.budget == "49")
    assert random.tasks["scenes"].accuracy.value == pytest.approx(16 / 24)  # the mean of the seeds
    fastv = next(r for r in results.rows if r.reducer == "fastv" and r.budget == "49")
    ratios = [fastv.tasks[t].paired.ratio.value for t in results.tasks]
    assert fastv.paired.ratio.value == pytest.approx(sum(ratios) / 2) and ratios[0] == pytest.approx(20 / 22)
    assert ratios[1] == pytest.approx((20 + 0.5 * 4) / 22)  # graded answers count as what they are
    assert fastv.over_random.difference.value == pytest.approx(fastv.accuracy.value - random.accuracy.value)
    assert fastv.layers == [122.0] * 4


def test_the_two_best_of_a_budget_are_marked_and_ties_share():
    lines = render(collect(Store(STORE / "store")), "md").splitlines()
    best = {line.split(" | ")[0].strip("| "): line for line in lines if line.split(" | ")[1:2] == ["49"]}
    assert "**83.3**" in best["fastv layer=2"] and "_66.7_" in best["random"]
    tied = fixed_rows([("a", 20), ("b", 20), ("c", 10)])
    text = render(tied, "md")
    assert text.count("**83.3**") == 2 and "_41.7_" in text
    assert "²" not in render(fixed_rows([("a", 20)]), "terminal")  # a row alone has beaten nobody


def fixed_rows(rows):
    import tempfile

    folder = Path(tempfile.mkdtemp())
    store, listed = Store(folder / "s", create=True), []
    cell(store, listed, "none", "none", "", marks(22))
    for label, right in rows:
        cell(store, listed, label, "fastv", "49", marks(right))
    return collect(finish(store, listed))


def test_a_star_needs_the_correction_for_all_comparisons(tmp_path):
    """One row 8 questions below none: p = 1/128 alone, too much once it is one of many."""

    def stars(others: int, root: Path) -> str:
        store, listed = Store(root, create=True), []
        cell(store, listed, "none", "none", "", [1.0] * 16)
        cell(store, listed, "worse", "fastv", "49", [0.0 if i % 2 == 0 else 1.0 for i in range(16)])
        for i in range(others):
            cell(store, listed, f"same {i}", "fastv", "49", [1.0] * 16)
        line = next(x for x in render(collect(finish(store, listed)), "terminal").splitlines() if x.strip().startswith("worse"))
        return line

    assert "−50.0* [" in stars(0, tmp_path / "a") and "−50.0 [" in stars(9, tmp_path / "b")


def test_mixed_code_is_flagged_and_kept_apart(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", marks(22), engine="old")
    cell(store, listed, "fastv", "fastv", "49", marks(20), engine="old")
    cell(store, listed, "fastv", "fastv", "49", marks(4), engine="new")
    results = collect(finish(store, listed))
    old, new = (r for r in results.rows if r.label == "fastv")
    assert old.code != new.code and old.accuracy.value == 20 / 24 and new.accuracy.value == 4 / 24
    assert old.paired is not None and new.paired is None  # no unreduced run of the new code
    for fmt in ("terminal", "md", "latex"):
        assert "MIXED CODE" in render(results, fmt) and old.code in render(results, fmt)
    rows = list(csv.DictReader(io.StringIO(render(results, "csv"))))
    assert len({r["code"] for r in rows if r["reducer"] == "fastv"}) == 2
    assert "MIXED CODE" in render_report(results)


def test_another_version_of_a_reducer_is_flagged_too(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", marks(22))
    for seed, code in ((0, "c0"), (1, "c1")):
        cell(store, listed, "fastv", "fastv", "49", marks(20), seed=seed, code=code)
    results = collect(finish(store, listed))
    assert results.mixed and sum(r.label == "fastv" for r in results.rows) == 2


def test_cells_the_table_leaves_out_are_mentioned(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", marks(22))
    cell(store, [], "none", "none", "", marks(3), engine="older")
    cell(store, [], "fastv", "fastv", "22", marks(3))
    results = collect(finish(store, listed))
    assert len(results.rows) == 1 and results.rows[0].accuracy.value == 22 / 24
    text = render(results, "md")
    assert "OTHER CODE: the store also holds 1 cell of rows" in text and "also holds 1 cell of other settings" in text


def test_other_library_versions_are_flagged(tmp_path, monkeypatch):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", marks(22))
    monkeypatch.setitem(ENV["versions"], "torch", "2.10.0")
    cell(store, listed, "fastv", "fastv", "49", marks(20))
    assert "MIXED ENVIRONMENTS" in render(collect(finish(store, listed)), "terminal")


def test_other_questions_are_not_compared(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", marks(22))
    cell(store, listed, "fastv", "fastv", "49", marks(20, 20))
    results = collect(finish(store, listed))
    assert results.rows[1].paired is None and "did not answer the same questions: fastv 49" in render(results, "md")


def test_a_cell_without_questions_is_an_error_not_a_number(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", marks(22))
    cell(store, listed, "fastv", "fastv", "49", [1.0])
    folder = store.cells / listed[1]["id"]
    (folder / "samples.jsonl").write_text("")
    bless(folder)
    with pytest.raises(StoreError, match="counts 1 answers, and samples.jsonl holds 0"):
        collect(finish(store, listed))


def own_metric(store: Store, name: str, metric: str, value: float, *, single: bool = True) -> None:
    """Give a cell a benchmark's own metric; without single scores if asked."""
    import json

    folder = store.cells / name
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"main": metric, "scores": {metric: {"value": value, "scale": 100, "higher_is_better": True}}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if not single:
        lines = [
            json.loads(line) | {"score": None, "correct": None} for line in (folder / "samples.jsonl").read_text().splitlines()
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bless(folder)


def test_a_benchmark_with_a_metric_of_its_own_is_told_apart(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    for task in ("pope", "nocaps"):
        for label, reducer, budget in (("none", "none", ""), ("fastv", "fastv", "49")):
            name = cell(store, listed, label, reducer, budget, marks(12 if reducer == "fastv" else 18), task=task)
            own_metric(store, name, "cider" if task == "nocaps" else "f1", 0.5, single=task == "pope")
    results = collect(finish(store, listed))
    assert results.rows[1].accuracy.value == 0.5 and set(results.rows[1].tasks) == {"pope"}
    text = render(results, "md")
    assert "own metric is f1: none 50.0, fastv 49 50.0" in text.replace("\\", "")
    assert "nocaps (cider) scores all answers together" in text.replace("\\", "") and "Failed" not in text
    assert browse(store, overlays=False).samples


def test_several_models_have_tables_of_their_own(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    for model, right in (("a", 20), ("b", 10)):
        cell(store, listed, "none", "none", "", marks(22), model=model)
        cell(store, listed, "fastv", "fastv", "49", marks(right), model=model)
    models = [{"name": m, "parameters": 2_000_000} for m in "ab"]
    results = collect(finish(store, listed, models=models))
    text = render(results, "md", accuracy_only=True)
    assert "### Model a" in text and "### Model b" in text and results.models == ["a", "b"]
    assert results.of("b").rows[1].paired.ratio.value == pytest.approx(10 / 22)


def test_work_and_memory_grow_with_the_cells_of_a_store(tmp_path, monkeypatch):
    """Every cell is read once, its draws are made at most twice, all share one bootstrap, and a row takes a few kilobytes.

    Seconds of 10,000 cells: `python tests/test_eval_tables.py 10000` (numbers in the module).
    """
    monkeypatch.setattr("os.fsync", lambda _: None)
    calls = Counter()

    def counted(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (calls.update([name]), real(*args, **kwargs))[1])

    for owner, name in ((Store, "get"), (Bootstrap, "__init__"), (Bootstrap, "draws"), (Bootstrap, "_weigh")):
        counted(owner, name)
    found = []
    for cells in (100, 300):
        store = big_store(tmp_path / f"{cells}", cells)
        calls.clear()
        _, peak, rows = tabulate(store)
        assert rows == cells and calls["__init__"] == 2  # in each of the two renderings
        found.append((peak, *(calls[name] / 2 for name in ("get", "draws", "_weigh"))))
    (little, *few), (much, *many) = found
    assert few[0] == 100 and many[0] == 300 and all(c <= 3 * f for f, c in zip(few, many, strict=True))
    assert few[1] <= 100 and (much - little) / 200 < 20e3


def big_store(root: Path, cells: int) -> Store:
    store, listed = Store(root, create=True), []
    cell(store, listed, "none", "none", "", marks(36, 40))
    for i in range(1, cells):
        budget = str(1 + i % 50)
        reducer = "random" if i < 51 else "fastv"
        cell(store, listed, reducer if i < 51 else f"method {i // 50}", reducer, budget, marks(i % 40, 40))
    return finish(store, listed)


def tabulate(store: Store) -> tuple[float, int, int]:
    """Seconds, peak of Python's memory in bytes, and rows of a CSV table."""
    start = time.perf_counter()
    rows = render(collect(store), "csv").count("\n") - 1
    seconds = time.perf_counter() - start
    tracemalloc.start()
    try:
        render(collect(store), "csv")
        return seconds, tracemalloc.get_traced_memory()[1], rows
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["table", "STORE", "--by-type"], "reading: color"),
        (["table", "STORE", "-f", "latex", "--accuracy-only"], "\\toprule"),
        (["table", "STORE", "--vtc"], "A difficult %"),
        (["table", "STORE", "--paper", "PAPER"], "an invented model"),
        (["plot", "STORE", "--kind", "layers", "-f", "svg", "--out", "OUT"], "layers.svg"),
        (["report", "STORE", "--output", "OUT/r.html", "--samples", "0"], "r.html"),
    ],
)
def test_commands(arguments, text, tmp_path, capsys):
    places = {"STORE": str(STORE / "store"), "PAPER": str(STORE / "paper.yaml")}
    with pytest.raises(SystemExit) as stop:
        main([places.get(a, a.replace("OUT", str(tmp_path))) for a in arguments])
    assert not stop.value.code and text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "STORE", "-f", "html"], "no table format 'html'"),
        (["table", "STORE", "--paper", "nosuch"], "no file of published numbers 'nosuch'"),
        (["table", "STORE", "--paper", "x", "--vtc"], "one at a time"),
        (["table", "STORE", "--vtc", "--by-type"], "belong to the plain table"),
        (["plot", "STORE", "--kind", "pie"], "no plot 'pie'"),
        (["plot", "STORE", "-f", "gif"], "no picture format 'gif'"),
    ],
)
def test_commands_refuse_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(STORE / "store") if a == "STORE" else a for a in arguments])
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 1 and message in error


# -------------------------------------------------------------------------------------------------------- published numbers
def test_every_file_of_published_numbers_is_valid_and_every_number_has_a_source(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    for path in Path("configs/paper").glob("*.yaml"):
        paper = load_paper(path.stem)
        assert paper.rows and all(row.source in paper.sources for row in paper.rows)
        text = render_paper(paper, collect(Store(STORE / "store")), "md")
        assert all(s.cite.partition(",")[0] in text.replace("\\", "") for s in paper.sources.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"method": "fastv", "source": "nosuch", "values": {"GQA": 1}}]}, "unknown source 'nosuch'"),
        ({"rows": [{"method": "fastv", "values": {"GQA": 1}}]}, "source: field required"),
        ({"rows": [{"method": "fastv", "source": "p", "values": {"GQAA": 1}}]}, "no column 'GQAA'; did you mean 'GQA'"),
        ({"rows": [{"method": "fastv", "source": "p", "values": {"GQA": "about 60"}}]}, "is not a number"),
        ({"title": None}, "title"),
    ],
)
def test_published_numbers_without_source_or_meaning_are_refused(tmp_path, change, message):
    data = {
        "title": "t",
        "model": "m",
        "sources": {"p": {"cite": "P", "where": "table 1", "kind": "paper"}},
        "columns": {"GQA": {"task": "gqa"}},
        "rows": [{"method": "fastv", "source": "p", "values": {"GQA": 60.0}}],
    }
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(data | change))
    with pytest.raises(ConfigError, match=message):
        load_paper(str(path))


def test_an_unknown_name_of_published_numbers_lists_the_known(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(ConfigError, match="did you mean 'llava15-7b'"):
        load_paper("llava-15-7b")


if __name__ == "__main__":
    import tempfile

    if len(sys.argv) > 1:  # how long a store of so many cells takes
        os.fsync = lambda _: None
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak, rows = tabulate(big_store(Path(folder) / "s", int(sys.argv[1])))
            print(f"{rows} cells: {seconds:.1f} s, {peak / 1e6:.0f} MB")
        sys.exit()
    GOLDEN.mkdir(exist_ok=True)
    shutil.rmtree(STORE / "store", ignore_errors=True)
    golden_store(STORE / "store")
    (STORE / "expected").mkdir(exist_ok=True)
    for file, content in store_texts().items():
        (STORE / "expected" / file).write_bytes(content.encode())
    with tempfile.TemporaryDirectory() as folder:
        for file, content in golden_texts(Path(folder) / "s").items():
            (GOLDEN / file).write_text(content, encoding="utf-8")
