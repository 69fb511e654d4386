"""Weak labels (noisy, coarse, few and actively selected, or of other classes): each method against its baseline.

Run: python benchmarks/weak_labels.py [noise] [coarse] [active] [transfer] [--store FILE] [--processes 2]
     python benchmarks/weak_labels.py --settings [PART ...] [--store FILE] [--processes 2]

All four parts run if none is named (about 25 minutes). --settings selects the settings on validation images (20).

Digits: 1197 training images and 600 test images; for transfer, those of 5 to 9. Test images select nothing. There is no
validation part, so the last weights are tested. The settings come from other splits, with 25 % of the training images
for validation (for transfer, which trains on 10 images, 90 %). All methods of a part have the same network, steps,
schedule and augmentation. Those for noise have one learning rate, the best one for cross-entropy. A seed sets split,
noise, network and order. Differences are paired by split.
"""

import itertools
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from few_labels import make_digits
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset
from training import Fits, in_parallel, interval, make_parser, make_trainer, measure, spread, train, versions
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
SPLITS, FOLDS = 5, 5
EDITED = "confident learning, dropped"
STRATEGIES = ("random", "least-confidence", "margin", "entropy", "k-centre", "badge")
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

        def make(student, **options):
            extra = {"peer": DigitsCNN(32)} if method is CoTeachingModule else {}
            return method(student, **extra, **arguments, hard_loss=hard_loss, **options)

        return train(STEPS["noise"], self.seed, partial(DigitsCNN, 32), make, data, lr=lr)

    def score(self, *arguments, **options):
        """Accuracy of a training with a loss."""
        return measure(self.fit(*arguments, **options), self.make_data())

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

    def edit(self, lr, found):
        """Confident learning: train without the suspects of other folds. Return accuracy, precision and recall."""
        labels, probabilities, truth, labeled = found
        suspect = torch.from_numpy(np.asarray(find_label_issues(labels.numpy(), probabilities.numpy(), n_jobs=1)))
        data = self.make_data(label_noise=self.noise)
        data.setup("")
        data.split = data.split.with_label_rows([[i, -1, "missing", 1.0] for i in labeled[suspect].tolist()])
        wrong = labels != truth
        right = float((suspect & wrong).sum())
        precision, recall = 100 * right / max(float(suspect.sum()), 1.0), 100 * right / float(wrong.sum())
        return self.score(lr=lr, data=data), precision, recall

    def plan(self):
        """Every method: {name: function that trains, and returns the accuracy}. EDITED returns a list."""
        lr, folds = SETTINGS["noise"], cache(partial(self.out_of_fold, SETTINGS["noise"]))

        def corrected(matrix):
            return self.score(ForwardCorrectionLoss(matrix().tolist()), lr)

        plan = {"cross-entropy": partial(self.score, lr=lr)}
        plan["label smoothing"] = partial(self.score, nn.CrossEntropyLoss(label_smoothing=0.2), lr)
        plan |= {name: lambda loss=loss: self.score(loss(), lr) for name, loss in LOSSES.items()}
        plan["forward correction, true T"] = partial(corrected, lambda: self.noise.matrix(10))
        plan["forward correction, T from anchors"] = partial(corrected, lambda: estimate_transition(folds()[1]))
        co_teaching = {"method": CoTeachingModule, "forget_rate": 0.4, **SETTINGS["co-teaching"]}
        plan["co-teaching"] = partial(self.score, lr=lr, **co_teaching)
        plan[EDITED] = lambda: self.edit(lr, folds())
        plan["true labels"] = partial(self.score, lr=lr, data=self.make_data())  # an upper bound
        return plan


