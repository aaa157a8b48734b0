"""Shared settings of all tests: one thread per process unless OMP_NUM_THREADS says otherwise, quiet transformers, no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "VTC_VERIFY", "off"
)  # test_verify_memory has what patching checks by itself; nobody's cache is written here

import pytest  # noqa: E402
import torch  # noqa: E402

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)


ONCE = {
    *("bench_bars", "bench_kernels", "bench_reducers", "core", "costs", "doors", "doors_fuzz", "files", "gpu_rules", "kernels"),
    *(
        "eval_config",
        "eval_executors",
        "eval_faults",
        "eval_numbers",
        "eval_plots",
        "eval_report",
        "eval_resume",
        "eval_shards",
    ),
    *(
        "eval_stats",
        "eval_store",
        "eval_tables",
        "eval_trust",
        "eval_tune",
        "interrupts",
        "one_file",
        "packaging",
        "pocket_scenes",
    ),
    *("pocket_train", "presets", "ties", "timing", "window"),
}
"""Modules of tests of our own arithmetic, kernels, files and processes: they say the same whatever transformers is installed, and
`make test` runs them once, on the newest (`make test ONCE=`: on both)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in ONCE:
            item.add_marker("once")


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    import transformers

    transformers.logging.set_verbosity_error()
