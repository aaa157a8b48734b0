"""Whatever fails while a store is written, and wherever a runner dies: the next run ends with the undisturbed table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `store_faults.py` found, in a process of its own: it replaces functions of `os`, and forks."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(HERE / "store_faults.py"), str(tmp_path_factory.mktemp("faults"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_failing_call_and_every_kill_leaves_a_store_that_goes_on(found):
    assert found["problems"] == []
    assert found["calls"] > 150 and found["places"] > 15  # the whole path was gone through
    assert found["refused"] > 100 and found["kills"] > 60  # and the failures did something


def test_two_runners_over_overlapping_sweeps_do_every_cell_once_and_report_on_their_own(found):
    both = found["overlapping"]
    assert both["codes"] == [0, 0] and both["same"] == [True, True]
    assert both["cells"] == [4, 9] and both["shared"] == 4 and both["done"] == 9 and both["twice"] == 0
