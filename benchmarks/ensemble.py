"""Three teachers, by every strategy, against each alone and against no teacher.

Run: python benchmarks/ensemble.py [--seeds 5] [--store FILE] [--processes 2]      (about 5 minutes)

Digits, 10 labels per class for the student, all training images. The teachers (a plain, a residual and a maxout
network) are trained on all training labels. Every student is the same network with the same initial weights, the same
number of steps and the same schedule. The steps are those of 40 epochs, or of 13 1/3 epochs with relabeling's three
views. benchmarks/digits_settings.py selected learning rate, temperature and soft weight on validation images, for one
teacher. The best single teacher is the one of the highest validation accuracy, for each seed. A seed sets split,
networks and order. Test images select nothing. A second table shows what it saves to compute teachers as one network.
"""

import copy
import statistics
import time
from functools import cache, partial

import torch
from training import Fits, accuracy, in_parallel, interval, make_parser, quiet, spread, train, versions

from kd_lightning import Batch, Digits, DistillModule, EnsembleDistillModule, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.losses import KDLoss
from kd_lightning.models import CifarResNet, DigitsCNN, FitNet, resnet20
from kd_lightning.teachers.ensemble import Ensemble

STEPS = 40 * 17  # of 64 images, of the 1078 in the training part
TEACHERS = {
    "plain": partial(DigitsCNN, 32),
    "residual": partial(CifarResNet, 8, num_classes=10, in_channels=1),
    "maxout": partial(FitNet, ((32, 32), (64, 64)), hidden=None, in_channels=1),
}
MODES = {
    "average": {"strategy": "average"},
    "average, by confidence": {"strategy": "average", "teacher_weights": "confidence"},
    "random, a batch": {"strategy": "random"},
    "random, a sample": {"strategy": "random", "draw_per": "sample"},
    "relabel": {"strategy": "relabel"},
}


def both(network, data):
    """Validation and test accuracy in percent."""
    return [accuracy(network, loader) for loader in (data.val_dataloader(), data.test_dataloader())]


def run(fits, seed):
    """All students of one seed: {name: test accuracy}."""
    make_data = partial(SemiSupervisedDataModule, Digits(), batch_size=64, seed=seed)

    @cache
    def teacher(name):
        return train(STEPS, seed, TEACHERS[name], SupervisedModule, make_data(), lr=0.005).student

    def student(method, teachers, **data):
        data = make_data(labeled=10, **data)
        method = partial(method, **teachers())
        return both(train(STEPS, seed, partial(DigitsCNN, 8), method, data, lr=0.03).student, data)

    def everyone():
        return [teacher(name) for name in TEACHERS]

    @torch.no_grad()
    def averaged():
        ensemble = Ensemble(everyone())
        right = [ensemble.pool(ensemble(batch)).argmax(dim=1) == batch.y for batch in make_data().test_dataloader()]
        return 100 * float(torch.cat(right).double().mean())

    def get(name, fit, *arguments, **options):
        return fits.get([seed, name], partial(fit, *arguments, **options))

    teachers = {name: get(f"teacher: {name}", lambda name=name: both(teacher(name), make_data())) for name in TEACHERS}
    found = {f"teacher: {name}": test for name, (_, test) in teachers.items()}
    found["teacher: all, averaged"] = get("teacher: all, averaged", averaged)
    few = {"unlabeled": "none", "views_per_epoch": 11}
    found["no teacher"] = get("no teacher", student, SupervisedModule, dict, **few)[1]
    settings = {"soft_loss": KDLoss(4.0), "soft_weight": 0.5}
    for name in TEACHERS:
        one = f"one teacher: {name}"
        method = partial(DistillModule, **settings)
        found[one] = get(one, student, method, lambda name=name: {"teacher": teacher(name)})[1]
    best = max(teachers, key=lambda name: teachers[name][0])
    found["one teacher: the best on validation"] = found[f"one teacher: {best}"]
    for name, mode in MODES.items():
        method = partial(EnsembleDistillModule, **mode, **settings)
        views = len(TEACHERS) if name == "relabel" else 1
        found[name] = get(name, student, method, lambda: {"teachers": everyone()}, views_per_epoch=views)[1]
    return found


def compare(fits, seeds, processes):
    """Print the table of accuracies."""
    results = in_parallel(partial(run, fits), range(seeds), processes)
    single = "one teacher: the best on validation"
    print("| test accuracy % | mean ± sd | ahead of no teacher [95 %] | ahead of the best single teacher's [95 %] |")
    print("|---|---|---|---|")
    columns = {name: [found[name] for found in results] for name in results[0]}
    for name, values in columns.items():
        cells = ["", ""]
        if not name.startswith("teacher") and name != "no teacher":
            cells = [interval(values, columns["no teacher"])]
            cells += [interval(values, columns[single]) if name in MODES else ""]
        print(f"| {name} | {spread(values)} | {' | '.join(cells)} |")


def speed(repeats=15):
    """Print the milliseconds of the teachers' outputs for a batch, one by one and as one network, in turns."""
    quiet()
    cases = {
        "3 DigitsCNN of width 8, 64 digits": ([DigitsCNN(8) for _ in range(3)], torch.rand(64, 1, 8, 8)),
        "8 DigitsCNN of width 8, 64 digits": ([DigitsCNN(8) for _ in range(8)], torch.rand(64, 1, 8, 8)),
        "8 DigitsCNN of width 8, 4 digits": ([DigitsCNN(8) for _ in range(8)], torch.rand(4, 1, 8, 8)),
        "3 ResNet-20, 16 images of 32 x 32": ([resnet20() for _ in range(3)], torch.rand(16, 3, 32, 32)),
    }
    print("\n| teachers | one by one, ms | as one, ms | ratio [least, most] | largest difference of a logit |")
    print("|---|---|---|---|---|")
    for name, (networks, x) in cases.items():
        ways = [Ensemble(copy.deepcopy(networks)), Ensemble(networks, use_vmap=True)]
        difference = float((ways[0](Batch(x)) - ways[1](Batch(x))).abs().max())
        turns = []
        for _ in range(repeats):
            times = []
            for way in ways:
                start = time.perf_counter()
                for _ in range(5):
                    way(Batch(x))
                times.append(200 * (time.perf_counter() - start))
            turns.append(times)
        ratios = sorted(one / loop for loop, one in turns)
        loop, one = (statistics.median(turn[n] for turn in turns) for n in (0, 1))
        middle = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"| {name} | {loop:.1f} | {one:.1f} | {middle} | {difference:.1e} |")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    compare(Fits(options.store), options.seeds, options.processes)
    speed()
    print(versions("scikit-learn"))
