"""Fashion-MNIST: few and all labels, alone and distilled, with and without mixup; and a long tail of classes.

Run: python benchmarks/fashion.py --package DIR --prepare data/fashion             (a minute)
     python benchmarks/fashion.py --settings [--store FILE] [--processes 2]        (selects the settings)
     python benchmarks/fashion.py [--seeds 3] [--store FILE] [--processes 2]

Package, in the folder DIR: apt-get download dataset-fashion-mnist (MIT). 50,000 images train, the last 10,000 of the
training part validate, 10,000 test. Settings are selected on validation images with a seed that serves nothing else, as
many tries for each method. A seed sets labels, initial weights and order; differences are paired by seed.

- Labels: 10 of each class (distilled: the other images without labels), or all.
- The teacher is a ResNet-8 of 16, 16, 32, 64 channels, trained on all labels. The student is
  one of 8, 8, 16, 32 channels.
- The long tail has an exponential profile (Cao et al. 2019), from 5000 images of the first class to 50 of the last.
"""

import gzip
import itertools
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import TensorDataset
from torchvision.datasets import FashionMNIST
from training import Fits, in_parallel, interval, make_parser, quiet, spread, train, versions

from kd_lightning import DatasetSource, DistillModule, SemiSupervisedDataModule, SupervisedModule, Teacher
from kd_lightning.data.transforms import MixUp, small_image_transforms
from kd_lightning.losses import KDLoss
from kd_lightning.models import CifarResNet

VAL = 10_000
STEPS, TEACHER_STEPS, BATCH = 1000, 3000, 64
RATIO, MOST = 100, 5000
SETTING_SEED = 100
TEACHER = partial(CifarResNet, 8, (16, 16, 32, 64), num_classes=10, in_channels=1)
STUDENT = partial(CifarResNet, 8, (8, 8, 16, 32), num_classes=10, in_channels=1)
GRID = {"lr": (0.01, 0.03)}
MIXES = {"": None, "mixup": MixUp(0.2)}
TAIL = {"plain": {}, "sampler": {"sampler": "balanced"}, "class weights": {}}
LR = dict.fromkeys(  # of each case that is not 0.01
    [
        ("10 labels", "distilled", ""),
        ("10 labels", "distilled", "mixup"),
        ("all labels", "alone", ""),
        ("all labels", "alone", "mixup"),
        ("all labels", "distilled", ""),
        ("plain",),
        ("sampler",),
    ],
    0.03,
)
CASES = [*itertools.product(("10 labels", "all labels"), ("alone", "distilled"), MIXES)]


