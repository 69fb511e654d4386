"""``clean CONFIG``, ``clean FOLDER``: find labels that are probably wrong, and write a file that corrects them."""

from __future__ import annotations

import shlex
from argparse import Namespace
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.cli.cross_fitting import (
    build_data,
    fit_folds,
    labeled_classes,
    predict_fold,
    require_one_process,
    stratified_folds,
    weight_files,
    whole_groups,
)
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.cli.several_labels import (
    SeveralReview,
    folds_of_several,
    judge_several,
    learned_labels,
    summarize_several,
    write_several_review,
)
from kd_lightning.cli.short.clean import write_clean_config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.labels.several_labels import has_several_labels
from kd_lightning.data.sources.targets import has_label, has_one_class
from kd_lightning.errors import InputError
from kd_lightning.losses.forward_correction import estimate_transition, write_transition
from kd_lightning.runs.figures.contact_sheet import sample_name, write_contact_sheet
from kd_lightning.runs.spreadsheet import SafeWriter
from kd_lightning.runs.student import has_student

_NAME = ("index", "path", "content")  # columns that name a sample
_SHEET_IMAGES = 60  # most suspects on the contact sheet


@dataclass(frozen=True)
class Review:
    """The result for N labeled samples: their labels, and the outputs of students trained without these labels.

    Attributes:
        index: Indices of the samples, (N,) integers.
        label: Labels as training sees them, (N,) integers.
        probabilities: Out-of-fold probabilities, (N, C) float64.
        quality: Quality of each label, (N,) float64 in [0, 1]: the probability of the label.
        suspect: Whether each label is probably wrong, (N,) booleans.
    """

    index: Tensor
    label: Tensor
    probabilities: Tensor
    quality: Tensor
    suspect: Tensor

    def suspects(self) -> list[tuple[int, int, int, float]]:
        """Return index, label, suggested class and quality of each suspect, sorted by quality, then by index."""
        columns = (self.index, self.label, self.probabilities.argmax(dim=1), self.quality)
        rows = zip(*(column[self.suspect].tolist() for column in columns), strict=True)
        return sorted(rows, key=lambda row: (row[3], row[0]))


def main(options: Namespace) -> None:
    """Find the suspects, and print the next command."""
    if options.folder is not None:
        path = write_clean_config(options.folder, options.student or "resnet20", options.epochs, options.image_size)
        options.overrides = [f"--config={path}", *options.overrides]
    config = parse_config(options.overrides, "clean")
    root = Path(config["trainer"]["default_root_dir"]) / f"{config['name']}_clean"
    out = options.out or (root / "val" if options.part == "val" else root)  # one part leaves the other's files
    earlier = (config["data"].get("init_args") or {}).get("label_file")
    if earlier and Path(earlier).resolve() == (out / "labels.csv").resolve():
        raise InputError(
            f"--out: {out / 'labels.csv'} is the data.label_file, and would be overwritten; name another folder"
        )
    data = build_data(config, "clean")
    result: Review | SeveralReview
    if options.action == "downweight" and _task_of(config) == "multilabel":
        raise InputError("--action downweight: labels of the multilabel task have no weights; allowed: drop, relabel")
    if options.part == "val":
        result = review_val(config, data, root / "val" / "fit", out)
    else:
        result = review(config, data, options.folds, root / f"{options.folds}_folds", out)
    if earlier:  # the new label file replaces it, so the split stores its labels
        data.save_split(out / "split.json")
    if isinstance(result, SeveralReview):
        write_several_review(result, data, out, options.action, _SHEET_IMAGES)
    else:
        write_review(result, data, out, options.action, options.weight)
    print(summarize(result, data, config, None if options.part == "val" else options.folds))
    if not result.suspect.any():
        matrix = "" if isinstance(result, SeveralReview) else f"; {out} has the estimated transition matrix"
        print(f"no label is suspect, so there is no label file{matrix}")
        return
    files = " and ".join(name for name in ("suspects.png", "suspects.csv") if (out / name).is_file())
    several = isinstance(result, SeveralReview)
    correct = "undo its wrong changes in" if several else "delete the rows of correct labels from"
    print(f"check {out / files}, and {correct} labels.csv")
    command = ["kd-lightning", "fit", *options.overrides]
    if earlier:
        command += ["--data.labeled", str(out / "split.json")]
    if options.part == "val":
        command += ["--data.correct_val", "true"]
    print(f"{options.action} the suspects: {shlex.join([*command, '--data.label_file', str(out / 'labels.csv')])}")


