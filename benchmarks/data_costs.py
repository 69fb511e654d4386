"""What it costs that every sample is what it is.

Run: python benchmarks/data_costs.py   (about 3 minutes on one core; nothing is downloaded)

Three tables: loading with stored teacher outputs against loading without (ways in turns, one process, medians of ratios
within a round, with their quartiles); the start of a fit on a folder of files; the memory of a validation of many
classes, each in a process of its own.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kd_lightning.cache.codecs import DenseCodec
from kd_lightning.cache.outputs import OutputRows, StoredOutputs
from kd_lightning.cache.row_format import Part, RowFormat
from kd_lightning.cache.store import OutputCache
from kd_lightning.cache.tensors import hash_rows
from kd_lightning.data import ImageFolder, SemiSupervisedDataModule

ROUNDS, BATCH = 11, 64
MEMORY = """
import resource, sys, torch
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import Trainer
from kd_lightning import SupervisedModule

class Logits(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.rows = torch.randn(64, classes)
    def forward(self, x):
        return self.rows[: len(x)] * self.scale

classes = int(sys.argv[1])
torch.set_num_threads(1)
y = torch.randint(classes, (128,))
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
trainer, module = Trainer(accelerator="cpu", **quiet), SupervisedModule(Logits(classes))
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1024  # KB now; the peak is higher
trainer.validate(module, DataLoader(TensorDataset(torch.zeros(128, 1), y), 64), verbose=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def write_folder(folder, count, size):
    """Write noisy JPEG pictures of two classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("cats", "dogs")[number % 2] / f"{number:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).resize(size[::-1]).save(path, quality=90)


def loading(size, picture):
    """Median and quartiles of the time of an epoch of loading with stored outputs over that without."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), 512, picture)
        data = SemiSupervisedDataModule(ImageFolder(folder, image_size=size), val_size=0, batch_size=BATCH, num_views=1)
        data.setup("fit")
        table, loader = data.train_views(), data.train_dataloader()
        format = RowFormat(Part(DenseCodec(1000, "float16"), torch.Size([1000]), torch.float32))
        cache = OutputCache(Path(folder) / "cache", "a", {}, len(table), format.row_bytes, chunk=BATCH)
        stored = StoredOutputs(cache, format)
        for number in range(cache.chunks):
            (batch,) = table.read([cache.rows_of(number)])
            hashes = hash_rows(batch.x)
            cache.write(number, stored.encode(OutputRows(hashes, hashes, torch.randn(len(batch), 1000))))
        ratios = []
        for _ in range(ROUNDS):
            seconds = []
            for outputs in ({}, {"teacher": stored}):
                table.outputs.set(outputs)
                start = time.perf_counter()
                for batch in loader:
                    assert (batch.teacher is not None and "teacher" in batch.teacher.outputs) == bool(outputs)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[1] / seconds[0])
        return statistics.quantiles(ratios, n=4)


def start_of_fit(count):
    """Seconds of the first and of a second ``setup`` of a folder, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), count, (64, 64))
        seconds = []
        for _ in range(2):
            data = SemiSupervisedDataModule(ImageFolder(folder))
            start = time.perf_counter()
            data.setup("fit")
            seconds.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.jpg")) / 1e6
        return *seconds, size


def memory(classes):
    """MB that a validation takes at most, logits and the first imports of a Trainer included."""
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(classes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    """Print the tables."""
    torch.set_num_threads(1)
    print("| picture, crop | loading with stored outputs / without | quartiles |\n|---|---|---|")
    for size, picture in ((32, (32, 32)), (224, (375, 500))):
        low, middle, high = loading(size, picture)
        print(f"| {picture[1]}x{picture[0]}, {size} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)
    print("\n| files | MB | first start, s | second start, s |\n|---|---|---|---|")
    for count in (1000, 10000):
        first, second, size = start_of_fit(count)
        print(f"| {count:,} | {size:.0f} | {first:.2f} | {second:.2f} |", flush=True)
    print("\n| classes | logits of a batch of 64, MB | validation, MB |\n|---|---|---|")
    for classes in (1000, 20000, 100000):
        print(f"| {classes:,} | {64 * classes * 4 / 1e6:.1f} | {memory(classes):.0f} |", flush=True)


if __name__ == "__main__":
    main()