def prepare(package, folder):
    """Unpack the images where torchvision finds them."""
    raw = folder / "FashionMNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked:
        (deb,) = package.glob("dataset-fashion-mnist_*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, unpacked], check=True)
        for file in Path(unpacked).rglob("*-ubyte.gz"):
            with gzip.open(file) as source, (raw / file.stem).open("wb") as target:
                shutil.copyfileobj(source, target)


class Images:
    """The images, and the training of each method.

    Args:
        folder: Folder that ``prepare`` has written. The teacher's weights and outputs lie there, too.
        part: The part that is measured: ``"val"`` or ``"test"``.
        seed: Seed of labels, networks and order.
    """

    def __init__(self, folder, part, seed):
        self.folder, self.part, self.seed = Path(folder), part, seed
        whole, test = (FashionMNIST(folder, train=train) for train in (True, False))
        self.parts = {
            "train": (whole.data[:-VAL].unsqueeze(1), whole.targets[:-VAL]),
            "val": (whole.data[-VAL:].unsqueeze(1), whole.targets[-VAL:]),
            "test": (test.data.unsqueeze(1), test.targets),
        }

    def make_data(self, rows=None, **options):
        """The datamodule; ``rows`` selects training images."""
        x, y = self.parts["train"]
        rows = slice(None) if rows is None else rows
        source = DatasetSource(TensorDataset(x[rows], y[rows]), TensorDataset(*self.parts[self.part]))
        train_transform, eval_transform = small_image_transforms([0.2860], [0.3530], 28, flip=True, padding=2)
        options |= {"train_transform": train_transform, "eval_transform": eval_transform}
        return SemiSupervisedDataModule(source, val_size=0, batch_size=BATCH, seed=self.seed, **options)

    def fit(self, method, data, lr, steps=STEPS, network=STUDENT, callbacks=()):
        """Train, and return the network, its accuracy and its balanced accuracy in %."""
        module = train(steps, self.seed, network, method, data, callbacks, lr)
        found = module.student.eval()
        with torch.no_grad():
            predicted = torch.cat([found(batch.x).argmax(dim=1) for batch in data.test_dataloader()])
        y = self.parts[self.part][1]
        balanced = 100 * float(balanced_accuracy_score(y.numpy(), predicted.numpy()))
        return found, {"accuracy": 100 * float((predicted == y).double().mean()), "balanced": balanced}

    def teach(self):
        """Train the teacher on all labels of the training images, and store its weights."""
        network, found = self.fit(SupervisedModule, self.make_data(), 0.01, TEACHER_STEPS, TEACHER)
        torch.save(network.state_dict(), self.folder / "teacher.pt")
        return found

    def case(self, labels, method, mix, lr):
        """Train from few or all labels, alone or distilled."""
        labeled = 10 if labels == "10 labels" else None
        options = {"labeled": labeled, "mix": MIXES[mix]}
        if method == "alone":
            views = 1 if labeled is None else -(-BATCH * 50 // 100)  # an epoch of 50 steps
            data = self.make_data(unlabeled="none", views_per_epoch=views, **options)
            return self.fit(SupervisedModule, data, lr)[1]
        network = TEACHER()
        network.load_state_dict(torch.load(self.folder / "teacher.pt", weights_only=True))
        teacher = Teacher(network)
        made = partial(DistillModule, teacher=teacher, soft_loss=KDLoss(4.0), soft_weight=0.9)
        return self.fit(made, self.make_data(**options), lr)[1]

    def tail(self, way, lr):
        """Train from the long tail, plainly or balanced."""
        y = self.parts["train"][1]
        counts = [round(MOST * RATIO ** (-number / 9)) for number in range(10)]
        generator = torch.Generator().manual_seed(self.seed)
        members = [(y == number).nonzero().flatten() for number in range(10)]
        rows = torch.cat(
            [m[torch.randperm(len(m), generator=generator)[:n]] for m, n in zip(members, counts, strict=True)]
        )
        weights = {"class_weights": "balanced"} if way == "class weights" else {}
        data = self.make_data(rows.sort().values, **TAIL[way])
        return self.fit(partial(SupervisedModule, **weights), data, lr)[1]


def get(fits, folder, part, case):
    """The figures of one fit."""
    seed, kind, names, lr = case
    images = Images(folder, part, seed)
    return fits.get([part, seed, kind, names, lr], partial(getattr(images, kind), *names, lr=lr))


def every_case():
    """Kind and names of each case."""
    return [*(("case", names) for names in CASES), *(("tail", (way,)) for way in TAIL)]


def settings(fits, folder, processes):
    """Print the figures of each learning rate, on validation images."""
    cases = [(SETTING_SEED, kind, names, lr) for kind, names in every_case() for lr in GRID["lr"]]
    found = in_parallel(partial(get, fits, folder, "val"), cases, processes)
    print("| case | lr | accuracy % | balanced accuracy % |\n|---|---|---|---|")
    for (_, _, names, lr), figures in zip(cases, found, strict=True):
        print(f"| {', '.join(filter(None, names))} | {lr} | {figures['accuracy']:.2f} | {figures['balanced']:.2f} |")


def compare(fits, folder, seeds, processes, teacher):
    """Print the tables of test figures, and of paired differences."""
    cases = [(seed, kind, names, LR.get(names, 0.01)) for kind, names in every_case() for seed in range(seeds)]
    found = in_parallel(partial(get, fits, folder, "test"), cases, processes)
    values = {}
    for (_, _, names, _), figures in zip(cases, found, strict=True):
        values.setdefault(names, []).append(figures)
    accuracy = {names: [one["accuracy"] for one in values[names]] for names in CASES}
    print(f"teacher: {teacher['accuracy']:.2f} % of the test images\n")
    print("| labels | student | accuracy % | over alone | over the same without mixup |\n|---|---|---|---|---|")
    for labels, method, mix in CASES:
        own = accuracy[labels, method, mix]
        alone = interval(own, accuracy[labels, "alone", mix]) if method == "distilled" else ""
        plain = interval(own, accuracy[labels, method, ""]) if mix else ""
        name = f"{method}{', ' + mix if mix else ''}"
        print(f"| {labels} | {name} | {spread(own)} | {alone} | {plain} |")
    balanced = {way: [one["balanced"] for one in values[way,]] for way in TAIL}
    print("\n| long tail 100:1 | balanced accuracy % | over plain |\n|---|---|---|")
    for way, own in balanced.items():
        print(f"| {way} | {spread(own)} | {'' if way == 'plain' else interval(own, balanced['plain'])} |")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--package", type=Path, help="folder of the package, for --prepare")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="unpack the images to this folder, and end")
    parser.add_argument("--folder", default="data/fashion", help="folder that --prepare has written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", action="store_true", help="select the settings, on validation images")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.package, options.prepare)
        raise SystemExit
    quiet()
    fits = Fits(options.store)
    teacher = fits.get(["teacher"], Images(options.folder, "test", 0).teach)
    if options.settings:
        settings(fits, options.folder, options.processes)
    else:
        compare(fits, options.folder, options.seeds, options.processes, teacher)
    print(versions("scikit-learn"))
