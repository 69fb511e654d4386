"""A teacher, a student alone and a distilled one, with Lightning's Trainer: ``python plain_trainer.py [EPOCHS]``."""

import sys
from functools import partial

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.optim import AdamW

from kd_lightning import Digits, DistillModule, SemiSupervisedDataModule, StudentWriter, SupervisedModule
from kd_lightning.models import DigitsCNN

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 20


def train(name, module, labeled=None):
    """Fit and test a module on digits, of which ``labeled`` of each class have a label (None: all)."""
    data = SemiSupervisedDataModule(Digits(), labeled=labeled, batch_size=64)
    trainer = Trainer(max_epochs=EPOCHS, logger=CSVLogger("runs", name=name), callbacks=[StudentWriter()])
    trainer.fit(module, datamodule=data)
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    return figures["test/accuracy"]


seed_everything(0)
teacher, alone, student = DigitsCNN(width=32), DigitsCNN(width=8), DigitsCNN(width=8)
found = {
    "teacher": train("teacher", SupervisedModule(teacher, optimizer=partial(AdamW, lr=0.005))),
    "student alone": train("alone", SupervisedModule(alone, optimizer=partial(AdamW, lr=0.03)), labeled=10),
    "distilled": train("distilled", DistillModule(student, teacher, optimizer=partial(AdamW, lr=0.03)), labeled=10),
}
print(*(f"{name:<14}{value:.3f}" for name, value in found.items()), sep="\n")
