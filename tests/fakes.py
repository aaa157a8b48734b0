"""A worker that measures nothing: answers follow from the cell's address, so that sweeps of many cells take milliseconds."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from vtc.eval import env
from vtc.eval.executors import InProcess
from vtc.eval.worker import Job, Outcome, Worker


class FakeWorker(Worker):
    """Takes no time and notes every job it is given.

    Parameters
    ----------
    log : Path or None
        Gets one line per accuracy job begun.
    questions : int
        Samples per cell.
    meet : int or None
        Processes that must have noted a job before any of them goes on.
    """

    def __init__(self, log: Path | None = None, questions: int = 6, meet: int | None = None) -> None:
        super().__init__()
        self.log, self.count, self.meet = log, questions, meet

    def run(self, job: Job, progress: Any = None) -> Outcome:
        if self.log is not None and job.kind == "accuracy":
            with open(self.log, "a") as file:
                file.write(f"{job.id} {os.getpid()}\n")
        while self.meet is not None and len({line.split()[1] for line in self.log.read_text().splitlines()}) < self.meet:
            time.sleep(0.01)
        data = self.answers(job) if job.kind == "accuracy" else self.timings(job)
        return Outcome(data, env.describe(job.seed))

    def answers(self, job: Job) -> dict[str, Any]:
        draw = random.Random(job.id.partition("-")[0])
        kept = 196 if job.cell.reducer is None else draw.randrange(1, 196)
        samples = []
        for i in range(self.count):
            correct = draw.random() < 0.8
            sample = {"id": f"scene/{i}/0", "image": f"scene/{i}", "type": "ab"[i % 2], "gold": "yes", "answer": "no"}
            tokens = {"slots": 196, "kept": kept, "avg_tokens": float(kept)}
            samples.append({**sample, "correct": correct, "score": float(correct), **tokens})
        hits = sum(s["correct"] for s in samples)
        flops = {"tower": 1, "projector": 1, "decoder": 10 * kept, "head": 1, "reducer": 0, "total": 10 * kept + 3}
        metrics = {
            "n": len(samples),
            "correct": hits,
            "accuracy": hits / len(samples),
            "by_type": {},
            "scores": {"accuracy": {"value": hits / len(samples), "scale": 100, "higher_is_better": True}},
            "main": "accuracy",
            "tokens": {"slots": 196.0, "kept": float(kept), "avg": float(kept)},
            "flops": {"counted": flops, "formula": flops, "mismatch": 0.0, "tokens": {"decoder": [kept + 12] * 6}},
            "kv_bytes": 6 * kept,
            "seconds": 0.0,
        }
        return {"metrics": metrics, "samples": samples}

    def timings(self, job: Job) -> dict[str, Any]:
        from vtc.eval.worker import host

        one = {"value": 1.0, "low": 1.0, "high": 1.0}
        side = {**dict.fromkeys(("vision_ms", "prefill_ms", "ttft_ms", "decode_ms", "reducer_ms"), one), "kv_bytes": 1}
        return {
            "settings": job.speed.model_dump(),
            "host": host(),
            "env": env.describe(job.seed),
            "batch_size": 1,
            "prompt_tokens": 208,
            "unreduced": {**side, "peak_bytes": None},
            "reduced": {**side, "peak_bytes": None},
            "speedup": dict.fromkeys(("vision", "prefill", "ttft", "decode"), one),
        }


class DyingWorker(Worker):
    """Kills its own process in the middle of the first cell of `fastv`, once for every file ``$VTC_TEST_FLAG`` is not there."""

    def accuracy(self, job: Job, progress: Any = None) -> dict[str, Any]:
        found = super().accuracy(job, progress)
        if job.cell.name == "fastv":
            try:
                Path(os.environ["VTC_TEST_FLAG"]).touch(exist_ok=False)
            except FileExistsError:
                return found
            os.kill(os.getpid(), signal.SIGKILL)
        return found


class SleepingWorker(Worker):
    """Says that it is at work, by a file named after its process in ``$VTC_TEST_FLAG``, and never ends."""

    def run(self, job: Any, progress: Any = None) -> Outcome:
        (Path(os.environ["VTC_TEST_FLAG"]) / str(os.getpid())).touch()
        time.sleep(3600)
        raise AssertionError("nobody ended this process")


def fake_executor(log: Path | None = None, questions: int = 6, meet: int | None = None) -> InProcess:
    """Return a local executor around a :class:`FakeWorker`."""
    executor = InProcess()
    executor.worker = FakeWorker(log, questions, meet)
    return executor
