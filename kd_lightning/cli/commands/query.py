"""``query RUN --n 50``: which samples to label next, by what a run's student says of those without a label."""

from __future__ import annotations

import argparse
import csv
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from kd_lightning.active.pool import PASSES, survey, teacher_of
from kd_lightning.active.strategies import STRATEGIES, Picks, Pool, check_strategy, pick
from kd_lightning.cli.commands.compare import build_student
from kd_lightning.cli.commands.labels import read_config, rebuild
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.runs.build import build
from kd_lightning.runs.report.contact_sheet import contact_sheet
from kd_lightning.runs.weights import load_weights

COLUMNS = ["index", "path", "score", "label"]
_OF_ONE = ("k-centre", "badge", "disagreement")  # strategies that look at more than a student's answers


def main(args: list[str]) -> None:
    """Read the command line, choose the samples, and say how to go on."""
    parser = argparse.ArgumentParser(prog="kd_lightning query", description=__doc__)
    text = "a run's folder; several, trained on the same split, answer together"
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=text)
    parser.add_argument("--n", type=int, required=True, help="how many samples to label")
    parser.add_argument("--strategy", default="margin", help=f"{', '.join(STRATEGIES)} (default margin)")
    parser.add_argument("--seed", type=int, default=0, help="of what the strategy draws (default 0)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the CSV file (default: RUN/query.csv)")
    parser.add_argument("--images", metavar="N", type=int, default=36, help="of the contact sheet (default 36)")
    options = parser.parse_args(args)
    if options.images < 1:
        raise InputError(f"--images must be at least 1, got {options.images}")
    query(options.runs, options.n, options.strategy, options.seed, options.out, options.images)


def query(
    runs: Sequence[Path],
    n: int,
    strategy: str = "margin",
    seed: int = 0,
    out: Path | None = None,
    images: int = 36,
) -> list[int]:
    """Write the samples to label next, best first, and a contact sheet of the first of them.

    The file has the columns index, path, score, and label, which is left to be filled in. It then is what
    ``--data.label_file`` takes.

    Args:
        runs: Folders of runs on one split. The students' mean probabilities count; ``bald`` looks at how they differ.
        n: How many samples.
        strategy: A name of :data:`~kd_lightning.active.strategies.STRATEGIES`.
        seed: Of what it draws.
        out: The file. None: ``query.csv`` in the first run's folder.
        images: At most so many on the sheet, which has the file's name with the suffix ``.png``.

    Returns:
        Their indices.

    Raises:
        InputError: For an unknown strategy, a file with answers in it, a folder that is no run with weights on a
            SemiSupervisedDataModule, runs on several splits, and what :func:`~kd_lightning.active.loop.survey` and
            :func:`~kd_lightning.active.strategies.pick` refuse.
    """
    check_strategy(strategy, seed)
    if n < 1:
        raise InputError(f"--n must be at least 1, got {n}")
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError(f"runs must be different ones, got {', '.join(map(str, runs))}")
    if len(runs) > 1 and strategy in _OF_ONE:
        raise InputError(f"{strategy} takes one run, got {len(runs)}")
    out = _writable(out or runs[0] / "query.csv")
    found = [_ask(run, strategy, seed, alone=len(runs) == 1) for run in runs]
    data, index, pool = found[0]
    for run, (other, indices, _) in zip(runs[1:], found[1:], strict=True):
        same = data.split is not None and other.split is not None and data.split.data == other.split.data
        if not same or not torch.equal(index, indices):
            text = f"{run} has not the split of {runs[0]}"
            raise InputError(f"runs must be of one split; {text}: fit it with --data.labeled {runs[0]}/split.json")
    if len(runs) > 1:
        answers = torch.stack([one.probabilities for _, _, one in found])
        pool = replace(pool, answers=answers, probabilities=answers.mean(dim=0))
    picks = pick(strategy, pool, n)
    chosen: list[int] = index[picks.rows].tolist()
    _write(out, data, chosen, picks, images, f"{strategy}: what to label next")
    command = ["python", "-m", "kd_lightning", "fit", "--config", str(runs[0] / "config.yaml")]
    if (runs[0] / "split.json").is_file():
        command += ["--data.labeled", str(runs[0] / "split.json")]
    print(f"{n} of {len(index)} samples without a label, by {strategy}: {out}, with {out.with_suffix('.png')}")
    print(f"fill in its column label (a class's name or number), and go on with\n{shlex.join(command)} \\")
    print(f"  {shlex.join(['--data.label_file', str(out)])}")
    return chosen


def _writable(out: Path) -> Path:
    """The file, unless somebody has changed it: spreadsheets write answers in many ways."""
    if out.suffix != ".csv":
        raise InputError(f"--out must end in .csv, got {out}")
    if out.is_file():
        with out.open(newline="", encoding="utf-8", errors="replace") as file:
            header, *rows = [*csv.reader(file)] or [[]]
        if header != COLUMNS or any(len(row) != len(COLUMNS) or row[-1] for row in rows):
            raise InputError(f"--out: {out} is there, and may have answers, which would be lost; name another file")
    return out


def _ask(run: Path, strategy: str, seed: int, *, alone: bool) -> tuple[SemiSupervisedDataModule, Tensor, Pool]:
    """A run's data, and what its student says of the samples without a label."""
    config = read_config(run)
    model: Any = config.get("model") or {}
    arguments = model.get("init_args") or {}
    if not isinstance(arguments.get("student"), dict):
        raise InputError(f"{run}: query needs a model with a student, {model.get('class_path')} has none")
    student = load_weights(build_student(arguments["student"]), run / "student.safetensors")
    data = rebuild(run)
    if not isinstance(data, SemiSupervisedDataModule):
        raise InputError(f"{run}: query needs data: SemiSupervisedDataModule, got {type(data).__name__}")
    cpu = (config.get("trainer") or {}).get("accelerator") == "cpu"
    found = None if cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    device = found or torch.device("cpu")
    teacher = None
    if strategy == "disagreement":
        teacher = teacher_of(build(LightningModule, model).to(device))
    passes = PASSES if strategy == "bald" and alone else 0
    return data, *survey(student, data, strategy, teacher=teacher, passes=passes, seed=seed, device=device)


def _write(
    out: Path, data: SemiSupervisedDataModule, chosen: Sequence[int], picks: Picks, images: int, title: str
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    scores = picks.scores.tolist()
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for index, score in zip(chosen, scores, strict=True):
            table.writerow([index, data.path(index) or "", f"{score:.6g}", ""])
    captions = [f"{index}\n{score:.3f}" for index, score in zip(chosen, scores, strict=True)]
    shown = [data.image(index) for index in chosen[:images]]
    contact_sheet(shown, captions[:images], title=title).savefig(out.with_suffix(".png"), dpi=120)
