"""No number under another's name: addresses cover all that decides, contents are checked, runners report on themselves."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
from fakes import FakeWorker, fake_executor
from PIL import Image
from rich.console import Console
from stores import bless

import vtc
from vtc.cli import main
from vtc.errors import ConfigError, DamagedCellError, StoreError
from vtc.eval import digests, executors, models
from vtc.eval.config import ModelConfig
from vtc.eval.executors import InProcess
from vtc.eval.results import collect
from vtc.eval.run import Sweep
from vtc.eval.store import STATUS, Store, cell_id, sweep_id
from vtc.eval.sweepfile import parse_sweep
from vtc.eval.tables import render
from vtc.eval.worker import Worker

QUIET = Console(quiet=True)
ROWS = "budgets: [49]\nreducers: []\nthreads: 1\nspeed: false\n"
TINY = "data: {scenes: {n: 4, types: [color, count]}}\n" + ROWS


def said_by(run, **settings) -> str:
    console = Console(record=True, width=500, file=open(os.devnull, "w"), **settings)
    run(console)
    return " ".join(console.export_text().split())


def tables(store: Store) -> str:
    return render(collect(store), "csv", accuracy_only=True, by_type=True)


# ------------------------------------------------------------------------------------------------------- files of a model
@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model that a test may change."""
    copied = tmp_path / "model"
    shutil.copytree(vtc.pocket.pocket_path("pocket"), copied)
    return copied


def planned(folder: Path) -> str:
    return Sweep(parse_sweep(f"{TINY}model: {folder}\n")).planned[0].id


