"""Which pseudo-labels count: every selection, online and refreshed, beside distillation, on images and on mails.

Run: python benchmarks/fashion.py --package DIR --prepare data/fashion               (a minute; see there)
     python benchmarks/fashion.py                                                    (its first fit is the teacher)
     python benchmarks/text.py --packages DIR --prepare data/mails                   (a minute; see there)
     python benchmarks/selections.py [--store FILE] [--processes 2] [--splits 3]     (5.5 CPU hours)
     python benchmarks/selections.py --only "250 labels" mails ...                   (some of the cells)
     python benchmarks/selections.py --store FILE --figure benchmarks/selections.png (draws the fits at 250 labels, too)
     python benchmarks/selections_cost.py                                            (the cost of a step; see there)

- Fashion-MNIST: a pool of 10,000 images, 1,000 of each class (USB's pools are even, too), and 40, 250 or 1,000 labels.
  A split's seed selects images, labels, weights and order. More labels contain fewer ones. All ways have the same
  network (the mean of 2 x 2 pixels, then ResNet-8 of 8, 8, 16, 32 channels), 2,000 steps of 32 labeled and 64
  unlabeled images, AdamW with a cosine schedule, and the same weak and strong views. The last weights are tested, on
  10,000 images.
- Each way has four tries at 250 labels, on validation images and a split of its own. The best serves all numbers of
  labels: settings are not selected at 40 or 1,000. A fit has 2,000 steps where papers have a million. So 0.99 is a try
  of running means beside the papers' 0.999.
- Supervised ways have a labeled batch of the same size. The teacher, where there is one, has seen 50,000 labels.
- Long tail: 100 labels of the first class, down to 1 of the last, and pools of 10,000 images that are alike, uniform or
  reversed. Open set: labels of six classes, and a pool half of which is of the other four. Both take the settings of
  the same way (ABC: FixMatch's) at 250 labels.
- Mails: vectors of a sentence encoder, 5 labels of each of three kinds, five seeds. Tries are means over three others.
  "mails, normalised" has the same network with a batch norm.
- Coverage and precision are those of the decisions of 100 steps, compared with the hidden truth; refreshed, those of
  the table in use.
- Differences are paired by split, with 95 % intervals. P values are of paired t tests, corrected (Holm) for the rows of
  a column. With three splits, only a very even difference is significant.

Finished fits are stored, split after split: with ``--splits 1`` or 2, an interrupted run shows what it has.
"""

import statistics
from functools import partial

from scipy import stats
from selections_tasks import ALONE, RULES, STEPS, TRIES, Fashion, LongTail, Mails, OpenSet
from text import write_features
from training import Fits, holm, in_parallel, interval, make_parser, quiet, spread, versions

LABELS = {"40 labels": 4, "250 labels": 25, "1,000 labels": 100}
POOLS = {f"long tail, pool {pool}": pool for pool in ("alike", "uniform", "reversed")}
MAILS = {"mails": False, "mails, normalised": True}
CELLS = (*LABELS, *POOLS, "open set", *MAILS)
TUNED = "250 labels"
TUNING_SEEDS = {TUNED: (100,)} | dict.fromkeys(MAILS, (100, 101, 102))
MAIL_SEEDS = 5
FIGURE = dict.fromkeys(MAILS, "macro F1")  # other cells: accuracy
RECORDS = ("coverage", "precision")


def make_task(folders, cell):
    """The task of a cell."""
    if cell in LABELS:
        return Fashion(folders["fashion"], LABELS[cell])
    if cell in POOLS:
        return LongTail(folders["fashion"], POOLS[cell])
    return OpenSet(folders["fashion"]) if cell == "open set" else Mails(folders["mails"], MAILS[cell])


