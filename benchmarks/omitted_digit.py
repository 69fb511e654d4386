"""Hinton's omitted digit: a student distilled without a single 3 predicts 3s once its bias for class 3 is raised.

Run: python benchmarks/omitted_digit.py [--seeds 5] [--store FILE] [--processes 2]      (about a minute)

A teacher is trained on training images of all digits. Then two students are trained on the same images without the 3s:
one by the teacher's soft targets alone, and one, as the control, by hard targets alone. Then the bias of class 3 is
raised, by the same rule for both: by the amount that gets most validation images right, or the middle of the widest
range of such amounts. Validation images are a quarter of the training images (with 3s), and no network is trained on
them. Test images serve the last figures alone. (The paper raised the bias by the amount that "optimizes overall
performance on the test set": 3.5.)

A seed sets split, initial weights, order and augmentation. Networks, temperature, learning rates, epochs and schedule
are the demo's. Nothing was tuned here.
"""

import statistics
from functools import partial

import torch
from lightning.pytorch import seed_everything
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset
from training import Fits, in_parallel, make_parser, make_trainer, versions

from kd_lightning import DatasetSource, Digits, DistillModule, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN

OMITTED = 3
EPOCHS = 40
COLUMNS = {
    "omitted_before": "3s right %",
    "omitted_after": "raised %",
    "all_before": "all right %",
    "all_after": "raised %",
    "errors_before": "errors",
    "errors_after": "raised",
    "omitted_errors_before": "errors on 3s",
    "omitted_errors_after": "raised",
    "offset": "bias raised by",
}
PAPER = {
    "paper (MNIST), teacher": {"all_before": 99.33, "errors_before": 67},
    "paper (MNIST), distilled": {
        **{"omitted_before": 86.8, "omitted_after": 98.6, "all_before": 97.94, "all_after": 98.91},
        **{"errors_before": 206, "errors_after": 109, "omitted_errors_before": 133, "omitted_errors_after": 14},
        "offset": 3.5,
    },
}


def optimised(lr, epochs):
    """The optimiser and the schedule of all trainings."""
    return {
        "optimizer": partial(AdamW, lr=lr, weight_decay=0.01),
        "lr_scheduler": partial(CosineAnnealingLR, T_max=epochs),
    }


def transfer_set(data):
    """The images that ``data`` trains on, without the omitted digit."""
    data.setup("")
    part = data.source.load().train
    others = torch.tensor([index for index in data.split.labeled if part.targets[index] != OMITTED])
    images = torch.stack([part.images[index][0] for index in others])
    source = DatasetSource(TensorDataset(images, part.targets[others]))
    return SemiSupervisedDataModule(
        source, val_size=0, batch_size=data.batch_size, seed=data.seed, train_transform=data.train_transform
    )


@torch.no_grad()
def outputs(network, loader):
    """Logits (N, C) and true labels (N,)."""
    network.eval()
    batches = [(network(batch.x), batch.y) for batch in loader]
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def best_offset(logits, targets):
    """The amount to add to the logits of the omitted class, by the rule above.

    Args:
        logits: (N, C).
        targets: (N,), with the omitted class among them.
    """
    others = logits.clone()
    others[:, OMITTED] = -torch.inf
    best, decision = others.max(dim=1)
    # from this amount on, an image is predicted as the omitted digit
    amount, order = (best - logits[:, OMITTED]).double().sort()
    # between amounts k and k + 1: images up to k are predicted as the omitted digit, others as their best other class
    taken = (targets == OMITTED)[order].cumsum(0)[:-1]
    left = (decision == targets)[order].flip(0).cumsum(0).flip(0)[1:]
    right, width = taken + left, amount.diff()
    k = torch.where(right == right[width > 0].max(), width, 0).argmax()
    return float(amount[k] + amount[k + 1]) / 2


def figures(logits, targets, suffix):
    """Percentages right and numbers of errors, over all images and over those of the omitted digit."""
    wrong = logits.argmax(dim=1) != targets
    found = {}
    for prefix, part in (("", wrong), ("omitted_", wrong[targets == OMITTED])):
        found[f"{prefix or 'all_'}{suffix}"] = 100 - 100 * float(part.double().mean())
        found[f"{prefix}errors_{suffix}"] = int(part.sum())
    return found


