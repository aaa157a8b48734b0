"""Every number that a table prints, recomputed from the cells by code of its own; what follows from a few scores, by hand.

The store has what real ones have: images with different numbers of questions, graded answers, several seeds (not everywhere), cells
that failed, timings that are missing, tasks whose prompts differ in length.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from stores import ENV, cell, finish, interval

from vtc.eval.results import collect
from vtc.eval.scores import Questions, Reader, score_of
from vtc.eval.store import SCHEMA, Store, cell_id
from vtc.eval.tables import render
from vtc.eval.vtcbench import render_vtc

GROUPS = {"scenes": [0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 6], "reading": [0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 5]}
TEXT = {"scenes": 12, "reading": 40}
"""Text tokens of a prompt, by task."""
SEED, DRAWS, LEVEL = 3, 300, 0.9


def scores(task: str, right: float, seed: int) -> list[float]:
    """About a share of right answers; in `reading` they are graded."""
    rng = np.random.default_rng([len(task), int(100 * right), seed])
    found = rng.random(len(GROUPS[task])) < right
    return [float(f) if task == "scenes" else float(rng.choice([0.25, 0.5, 1.0]) if f else 0) for f in found]


def store_of(root: Path, tasks=("scenes", "reading")) -> Store:
    """Two tasks or one; `none`, `random` and one method have several seeds; some cells failed and some were not timed."""
    store, listed = Store(root, create=True), []
    rows = [
        ("none", "none", "", 0.95, 196, (0, 1)),
        ("random", "random", "49", 0.6, 49, (0, 1, 2)),
        ("uniform", "uniform", "49", 0.65, 49, (0,)),
        ("downsample", "downsample", "49", 0.5, 49, (0,)),
        ("fastv layer=2", "fastv", "49", 0.9, 49, (0, 1)),
        ("divprune", "divprune", "49", 0.8, 49, (1,)),
        ("random", "random", "11", 0.3, 11, (0,)),
        ("fastv layer=2", "fastv", "11", 0.7, 11, (0, 1)),
        ("dart", "dart", "50", 0.85, 50, (0,)),
    ]
    for number, (label, reducer, budget, right, kept, seeds) in enumerate(rows):
        for task, seed in itertools.product(tasks, seeds):
            avg = (196 + 2 * kept) / 3 if reducer == "fastv" else kept
            name = cell(
                store, listed, label, reducer, budget, scores(task, right, seed), task=task, seed=seed, groups=GROUPS[task],
                kept=kept, avg=avg, flops=10**6 * (TEXT[task] + int(avg)) + 7 * seed,
            )  # fmt: skip
            if number % 3 != 2 and not (task == "scenes" and seed == 0 and reducer == "random"):
                store.put_speed(name, speed_of(number + 10 * seed + 3 * len(task)))
    for task, budget in (
        ("reading", "49"),
        ("scenes", "11"),
        ("reading", "11"),
    ):  # todre runs on one of four, and once fails alone
        for seed in (0, 1):
            config = {"schema": SCHEMA, "reducer": {"name": "todre", "code": "c0"}, "at": [task, budget, seed], "engine": "e0"}
            store.put_failure(cell_id(config), config, {}, f"RuntimeError: no luck on {task}")
            if task in tasks:
                at = {"label": "todre", "reducer": "todre", "budget": budget, "task": task, "seed": seed}
                listed.append({"id": cell_id(config), **at})
    cell(
        store,
        listed,
        "todre",
        "todre",
        "49",
        scores("scenes", 0.75, 0),
        task="scenes",
        groups=GROUPS["scenes"],
        flops=5 * 10**7,
    )
    return finish(store, listed, config={"seed": SEED, "bootstrap": {"resamples": DRAWS, "confidence": LEVEL}})


def speed_of(number: int) -> dict:
    """Timings that no two cells share."""
    names = ("vision_ms", "prefill_ms", "ttft_ms", "decode_ms", "reducer_ms")
    side = {name: interval(1.0 + number + i / 7) for i, name in enumerate(names)}
    return {
        "settings": {"repeats": 7, "warmup": 2, "decode_steps": 4, "batch_size": 1, "threads": 1},
        "host": {},
        "env": ENV,
        "batch_size": 1,
        "prompt_tokens": 207,
        "unreduced": side,
        "reduced": side,
        "speedup": {p: interval(1 + i / 3 + number / 50) for i, p in enumerate(("vision", "prefill", "ttft", "decode"))},
    }


# ----------------------------------------------------------------------------------------------------- independent numbers
class Recomputed:
    """The cells of a store as one data frame of answers and one of cells, straight from the files."""

    def __init__(self, store: Store) -> None:
        listed = json.loads((store.root / "sweep.json").read_text())["cells"]
        cells, answers = [], []
        for number, at in enumerate(listed):
            folder = store.cells / at["id"]
            status, metrics, speed = (
                json.loads(p.read_text()) if p.exists() else {}
                for p in (folder / "status.json", folder / "metrics.json", folder / "speed.json")
            )
            at = {**at, "row": (at["label"], at["budget"]), "ok": bool(metrics)}
            if metrics:
                at |= {**metrics["tokens"], "flops": metrics["flops"]["counted"]["total"], "kv": metrics["kv_bytes"]}
                samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
                answers += [{**s, **at, "number": i, "order": number} for i, s in enumerate(samples)]
            cells.append({**at, "speed": speed or None, "error": status.get("error", ""), "order": number})
        self.cells, self.answers = pd.DataFrame(cells), pd.DataFrame(answers)
        self.tasks = list(self.answers.task.unique())
        self.seeds = self.answers.groupby(["row", "task"]).seed.unique().to_dict()

    def mean(self, row, task, seeds=None) -> pd.DataFrame:
        """Score of every question of a row on a task, averaged over its seeds (or those asked for, else its first)."""
        mine = self.answers[(self.answers.row == row) & (self.answers.task == task)]
        if seeds is not None:
            there = list(mine.seed.unique())
            mine = pd.concat([mine[mine.seed == (s if s in there else there[0])] for s in seeds])
        return mine.groupby(["number", "image", "type"], as_index=False).score.mean()

    def draws(self, scores: pd.DataFrame) -> np.ndarray:
        """Accuracies of draws of whole images; tasks after the first have streams of their own."""
        task = scores.image[0].partition("/")[0]
        by_image = scores.groupby("image").score.agg(["sum", "count"]).sort_index()
        stream = SEED if task == self.tasks[0] else (SEED, self.tasks.index(task))
        rng = np.random.default_rng(stream)
        picks = rng.multinomial(len(by_image), [1 / len(by_image)] * len(by_image), size=DRAWS)
        return (picks @ by_image["sum"].to_numpy()) / (picks @ by_image["count"].to_numpy())

    def interval(self, value: float, draws: np.ndarray) -> list[float]:
        return [value, *np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]

    def against(self, row, other) -> dict[str, list[float]] | None:
        """Difference and share with their intervals, and the p-value of the sign-flip test."""
        tasks = [t for t in self.tasks if (row, t) in self.seeds]
        if not all((other, t) in self.seeds for t in tasks):
            return None
        mine = [self.mean(row, t) for t in tasks]
        base = [self.mean(other, t, self.seeds[row, t]) for t in tasks]
        value = [np.mean([m.score.mean() for m in side]) for side in (mine, base)]
        drawn = [np.mean([self.draws(m) for m in side], 0) for side in (mine, base)]
        ratio = np.mean([m.score.mean() / b.score.mean() for m, b in zip(mine, base, strict=True)])
        with np.errstate(divide="ignore"):  # a draw of images on which the reference is never right has no share
            shares = np.mean([self.draws(m) / self.draws(b) for m, b in zip(mine, base, strict=True)], 0)
        apart = [(m.score - b.score).groupby(m.image).sum() for m, b in zip(mine, base, strict=True)]
        whole = apart[0] * len(self.seeds[row, tasks[0]])
        if len(tasks) == 1 and np.allclose(whole, whole.round()):
            signs = np.array(list(itertools.product((1, -1), repeat=len(whole))))
            p = np.mean(abs(signs @ whole.round()) >= abs(whole.sum()) - 1e-9)
        else:  # the normal limit; with several tasks every question counts as one of its task
            d = np.concatenate([a / (1 if len(tasks) == 1 else len(m)) for a, m in zip(apart, mine, strict=True)])
            p = 1.0 if not d.any() else 2 * norm.sf(abs(d.sum()) / math.sqrt((d**2).sum()))
        return {
            "difference": self.interval(value[0] - value[1], drawn[0] - drawn[1]),
            "share_of_full": self.interval(ratio, shares[np.isfinite(shares)]),
            "p": p,
        }


def holm(p: dict) -> dict:
    """Textbook: sorted, times the comparisons left, never falling."""
    out, highest = {}, 0.0
    for rank, key in enumerate(sorted(p, key=p.get)):
        highest = max(highest, min(1.0, p[key] * (len(p) - rank)))
        out[key] = highest
    return out


@pytest.fixture(scope="module", params=[("scenes", "reading"), ("scenes",)], ids=["two-tasks", "one-task"])
def made(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("os.fsync", lambda _: None)
        store = store_of(tmp_path_factory.mktemp("numbers") / "s", request.param)
    table = pd.read_csv(io.StringIO(render(collect(store), "csv", by_type=True)), keep_default_na=False)
    table["row"] = list(zip(table.reducer, table.budget.astype(str).replace("all", ""), strict=True))
    return store, Recomputed(store), table.set_index("row")


def number(text) -> float:
    return math.nan if text == "" else float(text)


def triple(line: pd.Series, name: str, ends=("low", "high")) -> list[float]:
    return [number(line[name]), *(number(line[f"{name}_{end}"]) for end in ends)]


def equal(got, expected, what) -> None:
    """To the six digits that the table has; what is not there is not there on both sides."""
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=str(what))


def test_accuracies_and_their_intervals(made):
    _, own, table = made
    assert list(table.index) == list(dict.fromkeys(own.cells.row))
    for row, line in table.iterrows():
        tasks = [t for t in own.tasks if (row, t) in own.seeds]
        if not tasks:
            equal(triple(line, "accuracy"), [math.nan] * 3, row)
            assert line["error"].startswith("RuntimeError")
            continue
        means = [own.mean(row, t) for t in tasks]
        expected = own.interval(np.mean([m.score.mean() for m in means]), np.mean([own.draws(m) for m in means], 0))
        equal(triple(line, "accuracy"), expected, row)
        for task, mean in zip(tasks, means, strict=True):
            if len(own.tasks) > 1:
                got = triple(line, f"accuracy:{task}")
                equal(got, own.interval(mean.score.mean(), own.draws(mean)), (row, task))
            for kind, of_kind in mean.groupby("type"):
                name = f"accuracy:{task}: {kind}" if len(own.tasks) > 1 else f"accuracy:{kind}"
                equal(number(line[name]), of_kind.score.mean(), (row, name))
    assert int(table.questions.iloc[0]) == sum(len(GROUPS[t]) for t in own.tasks) and table.seed.iloc[0] == "0+1+2"


def test_differences_shares_and_corrected_p_values(made):
    _, own, table = made
    to_none, to_random = {}, {}
    for row, line in table.iterrows():
        there = any((row, t) in own.seeds for t in own.tasks)
        none = own.against(row, ("none", "")) if there else None
        random = own.against(row, ("random", row[1])) if there and row[0] not in ("none", "random") else None
        for found, columns in ((none, ("difference", "share_of_full")), (random, ("difference_random",))):
            for column in columns:
                expected = [math.nan] * 3 if found is None else found[column.removesuffix("_random")]
                equal(triple(line, column), expected, (row, column))
        if none is not None and row[0] != "none":
            to_none[row] = none["p"]
        if random is not None:
            to_random[row] = random["p"]
    assert len(to_none) >= 7 and 4 <= len(to_random) < len(to_none)
    for column, p in (("difference_p_holm", to_none), ("difference_random_p_holm", to_random)):
        expected = holm(p)
        for row, line in table.iterrows():
            equal(number(line[column]), expected.get(row, math.nan), (row, column))


def test_tokens_and_costs(made):
    _, own, table = made
    good = own.cells[own.cells.ok]
    full = good[[r == ("none", "") for r in good.row]].groupby("task").flops.mean()
    columns = ("tokens_kept", "tokens_avg_layers", "flops", "flops_share", "kv_bytes")
    for row, line in table.iterrows():
        mine = good[[r == row for r in good.row]]
        if not len(mine):
            equal([number(line[c]) for c in columns], [math.nan] * 5, row)
            continue
        expected = [
            mine.kept.mean(),
            mine.avg.mean(),
            mine.flops.mean(),
            mine.flops.mean() / full[mine.task].mean(),
            mine.kv.mean(),
        ]
        got = [number(line[c]) for c in columns]
        equal(got, expected, row)


def test_timings_are_those_of_the_row_s_first_timed_cell(made):
    _, own, table = made
    columns = [
        *((f"{p}_ms", ("reduced", f"{p}_ms")) for p in ("vision", "prefill", "ttft", "decode")),
        ("reduction_ms", ("reduced", "reducer_ms")),
        *((f"{p}_speedup", ("speedup", p)) for p in ("prefill", "ttft")),
    ]
    missing = 0
    for row, line in table.iterrows():
        timed = [s for s, r, ok in zip(own.cells.speed, own.cells.row, own.cells.ok, strict=True) if r == row and ok and s]
        missing += not timed
        for column, (side, part) in columns:
            expected = list(timed[0][side][part].values()) if timed else [math.nan] * 3
            equal(triple(line, column, ("p20", "p80")), expected, (row, column))
    assert 2 <= missing < len(table) - 3


def test_text_says_what_the_numbers_say(made):
    """Markdown and terminal: the same numbers, rounded; a star where the corrected p-value is below what the level asks."""
    store, own, table = made
    lines = [line for line in render(collect(store), "md").splitlines() if line.startswith("| ")]
    plain = [[re.sub(r"[\\*_]", "", c).strip() for c in line.strip("|").split(" | ")] for line in lines]
    starred = [[c.replace("\\", "") for c in line.strip("|").split(" | ")] for line in lines]
    title, rows, stars = plain[0], plain[1:], starred[1:]
    assert len(rows) == len(table)

    def shown(value, form, empty="–"):
        return empty if math.isnan(value) else form(value).replace("-", "−")

    for cells, marked, (row, line) in zip(rows, stars, table.iterrows(), strict=True):
        at = dict(zip([t.strip() for t in title], cells, strict=True))
        star = dict(zip([t.strip() for t in title], marked, strict=True))
        assert (at["reducer"], at["keep"]) == (row[0], row[1] or "all")
        name, (value, low, high) = ("mean %" if len(own.tasks) > 1 else "accuracy %"), triple(line, "accuracy")
        expected = shown(value, lambda v: f"{100 * v:.1f} [{100 * low:.0f}–{100 * high:.0f}]", "failed")  # noqa: B023
        assert at[name] == expected
        for column, raw in (("to none", "difference"), ("to random", "difference_random")):
            value, low, high = triple(line, raw)
            value = math.nan if row[0] == "none" else value
            parts = [] if math.isnan(value) else [f"{100 * v:+.1f}".replace("-", "−") for v in (value, low, high)]
            parts = ["0.0" if p in ("+0.0", "−0.0") else p for p in parts]
            assert at[column] == (f"{parts[0]} [{parts[1]}, {parts[2]}]" if parts else "–"), (row, column)
            p = number(line[f"{raw}_p_holm"])
            assert ("* [" in star[column]) == (not math.isnan(value) and p < 1 - LEVEL)
        assert at["of full %"] == shown(number(line["share_of_full"]), lambda v: f"{100 * v:.1f}")
        kept, avg, share = (number(line[c]) for c in ("tokens_kept", "tokens_avg_layers", "flops_share"))
        assert (at["tokens"], at["avg"]) == tuple(shown(v, lambda v: f"{v:.1f}".removesuffix(".0")) for v in (kept, avg))
        assert at["MFLOPs"] == shown(number(line["flops"]), lambda v: f"{v / 1e6:.0f} ({100 * share:.0f}%)")  # noqa: B023
        assert at["KV MB"] == shown(number(line["kv_bytes"]), lambda v: f"{v / 1e6:.2f}")
        for column, raw in (("speed-up", "prefill_speedup"), ("TTFT", "ttft_speedup")):
            assert at[column] == shown(number(line[raw]), lambda v: f"{v:.2f}×")
        value, low, high = triple(line, "prefill_ms", ("p20", "p80"))
        assert at["prefill ms"].replace("–", "-", 1) == ("-" if math.isnan(value) else f"{ms(value)} [{ms(low)}-{ms(high)}]")
        assert at["reduction ms"] == ("–" if row[0] == "none" else shown(number(line["reduction_ms"]), ms))


def ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


# ------------------------------------------------------------------------------------------------------------ by hand
def test_each_task_has_draws_of_its_own():
    """Two tasks of the same shape: their draws differ, so that the mean of both is surer than either."""
    ids = [(f"a/{i}/0", f"a/{i}", "x") for i in range(40)]
    one, two = (Questions(ids, n).bootstrap({"resamples": 400, "confidence": 0.9}, 5) for n in (0, 1))
    assert (one.weights != two.weights).any() and one is not two
    draws = [b.draws([i % 2 for i in range(40)])[1] for b in (one, two)]
    assert abs(np.corrcoef(draws)[0, 1]) < 0.2 and np.std(np.mean(draws, 0)) < 0.85 * min(map(np.std, draws))


def test_an_answer_counts_what_it_scores():
    assert score_of({"score": 0.25, "correct": False}) == score_of({"score": 0.25, "correct": True}) == 0.25
    assert [score_of({"score": None, "correct": c}) for c in (True, False)] == [1.0, 0.0] and score_of({"correct": 1}) == 1.0
    assert score_of({"score": 0, "correct": True}) == 0.0 and math.isnan(score_of({"score": None, "correct": None}))


def test_seeds_are_averaged_question_by_question_or_put_side_by_side(tmp_path):
    reader, same = Reader(Store(tmp_path / "s", create=True)), [("q/0/0", "q/0", "x"), ("q/1/0", "q/1", "x")]
    words = [("which colour?", "red"), ("how many?", "2")]
    asked, other = reader._questions(same, words), reader._questions([("q/2/0", "q/2", "x")], words[:1])
    assert reader._questions(list(same), list(words)) is asked
    assert reader._questions(same, [*words[:1], ("how many?", "3")]) is not asked, "what was asked counts, not its number only"
    questions, found = reader.join(
        [(asked, np.array([1.0, 0.0])), (asked, np.array([0.5, 0.0])), (asked, np.array([0.0, 0.0]))]
    )
    assert questions is asked and found.tolist() == [0.5, 0.0]
    questions, found = reader.join([(asked, np.array([1.0, 0.0])), (other, np.array([0.5]))])
    assert questions.images == ["q/0", "q/1", "q/2"] and found.tolist() == [1.0, 0.0, 0.5]


def test_a_row_of_one_seed_is_compared_with_that_seed_of_the_reference(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    for seed, marks in ((0, [1.0, 1.0, 1.0, 1.0]), (1, [1.0, 0.0, 1.0, 0.0])):
        cell(store, listed, "none", "none", "", marks, seed=seed)
    for label, seeds in (("first", (0,)), ("second", (1,)), ("both", (0, 1)), ("third", (7,))):
        for seed in seeds:
            cell(store, listed, label, "fastv", "49", [1.0, 0.0, 0.0, 0.0], seed=seed)
    rows = {r.label: r for r in collect(finish(store, listed)).rows}
    shares = {label: rows[label].paired.ratio.value for label in ("first", "second", "both", "third")}
    assert shares == pytest.approx({"first": 1 / 4, "second": 1 / 2, "both": 1 / 3, "third": 1 / 4})
    assert rows["none"].accuracy.value == 0.75 and rows["none"].paired.ratio.value == 1


def test_groups_of_vtc_bench_are_of_the_first_seed(tmp_path):
    """Which question is difficult, and who answers it: seed 0 alone, whatever other seeds say."""
    store, listed = Store(tmp_path / "s", create=True), []
    for seed in (0, 1):
        cell(store, listed, "none", "none", "", [1.0, 1.0, 1.0, float(seed)], seed=seed)
        cell(store, listed, "downsample", "downsample", "49", [0.0, 1.0, float(seed), 0.0], seed=seed)
        cell(store, listed, "fastv", "fastv", "49", [1.0 - seed, float(seed), 1.0, 1.0], seed=seed)
    table = pd.read_csv(io.StringIO(render_vtc(finish(store, listed), "csv"))).set_index("reducer")
    assert list(table.loc["fastv", ["A_questions", "A_images", "A_accuracy", "B_questions", "B_accuracy"]]) == [
        2,
        2,
        1.0,
        1,
        0.0,
    ]
    assert list(table.loc["most frequent answer", ["A_accuracy", "B_accuracy"]]) == [1.0, 1.0] and len(table) == 4
