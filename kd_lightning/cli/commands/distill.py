"""``distill FOLDER --student NAME --teacher NAME``: from a folder of pictures to a student and its files."""

from __future__ import annotations

import sys
from argparse import Namespace

from kd_lightning.cli.short.distill import plan_distillation
from kd_lightning.cli.short.steps import confirm


def main(options: Namespace) -> None:
    """Print the plan, and carry it out."""
    names = ("labels_per_class", "epochs", "pretrained", "download", "image_size", "max_size", "max_latency")
    settings = {name: getattr(options, name) for name in (*names, "seeds", "name", "out")}
    found = plan_distillation(options.folder, options.teacher, options.students, **settings)
    print("\n".join(found.lines), file=sys.stderr if options.dry_run else sys.stdout)
    if options.dry_run:
        print("---\n".join(found.configs().values()), end="")
        return
    confirm(found.seconds, yes=options.yes)
    found.run()
