"""Run a function on several ranks of this machine: real processes, gloo on loopback, within a time limit.

The processes are forked from a server that has imported torch, transformers and vtc once, so that a run takes about a second. The
server is fresh: neither threads nor autograd state of the tests' process come along.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LIMIT = 300.0
"""Seconds after which a run is killed: many times what one takes, for machines with other work to do."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.tensor.parallel",
        "torch.distributed.fsdp",
        "transformers.models.llava.modeling_llava",
        "transformers.models.llava.processing_llava",
        "transformers.models.clip.modeling_clip",
        "transformers.models.llama.modeling_llama",
        "vtc.engine.patch",
        "vtc.pocket.answer",
    ]
)


class RankError(AssertionError):
    """A rank raised, died, or did not end in time; the message has its traceback."""


def run(job: Callable[..., Any], *arguments: Any, ranks: int = 2, limit: float = LIMIT) -> list[Any]:
    """Call ``job(*arguments)`` in ``ranks`` processes with a process group of all of them; return what each returned, by rank.

    Parameters
    ----------
    job : callable
        A function of a module's top level.
    *arguments : object
        Its arguments; like what it returns, they are pickled.
    ranks : int
        Number of processes.
    limit : float
        Seconds until all of them are killed.

    Raises
    ------
    RankError
        As soon as one rank raises or dies; the others are killed.
    """
    deadline = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
        started = [
            _CONTEXT.Process(target=_rank, args=(job, arguments, r, ranks, folder, pipe[1]), name=f"rank {r}", daemon=True)
            for r, pipe in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(started, pipes, strict=True):
                process.start()
                sender.close()
            return _collect([receiver for receiver, _ in pipes], deadline)
        finally:
            for process in started:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [r for i, r in enumerate(receivers) if i not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [i for i in range(len(receivers)) if i not in results]
            raise RankError(f"ranks {late} of {len(receivers)} did not end in time")
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                fine, value = pickle.loads(receiver.recv_bytes())  # noqa: S301  our own processes
            except EOFError:
                raise RankError(f"rank {rank} died") from None
            if not fine:
                raise RankError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[i] for i in range(len(receivers))]


def _rank(job: Callable[..., Any], arguments: tuple[Any, ...], rank: int, ranks: int, folder: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open as long as the process is
    try:
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        torch.distributed.init_process_group(  # through a file; gloo itself takes ports that are free
            "gloo",
            init_method=f"file://{Path(folder) / 'meeting'}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=LIMIT),
        )
        answer = True, job(*arguments)
        torch.distributed.destroy_process_group()
    except BaseException:  # told to the parent, whatever it is
        answer = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
