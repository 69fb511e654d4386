"""The cost of feature distillation, compared with the student alone, a plain loop, and distillation without features.

Run: python benchmarks/feature_speed.py [--rounds 15] [--store FILE]  (10 minutes; exit status 1 if a goal is missed)

A ResNet-32 teaches a ResNet-8 on 1,280 random images of 32 x 32 pixels in memory, in batches of 64. One thread runs on
one core, and times are CPU time. All contenders take turns within one process, a batch each. A ratio is the median of
the ratios of single epochs, which were measured in the same rounds; its spread is their 10th and 90th percentile.
Caches are full. Terms: "vector" is the cosine distance of the last pooled features, "map" FitNets' loss between the
last maps, through a 1x1 convolution, both beside KD. "Captured" are three layers, whose loss is 0.
"""

import argparse
import copy
import sys
import tempfile
import time
from functools import partial

from measuring import Table, log, set_environment, use_one_core

if __name__ == "__main__":
    set_environment()

import torch
import torch.nn.functional as F
from contenders import SOFT_WEIGHT, alone, lightning, sgd, soft_targets, take_turns
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import versions
from turns import Turns

from kd_lightning import DistillModule, FeatureTerm, Teacher
from kd_lightning.losses import CosineLoss, HintLoss, KDLoss
from kd_lightning.models import resnet8, resnet32

BATCH, SIZE, CLASSES = 64, 1280, 100
HINT_WEIGHT = 0.001
LAYERS = ("layer1", "layer2", "layer3")
RATIOS = [  # of, over, at most
    ("vector, cached", "student alone", 1.1),
    ("map, cached", "student alone", 1.1),
    ("map, live", "plain loop with maps", 1.05),
    ("captured", "KD", 1.02),
]


class Nothing(nn.Module):
    """A feature loss of 0 that computes nothing."""

    needs_projector = False

    def forward(self, student_feature, teacher_feature, batch=None):
        """Return 0."""
        return student_feature.new_zeros(())


def plain(student, teacher, x, y, boundary, epochs):
    """A loop written by hand: KD and hints, with hooks on the last maps."""
    maps = {}
    for name, network in (("student", student), ("teacher", teacher)):
        network.layer3.register_forward_hook(lambda _, __, output, name=name: maps.update({name: output}))
    projector = nn.Conv2d(64, 64, 1)
    optimizer = sgd([*student.parameters(), *projector.parameters()])
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
    student.train()
    teacher.eval()
    for _ in range(epochs):
        for images, labels in loader:
            boundary()
            with torch.no_grad():
                target = teacher(images)
            logits = student(images)
            hard, soft = F.cross_entropy(logits, labels), soft_targets(logits, target)
            distance = projector(maps["student"]) - maps["teacher"]
            hint = distance.square().sum() / (2 * len(images))
            optimizer.zero_grad()
            ((1 - SOFT_WEIGHT) * hard + SOFT_WEIGHT * soft + HINT_WEIGHT * hint).backward()
            optimizer.step()


def distilled(student, teacher, term=None, cache=None):
    """The student under one teacher, with one feature term or none."""
    options = {} if term is None else {"features": {"feature": term()}}
    options |= {"soft_loss": KDLoss(4.0), "soft_weight": SOFT_WEIGHT, "optimizer": sgd}
    return DistillModule(copy.deepcopy(student), Teacher(copy.deepcopy(teacher), cache=cache), **options)


def measure(table, rounds, size=SIZE):
    """Add the rows of all ratios."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 3, 32, 32, generator=generator), torch.randint(CLASSES, (size,), generator=generator)
    torch.manual_seed(0)
    student, teacher = resnet8(CLASSES), resnet32(CLASSES)
    vector = partial(FeatureTerm, {"flatten": "flatten"}, CosineLoss(), 1.0)
    maps = partial(FeatureTerm, {"layer3": "layer3"}, HintLoss(), HINT_WEIGHT)
    nothing = partial(FeatureTerm, {name: name for name in LAYERS}, Nothing(), 1.0)
    make = partial(distilled, student, teacher)
    with tempfile.TemporaryDirectory() as cache:
        modules = {
            "student alone": partial(alone, copy.deepcopy(student)),
            "vector, cached": partial(make, vector, cache),
            "map, cached": partial(make, maps, cache),
            "map, live": partial(make, maps),
            "captured": partial(make, nothing),
            "KD": make,
        }
        ways = {name: partial(lightning, module, x, y) for name, module in modules.items()}
        ways["plain loop with maps"] = partial(plain, copy.deepcopy(student), copy.deepcopy(teacher), x, y)
        seconds = take_turns(ways, Turns(rounds + 1, size // BATCH), log)
    for of, over, most in RATIOS:
        table.add(f"{of} / {over}", seconds[of], seconds[over], most, unit=(1, "s an epoch"))


def main():
    """Print the table. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="number of epochs")
    parser.add_argument("--store", help="file of finished parts: an interrupted run of the same code goes on")
    options = parser.parse_args()
    use_one_core()
    start, table = time.time(), Table(options.store)
    table.run("features", {"rounds": options.rounds}, partial(measure, rounds=options.rounds))
    print(f"{versions()}\n{(time.time() - start) / 60:.0f} minutes")
    return int(table.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