def raised(logits, offset):
    """Logits under a raised bias."""
    logits = logits.clone()
    logits[:, OMITTED] += offset
    return logits


def run_seed(seed, epochs=EPOCHS):
    """A teacher and its students on one split: {who: {column: figure}}."""
    trainer = partial(make_trainer, max_epochs=epochs)
    data = SemiSupervisedDataModule(Digits(), val_size=0.25, batch_size=64, seed=seed)
    seed_everything(seed, verbose=False)
    teacher = DigitsCNN(32)
    trainer().fit(SupervisedModule(teacher, **optimised(0.005, epochs)), datamodule=data)
    students = {}
    for name, soft_weight in {"soft targets": 1.0, "hard targets": 0.0}.items():
        seed_everything(seed, verbose=False)
        students[name] = DigitsCNN(8)
        module = DistillModule(
            students[name],
            teacher,
            soft_loss=KDLoss(temperature=4.0),
            soft_weight=soft_weight,
            **optimised(0.03, epochs),
        )
        trainer().fit(module, datamodule=transfer_set(data))
    offsets = {name: best_offset(*outputs(student, data.val_dataloader())) for name, student in students.items()}

    results = {"teacher": figures(*outputs(teacher, data.test_dataloader()), "before")}
    for name, student, offset in (
        ("soft targets", "soft targets", offsets["soft targets"]),
        ("hard targets", "hard targets", offsets["hard targets"]),
        ("hard targets, raised as soft", "hard targets", offsets["soft targets"]),
    ):
        logits, targets = outputs(students[student], data.test_dataloader())
        after = figures(raised(logits, offset), targets, "after")
        results[name] = {"offset": offset} | figures(logits, targets, "before") | after
    return results


def row(name, seed, values):
    """A line of the table. ``values`` holds a number, or a list of one for each seed, by column."""
    cells = [name, str(seed)]
    for column in COLUMNS:
        found = values.get(column, "-")
        if isinstance(found, list):
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}")
        else:
            cells.append(f"{found:.1f}" if isinstance(found, float) else str(found))
    return f"| {' | '.join(cells)} |"


def table(results):
    """The table of :func:`run_seed`'s results, by seed."""
    lines = [f"| student | seed | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in next(iter(results.values())):
        runs = {seed: found[name] for seed, found in results.items()}
        lines += [row(name, seed, values) for seed, values in runs.items()]
        together = {column: [values[column] for values in runs.values()] for column in next(iter(runs.values()))}
        lines.append(row(f"**{name}**", "mean ± sd", together))
    return lines + [row(name, "-", values) for name, values in PAPER.items()]


def remark(results):
    """How the results differ from those of the paper, and from those that one may expect."""

    def mean(name, column):
        return statistics.mean(found[name][column] for found in results.values())

    raw = mean("soft targets", "omitted_before")
    return (
        f"One figure differs from the paper: before the bias is raised, {raw:.0f} % of 3s are right (paper: 86.8 %).\n"
        "The student of hard targets gains from the rule, too. It gets "
        f"{mean('hard targets', 'omitted_after'):.0f} % of 3s right, but it needs an amount of "
        f"{mean('hard targets', 'offset'):.1f}, and makes {mean('hard targets', 'errors_after'):.0f} errors in all; "
        f"the student of soft targets makes {mean('soft targets', 'errors_after'):.0f}. Raised by the amount of the "
        "soft student, the hard student gets "
        f"{mean('hard targets, raised as soft', 'omitted_after'):.0f} % of 3s right."
    )


def run(fits, seed):
    """The results of a seed, from the file if it has them."""
    return fits.get([seed], partial(run_seed, seed))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    seeds = range(options.seeds)
    found = in_parallel(partial(run, Fits(options.store)), seeds, options.processes)
    results = dict(zip(seeds, found, strict=True))
    print("\n".join(table(results)))
    test = Digits().load().test
    print(f"\n{len(test.targets)} test images, {int((test.targets == OMITTED).sum())} of them 3s.")
    print(remark(results))
    print(versions("scikit-learn"))
