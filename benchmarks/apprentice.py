"""Students of low precision: without a teacher, and in the Apprentice's schemes A, B and C.

Run: python benchmarks/apprentice.py [--seeds 5] [--store FILE] [--processes 2]      (about 15 minutes)
     python benchmarks/apprentice.py --settings [--store FILE] [--processes 2]       (selects the settings; 4)

The student is DigitsCNN of width 8, the teacher one of width 32. There are two settings: all labels, and 10 labels per
class with the other training images unlabeled. Every run takes the same number of steps (those of 40 epochs). All
methods of a setting see the same views of the same images. The fixed teacher of B and C is trained on all training
labels. A's teacher sees the labels that the student sees. C starts from the seed's fp32 student without a teacher. A
seed sets split, networks and order. --settings selects learning rate and temperature on validation images alone. Test
images select nothing: "best" is the scheme of the highest mean validation accuracy at that precision.
"""

import copy
import itertools
import statistics
import tempfile
import time
from functools import cached_property, partial
from pathlib import Path

import torch
from ensemble import STEPS, both
from torch import nn
from torch.optim import SGD, AdamW
from training import Fits, in_parallel, interval, make_parser, quiet, spread, train, versions

from kd_lightning import (
    ActivationCalibration,
    ApprenticeModule,
    Digits,
    SemiSupervisedDataModule,
    SupervisedModule,
)
from kd_lightning.deploy.comparison import collect_logits, compare_logits
from kd_lightning.deploy.export import export_student, load_exported
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
FEW = "10 labels per class"
SETTINGS = {FEW: {"labeled": 10}, "all labels": {}}
SCHEMES = {"A": "joint", "B": "fixed_teacher", "C": "finetune"}
EXPORTED = ("8A-4W", "8A-ternary")
FLOAT_RATE = 0.03  # of the fp32 student alone, selected by benchmarks/digits_settings.py
RATE, TEMPERATURE = 0.01, 1.0  # the best, or level with the best, for every method


class Seed:
    """All trainings of one seed in one setting."""

    def __init__(self, seed, setting, val_size=0.1):
        self.seed = seed
        self.labels = SETTINGS[setting]
        self.make_data = partial(SemiSupervisedDataModule, Digits(), batch_size=64, seed=seed, val_size=val_size)

    @cached_property
    def teacher(self):
        """The fixed teacher of B and C."""
        return train(STEPS, self.seed, partial(DigitsCNN, 32), SupervisedModule, self.make_data(), lr=0.005).student

    @cached_property
    def first_weights(self):
        """The weights that C starts from."""
        return self._alone("fp32", FLOAT_RATE)[0].state_dict()

    def fit(self, precision, method, lr, temperature):
        """Train a student. Return it, and its validation and test accuracy in percent."""
        if method == "no teacher":
            return self._alone(precision, lr)
        arguments, fixed = {"soft_loss": KDLoss(temperature)}, None if method == "A" else self.teacher

        def make(student, **options):
            teacher = DigitsCNN(32) if fixed is None else fixed
            return ApprenticeModule(student, teacher, SCHEMES[method], **arguments, **options)

        if method == "A":
            arguments["teacher_optimizer"] = partial(AdamW, lr=0.005, weight_decay=0.01)
        with tempfile.TemporaryDirectory() as folder:
            if method == "C":
                arguments["initial_weights"] = Path(folder, "fp32.pt")
                torch.save(self.first_weights, arguments["initial_weights"])
            return self._train(precision, make, lr)

    def _alone(self, precision, lr):
        few = {"unlabeled": "none", "views_per_epoch": 11} if self.labels else {}
        return self._train(precision, SupervisedModule, lr, **few)

    def _train(self, precision, method, lr, **data):
        options, data = PRECISIONS[precision], self.make_data(**self.labels, **data)

        def make():
            return DigitsCNN(8) if options is None else quantize(DigitsCNN(8), **options)

        student = train(STEPS, self.seed, make, method, data, [ActivationCalibration()], lr).student
        return student, both(student, data)


def run(fits, case):
    """One seed and setting: {(precision, method): accuracies on validation and test images, and exports compared}."""
    seed, setting = case
    here = Seed(seed, setting)

    def fit(precision, method):
        rate = FLOAT_RATE if precision == "fp32" else RATE
        student, found = here.fit(precision, method, rate, TEMPERATURE)
        same = exported(student, here.make_data().test_dataloader()) if precision in EXPORTED else None
        return {"accuracy": found, "exported": same}

    plan = [("fp32", "no teacher")]
    plan += itertools.product([name for name in PRECISIONS if name != "fp32"], ("no teacher", *SCHEMES))
    return {key: fits.get([seed, setting, *key], partial(fit, *key)) for key in plan}


def exported(student, loader):
    """Compare the outputs of ONNX Runtime with those of PyTorch."""
    batches = [batch.x for batch in loader]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.onnx")
        export_student(student.eval(), batches[0], path, "onnx", {})
        found = collect_logits(load_exported(path, "onnx", nn.Identity), batches)
    predict = partial(predicted_labels, task="multiclass")
    return compare_logits(collect_logits(student, batches), found, predict)._asdict()


GRID = {  # learning rate and temperature
    "no teacher": [(0.01, None), (0.03, None)],
    "A": [(0.01, 1.0), (0.03, 1.0)],
    "B": [(0.01, 1.0), (0.03, 1.0), (0.03, 4.0)],
    "C": [(0.003, 1.0), (0.01, 1.0), (0.03, 1.0), (0.01, 4.0)],
}


def try_settings(fits, seed):
    """Validation accuracies of one seed over the grid."""
    here, found = Seed(seed, FEW, val_size=0.25), {}
    for key in ((method, *values) for method, grid in GRID.items() for values in grid):
        found[key] = fits.get([seed, *key], lambda key=key: here.fit("8A-ternary", *key)[1][0])
    return found


def settings(fits, processes):
    """Print the table of the search."""
    results = in_parallel(partial(try_settings, fits), range(100, 104), processes)
    print(f"| 8A-ternary, {FEW} | learning rate | temperature | validation accuracy % |\n|---|---|---|---|")
    for method, lr, temperature in results[0]:
        values = [found[method, lr, temperature] for found in results]
        print(f"| {method} | {lr} | {temperature or ''} | {spread(values)} |")


def compare(fits, seeds, processes):
    """Print the tables of accuracies."""
    cases = [*itertools.product(range(seeds), SETTINGS)]
    results = dict(zip(cases, in_parallel(partial(run, fits), cases, processes), strict=True))
    for setting in SETTINGS:
        found = [results[seed, setting] for seed in range(seeds)]
        column = {key: list(zip(*(one[key]["accuracy"] for one in found), strict=True)) for key in found[0]}
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
        each = [one["exported"] for found in results.values() for key, one in found.items() if key[0] == precision]
        images, changed, largest = ([one[name] for one in each] for name in ("predictions", "changed", "relative"))
        images, same = sum(images), 100 - 100 * sum(changed) / sum(images)
        print(f"| {precision} | {len(each)} | {images} | {same:.3f} | {max(largest):.1e} |")


def speed(repeats=11):
    """Print the milliseconds of a training step, as a ratio to those of the same network in float, in turns."""
    quiet()
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
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", action="store_true")
    options = parser.parse_args()
    fits = Fits(options.store)
    if options.settings:
        settings(fits, options.processes)
    else:
        compare(fits, options.seeds, options.processes)
        speed()
    print(versions("scikit-learn", "brevitas", "onnxruntime"))
