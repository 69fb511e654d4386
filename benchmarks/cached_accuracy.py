"""The effect of a cache on the student's accuracy: its formats, and a limited number of views.

Run: python benchmarks/cached_accuracy.py [--seeds 10] [--store FILE] [--processes 2]      (about 4 minutes)

Digits, 10 labels per class, all training images, the settings of configs/distill_digits.yaml. The teacher is trained on
all training labels. A seed sets split, networks and order. Differences from the live run with as many views are paired
by seed. Noise is the standard deviation of the live run's accuracy over seeds. Test images select nothing.
"""

import tempfile
from functools import cache, partial

from training import Fits, accuracy, in_parallel, interval, make_parser, spread, train, versions

from kd_lightning import Digits, DistillModule, SemiSupervisedDataModule, SupervisedModule, Teacher
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN

STEPS = 40 * 17
CACHES = {
    "cache, float32": {"cache_dtype": "float32"},
    "cache, float16": {"cache_dtype": "float16"},
    "cache, float16, 3 likeliest": {"cache_dtype": "float16", "cache_top_k": 3},
}


def run(fits, seed):
    """One seed: {way: test accuracy}, with 8 views; also live with endless views, and live with one."""
    make_data = partial(SemiSupervisedDataModule, Digits(), batch_size=64, seed=seed)
    loss = {"soft_loss": KDLoss(4.0), "soft_weight": 0.5}

    @cache
    def expert():
        return train(STEPS, 1000 + seed, partial(DigitsCNN, 32), SupervisedModule, make_data()).student

    def fit(views, **options):
        data = make_data(labeled=10, num_views=views)
        with tempfile.TemporaryDirectory() as folder:
            teacher = Teacher(expert(), **({"cache": folder} | options if options else {}))
            method = partial(DistillModule, teacher=teacher, **loss)
            student = train(STEPS, seed, partial(DigitsCNN, 8), method, data, lr=0.03).student
            return accuracy(student, data.test_dataloader())

    plan = {"8 views, live": partial(fit, 8)}
    plan |= {f"8 views, {way}": partial(fit, 8, **options) for way, options in CACHES.items()}
    plan |= {"endless views, live": partial(fit, None), "1 view, live": partial(fit, 1)}
    return {way: fits.get([seed, way], function) for way, function in plan.items()}


def main():
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    found = in_parallel(partial(run, Fits(options.store)), range(options.seeds), options.processes)
    live = [one["8 views, live"] for one in found]
    print("| test accuracy % | mean ± std | over 8 views, live |\n|---|---|---|")
    for name in found[0]:
        values = [one[name] for one in found]
        gap = interval(values, live) if values != live else "the same in every seed"
        print(f"| {name} | {spread(values)} | {gap if name != '8 views, live' else ''} |")
    print(versions())


if __name__ == "__main__":
    main()
