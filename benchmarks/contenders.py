"""The contenders of benchmarks/throughput.py: ways to train a student for an epoch, which take turns."""

import copy
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.optim import SGD
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from turns import Turns

from kd_lightning import (
    CompileNetworks,
    DatasetSource,
    DistillModule,
    EnsembleDistillModule,
    SemiSupervisedDataModule,
    Teacher,
)
from kd_lightning.losses import KDLoss
from kd_lightning.modules import SupervisedModule

BATCH, TEMPERATURE, SOFT_WEIGHT = 64, 4.0, 0.9
LOADING = {"batch_size": BATCH}
OPTIMIZER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
sgd = partial(SGD, **OPTIMIZER)


class Steps(Callback):
    """Calls a function at the start of each batch."""

    def __init__(self, boundary):
        self.boundary = boundary

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Wait for the turn, at the start of a batch."""
        self.boundary()


class Augmented:
    """A dataset written by hand: one image at a time is transformed."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def lightning(make_module, x, y, boundary, epochs, callbacks=(), transform=None, num_views=1):
    """A module of this package, with its datamodule."""
    data = SemiSupervisedDataModule(
        DatasetSource(TensorDataset(x, y)),
        num_views=num_views,
        val_size=0,
        batch_size=BATCH,
        train_transform=transform,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[Steps(boundary), *callbacks], **quiet)
    trainer.fit(make_module(), datamodule=data)


def alone(student):
    """The student without a teacher."""
    return SupervisedModule(student, optimizer=sgd)


def distilled(student, teacher, **cache):
    """The student under one teacher."""
    return DistillModule(student, Teacher(teacher, **cache), **_soft())


def ensemble(student, teachers, cache):
    """The student under several."""
    return EnsembleDistillModule(student, [Teacher(t, cache=cache) for t in teachers], **_soft())


def _soft():
    return {"soft_loss": KDLoss(TEMPERATURE), "soft_weight": SOFT_WEIGHT, "optimizer": sgd}


def soft_targets(student_logits, teacher_logits):
    """Hinton's loss, by its formula."""
    student, teacher = student_logits / TEMPERATURE, teacher_logits / TEMPERATURE
    return TEMPERATURE**2 * F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="batchmean")


# The others take a dataset, and options of its loader. ``feed`` returns the batches of a loader.


def plain(student, teacher, data, boundary, epochs, feed=iter, **loading):
    """A loop written by hand. The teacher runs first, which saves a tenth of the time on a CPU."""
    loader, optimizer = DataLoader(data, shuffle=True, **LOADING | loading), sgd(student.parameters())
    student.train()
    teacher.eval()
    for _ in range(epochs):
        for images, labels in feed(loader):
            boundary()
            with torch.no_grad():
                target = teacher(images)
            logits = student(images)
            hard, soft = F.cross_entropy(logits, labels), soft_targets(logits, target)
            optimizer.zero_grad()
            ((1 - SOFT_WEIGHT) * hard + SOFT_WEIGHT * soft).backward()
            optimizer.step()


def torchdistill(student, teacher, data, boundary, epochs, feed=iter, **loading):
    """The distillation box of torchdistill, as in its examples."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.losses import mid_level  # noqa: F401  (its config only finds losses that are imported)

    config = {
        "num_epochs": epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "requires_supp": False,
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": LOADING | loading,
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {**OPTIMIZER}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {
                                "student_module_path": ".",
                                "student_module_io": "output",
                                "teacher_module_path": ".",
                                "teacher_module_io": "output",
                                "temperature": TEMPERATURE,
                                "alpha": 1 - SOFT_WEIGHT,
                                "reduction": "batchmean",
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    device = next(student.parameters()).device
    box = get_distillation_box(teacher, student, {"train": data}, config, device, None, False, 1)
    for epoch in range(epochs):
        box.pre_epoch_process(epoch=epoch)
        for sample, targets in feed(box.train_data_loader):
            boundary()
            box.pre_forward_process()
            loss = box.forward_process(sample, targets)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()


class Wrapped(nn.Module):
    """Wraps a network, for a library that does not take a Sequential as a student."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        """Return the network's logits."""
        return self.network(x)


