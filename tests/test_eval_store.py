"""The store: cells are complete or absent, whatever kills the process; damage is noticed; other versions are refused."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest
from stores import ENV, bless, result, timed

from vtc.errors import StoreError
from vtc.eval.store import SCHEMA, STATUS, Store, canonical, cell_id, latest_store

CONFIG = {"schema": SCHEMA, "reducer": {"name": "random", "options": {"keep": 4}}}
CELL = cell_id(CONFIG)
METRICS, SAMPLES = result(1)


def filled(root) -> Store:
    store = Store(root, create=True)
    store.put(CELL, CONFIG, ENV, METRICS, SAMPLES)
    return store


def test_what_goes_in_comes_out(tmp_path):
    filled(tmp_path / "s")
    store = Store(tmp_path / "s")
    found = store.get(CELL)
    assert (found.config, found.metrics, found.samples, found.speed, found.error) == (
        CONFIG,
        METRICS,
        SAMPLES,
        None,
        "",
    )
    store.put_speed(CELL, timed(3.5, 4))
    assert store.get(CELL).speed == timed(3.5, 4)
    assert store.get("0" * 16) is None
    assert sorted(p.name for p in (store.cells / CELL).iterdir()) == sorted(
        ["config.json", "env.json", "metrics.json", "samples.jsonl", "speed.json", STATUS]
    )


def test_the_address_is_that_of_the_content_not_of_the_key_order():
    assert cell_id({"a": 1, "b": [1, 2]}) == cell_id({"b": [1, 2], "a": 1})
    assert cell_id({"a": 1}) != cell_id({"a": 2})


def test_failures_are_kept_with_their_reason_and_replaced_by_success(tmp_path):
    store = Store(tmp_path / "s", create=True)
    store.put_failure(CELL, CONFIG, {}, "ValueError: broken")
    assert store.get(CELL).error == "ValueError: broken" and store.get(CELL).metrics == {}
    store.put(CELL, CONFIG, ENV, *result(1, 2))
    assert store.get(CELL).error == "" and store.get(CELL).metrics["accuracy"] == 0.5
    store.put_speed(CELL, {}, "speed pass: broken")
    assert store.get(CELL).error == "speed pass: broken" and store.get(CELL).metrics["accuracy"] == 0.5


# every os call that makes a file appear is a place to die at; one process imports everything, its children die
KILL = """
import json, os, pathlib, sys
from vtc.eval.store import Store

cell, *what, speed = json.loads(sys.argv[2])

