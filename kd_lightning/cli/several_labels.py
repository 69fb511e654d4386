"""``clean`` for the multilabel task: folds with every label, and which labels of a sample are probably wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_lightning.batch import is_labeled
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.labels.several_labels import from_tensor, label_columns
from kd_lightning.errors import InputError
from kd_lightning.runs.figures.contact_sheet import sample_name, write_contact_sheet
from kd_lightning.runs.spreadsheet import SafeWriter

_LEAST = 2  # samples with and without a label, below which cleanlab finds nothing or fails
_SAMPLE = ["index", "path", "content"]  # columns that name a sample


@dataclass(frozen=True)
class SeveralReview:
    """The result for N samples of L labels each, and the outputs of students trained without these labels.

    Attributes:
        index: Indices of the samples, (N,) integers.
        label: Labels as training sees them, (N, L) zeros and ones; NaN where one is missing.
        probabilities: Out-of-fold probabilities that each label is 1, (N, L) float64.
        quality: Quality of each label, (N, L) float64 in [0, 1]: its probability; NaN where one is missing.
        suspect: Whether each label is probably wrong, (N, L) booleans.
        judged: Whether a label has enough ones and zeros to be learned and judged, (L,) booleans.
    """

    index: Tensor
    label: Tensor
    probabilities: Tensor
    quality: Tensor
    suspect: Tensor
    judged: Tensor

    def suspects(self) -> list[tuple[int, int]]:
        """Return row and label of each suspect, sorted by quality, then by row and label."""
        found = [(row, label) for row, label in self.suspect.nonzero().tolist()]
        return sorted(found, key=lambda place: (float(self.quality[place]), *place))


def judge_several(index: Tensor, label: Tensor, probabilities: Tensor, learned: Tensor) -> SeveralReview:
    """Find the labels that are probably wrong, each label for itself, by cleanlab's confident learning.

    This is cleanlab's ``find_multilabel_issues_per_class``, without the labels that are missing. A label with fewer
    than two ones or two zeros is not judged: cleanlab finds nothing there, or fails. Nor is one that a student has not
    learned.

    Source: Thyagarajan et al., "Identifying Incorrect Annotations in Multi-Label Classification Data" (2022),
    https://arxiv.org/abs/2211.13895

    Args:
        index: Indices of the samples, (N,).
        label: Zeros and ones (N, L), NaN where one is missing.
        probabilities: Out-of-fold probabilities that each label is 1, (N, L) float64.
        learned: Whether all students have learned a label, see :func:`learned_labels`, (L,) booleans.
    """
    from cleanlab.filter import find_label_issues

    label = label.double()
    known, suspect = is_labeled(label), torch.zeros(label.shape, dtype=torch.bool)
    judged = learned & ((label == 1).sum(dim=0) >= _LEAST) & ((label == 0).sum(dim=0) >= _LEAST)
    for number in judged.nonzero().flatten().tolist():
        rows = known[:, number]
        given, p = label[rows, number].long().numpy(), probabilities[rows, number].numpy()
        suspect[rows, number] = torch.as_tensor(find_label_issues(given, np.stack([1 - p, p], axis=1), n_jobs=1))
    quality = torch.where(label == 1, probabilities, 1 - probabilities).where(known, torch.nan)
    return SeveralReview(index, label, probabilities, quality, suspect, judged)


def learned_labels(labels: Tensor, index: Sequence[int], folds: Sequence[Sequence[int]]) -> Tensor:
    """Return which labels have a one and a zero outside of each fold, (L,) booleans.

    Args:
        labels: Zeros and ones (N, L), NaN where one is missing.
        index: The samples that students train on, but for those of a fold.
        folds: Samples of each fold.
    """
    learned = torch.ones(labels.shape[1], dtype=torch.bool)
    for fold in folds:
        rest = labels[sorted({*index} - {*fold})]
        learned &= (rest == 1).any(dim=0) & (rest == 0).any(dim=0)
    return learned


def folds_of_several(
    labels: Tensor, index: Sequence[int], folds: int, seed: int, option: str, groups: Sequence[str] | None = None
) -> list[list[int]]:
    """Split samples into folds such that the ones of each label are spread evenly, the rarest label first.

    Source: Sechidis et al., "On the Stratification of Multi-Label Data" (2011),
    https://doi.org/10.1007/978-3-642-23808-6_10

    Args:
        labels: Zeros and ones (N, L), NaN where one is missing.
        index: The samples to split.
        folds: Number of folds, at least 2.
        seed: Seed of the order in which samples are assigned.
        option: Name of the option in messages.
        groups: Group of each of the N samples. A group is in one fold. Default: None, which means that there are none.

    Raises:
        InputError: If there are fewer samples, or groups of them, than folds, or fewer than 2 folds.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for sample in sorted(index):
        members[str(sample) if groups is None else groups[sample]].append(sample)
    if not 2 <= folds <= len(members):
        what = "samples" if groups is None else "groups"
        raise InputError(f"{option} must lie in 2 ... {len(members)}, the number of {what} with labels, got {folds}")
    generator = torch.Generator().manual_seed(seed)
    units = [[*members.values()][number] for number in torch.randperm(len(members), generator=generator).tolist()]
    ones = torch.stack([(labels[unit] == 1).sum(dim=0) for unit in units]).double()
    left = (ones.sum(dim=0) / folds).repeat(folds, 1)  # ones of each label that a fold still needs, (F, L)
    size = torch.full((folds,), len(index) / folds).double()
    found: list[list[int]] = [[] for _ in range(folds)]
    waiting = torch.ones(len(units), dtype=torch.bool)
    while waiting.any():
        rest = ones[waiting].sum(dim=0)
        rarest = int(rest.where(rest > 0, torch.inf).argmin()) if (rest > 0).any() else None
        having = waiting if rarest is None else waiting & (ones[:, rarest] > 0)
        for number in having.nonzero().flatten().tolist():
            needs = size if rarest is None else left[:, rarest]
            best = (needs == needs.max()).nonzero().flatten()
            fold = int(best[size[best].argmax()])
            found[fold] += units[number]
            left[fold] -= ones[number]
            size[fold] -= len(units[number])
        waiting &= ~having
    return [sorted(fold) for fold in found if fold]


