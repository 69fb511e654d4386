"""``clean CONFIG``: which labels are probably wrong? Confident learning finds them, and they are edited."""

from __future__ import annotations

import argparse
import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.cli.commands.compare import build_student
from kd_lightning.cli.commands.experiment import parse
from kd_lightning.cli.commands.folds import Config, fit_folds, known_labels, one_process, stratified_folds, weight_files
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.forward_correction import estimate_transition, write_transition
from kd_lightning.runs.build import build
from kd_lightning.runs.report.contact_sheet import contact_sheet
from kd_lightning.runs.weights import load_weights

ACTIONS = ("drop", "downweight", "relabel")
_SHOWN = 60  # suspects on the sheet


@dataclass(frozen=True)
class Review:
    """N labeled samples by index, their labels, and what a student that had not seen a sample's label says of it.

    Attributes:
        index: Which samples, (N,) integers.
        label: Their labels as training sees them, (N,) integers.
        probabilities: Out-of-fold, (N, C) float64.
        quality: How far each label can be trusted, (N,) float64: its own probability.
        suspect: Which labels are probably wrong, (N,) booleans.
    """

    index: Tensor
    label: Tensor
    probabilities: Tensor
    quality: Tensor
    suspect: Tensor

    def suspects(self) -> list[tuple[int, int, int, float]]:
        """Index, label, suggested class and quality; the most doubtful first, of equal ones the lower index."""
        columns = (self.index, self.label, self.probabilities.argmax(dim=1), self.quality)
        rows = zip(*(column[self.suspect].tolist() for column in columns), strict=True)
        return sorted(rows, key=lambda row: (row[3], row[0]))


