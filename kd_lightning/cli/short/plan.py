"""What the short commands do with a folder: read it, choose settings, and describe them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd_lightning.cli.short.costs import Costs, fixed_size, measure
from kd_lightning.cli.short.folder import Pictures, read_folder
from kd_lightning.cli.short.networks import Network
from kd_lightning.cli.short.recipe import Recipe, batch_size_of, epochs_of, image_size_of
from kd_lightning.cli.short.table import LEAST, with_parts, write_table
from kd_lightning.data.sources.images import printable
from kd_lightning.errors import InputError
from kd_lightning.report.numbers import count_text

_ENOUGH = 20  # labels of a class, of which some can test
_VAL_SHARE = 0.1
_BYTES = 12 * 4  # of files for each parameter of a fit: AdamW's best and last checkpoint, and room to write one
_MOST = 5


@dataclass(frozen=True)
class FolderPlan:
    """A folder, and the settings of the fits on it.

    Attributes:
        pictures: Its pictures, each in its part.
        recipe: The settings.
        costs: Costs of each network, by name.
        lines: What to print about both.
    """

    pictures: Pictures
    recipe: Recipe
    costs: dict[str, Costs]
    lines: list[str]

    def write(self) -> None:
        """Create the folder of all runs and files, with the table of pictures.

        Raises:
            InputError: If the disk has too little space.
        """
        root = self.recipe.root
        root.mkdir(parents=True, exist_ok=True)
        needed = sum(costs.parameters for costs in self.costs.values()) * _BYTES
        if (free := shutil.disk_usage(root).free) < needed:
            raise InputError(
                f"--out: {root} needs about {needed / 1e6:.0f} MB, and the disk has {free / 1e6:.0f} MB free"
            )
        write_table(self.recipe.table, self.pictures)


def plan_folder(
    folder: str | Path,
    networks: Sequence[Network],
    *,
    out: str | Path,
    name: str | None,
    test: Literal["needed", "enough", "none"],
    table: str = "split.csv",
    labels_per_class: int | None = None,
    epochs: int | None = None,
    image_size: int | None = None,
) -> FolderPlan:
    """Read a folder, and choose the settings of its fits. Nothing is written.

    Args:
        folder: The folder of pictures, or the table of their labels.
        networks: The networks that will be trained on it.
        out: Folder of all runs.
        name: Name of the runs on this folder. None means the folder's own.
        test: Whether a test part is sampled if the folder has none: it is needed, or only if each class has enough
            pictures, or none.
        table: Name of the table of the pictures' parts, in the folder of the runs.
        labels_per_class: Labels of each class; None for all.
        epochs: Number of epochs; None for a number that follows from the pictures.
        image_size: Side in pixels; None for one that follows from the pictures and the networks.

    Raises:
        InputError: If the folder cannot be trained on, or a network does not fit it.
    """
    folder = Path(folder).expanduser()
    for option, value in (("--epochs", epochs), ("--labels-per-class", labels_per_class), ("--image-size", image_size)):
        if value is not None and value < 1:
            raise InputError(f"{option} must be at least 1, got {value}")
    name = name or (folder.resolve().stem if folder.is_file() else folder.resolve().name)
    root = Path(out).expanduser() / name
    if root.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"--out: {root} lies in {folder}, whose pictures it would join; name another folder")
    if root.resolve() in (Path(out).resolve(), *Path(out).resolve().parents):
        raise InputError(f"--name must be the name of a folder in --out, got {name!r}")
    found = read_folder(folder)
    sampled = test == "needed" or (test == "enough" and min(found.counts("train").values(), default=0) >= _ENOUGH)
    pictures, lines = with_parts(found, root / table, test=sampled)
    _check_classes(pictures, folder, test=test == "needed")
    if test == "needed" and not pictures.counts("test"):  # of an earlier table: its pictures have trained
        raise InputError(
            f"{root / table} has no picture of split test, and a test part is needed: set the split of some rows to "
            "test, or begin a new table by --name"
        )
    classes = len(pictures.classes)
    models = {network.name: network.build(classes) for network in networks}
    if image_size is None:
        fixed = {size for model in models.values() if (size := fixed_size(model))}
        image_size = max(fixed, default=image_size_of(pictures.side))
    costs = {network.name: measure(models[network.name], network, classes, image_size) for network in networks}
    recipe = _recipe(pictures, folder, root / table, classes, labels_per_class, epochs, image_size)
    if labels_per_class is not None and (pool := pictures.counts("unlabeled").total()):
        lines.append(
            f"{count_text(pool, 'picture')} of the unlabeled part do not train: --labels-per-class hides labels"
        )
    return FolderPlan(pictures, recipe, costs, [*_describe(pictures, recipe), *lines])


def _check_classes(pictures: Pictures, folder: Path, *, test: bool) -> None:
    train = pictures.counts("train")
    train.pop("", None)
    if len(train) < 2:
        got = f"one, {printable(next(iter(train)))}" if train else "none"
        raise InputError(f"{folder} must have pictures of at least two classes, got {got}")
    least, total = (LEAST if test else 2), train + pictures.counts("val") + pictures.counts("test")
    if sum(count >= least for count in total.values()) < 2:
        got = ", ".join(f"{printable(name)} {count}" for name, count in total.most_common(_MOST))
        raise InputError(f"{folder} must have at least two classes of {least} pictures or more, got {got}")
    if other := (pictures.counts("test") + pictures.counts("val")).keys() - train.keys() - {""}:
        raise InputError(f"{folder}: no picture of class {printable(min(other))} trains")


def _recipe(
    pictures: Pictures,
    folder: Path,
    table: Path,
    classes: int,
    labels: int | None,
    epochs: int | None,
    image_size: int,
) -> Recipe:
    train = pictures.counts("train")
    own_val = pictures.counts("val").total()
    per_class = [min(count, labels or count) for count in train.values()]
    val = own_val or sum(max(1, round(_VAL_SHARE * count)) for count in train.values() if count > 1)
    pool = pictures.counts("unlabeled").total()
    unlabeled = "rest" if labels is not None else "source" if pool else "none"
    fitted = {"none": sum(per_class), "source": train.total() + pool, "rest": train.total()}[unlabeled]
    fitted = max(1, fitted - (0 if own_val else val))
    batch = batch_size_of(fitted)
    return Recipe(
        root=table.parent,
        folder=pictures.root,
        table=table,
        classes=classes,
        labeled=labels,
        unlabeled=unlabeled,
        val_size=None if own_val else _VAL_SHARE,
        val_pictures=val,
        image_size=image_size,
        batch_size=batch,
        pictures=fitted,
        epochs=epochs if epochs is not None else epochs_of(fitted, batch),
    )


def _describe(pictures: Pictures, recipe: Recipe) -> list[str]:
    train, total = pictures.counts("train"), len(pictures.pictures)
    fewest, most = min(train.values()), max(train.values())
    spread = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    parts = {name: pictures.counts(name).total() for name in ("val", "test", "unlabeled")}
    text = f"{count_text(total, 'picture')}, {recipe.classes} classes ({pictures.kind}); training has {spread} of each"
    if recipe.labeled is not None:
        text += f", {recipe.labeled} of them with their label"
    text += "".join(f", {name} {count}" for name, count in parts.items() if count)
    if not parts["val"]:
        text += f"; about {recipe.val_pictures} of training are for validation"
    lines = [text]
    if pictures.unreadable:
        named = ", ".join(f"{printable(path)} ({error})" for path, error in pictures.unreadable[:_MOST])
        lines.append(f"cannot be read, and left out: {count_text(len(pictures.unreadable), 'picture')}: {named}")
    if few := [printable(name) for name, count in sorted(train.items()) if count < LEAST - 1]:
        lines.append(
            f"fewer than {LEAST - 1} pictures train of: {', '.join(few[:_MOST])}{', ...' * (len(few) > _MOST)}"
        )
    settings = (
        f"{recipe.image_size} pixels, batches of {recipe.batch_size}, {count_text(recipe.epochs, 'epoch')} of about "
    )
    lines.append(f"{settings}{count_text(recipe.steps, 'step')}")
    return lines
