"""Tasks of benchmarks/selections.py: images with few labels, a long tail, unknown classes, and mails.

A task has ``ways``, and ``fit(part, seed, way, setting)``, which trains one, and returns figures in %. A setting is a
learning rate and a value of the way.
"""

import itertools
from functools import partial
from pathlib import Path

import torch
from fashion import STUDENT, TEACHER, Images
from mails import KINDS
from mails import Mails as Letters
from selections_watch import Watch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier
from text import figures
from torch import nn
from torch.utils.data import TensorDataset
from training import train

from kd_lightning import (
    ABCModule,
    AdaMatch,
    CompileNetworks,
    DatasetSource,
    DistillModule,
    DistributionAlignment,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    OpenSetFilter,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    Sharpen,
    SoftMatch,
    SoftWeightAnnealing,
    SupervisedModule,
    Teacher,
    TopKPerClass,
)
from kd_lightning.data.transforms import BatchTransform, small_image_transforms, strong_small
from kd_lightning.losses import KDLoss, LogitAdjustmentLoss

STEPS, EVERY = 2000, 100
LABELED, UNLABELED = 32, 64
"""Images of a step."""
POOL = 10_000
RATES, FOUR_RATES = (0.01, 0.03), (0.003, 0.01, 0.03, 0.06)
MEAN, STD = [0.2860], [0.3530]

ALONE = ("supervised", "supervised, strong views")
RULES = {  # the rule of each step, and two values of it: thresholds, or momentums of running means
    "FixMatch": (FixedThreshold, (0.8, 0.95)),
    "FixMatch, aligned": (lambda t: DistributionAlignment(FixedThreshold(t), momentum=0.99), (0.8, 0.95)),
    "FlexMatch": (FlexMatch, (0.8, 0.95)),
    "FreeMatch": (FreeMatch, (0.99, 0.999)),
    "SoftMatch": (lambda m: SoftMatch(momentum=m), (0.99, 0.999)),
    "AdaMatch": (lambda m: AdaMatch(momentum=m), (0.99, 0.999)),
}
ROUNDS = {  # the rule of each refresh; values are thresholds, shares of a class, deviations, or weights of the term
    "refresh": (lambda w: FixedThreshold(0.0), (0.3, 1.0)),
    "refresh, FixedThreshold": (FixedThreshold, (0.8, 0.95)),
    "refresh, TopKPerClass": (lambda share: TopKPerClass(int(share * POOL / 10)), (0.3, 0.6)),
    "refresh, FlexMatch": (FlexMatch, (0.8, 0.95)),
    "refresh, FreeMatch": (lambda w: FreeMatch(momentum=0.0), (0.3, 1.0)),
    "refresh, SoftMatch": (lambda n: SoftMatch(n, momentum=0.0), (2.0, 4.0)),
    "refresh, AdaMatch": (lambda t: AdaMatch(t, momentum=0.0), (0.8, 0.95)),
}
WEIGHTED = ("refresh", "refresh, FreeMatch")
"""Their value is the weight of the unsupervised term."""
AVERAGED, LEE = "Mean Teacher", "Lee"
KD, BOTH = "distilled", "FixMatch with the teacher's labels"
SPREADING, SELF_TRAINING = "LabelSpreading", "SelfTrainingClassifier"
TRIES = {  # (learning rate, value) of each way; scikit-learn's have two values
    **{way: [(lr, None) for lr in FOUR_RATES] for way in ALONE},
    **{way: [*itertools.product(RATES, values)] for way, (_, values) in (RULES | ROUNDS).items()},
    AVERAGED: [*itertools.product(RATES, (1.0, 3.0))],
    LEE: [*itertools.product(RATES, (0.3, 1.0))],
    KD: [*itertools.product(RATES, (0.9, 1.0))],
    BOTH: [*itertools.product(RATES, (0.0, 0.8))],
    SPREADING: [*itertools.product((7, 15), (0.2, 0.8))],
    SELF_TRAINING: [*itertools.product((0.1, 1.0), (0.75, 0.95))],
}

