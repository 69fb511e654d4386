"""The cost of a training step with each selection, compared with FixMatch.

Run: python benchmarks/selections_cost.py [--rounds 15] [--store FILE]   (5 minutes; exit status 1 if a goal is missed)

The network is the student of benchmarks/fashion.py. Views and batches are those of benchmarks/selections.py, 32 labeled
and 64 unlabeled images a step; the images are random, and lie in memory. Nothing listens to the selections. One thread
runs on one core, and times are CPU time. All contenders take turns within one process, a batch each. A ratio is the
median of the ratios of single epochs, which were measured in the same rounds; its spread is their 10th and 90th
percentile. "FixMatch, again" is the same contender once more: its ratio shows how much is noise.
"""

import argparse
import copy
import sys
import time
from functools import partial

from measuring import Table, log, set_environment, use_one_core

if __name__ == "__main__":
    set_environment()

import torch
from contenders import Steps, take_turns
from fashion import STUDENT
from selections_tasks import LABELED, MEAN, RULES, STD, UNLABELED
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from training import make_trainer, versions
from turns import Turns

from kd_lightning import (
    CompileNetworks,
    DatasetSource,
    FixedThreshold,
    OpenSetFilter,
    PseudoLabelModule,
    SemiSupervisedDataModule,
    TopKPerClass,
)
from kd_lightning.data.transforms import small_image_transforms, strong_small

STEPS, LABELS = 10, 100
"""Steps of an epoch, and images with a label."""
MOST = 1.02
BASE = "FixMatch"
SELECTIONS = {
    **{name: partial(make, values[0]) for name, (make, values) in RULES.items()},
    "FixMatch, again": partial(FixedThreshold, 0.8),
    "TopKPerClass": partial(TopKPerClass, 4),
    "FixMatch, OpenSetFilter": lambda: OpenSetFilter(FixedThreshold(0.8)),
}


def contender(student, selection, x, y, boundary, epochs):
    """Train a student with a selection."""
    weak, plain = small_image_transforms(MEAN, STD, 28, flip=True, padding=2)
    data = SemiSupervisedDataModule(
        DatasetSource(TensorDataset(x, y)),
        val_size=0,
        batch_size=LABELED + UNLABELED,
        labeled_batch_size=LABELED,
        train_transform=weak,
        strong_transform=strong_small(MEAN, STD, 28, padding=2),
        eval_transform=plain,
    )
    module = PseudoLabelModule(copy.deepcopy(student), selection=selection(), optimizer=partial(AdamW, lr=0.01))
    callbacks = [Steps(boundary), CompileNetworks(backend=None, channels_last=True)]
    make_trainer(max_epochs=epochs, callbacks=callbacks).fit(module, datamodule=data)


def measure(table, rounds, steps=STEPS):
    """Add the rows of all ratios."""
    generator = torch.Generator().manual_seed(0)
    count = LABELS + steps * UNLABELED
    x = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    y = (torch.arange(count) % 10).where(torch.arange(count) < LABELS, -1)
    torch.manual_seed(0)
    student = STUDENT()
    ways = {name: partial(contender, student, selection, x, y) for name, selection in SELECTIONS.items()}
    seconds = take_turns(ways, Turns(rounds + 1, steps), log)
    for name in SELECTIONS:
        if name != BASE:
            table.add(f"{name} / {BASE}", seconds[name], seconds[BASE], MOST, unit=(1000 / steps, "ms a step"))


def main():
    """Print the table. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of epochs")
    parser.add_argument("--store", help="file of finished parts: an interrupted run of the same code goes on")
    options = parser.parse_args()
    use_one_core()
    start, table = time.time(), Table(options.store)
    table.run("selections", {"rounds": options.rounds}, partial(measure, rounds=options.rounds))
    print(f"{versions()}\n{(time.time() - start) / 60:.0f} minutes")
    return int(table.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
