"""Executors: processes and a real two-node Ray cluster give the single-process answers, also when workers are killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import DyingWorker, fake_executor
from rich.console import Console

from vtc.cli import main
from vtc.errors import ConfigError
from vtc.eval import executors
from vtc.eval.executors import InProcess, Processes
from vtc.eval.run import Sweep
from vtc.eval.store import Store
from vtc.eval.sweepfile import parse_sweep

QUIET = Console(quiet=True)
YAML = """\
data: {scenes: {n: 6, types: [color, count]}}
budgets: [49]
reducers: [fastv, {name: divprune, budgets: [{flops: 0.5}]}]
threads: 1
speed: false
"""


@pytest.fixture(scope="module")
def sweep():
    return Sweep(parse_sweep(YAML), "sweep.yaml")


@pytest.fixture(scope="module")
def single(sweep, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("single") / "s", create=True)
    assert sweep.run(store, QUIET, executor=InProcess()).failed == 0
    return store


def same(sweep: Sweep, one: Store, two: Store) -> None:
    for p in sweep.planned:
        a, b = one.get(p.id), two.get(p.id)
        assert a.samples == b.samples, p.cell.label
        for key in ("accuracy", "by_type", "tokens", "flops", "kv_bytes", "scores"):
            assert a.metrics[key] == b.metrics[key], (p.cell.label, key)
        assert a.metrics.get("flops_budget") == b.metrics.get("flops_budget")


@pytest.fixture
def flag(tmp_path, monkeypatch):
    """Say where a worker notes that it killed itself, and let child processes import it."""
    monkeypatch.setenv("VTC_TEST_FLAG", str(tmp_path / "died"))
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
    return tmp_path / "died"


def test_processes_give_the_same_answers_and_a_killed_one_is_replaced(sweep, single, tmp_path, flag):
    store, executor = Store(tmp_path / "s", create=True), Processes(2, DyingWorker)
    try:
        outcome = sweep.run(store, QUIET, executor=executor)
    finally:
        executor.close()
    assert (outcome.done, outcome.failed) == (len(sweep.planned), 0) and flag.exists()
    same(sweep, single, store)


def test_a_ray_cluster_of_two_nodes_gives_the_same_answers_and_a_killed_worker_is_replaced(
    sweep, single, tmp_path, flag, monkeypatch
):
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        executor = executors.RayActors(worker=DyingWorker)
        assert len(ray.nodes()) == 2 and executor.slots == 2 and executor.gpus == 0
        store = Store(tmp_path / "s", create=True)
        try:
            outcome = sweep.run(store, QUIET, executor=executor)
        finally:
            executor.close()
    finally:
        cluster.shutdown()
    assert not ray.is_initialized()
    assert (outcome.done, outcome.failed) == (len(sweep.planned), 0) and flag.exists()
    same(sweep, single, store)


PARENT = """
import sys, types
from fakes import SleepingWorker
from vtc.eval.commands import ended_like_ctrl_c
from vtc.eval.executors import Processes

if __name__ == "__main__":
    executor = Processes(2, SleepingWorker)
    with ended_like_ctrl_c():
        try:
            for name in "ab":
                executor.submit(types.SimpleNamespace(id=name, kind="accuracy"), lambda _: None)
            list(executor.wait())
        except KeyboardInterrupt:
            executor.close()
            sys.exit(130)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_workers_end_with_the_process_that_started_them(tmp_path, flag, sent, code, monkeypatch):
    """However it ends: they hold a model each, on a GPU with its memory."""
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env={**os.environ, "VTC_TEST_FLAG": str(work)})
    try:
        until(lambda: len(list(work.iterdir())) == 2, 300)
        parent.send_signal(sent)
        assert parent.wait(60) == code
        until(lambda: not any(alive(int(p.name)) for p in work.iterdir()), 30)
    finally:
        for pid in [parent.pid, *(int(p.name) for p in work.iterdir())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def until(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_ends_a_sweep_as_ctrl_c_does(tmp_path, monkeypatch):
    """Clusters end their jobs with it: the cell in flight is lost, every claim is given back."""
    executor = fake_executor()
    monkeypatch.setattr(executors, "make", lambda *_: executor)
    real, count = executor.worker.answers, []

    def answers(job):
        count.append(job)
        if len(count) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(job)

    executor.worker.answers = answers
    (tmp_path / "t.yaml").write_text(YAML)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(tmp_path / "t.yaml"), "--out", str(tmp_path / "s")])
    assert ended.value.code == 130 and signal.getsignal(signal.SIGTERM) is before
    store = Store(tmp_path / "s")
    assert len(store.stored()) == 2 and not list(store.cells.glob(".*"))
    for path in (store.root / "locks").glob("*.lock"):
        store.claim(path.stem).release()


def test_a_job_whose_worker_always_dies_fails_and_says_so(sweep):
    executor = Processes(1)
    job = sweep.job(sweep.planned[0], "accuracy")
    executor.tries[job.id, job.kind] = executors.TRIES
    executor.running = {object(): job}
    [(lost, outcome)] = list(executor._again())
    assert lost is job and "died 3 times" in outcome.error and "--workers" in outcome.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--executor", "rya"], "there is no executor 'rya'; did you mean 'ray'? (executors: local, ray)"),
        (["--workers", "0"], "--workers 0 leaves nobody to do the work"),
    ],
)
def test_bad_executors(tmp_path, capsys, arguments, message):
    (tmp_path / "t.yaml").write_text(YAML)
    with pytest.raises(SystemExit):
        main(["sweep", str(tmp_path / "t.yaml"), "--out", str(tmp_path / "s"), *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "s").exists()


def test_ray_that_is_not_installed_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest))
    with pytest.raises(ConfigError, match=r"pip install 'vtc-reducers\[ray\]'"):
        executors.make("ray")
