"""Select the settings of the digits demo on validation data, for the student alone and for the distilled one.

Run: python benchmarks/digits_settings.py [--seeds 4] [--store FILE] [--processes 2]      (about 2 minutes)

Every seed has its own split, with a quarter of the training images for validation (300), and a teacher trained on
the other training images. The test images are not used. The seeds are none of the demo's.
"""

import itertools
from functools import cache, partial

from lightning.pytorch import seed_everything
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import Fits, in_parallel, make_parser, make_trainer, measure, spread

from kd_lightning import Digits, DistillModule, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN

EPOCHS = 40
WIDTHS = {"teacher": 32, "student": 8}


def fit(seed, width, method, lr, data, steps=None):
    """Train a network. Return it, and its validation accuracy after the last step."""
    seed_everything(seed, verbose=False)
    optimizer, schedule = partial(AdamW, lr=lr, weight_decay=0.01), partial(CosineAnnealingLR, T_max=EPOCHS)
    module = method(DigitsCNN(width), optimizer=optimizer, lr_scheduler=schedule)
    make_trainer(max_epochs=EPOCHS, limit_train_batches=steps).fit(module, datamodule=data)
    return module.student, measure(module, data)


def run_seed(fits, seed):
    """All settings on one split: {setting: validation accuracy}."""
    make_data = partial(SemiSupervisedDataModule, Digits(), val_size=0.25, seed=seed, batch_size=64)
    images = len(make_data().train_dataloader().dataset)
    steps = -(-images // 64)

    @cache
    def teacher():
        return fit(seed, WIDTHS["teacher"], SupervisedModule, 0.005, make_data())

    def alone(lr):
        data = make_data(labeled=10, unlabeled="none", views_per_epoch=-(-steps * 64 // 100))
        return fit(seed, WIDTHS["student"], SupervisedModule, lr, data, steps)

    def distilled(lr, temperature, weight):
        method = partial(DistillModule, teacher=teacher()[0], soft_loss=KDLoss(temperature), soft_weight=weight)
        return fit(seed, WIDTHS["student"], method, lr, make_data(labeled=10))

    plan = {("teacher", 0.005): teacher}
    plan |= {("alone", lr): partial(alone, lr) for lr in (0.01, 0.03, 0.1, 0.3)}
    grid = itertools.product((0.03, 0.1), (2.0, 4.0), (0.5, 0.9))
    plan |= {("distilled", *values): partial(distilled, *values) for values in grid}
    return {key: fits.get([seed, *key], lambda train=train: train()[1]) for key, train in plan.items()}


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    seeds = range(100, 100 + options.seeds)
    found = in_parallel(partial(run_seed, Fits(options.store)), seeds, options.processes)
    print("| method | learning rate | temperature | soft weight | validation accuracy % |\n|---|---|---|---|---|")
    for key in found[0]:
        cells = [str(part) for part in key] + [""] * (4 - len(key))
        print(f"| {' | '.join(cells)} | {spread([of_seed[key] for of_seed in found])} |")
