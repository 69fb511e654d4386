"""From a plain loop to our fit, for benchmarks/pipeline.py: the same training steps, with one part more in each row."""

import copy
import tempfile
from functools import partial

import recipes
import torch
import torch.nn.functional as F
from contenders import BATCH, SOFT_WEIGHT, TEMPERATURE, Steps, sgd
from lightning.pytorch import LightningModule, Trainer
from measuring import log
from torch.utils.data import TensorDataset
from turns import Turns

from kd_lightning import DatasetSource, DistillModule, SemiSupervisedDataModule, Teacher
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN, resnet8, resnet32
from kd_lightning.modules import SupervisedModule

LOOP, BARE, MODULE = "plain loop", "bare LightningModule", "SupervisedModule"
DISTILL = "DistillModule with a cache"
LOADED, FIT = f"{MODULE}, datamodule", f"{MODULE}, datamodule and augmentation"
DISTILL_FIT = f"{DISTILL}, datamodule and augmentation"


class Bare(LightningModule):
    """A module as Lightning's first example has it, without logging and metrics."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        """Return the loss of a batch."""
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        """Return the optimiser of all contenders."""
        return sgd(self.network.parameters())


class Replay:
    """A loader whose batches are read in the first epoch, and lie in memory from then on."""

    def __init__(self, loader):
        self.loader = loader
        self.batches = []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        if len(self.batches) == len(self):
            yield from self.batches
            return
        self.batches.clear()
        for batch in self.loader:
            self.batches.append(batch)
            yield batch


class ReadyData(SemiSupervisedDataModule):
    """The datamodule with ready batches: what is left is the step."""

    def train_dataloader(self):
        """Return a loader that reads each batch once."""
        return Replay(super().train_dataloader())


def plain(network, batches, boundary, epochs):
    """A loop written by hand."""
    optimizer = sgd(network.parameters())
    network.train()
    for _ in range(epochs):
        for x, y in batches:
            boundary()
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def fit(make_module, data, boundary, epochs):
    """Lightning's fit, of a datamodule or of ready batches."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[Steps(boundary)], **quiet)
    trainer.fit(make_module(), **({"train_dataloaders": data} if isinstance(data, Replay) else {"datamodule": data()}))


def compete(make_student, make_teacher, images, labels, transforms, epochs, each):
    """All rows of one data set: {name: seconds of each epoch}.

    Args:
        make_student: Makes a student.
        make_teacher: Makes a teacher.
        images: (N, C, H, W), where N is a multiple of the batch size.
        labels: (N,).
        transforms: Augmentation; what is done to the images without it, or None.
        epochs: Number of epochs.
        each: Batches of a turn.
    """
    torch.manual_seed(0)
    student, teacher = make_student(), make_teacher()
    augment, convert = transforms
    x = images if convert is None else torch.stack([convert(image) for image in images])
    ready = [*zip(x.split(BATCH), labels.split(BATCH), strict=True)]
    source = DatasetSource(TensorDataset(images, labels))
    data = partial(SemiSupervisedDataModule, source, val_size=0, batch_size=BATCH)
    augmented = {"train_transform": augment, "eval_transform": convert}
    soft = {"soft_loss": KDLoss(TEMPERATURE), "soft_weight": SOFT_WEIGHT}
    with tempfile.TemporaryDirectory() as cache:

        def supervised():
            return SupervisedModule(copy.deepcopy(student), optimizer=sgd)

        def distilled():
            return DistillModule(copy.deepcopy(student), Teacher(teacher, cache=cache), optimizer=sgd, **soft)

        ways = {
            LOOP: partial(plain, copy.deepcopy(student), ready),
            BARE: partial(fit, lambda: Bare(copy.deepcopy(student)), Replay(ready)),
            MODULE: partial(fit, supervised, Replay(ready)),
            DISTILL: partial(fit, distilled, partial(ReadyData, source, **data.keywords, num_views=4, **augmented)),
            LOADED: partial(fit, supervised, partial(data, train_transform=convert, eval_transform=convert)),
            FIT: partial(fit, supervised, partial(data, **augmented)),
            DISTILL_FIT: partial(fit, distilled, partial(data, num_views=4, **augmented)),
        }
        turns = Turns(epochs + 1, len(ready), each)
        for name, way in ways.items():
            log(f"preparing {name}")
            turns.add(name, way)
        return turns.run()


def _table(table, name, seconds, batches, goal):
    rows = [
        (BARE, LOOP, None),
        (MODULE, LOOP, None),
        (LOADED, LOOP, None),
        (FIT, LOOP, goal),
        (DISTILL_FIT, LOOP, None),
        (MODULE, BARE, 1.05),
        (DISTILL, BARE, 1.10),
        (DISTILL_FIT, FIT, None),
    ]
    for of, over, most in rows:
        table.add(f"{name}: {of} / {over}", seconds[of], seconds[over], most, unit=(1000 / batches, "ms a step"))


def digits(table, rounds):
    """DigitsCNN(8) on the digits. A turn is an epoch, since a step is short."""
    batches = 19
    images, labels = recipes.digits_images(batches * BATCH)
    students = partial(DigitsCNN, 8), partial(DigitsCNN, 32)
    seconds = compete(*students, images, labels, (recipes.DIGITS[0], None), rounds, batches)
    _table(table, "digits", seconds, batches, 1.35)


def small(table, rounds):
    """ResNet-8 on images of 32 x 32 pixels, bytes in memory."""
    batches = 10
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batches * BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (len(images),), generator=generator)
    students = partial(resnet8, 10), partial(resnet32, 10)
    seconds = compete(*students, images, labels, recipes.SMALL_PAIR, rounds, 1)
    _table(table, "32 x 32, ResNet-8", seconds, batches, 1.10)
