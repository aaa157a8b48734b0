"""Write the compatibility table of the families from what their tests did.

A pytest plugin: ``PYTHONPATH=tests pytest -p families_report tests/test_families.py``, once for each release of transformers,
renews this release's part of ``results/families.json`` and the tables ``results/families.md`` and ``results/families-reasons.md``
made from it, which README.md and docs/families.md show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
FEATURES = {
    "test_equals_reference": "greedy",
    "test_rows_with_several_images_and_none": "mixed rows",
    "test_beams_and_sampling": "beams, sampling",
    "test_second_turn": "multi-turn",
    "test_training_step": "training",
    "test_accelerate_dispatch": "accelerate",
    "test_every_reducer_runs_or_is_refused": "all reducers",
    "test_keeping_everything_and_unpatching_change_nothing": "unpatch",
}
"""Test function to column; a family passes if all its cases do."""
STAGES = ("image", "encoder", "vision", "boundary", "decoder")

_seen: dict[str, dict[str, bool]] = {}  # family -> feature -> whether every test passed


def pytest_runtest_logreport(report: Any) -> None:
    """Note the outcome of every test that belongs to a family."""
    from family_cases import CASES

    function, _, rest = report.nodeid.rpartition("::")[2].partition("[")
    name = next((n for n in sorted(CASES, key=len, reverse=True) if rest == f"{n}]" or rest.startswith(f"{n}-")), None)
    if function not in FEATURES or name is None or (report.when != "call" and report.passed):
        return
    mine = _seen.setdefault(CASES[name].family, {})
    for feature in (FEATURES[function], *(["video"] if CASES[name].video and function == "test_equals_reference" else [])):
        mine[feature] = mine.get(feature, True) and report.passed


def pytest_sessionfinish() -> None:
    """Renew the files."""
    if not _seen:
        return
    import transformers

    file = RESULTS / "families.json"
    data = json.loads(file.read_text()) if file.exists() else {}
    data[transformers.__version__] = {
        family: {"stages": _stages(family), "features": dict(sorted(features.items()))}
        for family, features in sorted(_seen.items())
    }
    file.write_text(json.dumps(dict(sorted(data.items())), indent=1) + "\n")
    (RESULTS / "families.md").write_text(table(data) + "\n")
    (RESULTS / "families-reasons.md").write_text(reasons(data) + "\n")


def _stages(family: str) -> dict[str, str]:
    from family_cases import CASES
    from models import shared

    from vtc.families import family_of

    name = next(n for n, c in CASES.items() if c.family == family)
    return {stage.value: reason for stage, reason in family_of(shared(name)).facts.stages.items()}


def table(data: dict[str, Any]) -> str:
    """Return the Markdown table of families by stages and features: ✓ in every release tested, or where not."""
    features = [*dict.fromkeys(FEATURES.values()), "video"]
    lines = [
        "| family | " + " | ".join([*STAGES, *features]) + " |",
        "|---|" + ":-:|" * (len(STAGES) + len(features)),
    ]
    for family in sorted(set().union(*data.values())):
        runs = {version: run[family] for version, run in data.items() if family in run}
        cells = ["✓" if not any(run["stages"][stage] for run in runs.values()) else "–" for stage in STAGES]
        for feature in features:
            results = {version: run["features"].get(feature) for version, run in runs.items()}
            if all(r is None for r in results.values()):
                cells.append("–")
            else:
                failed = [version for version, passed in results.items() if passed is False]
                cells.append("✗ " + ", ".join(failed) if failed else "✓")
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", f"✓ on transformers {' and '.join(sorted(data))}; – not there, for the reason in docs/families.md."]
    )


def reasons(data: dict[str, Any]) -> str:
    """Return why stages are refused, as a Markdown list."""
    newest = data[max(data, key=lambda version: [int(p) for p in version.split(".")])]
    lines = []
    for family, run in sorted(newest.items()):
        by_reason: dict[str, list[str]] = {}
        for stage in STAGES:
            if run["stages"][stage]:
                by_reason.setdefault(run["stages"][stage], []).append(stage)
        lines += [f"* `{family}` refuses {', '.join(stages)}: {reason}." for reason, stages in by_reason.items()]
    return "\n".join(lines)
