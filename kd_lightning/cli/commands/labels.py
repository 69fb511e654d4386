"""``labels RUN``: summarise a run's pseudo-labels, and show the images with the least confident ones."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from kd_lightning.cli.cross_fitting import (
    fit_folds,
    labeled_classes,
    require_one_process,
    stratified_folds,
    weight_files,
    whole_groups,
)
from kd_lightning.cli.parse import Config
from kd_lightning.cli.value_rounds import value_tables
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.row_samples import RowName, RowSamples
from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.ledger import FOLDER, Round, find_rounds, read_round
from kd_lightning.pseudo_labels.values_ledger import ValueRound, holds_values, read_values
from kd_lightning.runs.figures.contact_sheet import sample_name, write_contact_sheet
from kd_lightning.runs.run import CONFIG, Run
from kd_lightning.runs.weights import check_classes

_MAX_ROWS = 30  # of classes in a table


@dataclass
class Estimate:
    """Counts of a round over all folds: held-out samples, right labels among them, and the same of accepted labels."""

    round: int
    epoch: int
    held_out: int = 0
    right: int = 0
    accepted: int = 0
    accepted_right: int = 0

    def precision(self, *, accepted: bool) -> tuple[float, float, float] | None:
        """Return the share of right labels and its Clopper-Pearson 95 % interval, None if there are no labels."""
        right, count = (self.accepted_right, self.accepted) if accepted else (self.right, self.held_out)
        if not count:
            return None
        interval = binomtest(right, count).proportion_ci(0.95, method="exact")
        return right / count, float(interval.low), float(interval.high)


def main(options: Namespace) -> None:
    """Print the tables, and write the contact sheet."""
    report(options.run, options.round, options.images, options.out)
    if options.cross_fit is not None:
        cross_fit(options.run, options.cross_fit)


def report(folder: Path, number: int | None = None, images: int = 36, out: Path | None = None) -> None:
    """Print a run's ledger, and show the images of the least confident labels of a round (if None, of the last).

    A run that was made in Python has no config to build its data from: a line says that there are no images.

    Raises:
        InputError: If there is no such round, or if the data of a run with a config cannot be read.
    """
    rounds = read_values_or_labels(folder)
    number = max(rounds) if number is None else number
    if number not in rounds:
        raise InputError(f"--round: {folder / FOLDER} has rounds {min(rounds)} ... {max(rounds)}, got {number}")
    data: Any = None
    try:
        data, data_error = Run(folder).datamodule(), None
    except InputError as error:  # the tables do not need the data
        data_error = error
    for view in _tables(rounds, number, data):
        _print(view)
    if data_error is not None:
        if out is not None or (folder / CONFIG).exists():
            raise data_error
        print(f"no contact sheet: {folder} has no {CONFIG}, which the command line writes, to build its data from")
        return
    name = f"{folder.parent.name}/{folder.name}"
    write_sheet(data, rounds[number], images, out or folder / FOLDER / "doubtful.png", name)


def _tables(rounds: dict[int, Round] | dict[int, ValueRound], number: int, data: Any) -> list[Table]:
    """Return the tables of all rounds, and of the one with a number."""
    values = [one for one in rounds.values() if isinstance(one, ValueRound)]
    if values:
        return value_tables(values, next(one for one in values if one.number == number))
    classed = {key: one for key, one in rounds.items() if isinstance(one, Round)}
    names = list(dict.fromkeys(normal_name(str(name)) for name in getattr(data, "class_names", None) or ()))
    found = {name for one in classed.values() for name in one.label} - set(names)
    classes = [*names, *sorted(found, key=lambda name: (not name.isdigit(), name.isdigit() * len(name), name))]
    labeled = Counter((labeled_classes(data) or {}).values())
    return [round_table([*classed.values()], classes), class_table(classed[number], classes, labeled)]


def read_values_or_labels(folder: Path) -> dict[int, Round] | dict[int, ValueRound]:
    """Return {number: round} of a run, whose rounds are of values in the regression task; InputError if none."""
    files = find_rounds(folder)
    if any(map(holds_values, files.values())):
        return {number: read_values(path) for number, path in files.items()}
    return read_ledger(folder)


def read_ledger(folder: Path) -> dict[int, Round]:
    """Return {number: round} of a run; InputError if it has none."""
    rounds = {number: read_round(path) for number, path in find_rounds(folder).items()}
    for one in rounds.values():
        one.label = [*map(normal_name, one.label)]
    if not rounds:
        text = _first_refresh(Run(folder))  # raises InputError if it is no run
        raise InputError(f"{folder} has no ledger of pseudo-labels, {FOLDER}/round_0000.csv; {text}")
    return rounds


def _first_refresh(run: Run) -> str:
    """Return why a run has no pseudo-labels yet, as the end of a message."""
    config = run.config if (run.folder / CONFIG).is_file() else {}
    trainer = config.get("trainer") or {}
    refreshes = [c for c in trainer.get("callbacks") or [] if str(c["class_path"]).endswith(".PseudoLabelRefresh")]
    if not refreshes:
        return "add PseudoLabelRefresh to the run's callbacks (trainer.callbacks), and fit again"
    warmup = int((refreshes[0].get("init_args") or {}).get("warmup_epochs", 0))
    last, epochs = run.state.get("step"), trainer.get("max_epochs")
    length = f"the run has {epochs} of them" if epochs is not None and epochs <= warmup else f"it ended at step {last}"
    return f"the first refresh comes after warmup_epochs, {warmup} epochs; {length}"


def round_table(rounds: Sequence[Round], classes: Sequence[str]) -> Table:
    """Return a table with a row for each round."""
    names = ("round", "epoch", "samples", "accepted", "changed %", "confidence", "of accepted")
    view = _table("Pseudo-labels", *names, "accepted by class: fewest ... most")
    for one in rounds:
        size, taken, found = len(one.label), int(one.accepted.sum()), one.by_class()
        shares = [(100 * len(found.get(name, ())) / max(taken, 1), name) for name in classes]
        ends = [sorted(shares, key=lambda pair: pair[0])[end] for end in (0, -1)]
        spread = " ... ".join(f"{name} {share:.1f} %" for share, name in ends) if taken else "-"
        changed = (
            f"{100 * one.changed.double().mean():.1f}" if one.number else "-"
        )  # the first round has no round before it
        means = (_mean(one.confidence), _mean(one.confidence[one.accepted]))
        cells = (one.number, one.epoch, one.samples, f"{taken} ({100 * taken / size:.1f} %)", changed, *means)
        view.add_row(*map(str, cells), escape(spread))
    return view


def class_table(one: Round, classes: Sequence[str], labeled: Counter[str]) -> Table:
    """Return a table with a row for each class: accepted labels, and share of the ``labeled`` samples if known."""
    found, taken = one.by_class(), int(one.accepted.sum())
    view = _table(f"Accepted labels of round {one.number}", "class", "accepted", "share %", "confidence", "labeled %")
    rare = sorted(classes, key=lambda name: len(found.get(name, ())))
    shown = set(classes if len(rare) <= _MAX_ROWS else rare[: _MAX_ROWS // 2] + rare[-_MAX_ROWS // 2 :])
    for name in (name for name in classes if name in shown):
        values = torch.tensor(found.get(name, ()), dtype=torch.float64)
        share = f"{100 * len(values) / taken:.1f}" if taken else "-"
        known = f"{100 * labeled[name] / labeled.total():.1f}" if labeled else "-"
        view.add_row(escape(name), str(len(values)), share, _mean(values), known)
    if len(shown) < len(classes):
        view.caption = f"the {_MAX_ROWS // 2} rarest and the {_MAX_ROWS // 2} most frequent of {len(classes)} classes"
    return view


def _table(title: str, *columns: str) -> Table:
    view = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in columns:  # long names are whole
        view.add_column(escape(name), justify="left" if "class" in name else "right", overflow="fold")
    return view


def _print(view: Table) -> None:
    console = Console()  # in a narrow terminal lines are folded and figures are whole
    (console if console.width >= 130 else Console(width=130)).print(view)


def _mean(values: Tensor) -> str:
    return f"{values.mean():.3f}" if len(values) else "-"


def write_sheet(data: Any, one: Round | ValueRound, count: int, out: Path, run: str) -> None:
    """Write a sheet of the images with the least confident labels, or widest spreads, then lowest index.

    Samples that are gone are passed over. If the samples are no pictures, there is no sheet.

    Raises:
        InputError: If the datamodule has no ``image(index)``, or if all samples are gone.
    """
    if not hasattr(data, "image"):
        raise InputError(f"{type(data).__name__} has no image(index), so the images of {run} cannot be shown")
    samples = _find_samples(data, one, run)
    doubt, index = one.doubt.tolist(), one.index.tolist()
    found = {row: sample for row, sample in enumerate(samples) if sample is not None}
    rows = sorted(found, key=lambda row: (-doubt[row], index[row]))[:count]
    try:
        images = [data.image(found[row]) for row in rows]
    except IndexError as error:
        raise InputError(f"the data of {run} has changed: it lacks a sample of round {one.number}") from error
    path_of = getattr(data, "path", lambda sample: None)
    captions = [f"{one.caption(row)}\n{sample_name(found[row], path_of(found[row]))}" for row in rows]
    what = f"{one.doubtful} of round {one.number}"
    try:
        shown = write_contact_sheet(out, images, captions, f"{run}: {what}")
    except ValueError as error:  # a suffix that matplotlib does not know
        raise InputError(f"--out: {error}") from error
    if shown:
        print(f"{what}: {out}")


def _find_samples(data: Any, one: Round | ValueRound, run: str) -> list[int | None]:
    """Return the sample of each row of a round in the data as they are now, and print what has changed."""
    of_rows = [*zip(one.index.tolist(), one.path, one.content, strict=True)]
    rows = [*dict.fromkeys(of_rows)]  # a sample of several labels has several rows
    if isinstance(data, SemiSupervisedDataModule):
        found = RowSamples(data.samples.images, data.samples.identities, [str(Path.cwd())]).find(
            [RowName(*row) for row in rows]
        )
        samples, changed = found.samples, found.changed
    else:
        samples, changed = [_check_path(data, index, path) for index, path, _ in rows], []
    gone = [row for row, sample in enumerate(samples) if sample is None]
    for numbers, what in ((gone, "are gone"), (changed, "have another content")):
        if numbers:
            index, path, _ = rows[numbers[0]]
            text = f"the data of {run} has changed: {len(numbers)} of its {len(rows)} samples {what} ({path or index})"
            if len(gone) == len(rows):
                raise InputError(text)
            print(text)
    sample_of = dict(zip(rows, samples, strict=True))
    return [sample_of[row] for row in of_rows]


def _check_path(data: Any, index: int, path: str) -> int | None:
    """Return the index if its file has the same name and folder, or if there is no file."""
    try:
        here = data.path(index) if hasattr(data, "path") else None
    except IndexError:
        return None
    return index if not (here and path) or Path(here).parts[-2:] == Path(path).parts[-2:] else None


def cross_fit(folder: Path, folds: int) -> list[Estimate]:
    """Estimate the share of right pseudo-labels of each round by cross-fitting.

    The labeled samples are split into folds. For each fold the run's fit is repeated, with the labels of the fold
    hidden and its samples in the pool. These runs lie in ``pseudo_labels/cross_fit`` of the run; finished ones are not
    repeated. The figures are also in ``cross_fit.csv`` and in the run's TensorBoard.

    Raises:
        InputError: For several processes, data or a split that is gone, samples with several classes, and folds that
            :func:`~kd_lightning.cli.cross_fitting.stratified_folds` refuses.
    """
    run = Run(folder)
    data = run.datamodule()
    if not isinstance(data, SemiSupervisedDataModule) or run.split_file is None:
        raise InputError(f"--cross-fit needs a run on a SemiSupervisedDataModule with a split.json, got {folder}")
    check_classes(run.class_names, data, folder)
    require_one_process(run.config, "--cross-fit", "trainer.devices: 1 in RUN/config.yaml")
    truth, split = labeled_classes(data), data.split
    if truth is None or split is None:
        text = "--cross-fit needs one class for each sample"
        raise InputError(f"{text}, those of {folder} have several labels or floats")
    held_out = stratified_folds(truth, folds, split.seed, "--cross-fit", whole_groups(data, [*truth]))
    root = folder / FOLDER / "cross_fit" / f"{folds}_folds"
    fits = fit_folds(run.config, split, held_out, root, data.samples.hashes)
    estimates = aggregate([[*read_ledger(fold.folder).values()] for fold in fits], held_out, truth)
    _write(estimates, folder)
    view = _table("Cross-fitted precision", "round", "epoch", "held-out", "accepted", "right of accepted %", "of all %")
    for one in estimates:
        found = (one.precision(accepted=True), one.precision(accepted=False))
        texts = ["-" if f is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in f)) for f in found]
        view.add_row(*map(str, (one.round, one.epoch, one.held_out, one.accepted)), *map(escape, texts))
    _print(view)
    print(explain(run.config, folds))
    return estimates


def aggregate(runs: Sequence[Sequence[Round]], held_out: list[list[int]], truth: dict[int, str]) -> list[Estimate]:
    """Count the right labels of held-out samples over the runs of all folds, in each round that all of them have."""
    common = set.intersection(*({(one.number, one.epoch) for one in rounds} for rounds in runs))
    if not common:  # because of early stopping
        raise InputError("--cross-fit: the folds' runs have no round of the same epoch in common")
    estimates = {key: Estimate(*key) for key in sorted(common)}
    for rounds, samples in zip(runs, held_out, strict=True):
        for one in (one for one in rounds if (one.number, one.epoch) in common):
            estimate = estimates[one.number, one.epoch]
            row_of = {index: row for row, index in enumerate(one.index.tolist())}
            if lacking := {*samples} - row_of.keys():
                raise InputError(f"--cross-fit: round {one.number} of a fold has no label of sample {min(lacking)}")
            for index in samples:
                right, accepted = one.label[row_of[index]] == truth[index], bool(one.accepted[row_of[index]])
                estimate.held_out += 1
                estimate.right += right
                estimate.accepted += accepted
                estimate.accepted_right += right and accepted
    return [*estimates.values()]


def _write(estimates: Sequence[Estimate], folder: Path) -> None:
    """Write counts and shares to ``cross_fit.csv``, and shares to TensorBoard."""
    figures = {"precision": False, "accepted_precision": True}
    names = [f"{name}{end}" for name in figures for end in ("", "_low", "_high")]
    with (folder / FOLDER / "cross_fit.csv").open("w", newline="") as file, SummaryWriter(str(folder)) as board:
        table = csv.writer(file)
        table.writerow([*asdict(estimates[0]), *names])
        for one in estimates:
            found = {name: one.precision(accepted=accepted) for name, accepted in figures.items()}
            table.writerow([*asdict(one).values(), *(value for f in found.values() for value in f or ("", "", ""))])
            for name, share in ((name, f[0]) for name, f in found.items() if f is not None):
                board.add_scalar(f"{FOLDER}/cross_fit_{name}", share, one.epoch)


def explain(config: Config, folds: int) -> str:
    """Return the explanation of the estimate."""
    text = (
        "Shares of right labels with 95 % intervals (Clopper-Pearson), among labeled samples whose labels were hidden "
    )
    text += (
        f"from the run. Each run has {folds - 1}/{folds} of the labels, so the shares are rather too low. They hold "
    )
    text += (
        "for the pool if it has the same distribution as the labeled samples. Rounds that not all folds reached are "
    )
    text += "left out."
    if files := ", ".join(weight_files(config)):
        text += f" All folds read {files}: if these weights were trained on the labels, the shares may be too high."
    return text
