"""Where jobs run: in this process, in several processes of this machine, or on a Ray cluster.

An executor has so many slots; the runner gives it at most that many jobs and writes what comes back. Workers never touch the store,
so that machines of a cluster need no common file system.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import ipaddress
import multiprocessing
import os
import secrets
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, Protocol

from vtc.errors import ConfigError, UnknownArgumentError, VtcError, did_you_mean
from vtc.eval.worker import Job, Outcome, Worker

EXECUTORS = ("local", "ray")
"""What ``--executor`` takes."""

TRIES = 3
"""How often a job is started whose worker dies under it."""

Progress = Callable[[int], object]
"""Told how many questions, or timed pairs, of the running job are done; only where the job runs in this process."""


class Executor(Protocol):
    """What the runner needs of an executor: how many jobs at a time, and whether they run on this machine."""

    slots: int
    remote: bool

    def submit(self, job: Job, progress: Progress) -> None:
        """Start a job; at most ``slots`` are given at a time."""

    def wait(self) -> Iterator[tuple[Job, Outcome]]:
        """Return the jobs that have ended, at least one."""

    def close(self) -> None:
        """Let the workers go."""


def make(name: str, workers: int | None = None) -> Executor:
    """Make an executor.

    Parameters
    ----------
    name : {"local", "ray"}
        Kind.
    workers : int or None
        Slots; one (local), or one for every GPU or CPU of the cluster (ray) when None.

    Raises
    ------
    UnknownArgumentError
        An unknown kind, or no worker at all.
    """
    if name not in EXECUTORS:
        raise UnknownArgumentError(
            f"there is no executor '{name}'{did_you_mean(name, EXECUTORS)} (executors: {', '.join(EXECUTORS)})"
        )
    if workers is not None and workers < 1:
        raise UnknownArgumentError(f"--workers {workers} leaves nobody to do the work: give at least 1")
    if name == "ray":
        return RayActors(workers)
    return InProcess() if workers in (None, 1) else Processes(workers or 1)


class InProcess:
    """One worker in this process."""

    remote = False

    def __init__(self) -> None:
        self.slots = 1
        self.worker = Worker()
        self.waiting: deque[tuple[Job, Progress]] = deque()

    def submit(self, job: Job, progress: Progress) -> None:
        """Remember the job; it runs in :meth:`wait`."""
        self.waiting.append((job, progress))

    def wait(self) -> Iterator[tuple[Job, Outcome]]:
        """Run the job."""
        job, progress = self.waiting.popleft()
        yield job, self.worker.run(job, progress)

    def close(self) -> None:
        """Nothing to do: the model goes with this object."""


_WORKER: Worker | None = None


def _in_child(kind: type[Worker], job: Job) -> Outcome:
    global _WORKER
    _WORKER = _WORKER or kind()
    return _WORKER.run(job)


def _begin_child(numbers: Any, alive: Connection) -> None:
    """Tie the process to the one that started it, and give it a GPU of its own, where there are any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    import torch

    with numbers.get_lock():
        mine, numbers.value = numbers.value, numbers.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(mine % torch.cuda.device_count())


