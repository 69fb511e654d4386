"""Segmentation: a small U-Net with few labels, alone, distilled from a large one, and with pseudo-labels.

Run: python benchmarks/segmentation.py --packages DIR --prepare FOLDER    (composes the pictures; a minute)
     python benchmarks/segmentation.py --data FOLDER [--store FILE]       (about 35 minutes on one core)
     python benchmarks/segmentation.py --data FOLDER --settings [--store FILE]    (selects the settings; about 25)
     python benchmarks/segmentation.py --data FOLDER --picture FILE       (draws labels and predictions)

DIR has two packages: ``apt-get download tuxpaint-stamps-default`` (GPL-2) and ``pip download --no-deps scikit-image``.

Pictures are composed of objects cut out by their alpha channel (stamps.py): 64 x 64 pixels, background and four
classes, 2400 for training, 300 for validation and 600 for test. No stamp is in two parts, so that the objects of the
test are new. The teacher trains on all 2400 masks. Students get 50 masks, and the other 2350 pictures without masks.
All students have one network, schedule, number of steps, and pictures in a batch. Their settings come from
validation pictures, with as many tries for the student alone as for the distilled one; the last weights are tested. A
seed sets the 50 pictures, the network and the order. Differences are paired by seed.
"""

import itertools
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import middle_and_spread
from PIL import Image
from safetensors.torch import load_file, save_file
from stamps import CLASSES, prepare
from torch import nn
from torchmetrics import JaccardIndex
from training import Fits, in_parallel, interval, make_parser, make_trainer, quiet, spread, train, versions

from kd_lightning import (
    DistillModule,
    FixedThreshold,
    PseudoLabelModule,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.data import ImageMaskFolder
from kd_lightning.data.transforms import ColorJitter, Compose, Normalize, RandomHorizontalFlip, strong_colors
from kd_lightning.losses import KDLoss
from kd_lightning.models import UNet

LABELS = 50
STEPS, BATCH, LABELED = 1200, 16, 4  # 6 epochs
TEACHER_STEPS, TEACHER_LR = 4500, 0.01  # 30 epochs
VIEWS = 4
TEACHER = partial(UNet, width=16, depth=3, num_classes=len(CLASSES))
STUDENT = partial(UNet, width=8, depth=3, num_classes=len(CLASSES))

GRID = {
    "alone": {"lr": (0.01, 0.03), "crops": (False, True)},
    "distilled": {"lr": (0.01, 0.03), "temperature": (1.0, 4.0)},
    "pseudo_labels": {"threshold": (0.8, 0.95)},
}
BEST = {
    "alone": {"lr": 0.03, "crops": True},
    "distilled": {"lr": 0.01, "temperature": 4.0},
    "pseudo_labels": {"threshold": 0.95},
}


def plain_views():
    """Mirror images and other colours."""
    normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return Compose([RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4), normalize])