def edit(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def big(path: Path, byte: int) -> None:
    """A weight file of 80 MB that differs in one byte in its middle."""
    with path.open("wb") as file:
        file.truncate(80 * 10**6)
        file.seek(40 * 10**6)
        file.write(bytes([byte]))


CHANGES = {
    "the image's mean": lambda f: edit(f / "preprocessor_config.json", image_mean=[9.0, 9.0, 9.0]),
    "the tokenizer": lambda f: edit(f / "tokenizer_config.json", model_max_length=7),
    "the vocabulary": lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("red", "der")),
    "the chat template": lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
    "another chat template": lambda f: [
        (f / "additional_chat_templates").mkdir(),
        (f / "additional_chat_templates" / "x.jinja").write_text("{{ messages }}"),
    ],
    "generation settings": lambda f: edit(f / "generation_config.json", do_sample=True),
    "weights as .bin": lambda f: (f / "pytorch_model.bin").write_bytes(b"other"),
    "a byte in the middle of 80 MB": lambda f: big(f / "more.safetensors", 1),
    "code": lambda f: (f / "modeling_x.py").write_text("x = 2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_file_that_is_read_is_in_the_address(folder, change):
    big(folder / "more.safetensors", 0)
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    (folder / "modeling_x.py").write_text("x = 1")
    before = planned(folder)
    assert planned(folder) == before
    CHANGES[change](folder)
    assert planned(folder) != before


def test_what_nothing_reads_and_where_a_folder_lies_are_not_in_the_address(folder, tmp_path):
    before = models.identity(ModelConfig(name=str(folder)))["folder"]
    (folder / "README.md").write_text("better than ever")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    (folder / "optimizer.pt").write_bytes(b"state")
    shutil.copytree(vtc.pocket.pocket_path("pocket"), folder / "checkpoint-7")  # a model of its own
    os.mkfifo(folder / "pipe")
    for path in folder.rglob("*.json"):
        os.utime(path)
    (tmp_path / "links").mkdir()
    for path in folder.iterdir():  # as the hub's cache has it
        (tmp_path / "links" / path.name).symlink_to(path)
    for place in (folder, tmp_path / "links"):
        assert models.identity(ModelConfig(name=str(place)))["folder"] == before


def test_an_adapter_brings_its_base_model_into_the_address(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = models.identity(ModelConfig(name=str(folder)))["folder"]
    edit(base / "generation_config.json", do_sample=True)
    assert models.identity(ModelConfig(name=str(folder)))["folder"] != before


def test_a_changed_model_is_measured_anew_and_gives_its_own_numbers(folder, tmp_path):
    """The mean of the pictures is off: the old answers must not stand for the new model."""
    text, store = f"{TINY}model: {folder}\n", Store(tmp_path / "s", create=True)
    one = Sweep(parse_sweep(text))
    assert one.run(store, QUIET, only=one.planned[:1]).done == 1
    edit(folder / "preprocessor_config.json", image_mean=[99.0, 99.0, 99.0])
    edit(folder / "processor_config.json", image_processor=json.loads((folder / "preprocessor_config.json").read_text()))
    two = Sweep(parse_sweep(text))
    outcome = two.run(store, QUIET, only=two.planned[:1])
    fresh = Store(tmp_path / "fresh", create=True)
    assert (outcome.done, outcome.skipped) == (1, 0) and two.run(fresh, QUIET, only=two.planned[:1]).done == 1
    answers = [[s["answer"] for s in st.get(sw.planned[0].id).samples] for st, sw in ((store, one), (store, two), (fresh, two))]
    assert answers[0] != answers[1] == answers[2]
    assert tables(store) == tables(fresh)


def test_a_model_that_changes_between_plan_and_run_is_refused(folder, tmp_path):
    sweep = Sweep(parse_sweep(f"{TINY}model: {folder}\n"))
    edit(folder / "generation_config.json", do_sample=True)
    store = Store(tmp_path / "s", create=True)
    outcome = sweep.run(store, QUIET, only=sweep.planned[:1])
    assert outcome.failed == 1 and "are not those the sweep was planned with" in outcome.errors[0]
    assert store.get(sweep.planned[0].id).metrics == {}
    executor = InProcess()  # a worker that outlives a sweep loads the model again when the next one means another
    for _ in range(2):
        again = Sweep(parse_sweep(f"{TINY}model: {folder}\n"))
        assert again.run(store, QUIET, only=again.planned[:1], executor=executor).failed == 0
        edit(folder / "generation_config.json", max_length=30)


def test_digests_of_large_files_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_known", {})
    path, memory = tmp_path / "w.safetensors", tmp_path / "cache" / "vtc" / "digests.json"
    big(path, 1)
    first = digests.file_digest(path)
    assert not memory.exists()  # too young: it might change within the clock's resolution
    monkeypatch.setattr(digests, "_FRESH", 0)
    assert digests.file_digest(path) == first
    [(key, kept)] = json.loads(memory.read_text()).items()
    assert kept == first
    memory.write_text(json.dumps({key: "f" * 64}))  # what another process finds
    digests._known.clear()
    assert digests.file_digest(path) == "f" * 64
    digests._known.clear()
    stamp = path.stat()
    big(path, 2)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, inode and time of writing
    assert digests.file_digest(path) not in ("f" * 64, first)
    for broken in ("", "[]", "{", '{"a": 3}', "[" * 100_000):
        memory.write_text(broken)
        digests._known.clear()
        assert digests.file_digest(path) not in ("f" * 64, first)


def test_the_embedded_model_is_addressed_in_milliseconds():
    import time

    models.identity(ModelConfig(name="pocket"))
    start = time.process_time()
    for _ in range(20):
        models.identity(ModelConfig(name="pocket"))
    assert (time.process_time() - start) / 20 < 0.05  # 1 ms, and 10 ms where the files are new


def test_a_hub_model_of_unknown_version_is_asked_for_before_anything_runs(monkeypatch, tmp_path):
    text = f"{TINY}model: llava-hf/llava-1.5-7b-hf\n"
    sweep = Sweep(parse_sweep(text))
    assert sweep.planned[0].config["model"]["revision"] == models.UNKNOWN
    with pytest.raises(ConfigError, match="neither a folder nor in the local cache.*hf download llava-hf/llava-1.5-7b-hf"):
        sweep.check_data()
    sent = []

    def download(name, file, revision=None):
        sent.append((name, file))
        monkeypatch.setattr(
            "huggingface_hub.try_to_load_from_cache", lambda *_args, **_more: f"/cache/snapshots/{'a' * 40}/config.json"
        )

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    before = [p.id for p in sweep.planned]
    sweep.check_data()
    assert sent == [("llava-hf/llava-1.5-7b-hf", "config.json")]
    assert {p.config["model"]["revision"] for p in sweep.planned} == {"a" * 40} and [p.id for p in sweep.planned] != before
    loaded = []
    monkeypatch.setattr(models, "_load", lambda model: loaded.append(model.revision) or (None, None))
    models.load(sweep.planned[0].model, sweep.planned[0].config["model"])
    assert loaded == ["a" * 40]  # whatever the hub serves by then


def test_cells_of_earlier_addresses_stay_readable_and_are_named(tmp_path):
    store, sweep = Store(tmp_path / "s", create=True), Sweep(parse_sweep(TINY))
    record = sweep.record()
    for item, entry in zip(sweep.planned, record["cells"], strict=True):  # as an earlier vtc addressed them
        config = {**item.config, "model": {"name": "pocket", "files": "0123456789abcdef"}}
        done = FakeWorker().run(sweep.job(item, "accuracy"))
        entry["id"] = cell_id(config)
        store.put(entry["id"], config, done.env, done.data["metrics"], done.data["samples"])
    (store.root / "sweep.json").write_text(json.dumps(record))  # nor had sweeps files of their own
    before = tables(store)
    said = said_by(lambda console: sweep.run(store, console, executor=fake_executor()))
    assert "4 cells in this store have addresses of an earlier vtc, which covered only some of the model's files" in said
    assert [store.get(p.id) is not None for p in sweep.planned] == [True] * 4
    assert tables(store.at(sweep_id(record))) == before
    said = said_by(lambda console: sweep.run(store, console, executor=fake_executor()))
    assert "earlier vtc" not in said  # nothing is measured anew


# --------------------------------------------------------------------------------------------- data that change meanwhile
def own(tmp_path: Path, count: int = 2, side: int = 32) -> str:
    (tmp_path / "pics").mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (side, side), (40 * i % 256, 0, 0)).save(tmp_path / "pics" / f"{i}.png")
    lines = [f"{i}.png,what color is it?,red" for i in range(count)]
    (tmp_path / "qa.csv").write_text("\n".join(["image,question,answer", *lines]) + "\n")
    return f"tasks: [{{name: mine, folder: pics, questions: qa.csv}}]\n{ROWS}"


OTHER_DATA = {
    "a picture": lambda t: Image.new("RGB", (32, 32), "blue").save(t / "pics" / "1.png"),
    "a question": lambda t: (t / "qa.csv").write_text((t / "qa.csv").read_text().replace("what", "which")),
    "an answer": lambda t: (t / "qa.csv").write_text((t / "qa.csv").read_text().replace("?,red", "?,blue")),
    "fewer": lambda t: (t / "qa.csv").write_text("image,question,answer\n0.png,what color is it?,red\n"),
    "no picture": lambda t: (t / "pics" / "1.png").unlink(),
}


@pytest.fixture(scope="module")
def loaded():
    """A worker with the embedded model loaded."""
    executor = InProcess()
    sweep = Sweep(parse_sweep(TINY))
    executor.worker.prepare(sweep.job(sweep.planned[0], "accuracy"))
    return executor


@pytest.mark.parametrize("change", OTHER_DATA)
def test_data_that_change_after_planning_are_not_stored_under_the_old_address(tmp_path, loaded, change):
    config = parse_sweep(own(tmp_path), folder=tmp_path)
    sweep, store = Sweep(config), Store(tmp_path / "s", create=True)
    OTHER_DATA[change](tmp_path)
    outcome = sweep.run(store, QUIET, only=sweep.planned[:1], executor=loaded)
    assert outcome.failed == 1 and store.get(sweep.planned[0].id).metrics == {}
    assert ("no image file" if change == "no picture" else "are not those the sweep was planned with") in outcome.errors[0]
    if change != "no picture":
        again = Sweep(config)
        assert again.planned[0].id != sweep.planned[0].id
        assert again.run(store, QUIET, only=again.planned[:1], executor=loaded).done == 1


def test_a_picture_that_changes_while_a_worker_is_at_it_is_noticed(tmp_path, loaded, monkeypatch):
    sweep = Sweep(parse_sweep(own(tmp_path), folder=tmp_path))
    job = sweep.job(sweep.planned[0], "accuracy")
    worker = Worker()
    worker.model, worker.processor, worker._model_of = (
        loaded.worker.model,
        loaded.worker.processor,
        (job.model, job.config["model"]),
    )
    worker.prepare(job)
    OTHER_DATA["a picture"](tmp_path)
    assert "1.png has changed since the sweep was planned" in worker.run(job).error


def test_a_worker_on_another_machine_refuses_other_data(tmp_path, loaded):
    """The job travels, the files lie there already: they are compared, not trusted."""
    import pickle

    sweep = Sweep(parse_sweep(own(tmp_path), folder=tmp_path))
    job = pickle.loads(pickle.dumps(sweep.job(sweep.planned[0], "accuracy")))
    assert loaded.worker.run(job).error == ""
    OTHER_DATA["a picture"](tmp_path)
    fresh = Worker()
    fresh.model, fresh.processor, fresh._model_of = (
        loaded.worker.model,
        loaded.worker.processor,
        (job.model, job.config["model"]),
    )
    assert "are not those the sweep was planned with" in fresh.run(job).error


# ------------------------------------------------------------------------------------------------- two sweeps in one store
OTHER = "data: {scenes: {n: 4, types: [color, count]}}\nbudgets: [11]\nreducers: [divprune]\nthreads: 1\nspeed: false\n"


def test_two_sweeps_in_one_store_report_each_on_itself(tmp_path, monkeypatch, capsys):
    """While a.yaml runs, b.yaml begins and ends in the same store."""
    (tmp_path / "a.yaml").write_text(TINY.replace("reducers: []", "reducers: [fastv]"))
    (tmp_path / "b.yaml").write_text(OTHER)
    made = []

    def make(*_):
        executor = fake_executor()
        made.append(executor)
        if len(made) == 1:
            real = executor.worker.answers

            def answers(job):
                if job.cell.name == "fastv":  # a cell of its own: of the others, one runner would wait for the other
                    with pytest.raises(SystemExit) as ended:
                        main(["sweep", str(tmp_path / "b.yaml"), "--out", str(tmp_path / "s")])
                    assert not ended.value.code
                return real(job)

            executor.worker.answers = answers
        return executor

    monkeypatch.setattr(executors, "make", make)
    monkeypatch.setattr(
        "vtc.eval.report.browse", lambda *_args, **_more: None
    )  # pictures and plots take most of a report's time
    monkeypatch.setattr("vtc.eval.report.available", lambda _: [])
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "s"), "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out[out.index("\n{\n") :])  # before it, the table of b.yaml
    assert not ended.value.code and len(made) == 2
    assert [r["reducer"] for r in found["rows"]] == ["none", "random", "uniform", "downsample", "fastv"]
    assert {r["budget"] for r in found["rows"]} == {"all", "49"} and found["done"] == 5
    page, other = Path(found["report"]).read_text(), (tmp_path / "s" / "report.html").read_text()
    assert "fastv" in page and "divprune" not in page and "divprune" in other and "fastv" not in other
    said = " ".join(err.split())
    assert "works in this store on another sweep (a.yaml): this one is reported by itself" in said  # b.yaml of a.yaml
    assert "meanwhile another sweep (b.yaml) began in this store" in said  # and the other way round
    names = {source: name for name, (source, _) in Store(tmp_path / "s").sweeps().items()}
    for source, reducer in (("a.yaml", "fastv"), ("b.yaml", "divprune")):
        with pytest.raises(SystemExit):
            main(["table", str(tmp_path / "s"), "--sweep", names[source][:6], "-f", "csv"])
        assert capsys.readouterr().out.splitlines()[-1].startswith(reducer)
    with pytest.raises(SystemExit):
        main(["table", str(tmp_path / "s"), "--sweep", "nothing"])
    assert "has no sweep 'nothing' (sweeps: " in " ".join(capsys.readouterr().err.split())


def test_runners_and_shards_of_one_sweep_share_its_record(tmp_path):
    store, sweep = Store(tmp_path / "s", create=True), Sweep(parse_sweep(TINY), "a.yaml")
    first = sweep.run(store, QUIET, executor=fake_executor(), only=sweep.shard(1, 2))
    second = Sweep(parse_sweep(TINY), "a.yaml").run(store, QUIET, executor=fake_executor(), only=sweep.shard(2, 2))
    assert first.sweep == second.sweep and list(store.sweeps()) == [first.sweep] and not collect(store).missing
    mine = store.announce(first.sweep, "a.yaml")
    said = said_by(lambda console: sweep.run(store, console, executor=fake_executor()))
    assert f"process {os.getpid()} on" in said and "works on the same sweep: every cell is done by one of the runners" in said
    mine.release()
    assert not list((store.root / "locks").glob("runner-*"))


# ------------------------------------------------------------------------------------------------------------- waiting
def test_who_holds_a_cell_is_said_after_ten_seconds(tmp_path, monkeypatch):
    sweep = Sweep(parse_sweep(TINY))
    store, now, heard = Store(tmp_path / "s", create=True), [0.0], []
    claim = store.claim(sweep.planned[2].id)
    console = Console(record=True, width=500, file=open(os.devnull, "w"))

    def nap(seconds):
        now[0] += seconds
        heard.append("waiting for" in console.export_text(clear=False))
        if len(heard) == 60:
            claim.release()

    monkeypatch.setattr("vtc.eval.run.time.sleep", nap)
    monkeypatch.setattr("vtc.eval.run.time.monotonic", lambda: now[0])
    assert sweep.run(store, console, executor=fake_executor()).done == 4
    text = " ".join(console.export_text().split())
    assert not any(heard[:19]) and all(heard[21:]) and text.count("waiting for") == 1
    where = f"process {os.getpid()} on {os.uname().nodename} (since "
    assert f"waiting for the cell 'uniform 49', held by {where}" in text and "end it, and its claim is free" in text


def test_waiting_for_the_turn_to_time_and_without_a_note_is_said_too(tmp_path, monkeypatch):
    sweep = Sweep(parse_sweep(TINY.replace("speed: false", "speed: {repeats: 3, warmup: 1}")))
    store, now = Store(tmp_path / "s", create=True), [0.0]
    claim = store.claim(f"speed-{os.uname().nodename}")
    claim.note.write_text("\x1b[31m{")  # whatever lies there

    def nap(seconds):
        now[0] += seconds
        if now[0] > 20:
            claim.release()

    monkeypatch.setattr("vtc.eval.run.time.sleep", nap)
    monkeypatch.setattr("vtc.eval.run.time.monotonic", lambda: now[0])
    said = said_by(lambda console: sweep.run(store, console, executor=fake_executor()))
    assert "waiting for its turn to measure on this machine, held by another runner, which left no note" in said


# ---------------------------------------------------------------------------------------- contents whose checksums fit
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished sweep with timings, answered by the address of its cells."""
    sweep = Sweep(parse_sweep(TINY.replace("speed: false", "speed: {repeats: 3, warmup: 1}")), "tiny.yaml")
    store = Store(tmp_path_factory.mktemp("whole") / "s", create=True)
    assert sweep.run(store, QUIET, executor=fake_executor()).done == 4
    return sweep, store


def changed(path: Path, change) -> None:
    data = json.loads(path.read_text())
    data = change(data) or data
    path.write_text(json.dumps(data))


def line(change):
    def edit(folder: Path, _other: Path) -> None:
        path = folder / "samples.jsonl"
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        lines = change(lines) or lines
        path.write_text("".join(json.dumps(x) + "\n" for x in lines))

    return edit


def key(name: str, *path: str, value):
    def edit(folder: Path, _other: Path) -> None:
        def put(data):
            at = data
            for step in path[:-1]:
                at = at[step]
            at[path[-1]] = value

        changed(folder / name, put)

    return edit


WRONG = {
    "metrics of another cell": lambda f, o: shutil.copy(o / "metrics.json", f / "metrics.json"),
    "metrics of another cell without its name": lambda f, o: (
        shutil.copy(o / "metrics.json", f / "metrics.json"),
        changed(f / "metrics.json", lambda m: m.pop("cell") and m),
    ),
    "answers of another cell": lambda f, o: shutil.copy(o / "samples.jsonl", f / "samples.jsonl"),
    "timings of another cell": lambda f, o: shutil.copy(o / "speed.json", f / "speed.json"),
    "accuracy": key("metrics.json", "accuracy", value=0.123),
    "right answers": key("metrics.json", "correct", value=2),
    "tokens": key("metrics.json", "tokens", "kept", value=1.0),
    "a number that is none": key("metrics.json", "accuracy", value=float("nan")),
    "an infinite number": key("metrics.json", "flops", "counted", "total", value=float("inf")),
    "a number beyond all bounds": lambda f, o: (f / "metrics.json").write_text(
        (f / "metrics.json").read_text().replace('"kv_bytes": ', '"kv_bytes": 1e999, "x": ')
    ),
    "text for a number": key("metrics.json", "accuracy", value="high"),
    "no tokens": lambda f, o: changed(f / "metrics.json", lambda m: m.pop("tokens") and m),
    "another kind": lambda f, o: (f / "metrics.json").write_text("[]"),
    "answers without keys": line(lambda lines: [{} for _ in lines]),
    "answers without marks": line(lambda lines: [{k: v for k, v in x.items() if k not in ("correct", "score")} for x in lines]),
    "an answer twice": line(lambda lines: [*lines[:-1], lines[0]]),
    "an answer less": line(lambda lines: lines[:-1]),
    "a score that is none": line(lambda lines: lines[0].update(score=float("nan"))),
    "lists": line(lambda lines: [[1]] * len(lines)),
    "deep nesting": lambda f, o: (f / "samples.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n"),
    "a later schema of the cell": key(STATUS, "schema", value=2),
    "a later schema of the settings": key("config.json", "schema", value=2),
    "settings of another cell": lambda f, o: shutil.copy(o / "config.json", f / "config.json"),
    "timings without keys": lambda f, o: (f / "speed.json").write_text("{}"),
    "timings that are none": key("speed.json", "reduced", "prefill_ms", "value", value=float("nan")),
    "no environment": lambda f, o: (f / "env.json").write_text("{}"),
    "a file of another name": lambda f, o: (f / "passwd").write_text("x"),
}


@pytest.mark.parametrize("damage", WRONG)
def test_contents_that_cannot_be_are_refused_moved_aside_and_made_again(whole, tmp_path, capsys, damage):
    sweep, good = whole
    shutil.copytree(good.root, tmp_path / "s")
    store = Store(tmp_path / "s")
    victim, other = (store.cells / sweep.planned[i].id for i in (1, 2))
    WRONG[damage](victim, other)
    bless(victim) if damage != "a later schema of the cell" else None
    with pytest.raises(DamagedCellError, match=f"cell {victim.name} of .* is damaged .*: run the sweep again"):
        store.get(victim.name)
    with pytest.raises(SystemExit):
        main(["table", str(store.root)])
    err = " ".join(capsys.readouterr().err.split())
    assert "is damaged" in err and "unexpected" not in err
    outcome = sweep.run(store, QUIET, executor=fake_executor())
    assert (outcome.done, outcome.skipped, outcome.failed) == (1, 3, 0)
    assert [p.name for p in (store.root / "quarantine").iterdir()] == [f"{victim.name}-0"]
    assert tables(store) == tables(good)


RECORDS = {
    "a later schema": {"schema": 2},
    "no schema": {"schema": None},
    "no cells": {"cells": None},
    "a path for a cell": {"cells": [{"id": "../../etc", "label": "x", "reducer": "x", "budget": ""}]},
    "a confidence that is none": {"config": {"bootstrap": {"resamples": 100, "confidence": float("nan")}}},
    "draws without end": {"config": {"bootstrap": {"resamples": 10**12, "confidence": 0.95}}},
    "a list for the settings": {"config": []},
    "no environment": {"env": {}},
    "a number for a model": {"model": 3, "models": None},
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_record_that_cannot_be_is_one_sentence_and_a_sweep_mends_it(whole, tmp_path, capsys, damage):
    sweep, good = whole
    shutil.copytree(good.root, tmp_path / "s")
    store = Store(tmp_path / "s")
    changed(store.root / "sweep.json", lambda r: {**r, **RECORDS[damage]})
    for command in (["table"], ["report"], ["plot"]):
        with pytest.raises(SystemExit):
            main([*command, str(store.root)])
        err = " ".join(capsys.readouterr().err.split())
        assert "sweep.json is damaged" in err and "run the sweep again" in err and "unexpected" not in err
    assert sweep.run(store, QUIET, executor=fake_executor()).skipped == 4
    assert tables(store) == tables(good)


def test_a_cell_that_names_a_device_is_neither_followed_nor_waited_for(whole, tmp_path):
    sweep, good = whole
    shutil.copytree(good.root, tmp_path / "s")
    store = Store(tmp_path / "s")
    one, two, three, four = (store.cells / p.id for p in sweep.planned)
    changed(one / STATUS, lambda s: s["files"].update({"/dev/zero": "0" * 64}))
    (two / "metrics.json").unlink()
    (two / "metrics.json").symlink_to("/dev/zero")
    (three / "samples.jsonl").unlink()
    os.mkfifo(three / "samples.jsonl")
    shutil.move(four, tmp_path / "elsewhere")
    four.symlink_to(tmp_path / "elsewhere")
    for cell in (one, two, three, four):
        with pytest.raises(DamagedCellError, match="is damaged"):
            store.get(cell.name)
    assert sweep.run(store, QUIET, executor=fake_executor()).done == 4 and tables(store) == tables(good)
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == sorted(
        p.name for p in (good.cells / four.name).iterdir()
    )


def test_a_cell_that_cannot_be_read_just_now_is_not_moved_aside(whole, tmp_path, monkeypatch):
    sweep, good = whole
    shutil.copytree(good.root, tmp_path / "s")
    store, real = Store(tmp_path / "s"), os.open

    def failing(path, *rest, **more):
        if str(path).endswith("metrics.json"):
            raise OSError(5, "Input/output error")
        return real(path, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing)
        with pytest.raises(StoreError, match="cannot be read .Input/output error"):
            sweep.run(store, QUIET, executor=fake_executor())
    assert not (store.root / "quarantine").exists() and sweep.run(store, QUIET, executor=fake_executor()).skipped == 4


def test_results_that_are_no_numbers_are_a_failed_cell_and_not_a_stored_one(tmp_path):
    sweep, store = Sweep(parse_sweep(TINY)), Store(tmp_path / "s", create=True)
    executor = fake_executor()
    real = executor.worker.answers

    def answers(job):
        data = real(job)
        if job.cell.name == "uniform":
            data["metrics"]["seconds"] = float("nan")
        return data

    executor.worker.answers = answers
    outcome = sweep.run(store, QUIET, executor=executor)
    assert (outcome.done, outcome.failed) == (3, 1) and "cannot be stored" in outcome.errors[0]
    assert store.get(sweep.planned[2].id).metrics == {}


def test_a_lost_rename_is_made_up_for(whole, tmp_path):
    """A kill between the two renames of a cell that is replaced: the new one was whole, the old one stands aside."""
    sweep, good = whole
    shutil.copytree(good.root, tmp_path / "s")
    store = Store(tmp_path / "s")
    one, two = (store.cells / p.id for p in sweep.planned[:2])
    one.rename(store.cells / f".new-{one.name}.0011")
    two.rename(store.cells / f".old-{two.name}")
    (store.cells / f".new-{two.name}.2233").mkdir()
    assert sweep.run(store, QUIET, executor=fake_executor()).skipped == 4
    assert not list(store.cells.glob(".*")) and tables(store) == tables(good)


# ------------------------------------------------------------------------------------------------------------ pictures
def test_pictures_are_decoded_by_batch_and_let_go(tmp_path, loaded, monkeypatch):
    """24 pictures, batches of two: never are more of them in memory than a batch needs, in the planner and in the worker."""
    text = own(tmp_path, 24) + "batch_size: 2\n"
    alive: dict[int, weakref.ref] = {}
    most, real = [0], Image.Image.convert

    def convert(self, *args, **kwargs):
        made = real(self, *args, **kwargs)
        if self.size == (32, 32):
            alive[id(made)] = weakref.ref(made)
            most[0] = max(most[0], sum(there() is not None for there in alive.values()))
        return made

    monkeypatch.setattr(Image.Image, "convert", convert)
    monkeypatch.setattr("vtc.eval.worker.BATCH_BYTES", 0)
    sweep = Sweep(parse_sweep(text, folder=tmp_path))
    assert len(sweep.questions["mine"]) == 24 and most[0] <= 3, most
    outcome = sweep.run(Store(tmp_path / "s", create=True), QUIET, only=sweep.planned[:2], executor=loaded)
    assert outcome.done == 2 and most[0] <= 2 * 2 + 3, most


def test_prepared_batches_are_kept_as_far_as_there_is_room(loaded):
    from vtc.pocket import Batches, answer_questions, scene_questions

    questions = scene_questions("test", 6)
    worker = loaded.worker
    made = []
    for room in (0, 10**9, 400_000):  # 300,000 bytes a batch
        batches = Batches(worker.processor, questions, 2, room)
        made.append([a.text for _ in range(2) for a in answer_questions(worker.model, worker.processor, batches)])
        assert sum(t.nbytes for b in batches.kept.values() for t in b.inputs.values()) <= room
        assert (len(batches.kept) == len(batches)) == (room == 10**9) and bool(batches.kept) == bool(room)
    assert made[0] == made[1] == made[2]
    assert made[0][: len(questions)] == [a.text for a in answer_questions(worker.model, worker.processor, questions, 2)]


@pytest.mark.parametrize("side", [40, 100])  # Pillow warns above its limit of pixels, and stops above twice that
def test_a_picture_of_too_many_pixels_is_named_with_file_and_line(tmp_path, monkeypatch, side):
    text = own(tmp_path, 2)
    Image.new("RGB", (side, side)).save(tmp_path / "pics" / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    with pytest.raises(
        ConfigError, match=r"qa.csv line 3: the image .*1.png' has more pixels than a picture may have"
    ) as caught:
        Sweep(parse_sweep(text, folder=tmp_path))
    assert "\n" not in str(caught.value)
