"""Every preset, spelled out by hand from the methods' papers and releases: what a name promises is what is made of it."""

from __future__ import annotations

import re

import pytest
from cases import CASES

import vtc

DROPPED = ("fastv", "evs", "dart")
"""Releases whose rates say how much goes; those of all others say how much stays."""

ALSO = {  # options that all presets of a method (or of a model) share
    "hiprune.llava": {"alpha": 0.1, "object_layer": 9},
    "hiprune.qwen": {"alpha": 0.1, "object_layer": 16},
    "sparsevlm.llava": {"layers": (3, 7, 16), "official": True},
    "sparsevlm.plus": {"layers": (3, 7, 16), "official": True, "version": "2"},
    "dart.llava": {"layer": 2, "official": True},
    "dart.r": {"layer": 2, "official": True},
    "fastv.k2": {"layer": 2},
    "fastv.k3": {"layer": 3},
    "fastv.llava": {"layer": 2},
    "aim.llava15": {"start": 13, "stop": 21},
    "aim.merge": {"prune": False},
    "todre.select": {"exit": False},
    "todre.v1": {"diversity": "kcenter"},
    "zooprune.llavanext": {"rank": 128},
}

SPELLED = {  # whose numbers are not in their names, or not as they are
    "aim.frame-49": {"keep": 49 / 196},
    "aim.frame-25": {"keep": 25 / 196},
    "aim.frame-13": {"keep": 13 / 196},
    "aim.frame-7": {"keep": 7 / 196},
    "aim.frame-4": {"keep": 4 / 196},
    "aim.merge-r12": {"keep": 1 / 8, "prune": False},
    "aim.merge-r3": {"keep": 0.031, "prune": False},
    "corematching.llava15": {"keep": 1.0, "layer": 6},
    "corematching.llava15-64": {"keep": 64, "layer": 6, "rule": "topk"},
    "corematching.neurons-20": {"keep": 1.0, "layer": 6, "neurons": 0.2},
    "corematching.neurons-40": {"keep": 1.0, "layer": 6, "neurons": 0.4},
    "corematching.neurons-60": {"keep": 1.0, "layer": 6, "neurons": 0.6},
    "corematching.neurons-80": {"keep": 1.0, "layer": 6, "neurons": 0.8},
    "dart.r778": {"keep": 1 - 0.778, "layer": 2, "official": True},
    "dart.lightcompress": {"keep": 128, "layer": 5},
    "dart.uniprunebench": {"keep": 128, "layer": 2, "image_pivots": 10, "text_pivots": 5},
    "divprune.paper": {"keep": 0.098},
    "divprune.video": {"keep": 0.1},
    "docprune.paper": {"keep": 1.0},
    "docprune.mask-only": {"keep": 1.0, "dilate": False},
    "evs.rate70": {"keep": 0.3},
    "evs.rate75": {"keep": 0.25},
    "fastv.paper": {"layer": 2, "keep": 0.5},
    "flowcut.qwen2vl-33": {"keep": 1 / 3},
    "flowcut.qwen2vl-22": {"keep": 2 / 9},
    "flowcut.qwen2vl-11": {"keep": 1 / 9},
    "hierpool.factor2": {"keep": 1 / 2},
    "hierpool.factor3": {"keep": 1 / 3},
    "hierpool.factor4": {"keep": 1 / 4},
    "hiprune.qwen-33": {"keep": 0.334, "alpha": 0.1, "object_layer": 16},
    "hiprune.qwen-22": {"keep": 0.223, "alpha": 0.1, "object_layer": 16},
    "hiprune.qwen-11": {"keep": 0.112, "alpha": 0.1, "object_layer": 16},
    "prumerge.llava15-adaptive": {"keep": 1.0, "adaptive": True},
    "prumerge.llava15-eighth": {"keep": 576 // 8 + 1},  # and the token of all the others
    "prumerge_plus.llava15-adaptive": {"keep": 1.0, "adaptive": True},
    "prumerge_plus.llava15-quarter": {"keep": 576 // 4 + 1},
    "pyramiddrop.llava15": {"keep": 0.5**3, "layers": (8, 16, 24)},
    "pyramiddrop.llavanext": {"keep": 0.5**3, "layers": (8, 16, 24)},
    "skipspan.clip-l": {"keep": 0.45, "start": 6, "stop": 20},
    "todre.exit-only": {"keep": 1.0},
    "tokencorr.paper": {"keep": 1.0},
    "tome.vit-b16": {"r": 13},
    "tome.vit-l16": {"r": 7},
    "tome.vit-l16-384": {"r": 23},
    "tome.swag-h14-518": {"r": 40},
    "tome.clip-l14-336": {"r": 16},
    "transprune.high": {"keep": 0.125, "ratios": (0.875, 0.625, 0.125)},
    "transprune.low": {"keep": 0.0625, "ratios": (0.625, 0.1875, 0.0625)},
    "transprune.ttv": {"keep": 0.125, "ratios": (0.875, 0.625, 0.125), "iga": False},
    "zooprune.qwen-20": {"keep": 0.2},
    "zooprune.qwen-10": {"keep": 0.1},
}


def promised(name: str, preset: str) -> dict:
    """What the name says: its number is one of tokens, or behind an ``r`` a rate in per cent."""
    full, spelled = f"{name}.{preset}", CASES[name].presets
    if full in SPELLED or preset in spelled:
        return SPELLED[full] if full in SPELLED else spelled[preset]
    found = re.search(r"(r?)(\d+)$", preset)
    assert found, f"the name '{preset}' tells no number: spell its options out in the line of '{name}' in tests/cases.py"
    rate, number = found.groups()
    share = int(number) / 100
    keep = int(number) if not rate else 1 - share if name in DROPPED else share
    return {"keep": keep} | next((more for start, more in ALSO.items() if full.startswith(start)), {})


@pytest.mark.parametrize("name", vtc.list_reducers())
def test_a_preset_is_what_its_name_promises(name):
    for preset, options in vtc.info(name).presets.items():
        assert dict(options) == promised(name, preset), f"{preset}: wrong, or spell it out in tests/cases.py"
        made = vtc.create(f"{name}.{preset}")
        assert {option: getattr(made, option) for option in options} == dict(options)


def test_no_preset_is_spelled_out_that_is_not_there():
    there = {f"{name}.{preset}" for name in vtc.list_reducers() for preset in vtc.info(name).presets}
    assert SPELLED.keys() <= there and all(any(t.startswith(start) for t in there) for start in ALSO)