def child(name, after):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0
    def dying(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > after:
                os._exit(9)
            return original(*args, **kwargs)
        return call
    store = Store(pathlib.Path(sys.argv[1]) / name, create=True)
    pathlib.Path.replace, os.replace, os.fsync = dying(pathlib.Path.replace), dying(os.replace), dying(os.fsync)
    store.put(cell, *what)
    store.put_speed(cell, speed)
    os._exit(100 + count)

steps = child("whole", 10_000) - 100
assert 14 <= steps < 100
print(steps)
for after in range(steps):
    assert child(f"killed-{after}", after) == 9
"""


def test_a_process_killed_at_any_moment_leaves_a_whole_cell_or_none(tmp_path):
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    what = json.dumps([CELL, CONFIG, ENV, METRICS, SAMPLES, timed(1.0, 4)])
    run = subprocess.run([sys.executable, str(script), str(tmp_path), what], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = []
    for after in range(int(run.stdout)):
        name = f"killed-{after}"
        store = Store(tmp_path / name)
        store.sweep_up()  # the leftovers of a dead process
        assert not list(store.cells.glob(".*"))
        found = store.get(CELL)
        seen.append("none" if found is None else "accuracy" if found.speed is None else "speed")
        if found is not None:
            assert found.metrics == METRICS and found.samples == SAMPLES and found.speed in (None, timed(1.0, 4))
        filled(tmp_path / name)  # and the next run can write the cell
    assert [kind for kind, _ in itertools.groupby(seen)] == ["none", "accuracy", "speed"]


@pytest.mark.parametrize("name", ["metrics.json", "samples.jsonl", "config.json", "env.json"])
@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_damage_is_noticed_and_the_cell_can_be_moved_aside(tmp_path, name, damage):
    store = filled(tmp_path / "s")
    path = store.cells / CELL / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text()[:-3] if damage == "cut" else "{}")
    with pytest.raises(StoreError, match=f"cell {CELL} .* is damaged .*run the sweep again"):
        store.get(CELL)
    moved = store.quarantine(CELL)
    assert moved.is_dir() and store.get(CELL) is None
    filled(tmp_path / "s")
    assert store.quarantine(CELL) != moved


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3, "state": "done"}', "\x00"])
def test_a_damaged_status_is_noticed(tmp_path, content):
    store = filled(tmp_path / "s")
    (store.cells / CELL / STATUS).write_text(content)
    with pytest.raises(StoreError, match="damaged"):
        store.get(CELL)


def test_a_cell_without_status_or_under_a_wrong_address_is_damaged(tmp_path):
    store = filled(tmp_path / "s")
    (store.cells / CELL).rename(store.cells / ("f" * 16))
    with pytest.raises(StoreError, match="another cell"):
        store.get("f" * 16)
    (store.cells / ("f" * 16) / STATUS).unlink()
    with pytest.raises(StoreError, match="no status"):
        store.get("f" * 16)


def test_cells_of_an_earlier_vtc_are_told_from_damaged_ones(tmp_path):
    """Ids once were one hash of all settings, code versions included."""
    store = Store(tmp_path / "s", create=True)
    config = {**CONFIG, "engine": "e1"}
    old = hashlib.sha256(canonical(config).encode()).hexdigest()[:16]
    assert old != cell_id(config)
    store.put(cell_id(config), config, ENV, METRICS, SAMPLES)
    (store.cells / cell_id(config)).rename(store.cells / old)
    metrics = store.cells / old / "metrics.json"
    metrics.write_text(json.dumps(METRICS))  # nor did they say whose they are
    bless(store.cells / old)
    with pytest.raises(StoreError, match="written by an earlier vtc, .*: run the sweep again, it measures them anew"):
        store.get(old)
    store.put(cell_id(config), config, ENV, METRICS, SAMPLES)
    assert store.get(cell_id(config)).metrics == METRICS


def test_a_speed_file_newer_than_the_status_counts_as_not_there(tmp_path):
    store = filled(tmp_path / "s")
    store.put_speed(CELL, timed(1.0, 4))
    (store.cells / CELL / "speed.json").write_text('{"prefill": 2.0}')
    assert store.get(CELL).speed is None and store.get(CELL).metrics == METRICS


def test_other_versions_and_other_folders_are_refused(tmp_path):
    filled(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(StoreError, match=f"schema version {SCHEMA + 1}, and this vtc reads version {SCHEMA}: .*--out"):
        Store(tmp_path / "s", create=True)
    (tmp_path / "s" / "store.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path / "s")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(StoreError, match="not a vtc results store"):
        Store(tmp_path / "photos", create=True)
    with pytest.raises(StoreError, match="not a vtc results store"):
        Store(tmp_path / "photos" / "cat.jpg", create=True)
    with pytest.raises(StoreError, match="vtc sweep FILE.yaml --out"):
        Store(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    Store(tmp_path / "new" / "deep", create=True)
    with pytest.raises(StoreError, match="holds no sweep yet"):
        Store(tmp_path / "new" / "deep").read_sweep()


def test_a_cell_is_claimed_by_one_runner_at_a_time(tmp_path):
    store = filled(tmp_path / "s")
    mine = store.claim(CELL)
    assert mine is not None and Store(tmp_path / "s").claim(CELL) is None
    other = Store(tmp_path / "s").claim("another")
    assert other is not None
    other.release()
    mine.release()
    again = Store(tmp_path / "s").claim(CELL)
    assert again is not None
    again.release()


def test_what_a_live_runner_is_writing_is_not_swept_up(tmp_path):
    store = filled(tmp_path / "s")
    (store.cells / ".new-a").mkdir()
    (store.cells / ".new-b").mkdir()
    (store.cells / ".old-b").mkdir()
    lock = store.claim("a")
    store.sweep_up()
    assert sorted(p.name for p in store.cells.glob(".*")) == [".new-a"]
    lock.release()


def test_code_versions_are_told_apart_by_the_address():
    one = {"engine": "e", "task": {"n": 3}, "reducer": {"name": "fastv", "options": {"keep": 4}, "code": "c"}}
    other_code = {**one, "reducer": {**one["reducer"], "code": "d"}}
    other_engine = {**one, "engine": "f"}
    other_task = {**one, "task": {"n": 4}}
    ids = [cell_id(c) for c in (one, other_code, other_engine, other_task)]
    assert len(set(ids)) == 4
    assert ids[0].partition("-")[0] == ids[1].partition("-")[0] == ids[2].partition("-")[0] != ids[3].partition("-")[0]
    assert ids[0].partition("-")[2] == ids[3].partition("-")[2]


def test_addresses_list_the_versions_of_a_cell(tmp_path):
    store = Store(tmp_path / "s", create=True)
    configs = [{"engine": e, "reducer": None, "seed": 0} for e in "ab"]
    for config in configs:
        store.put(cell_id(config), config, ENV, METRICS, SAMPLES)
    assert list(store.addresses().values()) == [sorted(cell_id(c) for c in configs)]


@pytest.mark.parametrize("limit", range(1, 6))
def test_a_full_disk_aborts_the_cell_and_leaves_the_store_whole(tmp_path, monkeypatch, limit):
    store = filled(tmp_path / "s")
    other = {**CONFIG, "seed": 1}
    count = 0
    real = os.fsync

    def full(descriptor):
        nonlocal count
        count += 1
        if count >= limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="disk is full .*free some space and run the same command again"):
            store.put(cell_id(other), other, ENV, *result(0))
        with pytest.raises(StoreError, match="disk is full"):
            store.put_speed(CELL, timed(1.0, 4))
        with pytest.raises(StoreError, match="disk is full"):
            store.put(CELL, CONFIG, ENV, *result(0))  # anew: the old one stays
    assert not [p for p in store.root.rglob(".*") if p.suffix != ".lock"]
    assert store.get(cell_id(other)) is None and store.get(CELL).metrics == METRICS and store.get(CELL).speed is None
    store.put(cell_id(other), other, ENV, *result(1, 2))
    store.put_speed(CELL, timed(2.0, 4))
    assert store.get(cell_id(other)).metrics["accuracy"] == 0.5 and store.get(CELL).speed == timed(2.0, 4)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    store = filled(tmp_path / "s")

    def refused(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(StoreError, match="cannot write .*speed.json .Permission denied.: check the folder"):
        store.put_speed(CELL, timed(2.0, 4))


def test_samples_are_checked_even_when_they_are_not_parsed(tmp_path):
    store = filled(tmp_path / "s")
    assert store.get(CELL, samples=False).samples == [] and store.get(CELL, samples=False).metrics == METRICS
    (store.cells / CELL / "samples.jsonl").write_text("{")
    with pytest.raises(StoreError, match="samples.jsonl was changed"):
        store.get(CELL, samples=False)


def test_answers_with_odd_line_breaks_come_back_whole(tmp_path):
    store = Store(tmp_path / "s", create=True)
    odd = [{**SAMPLES[0], "answer": "one\u2028two\x85three\r\nfour"}]
    store.put(CELL, CONFIG, ENV, METRICS, odd)
    assert store.get(CELL).samples == odd


def test_the_latest_store_is_found(tmp_path):
    with pytest.raises(StoreError, match="no results store in"):
        latest_store(tmp_path)
    for number, name in enumerate(["b", "a"]):
        filled(tmp_path / name).write_sweep({})
        os.utime(tmp_path / name / "sweep.json", (number + 1, number + 1))
    assert latest_store(tmp_path) == tmp_path / "a"
    assert latest_store(tmp_path / "b") == tmp_path / "b"
