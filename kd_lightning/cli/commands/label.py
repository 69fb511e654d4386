"""``label FOLDER``: learn from few labels and many pictures, and label these."""

from __future__ import annotations

from argparse import Namespace

from kd_lightning.cli.short.label import plan_labeling
from kd_lightning.cli.short.steps import carry_out


def main(options: Namespace) -> None:
    """Print the plan, and carry it out."""
    names = ("labels_per_class", "epochs", "image_size", "seeds", "name", "out")
    settings = {name: getattr(options, name) for name in names}
    carry_out(plan_labeling(options.folder, options.student, **settings), dry_run=options.dry_run, yes=options.yes)
