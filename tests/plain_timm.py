"""timm without the experiment logger that it imports wherever one is installed: five CPU seconds in every process of the suite."""

from __future__ import annotations

import sys

_logger = sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  None: "not installed"
import timm  # noqa: E402

if _logger is None:
    del sys.modules["wandb"]

__all__ = ["timm"]
