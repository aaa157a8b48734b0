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


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    import transformers

    transformers.logging.set_verbosity_error()