def ways_of(cell):
    """The ways of a cell, and whose setting each of them takes: {way: (cell, way)}."""
    if cell in POOLS or cell == "open set":
        return {way: (TUNED, other) for way, other in (LongTail if cell in POOLS else OpenSet).ways.items()}
    return {way: (cell if cell in MAILS else TUNED, way) for way in (Mails if cell in MAILS else Fashion).ways}


def get(fits, folders, case):
    """The figures of one fit."""
    cell, *rest = case
    return fits.get([*case], partial(make_task(folders, cell).fit, *rest))


def select(measure, cells, processes):
    """Return the setting of each (cell, way) with the best figure, and all figures, on validation samples."""
    wanted = dict.fromkeys(origin for cell in cells for origin in ways_of(cell).values())
    cases = [
        (cell, "val", seed, way, setting)
        for cell, way in wanted
        for setting in TRIES[way]
        for seed in TUNING_SEEDS[cell]
    ]
    tried = {}
    for (cell, _, _, way, setting), found in zip(cases, in_parallel(measure, cases, processes), strict=True):
        tried.setdefault((cell, way), {}).setdefault(setting, []).append(found[FIGURE.get(cell, "accuracy")])
    tried = {key: {setting: statistics.mean(own) for setting, own in one.items()} for key, one in tried.items()}
    return {key: max(one, key=one.get) for key, one in tried.items()}, tried


def compare(measure, cells, best, splits, processes):
    """Return the figures of each cell and way on test samples, by split: {cell: {way: [figures]}}."""
    cases = [
        (cell, "test", seed, way, best[origin])
        for seed in range(max(splits, MAIL_SEEDS))
        for cell in cells
        if seed < (MAIL_SEEDS if cell in MAILS else splits)
        for way, origin in ways_of(cell).items()
    ]
    values = {cell: {way: [] for way in ways_of(cell)} for cell in cells}
    for (cell, _, _, way, _), found in zip(cases, in_parallel(measure, cases, processes), strict=True):
        values[cell][way].append(found)
    return values


def column(values, cell):
    """The main figure of each way of a cell, by split: {way: [...]}."""
    return {way: [one[FIGURE.get(cell, "accuracy")] for one in found] for way, found in values[cell].items()}


def p_value(values, others):
    """Of a paired t test."""
    return 1.0 if values == others else float(stats.ttest_rel(values, others).pvalue)


def over(own, other):
    """Paired differences of each way from another one as text, with P values corrected for all ways: {way: text}."""
    rows = [way for way in own if way != other]
    if len(own[other]) < 2:
        return dict.fromkeys(own, "")
    p_values = holm([p_value(own[way], own[other]) for way in rows])
    texts = {
        way: f"{interval(own[way], own[other], digits=1)}, P {p:.3f}" for way, p in zip(rows, p_values, strict=True)
    }
    return {other: ""} | texts


def text(values):
    """Mean and spread of figures, the mean alone of one."""
    return f"{values[0]:.2f}" if len(values) == 1 else spread(values)


def table(head, rows):
    """Print a table."""
    print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def show(values, best, tried):
    """Print all tables."""
    cells = [cell for cell in LABELS if cell in values]
    if cells:
        reference = max(ALONE, key=lambda way: max(tried[TUNED, way].values()))
        own = {cell: column(values, cell) for cell in cells}
        table(["accuracy %", *cells], [[way, *(text(own[cell][way]) for cell in cells)] for way in ways_of(cells[0])])
        for other in (reference, "FixMatch") if len(own[cells[0]]["FixMatch"]) > 1 else ():
            gaps = {cell: over(own[cell], other) for cell in cells}
            rows = [[way, *(gaps[cell][way] for cell in cells)] for way in ways_of(cells[0]) if way != other]
            table([f"points over {other}", *cells], rows)
        show_records(values, cells)
    for cell in values:
        if cell not in LABELS:
            show_cell(cell, values)
    names = {way: [] for _, way in tried}
    for (cell, way), one in tried.items():
        texts = [f"{', '.join(f'{n:g}' for n in s if n is not None)}: {value:.1f}" for s, value in one.items()]
        chosen = [f"**{own}**" if s == best[cell, way] else own for own, s in zip(texts, one, strict=True)]
        names[way].append(f"{cell}: {'; '.join(chosen)}")
    table(["way", "figures of the tries on validation samples"], [[way, " / ".join(own)] for way, own in names.items()])


