"""The ratios of benchmarks/throughput.py on a GPU: ResNet-50 to ResNet-18 at 224 pixels, bf16, channels last.

Run: python benchmarks/throughput.py --device cuda. Images lie in memory as bytes and are augmented by 12 workers.
"""

import os
import statistics
import tempfile
import time
from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import resnet18, resnet50
from torchvision.transforms import v2

from kd_lightning import (
    CompileNetworks,
    DatasetSource,
    DistillModule,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
)

SIZE, BATCH, CLASSES, EPOCHS = 16384, 256, 1000, 4  # the first epoch warms up
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
transform = v2.Compose([v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])


class Watch(Callback):
    """Seconds of each epoch, and at most how long the device had nothing to do for want of a batch."""

    def __init__(self):
        self.seconds, self.waits = [], []

    def on_train_epoch_start(self, trainer, module):
        """Start."""
        torch.cuda.synchronize()
        self.start, self.wait, self.idle_since = time.perf_counter(), 0.0, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """A batch is there: was the device waiting for it?"""
        if self.idle_since is not None and self.done.query():
            self.wait += max(0.0, time.perf_counter() - self.idle_since)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """The loader's turn; the device still works on what it was given."""
        self.done = torch.cuda.Event()
        self.done.record()
        self.idle_since = time.perf_counter()

    def on_train_epoch_end(self, trainer, module):
        """Stop."""
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.waits.append(self.wait)


def fit(make, images, labels, compiled):
    """Seconds of each epoch but the first, and the share of them that the device waited."""
    data = SemiSupervisedDataModule(
        DatasetSource(TensorDataset(images, labels)),
        views=2,
        val=0,
        batch_size=BATCH,
        num_workers=min(12, os.cpu_count() or 1),
        train_transform=transform,
    )
    watch = Watch()
    callbacks = [watch, CompileNetworks(backend="inductor" if compiled else None, channels_last=True)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=EPOCHS, accelerator="gpu", devices=1, precision="bf16-mixed", callbacks=callbacks, **quiet).fit(
        make(), datamodule=data
    )
    return watch.seconds[1:], sum(watch.waits[1:]) / sum(watch.seconds[1:])


class Plain(Dataset):
    """The same images, by plain torchvision."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return transform(self.images[index]), self.labels[index]


def plain(images, labels):
    """A loop as one writes it by hand."""
    loader = DataLoader(
        Plain(images, labels),
        BATCH,
        shuffle=True,
        num_workers=min(12, os.cpu_count() or 1),
        pin_memory=True,
        persistent_workers=True,
    )
    student = resnet18(num_classes=CLASSES).cuda().to(memory_format=torch.channels_last).train()
    teacher = resnet50(num_classes=CLASSES).cuda().to(memory_format=torch.channels_last).eval()
    optimizer, seconds = sgd(student.parameters()), []
    for _ in range(EPOCHS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for x, y in loader:
            x, y = x.cuda(non_blocking=True), y.cuda(non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16):
                logits = student(x)
                with torch.no_grad():
                    target = teacher(x)
            s, t = logits.float() / 4, target.float() / 4
            soft = 16 * F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
            loss = 0.1 * F.cross_entropy(logits.float(), y) + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def run():
    """Print images/s, the share of waiting, and the ratios; the exit status."""
    images = torch.randint(256, (SIZE, 3, 224, 224), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (SIZE,))
    found = {"plain loop": (plain(images, labels), None)}
    with tempfile.TemporaryDirectory() as cache:
        for compiled in (False, True):
            for name, where in (("student alone", None), ("live", None), ("cached", cache)):

                def make(name=name, where=where):
                    student = resnet18(num_classes=CLASSES)
                    if name == "student alone":
                        return SupervisedModule(student, optimizer=sgd)
                    torch.manual_seed(0)  # the same teacher in every run, so that one cache serves
                    return DistillModule(student, Teacher(resnet50(num_classes=CLASSES), cache=where), optimizer=sgd)

                found[f"{name}, {'compiled' if compiled else 'not compiled'}"] = fit(make, images, labels, compiled)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| | images/s | share of waiting for data |\n|---|---|---|")
    middle = {name: statistics.median(seconds) for name, (seconds, _) in found.items()}
    for name, (_, waited) in found.items():
        print(f"| {name} | {SIZE / middle[name]:.0f} | {'' if waited is None else f'{waited:.1%}'} |")
    ratios = {}
    for kind in ("not compiled", "compiled"):
        ratios[f"cached / student alone, {kind}", 1.05] = middle[f"cached, {kind}"] / middle[f"student alone, {kind}"]
    ratios["live / plain loop, not compiled", 1.05] = middle["live, not compiled"] / middle["plain loop"]
    print("\n| ratio | measured | to reach |\n|---|---|---|")
    for (name, goal), ratio in ratios.items():
        print(f"| {name} | {ratio:.3f} | ≤ {goal} |")
    return int(any(ratio > goal for (_, goal), ratio in ratios.items()))
