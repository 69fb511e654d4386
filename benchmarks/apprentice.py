"""Students of low precision: without a teacher, and in the Apprentice's schemes A, B and C.

Run: python benchmarks/apprentice.py [--seeds 5]      (about 40 minutes on two cores)
     python benchmarks/apprentice.py --settings       (selects the settings, on validation images alone)

The student is DigitsCNN of width 8, the teacher one of width 32. There are two settings: all labels, and 10 labels per
class with the other training images unlabeled. Every run takes the same number of steps (those of 40 epochs). All
methods of a setting see the same views of the same images. The fixed teacher of B and C is trained on all training
labels. A's teacher sees the labels that the student sees. C starts from the seed's fp32 student without a teacher. A
seed sets split, networks and order. --settings selects learning rate and temperature. Test images select nothing:
"best" is the scheme of the highest mean validation accuracy at that precision.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from ensemble import STEPS, accuracy, interval, optimised
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.optim import SGD, AdamW

from kd_lightning import (
    ActivationCalibration,
    ApprenticeModule,
    Digits,
    SemiSupervisedDataModule,
    SupervisedModule,
)
from kd_lightning.deploy.export import collect_logits, compare_logits, export_student, load_exported
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import predicted_labels
from kd_lightning.models import DigitsCNN, resnet20
from kd_lightning.quantization.layers import quantize
from kd_lightning.quantization.sizes import size_of

PRECISIONS = {
    "fp32": None,
    "8A-8W": {"weight_bits": 8},
    "8A-4W": {"weight_bits": 4},
    "8A-2W": {"weight_bits": 2},
    "8A-ternary": {"weight_bits": "ternary"},
}
SETTINGS = {"10 labels per class": {"labeled": 10}, "all labels": {}}
SCHEMES = {"A": "joint", "B": "fixed_teacher", "C": "finetune"}
EXPORTED = ("8A-4W", "8A-ternary")
FLOAT_RATE = 0.03  # of the fp32 student alone, selected by benchmarks/digits_settings.py
RATE, TEMPERATURE = 0.01, 1.0  # the best, or level with the best, for every method


def fit(module, data):
    """Train to the last step. Return validation and test accuracy in percent."""
    trainer = Trainer(
        max_steps=STEPS,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ActivationCalibration()],
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == STEPS
    return [100 * accuracy(module.student, loader) for loader in (data.val_dataloader(), data.test_dataloader())]


class Seed:
    """All trainings of one seed in one setting."""

    def __init__(self, seed, setting, val_size=0.1):
        torch.set_num_threads(1)
        self.seed = seed
        self.labels = SETTINGS[setting]
        self.make_data = partial(SemiSupervisedDataModule, Digits(), batch_size=64, seed=seed, val_size=val_size)
        self.folder = tempfile.TemporaryDirectory()
        self.teacher = DigitsCNN(32)
        seed_everything(seed, verbose=False)
        fit(SupervisedModule(self.teacher, **optimised(0.005)), self.make_data())

    def student(self, precision):
        """A new student, always with the same initial weights."""
        seed_everything(self.seed, verbose=False)
        network = DigitsCNN(8)
        return network if PRECISIONS[precision] is None else quantize(network, **PRECISIONS[precision])

    def alone(self, precision, lr):
        """Train without a teacher, on the labeled images."""
        few = {"unlabeled": "none", "views_per_epoch": 11} if self.labels else {}
        module = SupervisedModule(self.student(precision), **optimised(lr))
        found = fit(module, self.make_data(**self.labels, **few))
        if precision == "fp32":
            torch.save(module.student.state_dict(), Path(self.folder.name, "fp32.pt"))
        return module.student, found

    def distilled(self, precision, scheme, lr, temperature):
        """Train by one of the schemes."""
        student = self.student(precision)
        arguments = {"soft_loss": KDLoss(temperature), **optimised(lr)}
        teacher = self.teacher
        if scheme == "A":
            teacher = DigitsCNN(32)
            arguments["teacher_optimizer"] = partial(AdamW, lr=0.005, weight_decay=0.01)
        if scheme == "C":
            arguments["initial_weights"] = Path(self.folder.name, "fp32.pt")
        module = ApprenticeModule(student, teacher, SCHEMES[scheme], **arguments)
        return module.student, fit(module, self.make_data(**self.labels))


def run(case):
    """One seed and setting: {(precision, method): (validation, test accuracy)}, and exports compared with PyTorch."""
    seed, setting = case
    here, found, agreed = Seed(seed, setting), {}, {}
    for precision in PRECISIONS:
        for method in ("no teacher", *SCHEMES):
            if precision == "fp32" and method != "no teacher":
                continue
            if method == "no teacher":
                student, found[precision, method] = here.alone(precision, FLOAT_RATE if precision == "fp32" else RATE)
            else:
                student, found[precision, method] = here.distilled(precision, method, RATE, TEMPERATURE)
            if precision in EXPORTED:
                agreed[precision, method] = exported(student, here.make_data().test_dataloader())
            print(f"seed {seed}, {setting}, {precision}, {method}: {found[precision, method][1]:.2f}", flush=True)
    return found, agreed


def exported(student, loader):
    """Compare the outputs of ONNX Runtime with those of PyTorch."""
    batches = [batch.x for batch in loader]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.onnx")
        export_student(student.eval(), batches[0], path, "onnx", {})
        found = collect_logits(load_exported(path, "onnx", nn.Identity), batches)
    return compare_logits(collect_logits(student, batches), found, partial(predicted_labels, task="multiclass"))


def spread(values):
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


GRID = {  # learning rate and temperature
    "no teacher": [(0.01, None), (0.03, None)],
    "A": [(0.01, 1.0), (0.03, 1.0)],
    "B": [(0.01, 1.0), (0.03, 1.0), (0.03, 4.0)],
    "C": [(0.003, 1.0), (0.01, 1.0), (0.03, 1.0), (0.01, 4.0)],
}


def try_settings(case):
    """Validation accuracies of one seed over the grid."""
    seed, setting = case
    here, found = Seed(seed, setting, val_size=0.25), {}
    here.alone("fp32", FLOAT_RATE)
    for method, grid in GRID.items():
        for lr, temperature in grid:
            if method == "no teacher":
                _, (found[method, lr, temperature], _) = here.alone("8A-ternary", lr)
            else:
                _, (found[method, lr, temperature], _) = here.distilled("8A-ternary", method, lr, temperature)
            print(f"seed {seed}, {method}, {lr}, {temperature}: {found[method, lr, temperature]:.2f}", flush=True)
    return found


def settings(seeds, setting="10 labels per class"):
    """Print the table of the search."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = list(pool.map(try_settings, [(100 + seed, setting) for seed in range(seeds)]))
    print(f"\n| 8A-ternary, {setting} | learning rate | temperature | validation accuracy % |\n|---|---|---|---|")
    for method, grid in GRID.items():
        for lr, temperature in grid:
            print(
                f"| {method} | {lr} | {temperature or ''} | {spread([r[method, lr, temperature] for r in results])} |"
            )


