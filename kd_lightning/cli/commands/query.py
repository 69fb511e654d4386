"""``query RUN --n 50``: select the samples to label next, by the outputs of a run's student."""

from __future__ import annotations

import csv
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from kd_lightning.active.pool import DROPOUT_PASSES, collect_pool_outputs, find_teacher
from kd_lightning.active.strategies import (
    PoolOutputs,
    SelectedSamples,
    check_strategy,
    select_samples,
)
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.labels.several_labels import label_columns
from kd_lightning.errors import InputError
from kd_lightning.modules.seams import Seams
from kd_lightning.runs.build import build
from kd_lightning.runs.figures.contact_sheet import sample_name, write_contact_sheet
from kd_lightning.runs.run import CONFIG, Run
from kd_lightning.runs.spreadsheet import SafeWriter, escape_cell
from kd_lightning.runs.weights import check_classes

LABEL = "label"
_SAMPLE = ["index", "path", "content", "score"]
COLUMNS = [*_SAMPLE, LABEL]
_MOST_LABELS = 3  # of a sample in its caption
_SINGLE_RUN = ("k-centre", "badge", "disagreement")  # strategies that need more than probabilities


def main(options: Namespace) -> None:
    """Select the samples, and print the next command."""
    query(options.runs, options.n, options.strategy, options.seed, options.out, options.images)


def query(
    runs: Sequence[Path],
    n: int,
    strategy: str = "margin",
    seed: int = 0,
    out: Path | None = None,
    images: int = 36,
) -> list[int]:
    """Write the samples to label next, highest score first, and a contact sheet of the first of them.

    The file has the columns index, path, content, score and an empty label. A person fills in the labels. The file then
    is an input of ``--data.label_file``. For the multilabel task, a column for each class replaces the column label. If
    the samples are no pictures, there is no sheet.

    Args:
        runs: Folders of runs on one split. With several runs, a strategy scores the students' mean probabilities;
            ``bald`` scores their disagreement.
        n: Number of samples, at least 1.
        strategy: A name of :data:`~kd_lightning.active.strategies.STRATEGIES`.
        seed: Seed of the strategy, from 0 to 2**32 - 1.
        out: The CSV file. Default: None, which means ``query.csv`` in the first run's folder.
        images: Largest number of images on the sheet, which has the file's name with the suffix ``.png``.

    Returns:
        The indices of the samples.

    Raises:
        InputError: If the strategy is unknown, the file may have labels in it, a folder is not a run with weights on a
            SemiSupervisedDataModule, the runs have several splits, or
            :func:`~kd_lightning.active.pool.collect_pool_outputs` or
            :func:`~kd_lightning.active.strategies.select_samples` raises it.
    """
    check_strategy(strategy, seed)
    if n < 1:
        raise InputError(f"--n must be at least 1, got {n}")
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError(f"runs must be different folders, got {', '.join(map(str, runs))}")
    if len(runs) > 1 and strategy in _SINGLE_RUN:
        raise InputError(f"{strategy} takes one run, got {len(runs)}")
    _check_out(out := out or runs[0] / "query.csv", [])
    first, *_ = opened = [Run(folder) for folder in runs]
    results = [_evaluate_run(run, strategy, seed, single=len(runs) == 1) for run in opened]
    data, index, pool = results[0]
    names = _label_columns(data, pool)
    _check_out(out, names)
    for run, (other, indices, outputs) in zip(runs[1:], results[1:], strict=True):
        if _samples_of(other) != _samples_of(data):
            raise InputError(f"runs must have the same data; the samples of {run} are not those of {runs[0]}")
        same = data.split is not None and other.split is not None and data.split.hash == other.split.hash
        if not same or not torch.equal(index, indices):
            text = f"the split of {run} is not that of {runs[0]}"
            raise InputError(f"runs must have one split; {text}: fit it with --data.labeled {runs[0]}/split.json")
        if outputs.multilabel != pool.multilabel:
            raise InputError(f"runs must have one task; that of {run} is not that of {runs[0]}")
    if len(runs) > 1:
        members = torch.stack([outputs.probabilities for _, _, outputs in results])
        pool = replace(pool, member_probabilities=members, probabilities=members.mean(dim=0))
    samples = select_samples(strategy, pool, n)
    selected: list[int] = index[samples.rows].tolist()
    _write_table(out, data, selected, samples.scores, names)
    captions = _captions(data, selected[:images], samples, pool)
    guess = "labels above 50 %, and its least certain one" if pool.multilabel else "two likeliest classes"
    title = f"Samples to label next, by {strategy}: the student's {guess}"
    shown = write_contact_sheet(
        out.with_suffix(".png"), [data.image(index) for index in selected[:images]], captions, title
    )
    command = ["kd-lightning", "fit", "--config", str(first.folder / CONFIG)]
    if first.split_file is not None:
        command += ["--data.labeled", str(first.split_file)]
    sheet = f", with {out.with_suffix('.png')}" if shown else ""
    print(f"{n} of {len(index)} samples without a label, by {strategy}: {out}{sheet}")
    cells = "column label (the name or number of a class)"
    if pool.multilabel:
        cells = f"columns {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} (1, 0, or nothing if unknown)"
    print(f"fill in its {cells}, then run\n{shlex.join(command)} \\")
    print(f"  {shlex.join(['--data.label_file', str(out)])}")
    return selected


