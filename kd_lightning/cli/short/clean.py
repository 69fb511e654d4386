"""The config that ``clean`` reads for a folder of pictures."""

from __future__ import annotations

from pathlib import Path

from kd_lightning.cli.short.networks import find_network
from kd_lightning.cli.short.plan import plan_folder
from kd_lightning.cli.short.recipe import supervised_yaml
from kd_lightning.cli.short.steps import write_config

ROOT = Path("runs")
_TABLE = "all.csv"  # a table of its own: that of distill and label has a part to test


def write_clean_config(folder: Path, student: str, epochs: int | None, image_size: int | None) -> Path:
    """Write the config of a student that learns the labels of a folder, and return its path.

    No picture is held back to test: ``all.csv`` has the parts of the folder itself. The names of its files are not
    those of ``distill`` and ``label``.

    Args:
        folder: The folder, see :func:`~kd_lightning.cli.short.folder.read_folder`.
        student: The student's name.
        epochs: Number of epochs; None for one that follows from the number of pictures.
        image_size: Side of the pictures in pixels; None for one that follows from the pictures.

    Raises:
        InputError: If the folder cannot be trained on, or the student does not fit.
    """
    network = find_network(student, "--student")
    plan = plan_folder(
        folder, [network], out=ROOT, name=None, test="none", table=_TABLE, epochs=epochs, image_size=image_size
    )
    name = f"all_{network.slug}"
    plan.write()
    path = plan.recipe.root / f"{name}.yaml"
    write_config(path, supervised_yaml(plan.recipe, network, name))
    print("\n".join([*plan.lines, f"config: {path}"]))
    return path
