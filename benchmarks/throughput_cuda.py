"""The ratios of benchmarks/throughput.py on a GPU: ResNet-50 to ResNet-18 at 224 pixels, bf16, channels last.

Run: python benchmarks/throughput.py --device cuda             (about 15 minutes)
     python benchmarks/throughput.py --device cuda --quick     (fewer images and epochs, nothing compiled)

Images lie in memory as bytes, and up to 12 workers augment them. Batches have 256 images. All contenders take turns, an
epoch each. The plain loop and the other libraries get networks and batches with channels last, and run under autocast.
"""

import importlib.util
import os
import statistics
import tempfile
import time
from functools import partial

import torch
from contenders import Augmented, alone, distilled, ensemble, modelopt, plain, torchdistill
from lightning.pytorch import Callback, Trainer
from measuring import Table, log
from throughput import RATIOS
from torch.utils.data import TensorDataset
from torchvision.models import resnet18, resnet50
from torchvision.transforms import v2
from turns import Turns

from kd_lightning import CompileNetworks, DatasetSource, SemiSupervisedDataModule

DEVICE = "cuda"
SIZE, PIXELS, BATCH, CLASSES, VIEWS = 8192, 224, 256, 1000, 2
EPOCHS = 6  # the first one is a warm-up, and the end of the last one counts to it
QUICK_SIZE, QUICK_EPOCHS = 4096, 4
PAIR = resnet18, resnet50
WORKERS = min(12, os.cpu_count() or 1)
transform = v2.Compose([v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])


class Watch(Callback):
    """Calls a function at the start of each epoch, and measures how long, at most, the device waits for a batch."""

    def __init__(self, boundary):
        self.boundary = boundary
        self.waits = []

    def begin(self):
        """Wait for the turn, before any batch is read."""
        self.boundary()
        self.waits.append(0.0)
        self.end()

    def arrive(self):
        """A batch has arrived: count the time if the device was waiting for it."""
        if self.done.query():
            self.waits[-1] += time.perf_counter() - self.requested

    def end(self):
        """The loader reads the next batch, while the device still works on the last one."""
        self.done = torch.Event(DEVICE)
        self.done.record()
        self.requested = time.perf_counter()

    def feed(self, loader):
        """Yield the batches of an epoch, on the device."""
        self.begin()
        for x, y in loader:
            self.arrive()
            x = x.to(DEVICE, non_blocking=True, memory_format=torch.channels_last)
            yield x, y.to(DEVICE, non_blocking=True)
            self.end()

    def on_train_epoch_start(self, trainer, module):
        """Begin an epoch."""
        self.begin()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Record that a batch has arrived."""
        self.arrive()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """Record that the next batch is requested."""
        self.end()


def ours(make_module, images, labels, watches, name, boundary, epochs, compiled=False):
    """A module of this package."""
    data = SemiSupervisedDataModule(
        DatasetSource(TensorDataset(images, labels)),
        num_views=VIEWS,
        val_size=0,
        batch_size=BATCH,
        num_workers=WORKERS,
        train_transform=transform,
    )
    watches[name] = Watch(boundary)
    callbacks = [watches[name], CompileNetworks(backend="inductor" if compiled else None, channels_last=True)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    machine = {"accelerator": DEVICE, "devices": 1, "precision": "bf16-mixed"}
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, **machine, **quiet)
    trainer.fit(make_module(), datamodule=data)


def others(train, data, watches, name, boundary, epochs):
    """A loop written by hand, or that of another library."""
    watch = watches[name] = Watch(boundary)
    student, teacher = (make(num_classes=CLASSES).to(DEVICE, memory_format=torch.channels_last) for make in PAIR)
    loading = {"batch_size": BATCH, "num_workers": WORKERS, "pin_memory": DEVICE == "cuda", "persistent_workers": True}
    with torch.autocast(DEVICE, torch.bfloat16):
        train(student, teacher, data, lambda: None, epochs, feed=watch.feed, **loading)


def run(quick=False):
    """Print images/s, the share of waiting, and the ratios. Return the exit status."""
    size, epochs = (QUICK_SIZE, QUICK_EPOCHS) if quick else (SIZE, EPOCHS)
    images = torch.randint(256, (size, 3, PIXELS, PIXELS), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (size,))
    torch.manual_seed(0)
    make_student, make_teacher = (partial(make, num_classes=CLASSES) for make in PAIR)
    experts = [make_teacher().state_dict() for _ in range(8)]

    def teacher(number=0):  # the same ones for all, so that one cache serves
        network = make_teacher()
        network.load_state_dict(experts[number])
        return network

    settle = getattr(torch, DEVICE).synchronize
    turns, watches = Turns(epochs, 1, settle=settle, clock=time.perf_counter), {}
    with tempfile.TemporaryDirectory() as cache:
        modules = {
            "student alone": lambda: alone(make_student()),
            "cached": lambda: distilled(make_student(), teacher(), cache=cache),
            "live": lambda: distilled(make_student(), teacher()),
            "8 teachers, cached": lambda: ensemble(make_student(), [teacher(n) for n in range(8)], cache),
        }
        ways = {name: partial(ours, make, images, labels, watches, name) for name, make in modules.items()}
        for name in () if quick else ("student alone", "cached", "live"):
            also = f"{name}, compiled"
            ways[also] = partial(ours, modules[name], images, labels, watches, also, compiled=True)
        data = Augmented(images, labels, transform)
        for name, train in {"plain loop": plain, "torchdistill": torchdistill, "modelopt": modelopt}.items():
            if train is not plain and importlib.util.find_spec(name) is None:
                print(f"skipped: {name} is not installed\n", flush=True)
                continue
            ways[name] = partial(others, train, data, watches, name)
        for name, way in ways.items():
            log(f"preparing {name}")
            turns.add(name, way)
        seconds = {name: found[:-1] for name, found in turns.run().items()}
    print("| | images/s | share of waiting for data |\n|---|---|---|")
    for name, found in seconds.items():
        waited = sum(watches[name].waits[1:-1]) / sum(found)
        print(f"| {name} | {size / statistics.median(found):.0f} | {waited:.1%} |")
    print()
    table = Table()
    for of, over, most, least in [*RATIOS, ("cached, compiled", "student alone, compiled", 1.05, None)]:
        if of in seconds and over in seconds:
            table.add(f"{of} / {over}", seconds[of], seconds[over], most, least, unit=(1, "s an epoch"))
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(f"{device}, torch {torch.__version__}")
    return int(table.missed > 0)
