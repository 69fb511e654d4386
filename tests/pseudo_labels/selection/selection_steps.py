"""All selections beside their references, over many steps of uneven shares of two processes."""

import torch
import torch.distributed
from selection_references import Ada, Aligned, Fixed, Flex, Free, Open, Sharp, Soft, TopK

from kd_lightning.pseudo_labels import (
    AdaMatch,
    DistributionAlignment,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    OpenSetFilter,
    Sharpen,
    SoftMatch,
    TopKPerClass,
)

CLASSES, SAMPLES, POOL = 5, 40, 30
SELECTIONS = {  # how to make the selection, and its reference
    "fixed": (lambda: FixedThreshold(0.6), lambda: Fixed(0.6)),
    "all": (lambda: FixedThreshold(0), lambda: Fixed(0)),
    "top": (lambda: TopKPerClass(2), lambda: TopK(2)),
    "top above a threshold": (lambda: TopKPerClass(2, 0.5), lambda: TopK(2, 0.5)),
    "FlexMatch": (lambda: FlexMatch(0.6), lambda: Flex(0.6, POOL)),
    "FreeMatch": (lambda: FreeMatch(0.9, 0.5), lambda: Free(0.9, 0.5, CLASSES)),
    "FreeMatch, fairness off": (lambda: FreeMatch(0.9, 0.0), lambda: Free(0.9, 0.0, CLASSES)),
    "SoftMatch": (lambda: SoftMatch(2.0, 0.9), lambda: Soft(2.0, 0.9, True, CLASSES)),
    "SoftMatch, unaligned": (lambda: SoftMatch(1.0, 0.8, False), lambda: Soft(1.0, 0.8, False, CLASSES)),
    "AdaMatch": (lambda: AdaMatch(0.9, 0.9), lambda: Ada(0.9, 0.9, CLASSES)),
    "UDA": (lambda: Sharpen(FixedThreshold(0.6), 0.4), lambda: Sharp(Fixed(0.6), 0.4)),
    "as it is": (lambda: Sharpen(FixedThreshold(0), 1.0), lambda: Sharp(Fixed(0), 1.0)),
    "aligned": (
        lambda: DistributionAlignment(FixedThreshold(0.6), "uniform", 0.9),
        lambda: Aligned(Fixed(0.6), 0.9, "uniform", CLASSES),
    ),
    "aligned with labels, FreeMatch": (
        lambda: DistributionAlignment(FreeMatch(0.9, 0.5), "labeled", 0.8),
        lambda: Aligned(Free(0.9, 0.5, CLASSES), 0.8, "labeled", CLASSES),
    ),
    "aligned, sharpened FlexMatch": (
        lambda: DistributionAlignment(Sharpen(FlexMatch(0.6), 0.5), "uniform", 0.9),
        lambda: Aligned(Sharp(Flex(0.6, POOL), 0.5), 0.9, "uniform", CLASSES),
    ),
    "open set": (lambda: OpenSetFilter(FixedThreshold(0.3), 0.9), lambda: Open(Fixed(0.3), 0.9)),
    "open set, FreeMatch": (
        lambda: OpenSetFilter(FreeMatch(0.9, 0.5), 0.5),
        lambda: Open(Free(0.9, 0.5, CLASSES), 0.5),
    ),
}
SHARES = [(4, 4), (3, 0), (0, 5), (0, 0), (1, 0), (6, 2), (5, 5), (2, 7)] * 5  # unlabeled rows of both processes
LABELED = [(2, 2), (0, 3), (1, 0), (2, 0), (0, 0), (3, 1), (0, 0), (2, 5)] * 5


def make(name):
    """Return a selection that is set up, in float64."""
    selection = SELECTIONS[name][0]().double()
    selection.setup(SAMPLES, CLASSES, POOL)
    return selection


def steps():
    """Yield probabilities, labeled ones, indices and logits of the strong view, for the rows of both processes."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows, scale):
        skew = torch.arange(CLASSES, dtype=torch.float64) / 3
        return scale * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64) + skew

    for number, (shares, labeled) in enumerate(zip(SHARES, LABELED, strict=True)):
        index = 10 + torch.randint(POOL, (sum(shares),), generator=generator)  # a sample may come twice
        p, given = draw(len(index), 1 + number / 20), draw(sum(labeled), 1.5 + number / 20)
        if len(index) > 2:
            index[1], p[2] = index[0], p[1]  # equally probable
        yield p.softmax(1), given.softmax(1), index, draw(len(index), 1.0)


def part(rows, shares, rank):
    """Return the rows of a process."""
    return rows if rank is None else rows.split(list(shares))[rank]


def run(name, rank=None, selection=None, first=0):
    """Return what a selection returns for each step from ``first`` on, the regularizer and its gradient; and it."""
    selection = make(name) if selection is None else selection
    found = []
    for number, (p, labeled, index, strong) in enumerate(steps()):
        if number < first:
            continue
        own = [part(rows, SHARES[number], rank) for rows in (p, index, strong)]
        target, weight = selection(own[0], part(labeled, LABELED[number], rank), own[1])
        logits = own[2].clone().requires_grad_()
        term = selection.regularizer(logits.softmax(1), weight)
        value = None if term is None else term[0] * term[1]
        if value is not None:
            value.backward()
        found.append((target, weight, None if value is None else value.item(), logits.grad))
    return found, selection


def save(folder):
    """Save what all selections do on one of two processes."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {name: run(name, rank) for name in SELECTIONS}
    torch.save({name: (rows, rule.state_dict()) for name, (rows, rule) in found.items()}, f"{folder}/{rank}.pt")
