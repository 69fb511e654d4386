"""``distill FOLDER --student NAME --teacher NAME``: from a folder of pictures to a student and its files."""

from __future__ import annotations

from argparse import Namespace

from kd_lightning.cli.short.distill import plan_distillation
from kd_lightning.cli.short.steps import carry_out


def main(options: Namespace) -> None:
    """Print the plan, and carry it out."""
    names = ("labels_per_class", "epochs", "pretrained", "download", "image_size", "max_size", "max_latency")
    settings = {name: getattr(options, name) for name in (*names, "seeds", "name", "out")}
    found = plan_distillation(options.folder, options.teacher, options.students, **settings)
    carry_out(found, dry_run=options.dry_run, yes=options.yes)
