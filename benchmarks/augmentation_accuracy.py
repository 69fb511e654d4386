"""Does augmentation of whole batches train as well as that of single images? Test accuracy of both, paired by seed.

Run: python benchmarks/augmentation_accuracy.py --store FILE [--processes 2]       (about 40 minutes in two processes)
     python benchmarks/augmentation_accuracy.py --fashion DIR --store FILE         (also Fashion-MNIST; 30 minutes more)

The old way is torchvision's v2 for one image at a time (benchmarks/recipes.py), the new one is the default of this
package. A seed sets the split. Each way trains a few networks for each seed, with other initial weights, order and
augmentation, since these scatter more than the ways differ; the figure of a seed is their mean. The interval of the
difference must hold 0, and lie within ±0.5 points. Exit status 1 means that it does not.

``DIR/FashionMNIST/raw`` holds the files of Fashion-MNIST, such as those of Debian's package dataset-fashion-mnist.
"""

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import recipes
from torchvision.transforms import v2
from training import Fits, difference, in_parallel, make_parser, measure, spread, train, versions

from kd_lightning import Digits, FixedThreshold, PseudoLabelModule, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data import TorchvisionDataset
from kd_lightning.data.transforms import BatchTransform
from kd_lightning.models import DigitsCNN

STEPS, WAYS, WITHIN = 40 * 17, ("old", "new"), 0.5
FASHION = v2.Compose(
    [
        v2.RandomCrop(28, padding=2),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        *recipes.to_float_and_normalise([0.2860], [0.3530]),
    ]
)
# the network's width, learning rate and repeats; steps; arguments of the data
SETTINGS = {
    "digits, all labels": (32, 0.005, 2, STEPS, {"batch_size": 64}),
    "digits, 10 labels per class": (8, 0.03, 8, STEPS, {"labeled": 10, "unlabeled": "none", "batch_size": 64}),
    "digits, 10 labels per class, FixMatch": (8, 0.03, 4, STEPS, {"labeled": 10, "batch_size": 80}),
    "Fashion-MNIST, 100 labels per class": (16, 0.01, 2, 640, {"labeled": 100, "unlabeled": "none", "batch_size": 64}),
}


def fit(setting, way, seed, repeat, fashion):
    """Train one network. Return its test accuracy in %."""
    width, lr, _, steps, options = SETTINGS[setting]
    strong = "FixMatch" in setting
    if setting.startswith("digits"):
        source, (new, old) = Digits(), recipes.DIGITS
    else:
        source, old = TorchvisionDataset("FashionMNIST", fashion), FASHION
        new = source.train_transform
    transforms = {"train_transform": _select(way, new, old)}
    module = SupervisedModule
    if strong:
        transforms["strong_transform"] = _select(way, *recipes.STRONG_DIGITS)
        options = options | {"labeled_batch_size": 16}
        module = partial(PseudoLabelModule, selection=FixedThreshold(0.8))
    make_data = partial(SemiSupervisedDataModule, source, val_size=0, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "split.json"
        make_data(seed=seed).save_split(path)
        data = make_data(seed=1000 * seed + repeat, **transforms, **({"labeled": path} if "labeled" in options else {}))
        return measure(train(steps, 1000 * seed + repeat, partial(DigitsCNN, width), module, data, lr=lr), data)


def _select(way, new, old):
    assert isinstance(new, BatchTransform), new
    assert not isinstance(old, BatchTransform)
    return new if way == "new" else old


def run(fits, fashion, job):
    """The test accuracy of one network, from the file if it has it."""
    return fits.get(job, partial(fit, *job, fashion))


def main():
    """Print the table. Return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--repeats", type=int, help="networks of each seed and way, instead of each setting's own")
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=[name for name in SETTINGS if "digits" in name])
    parser.add_argument("--fashion", help="folder of Fashion-MNIST")
    options = parser.parse_args()
    names = options.only
    if options.fashion is not None:
        names = [*dict.fromkeys([*names, *(name for name in SETTINGS if "Fashion" in name)])]
    repeats = {name: options.repeats or SETTINGS[name][2] for name in names}
    jobs = [
        (name, way, seed, repeat)
        for seed in range(options.seeds)
        for name in names
        for repeat in range(repeats[name])
        for way in WAYS
    ]
    of_job = partial(run, Fits(options.store), options.fashion)
    found = dict(zip(jobs, in_parallel(of_job, jobs, options.processes), strict=True))
    missed = 0
    print("| test accuracy % | networks | single images | whole batches | difference [95 %] | to reach | |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        old, new = (
            [
                statistics.mean(found[name, way, seed, repeat] for repeat in range(repeats[name]))
                for seed in range(options.seeds)
            ]
            for way in WAYS
        )
        middle, low, high = difference(new, old)
        reached = low <= 0 <= high and max(-low, high) <= WITHIN
        missed += not reached
        cells = [spread(values) for values in (old, new)]
        gap = f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"
        goal = f"holds 0, within ±{WITHIN} | {'' if reached else 'missed'}"
        print(f"| {name} | {options.seeds} x {repeats[name]} | {' | '.join(cells)} | {gap} | {goal} |")
    print(versions())
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
