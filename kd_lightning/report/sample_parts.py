"""Parts of the report that show samples: mistakes of the student, and soft targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.data.datamodule import SemiSupervisedDataModule
from kd_lightning.report.facts import Facts
from kd_lightning.report.outputs import soft_targets
from kd_lightning.report.pictures import is_small, test_picture, training_picture

MOST_MISTAKES = 24
_CLASSES, _LEAST = 4, 0.005  # classes of a distribution that are shown, and their least probability

Context = dict[str, Any] | None


def mistakes_part(facts: Facts) -> Context:
    """The samples where the teacher is right and the student wrong, with both distributions."""
    outputs, main = facts.outputs, facts.cast.main
    if main.kind != "method" or "teacher" not in outputs.probabilities:
        return None
    student, teacher, labels = outputs.probabilities["method"], outputs.probabilities["teacher"], outputs.labels
    if student.shape != teacher.shape:
        return None
    wrong, taught = student.argmax(dim=1), teacher.argmax(dim=1)
    found = ((taught == labels) & (wrong != labels)).nonzero().flatten()
    gap = teacher[found, labels[found]] - student[found, labels[found]]
    names = _names(outputs.data, student.shape[1])
    cards = []
    for row in found[gap.argsort(descending=True)][:MOST_MISTAKES].tolist():
        index = int(outputs.index[row])
        picture = test_picture(outputs.data, index)
        cards.append(
            {
                "picture": picture,
                "small": picture is not None and is_small(picture),
                "name": _name_of_test_sample(outputs.data, index),
                "label": names[labels[row]],
                "predicted": names[wrong[row]],
                "bars": _bars({"teacher": teacher[row], "method": student[row]}, names, int(labels[row])),
            }
        )
    counts = {
        "both": int(((taught == labels) & (wrong == labels)).sum()),
        "teacher": len(found),
        "student": int(((taught != labels) & (wrong == labels)).sum()),
        "neither": int(((taught != labels) & (wrong != labels)).sum()),
    }
    return {"cards": cards, "counts": counts, "what": outputs.what, "seed": outputs.seed, "student": main.label}


def soft_targets_part(facts: Facts) -> Context:
    """Soft targets of training samples, from the most certain to the most ambiguous."""
    if facts.cast.main.method != "teacher":
        return None
    found = soft_targets(facts.cast)
    names = _names(found.data, found.targets.shape[1])
    cards = []
    for row, index in enumerate(found.index.tolist()):
        picture, label = training_picture(found.data, index), int(found.labels[row])
        cards.append(
            {
                "picture": picture,
                "small": picture is not None and is_small(picture),
                "name": _file_name(found.data.path(index)) or f"sample {index}",
                "label": names[label] if 0 <= label < len(names) else None,
                "bars": _bars({"teacher": found.targets[row]}, names, label),
            }
        )
    return {
        "cards": cards,
        "temperature": f"{found.temperature:g}",
        "pool": found.pool,
        "seed": facts.cast.main.run.seed,
    }


def _bars(distributions: Mapping[str, Tensor], names: Sequence[str], label: int) -> list[dict[str, Any]]:
    """Return the label and the classes of the largest probabilities, each with its probabilities in percent."""
    largest = torch.stack([*distributions.values()]).amax(dim=0)
    order = largest.argsort(descending=True).tolist()
    known = [label] if 0 <= label < len(names) else []
    others = [number for number in order if number != label and largest[number] >= _LEAST]
    return [
        {
            "name": names[number],
            "is_label": number == label,
            "shares": [(kind, 100 * float(one[number])) for kind, one in distributions.items()],
        }
        for number in [*known, *others][:_CLASSES]
    ]


def _names(data: SemiSupervisedDataModule, classes: int) -> list[str]:
    names = [str(name) for name in data.class_names or ()]
    return names if len(names) == classes else [str(number) for number in range(classes)]


def _name_of_test_sample(data: SemiSupervisedDataModule, index: int) -> str:
    paths = data.samples.test_identities.paths
    return _file_name(paths[index]) or f"sample {index}"


def _file_name(path: str | None) -> str:
    return path.replace("\\", "/").rpartition("/")[2] if path else ""
