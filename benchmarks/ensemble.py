"""Three teachers, by every strategy, against each alone and against no teacher.

Run: python benchmarks/ensemble.py [--seeds 5]      (about 10 minutes on two cores)

Digits, 10 labels per class for the student, all training images. The teachers (a plain, a residual and a maxout
network) are trained on all training labels. Every student is the same network with the same initial weights, the same
number of steps and the same schedule. The steps are those of 40 epochs, or of 13 1/3 epochs with relabeling's three
views. benchmarks/digits_settings.py selected learning rate, temperature and soft weight on validation images, for one
teacher. The best single teacher is the one of the highest validation accuracy, for each seed. A seed sets split,
networks and order. Test images select nothing. A second table shows what it saves to compute teachers as one network.
"""

import argparse
import copy
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context

import torch
from lightning.pytorch import Trainer, seed_everything
from scipy import stats
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

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


def optimised(lr):
    """The optimiser and the schedule, by steps."""
    return {
        "optimizer": partial(AdamW, lr=lr, weight_decay=0.01),
        "lr_scheduler": partial(CosineAnnealingLR, T_max=STEPS),
        "lr_interval": "step",
    }


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
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == STEPS
    return [100 * accuracy(module.student, loader) for loader in (data.val_dataloader(), data.test_dataloader())]


@torch.no_grad()
def accuracy(network, loader):
    """The share of samples that the network predicts right."""
    network.eval()
    right = torch.cat([network(batch.x).argmax(dim=1) == batch.y for batch in loader])
    return float(right.double().mean())


def run(seed):
    """All students of one seed: {name: test accuracy}."""
    torch.set_num_threads(1)
    make_data = partial(SemiSupervisedDataModule, Digits(), batch_size=64, seed=seed)
    teachers, validated, found = {}, {}, {}
    for name, make in TEACHERS.items():
        seed_everything(seed, verbose=False)
        teachers[name] = make()
        module = SupervisedModule(teachers[name], **optimised(0.005))
        validated[name], found[f"teacher: {name}"] = fit(module, make_data())

    def train(name, make, **data):
        seed_everything(seed, verbose=False)
        _, found[name] = fit(make(DigitsCNN(8)), make_data(labeled=10, **data))
        print(f"seed {seed} {name}: {found[name]:.2f}", flush=True)

    settings = {"soft_loss": KDLoss(4.0), "soft_weight": 0.5, **optimised(0.03)}
    train("no teacher", partial(SupervisedModule, **optimised(0.03)), unlabeled="none", views_per_epoch=11)
    for name, teacher in teachers.items():
        train(f"one teacher: {name}", partial(DistillModule, teacher=teacher, **settings))
    best = max(validated, key=validated.__getitem__)
    found["one teacher: the best on validation"] = found[f"one teacher: {best}"]
    everyone = [*teachers.values()]
    for name, mode in MODES.items():
        views_per_epoch = len(everyone) if name == "relabel" else 1
        train(
            name, partial(EnsembleDistillModule, teachers=everyone, **mode, **settings), views_per_epoch=views_per_epoch
        )
    ensemble = Ensemble(everyone)
    test = make_data().test_dataloader()
    right = [ensemble.pool(ensemble(batch)).argmax(dim=1) == batch.y for batch in test]
    found["teacher: all, averaged"] = 100 * float(torch.cat(right).double().mean())
    return found


def interval(mine, others):
    """Paired difference with its 95 % interval."""
    gaps = [one - other for one, other in zip(mine, others, strict=True)]
    half = stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    mean = statistics.mean(gaps)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def compare(seeds):
    """Print the table of accuracies."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = list(pool.map(run, range(seeds)))
    single = "one teacher: the best on validation"
    print("\n| test accuracy % | mean ± sd | ahead of no teacher [95 %] | ahead of the best single teacher's [95 %] |")
    print("|---|---|---|---|")
    columns = {name: [found[name] for found in results] for name in results[0]}
    for name, values in sorted(columns.items(), key=lambda item: item[0].startswith("teacher"), reverse=True):
        cells = ["", ""]
        if not name.startswith("teacher") and name != "no teacher":
            cells = [interval(values, columns["no teacher"])]
            cells += [interval(values, columns[single]) if name in MODES else ""]
        print(f"| {name} | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} | {' | '.join(cells)} |")


def speed(repeats=15):
    """Print the milliseconds of the teachers' outputs for a batch, one by one and as one network, in turns."""
    torch.set_num_threads(1)
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
        spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"| {name} | {loop:.1f} | {one:.1f} | {spread} | {difference:.1e} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    compare(parser.parse_args().seeds)
    speed()
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", "scikit-learn")))
