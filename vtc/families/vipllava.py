"""VipLLaVA: LLaVA whose projector is given the patch features of several CLIP layers side by side."""

from vtc.families.llava import build

__all__ = ["TYPES", "build"]

TYPES = ("vipllava",)
