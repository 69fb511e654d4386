"""FitNets' two stages against labels, distillation, and joint training, on a thin student of 18 layers.

Run: python benchmarks/hints.py [--seeds 10] [--store FILE] [--processes 2]             (the tables; about 15 minutes)
     python benchmarks/hints.py --search [--seeds 4] [--store FILE] [--processes 2]     (selects the settings; 30)

The student has 17 convolutions of 8 channels with ReLU and a linear layer, no shortcuts, no BatchNorm, and torch's
default initial weights. Digits, all training labels, no augmentation. All methods get the same images and the same
number of steps. Each has its own best constant learning rate. The search selects it on validation images (a quarter of
the training images), with seeds that serve nothing else. The tables have the accuracy on test images, after training on
all training images. A seed sets split, teacher, initial weights and order, and is the same for all methods.
"""

import copy
import itertools
import statistics
import time
from functools import cache, partial

import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import Fits, in_parallel, interval, make_parser, make_trainer, measure, quiet, spread, versions

from kd_lightning import (
    Digits,
    DistillModule,
    HintModule,
    SemiSupervisedDataModule,
    SoftWeightAnnealing,
    SupervisedModule,
)
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN, FitNet, vgg13

EPOCHS, HINT_EPOCHS = 60, 30
HINTS = {
    **{"stage1.2": "5", "stage1.4": "5"},
    **{"stage2.1": "9", "stage2.3": "9", "stage2.5": "9"},
    **{"stage3.1": "9", "stage3.3": "9", "stage3.5": "9", "pool": "10"},
}
SELECTED = {  # by --search
    "labels": {"lr": 0.0005},
    "distillation": {"lr": 0.001},
    "joint": {"lr": 0.007, "hint_weight": 0.01},
    "two-stage": {"lr": 0.003, "hint_lr": 0.007},
}
RATES = (0.0002, 0.0005, 0.001, 0.002, 0.003)
GRID = {
    "labels": {"lr": RATES},
    "distillation": {"lr": RATES},
    "joint": {"lr": (0.001, 0.002, 0.003, 0.005, 0.007), "hint_weight": (0.001, 0.01, 0.1)},
    "two-stage": {"lr": (0.002, 0.003, 0.005), "hint_lr": (0.007,)},
}
ANNEALED = {"start": 0.31, "end": 0.10}  # FitNets' lambda from 4 to 1 at temperature 3


def make_student(init):
    """The thin deep student, with torch's initial weights, or those of He et al. (2015)."""
    student = FitNet(((8,) * 5, (8,) * 6, (8,) * 6), hidden=None, maxout=False, in_channels=1)
    for layer in student.modules():
        if init == "He" and isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return student


def make_module(method, teacher, *, lr, hint_lr=None, hint_weight=0.0, init="default", relu=False):
    """A method around a new student."""
    student, optimizer = make_student(init), partial(Adam, lr=lr)
    if method == "labels":
        return SupervisedModule(student, optimizer=optimizer)
    distilled = {"soft_loss": KDLoss(temperature=3.0), "soft_weight": 0.31, "optimizer": optimizer}
    if method == "distillation":
        return DistillModule(student, teacher, **distilled)
    epochs = HINT_EPOCHS if method == "two-stage" else 0
    hints = {"hint_epochs": epochs, "hint_weight": hint_weight, "input_shape": [1, 8, 8]}
    hints["hint_optimizer"] = partial(Adam, lr=hint_lr) if hint_lr else None
    module = HintModule(student, teacher, HINTS, **hints, **distilled)
    if relu:  # as in the paper
        for projector in module.projectors.values():
            projector.append(nn.ReLU())
    return module


def fit(module, data, epochs=EPOCHS):
    """Train to the last step. Return the accuracy."""
    annealing = [SoftWeightAnnealing(**ANNEALED)] if isinstance(module, DistillModule) else []
    make_trainer(max_epochs=epochs, callbacks=annealing).fit(module, datamodule=data)
    return measure(module, data)


def run(seed, plan, *, fits, val_size):
    """All runs of a plan on one split: {name: accuracy}, on validation images if there are any, else on test images."""
    plain = {"train_transform": nn.Identity()}  # no augmentation
    make_data = partial(SemiSupervisedDataModule, Digits(), val_size=val_size, batch_size=32, seed=seed, **plain)

    @cache
    def teacher():
        seed_everything(seed, verbose=False)
        optimizer, schedule = partial(AdamW, lr=0.005, weight_decay=0.01), partial(CosineAnnealingLR, T_max=40)
        module = SupervisedModule(DigitsCNN(32), optimizer=optimizer, lr_scheduler=schedule)
        return module.student, fit(module, make_data(), epochs=40)

    def student(method, settings):
        network, _ = teacher()
        seed_everything(seed, verbose=False)
        return fit(make_module(method, network, **settings), make_data())

    found = {"teacher": fits.get([seed, val_size, "teacher"], lambda: teacher()[1])}
    for name, (method, settings) in plan.items():
        found[name] = fits.get([seed, val_size, method, settings], partial(student, method, settings))
    return found


