"""All losses that distil, on Fashion-MNIST: one student, one teacher, as many steps and as many tries for each of them.

Run: python benchmarks/fashion.py --package DIR --prepare data/fashion                 (a minute)
     python benchmarks/terms.py --settings [--store FILE] [--processes 2]              (selects settings: 1.2 CPU hours)
     python benchmarks/terms.py [--seeds 5] [--store FILE] [--processes 2]             (1.2 CPU hours)
     python benchmarks/terms.py --only KD DKD AT ...                                   (some of the losses)

Package, in the folder DIR: apt-get download dataset-fashion-mnist (MIT). A seed selects 10,000 training images, 50 of
each class with their labels, and sets initial weights and order. The teacher was trained on all 50,000 training images.
Its logits and vectors are cached, its maps are not. A logit loss replaces KD's. A feature loss is added to KD, at a
soft weight of 0.9. SimKD's student ends in its teacher's classifier, and is larger.

Each loss has six tries: two learning rates with three weights, the published one among them where there is one (without
a weight: six learning rates). One seed that serves nothing else selects among them, on validation images. The table has
test images. Differences from KD are paired by seed, with 95 % intervals, corrected (Bonferroni) for the number of
losses.
"""

import itertools
import tempfile
from functools import partial
from pathlib import Path

import torch
from fashion import STUDENT, TEACHER, Images
from torch import nn
from training import Fits, in_parallel, interval, make_parser, quiet, spread, versions

from kd_lightning import CompileNetworks, DistillModule, FeatureDistillModule, FeatureTerm, SupervisedModule, Teacher
from kd_lightning.features import ReviewFusion, SimKDStudent
from kd_lightning.losses import (
    AttentionTransferLoss,
    ChannelWiseLoss,
    CosineLoss,
    CRDLoss,
    DISTLoss,
    DKDLoss,
    HardDistillationLoss,
    HintLoss,
    JSDLoss,
    KDLoss,
    MLKDLoss,
    MSEFeatureLoss,
    NKDLoss,
    PKTLoss,
    ReverseKLLoss,
    ReviewLoss,
    RKDLoss,
    RLDLoss,
    SimilarityPreservingLoss,
    SmoothL1FeatureLoss,
    TTMLoss,
    VIDLoss,
    WTTMLoss,
)

