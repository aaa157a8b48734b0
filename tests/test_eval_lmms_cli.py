"""The lmms-eval plugin as users start it: lmms-eval's own command line, one process and two, and a run that fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vtc
from vtc.eval.lmms import run_task
from vtc.eval.lmms.benchmarks import TASKS

LIMIT = 9  # odd: the second of two processes gets one question fewer, and lmms-eval fills up with a repeated one


def lmms_eval(output: Path, model_args: str, *launcher: str, limit: int = LIMIT, **environment: str):
    """Run ``lmms-eval`` in a process of its own, in a folder that is not the checkout."""
    output.mkdir(parents=True, exist_ok=True)
    command = [
        *(launcher or (sys.executable, "-m", "lmms_eval")), "--model", "vtc", "--model_args", model_args,
        "--tasks", "vtc_scenes", "--include_path", str(TASKS), "--batch_size", "4", "--limit", str(limit),
        "--log_samples", "--output_path", str(output),
    ]  # fmt: skip
    return subprocess.run(
        command,
        cwd=output,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def logged(output: Path) -> list[dict]:
    """Logged samples of a run, by document."""
    (file,) = output.rglob("*_samples_vtc_scenes.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])


def comparable(rows: list[dict]) -> list[tuple]:
    keys = ("slots", "kept", "avg_tokens", "prompt_tokens", "new_tokens")
    return [
        (r["doc_id"], r["target"], r["filtered_resps"], r["exact_match"], *(r["token_counts"][0][k] for k in keys))
        for r in rows
    ]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    output = tmp_path_factory.mktemp("single") / "out"
    done = lmms_eval(output, "pretrained=pocket,reducer=fastv,keep=49")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def test_the_command_line_answers_as_our_runner_does(single):
    output, done = single
    rows = logged(output)
    model, processor = vtc.load_pocket()
    ours = run_task(model, processor, "vtc_scenes", reducer=vtc.create("fastv", keep=49), batch_size=4, limit=LIMIT, seed=0)
    assert [r["filtered_resps"] for r in rows] == [s["answer"] for s in ours.samples]
    assert [r["exact_match"] for r in rows] == [s["score"] for s in ours.samples]
    counted = [tuple(r["token_counts"][0][k] for k in ("slots", "kept", "avg_tokens")) for r in rows]
    assert counted == [(s["slots"], s["kept"], s["avg_tokens"]) for s in ours.samples] == [(196, 49, 98.0)] * LIMIT
    (file,) = output.rglob("*_results.json")
    results = json.loads(file.read_text())
    assert results["results"]["vtc_scenes"]["exact_match,none"] == ours.metrics["exact_match"]["value"]
    assert results["configs"]["vtc_scenes"]["metadata"]["vtc"]["reducer"] == "fastv"
    assert "|vtc_scenes|" in done.stdout


def test_two_processes_answer_as_one_does(single, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
        str(port),
        "-m",
        "lmms_eval",
    )
    done = lmms_eval(tmp_path / "out", "pretrained=pocket,reducer=fastv,keep=49", *launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(logged(tmp_path / "out")) == comparable(logged(single[0]))


def test_an_error_in_a_reducer_fails_the_command(tmp_path):
    """A reducer that fails on its second call: non-zero exit, the reason named, no results that look like a weak method."""
    plugin = tmp_path / "plugin"
    (plugin / "broken-1.0.dist-info").mkdir(parents=True)
    (plugin / "broken-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (plugin / "broken-1.0.dist-info" / "entry_points.txt").write_text("[vtc.reducers]\nbroken = broken\n")
    (plugin / "broken.py").write_text(
        "import dataclasses, vtc\n"
        "from vtc.reducers.uniform import Uniform\n"
        "calls = []\n"
        "@vtc.register('broken', paper='baseline')\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Broken(Uniform):\n"
        "    '''Fail.'''\n"
        "    def select(self, signals):\n"
        "        calls.append(1)\n"
        "        if len(calls) == 2:\n"
        "            raise ZeroDivisionError('nothing left')\n"
        "        return Uniform.select(self, signals)\n"
    )
    path = os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH")]))
    output = tmp_path / "out"
    done = lmms_eval(
        output, "pretrained=pocket,reducer=broken,keep=9", str(Path(sys.executable).with_name("lmms-eval")), PYTHONPATH=path
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "vtc: generate failed on document" in done.stderr and "ZeroDivisionError: nothing left" in done.stderr
    assert not list(output.rglob("*.json*"))