class Pictures:
    """Students and their teacher on the composed pictures.

    Args:
        folder: Folder of the pictures. The teacher's weights and stored outputs lie there, too.
        part: The part that is measured, ``"val"`` or ``"test"``.
        seed: Seed of the labeled pictures, the networks and the order.
    """

    def __init__(self, folder, part, seed):
        self.folder = Path(folder)
        self.part = part
        self.seed = seed

    def make_data(self, *, crops=False, **options):
        """The datamodule. Validation pictures are a folder of their own, since their stamps are, too.

        Args:
            crops: Whether training crops at random, as the source does by default. Objects already have random places
                and sizes: without crops, large networks learn the pictures in fewer steps.
            options: Arguments of the datamodule.
        """
        train, test = (str(self.folder / part) for part in ("train", self.part))
        source = ImageMaskFolder(train, test, class_names=[*CLASSES], image_size=64)
        options |= {} if crops else {"train_transform": plain_views()}
        return SemiSupervisedDataModule(source, val_size=0, batch_size=BATCH, seed=self.seed, **options)

    def fit(self, method, data, network=STUDENT, steps=STEPS, lr=0.01):
        """Train to the last step and test. Return the student's weights, and its mean IoU and accuracy in %."""

        def make():  # this memory layout takes about 3/4 of the time
            return network().to(memory_format=torch.channels_last)

        module = train(steps, self.seed, make, partial(method, class_dim=1), data, lr=lr)
        (found,) = make_trainer().test(module, datamodule=data, verbose=False)
        weights = {name: tensor.contiguous() for name, tensor in module.student.state_dict().items()}
        return weights, {name: 100 * found[f"test/{name}"] for name in ("mean_iou", "accuracy")}

    def teach(self):
        """Train the teacher on all masks, and store its weights."""
        weights, found = self.fit(SupervisedModule, self.make_data(), TEACHER, TEACHER_STEPS, TEACHER_LR)
        save_file(weights, self.folder / "teacher.safetensors")
        return found

    def teacher(self):
        """The trained teacher's network."""
        network = TEACHER()
        network.load_state_dict(load_file(self.folder / "teacher.safetensors"))
        return network

    def alone(self, crops, **settings):
        """Train on the labeled pictures alone."""
        passes = -(-self.size() // LABELS)
        data = self.make_data(crops=crops, labeled=LABELS, unlabeled="none", views_per_epoch=passes)
        return self.stored("alone", *self.fit(SupervisedModule, data, **settings))

    def distilled(self, temperature, soft_weight=0.9, **settings):
        """Train on the labeled pictures, and on the teacher's outputs for all."""
        teacher = Teacher(self.teacher(), cache=self.folder / "outputs")
        method = partial(DistillModule, teacher=teacher, soft_loss=KDLoss(temperature), soft_weight=soft_weight)
        data = self.make_data(labeled=LABELS, labeled_batch_size=LABELED, num_views=VIEWS)
        return self.stored("distilled", *self.fit(method, data, **settings))

    def pseudo_labels(self, threshold, **settings):
        """FixMatch for each pixel, without any teacher."""
        options = {"labeled_batch_size": LABELED, "strong_transform": strong_colors()}
        method = partial(PseudoLabelModule, selection=FixedThreshold(threshold))
        return self.stored("pseudo_labels", *self.fit(method, self.make_data(labeled=LABELS, **options), **settings))

    def size(self):
        """Number of training pictures."""
        return len([*(self.folder / "train/images").iterdir()])

    def stored(self, mode, weights, found):
        """Store the student's weights for ``--picture``."""
        if self.part == "test":
            save_file(weights, self.folder / f"{mode}_{self.seed}.safetensors")
        return found


def select(fits, folder, seed):
    """Every setting of every mode, on validation pictures: {(mode, setting): figures}."""
    pictures, found = Pictures(folder, "val", seed), {}
    for mode, grid in GRID.items():
        for values in itertools.product(*grid.values()):
            setting = dict(zip(grid, values, strict=True))
            result = fits.get(["val", seed, mode, setting], partial(getattr(pictures, mode), **setting))
            found[mode, ", ".join(f"{name} {value}" for name, value in setting.items())] = result
    return found


def run_seed(fits, folder, seed):
    """Each mode with its settings, on test pictures: {mode: figures}."""
    pictures = Pictures(folder, "test", seed)
    return {mode: fits.get(["test", seed, mode, s], partial(getattr(pictures, mode), **s)) for mode, s in BEST.items()}


@torch.no_grad()
def check_with_torchmetrics(pictures, network):
    """Mean IoU of all test pictures at once by torchmetrics, in %."""
    metric = JaccardIndex("multiclass", num_classes=len(CLASSES), ignore_index=-100)
    for batch in pictures.make_data().test_dataloader():
        metric.update(network.eval()(batch.x).argmax(dim=1), batch.y)
    return 100 * float(metric.compute())


@torch.no_grad()
def latency(networks, size, rounds=40):
    """Milliseconds of each network for a batch, and the ratio of the first to the second, in turns on one thread."""
    times, x = [[], []], torch.randn(size, 3, 64, 64)
    for network in networks:
        network.eval()
        for _ in range(3):
            network(x)
    for _ in range(rounds):
        for network, found in zip(networks, times, strict=True):
            start = time.perf_counter()
            network(x)
            found.append(1000 * (time.perf_counter() - start))
    ratios = middle_and_spread([one / other for one, other in zip(*times, strict=True)])
    return [statistics.median(found) for found in times], ratios


def size_of(network):
    """Number of weights, and KiB of the deployed file, which also has BatchNorm's statistics."""
    weights = sum(parameter.numel() for parameter in network.parameters())
    return weights, sum(tensor.nbytes for tensor in network.state_dict().values()) / 1024


def tables(found, teacher, networks):
    """Lines of the tables for RESULTS.md."""
    lines = ["| | mean IoU, test | accuracy of pixels | mean IoU against the student alone |", "|---|---|---|---|"]
    lines.append(f"| teacher, 2400 masks | {teacher['mean_iou']:.1f} | {teacher['accuracy']:.1f} | |")
    values = {mode: [figures[mode]["mean_iou"] for figures in found] for mode in BEST}
    for mode in BEST:
        pixels = spread([figures[mode]["accuracy"] for figures in found], 1)
        gain = "" if mode == "alone" else interval(values[mode], values["alone"], 1)
        lines.append(f"| {mode.replace('_', '-')}, {LABELS} masks | {spread(values[mode], 1)} | {pixels} | {gain} |")
    lines += ["", "| | weights | KiB | ms, 1 picture | ms, 32 pictures |", "|---|---|---|---|---|"]
    (one, ratio_one), (many, ratio_many) = latency(networks, 1), latency(networks, 32)
    for number, name in enumerate(("teacher", "student")):
        weights, size = size_of(networks[number])
        lines.append(f"| {name} | {weights:,} | {size:.0f} | {one[number]:.2f} | {many[number]:.1f} |")
    ratios = [f"{middle:.1f} ({low:.1f} to {high:.1f})" for middle, low, high in (ratio_one, ratio_many)]
    (weights, size), (few, small) = map(size_of, networks)
    lines.append(
        f"| ratio (10 to 90 % of the rounds) | {weights / few:.1f} | {size / small:.1f} | {' | '.join(ratios)} |"
    )
    return lines


@torch.no_grad()
def draw(pictures, file, count=16):
    """Write a picture of the first test pictures: picture, label, teacher, student alone, distilled student."""
    batch = next(iter(pictures.make_data().test_dataloader()))
    networks: list[nn.Module] = [pictures.teacher()]
    for mode in ("alone", "distilled"):
        networks.append(STUDENT())
        networks[-1].load_state_dict(load_file(pictures.folder / f"{mode}_{pictures.seed}.safetensors"))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    seen = (255 * (batch.x[:count] * std + mean)).round().byte().permute(0, 2, 3, 1)
    colours = torch.tensor([[0, 0, 0], [230, 80, 60], [70, 170, 60], [60, 110, 220], [240, 190, 40]], dtype=torch.uint8)
    colours = torch.cat([colours, torch.full((256 - len(colours), 3), 255, dtype=torch.uint8)])
    label = batch.y[:count]
    rows = [seen, colours[label.where(label >= 0, 255)]]
    rows += [colours[network.eval()(batch.x[:count]).argmax(dim=1)] for network in networks]
    whole = np.concatenate([np.concatenate([*row.numpy()], axis=1) for row in rows])
    Image.fromarray(whole).save(file)


def main():
    """Parse the arguments, and print tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--packages", type=Path, help="folder of the packages, for --prepare")
    parser.add_argument("--prepare", type=Path, help="folder to compose the pictures in")
    parser.add_argument("--data", type=Path, help="the same folder, to train")
    parser.add_argument("--seeds", type=int, default=3, help="number of students of each kind; default: 3")
    parser.add_argument("--settings", action="store_true", help="select the settings on validation pictures")
    parser.add_argument("--picture", type=Path, help="file to draw predictions to")
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        print(prepare(arguments.packages, arguments.prepare))
        return
    quiet()
    pictures, fits = Pictures(arguments.data, "test", 0), Fits(arguments.store)
    if arguments.picture is not None:
        draw(pictures, arguments.picture)
        return
    teacher = fits.get(["teacher"], pictures.teach)
    if arguments.settings:
        for (mode, setting), found in select(fits, arguments.data, 100).items():
            print(f"| {mode} | {setting} | {found['mean_iou']:.1f} | {found['accuracy']:.1f} |")
        return
    found = in_parallel(partial(run_seed, fits, arguments.data), range(arguments.seeds), arguments.processes)
    print("\n".join(tables(found, teacher, (pictures.teacher(), STUDENT()))))
    checked = check_with_torchmetrics(pictures, pictures.teacher())
    print(f"\nMean IoU of the teacher by torchmetrics: {checked:.4f}; here {teacher['mean_iou']:.4f}. {versions()}.")


if __name__ == "__main__":
    main()