def show_cell(cell, values):
    """Print the table of a cell of its own."""
    own = column(values, cell)
    others = ("supervised", "FixMatch")
    gaps = [over(own, other) for other in others]
    rows = [[way, text(own[way]), *(gap[way] for gap in gaps)] for way in own]
    figure = "macro F1 %" if cell in MAILS else "balanced accuracy %"
    head = [cell, "accuracy of known classes %" if cell == "open set" else figure]
    head += [f"points over {other}" for other in others]
    records = {way: [one.get("records") for one in values[cell][way]] for way in own}
    names = {"coverage": "accepted %", "precision": "right of these %"}
    names |= {"unknown": "accepted of unknown classes %"} if cell == "open set" else {}
    for name, title in names.items():
        head.append(f"{title}, at the end")
        for row in rows:
            ends = [one[-1][name] for one in records[row[0]] if one and one[-1][name] is not None]
            row.append(f"{statistics.mean(ends):.1f}" if ends else "")
    table(head, rows)


def mean_records(found, name):
    """The mean of a record over fits: {step: value}, without steps of which a fit has none."""
    by_step = {}
    for one in found:
        for record in one.get("records", []):
            by_step.setdefault(record["step"], []).append(record[name])
    return {step: statistics.mean(own) for step, own in by_step.items() if None not in own}


def show_records(values, cells):
    """Print coverage and precision early, in the middle and at the end, for each number of labels."""
    steps = [STEPS // 4, STEPS // 2, STEPS]
    rows = []
    for way in ways_of(cells[0]):
        row = [way]
        for cell in cells:
            means = [mean_records(values[cell][way], name) for name in RECORDS]
            row.append(", ".join(f"{means[0][s]:.0f}; {means[1][s]:.1f}" if s in means[1] else "-" for s in steps))
        if any(set(own) - {"-", ",", " "} for own in row[1:]):
            rows.append(row)
    title = f"accepted %; right of these %, at steps {', '.join(map(str, steps))}"
    table([title, *cells], rows)


def draw(values, file):
    """Draw coverage and precision of the online rules over the steps, at 250 labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), dpi=80, layout="constrained")
    for axis, name in zip(axes, RECORDS, strict=True):
        for way in RULES:
            means = mean_records(values[TUNED][way], name)
            axis.plot([*means], [*means.values()], label=way)
        axis.set(xlabel="step", title={"coverage": "accepted, %", "precision": "right of these, %"}[name])
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.savefig(file)
    plt.close(figure)


def main():
    """Run, and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--fashion", default="data/fashion", help="folder that fashion.py has prepared")
    parser.add_argument("--mails", default="data/mails", help="folder that text.py has prepared")
    parser.add_argument("--only", nargs="*", default=CELLS, choices=CELLS, help="some of the cells")
    parser.add_argument("--splits", type=int, default=3, help="splits of the images; default: 3")
    parser.add_argument("--figure", help=f"file of a picture of {TUNED}")
    options = parser.parse_args()
    quiet()
    cells = [cell for cell in CELLS if cell in options.only]
    if options.figure and TUNED not in cells:
        parser.error(f'--figure draws "{TUNED}", which --only leaves out')
    if {*MAILS} & {*cells}:
        write_features(options.mails)
    measure = partial(get, Fits(options.store), vars(options))
    best, tried = select(measure, cells, options.processes)
    values = compare(measure, cells, best, options.splits, options.processes)
    show(values, best, tried)
    if options.figure:
        draw(values, options.figure)
    print(f"\n{versions('scikit-learn')}")


if __name__ == "__main__":
    main()