def _samples_of(data: SemiSupervisedDataModule) -> list[list[str]]:
    """Return the contents of all samples by part and index; paths where the contents are unknown."""
    return [one.contents if any(one.contents) else one.paths for one in data.samples.identities]


def _check_out(out: Path, labels: Sequence[str]) -> None:
    """Check that a file can be overwritten.

    Any change to an existing file counts as labels, since spreadsheets write files in many ways.

    Args:
        out: The file.
        labels: The columns of labels; none if they are not known yet.
    """
    if out.suffix != ".csv":
        raise InputError(f"--out must end in .csv, got {out}")
    if out.is_file():
        with out.open(newline="", encoding="utf-8", errors="replace") as file:
            header, *rows = [*csv.reader(file)] or [[]]
        earlier = [name for name in _SAMPLE if name != "content"]
        first = next((len(names) for names in (_SAMPLE, earlier) if header[: len(names)] == names), None)
        rest = header[first:]
        known = not labels or rest in ([*map(escape_cell, labels)], [LABEL])
        if first is None or not known or any(len(row) != len(header) or any(row[first:]) for row in rows):
            raise InputError(f"--out: {out} exists and may have labels, which would be lost; name another file")


def _label_columns(data: SemiSupervisedDataModule, pool: PoolOutputs) -> list[str]:
    """Return the columns for labels: one, or one for each class of the multilabel task."""
    if not pool.multilabel:
        return [LABEL]
    return label_columns(data.class_names or [str(number) for number in range(pool.probabilities.shape[1])])


def _evaluate_run(
    run: Run, strategy: str, seed: int, *, single: bool
) -> tuple[SemiSupervisedDataModule, Tensor, PoolOutputs]:
    """Return a run's data, and the indices and outputs of the samples without a label."""
    student, data = run.student(), run.datamodule()
    if not isinstance(data, SemiSupervisedDataModule):
        raise InputError(f"{run.folder}: query needs data: SemiSupervisedDataModule, got {type(data).__name__}")
    check_classes(run.class_names, data, run.folder)
    cpu = (run.config.get("trainer") or {}).get("accelerator") == "cpu"
    accelerator = None if cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    device = accelerator or torch.device("cpu")
    teacher = None
    if strategy == "disagreement":
        teacher = find_teacher(build(LightningModule, run.config["model"]).to(device), data)
    passes = DROPOUT_PASSES if strategy == "bald" and single else 0
    options: dict[str, Any] = {"teacher": teacher, "passes": passes, "seed": seed, "device": device}
    return data, *collect_pool_outputs(student, data, strategy, seams=Seams.of_run(run, device), **options)


def _write_table(
    out: Path, data: SemiSupervisedDataModule, selected: Sequence[int], scores: Tensor, labels: Sequence[str]
) -> None:
    """Write the CSV file, with empty cells for the labels."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file)
        table.writerow([*_SAMPLE, *labels])
        for index, score in zip(selected, scores.tolist(), strict=True):
            cells = [index, data.path(index) or "", data.content(index), f"{score:.6g}"]
            table.writerow([*cells, *("" for _ in labels)])


def _captions(
    data: SemiSupervisedDataModule, selected: Sequence[int], samples: SelectedSamples, pool: PoolOutputs
) -> list[str]:
    """Return a text for each sample on the contact sheet: what the student takes it for, score, index and file."""
    names = dict(enumerate(data.class_names or ()))
    captions = []
    for index, score, row in zip(selected, samples.scores.tolist(), pool.probabilities[samples.rows], strict=False):
        if pool.multilabel:
            present = [names.get(number, number) for number in (row > 0.5).nonzero().flatten().tolist()]
            shown = ", ".join(map(str, present[:_MOST_LABELS])) + (", ..." if len(present) > _MOST_LABELS else "")
            unsure = int((row - 0.5).abs().argmin())
            guess = f"{shown or 'no label'}\nunsure: {names.get(unsure, unsure)} {float(row[unsure]):.0%}"
        else:
            likeliest = zip(*map(Tensor.tolist, row.topk(2)), strict=True)
            guess = " or ".join(f"{names.get(number, number)} {value:.0%}" for value, number in likeliest)
        captions.append(f"{guess}\nscore {score:.3g}\n{sample_name(index, data.path(index))}")
    return captions