def compare(seeds):
    """Print the tables of accuracies."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = dict(zip(cases := [*itertools.product(range(seeds), SETTINGS)], pool.map(run, cases), strict=True))
    for setting in SETTINGS:
        found = [results[seed, setting][0] for seed in range(seeds)]
        column = {key: list(zip(*(one[key] for one in found), strict=True)) for key in found[0]}
        base = column["fp32", "no teacher"][1]
        print(
            f"\n| {setting}: test accuracy % | weights KB | no teacher | A | B | C | best, by validation | "
            "best ahead of no teacher [95 %] | best ahead of fp32 alone [95 %] |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for precision, options in PRECISIONS.items():
            network = DigitsCNN(8) if options is None else quantize(DigitsCNN(8), **options)
            cells = [f"{size_of(network).stored / 1000:.1f}"]
            if options is None:
                print(f"| {precision} | {cells[0]} | {spread(base)} | | | | | | |")
                continue
            cells += [spread(column[precision, method][1]) for method in ("no teacher", *SCHEMES)]
            best = max(SCHEMES, key=lambda scheme: statistics.mean(column[precision, scheme][0]))
            test = column[precision, best][1]
            cells += [best, interval(test, column[precision, "no teacher"][1]), interval(test, base)]
            print(f"| {precision} | {' | '.join(cells)} |")
        print(f"\n| {setting}: ahead of no teacher [95 %] | A | B | C |\n|---|---|---|---|")
        for precision in [name for name, options in PRECISIONS.items() if options]:
            others = column[precision, "no teacher"][1]
            print(f"| {precision} | {' | '.join(interval(column[precision, s][1], others) for s in SCHEMES)} |")
    print("\n| ONNX Runtime against PyTorch | files | images | agree % | largest difference, of the largest logit |")
    print("|---|---|---|---|---|")
    for precision in EXPORTED:
        each = [c for _, agreed in results.values() for key, c in agreed.items() if key[0] == precision]
        images, changed = sum(c.predictions for c in each), sum(c.changed for c in each)
        largest = max(c.relative for c in each)
        print(f"| {precision} | {len(each)} | {images} | {100 - 100 * changed / images:.3f} | {largest:.1e} |")


def speed(repeats=11):
    """Print the milliseconds of a training step, as a ratio to those of the same network in float, in turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nets = {
        "DigitsCNN of width 8, 64 digits": (DigitsCNN(8), torch.rand(64, 1, 8, 8)),
        "ResNet-20, 16 images of 32 x 32": (resnet20(), torch.rand(16, 3, 32, 32)),
    }
    ways = {
        "fp32": None,
        "32A-4W": {"weight_bits": 4, "activation_bits": None},
        **{name: options for name, options in PRECISIONS.items() if options},
    }
    print("\n| training step | " + " | ".join(ways) + " |")
    print("|---" * (len(ways) + 1) + "|")
    for name, (network, x) in nets.items():
        students = [copy.deepcopy(network) if o is None else quantize(network, **o) for o in ways.values()]
        optimizers = [SGD(student.parameters(), lr=0.01) for student in students]
        turns = []
        for _ in range(repeats):
            times = []
            for student, optimizer in zip(students, optimizers, strict=True):
                start = time.perf_counter()
                for _ in range(5):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(student(x), torch.zeros(len(x), dtype=torch.long)).backward()
                    optimizer.step()
                times.append(200 * (time.perf_counter() - start))
            turns.append(times)
        cells = [f"{statistics.median(turn[0] for turn in turns):.1f} ms"]
        for number in range(1, len(students)):
            ratios = sorted(turn[number] / turn[0] for turn in turns)
            cells.append(f"{statistics.median(ratios):.2f} times [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", action="store_true")
    options = parser.parse_args()
    if options.settings:
        settings(4)
    else:
        compare(options.seeds)
        speed()
    names = ("torch", "torchvision", "lightning", "scikit-learn", "brevitas", "onnxruntime")
    print(", ".join(f"{name} {version(name)}" for name in names))
