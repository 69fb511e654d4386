"""What a source reports, which is built several times in a process."""

from __future__ import annotations

from functools import cache

from lightning.pytorch.utilities import rank_zero_info


@cache
def report_once(text: str) -> None:
    """Log a text on rank 0, unless it was logged in this process."""
    rank_zero_info(text)
