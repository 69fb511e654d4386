"""From a folder with few labels to a student that learned from pseudo-labels, and to labels for the other pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

from kd_lightning.cli.commands.experiment import run_experiment
from kd_lightning.cli.commands.labels import report as print_labels
from kd_lightning.cli.short.networks import Network, find_network
from kd_lightning.cli.short.plan import FolderPlan, plan_folder
from kd_lightning.cli.short.recipe import epochs_of, pseudo_label_yaml, supervised_yaml
from kd_lightning.cli.short.steps import deploy, fit_config, keep_recipe, report, write_config
from kd_lightning.deploy.predict import load_predictor
from kd_lightning.errors import InputError
from kd_lightning.report.numbers import count_text
from kd_lightning.runs.run import Run
from kd_lightning.runs.spreadsheet import SafeWriter

_LABELED = 4  # one of so many pictures of a batch has a label
_SLOWER = 3  # times the pictures of a plain training step: two views of the pictures without a label


@dataclass(frozen=True)
class Labeling:
    """What :func:`label` does.

    Attributes:
        plan: The folder, and the settings.
        student: The student.
        labeled_batch_size: Labeled pictures of a batch.
        labels: Number of labels.
        seeds: Number of seeds.
    """

    plan: FolderPlan
    student: Network
    labeled_batch_size: int
    labels: int
    seeds: int

    @property
    def lines(self) -> list[str]:
        """What to print about it."""
        return [*self.plan.lines, f"{count_text(self.labels, 'label')}; everything lies in {self.plan.recipe.root}"]

    @property
    def name(self) -> str:
        """Name of the runs."""
        return f"label_{self.student.slug}"

    @property
    def seconds(self) -> float:
        """Estimated time of all fits on one CPU."""
        recipe = self.plan.recipe
        each = recipe.pictures * recipe.epochs * self.plan.costs[self.student.name].step
        return self.seeds * each * (_SLOWER if not self._has_test else 1 + _SLOWER)

    @property
    def _has_test(self) -> bool:
        return bool(self.plan.pictures.counts("test"))

    def configs(self) -> dict[str, str]:
        """The config, by its name."""
        text = pseudo_label_yaml(self.plan.recipe, self.student, self.name, self.labeled_batch_size)
        return {self.name: text}

    def run(self) -> Run:
        """Train, test if there is a test part, and label. What is finished is not repeated.

        Returns:
            The run; of several seeds the first one.
        """
        self.plan.write()
        root = self.plan.recipe.root
        path = root / f"{self.name}.yaml"
        write_config(path, self.configs()[self.name])
        if self._has_test:
            result = run_experiment(["--config", str(path)], self.seeds)
            keep_recipe(path, result.method)
            runs, run = [*result.alone, *result.method], result.method[0]
        else:
            print("no test part, and no comparison: too few labels for both")
            run = fit_config(path, test=False)
            runs = [run]
        print_labels(run.folder)
        table = root / "pseudo_labels.csv"
        count = write_labels(run, self._pictures(run), table)
        file = deploy(run, root / "student.onnx")
        print(f"run      {run.folder}\nconfig   {path}")
        print(f"labels   {table}: {count_text(count, 'picture')}; check them, then train with")
        print(f"         kd-lightning fit --config {self._write_checked(table)}")
        for written in filter(None, (file, report(runs, root / "report.html"))):
            print(f"file     {written}")
        return run

    def _write_checked(self, table: Path) -> Path:
        """Write the config that trains on the labels of the folder and of a table, and return its path."""
        name = f"checked_{self.student.slug}"
        path = table.with_name(f"{name}.yaml")
        write_config(path, supervised_yaml(self.plan.recipe, self.student, name, table))
        return path

    def _pictures(self, run: Run) -> list[str]:
        """Return the paths of the pictures without a label."""
        pictures, root = self.plan.pictures, self.plan.recipe.folder
        if self.plan.recipe.unlabeled == "source":
            return [os.path.join(root, one.path) for one in pictures.pictures if one.part == "unlabeled"]  # noqa: PTH118
        data = run.datamodule()
        paths = [data.path(index) for index in data.unlabeled_indices()]
        return [path for path in paths if path is not None]


def plan_labeling(
    folder: str | Path,
    student: str,
    *,
    labels_per_class: int | None = None,
    epochs: int | None = None,
    image_size: int | None = None,
    seeds: int = 1,
    name: str | None = None,
    out: str | Path = "runs",
) -> Labeling:
    """Return what :func:`label` does. Nothing is written. The arguments are those of :func:`label`."""
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    network = find_network(student, "--student")
    plan = plan_folder(
        folder,
        [network],
        out=out,
        name=name,
        test="enough",
        labels_per_class=labels_per_class,
        epochs=epochs,
        image_size=image_size,
    )
    recipe, pool = plan.recipe, plan.pictures.counts("unlabeled").total()
    if labels_per_class is None and not pool:
        raise InputError(
            f"{folder} has no pictures without a label: put them into its folder unlabeled, or hide labels by "
            "--labels-per-class"
        )
    train = plan.pictures.counts("train")
    labeled = sum(min(count, labels_per_class or count) for count in train.values())
    others = recipe.pictures - labeled
    if others < 1:
        raise InputError(f"--labels-per-class: {labels_per_class} leaves no picture without a label")
    size = max(2, recipe.batch_size // _LABELED)
    # an epoch ends when each picture of both kinds has come once
    pictures = max(labeled / size, others / (recipe.batch_size - size)) * recipe.batch_size
    pictures = max(recipe.batch_size, round(pictures))
    epochs = epochs if epochs is not None else epochs_of(pictures, recipe.batch_size)
    plan = replace(plan, recipe=replace(recipe, pictures=pictures, epochs=epochs))
    return Labeling(plan, network, size, labeled, seeds)


class LabelOptions(TypedDict, total=False):
    """The options of :func:`label`."""

    labels_per_class: int | None
    epochs: int | None
    image_size: int | None
    seeds: int
    name: str | None
    out: str | Path


def label(folder: str | Path, student: str = "resnet20", **options: Unpack[LabelOptions]) -> Run:
    """Train a student on few labels and on pseudo-labels of the other pictures (FixMatch), and label these.

    Everything lies in ``OUT/NAME``: the config (YAML), the table of the parts, the runs, the labels
    (``pseudo_labels.csv``) and the ONNX file. A second call goes on where the first one has stopped. With enough
    labels, a part of them tests, and the student is compared with the same one on the labels alone.

    Args:
        folder: Class folders and a folder ``unlabeled``; see :func:`kd_lightning.distill`.
        student: The student's name.
        **options: ``labels_per_class`` (the other labels are hidden; default: all), ``epochs``, ``image_size`` in
            pixels, ``seeds`` (default 1), ``name`` (default: the folder's) and ``out`` (default ``"runs"``).

    Returns:
        The run; of several seeds the first one.

    Raises:
        InputError: If the folder cannot be trained on, or an option is wrong.
    """
    found = plan_labeling(folder, student, **options)
    print("\n".join(found.lines))
    return found.run()


def write_labels(run: Run, paths: Sequence[str], out: Path) -> int:
    """Write what a run's student predicts for pictures as a label file, the least sure first; return their number."""
    rows = []
    for one in load_predictor(run.folder).predict(paths):
        if isinstance(one.name, str) and isinstance(one.probability, float):
            rows.append((one.probability, os.path.abspath(one.path), one.name))  # noqa: PTH100
    with out.open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file, "\n")
        table.writerow(["path", "label", "kind", "probability"])
        table.writerows([path, name, "noisy", f"{probability:.4f}"] for probability, path, name in sorted(rows))
    return len(rows)