STEPS, LABELED_BATCH, VIEWS = 600, 16, 4
POOL, LABELS = 10_000, 50
SETTING_SEED = 100
RATES, SIX_RATES = (0.01, 0.03), (0.001, 0.003, 0.01, 0.03, 0.06, 0.1)
SOFT = {  # loss, and three soft weights; with 1, labels are not used
    "KD": (partial(KDLoss, 4.0), (0.5, 0.9, 1.0)),
    "KD, standardized": (partial(KDLoss, 2.0, standardize=True), (0.5, 0.9, 1.0)),
    "DKD": (DKDLoss, (0.5, 0.9, 1.0)),
    "DKD, standardized": (partial(DKDLoss, temperature=2.0, standardize=True), (0.5, 0.9, 1.0)),
    "DIST": (DISTLoss, (0.5, 0.9, 1.0)),
    "TTM": (TTMLoss, (0.9, 0.98, 1.0)),
    "WTTM": (WTTMLoss, (0.9, 0.98, 1.0)),
    "NKD": (NKDLoss, (0.5, 0.9, 1.0)),
    "RLD": (RLDLoss, (0.5, 0.9, 1.0)),
    "MLKD": (MLKDLoss, (0.5, 0.9, 1.0)),
    "JS": (JSDLoss, (0.5, 0.9, 1.0)),
    "reverse KL": (ReverseKLLoss, (0.5, 0.9, 1.0)),
    "hard labels": (HardDistillationLoss, (0.5, 0.9, 1.0)),
}
ALL = {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3"}
MIDDLE, LAST, VECTOR = ({name: name} for name in ("layer2", "layer3", "flatten"))
FEATURES = {  # layers, loss, and three weights
    "hints": (MIDDLE, HintLoss, (0.003, 0.03, 0.3)),
    "AT": (ALL, AttentionTransferLoss, (100.0, 1000.0, 10_000.0)),
    "SP": (LAST, SimilarityPreservingLoss, (300.0, 3000.0, 30_000.0)),
    "RKD": (VECTOR, RKDLoss, (0.1, 1.0, 10.0)),
    "VID": (ALL, VIDLoss, (0.1, 1.0, 10.0)),
    "PKT": (VECTOR, PKTLoss, (3000.0, 30_000.0, 300_000.0)),
    "CRD": (VECTOR, partial(CRDLoss, negatives=4096), (0.08, 0.8, 8.0)),
    "ReviewKD": (ALL, ReviewLoss, (0.1, 1.0, 10.0)),
    "CWD": (LAST, ChannelWiseLoss, (5.0, 50.0, 500.0)),
    "cosine": (VECTOR, CosineLoss, (1.0, 10.0, 100.0)),
    "smooth L1": (VECTOR, SmoothL1FeatureLoss, (1.0, 10.0, 100.0)),
}
PROJECTORS = {"ReviewKD": ReviewFusion}
METHODS = ("alone", *SOFT, *FEATURES, "SimKD")
SETTINGS = {  # learning rate and weight, as --settings has selected them
    "alone": (0.06, None),
    "KD": (0.03, 1.0),
    "KD, standardized": (0.01, 1.0),
    "DKD": (0.03, 1.0),
    "DKD, standardized": (0.03, 1.0),
    "DIST": (0.03, 0.9),
    "TTM": (0.01, 0.98),
    "WTTM": (0.01, 1.0),
    "NKD": (0.03, 1.0),
    "RLD": (0.03, 0.5),
    "MLKD": (0.01, 0.5),
    "JS": (0.03, 1.0),
    "reverse KL": (0.01, 0.9),
    "hard labels": (0.03, 0.9),
    "hints": (0.03, 0.03),
    "AT": (0.03, 1000.0),
    "SP": (0.03, 300.0),
    "RKD": (0.03, 0.1),
    "VID": (0.03, 10.0),
    "PKT": (0.03, 3000.0),
    "CRD": (0.03, 0.08),
    "ReviewKD": (0.03, 10.0),
    "CWD": (0.03, 5.0),
    "cosine": (0.03, 1.0),
    "smooth L1": (0.03, 10.0),
    "SimKD": (0.03, None),
}


def tries(method):
    """The settings of a method: (learning rate, weight)."""
    if method in ("alone", "SimKD"):
        return [(lr, None) for lr in SIX_RATES]
    return [*itertools.product(RATES, (SOFT.get(method) or FEATURES[method])[-1])]


class Fit:
    """The images of a seed, and the training of each method.

    Args:
        folder: Folder that benchmarks/fashion.py has prepared. The teacher's weights lie there, too.
        cache: Folder of the teacher's outputs.
        part: The part that is measured: ``"val"`` or ``"test"``.
        seed: Seed of images, labels, networks and order.
    """

    def __init__(self, folder, cache, part, seed):
        self.folder, self.cache = Path(folder), cache
        self.images = Images(folder, part, seed)
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randperm(len(self.images.parts["train"][1]), generator=generator)[:POOL].sort().values

    def __call__(self, method, lr, weight):
        """Train, and return accuracies in %."""
        network = STUDENT
        if method == "alone":
            options = {"unlabeled": "none", "views_per_epoch": VIEWS}
            made = SupervisedModule
        else:
            options = {"labeled_batch_size": LABELED_BATCH}
            expert = TEACHER()
            expert.load_state_dict(torch.load(self.folder / "teacher.pt", weights_only=True))
            cached = method in SOFT or FEATURES.get(method, [None])[0] == VECTOR
            teacher = Teacher(expert, cache=self.cache if cached else None)
            if method == "SimKD":
                network = lambda: SimKDStudent(STUDENT(), expert, "layer3", "layer3")  # noqa: E731
                term = FeatureTerm({"projector": "layer3"}, MSEFeatureLoss(), projector=nn.Identity())
                made = partial(FeatureDistillModule, teachers=teacher, features={"maps": term})
            else:
                made = partial(DistillModule, teacher=teacher, **terms(method, weight))
        data = self.images.make_data(self.rows, labeled=LABELS, num_views=VIEWS, **options)
        callbacks = [CompileNetworks(backend=None, channels_last=True)]
        return self.images.fit(made, data, lr, STEPS, network, callbacks)[1]


def terms(method, weight):
    """The soft loss and the feature term of a method."""
    if method in SOFT:
        return {"soft_loss": SOFT[method][0](), "soft_weight": weight}
    layers, loss, _ = FEATURES[method]
    projector = PROJECTORS[method]() if method in PROJECTORS else None
    term = FeatureTerm(layers, loss(), weight, projector=projector)
    return {"soft_loss": KDLoss(4.0), "soft_weight": 0.9, "features": {"feature": term}}


def get(fits, folder, cache, case):
    """The figures of one fit."""
    part, seed, *settings = case
    return fits.get([*case], partial(Fit(folder, cache, part, seed), *settings))


def select(measure, methods, processes):
    """Print the accuracies of all tries, on validation images. The best is bold."""
    cases = [("val", SETTING_SEED, method, *setting) for method in methods for setting in tries(method)]
    found = in_parallel(measure, cases, processes)
    tried = {method: {} for method in methods}
    for (_, _, method, *setting), figures in zip(cases, found, strict=True):
        tried[method][tuple(setting)] = figures["accuracy"]
    print("| loss | accuracy % of the validation images, by learning rate and weight |\n|---|---|")
    for method, own in tried.items():
        best = max(own, key=own.get)
        cells = [f"{text(setting)}: {value:.2f}" for setting, value in own.items()]
        cells = [f"**{cell}**" if setting == best else cell for cell, setting in zip(cells, own, strict=True)]
        print(f"| {method} | {'; '.join(cells)} |")


def compare(measure, methods, seeds, processes):
    """Print the table of test accuracies."""
    cases = [("test", seed, method, *SETTINGS[method]) for seed in range(seeds) for method in methods]
    found = in_parallel(measure, cases, processes)
    values = {method: [] for method in methods}
    for (_, _, method, *_), figures in zip(cases, found, strict=True):
        values[method].append(figures["accuracy"])
    print("| loss | learning rate, weight | accuracy % | over KD |\n|---|---|---|---|")
    for method, own in values.items():
        over = "" if method == "KD" else interval(own, values["KD"], comparisons=len(methods) - 1)
        print(f"| {method} | {text(SETTINGS[method])} | {spread(own)} | {over} |")


def text(setting):
    """Learning rate and weight as text."""
    return ", ".join(f"{number:g}" for number in setting if number is not None)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--folder", default="data/fashion", help="folder that fashion.py --prepare has written")
    parser.add_argument("--only", nargs="*", default=METHODS, choices=METHODS, help="KD, and some of the others")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", action="store_true", help="select the settings, on validation images")
    options = parser.parse_args()
    quiet()
    fits = Fits(options.store)
    teacher = fits.get(["teacher"], Images(options.folder, "test", 0).teach)
    print(f"teacher: {teacher['accuracy']:.2f} % of the test images\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as cache:
        methods = [method for method in METHODS if method in {"KD", *options.only}]
        measure = partial(get, fits, options.folder, cache)
        if options.settings:
            select(measure, methods, options.processes)
        else:
            compare(measure, methods, options.seeds, options.processes)
    print(versions())
