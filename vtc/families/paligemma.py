"""PaliGemma (1 and 2): one SigLIP view per image; image and prompt see each other in both directions, positions start at 1."""

from __future__ import annotations

import functools

from vtc.families import llava

TYPES = ("paligemma",)
build = functools.partial(llava.build, last=True)
