"""Weak labels (noisy, coarse, few and actively selected, or of other classes): each method against its baseline.

Run: python benchmarks/weak_labels.py [noise] [coarse] [active] [transfer]      (all four if none is named)
     python benchmarks/weak_labels.py --settings [PART ...]       (selects the settings, on validation images)

Digits: 1197 training images and 600 test images; for transfer, those of 5 to 9. Test images select nothing. There is no
validation part, so the last weights are tested. The settings come from other splits, with 25 % of the training images
for validation (for transfer, which trains on 10 images, 90 %). All methods of a part have the same network, steps,
schedule and augmentation. Those for noise have one learning rate, the best one for cross-entropy. A seed sets split,
noise, network and order. Differences are paired by split.
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from ensemble import interval
from few_labels import make_digits, quiet
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset
from training import make_trainer, measure, train
from transfer import Transfer

from kd_lightning import (
    CoarseLabels,
    CoTeachingModule,
    DatasetSource,
    Digits,
    PairNoise,
    SupervisedModule,
    SymmetricNoise,
    reset_classifier,
)
from kd_lightning.active.loop import ActiveLearningLoop, plot
from kd_lightning.losses import (
    EarlyLearningLoss,
    ForwardCorrectionLoss,
    GeneralizedCrossEntropyLoss,
    SymmetricCrossEntropyLoss,
    estimate_transition,
)
from kd_lightning.models import DigitsCNN

STEPS = {"noise": 760, "coarse": 760, "active": 400}
FOLDS = 5
TRANSFER_SPLITS = 30  # the gain is smaller than the scatter between splits
NOISE = {"40 % symmetric": SymmetricNoise(0.4), "40 % pair": PairNoise(0.4)}
COARSE = {f"{c}-{c + 1}": [c, c + 1] for c in range(0, 10, 2)}


class Noise:
    """Training on labels of which many are wrong. The network has 95 thousand weights, and can memorise the labels."""

    def __init__(self, seed, noise, val_size=0):
        self.seed = seed
        self.noise = noise
        self.make_data = partial(make_digits, unlabeled="none", val_size=val_size, seed=seed, batch_size=64)

    def fit(self, hard_loss=None, lr=0.01, data=None, method=SupervisedModule, **arguments):
        """Train with a loss."""
        data = data or self.make_data(label_noise=self.noise)

        def make(**options):
            extra = {"peer": DigitsCNN(32)} if method is CoTeachingModule else {}
            return method(DigitsCNN(32), **extra, **arguments, hard_loss=hard_loss, **options)

        return train(STEPS["noise"], self.seed, make, data, lr=lr)

    def score(self, *arguments, **options):
        """Accuracy of a training with a loss."""
        return measure(self.fit(*arguments, **options), self.make_data())

    def clean(self, lr=0.01):
        """Accuracy of a training on the true labels, an upper bound."""
        return self.score(lr=lr, data=self.make_data())

    def out_of_fold(self, lr):
        """Labels, out-of-fold probabilities, true labels and indices of the labeled samples."""
        data = self.make_data(label_noise=self.noise)
        data.setup("")
        labeled = torch.tensor(data.split.labeled)
        order = labeled[torch.randperm(len(labeled), generator=torch.Generator().manual_seed(self.seed))]
        probabilities = torch.zeros(len(data.visible_labels()), 10, dtype=torch.float64)
        for fold in range(FOLDS):
            held_out = order[fold::FOLDS].tolist()
            some = self.make_data(label_noise=self.noise)
            some.setup("")
            some.split = replace(some.split, labeled=sorted({*some.split.labeled} - {*held_out}), held_out=held_out)
            student = self.fit(nn.CrossEntropyLoss(), lr, data=some).student.eval()
            for batch in data.pool_dataloader():
                mine = torch.isin(batch.index, torch.tensor(held_out))
                with torch.no_grad():
                    probabilities[batch.index[mine]] = student(batch.x[mine]).double().softmax(1)
        return data.visible_labels()[labeled], probabilities[labeled], data.hidden_truth(labeled), labeled

    def edit(self, lr=0.01, found=None):
        """Confident learning: train without the suspects of other folds. Return accuracy, precision and recall."""
        labels, probabilities, truth, labeled = found or self.out_of_fold(lr)
        suspect = torch.from_numpy(np.asarray(find_label_issues(labels.numpy(), probabilities.numpy(), n_jobs=1)))
        data = self.make_data(label_noise=self.noise)
        data.setup("")
        data.split = data.split.with_label_rows([[i, -1, "missing", 1.0] for i in labeled[suspect].tolist()])
        wrong = labels != truth
        right = float((suspect & wrong).sum())
        precision, recall = 100 * right / max(float(suspect.sum()), 1.0), 100 * right / float(wrong.sum())
        return self.score(lr=lr, data=data), precision, recall

    def all(self):
        """Run every method: {name: accuracy}, and the precision and recall of the suspects."""
        lr, found = SETTINGS["noise"], {}
        found["cross-entropy"] = self.score(lr=lr)
        found["label smoothing"] = self.score(nn.CrossEntropyLoss(label_smoothing=0.2), lr)
        for name, loss in LOSSES.items():
            found[name] = self.score(loss(), lr)
        folds = self.out_of_fold(lr)
        for name, matrix in (("true T", self.noise.matrix(10)), ("T from anchors", estimate_transition(folds[1]))):
            found[f"forward correction, {name}"] = self.score(ForwardCorrectionLoss(matrix.tolist()), lr)
        found["co-teaching"] = self.score(lr=lr, method=CoTeachingModule, forget_rate=0.4, **SETTINGS["co-teaching"])
        found["confident learning, dropped"], precision, recall = self.edit(lr, folds)
        found["true labels"] = self.clean(lr)
        return found, (precision, recall)


class Coarse:
    """2 fine labels per class, and one of 5 pairs of digits for every other image."""

    def __init__(self, seed, val_size=0):
        self.seed = seed
        self.make_data = partial(make_digits, labeled=2, val_size=val_size, seed=seed)

    def fine(self, lr=0.01, student=None):
        """Accuracy of a training on the fine labels alone."""
        data = self.make_data(unlabeled="none", batch_size=32, views_per_epoch=20)
        student = student or partial(DigitsCNN, 8)
        return measure(
            train(STEPS["coarse"], self.seed, lambda **o: SupervisedModule(student(), **o), data, lr=lr), data
        )

    def head(self, lr=0.01):
        """Train a network on all coarse labels; then train it with a new head on the fine labels."""
        train_part, data = Digits().load().train, self.make_data(batch_size=96)
        data.setup("")
        coarse = make_digits(batch_size=96, val_size=0, seed=self.seed)
        coarse.source = DatasetSource(TensorDataset(train_part.images.tensors[0], train_part.targets // 2))
        coarse.setup("")
        used = sorted([*data.split.labeled, *data.split.unlabeled])
        coarse.split = replace(coarse.split, labeled=used, unlabeled=[], left_out=data.split.val)
        make = partial(SupervisedModule, DigitsCNN(8, num_classes=5))
        network = train(STEPS["coarse"], self.seed, lambda **o: make(**o), coarse, lr=lr).student
        return self.fine(lr, lambda: reset_classifier(network, 10))

    def loss(self, lr=0.01, labeled=32):
        """Train on fine and coarse labels at once, with the loss of coarse labels."""
        streams = {"batch_size": 96, "labeled_batch_size": labeled}
        data = self.make_data(coarse=CoarseLabels(COARSE), **streams)
        make = lambda **options: SupervisedModule(DigitsCNN(8), **options)  # noqa: E731
        return measure(train(STEPS["coarse"], self.seed, make, data, lr=lr), data)

    def all(self):
        """Run every method: {name: accuracy}."""
        found = {"fine labels alone": self.fine(SETTINGS["fine"])}
        found["coarse head first"] = self.head(SETTINGS["head"])
        found["coarse-label loss"] = self.loss(**SETTINGS["coarse"])
        return found


def active(seed):
    """Run every strategy from 20 to 100 labels in rounds of 20: {strategy: [accuracy of each round]}."""
    quiet()
    found = {}
    for strategy in ("random", "least-confidence", "margin", "entropy", "k-centre", "badge"):
        make_data = partial(make_digits, labeled=2, val_size=0, seed=seed, batch_size=96, labeled_batch_size=32)
        schedule = partial(CosineAnnealingLR, T_max=STEPS["active"])
        optimizer = partial(AdamW, lr=SETTINGS["fine"], weight_decay=0.01)
        options = {"optimizer": optimizer, "lr_scheduler": schedule, "lr_interval": "step"}
        make_module = lambda: SupervisedModule(DigitsCNN(8), **options)  # noqa: E731, B023
        trainer = partial(make_trainer, STEPS["active"])
        loop = ActiveLearningLoop(make_module, make_data, trainer, strategy, queries=20, rounds=4, seed=seed)
        found[strategy] = loop.run()
        print(seed, strategy, [round(100 * r["accuracy"], 2) for r in found[strategy]], flush=True)
    return found


SETTINGS = {
    "noise": 0.003,
    "co-teaching": {"ramp_epochs": 20},
    "fine": 0.01,
    "head": 0.03,
    "coarse": {"lr": 0.03, "labeled": 16},
}


LOSSES = {
    "GCE": partial(GeneralizedCrossEntropyLoss, q=0.7),
    "symmetric CE": partial(SymmetricCrossEntropyLoss, alpha=0.1, beta=1.0),
    "early-learning regularisation": partial(EarlyLearningLoss, weight=3.0, momentum=0.7),
}


def try_transfer(seed, record):
    """Try the start and the learning rates of transfer."""
    transfer = Transfer(seed, val_size=0.9)
    for lr in (0.003, 0.01):
        record("from scratch", {"lr": lr}, transfer.fit(None, lr))
        for origin in ("0 to 4", "0 to 4, rotated"):
            record(f"{origin}, all layers alike", {"lr": lr}, transfer.fit(origin, lr))
            for options in (
                {"frozen_epochs": 5, "lr_decay": 0.5},
                {"frozen_epochs": 0, "lr_decay": 0.5},
                {"frozen_epochs": 0, "batch_norm": "freeze"},
            ):
                record(f"{origin}, by layer", {"lr": lr, **options}, transfer.fit(origin, lr, **options))


def try_noise(seed, record):
    """Try losses and methods with symmetric noise."""
    noise = Noise(seed, NOISE["40 % symmetric"], val_size=0.25)
    for lr in (0.003, 0.01):
        record("cross-entropy", {"lr": lr}, noise.score(lr=lr))
        for q in (0.5, 0.7, 0.9):
            record("GCE", {"lr": lr, "q": q}, noise.score(GeneralizedCrossEntropyLoss(q), lr))
        for alpha, beta in ((0.1, 1.0), (0.1, 0.3), (1.0, 1.0)):
            loss = SymmetricCrossEntropyLoss(alpha, beta)
            record("symmetric CE", {"lr": lr, "alpha": alpha, "beta": beta}, noise.score(loss, lr))
        for weight, momentum in ((1.0, 0.7), (3.0, 0.7), (3.0, 0.9)):
            loss = EarlyLearningLoss(weight, momentum)
            record("ELR", {"lr": lr, "weight": weight, "momentum": momentum}, noise.score(loss, lr))
        for epochs in (5, 10, 20):
            options = {"forget_rate": 0.4, "ramp_epochs": epochs}
            record("co-teaching", {"lr": lr, "ramp": epochs}, noise.score(lr=lr, method=CoTeachingModule, **options))
        record("forward", {"lr": lr}, noise.score(ForwardCorrectionLoss(noise.noise.matrix(10).tolist()), lr))


def try_coarse(seed, record):
    """Try the methods for coarse labels."""
    coarse = Coarse(seed, val_size=0.25)
    for lr in (0.003, 0.01, 0.03):
        record("fine labels alone", {"lr": lr}, coarse.fine(lr))
        record("coarse head first", {"lr": lr}, coarse.head(lr))
        for labeled in (16, 32):
            record("coarse-label loss", {"lr": lr, "labeled in a batch": labeled}, coarse.loss(lr, labeled))


TRIALS = {"noise": (try_noise, 4), "coarse": (try_coarse, 4), "transfer": (try_transfer, 10)}  # on so many splits


def try_settings(part, seed):
    """Try the settings of a part on one split: {(method, setting): validation accuracy}."""
    quiet()
    found = {}

    def record(method, setting, value):
        found[method, str(setting)] = value
        print(seed, method, setting, round(value, 2), flush=True)

    TRIALS[part][0](seed, record)
    return found


def settings(part, pool):
    """Print the table of every setting, on validation images of splits that serve nothing else."""
    found = list(pool.map(partial(try_settings, part), range(100, 100 + TRIALS[part][1])))
    print("\n| method | setting | validation accuracy % |\n|---|---|---|")
    for method, setting in found[0]:
        values = [of_split[method, setting] for of_split in found]
        print(f"| {method} | {setting} | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} |")


def run_noise(seed):
    """Run all methods with both kinds of noise on one split."""
    quiet()
    found = {}
    for name, noise in NOISE.items():
        found[name] = Noise(seed, noise).all()
        print(seed, name, found[name], flush=True)
    return found


def run_all(part, seed):
    """Run all methods of a part on one split."""
    quiet()
    found = part(seed).all()
    print(seed, found, flush=True)
    return found


def table(found, base):
    """Print accuracies, and paired differences from a base method."""
    print(f"| test accuracy % | mean ± std | over {base} |\n|---|---|---|")
    for name in found[0]:
        values, others = ([of_split[method] for of_split in found] for method in (name, base))
        mean = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        print(f"| {name} | {mean} | {interval(values, others) if name != base else ''} |")


def report_noise(pool):
    """Print the tables of both kinds of noise."""
    found = list(pool.map(run_noise, range(5)))
    for name in NOISE:
        print(f"\n{name} noise")
        table([of_split[name][0] for of_split in found], "cross-entropy")
        for number, what in enumerate(("precision", "recall")):
            values = [of_split[name][1][number] for of_split in found]
            print(f"{what} of the suspects: {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %")


def report_coarse(pool):
    """Print the table of coarse labels."""
    print()
    table(list(pool.map(partial(run_all, Coarse), range(5))), "fine labels alone")


def report_active(pool):
    """Print accuracy by number of labels and strategy, and save a picture."""
    found = list(pool.map(active, range(5)))
    counts = [result["labels"] for result in found[0]["random"]]
    print("\n| test accuracy % | " + " | ".join(f"{count} labels" for count in counts) + " |")
    print("|---" * (1 + len(counts)) + "|")
    for strategy in found[0]:
        rounds = zip(*([100 * r["accuracy"] for r in of_split[strategy]] for of_split in found), strict=True)
        cells = [f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" for values in rounds]
        print(f"| {strategy} | {' | '.join(cells)} |")
    figure = plot({strategy: [of_split[strategy] for of_split in found] for strategy in found[0]})
    figure.savefig(Path(__file__).with_name("active.png"), dpi=100)


def report_transfer(pool):
    """Print the table of transfer."""
    print()
    table(list(pool.map(partial(run_all, Transfer), range(TRANSFER_SPLITS))), "from scratch")


REPORTS = {"noise": report_noise, "coarse": report_coarse, "active": report_active, "transfer": report_transfer}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="|".join(REPORTS), help="the parts to run; default: all")
    parser.add_argument("--settings", action="store_true", help="select the settings, on validation images")
    options = parser.parse_args()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for part in options.parts or REPORTS:
            if not options.settings:
                REPORTS[part](pool)
            elif part in TRIALS:
                settings(part, pool)
    packages = ("torch", "torchvision", "lightning", "cleanlab", "scikit-activeml")
    print(", ".join(f"{name} {version(name)}" for name in packages))
