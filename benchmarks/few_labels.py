"""Few labels and many images: every mode of self-training against the labels alone, and against scikit-learn.

Run: python benchmarks/few_labels.py [--splits 5] [--store FILE] [--processes 2]     (about 20 minutes)
     python benchmarks/few_labels.py --settings [--store FILE] [--processes 2]       (selects the settings; 4)

Digits: 1197 training images and 600 test images. Of the training images, 20, 40 or 100 have a label; the rest are the
pool. All modes have one network of 6274 weights, DigitsCNN(8), the same number of steps, the same schedule, and the
same labeled images and augmentation in each batch. There is no validation part, since its labels would add to the
labels. So the last weights are tested. The settings come from other splits, with 25 % of the training images for
validation and without the test images. A seed sets split, network and order. Differences are paired by split.
"""

import itertools
import statistics
from functools import partial

from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier
from sklearn.svm import SVC
from torchvision.transforms import InterpolationMode
from training import Fits, in_parallel, interval, make_parser, measure, spread, train, versions

from kd_lightning import (
    Digits,
    FixedThreshold,
    FlexMatch,
    GraphPseudoLabels,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    SoftWeightAnnealing,
    SupervisedModule,
    TopKPerClass,
)
from kd_lightning.data.transforms import RandomAffine, strong_digits
from kd_lightning.models import DigitsCNN

EPOCH, EPOCHS = 18, 60  # steps: a pass over the pool of 40 labels, 64 at a time
SETTING_SPLITS = 4
STEPS = EPOCH * EPOCHS
LABELED, UNLABELED = 32, 64  # images in a batch
LABELS = (20, 40, 100)


def weak_digits():
    """The source's augmentation, and moves by a pixel in half of the samples (the source's moves round to none)."""
    bilinear = InterpolationMode.BILINEAR
    return RandomAffine(degrees=10, translate=(0.13, 0.13), scale=(0.9, 1.1), interpolation=bilinear)


def make_digits(**arguments):
    """The datamodule of all benchmarks of few or weak labels."""
    return SemiSupervisedDataModule(Digits(), **{"train_transform": weak_digits()} | arguments)


