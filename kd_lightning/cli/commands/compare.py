"""``compare RUN...``: compare finished runs."""

from __future__ import annotations

from argparse import Namespace

from kd_lightning.runs.figures.comparison import compare_runs


def main(options: Namespace) -> None:
    """Print the tables."""
    compare_runs(options.runs, options.out, options.part)
