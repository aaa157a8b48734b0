"""Changes of ``sample.py`` that no test notices, and why: by file, line without and line with the change.

A reason that begins with ``no effect`` says that nothing anybody could see changes; such a change is left out of the score.
"""

from __future__ import annotations

EXPLAINED: dict[tuple[str, str, str], str] = {}