class Coarse:
    """2 fine labels per class, and one of 5 pairs of digits for every other image."""

    def __init__(self, seed, val_size=0):
        self.seed = seed
        self.make_data = partial(make_digits, labeled=2, val_size=val_size, seed=seed)

    def fine(self, lr=0.01, student=None):
        """Accuracy of a training on the fine labels alone."""
        data = self.make_data(unlabeled="none", batch_size=32, views_per_epoch=20)
        make = student or partial(DigitsCNN, 8)
        return measure(train(STEPS["coarse"], self.seed, make, SupervisedModule, data, lr=lr), data)

    def head(self, lr=0.01):
        """Train a network on all coarse labels; then train it with a new head on the fine labels."""
        train_part, data = Digits().load().train, self.make_data(batch_size=96)
        data.setup("")
        coarse = make_digits(batch_size=96, val_size=0, seed=self.seed)
        coarse.source = DatasetSource(TensorDataset(train_part.images.tensors[0], train_part.targets // 2))
        coarse.setup("")
        used = sorted([*data.split.labeled, *data.split.unlabeled])
        coarse.split = replace(coarse.split, labeled=used, unlabeled=[], left_out=data.split.val)
        make = partial(DigitsCNN, 8, num_classes=5)
        network = train(STEPS["coarse"], self.seed, make, SupervisedModule, coarse, lr=lr).student
        return self.fine(lr, lambda: reset_classifier(network, 10))

    def loss(self, lr=0.01, labeled=32):
        """Train on fine and coarse labels at once, with the loss of coarse labels."""
        streams = {"batch_size": 96, "labeled_batch_size": labeled}
        data = self.make_data(coarse=CoarseLabels(COARSE), **streams)
        make = partial(DigitsCNN, 8)
        return measure(train(STEPS["coarse"], self.seed, make, SupervisedModule, data, lr=lr), data)

    def plan(self):
        """Every method: {name: function that trains, and returns the accuracy}."""
        plan = {"fine labels alone": partial(self.fine, SETTINGS["fine"])}
        plan["coarse head first"] = partial(self.head, SETTINGS["head"])
        plan["coarse-label loss"] = partial(self.loss, **SETTINGS["coarse"])
        return plan


def active(strategy, seed):
    """Run a strategy from 20 to 100 labels in rounds of 20: results of each round."""
    make_data = partial(make_digits, labeled=2, val_size=0, seed=seed, batch_size=96, labeled_batch_size=32)
    optimizer = partial(AdamW, lr=SETTINGS["fine"], weight_decay=0.01)
    schedule = partial(CosineAnnealingLR, T_max=STEPS["active"])
    options = {"optimizer": optimizer, "lr_scheduler": schedule, "lr_interval": "step"}
    trainer = partial(make_trainer, max_steps=STEPS["active"], max_epochs=-1)
    make_module = lambda: SupervisedModule(DigitsCNN(8), **options)  # noqa: E731
    return ActiveLearningLoop(make_module, make_data, trainer, strategy, queries=20, rounds=4, seed=seed).run()


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


def transfer_trials(seed):
    """The start and the learning rates of transfer: {(method, setting): function that trains}."""
    transfer, plan = Transfer(seed, val_size=0.9), {}
    for lr in (0.003, 0.01):
        plan["from scratch", f"lr: {lr}"] = partial(transfer.fit, None, lr)
        for origin in ("0 to 4", "0 to 4, rotated"):
            plan[f"{origin}, all layers alike", f"lr: {lr}"] = partial(transfer.fit, origin, lr)
            for options in (
                {"frozen_epochs": 5, "lr_decay": 0.5},
                {"frozen_epochs": 0, "lr_decay": 0.5},
                {"frozen_epochs": 0, "batch_norm": "freeze"},
            ):
                setting = _text({"lr": lr, **options})
                plan[f"{origin}, by layer", setting] = partial(transfer.fit, origin, lr, **options)
    return plan


def noise_trials(seed):
    """Losses and methods with symmetric noise: {(method, setting): function that trains}."""
    noise, plan = Noise(seed, NOISE["40 % symmetric"], val_size=0.25), {}

    def add(name, setting, make_loss=lambda: None, **options):
        plan[name, _text(setting)] = lambda: noise.score(make_loss(), setting["lr"], **options)

    for lr in (0.003, 0.01):
        add("cross-entropy", {"lr": lr})
        for q in (0.5, 0.7, 0.9):
            add("GCE", {"lr": lr, "q": q}, partial(GeneralizedCrossEntropyLoss, q))
        for alpha, beta in ((0.1, 1.0), (0.1, 0.3), (1.0, 1.0)):
            loss = partial(SymmetricCrossEntropyLoss, alpha, beta)
            add("symmetric CE", {"lr": lr, "alpha": alpha, "beta": beta}, loss)
        for weight, momentum in ((1.0, 0.7), (3.0, 0.7), (3.0, 0.9)):
            loss = partial(EarlyLearningLoss, weight, momentum)
            add("ELR", {"lr": lr, "weight": weight, "momentum": momentum}, loss)
        for epochs in (5, 10, 20):
            options = {"method": CoTeachingModule, "forget_rate": 0.4, "ramp_epochs": epochs}
            add("co-teaching", {"lr": lr, "ramp": epochs}, **options)
        add("forward", {"lr": lr}, lambda: ForwardCorrectionLoss(noise.noise.matrix(10).tolist()))
    return plan


def coarse_trials(seed):
    """The methods for coarse labels: {(method, setting): function that trains}."""
    coarse, plan = Coarse(seed, val_size=0.25), {}
    for lr in (0.003, 0.01, 0.03):
        plan["fine labels alone", f"lr: {lr}"] = partial(coarse.fine, lr)
        plan["coarse head first", f"lr: {lr}"] = partial(coarse.head, lr)
        for labeled in (16, 32):
            setting = _text({"lr": lr, "labeled in a batch": labeled})
            plan["coarse-label loss", setting] = partial(coarse.loss, lr, labeled)
    return plan


def _text(setting):
    return ", ".join(f"{name}: {value}" for name, value in setting.items())


TRIALS = {"noise": (noise_trials, 4), "coarse": (coarse_trials, 4), "transfer": (transfer_trials, 10)}  # so many splits
PARTS = {
    **{name: lambda seed, noise=noise: Noise(seed, noise).plan() for name, noise in NOISE.items()},
    "coarse": lambda seed: Coarse(seed).plan(),
    "transfer": lambda seed: Transfer(seed).plan(),
    **{strategy: lambda seed, s=strategy: {s: partial(active, s, seed)} for strategy in STRATEGIES},
}


def run_trials(fits, case):
    """Try the settings of a part on one split: {(method, setting): validation accuracy}."""
    part, seed = case
    return {key: fits.get([part, seed, *key], function) for key, function in TRIALS[part][0](seed).items()}


def run(fits, case):
    """Run all methods of a part on one split: {name: figures}."""
    part, seed = case
    return {name: fits.get([part, seed, name], function) for name, function in PARTS[part](seed).items()}


def settings(part, call):
    """Print the table of every setting, on validation images of splits that serve nothing else."""
    found = call(run_trials, [(part, 100 + split) for split in range(TRIALS[part][1])])
    print("\n| method | setting | validation accuracy % |\n|---|---|---|")
    for method, setting in found[0]:
        print(f"| {method} | {setting} | {spread([of_split[method, setting] for of_split in found])} |")


def table(found, base):
    """Print accuracies, and paired differences from a base method."""
    print(f"| test accuracy % | mean ± std | over {base} |\n|---|---|---|")
    for name in found[0]:
        values, others = ([of_split[method] for of_split in found] for method in (name, base))
        print(f"| {name} | {spread(values)} | {interval(values, others) if name != base else ''} |")


def report_noise(call):
    """Print the tables of both kinds of noise."""
    found = call(run, [*itertools.product(NOISE, range(SPLITS))])
    for number, name in enumerate(NOISE):
        mine = found[SPLITS * number : SPLITS * (number + 1)]
        _, *suspects = zip(*(of_split[EDITED] for of_split in mine), strict=True)
        print(f"\n{name} noise")
        table([of_split | {EDITED: of_split[EDITED][0]} for of_split in mine], "cross-entropy")
        for what, values in zip(("precision", "recall"), suspects, strict=True):
            print(f"{what} of the suspects: {spread(values, 1)} %")


def report_coarse(call):
    """Print the table of coarse labels."""
    print()
    table(call(run, [("coarse", seed) for seed in range(SPLITS)]), "fine labels alone")


def report_active(call):
    """Print accuracy by number of labels and strategy, and save a picture."""
    cases = [*itertools.product(STRATEGIES, range(SPLITS))]
    results = {strategy: [] for strategy in STRATEGIES}
    for (strategy, _), found in zip(cases, call(run, cases), strict=True):
        results[strategy].append(found[strategy])
    counts = [result["labels"] for result in results["random"][0]]
    print("\n| test accuracy % | " + " | ".join(f"{count} labels" for count in counts) + " |")
    print("|---" * (1 + len(counts)) + "|")
    for strategy, found in results.items():
        rounds = zip(*([100 * result["accuracy"] for result in of_split] for of_split in found), strict=True)
        print(f"| {strategy} | {' | '.join(spread(values) for values in rounds)} |")
    plot(results).savefig(Path(__file__).with_name("active.png"), dpi=100)


def report_transfer(call):
    """Print the table of transfer."""
    print()
    table(call(run, [("transfer", seed) for seed in range(TRANSFER_SPLITS)]), "from scratch")


REPORTS = {"noise": report_noise, "coarse": report_coarse, "active": report_active, "transfer": report_transfer}


def main():
    """Print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="|".join(REPORTS), help="the parts to run; default: all")
    parser.add_argument("--settings", action="store_true", help="select the settings, on validation images")
    options = parser.parse_args()
    fits = Fits(options.store)

    def call(function, cases):
        return in_parallel(partial(function, fits), cases, options.processes)

    for part in options.parts or REPORTS:
        if not options.settings:
            REPORTS[part](call)
        elif part in TRIALS:
            settings(part, call)
    print(versions("cleanlab", "scikit-activeml"))


if __name__ == "__main__":
    main()