def step_times(module, x, y, steps):
    """Yield the milliseconds of a training step on the batch (forward, backward and update), without end."""
    optimizer = module.configure_optimizers()
    while True:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            module.training_step((x, y), 0).backward()
            optimizer.step()
        yield 1000 * (time.perf_counter() - start) / steps


def steps_table(repeats=15):
    """Print the cost of a step of stage 1 and of stage 2, in turns, on the same batch."""
    quiet()
    digits, images = torch.rand(32, 1, 8, 8), torch.rand(16, 3, 32, 32)
    cases = {
        "digits, the middle layer alone": (make_student("default"), DigitsCNN(32), {"stage2.2": "9"}, digits, 20),
        "digits, all nine pairs": (make_student("default"), DigitsCNN(32), HINTS, digits, 20),
        "cifar100_fitnet.yaml (FitNet 4, VGG-13)": (FitNet(num_classes=100), vgg13(), {"pool2": "layer3"}, images, 2),
    }
    print("| networks and hints | stage 1, ms a step | stage 2 | ratio |\n|---|---|---|---|")
    for name, (student, teacher, hints, x, steps) in cases.items():
        clocks = []
        for epochs in (1, 0):
            shape = [*x.shape[1:]]
            module = HintModule(copy.deepcopy(student), teacher, hints, epochs, input_shape=shape)
            clocks.append(step_times(module, x, torch.arange(len(x)) % 10, steps))
        turns = [[next(clock) for clock in clocks] for _ in range(repeats + 2)][2:]
        ratios = sorted(first / second for first, second in turns)
        first, second = (statistics.median(turn[n] for turn in turns) for n in (0, 1))
        spread_of = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"| {name} | {first:.1f} | {second:.1f} | {spread_of} |")


def search(fits, seeds, processes):
    """Print the validation accuracies of all settings."""
    plan = {}
    for method, grid in GRID.items():
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            plan[", ".join([method, *(f"{key} {value:g}" for key, value in settings.items())])] = (method, settings)
    of_seed = partial(run, plan=plan, fits=fits, val_size=0.25)
    results = in_parallel(of_seed, range(100, 100 + seeds), processes)
    print("| method and settings | validation accuracy % | each seed |\n|---|---|---|")
    for name in results[0]:
        values = [found[name] for found in results]
        print(f"| {name} | {spread(values, 1)} | {' '.join(f'{value:.1f}' for value in values)} |")


def compare(fits, seeds, processes):
    """Print the test accuracies of the selected settings, and the cost of a step."""
    plan = {name: (name, settings) for name, settings in SELECTED.items()}
    others = {"two-stage, ReLU behind the projectors": ("two-stage", SELECTED["two-stage"] | {"relu": True})}
    he = {"lr": 0.003, "init": "He"}  # one rate for all, without a search
    others |= {f"{name}, He's initial weights": (name, he) for name in ("labels", "distillation")}
    others |= {"two-stage, He's initial weights": ("two-stage", he | {"hint_lr": 0.007})}
    results = in_parallel(partial(compare_seed, plan=plan, others=others, fits=fits), range(seeds), processes)
    print("| method | seeds | accuracy % | each seed | two-stage is ahead by [95 %] |\n|---|---|---|---|---|")
    for name in results[0]:
        values = [found[name] for found in results if name in found]
        best = "two-stage, He's initial weights" if name.endswith("weights") else "two-stage"
        mine = [found[best] for found in results if name in found]
        gap = "" if name in ("teacher", best) else interval(mine, values, 1)
        each = " ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {len(values)} | {spread(values, 1)} | {each} | {gap} |")
    print()
    steps_table()


def compare_seed(seed, plan, others, fits):
    """Run one seed; the variants run on the first five seeds alone."""
    return run(seed, plan | others if seed < 5 else plan, fits=fits, val_size=0)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--search", action="store_true")
    options = parser.parse_args()
    table, seeds = (search, 4) if options.search else (compare, 10)
    table(Fits(options.store), options.seeds or seeds, options.processes)
    print(versions("scikit-learn"))
