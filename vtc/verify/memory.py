"""Verdicts that are remembered, and the check that ``vtc.patch`` makes once."""

from __future__ import annotations

from contextvars import ContextVar

BUSY: ContextVar[bool] = ContextVar("vtc_verify_busy", default=False)
"""Whether a check runs: what it patches is not checked again."""
