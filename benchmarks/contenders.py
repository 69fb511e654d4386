"""The contenders of benchmarks/throughput.py: ways to train a student for an epoch, which take turns."""

import copy
import random
import statistics
import threading
import time
from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.optim import SGD
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

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


class Turns:
    """Threads that run one at a time, a batch each, round after round; measures the time of each epoch's batches.

    If something slows the machine down for a while, it slows all of them. Each round has another order, so that no
    contender always follows the same one.
    """

    def __init__(self, epochs, batches, settle=lambda: None):
        self.epochs = epochs  # the first of them is a warm-up, and does not count
        self.batches = batches
        self.settle = settle  # waits until a device has finished the work of a turn
        self.seconds = {}
        self._order, self._left, self._whose, self._started, self._failure = [], [], None, {}, None
        self._rng = random.Random(0)
        self._changed = threading.Condition()

    def add(self, name, contender):
        """Prepare a contender, up to its first batch. It must call its argument at the start of each batch."""
        ready = threading.Event()
        self.seconds[name] = []
        self._order.append(name)

        def run():
            torch.set_flush_denormal(True)  # for this thread: else small numbers slow a run down
            try:
                contender(partial(self._boundary, name, ready), self.epochs)
                self._boundary(name, ready, last=True)
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                ready.set()
                self._leave(name)

        threading.Thread(target=run, daemon=True).start()
        ready.wait()
        if self._failure is not None:
            raise self._failure

    def run(self):
        """Train all of them: {name: seconds of each epoch}. The end of an epoch counts to its last batch."""
        with self._changed:
            self._pass_on()
            self._changed.wait_for(lambda: not self._order or self._failure is not None)
        if self._failure is not None:
            raise self._failure
        starts = range(self.batches, self.epochs * self.batches, self.batches)
        return {name: [sum(found[i : i + self.batches]) for i in starts] for name, found in self.seconds.items()}

    def _boundary(self, name, ready, last=False):
        self.settle()
        now = time.perf_counter()
        with self._changed:
            if name in self._started:
                self.seconds[name].append(now - self._started[name])
                if not last:
                    self._pass_on()
            ready.set()
            self._changed.wait_for(lambda: self._whose == name)
        self._started[name] = time.perf_counter()

    def _pass_on(self):
        if not self._left:
            self._left = self._rng.sample(self._order, len(self._order))
        self._whose = self._left.pop() if self._left else None
        self._changed.notify_all()

    def _leave(self, name):
        with self._changed:
            self._order.remove(name)
            if self._whose == name:
                self._pass_on()
            self._changed.notify_all()


class Steps(Callback):
    """Calls a function at the start of each batch."""

    def __init__(self, boundary):
        self.boundary = boundary

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Wait for the turn, at the start of a batch."""
        self.boundary()


def lightning(make_module, x, y, boundary, epochs, callbacks=()):
    """A module of this package."""
    data = SemiSupervisedDataModule(DatasetSource(TensorDataset(x, y)), num_views=1, val_size=0, batch_size=BATCH)
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


def compete(students, make_student, make_teacher, size, epochs, cache, log):
    """All contenders on one pair of networks: {name: seconds of each epoch}."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 32, 32, generator=generator)
    y = torch.randint(100, (size,), generator=generator)
    torch.manual_seed(0)
    student, teachers = make_student(100), [make_teacher(100) for _ in range(8)]
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
    turns = Turns(epochs + 1, size // BATCH)
    for name in students or ways:
        log(f"preparing {name}")
        turns.add(name, ways[name])
    seconds = turns.run()
    for name, epochs_of in seconds.items():
        log(f"{name}: {statistics.median(epochs_of):.2f} s an epoch")
    return seconds
