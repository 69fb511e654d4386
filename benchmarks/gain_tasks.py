"""Tasks of gain.py beside the stamps: Fashion-MNIST, digits, mails."""

from functools import partial
from pathlib import Path

import torch
from fashion import STUDENT, TEACHER, Images
from gain_stamps import method_of
from text import Split
from training import accuracy, train

from kd_lightning import (
    CompileNetworks,
    Digits,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.models import DigitsCNN

BATCH, LABELED = 64, 16
"""Rows of a step, and the labeled ones among them where most samples have no label."""


class Fashion:
    """Fashion-MNIST; distilled, the images without a label have no hard target, but a soft one.

    Args:
        folder: Folder that fashion.py has prepared. The teacher's weights lie there, too.
        labels: Labels of each class. None means all.
    """

    steps = 600

    def __init__(self, folder, labels):
        self.folder, self.labels = Path(folder), labels

    def fit(self, part, seed, way, setting):
        """Train a student, and return its accuracy in %."""
        images = Images(self.folder, part, seed)
        network = TEACHER()
        network.load_state_dict(torch.load(self.folder / "teacher.pt", weights_only=True))
        lr, method = method_of(way, setting, Teacher(network))
        options = {"labeled": self.labels}
        if self.labels is not None:
            repeated = {"unlabeled": "none", "views_per_epoch": -(-BATCH * 50 // (10 * self.labels))}
            options |= repeated if way == "alone" else {"labeled_batch_size": LABELED}
        callbacks = [CompileNetworks(backend=None, channels_last=True)]
        return images.fit(method, images.make_data(**options), lr, self.steps, STUDENT, callbacks)[1]


class EightByEight:
    """scikit-learn's digits, from 10 labels of each class or all; a network of 8 channels learns from one of 32.

    Args:
        labels: Labels of each class. None means all.
    """

    steps = 760

    def __init__(self, labels):
        self.labels = labels

    def fit(self, part, seed, way, setting):
        """Train a teacher on all labels, and a student. Return the student's accuracy, and the teacher's, in %."""
        options = {"batch_size": BATCH, "seed": seed, "val_size": 0.25 if part == "val" else 0}
        data = SemiSupervisedDataModule(Digits(), **options)
        expert = train(self.steps, seed, partial(DigitsCNN, 32), SupervisedModule, data, lr=0.005).student
        lr, method = method_of(way, setting, Teacher(expert))
        if self.labels is not None:
            options |= {"labeled": self.labels}
            options |= {"unlabeled": "none", "views_per_epoch": 12} if way == "alone" else {}
        data = SemiSupervisedDataModule(Digits(), **options)
        student = train(self.steps, seed, partial(DigitsCNN, 8), method, data, lr=lr).student
        loader = data.val_dataloader() if part == "val" else data.test_dataloader()
        return {"accuracy": accuracy(student, loader), "teacher": accuracy(expert, loader)}


class Mails:
    """Mails in three kinds, from 20 labels of each and the other mails without (text.py); the figure is macro F1.

    Args:
        folder: Folder that text.py has prepared.
        weights: Weights of the teacher of configs/text_teacher.yaml.
    """

    def __init__(self, folder, weights):
        self.folder, self.weights = folder, weights

    def fit(self, part, seed, way, setting):
        """Train a student, and return its macro F1 in %."""
        split = Split(self.folder, self.weights, seed, part)
        if way == "alone":
            found = split.alone(*setting, steps=900)
        else:
            lr, weight, temperature = setting
            found = split.strong(lr, temperature, weight, steps=900)
        return {"accuracy": found["macro F1"]}