TAIL_WAYS = {  # and the way whose setting they take
    "supervised": "supervised",
    "supervised, adjusted": "supervised",
    "FixMatch": "FixMatch",
    "FixMatch, adjusted": "FixMatch",
    "FixMatch, aligned": "FixMatch, aligned",
    "ABC": "FixMatch",
}
OPEN_WAYS = {  # and the way whose setting they take
    "supervised": "supervised",
    "FixMatch": "FixMatch",
    "FixMatch, OpenSetFilter": "FixMatch",
    "FixMatch, no unknown classes": "FixMatch",
}


def way_of(way, value):
    """The module of a way as a function of the network, and its callbacks."""
    if way in ALONE:
        return SupervisedModule, []
    if way in RULES:
        return partial(PseudoLabelModule, selection=RULES[way][0](value)), []
    if way in ROUNDS:
        weight = value if way in WEIGHTED else 1.0
        made = partial(PseudoLabelModule, unsupervised_weight=weight, pseudo_labels="refreshed")
        return made, [PseudoLabelRefresh(selection=ROUNDS[way][0](value))]
    if way == AVERAGED:
        rule = Sharpen(FixedThreshold(0.0), 1.0)
        return partial(PseudoLabelModule, unsupervised_weight=value, selection=rule, ema_decay=0.99), []
    if way == LEE:
        ramp = SoftWeightAnnealing(0.0, value, 0, 2, attribute="unsupervised_weight")
        return partial(PseudoLabelModule, unsupervised_weight=0.0), [ramp]
    raise KeyError(way)


def with_teacher(way, value, expert):
    """The same for the ways with a teacher."""
    if way == KD:
        return partial(DistillModule, teacher=Teacher(expert), soft_loss=KDLoss(4.0), soft_weight=value), []
    return partial(PseudoLabelModule, selection=FixedThreshold(value), teacher=Teacher(expert)), []


