"""The effect of a cache on the student's accuracy: its formats, and a limited number of views.

Run: python benchmarks/cached_accuracy.py [--seeds 10]      (about 12 minutes on two cores)

Digits, 10 labels per class, all training images, the settings of configs/distill_digits.yaml. The teacher is trained on
all training labels. A seed sets split, networks and order. Differences from the live run with as many views are paired
by seed. Noise is the standard deviation of the live run's accuracy over seeds. Test images select nothing.
"""

import argparse
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context

from ensemble import accuracy as test_accuracy
from ensemble import interval
from few_labels import quiet
from training import train

from kd_lightning import Digits, DistillModule, SemiSupervisedDataModule, SupervisedModule, Teacher
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN

STEPS = 40 * 17
CACHES = {
    "cache, float32": {"cache_dtype": "float32"},
    "cache, float16": {"cache_dtype": "float16"},
    "cache, float16, 3 likeliest": {"cache_dtype": "float16", "cache_top_k": 3},
}


def run(seed):
    """One seed: {way: test accuracy}, with 8 views; also live with endless views, and live with one."""
    quiet()
    make_data = partial(SemiSupervisedDataModule, Digits(), batch_size=64, seed=seed)
    expert = train(STEPS, 1000 + seed, partial(SupervisedModule, DigitsCNN(32)), make_data(), lr=0.01).student
    loss = {"soft_loss": KDLoss(4.0), "soft_weight": 0.5}

    def accuracy(views, **cache):
        data = make_data(labeled=10, num_views=views)

        def make(**options):
            return DistillModule(DigitsCNN(8), Teacher(expert, **cache), **loss, **options)

        return 100 * test_accuracy(train(STEPS, seed, make, data, lr=0.03).student, data.test_dataloader())

    with tempfile.TemporaryDirectory() as folder:
        found = {"8 views, live": accuracy(8)}
        found |= {f"8 views, {way}": accuracy(8, cache=folder, **options) for way, options in CACHES.items()}
    found |= {"endless views, live": accuracy(None), "1 view, live": accuracy(1)}
    print(seed, found, flush=True)
    return found


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(run, range(options.seeds)))
    live = [one["8 views, live"] for one in found]
    print("| test accuracy % | mean ± std | over 8 views, live |\n|---|---|---|")
    for name in found[0]:
        values = [one[name] for one in found]
        mean = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        difference = interval(values, live) if values != live else "the same in every seed"
        print(f"| {name} | {mean} | {difference if name != '8 views, live' else ''} |")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning")))


if __name__ == "__main__":
    main()