class Split:
    """The training of each mode, on one split."""

    def __init__(self, seed, labels, val_size=0):
        self.seed = seed
        self.labels = labels
        self.val_size = val_size
        self.make_data = partial(make_digits, labeled=labels // 10, val_size=val_size, seed=seed)

    def fit(self, method, lr, callbacks=(), **data):
        """Train to the last step, and measure on validation images if there are some, else on test images."""
        streams = {"batch_size": LABELED + UNLABELED, "labeled_batch_size": LABELED}
        data = self.make_data(**(streams | data))
        module = train(STEPS, self.seed, partial(DigitsCNN, 8), method, data, callbacks, lr)
        found = {"accuracy": measure(module, data)}
        refresh = next((c for c in callbacks if isinstance(c, PseudoLabelRefresh)), None)
        if refresh is not None:
            found |= {name: 100 * value for name, value in refresh.report.items()}
        return found

    def alone(self, lr=0.01, strong=False):
        """Train on the labels alone, with as many labeled images in a batch."""
        views_per_epoch = -(-EPOCH * LABELED // self.labels)
        one = {"train_transform": strong_digits()} if strong else {}
        many = {
            "unlabeled": "none",
            "labeled_batch_size": None,
            "batch_size": LABELED,
            "views_per_epoch": views_per_epoch,
        }
        return self.fit(SupervisedModule, lr, **many, **one)

    def lee(self, lr=0.01, weight=3.0, begin=10, end=30, strong=False, **data):
        """Lee's pseudo-labels of each step, without a threshold. The refresh only reports on them."""
        data |= {"strong_transform": strong_digits()} if strong else {}
        ramp = SoftWeightAnnealing(0.0, weight, begin, end, attribute="unsupervised_weight")
        make = partial(PseudoLabelModule, unsupervised_weight=0.0)
        return self.fit(make, lr, [ramp, PseudoLabelRefresh(every_n_epochs=EPOCHS)], **data)

    def fixmatch(self, lr=0.03, threshold=0.8, adaptive=False, **data):
        """Labels from the weak view, and the loss on the strong one; FlexMatch's thresholds if adaptive."""
        selection = FlexMatch(threshold) if adaptive else FixedThreshold(threshold)
        shown = PseudoLabelRefresh(every_n_epochs=EPOCHS, selection=FixedThreshold(threshold))
        make = partial(PseudoLabelModule, selection=selection)
        return self.fit(make, lr, [shown], strong_transform=strong_digits(), **data)

    def refresh(self, lr=0.03, threshold=0.8, every=1, warmup=10, fair=True, source="student", **data):
        """New labels for the whole pool every few epochs; if fair, no more of a class than its share of the pool."""
        pool = make_digits(labeled=self.labels // 10, val_size=self.val_size, seed=self.seed).unlabeled_indices()
        selection = TopKPerClass(len(pool) // 10, threshold) if fair else FixedThreshold(threshold)
        options = {"every_n_epochs": every, "selection": selection, "warmup_epochs": warmup, "source": source}
        make = partial(PseudoLabelModule, pseudo_labels="refreshed")
        return self.fit(make, lr, [PseudoLabelRefresh(**options)], strong_transform=strong_digits(), **data)

    def graph(self, threshold=0.75, **options):
        """The same, with labels that spread over a graph of the student's features."""
        return self.refresh(source=GraphPseudoLabels(), threshold=threshold, **options)

    def sklearn(self):
        """Scikit-learn's two methods on pixels, with the same labels and pool, and settings from its documentation."""
        data = self.make_data()
        data.setup("")
        y, x = data.visible_labels().clamp_min(-1).numpy(), data.source.load()
        pixels, test = (part.images.tensors[0].flatten(1).numpy() for part in (x.train, x.test))
        targets = x.test.targets.numpy()
        used = sorted([*data.split.labeled, *data.unlabeled_indices()])
        if data.split.val:
            test, targets = pixels[data.split.val], x.train.targets[data.split.val].numpy()
        found = {}
        methods = {"self-training SVC": SelfTrainingClassifier(SVC(probability=True, random_state=0))}
        methods["LabelSpreading"] = LabelSpreading(kernel="knn", n_neighbors=7, alpha=0.2)
        for name, method in methods.items():
            found[name] = {"accuracy": 100 * method.fit(pixels[used], y[used]).score(test, targets)}
        return found


GRID = {
    "alone": {"lr": (0.01, 0.03), "strong": (False, True)},
    "lee": {"lr": (0.01,), "weight": (0.3, 1.0, 3.0), "strong": (False, True)},
    "fixmatch": {"lr": (0.03,), "threshold": (0.8, 0.95), "adaptive": (False, True)},
    "refresh": {"lr": (0.03,), "threshold": (0.8, 0.95), "every": (1, 5), "fair": (False, True)},
    "graph": {"threshold": (0.6, 0.75, 0.9), "fair": (False, True)},
}


def try_settings(fits, seed):
    """Every setting of every mode at 40 labels, on one split: {(mode, setting): figures on validation images}."""
    split, found = Split(seed, 40, val_size=0.25), {}
    for mode, grid in GRID.items():
        for values in itertools.product(*grid.values()):
            setting = dict(zip(grid, values, strict=True))
            result = fits.get([seed, mode, setting], partial(getattr(split, mode), **setting))
            found[mode, ", ".join(f"{name} {value}" for name, value in setting.items())] = result
    return found


def settings(fits, processes):
    """Print the table of every setting of every mode, on validation images of splits that serve nothing else."""
    found = in_parallel(partial(try_settings, fits), range(100, 100 + SETTING_SPLITS), processes)
    print("| mode | setting | validation accuracy % | worst split | precision, accepted % |\n|---|---|---|---|---|")
    for mode, setting in found[0]:
        results = [of_split[mode, setting] for of_split in found]
        values = [result["accuracy"] for result in results]
        cells = [spread(values), f"{min(values):.2f}"]
        precisions = [result["accepted_precision"] for result in results if "accepted_precision" in result]
        cells.append(f"{statistics.mean(precisions):.2f}" if precisions else "")
        print(f"| {mode} | {setting} | {' | '.join(cells)} |")


# The most accurate setting of each mode. With a threshold, the precision must be at least 97 %.
MODES = {
    "labels alone": (Split.alone, {"lr": 0.03}),
    "labels alone, strong views": (Split.alone, {"strong": True}),
    "Lee": (Split.lee, {}),
    "Lee, loss on strong views": (Split.lee, {"strong": True}),
    "FixMatch": (Split.fixmatch, {}),
    "FlexMatch": (Split.fixmatch, {"adaptive": True}),
    "refresh": (Split.refresh, {}),
    "refresh from a graph": (Split.graph, {}),
    "transductive, FlexMatch": (Split.fixmatch, {"adaptive": True, "unlabeled": "test"}),
    "transductive, graph": (Split.graph, {"unlabeled": "test", "warmup": 18}),  # of ten steps
}


def run(fits, case):
    """All modes on one split with so many labels: {mode: figures on test images}."""
    seed, labels = case
    split, found = Split(seed, labels), {}
    for mode, (method, setting) in MODES.items():
        found[mode] = fits.get([seed, labels, mode], partial(method, split, **setting))
    return found | fits.get([seed, labels, "scikit-learn"], split.sklearn)


def compare(fits, splits, processes):
    """Print the tables of test accuracies, of differences, and of the precision of the labels."""
    cases = [*itertools.product(range(splits), LABELS)]
    found = dict(zip(cases, in_parallel(partial(run, fits), cases, processes), strict=True))
    modes = [*found[0, 40]]

    def values(mode, labels, what="accuracy"):
        return [found[seed, labels][mode][what] for seed in range(splits)]

    print("| test accuracy % | " + " | ".join(f"{labels} labels" for labels in LABELS) + " |")
    print("|---" * (1 + len(LABELS)) + "|")
    for mode in modes:
        print(f"| {mode} | {' | '.join(spread(values(mode, labels)) for labels in LABELS)} |")
    alone = max(("labels alone", "labels alone, strong views"), key=lambda mode: statistics.mean(values(mode, 40)))
    print(
        f"\n| at 40 labels | over {alone} | worst split | its least gain | over LabelSpreading |\n|---|---|---|---|---|"
    )
    for mode in modes:
        mine, base = values(mode, 40), values(alone, 40)
        least = min(one - other for one, other in zip(mine, base, strict=True))
        over = [interval(mine, values(other, 40)) for other in (alone, "LabelSpreading")]
        print(f"| {mode} | {over[0]} | {min(mine):.2f} | {least:+.2f} | {over[1]} |")
    print("\n| at the end | labels | accepted % | precision, accepted % | worst split | precision, all % |")
    print("|---|---|---|---|---|---|")
    for mode in modes:
        if "coverage" in found[0, 40][mode]:
            for labels in LABELS:
                names = ("coverage", "accepted_precision", "precision")
                coverage, accepted, everyone = (values(mode, labels, name) for name in names)
                cells = [f"{statistics.mean(v):.2f}" for v in (coverage, accepted)] + [f"{min(accepted):.2f}"]
                print(f"| {mode} | {labels} | {' | '.join(cells)} | {statistics.mean(everyone):.2f} |")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--settings", action="store_true", help="select the settings, on validation images")
    options = parser.parse_args()
    fits = Fits(options.store)
    if options.settings:
        settings(fits, options.processes)
    else:
        compare(fits, options.splits, options.processes)
    print(versions("scikit-learn"))