def draw(y, labels, pool, seed):
    """Select samples at random: those with a label, and a pool. Fewer labels are a part of more of them.

    Args:
        y: Classes, (N,).
        labels: Number of labels of each class.
        pool: Number of samples without a label of each class.
        seed: Seed.

    Returns:
        Rows, ascending, and which of them have a label.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number, (few, many) in enumerate(zip(labels, pool, strict=True)):
        members = (y == number).nonzero().flatten()
        assert few + many <= len(members), f"class {number} has {len(members)} samples"
        members = members[torch.randperm(len(members), generator=generator)]
        chosen += [(row, True) for row in members[len(members) - few :].tolist()]
        chosen += [(row, False) for row in members[:many].tolist()]
    rows, known = zip(*sorted(chosen), strict=True)
    return torch.tensor(rows), torch.tensor(known)


def tail(first, total=None):
    """Numbers of ten classes from ``first`` down to a hundredth, in equal ratios; or ``total`` samples, so shared."""
    shares = [100 ** (-number / 9) for number in range(10)]
    return [max(1, round((first if total is None else total / sum(shares)) * share)) for share in shares]


class Fashion:
    """Fashion-MNIST with some labels, and a pool with equally many images of each class.

    Args:
        folder: Folder that fashion.py has prepared. The teacher's weights lie there, too.
        labels: Labels of each class.
    """

    ways = (*ALONE, LEE, AVERAGED, *RULES, *ROUNDS, KD, BOTH, SPREADING, SELF_TRAINING)

    def __init__(self, folder, labels):
        self.folder, self.labels = Path(folder), labels

    def fit(self, part, seed, way, setting, steps=None):
        """Train one way."""
        images = Images(self.folder, part, seed)
        rows, known = draw(images.parts["train"][1], [self.labels] * 10, [POOL // 10] * 10, seed)
        if way in (SPREADING, SELF_TRAINING):
            x, y = (part[rows] for part in images.parts["train"])
            pixels, test = (images.flatten(1).numpy() / 255 for images in (x, images.parts[part][0]))
            reduced = PCA(min(50, len(rows)), random_state=seed).fit(pixels)
            parts = reduced.transform(pixels), y.where(known, -1).numpy(), reduced.transform(test)
            predicted = torch.from_numpy(classical(way, setting, *parts))
            return {"accuracy": 100 * float((predicted == images.parts[part][1]).double().mean())}
        lr, value = setting
        if way in (KD, BOTH):
            expert = TEACHER()
            expert.load_state_dict(torch.load(self.folder / "teacher.pt", weights_only=True))
            made = with_teacher(way, value, expert)
        else:
            made = way_of(way, value)
        return train_images(images, rows, known, *made, lr, way, steps=steps)


def small_network(classes=10):
    """The student of fashion.py on images of half the side, which costs a third."""
    return nn.Sequential(nn.AvgPool2d(2), STUDENT(num_classes=classes))


def train_images(images, rows, known, method, callbacks, lr, way, classes=None, steps=None):
    """Train on images, and measure.

    Args:
        images: The images.
        rows: Training images.
        known: Which of them have a label.
        method: Function of the network that makes the module.
        callbacks: Callbacks of the way.
        lr: Learning rate.
        way: Name of the way.
        classes: Those of the labels. Images of others are in the pool alone. Default: None, which means all.
        steps: Number of steps. Default: None, which means those of all other fits.
    """
    x, truth = (part[rows] for part in images.parts["train"])
    network = small_network
    if classes is not None:
        renumber = torch.full((10,), -1)
        renumber[list(classes)] = torch.arange(len(classes))
        truth = renumber[truth]
        test_x, test_y = images.parts[images.part]
        own = renumber[test_y] >= 0
        images.parts[images.part] = test_x[own], renumber[test_y[own]]
        network = partial(small_network, len(classes))
    weak, plain = small_image_transforms(MEAN, STD, 28, flip=True, padding=2)
    strong = strong_small(MEAN, STD, 28, padding=2)
    if way.startswith("supervised"):
        options = {"unlabeled": "none", "batch_size": LABELED}
        options["views_per_epoch"] = -(-50 * LABELED // int(known.sum()))  # an epoch of 50 steps
        weak = strong if "strong views" in way else weak
    else:
        options = {"batch_size": LABELED + UNLABELED, "labeled_batch_size": LABELED}
        options["strong_transform"] = None if way == KD else strong
    transforms = {"train_transform": weak, "eval_transform": plain}
    source = DatasetSource(TensorDataset(x, truth.where(known, -1)), TensorDataset(*images.parts[images.part]))
    data = SemiSupervisedDataModule(source, val_size=0, seed=images.seed, **transforms, **options)
    steps = steps or STEPS
    watch = Watch(truth, EVERY * steps // STEPS)
    fast = CompileNetworks(backend=None, channels_last=True)
    _, found = images.fit(method, data, lr, steps, network, [*callbacks, watch, fast])
    return found | {"records": watch.records}


class LongTail:
    """Fashion-MNIST with a long tail of labels, 100 of the first class and 1 of the last.

    Args:
        folder: Folder that fashion.py has prepared.
        pool: ``"alike"``, ``"uniform"`` or ``"reversed"``: numbers of each class in the pool.
    """

    ways = TAIL_WAYS

    def __init__(self, folder, pool):
        self.folder, self.pool = Path(folder), pool

    def fit(self, part, seed, way, setting):
        """Train one way."""
        images, counts = Images(self.folder, part, seed), tail(None, POOL)
        pool = {"alike": counts, "uniform": [POOL // 10] * 10, "reversed": counts[::-1]}[self.pool]
        rows, known = draw(images.parts["train"][1], tail(100), pool, seed)
        lr, value = setting
        if way == "ABC":
            made = partial(ABCModule, selection=FixedThreshold(value), threshold=value), []
        else:
            method, callbacks = way_of(way.removesuffix(", adjusted"), value)
            adjusted = {"hard_loss": LogitAdjustmentLoss()} if "adjusted" in way else {}
            made = partial(method, **adjusted), callbacks
        return train_images(images, rows, known, *made, lr, way)


class OpenSet:
    """Fashion-MNIST with 25 labels of six classes, which the seed selects; half of the pool is of the other four.

    Args:
        folder: Folder that fashion.py has prepared.
    """

    ways = OPEN_WAYS
    known, labels = 6, 25

    def __init__(self, folder):
        self.folder = Path(folder)

    def fit(self, part, seed, way, setting):
        """Train one way."""
        images = Images(self.folder, part, seed)
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
        classes = sorted(order[: self.known])
        labels, pool = [0] * 10, [0] * 10
        for number in range(10):
            own = number in classes
            labels[number] = self.labels if own else 0
            if own or way != "FixMatch, no unknown classes":
                pool[number] = POOL // 2 // (self.known if own else 10 - self.known)
        rows, known = draw(images.parts["train"][1], labels, pool, seed)
        lr, value = setting
        method, callbacks = way_of("supervised" if way == "supervised" else "FixMatch", value)
        if way == "FixMatch, OpenSetFilter":
            method = partial(PseudoLabelModule, selection=OpenSetFilter(FixedThreshold(value)))
        return train_images(images, rows, known, method, callbacks, lr, way, classes)


class Drop(BatchTransform):
    """Set a share of the entries of each vector to 0, and scale the others, as dropout does.

    Args:
        share: The share, in [0, 1).
    """

    moves_pixels = False

    def __init__(self, share):
        super().__init__()
        self.share = share

    def transform(self, images, draws):
        """Return new vectors (B, D)."""
        stays = draws.uniform(shape=images.shape[1:]) >= self.share
        return images * stays.to(images) / (1 - self.share)


class Mails:
    """Mails in three kinds as vectors of a frozen sentence encoder, with 5 labels of each kind. Kinds have other sizes.

    A weak view drops a tenth of the entries, a strong one half of them.

    Args:
        folder: Folder that text.py has prepared.
        normalised: Whether the network has a batch norm. Without it, its first outputs are nearly the same for all
            mails, since entries of the vectors are small.
    """

    ways = (*ALONE, *RULES, SPREADING, SELF_TRAINING)
    labels, steps = 5, 300

    def __init__(self, folder, normalised=False):
        self.folder, self.normalised = folder, normalised

    def fit(self, part, seed, way, setting):
        """Train one way."""
        own, others = (Letters(self.folder, name, features=True) for name in ("train", part))
        total = own.targets.bincount(minlength=len(KINDS))
        rows, known = draw(own.targets, [self.labels] * len(KINDS), (total - self.labels).tolist(), seed)
        x, truth = own.features[rows], own.targets[rows]
        visible = truth.where(known, -1)
        if way in (SPREADING, SELF_TRAINING):
            predicted = classical(way, setting, x.numpy(), visible.numpy(), others.features.numpy())
            return figures(nn.functional.one_hot(torch.from_numpy(predicted), len(KINDS)).float(), others.targets)
        method, callbacks = way_of(way, setting[1])
        count = int(known.sum())
        if way in ALONE:
            options = {"unlabeled": "none", "batch_size": count, "views_per_epoch": 50}
        else:
            options = {"batch_size": count + UNLABELED, "labeled_batch_size": count, "strong_transform": Drop(0.5)}
        options["train_transform"] = Drop(0.5 if "strong views" in way else 0.1)
        source = DatasetSource(TensorDataset(x, visible))
        data = SemiSupervisedDataModule(source, val_size=0, seed=seed, **options)
        watch = Watch(truth, EVERY)
        network = partial(classifier, x.shape[1], self.normalised)
        module = train(self.steps, seed, network, method, data, [*callbacks, watch], setting[0])
        module.student.eval()
        with torch.no_grad():
            found = figures(module.student(others.features), others.targets)
        return found | {"records": watch.records}


def classifier(inputs, normalised):
    """A network of one hidden layer."""
    norm = [nn.BatchNorm1d(128)] if normalised else []
    return nn.Sequential(nn.Linear(inputs, 128), *norm, nn.ReLU(), nn.Linear(128, len(KINDS)))


def classical(way, setting, x, y, test):
    """Train one of scikit-learn's methods, and return the predicted classes of ``test``. -1 in y means no label."""
    if way == SPREADING:
        neighbors, alpha = setting
        return LabelSpreading(kernel="knn", n_neighbors=neighbors, alpha=alpha).fit(x, y).predict(test)
    c, threshold = setting
    return SelfTrainingClassifier(LogisticRegression(C=c, max_iter=300), threshold=threshold).fit(x, y).predict(test)