def main(args: list[str]) -> None:
    """Read the command line, find the suspects, and say how to go on."""
    parser = argparse.ArgumentParser(prog="kd_lightning clean", description=__doc__)
    parser.add_argument("config", help="YAML of any method, on a SemiSupervisedDataModule; fit's overrides may follow")
    parser.add_argument("--folds", type=int, default=5, metavar="K", help="fits, each without a K-th of the labels")
    parser.add_argument("--action", choices=ACTIONS, default="drop", help="what becomes of the suspects (default drop)")
    parser.add_argument("--weight", type=float, metavar="W", help="of --action downweight (default 0.1)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="of the files (default: <root>/<name>_clean)")
    options, overrides = parser.parse_known_args(args)
    if options.weight is not None and options.action != "downweight":
        raise InputError(f"--weight is of --action downweight, got {options.action}")
    weight = 0.1 if options.weight is None else options.weight
    if not 0 <= weight < 1:
        raise InputError(f"--weight must lie in [0, 1), got {weight}")
    config = parse(["--config", options.config, *overrides], "clean")
    root = Path(config["trainer"]["default_root_dir"]) / f"{config['name']}_clean"
    out = options.out or root
    earlier = (config["data"].get("init_args") or {}).get("label_file")
    if earlier and Path(earlier).resolve() == (out / "labels.csv").resolve():
        raise InputError(
            f"--out: {out / 'labels.csv'} is read as data.label_file, and would be overwritten; name another folder"
        )
    data = _data(config)
    found = review(config, data, options.folds, root / f"{options.folds}_folds", out)
    if earlier:  # the new file takes its place
        assert data.split is not None
        data.split.save(out / "split.json")
    write(found, data, out, options.action, weight)
    print(explain(found, data, config, options.folds))
    if not found.suspect.any():
        print(f"no label is doubtful, so there is nothing to edit; {out} has the estimated transition matrix")
        return
    print(f"look at {out / 'suspects.png'} and suspects.csv, and take out of labels.csv what is right after all")
    command = ["python", "-m", "kd_lightning", "fit", "--config", options.config, *overrides]
    if earlier:
        command += ["--data.labeled", str(out / "split.json")]
    print(f"{options.action} them: {shlex.join([*command, '--data.label_file', str(out / 'labels.csv')])}")


def review(config: Config, data: SemiSupervisedDataModule, folds: int, folder: Path, out: Path) -> Review:
    """Judge each label by a student that was trained without it, through cleanlab's confident learning.

    The labeled samples are dealt into folds, class by class; for each a student is trained by the config's own method,
    with the fold's labels hidden and its samples in the pool. (With ``unlabeled: none`` they are the pool, too: a
    supervised loss skips them, batch normalisation sees them.) Finished fits are not repeated.

    Source: Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels" (2021).

    Args:
        config: As ``fit`` takes it.
        data: Its datamodule, set up.
        folds: How many.
        folder: Where the fits lie.
        out: Where files will be written; it is made before anything is trained.

    Raises:
        InputError: For several processes, samples that have not one class each, too few labels, outputs that are not
            finite or not a logit a class, and where cleanlab is missing.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise InputError("clean needs cleanlab: pip install 'kd-lightning[weak]'") from error
    device = one_process(config, "clean", "--trainer.devices 1")
    arguments = config["model"].get("init_args") or {}
    if not isinstance(arguments.get("student"), dict):
        raise InputError(f"clean needs a model with a student, {config['model']['class_path']} has none")
    known, split, task = known_labels(data), data.split, arguments.get("task", "multiclass")
    if known is None or split is None or task != "multiclass":
        raise InputError(f"clean needs samples of one class each and task: multiclass, got {task} or several labels")
    if len({*known.values()}) < 2:
        raise InputError(f"clean needs labels of at least 2 classes, got {', '.join({*known.values()}) or 'no labels'}")
    held_out = stratified_folds(known, folds, split.seed, "--folds")
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for run, fold in zip(fit_folds(config, split, held_out, folder), held_out, strict=True):
        parts.append(predict(config, run, data, fold, device))
    index, order = torch.tensor([*chain(*held_out)]).sort()
    label, probabilities = data.visible_labels()[index], torch.cat(parts)[order]
    given = label.numpy(), probabilities.numpy()
    suspect, quality = find_label_issues(*given, n_jobs=1), get_label_quality_scores(*given)
    return Review(index, label, probabilities, torch.as_tensor(quality), torch.as_tensor(suspect))


@torch.no_grad()
def predict(
    config: Config, run: Path, data: SemiSupervisedDataModule, index: Sequence[int], device: torch.device
) -> Tensor:
    """The probabilities (N, C), in float64, that a run's student gives samples under evaluation transforms."""
    student = load_weights(build_student(config["model"]["init_args"]["student"]), run / "student.safetensors")
    student.to(device).eval()
    pool = data.pool_dataloader().dataset
    assert isinstance(pool, ViewDataset)
    samples = ViewDataset(pool.images, torch.tensor(index), data.eval_transform, data.seed)
    options: dict[str, Any] = {"batch_size": data.batch_size, "num_workers": data.num_workers}
    loader = ViewLoader(samples, LabelTable(data.visible_labels()), **options)
    logits = torch.cat([logits_of(student(batch.x.to(device)), "the student").cpu().double() for batch in loader])
    classes = len(data.class_names or ()) or int(data.visible_labels().max()) + 1
    if logits.ndim != 2 or logits.shape[1] < classes or (data.class_names and logits.shape[1] != classes):
        raise InputError(f"clean needs a student with a logit for each of {classes} classes, got {[*logits.shape]}")
    if not logits.isfinite().all():
        raise InputError(f"the student of {run} gives logits that are not finite; did its training diverge?")
    return logits.softmax(dim=1)


def write(found: Review, data: SemiSupervisedDataModule, out: Path, action: str, weight: float) -> None:
    """Write ``transition.csv``, and the suspects: a table, a contact sheet, and ``labels.csv`` for the next fit.

    Without suspects the table has no rows, and there is neither sheet nor ``labels.csv``; those of an earlier time are
    taken away.

    Args:
        found: The review.
        data: Knows the images and the classes' names.
        out: The folder.
        action: One of ``ACTIONS``: a dropped sample loses its label and joins the pool.
        weight: What ``downweight`` multiplies a suspect's hard loss by.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_transition(out / "transition.csv", estimate_transition(found.probabilities).tolist())
    suspects = found.suspects()
    names = data.class_names or [str(number) for number in range(found.probabilities.shape[1])]
    with (out / "suspects.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["index", "path", "label", "suggested", "quality"])
        for index, label, suggested, quality in suspects:
            table.writerow([index, data.path(index) or "", names[label], names[suggested], f"{quality:.6g}"])
    (out / "labels.csv").unlink(missing_ok=True)
    (out / "suspects.png").unlink(missing_ok=True)
    if not suspects:
        return
    kind, share = "missing" if action == "drop" else "noisy", weight if action == "downweight" else 1.0
    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["index", "path", "label", "kind", "weight"])
        for index, label, suggested, _ in suspects:
            name = names[suggested if action == "relabel" else label]
            table.writerow([index, data.path(index) or "", name, kind, share])
    images = [data.image(index) for index, *_ in suspects[:_SHOWN]]
    captions = [f"{index}\n{names[label]}: {names[suggested]}?" for index, label, suggested, _ in suspects[:_SHOWN]]
    title = f"The {len(images)} most doubtful of {len(suspects)} suspects"
    contact_sheet(images, captions, title=title).savefig(out / "suspects.png", dpi=120)


def explain(found: Review, data: SemiSupervisedDataModule, config: Config, folds: int) -> str:
    """What was found; where noise was simulated, how much of it is true."""
    count, size = int(found.suspect.sum()), len(found.index)
    note = (
        f"{count} of {size} labels ({100 * count / size:.1f} %) are suspects. Each label was judged by a student that "
    )
    note += f"was trained by the same method with {folds - 1}/{folds} of the labels, and had not seen it."
    if files := ", ".join(weight_files(config)):
        note += f" All folds read {files}: if these weights have seen the labels, they may believe wrong ones."
    truth = data.hidden_truth(found.index)
    sure = truth != IGNORE_INDEX
    if data.label_noise is not None and sure.any():
        wrong, suspect = (truth != found.label)[sure], found.suspect[sure]
        hits = int((wrong & suspect).sum())
        precision, recall = (f"{100 * hits / max(n, 1):.1f} %" for n in (int(suspect.sum()), int(wrong.sum())))
        note += (
            f"\nThe noise is simulated, and only then can this be told: {precision} of the suspects are wrong labels "
        )
        note += f"(precision), {recall} of the {int(wrong.sum())} wrong labels are suspects (recall)."
    return note


def _data(config: Config) -> SemiSupervisedDataModule:
    data = build(LightningDataModule, config["data"])
    if not isinstance(data, SemiSupervisedDataModule):
        raise InputError(f"clean needs data: SemiSupervisedDataModule, got {type(data).__name__}")
    data.prepare_data()
    data.setup("fit")
    return data