def _end_with(alive: Connection) -> None:
    """Wait until the other end of the pipe is closed, by the parent or by the system when the parent is gone; then end."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv_bytes()  # nothing is ever sent
    os._exit(1)  # in the middle of whatever it does: nobody wants the answer


class Processes:
    """Several workers, each in a process of this machine with its own copy of the model; jobs of a dead one start again.

    They end with this process, however it ends, and when :meth:`close` is called, whatever they are doing.

    Parameters
    ----------
    slots : int
        How many.
    worker : type
        What each process holds.
    """

    remote = False

    def __init__(self, slots: int, worker: type[Worker] = Worker) -> None:
        self.slots, self.worker = slots, worker
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None
        self.ends: list[Connection] = []
        self.running: dict[concurrent.futures.Future[Outcome], Job] = {}
        self.tries: dict[tuple[str, str], int] = {}

    def submit(self, job: Job, progress: Progress) -> None:
        """Hand the job to a free process."""
        if self.pool is None:
            context = multiprocessing.get_context("spawn")  # a forked torch may hang
            theirs, ours = context.Pipe(duplex=False)
            self.ends = [ours, theirs]
            self.pool = concurrent.futures.ProcessPoolExecutor(
                self.slots, context, _begin_child, (context.Value("i", 0), theirs)
            )
        self.running[self.pool.submit(_in_child, self.worker, job)] = job

    def wait(self) -> Iterator[tuple[Job, Outcome]]:
        """Return what has ended."""
        done, _ = concurrent.futures.wait(self.running, return_when=concurrent.futures.FIRST_COMPLETED)
        if any(isinstance(f.exception(), BrokenProcessPool) for f in done):
            yield from self._again()
            return
        for future in done:
            yield self.running.pop(future), future.result()

    def _again(self) -> Iterator[tuple[Job, Outcome]]:
        """A process died, and the pool with it: start over with what was running."""
        lost, self.running = list(self.running.values()), {}
        self.close()
        for job in lost:
            key = (job.id, job.kind)
            self.tries[key] = self.tries.get(key, 1) + 1
            if self.tries[key] > TRIES:
                yield job, Outcome({}, {}, f"the worker process died {TRIES} times (out of memory?): try fewer --workers")
            else:
                self.submit(job, lambda _: None)

    def close(self) -> None:
        """End the processes, also in the middle of a job."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for end in self.ends:
                end.close()
            self.pool, self.ends = None, []


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Join a cluster, unless this process has; tokens are as its owner set them up (``RAY_AUTH_MODE``, ``RAY_AUTH_TOKEN``)."""
    import ray

    joined = not ray.is_initialized()
    if joined:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        yield ray
    finally:
        if joined:
            ray.shutdown()


_PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for "this machine only", whatever the system: it listens on loopback
    "RAY_AUTH_MODE": "token",
}
"""Environment of a Ray that is started here, for this run; read by Ray when it is imported, and by the processes it starts."""


@functools.cache
def _token() -> str:
    """Secret of this process's Rays: one for all, since Ray reads it once."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _private_ray() -> Iterator[Any]:
    """Start a Ray that nobody else can talk to: loopback addresses, no dashboard, a token of this run where Ray has tokens.

    Anybody who reaches an open port of Ray's runs code with the rights of its owner.

    Raises
    ------
    ConfigError
        Ray was imported before, by somebody else, and would listen on other addresses.
    """
    wanted = _PRIVATE | {"RAY_AUTH_TOKEN": _token()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        import ray

        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            addresses = [ipaddress.ip_address(node["NodeManagerAddress"]) for node in ray.nodes()]
            if not all(address.is_loopback for address in addresses):
                raise ConfigError(
                    f"Ray would listen on {addresses[0]}, since it was imported before vtc could say otherwise: run the sweep in a "
                    "process of its own, or start a cluster with `ray start --head` and name it in RAY_ADDRESS"
                )
            yield ray
        finally:
            ray.shutdown()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class RayActors:
    """One actor for every GPU of a Ray cluster, or CPU slot where there is no GPU; a dead actor's job starts again on a new one.

    ``RAY_ADDRESS`` says which cluster (``auto``: the one that ``ray start`` made on this machine). Without it a Ray is started for
    this run and ended with it, which listens to this machine only and asks for a token.

    Parameters
    ----------
    workers : int or None
        How many actors; one for every GPU, or CPU where there is no GPU, when None.
    worker : type
        What each actor is.

    Raises
    ------
    ConfigError
        Ray is not installed, its cluster cannot be reached, or it cannot be kept to this machine.
    """

    remote = True

    def __init__(self, workers: int | None = None, worker: type[Worker] = Worker) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--executor ray needs Ray: pip install 'vtc-reducers[ray]'")
        self.worker, self.started = worker, contextlib.ExitStack()
        address = os.environ.get("RAY_ADDRESS")
        try:
            self.ray = self.started.enter_context(_cluster(address) if address else _private_ray())
        except (ConnectionError, RuntimeError, ValueError) as error:
            if isinstance(error, VtcError):
                raise
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"the Ray cluster at {address or 'this machine'} cannot be reached ({first}): start it with `ray start --head`, or "
                "correct RAY_ADDRESS"
            ) from None
        there = self.ray.cluster_resources()
        self.gpus = int(there.get("GPU", 0))
        self.slots = workers or self.gpus or max(1, int(there.get("CPU", 1)))
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Job, Any, int]] = {}

    def _actor(self) -> Any:
        if self.idle:
            return self.idle.pop()
        needs = {"num_gpus": 1, "num_cpus": 1} if self.gpus else {"num_cpus": 1}
        return self.ray.remote(self.worker).options(**needs).remote()

    def submit(self, job: Job, progress: Progress) -> None:
        """Hand the job to an idle actor, or to a new one."""
        self._start(job, 1)

    def _start(self, job: Job, attempt: int) -> None:
        actor = self._actor()
        self.running[actor.run.remote(job)] = (job, actor, attempt)

    def wait(self) -> Iterator[tuple[Job, Outcome]]:
        """Return what has ended; what was running on a dead actor starts again elsewhere."""
        done, _ = self.ray.wait(list(self.running), num_returns=1)
        for reference in done:
            job, actor, attempt = self.running.pop(reference)
            try:
                outcome = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:  # the actor or its node is gone: errors of a job are in its outcome
                self.ray.kill(actor)
                if attempt < TRIES:
                    self._start(job, attempt + 1)
                    continue
                reason = str(error).strip().splitlines()[0]
                yield job, Outcome({}, {}, f"the Ray worker was lost {TRIES} times: {reason}")
                continue
            self.idle.append(actor)
            yield job, outcome

    def close(self) -> None:
        """Let the actors go, and the local Ray, if it was started here."""
        for actor in [*self.idle, *(actor for _, actor, _ in self.running.values())]:
            self.ray.kill(actor)
        self.idle, self.running = [], {}
        self.started.close()