def review(
    config: Config, data: SemiSupervisedDataModule, folds: int, folder: Path, out: Path
) -> Review | SeveralReview:
    """Evaluate each label with a student that was trained without it, by cleanlab's confident learning.

    The labeled samples are split into folds, stratified by class. For each fold a student is trained by the config's
    method, without the labels of the fold, whose samples join the pool. (With ``unlabeled: none``, they are the pool:
    a supervised loss skips them, batch normalisation sees them.) Finished fits are not repeated.

    Source: Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels" (2021),
    https://arxiv.org/abs/1911.00068

    Args:
        config: The config, as for ``fit``.
        data: The config's datamodule, set up.
        folds: Number of folds, at least 2.
        folder: Folder of the fits.
        out: Folder of the written files. It is created before the first fit.

    Raises:
        InputError: If there are several processes, the labels do not fit the task (multiclass, binary or multilabel),
            there are too few labels, a student's outputs are not finite or not one logit for each class or label, or
            cleanlab is missing.
    """
    device = _require(config)
    labels, split = data.visible_labels(), data.split
    several = _check_labels(config, labels)
    assert split is not None
    if several:
        index = has_label(labels).nonzero().flatten().tolist()
        groups = whole_groups(data, index)
        held_out = folds_of_several(labels, index, folds, split.seed, "--folds", groups)
    else:
        known = labeled_classes(data) or {}
        if len({*known.values()}) < 2:
            got = ", ".join({*known.values()}) or "no labels"
            raise InputError(f"clean needs labels of at least 2 classes, got {got}")
        held_out = stratified_folds(known, folds, split.seed, "--folds", whole_groups(data, [*known]))
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    fits = fit_folds(config, split, held_out, folder, data.samples.hashes)
    for run, fold in zip(fits, held_out, strict=True):
        parts.append(predict_fold(run, data, fold, device, "clean"))
    order = torch.tensor([*chain(*held_out)]).argsort()
    samples = torch.tensor([*chain(*held_out)])[order]
    found = samples, labels[samples], torch.cat(parts)[order]
    return judge_several(*found, learned_labels(labels, index, held_out)) if several else _judge(*found)


def review_val(config: Config, data: SemiSupervisedDataModule, folder: Path, out: Path) -> Review | SeveralReview:
    """Evaluate each validation label as :func:`review` does, with one student that was trained on the training part.

    Args:
        config: The config, as for ``fit``.
        data: The config's datamodule, set up.
        folder: Folder of the fit.
        out: Folder of the written files. It is created before the fit.

    Raises:
        InputError: As :func:`review`, and if no validation sample has a label.
    """
    device = _require(config)
    visible = data.visible_labels()
    several = _check_labels(config, visible)
    assert data.split is not None
    labels = data.validation_labels()
    known = has_label(labels)
    if not (index := [n for n in data.split.val if known[n]]):
        raise InputError("--part val: no validation sample has a label; set data.val_size, or val of the source")
    out.mkdir(parents=True, exist_ok=True)
    (run,) = fit_folds(config, data.split, [[]], folder, data.samples.hashes)
    found = torch.tensor(index), labels[index], predict_fold(run, data, index, device, "clean")
    return judge_several(*found, learned_labels(visible, data.split.labeled, [[]])) if several else _judge(*found)


def _require(config: Config) -> torch.device:
    """Return the device of the fits; InputError without cleanlab, for several processes, or without a student."""
    try:
        import cleanlab.filter  # noqa: F401
    except ImportError as error:
        raise InputError("clean needs cleanlab: pip install 'kd-lightning[weak]'") from error
    device = require_one_process(config, "clean", "--trainer.devices 1")
    if not has_student(config["model"]):
        raise InputError(f"clean needs a model with a student, {config['model']['class_path']} has none")
    return device


def _task_of(config: Config) -> str:
    return str((config["model"].get("init_args") or {}).get("task", "multiclass"))


def _check_labels(config: Config, labels: Tensor) -> bool:
    """Return whether samples have several labels; InputError if the labels do not fit the task."""
    task = _task_of(config)
    if task == "multilabel":
        if not has_several_labels(labels):
            kind = f"{labels.dtype} of shape {[*labels.shape]}"
            raise InputError(f"clean needs labels of zeros and ones (N, L) for task: multilabel, got {kind}")
        return True
    if task not in ("multiclass", "binary") or not has_one_class(labels):
        got = f"{task} and {labels.dtype} of shape {[*labels.shape]}"
        raise InputError(f"clean needs samples of one class each, or several labels and task: multilabel, got {got}")
    if task == "binary" and len(labels) and int(labels.max()) > 1:
        raise InputError(f"clean: task: binary needs the classes 0 and 1, got class {int(labels.max())}")
    return False


