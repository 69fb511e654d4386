"""Do adaptive selections overtake a fixed threshold, if the student is trained five times as long?

Run: python benchmarks/fashion.py --package DIR --prepare data/fashion          (a minute; see there)
     python benchmarks/selections_longer.py [--store FILE] [--processes 2]      (one CPU hour)

The task is that of the cell "40 labels" of selections.py, with the papers' settings: a threshold of 0.95, and momentums
of 0.999. The learning rate is 0.03 for each way. Nothing is selected. Figures are those of test images, of 3 splits.
"""

from functools import partial

from selections import text
from selections_tasks import Fashion
from training import Fits, in_parallel, interval, make_parser, quiet, versions

LABELS, SPLITS, LR = 4, 3, 0.03
WAYS = {"FixMatch": 0.95, "FlexMatch": 0.95, "FreeMatch": 0.999, "SoftMatch": 0.999}
STEPS = (2000, 10_000)


def get(fits, task, case):
    """The figures of one fit."""
    steps, seed, way = case
    return fits.get([*case], partial(task.fit, "test", seed, way, (LR, WAYS[way]), steps))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--fashion", default="data/fashion", help="folder that fashion.py has prepared")
    options = parser.parse_args()
    quiet()
    cases = [(steps, seed, way) for steps in STEPS for seed in range(SPLITS) for way in WAYS]
    found = in_parallel(partial(get, Fits(options.store), Fashion(options.fashion, LABELS)), cases, options.processes)
    values = {}
    for (steps, _, way), one in zip(cases, found, strict=True):
        values.setdefault((steps, way), []).append(one)
    print("| steps | way | accuracy % | over FixMatch | accepted % | right of these % |\n|---|---|---|---|---|---|")
    for (steps, way), fits in values.items():
        own, fixed = ([one["accuracy"] for one in values[steps, name]] for name in (way, "FixMatch"))
        ends = [[one["records"][-1][name] for one in fits] for name in ("coverage", "precision")]
        gap = "" if way == "FixMatch" else interval(own, fixed, digits=1)
        print(f"| {steps:,} | {way} | {text(own)} | {gap} | {' | '.join(text(end) for end in ends)} |")
    print(f"\n{versions('scikit-learn')}")
