"""``report RUN...``: write one HTML page about finished runs."""

from __future__ import annotations

from argparse import Namespace

from kd_lightning.report.write import write_report


def main(options: Namespace) -> None:
    """Write the page, and print its path."""
    print(f"report: {write_report(options.runs, options.out)}")
