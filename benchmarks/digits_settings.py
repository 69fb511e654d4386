"""Select the settings of the digits demo on validation data, for the student alone and for the distilled one.

Run: python benchmarks/digits_settings.py [--seeds 4]      (about 15 minutes on two cores)

Every seed has its own split, with a quarter of the training images for validation (300), and a teacher trained on
the other training images. The test images are not used. The seeds are none of the demo's.
"""

import argparse
import itertools
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from kd_lightning import Digits, DistillModule, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN

EPOCHS = 40
WIDTHS = {"teacher": 32, "student": 8}


def fit(module, data, steps=None):
    """Train, and return the validation accuracy after the last step."""
    trainer = Trainer(
        max_epochs=EPOCHS,
        limit_train_batches=steps,
        check_val_every_n_epoch=EPOCHS,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return float(trainer.callback_metrics["val/accuracy"])


def optimised(lr):
    """The optimiser and the schedule of all trainings."""
    return {
        "optimizer": partial(AdamW, lr=lr, weight_decay=0.01),
        "lr_scheduler": partial(CosineAnnealingLR, T_max=EPOCHS),
    }


def run_seed(seed):
    """All settings on one split."""
    torch.set_num_threads(1)
    make_data = partial(SemiSupervisedDataModule, Digits(), val_size=0.25, seed=seed, batch_size=64)
    seed_everything(seed, verbose=False)
    teacher = DigitsCNN(WIDTHS["teacher"])
    results = {("teacher", 0.005): fit(SupervisedModule(teacher, **optimised(0.005)), make_data())}
    images = len(make_data().train_dataloader().dataset)
    steps = -(-images // 64)
    for lr in (0.01, 0.03, 0.1, 0.3):
        seed_everything(seed, verbose=False)
        data = make_data(labeled=10, unlabeled="none", views_per_epoch=-(-steps * 64 // 100))
        module = SupervisedModule(DigitsCNN(WIDTHS["student"]), **optimised(lr))
        results["alone", lr] = fit(module, data, steps)
    for lr, temperature, weight in itertools.product((0.03, 0.1), (2.0, 4.0), (0.5, 0.9)):
        seed_everything(seed, verbose=False)
        module = DistillModule(
            DigitsCNN(WIDTHS["student"]),
            teacher,
            soft_loss=KDLoss(temperature),
            soft_weight=weight,
            **optimised(lr),
        )
        results["distilled", lr, temperature, weight] = fit(module, make_data(labeled=10))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    seeds = range(100, 100 + parser.parse_args().seeds)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        all_results = list(pool.map(run_seed, seeds))
    print("| method | learning rate | temperature | soft weight | validation accuracy % |\n|---|---|---|---|---|")
    for key in all_results[0]:
        values = [100 * results[key] for results in all_results]
        cells = [str(part) for part in key] + [""] * (4 - len(key))
        print(f"| {' | '.join(cells)} | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} |")
