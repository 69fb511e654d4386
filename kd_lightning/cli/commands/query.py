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

from kd_lightning.active.pool import DROPOUT_PASSES, Seams, collect_pool_outputs, find_teacher
from kd_lightning.active.strategies import (
    PoolOutputs,
    SelectedSamples,
    check_strategy,
    select_samples,
)
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.runs.build import build
from kd_lightning.runs.figures.contact_sheet import write_contact_sheet
from kd_lightning.runs.run import CONFIG, Run
from kd_lightning.runs.spreadsheet import SafeWriter
from kd_lightning.runs.weights import check_classes

COLUMNS = ["index", "path", "content", "score", "label"]
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
    is an input of ``--data.label_file``. If the samples are no pictures, there is no sheet.

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
    out = _check_out(out or runs[0] / "query.csv")
    first, *_ = opened = [Run(folder) for folder in runs]
    results = [_evaluate_run(run, strategy, seed, single=len(runs) == 1) for run in opened]
    data, index, pool = results[0]
    for run, (other, indices, _) in zip(runs[1:], results[1:], strict=True):
        if _samples_of(other) != _samples_of(data):
            raise InputError(f"runs must have the same data; the samples of {run} are not those of {runs[0]}")
        same = data.split is not None and other.split is not None and data.split.hash == other.split.hash
        if not same or not torch.equal(index, indices):
            text = f"the split of {run} is not that of {runs[0]}"
            raise InputError(f"runs must have one split; {text}: fit it with --data.labeled {runs[0]}/split.json")
    if len(runs) > 1:
        members = torch.stack([outputs.probabilities for _, _, outputs in results])
        pool = replace(pool, member_probabilities=members, probabilities=members.mean(dim=0))
    samples = select_samples(strategy, pool, n)
    selected: list[int] = index[samples.rows].tolist()
    shown = _write_query(out, data, selected, samples, pool.probabilities[samples.rows], images, strategy)
    command = ["kd-lightning", "fit", "--config", str(first.folder / CONFIG)]
    if first.split_file is not None:
        command += ["--data.labeled", str(first.split_file)]
    sheet = f", with {out.with_suffix('.png')}" if shown else ""
    print(f"{n} of {len(index)} samples without a label, by {strategy}: {out}{sheet}")
    print(f"fill in its column label (the name or number of a class), then run\n{shlex.join(command)} \\")
    print(f"  {shlex.join(['--data.label_file', str(out)])}")
    return selected


def _samples_of(data: SemiSupervisedDataModule) -> list[list[str]]:
    """Return the contents of all samples by part and index; paths where the contents are unknown."""
    return [one.contents if any(one.contents) else one.paths for one in data.samples.identities]


def _check_out(out: Path) -> Path:
    """Return the file if it can be overwritten.

    Any change to an existing file counts as labels, since spreadsheets write files in many ways.
    """
    if out.suffix != ".csv":
        raise InputError(f"--out must end in .csv, got {out}")
    if out.is_file():
        with out.open(newline="", encoding="utf-8", errors="replace") as file:
            header, *rows = [*csv.reader(file)] or [[]]
        earlier = [name for name in COLUMNS if name != "content"]
        if header not in (COLUMNS, earlier) or any(len(row) != len(header) or row[-1] for row in rows):
            raise InputError(f"--out: {out} exists and may have labels, which would be lost; name another file")
    return out


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


def _write_query(
    out: Path,
    data: SemiSupervisedDataModule,
    selected: Sequence[int],
    samples: SelectedSamples,
    probabilities: Tensor,
    images: int,
    strategy: str,
) -> bool:
    """Write the CSV file and, if the samples are pictures, the contact sheet; return whether there is a sheet."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scores = samples.scores.tolist()
    with out.open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file)
        table.writerow(COLUMNS)
        for index, score in zip(selected, scores, strict=True):
            table.writerow([index, data.path(index) or "", data.content(index), f"{score:.6g}", ""])
    names = dict(enumerate(data.class_names or ()))
    shown = [data.image(index) for index in selected[:images]]
    captions = []
    for index, score, row in zip(selected[:images], scores, probabilities, strict=False):
        likeliest = zip(*map(Tensor.tolist, row.topk(2)), strict=True)
        guess = " or ".join(f"{names.get(number, number)} {value:.0%}" for value, number in likeliest)
        name = Path(data.path(index) or "").name
        captions.append(f"{guess}\nscore {score:.3g}\n{index}{f': {name}' if name else ''}")
    title = f"Samples to label next, by {strategy}: the student's two likeliest classes"
    return write_contact_sheet(out.with_suffix(".png"), shown, captions, title)
