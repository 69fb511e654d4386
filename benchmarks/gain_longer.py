"""Does a teacher help on the stamps, if the student is trained four times as long?

Run: python benchmarks/gain.py --packages DIR --prepare data/gain                                   (see there)
     python benchmarks/gain.py --only "stamps, MobileNetV2 to ResNet-8" --store FILE ...            (makes the teachers)
     python benchmarks/gain_longer.py [--store FILE] [--processes 2]                                (40 CPU minutes)

The task and the teachers are those of the cell "stamps, MobileNetV2 to ResNet-8" of gain.py. A fit has 960 steps in
place of 240, and 64 views in place of 16. The learning rate is 0.003 for each way. "Patient" is the recipe of Beyer et
al. 2022 (arXiv:2106.05237), as far as it fits here: long fits, mixup, soft targets. Figures are those of validation
samples, with the teachers of the tries, which have not seen them; five splits, one seed.
"""

from functools import partial

from gain_stamps import SPLITS, Stamps
from training import Fits, in_parallel, interval, make_parser, quiet, spread, versions

from kd_lightning.data.transforms import MixUp

STEPS, VIEWS, LR, SEED = 960, 64, 0.003, 100
WAYS = {  # way of gain.py, setting, mixup or not
    "alone": ("alone", (LR,), False),
    "soft weight 0.9, T 4": ("tuned", (LR, 0.9, 4.0), False),
    "patient: soft weight 0.9, T 2, mixup": ("tuned", (LR, 0.9, 2.0), True),
}


def get(fits, task, case):
    """The figures of one fit."""
    table, name = case
    way, setting, mixed = WAYS[name]
    options = {"steps": STEPS, "num_views": VIEWS} | ({"mix": MixUp(0.8)} if mixed else {})
    return fits.get([table, name], partial(task.fit, table, SEED, way, setting, **options))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--stamps", default="data/gain", help="folder that gain.py has prepared")
    options = parser.parse_args()
    quiet()
    task = Stamps(options.stamps, "MobileNetV2", "ResNet-8")
    cases = [(f"tuning_{split}", name) for split in range(SPLITS) for name in WAYS]
    found = in_parallel(partial(get, Fits(options.store), task), cases, options.processes)
    values = {name: [] for name in WAYS}
    for (_, name), one in zip(cases, found, strict=True):
        values[name].append(one["accuracy"])
    print("| 960 steps | validation accuracy % | over alone |\n|---|---|---|")
    for name, own in values.items():
        print(f"| {name} | {spread(own)} | {'' if name == 'alone' else interval(own, values['alone'])} |")
    print(f"\n{versions()}")