def modelopt(student, teacher, data, boundary, epochs, feed=iter, **loading):
    """The distillation mode of modelopt in a loop, as in its guide, with ``soft_targets``, since its loss differs."""
    import modelopt.torch.distill as mtd

    class Loss(_Loss):
        def forward(self, student_logits, teacher_logits):
            return soft_targets(student_logits, teacher_logits)

    student = mtd.convert(
        Wrapped(student),
        mode=[
            (
                "kd_loss",
                {
                    "teacher_model": Wrapped(teacher),
                    "criterion": Loss(),
                    "loss_balancer": mtd.StaticLossBalancer(SOFT_WEIGHT),
                },
            )
        ],
    )
    loader, optimizer = DataLoader(data, shuffle=True, **LOADING | loading), sgd(student.network.parameters())
    student.train()
    for _ in range(epochs):
        for images, labels in feed(loader):
            boundary()
            loss = student.compute_kd_loss(student_loss=F.cross_entropy(student(images), labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def compete(make_student, make_teacher, size, epochs, cache, log):
    """All contenders on one pair of networks, without augmentation: {name: seconds of each epoch}."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 32, 32, generator=generator)
    y = torch.randint(100, (size,), generator=generator)
    torch.manual_seed(0)
    student, teachers = make_student(), [make_teacher() for _ in range(8)]
    last = {"callbacks": [CompileNetworks(backend=None, channels_last=True)]}
    fresh = lambda: copy.deepcopy(student)  # noqa: E731
    first = lambda: copy.deepcopy(teachers[0])  # noqa: E731
    ways = {
        "student alone": partial(lightning, lambda: alone(fresh()), x, y),
        "cached": partial(lightning, lambda: distilled(fresh(), first(), cache=cache), x, y),
        "8 teachers, cached": partial(lightning, lambda: ensemble(fresh(), copy.deepcopy(teachers), cache), x, y),
        "live": partial(lightning, lambda: distilled(fresh(), first()), x, y),
        "cached, channels last": partial(lightning, lambda: distilled(fresh(), first(), cache=cache), x, y, **last),
        "live, channels last": partial(lightning, lambda: distilled(fresh(), first()), x, y, **last),
        "plain loop": partial(plain, fresh(), first(), TensorDataset(x, y)),
        "torchdistill": partial(torchdistill, fresh(), first(), TensorDataset(x, y)),
        "modelopt": partial(modelopt, fresh(), first(), TensorDataset(x, y)),
    }
    return take_turns(ways, Turns(epochs + 1, size // BATCH), log)


def compete_end_to_end(make_student, make_teacher, x, y, transforms, epochs, each, cache, log):
    """Ours and the others with augmentation: {name: seconds of each epoch}. All have the memory layout of the images.

    Args:
        make_student: Makes a student.
        make_teacher: Makes a teacher.
        x: Images in memory, (N, C, H, W); N is a multiple of the batch size.
        y: Labels.
        transforms: That of our datamodule, and that which the others call for one image at a time.
        epochs: Number of epochs.
        each: Batches of a turn.
        cache: Folder of the cache. It is filled before the first epoch, with 4 views.
        log: Prints progress.
    """
    torch.manual_seed(0)
    student, teacher = make_student(), make_teacher()
    ours, theirs = transforms
    fresh, expert = partial(copy.deepcopy, student), partial(copy.deepcopy, teacher)
    loading = {"transform": ours, "num_views": 4}
    data = Augmented(x, y, theirs)
    ways = {
        "student alone": partial(lightning, lambda: alone(fresh()), x, y, **loading),
        "cached": partial(lightning, lambda: distilled(fresh(), expert(), cache=cache), x, y, **loading),
        "plain loop": partial(plain, fresh(), expert(), data),
        "torchdistill": partial(torchdistill, fresh(), expert(), data),
        "modelopt": partial(modelopt, fresh(), expert(), data),
    }
    return take_turns(ways, Turns(epochs + 1, len(x) // BATCH, each), log)


def take_turns(ways, turns, log):
    """Train all contenders, in turns: {name: seconds of each epoch}."""
    for name, way in ways.items():
        log(f"preparing {name}")
        turns.add(name, way)
    seconds = turns.run()
    for name, epochs_of in seconds.items():
        log(f"{name}: {statistics.median(epochs_of):.3f} s an epoch")
    return seconds
