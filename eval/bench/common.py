"""What the benches share: the device, the clock, memory, where a result was made, and CSV files."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer

from vtc import doors
from vtc.errors import StoreError, UnknownArgumentError
from vtc.eval.env import commit, machine, versions
from vtc.eval.stats import spread
from vtc.files import save

T = TypeVar("T")
PresetOption = Annotated[Literal["cpu", "gpu"] | None, typer.Option("--preset", help="By default what this machine has.")]
CsvOption = Annotated[Path | None, typer.Option("--out", help="CSV file; device and versions are in every row.")]
MinutesOption = Annotated[float, typer.Option("--minutes", min=0, help="Begin nothing further that would take longer.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
Table = list[dict[str, Any]]
"""Rows of a CSV file: plain data by column."""


# ----------------------------------------------------------------------------------------------------------------- device
def device_of(preset: Literal["cpu", "gpu"] | None) -> torch.device:
    """Return the device a preset is for; without one, the best that this machine has.

    Raises
    ------
    UnknownArgumentError
        The GPU is asked for and there is none.
    """
    if preset == "gpu" and not torch.cuda.is_available():
        raise UnknownArgumentError("--preset gpu needs a CUDA device, and there is none: use --preset cpu")
    return torch.device("cuda" if preset != "cpu" and torch.cuda.is_available() else "cpu")


def settle(device: torch.device) -> None:
    """Give memory back that nothing holds any more: after a model, or after something that did not fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------------- time
def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, by CUDA events on a GPU."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median of some timings with the 20th and 80th percentile, as the tables name them."""
    took = spread([1e3 * t for t in seconds])
    return {"ms_p20": round(took.low, 5), "ms_p50": round(took.value, 5), "ms_p80": round(took.high, 5)}


def before(end: float, items: Iterable[T]) -> Iterator[T]:
    """Yield items until twice the longest time one of them took so far might not fit before ``end`` (:func:`time.monotonic`).

    The time of an item is that of the loop's body and of making it.
    """
    longest = 0.0
    for item in items:
        began = time.monotonic()
        if began + 2 * longest >= end:
            return
        yield item
        longest = max(longest, time.monotonic() - began)


# ----------------------------------------------------------------------------------------------------------------- memory
def _resident() -> tuple[float, float] | None:
    """Resident memory and its peak in 10^6 bytes, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return (found["VmRSS"], found["VmHWM"]) if len(found) == 2 else None


def peak_of(work: Callable[[], Any]) -> tuple[float, float | None]:
    """Run ``work`` once on the CPU; return its seconds and the largest memory (10^6 bytes) on top of what there was before."""
    with contextlib.suppress(OSError, AttributeError):  # memory that was freed but not returned would hide what is used anew
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present
    there = _resident()
    seconds = timed(work, torch.device("cpu"))
    after = _resident()
    return seconds, None if there is None or after is None else max(0.0, after[1] - there[0])


def peak_on(work: Callable[[], Any], device: torch.device) -> float | None:
    """Run ``work`` once; return the largest memory (10^6 bytes) that it took on the device, on top of what there was before."""
    if device.type != "cuda":
        return peak_of(work)[1]
    torch.cuda.synchronize()
    there = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - there) / 1e6


# ------------------------------------------------------------------------------------------------------------------ files
def reason(error: Exception) -> str:
    """Return an error's type and first line, for a note."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


def commit_name() -> str:
    """Return the commit as results name it: twelve digits, and ``+`` where the checkout differs; empty outside a checkout."""
    here = commit()
    return f"{here['id'][:12]}{'+' if here['dirty'] else ''}" if here["id"] else ""


def provenance(device: torch.device, **more: Any) -> dict[str, Any]:
    """Return device, threads, what a bench adds, commit and versions: the same in every row."""
    where = machine()
    name = where["gpu"] if device.type == "cuda" else where["cpu"]
    return {
        "device": name,
        "device_type": device.type,
        "threads": where["torch_threads"],
        **more,
        "commit": commit_name(),
        **versions(),
    }


def write(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, if a file is wanted."""
    if path is None:
        return
    import pandas as pd

    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.5g", lineterminator="\n")
    save(path, text, "name another place with --out")


def read(path: Path) -> Table:
    """Read rows that :func:`write` wrote; nothing in a cell is None, a file that is not there has no rows."""
    import pandas as pd

    try:
        text = doors.read_text(path, 64 * doors.MIB)
        table = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = doors.short(error)
        raise StoreError(f"cannot read {doors.short(path)} ({reason}): give a CSV file that `vtc bench` wrote") from None
    return [{str(k): None if pd.isna(v) else v for k, v in row.items()} for row in table.to_dict("records")]