def _judge(index: Tensor, label: Tensor, probabilities: Tensor) -> Review:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    if int(label.max()) >= probabilities.shape[1]:
        count = probabilities.shape[1]
        raise InputError(f"clean needs a student with a logit for each class, got {count} for class {int(label.max())}")
    arrays = label.numpy(), probabilities.numpy()
    suspect, quality = find_label_issues(*arrays, n_jobs=1), get_label_quality_scores(*arrays)
    return Review(index, label, probabilities, torch.as_tensor(quality), torch.as_tensor(suspect))


def write_review(result: Review, data: SemiSupervisedDataModule, out: Path, action: str, weight: float) -> None:
    """Write ``transition.csv``, and the suspects to a table, a contact sheet and ``labels.csv`` for the next fit.

    Without suspects, the table has no rows, the sheet and ``labels.csv`` are not written, and older ones are deleted.
    There is no sheet either if the samples are no pictures.

    Args:
        result: The review.
        data: The datamodule with the images and class names.
        out: The folder.
        action: ``drop``, ``downweight`` or ``relabel``. A dropped sample loses its label and joins the pool.
        weight: Factor of a suspect's hard loss for ``downweight``, in [0, 1).
    """
    out.mkdir(parents=True, exist_ok=True)
    write_transition(out / "transition.csv", estimate_transition(result.probabilities).tolist())
    suspects = result.suspects()
    names = data.class_names or [str(number) for number in range(result.probabilities.shape[1])]
    with (out / "suspects.csv").open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file)
        table.writerow([*_NAME, "label", "suggested", "quality"])
        for index, label, suggested, quality in suspects:
            table.writerow([*_name_of(data, index), names[label], names[suggested], f"{quality:.6g}"])
    (out / "labels.csv").unlink(missing_ok=True)
    (out / "suspects.png").unlink(missing_ok=True)
    if not suspects:
        return
    kind, share = "missing" if action == "drop" else "noisy", weight if action == "downweight" else 1.0
    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file)
        table.writerow([*_NAME, "label", "kind", "weight"])
        for index, label, suggested, _ in suspects:
            name = names[suggested if action == "relabel" else label]
            table.writerow([*_name_of(data, index), name, kind, share])
    shown = suspects[:_SHEET_IMAGES]
    images = [data.image(index) for index, *_ in shown]
    rows = {int(index): row for index, row in zip(result.index, result.probabilities.tolist(), strict=True)}
    captions = [
        f"given {names[label]}, looks like {names[suggested]}\n"
        f"probabilities {rows[index][label]:.0%}, {rows[index][suggested]:.0%}\n"
        f"{sample_name(index, data.path(index))}"
        for index, label, suggested, _ in shown
    ]
    title = f"Labels that are probably wrong: the {len(images)} of {len(suspects)} with the lowest quality"
    write_contact_sheet(out / "suspects.png", images, captions, title)


def _name_of(data: SemiSupervisedDataModule, index: int) -> tuple[int, str, str]:
    return index, data.path(index) or "", data.content(index)


def summarize(result: Review | SeveralReview, data: SemiSupervisedDataModule, config: Config, folds: int | None) -> str:
    """Return a summary of the suspects; if noise was simulated, also their precision and recall."""
    count, size = int(result.suspect.sum()), len(result.index)
    kind = "validation labels" if folds is None else "labels"
    if isinstance(result, SeveralReview):
        text = summarize_several(result, data, kind)
    else:
        text = f"{count} of {size} {kind} ({100 * count / size:.1f} %) are suspects."
    text += " Each label was evaluated by a student "
    if folds is None:
        return text + "trained by the same method on the training part."
    text += f"trained by the same method with {folds - 1}/{folds} of the labels, without that label."
    if files := ", ".join(weight_files(config)):
        text += f" All folds read {files}: if these weights were trained on the labels, they may agree with wrong ones."
    if isinstance(result, SeveralReview):
        return text
    agree = float((result.probabilities.argmax(dim=1) == result.label).double().mean())
    text += (
        f"\nThe students agree with {100 * agree:.1f} % of the labels: the less they know, the less a suspect means."
    )
    truth = data.hidden_truth(result.index)
    known = truth != IGNORE_INDEX
    if data.label_noise is not None and known.any():
        wrong, suspect = (truth != result.label)[known], result.suspect[known]
        hits = int((wrong & suspect).sum())
        precision, recall = (f"{100 * hits / max(n, 1):.1f} %" for n in (int(suspect.sum()), int(wrong.sum())))
        text += f"\nThe noise is simulated, so wrong labels are known: {precision} of the suspects are wrong labels "
        text += f"(precision), {recall} of the {int(wrong.sum())} wrong labels are suspects (recall)."
    return text