def write_several_review(
    result: SeveralReview, data: SemiSupervisedDataModule, out: Path, action: str, most: int
) -> None:
    """Write the suspects to a table and a contact sheet, and ``labels.csv`` for the next fit.

    Without suspects, the table has no rows, the sheet and ``labels.csv`` are not written, and older ones are deleted.

    Args:
        result: The review.
        data: The datamodule with the samples and class names.
        out: The folder.
        action: ``drop`` makes suspect labels missing, ``relabel`` turns them over.
        most: Largest number of pictures on the sheet.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = label_columns(class_names(data, result))
    suspects = result.suspects()
    with (out / "suspects.csv").open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file)
        table.writerow([*_SAMPLE, "class", "label", "suggested", "quality"])
        for place in suspects:
            given = int(result.label[place])
            cells = [names[place[1]], given, 1 - given, f"{float(result.quality[place]):.6g}"]
            table.writerow([*_name_of(data, int(result.index[place[0]])), *cells])
    for name in ("labels.csv", "suspects.png", "transition.csv"):
        (out / name).unlink(missing_ok=True)
    if not suspects:
        return
    corrected = 1 - result.label if action == "relabel" else torch.full_like(result.label, torch.nan)
    labels = torch.where(result.suspect, corrected, result.label)
    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file)
        table.writerow([*_SAMPLE, "kind", *names])
        for row in dict.fromkeys(row for row, _ in suspects):
            cells = ["" if value is None else value for value in from_tensor(labels[row])]
            kind = "clean" if any(cell != "" for cell in cells) else "missing"
            table.writerow([*_name_of(data, int(result.index[row])), kind, *cells])
    captions = []
    for row, label in suspects[:most]:
        sample, name, given = int(result.index[row]), names[label], bool(result.label[row, label])
        texts = name, f"no {name}"
        head = f"given {texts[not given]}, looks like {texts[given]}"
        where = sample_name(sample, data.path(sample))
        captions.append(f"{head}\nprobability {float(result.probabilities[row, label]):.0%}\n{where}")
    images = [data.image(int(result.index[row])) for row, _ in suspects[:most]]
    title = f"Labels that are probably wrong: the {len(images)} of {len(suspects)} with the lowest quality"
    write_contact_sheet(out / "suspects.png", images, captions, title)


def class_names(data: SemiSupervisedDataModule, result: SeveralReview) -> list[str]:
    """Return the names of the labels; numbers if they have none."""
    return data.class_names or [*map(str, range(result.label.shape[1]))]


def summarize_several(result: SeveralReview, data: SemiSupervisedDataModule, kind: str) -> str:
    """Return the number of suspects, and the labels that are not judged.

    Args:
        result: The review.
        data: The datamodule with the class names.
        kind: Name of the labels, such as "labels".
    """
    size, samples = int(is_labeled(result.label).sum()), int(result.suspect.any(dim=1).sum())
    count = int(result.suspect.sum())
    text = f"{count} of {size} {kind} ({100 * count / max(size, 1):.1f} %), of {samples} samples, are suspects."
    if left := [name for name, one in zip(class_names(data, result), result.judged.tolist(), strict=True) if not one]:
        text += f" Not judged, with too few ones or zeros: {', '.join(left)}."
    return text


def _name_of(data: SemiSupervisedDataModule, index: int) -> tuple[int, str, str]:
    return index, data.path(index) or "", data.content(index)
