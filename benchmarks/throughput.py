"""The cost of distillation, compared with training alone, a plain loop, and other libraries.

Run: python benchmarks/throughput.py                 (at most 20 minutes; exit status 1 if a ratio misses its goal)
     python benchmarks/throughput.py --growth        (how cost grows with teachers, classes and samples)
     python benchmarks/throughput.py --device cuda   (ResNet-50 to ResNet-18 at 224 pixels, bf16, channels last;
                                                      with --quick for make gpu)

The extra ``bench`` is needed. On the CPU, one thread runs on one core. All contenders take turns within one process, a
batch each, for 9 epochs after one for warm-up. Images of 32 x 32 pixels lie in memory; batches have 64 images, with
random labels of 100 classes. A ratio is that of the medians. Its spread is the 10th and 90th percentile of the ratios
of single epochs. All threads share one memory arena that returns nothing to the system. Caches are full; to fill one
costs a pass of the teacher over each view. Modules of this package run without logger and progress bar.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# only the environment sets these for all threads of this process
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
# one memory arena that returns nothing to the system: three identical contenders then take 2.26 to 2.30 seconds. With
# an arena for each thread, which returns memory and requests it again, they take 2.57 to 2.82 seconds
ENVIRONMENT |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**32))
if __name__ == "__main__" and os.environ | ENVIRONMENT != {**os.environ}:
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)

PAIRS = {  # student, teacher, images in an epoch
    "ResNet-32 to ResNet-8": ("resnet8", "resnet32", 1280),
    "wrn_40_2 to wrn_16_2": ("wrn_16_2", "wrn_40_2", 384),
}
RATIOS = [  # of, over, at most, at least
    ("cached", "student alone", 1.05, None),
    ("8 teachers, cached", "student alone", 1.08, None),
    ("live", "plain loop", 1.05, None),
    ("torchdistill", "live", None, 1.0),
    ("modelopt", "live", None, 1.0),
    ("torchdistill", "cached", None, 2.0),
    ("modelopt", "cached", None, 2.0),
    # with one line more, CompileNetworks(backend=None, channels_last=True); these have no goal
    ("torchdistill", "live, channels last", None, None),
    ("modelopt", "live, channels last", None, None),
    ("torchdistill", "cached, channels last", None, None),
    ("modelopt", "cached, channels last", None, None),
]


def log(text):
    """Print progress to stderr; stdout has the tables alone."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Table:
    """The table of ratios, and the number of goals missed."""

    def __init__(self):
        self.missed = 0
        print("| ratio | measured | spread | to reach | |\n|---|---|---|---|---|", flush=True)

    def add(self, name, numerators, denominators, most=None, least=None):
        """Add one ratio of paired measurements. A lower bound of 1 is reached if the spread reaches it."""
        ratio = statistics.median(numerators) / statistics.median(denominators)
        own = [a / b for a, b in zip(numerators, denominators, strict=True)]
        low, *_, high = statistics.quantiles(own, n=10, method="inclusive")
        reached, goal = True, ""
        if most is not None:
            reached, goal = ratio <= most, f"≤ {most}"
        elif least is not None:
            within = least == 1.0
            reached, goal = (high if within else ratio) >= least, f"≥ {least}{' within the spread' if within else ''}"
        self.missed += not reached
        print(
            f"| {name} | {ratio:.3f} | {low:.3f} to {high:.3f} | {goal} | {'' if reached else 'missed'} |", flush=True
        )


def networks(table, rounds):
    """Measure every contender on both pairs of networks."""
    from contenders import compete

    import kd_lightning.models

    for name, (student, teacher, size) in PAIRS.items():
        log(name)
        with tempfile.TemporaryDirectory() as cache:
            makers = getattr(kd_lightning.models, student), getattr(kd_lightning.models, teacher)
            seconds = compete(None, *makers, size, rounds, cache, log)
        for of, over, most, least in RATIOS:
            table.add(f"{name}: {of} / {over}", seconds[of], seconds[over], most, least)


class Plain:
    """A dataset written by hand."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def augmentation(table, rounds):
    """Measure the time of a sample with the datamodule's replayable augmentation, and with plain torchvision v2."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from torchvision.transforms import v2

    from kd_lightning import DatasetSource, SemiSupervisedDataModule

    images = torch.randint(256, (4096, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(len(images), dtype=torch.long)
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
        ]
    )

    data = SemiSupervisedDataModule(
        DatasetSource(TensorDataset(images, labels)), val_size=0, batch_size=64, train_transform=transform
    )
    loaders = {"ours": data.train_dataloader(), "plain": DataLoader(Plain(images, labels, transform), 64, shuffle=True)}
    seconds = {name: [] for name in loaders}
    for _ in range(rounds + 1):
        for name, loader in loaders.items():
            start = time.process_time()  # one thread that waits for nothing: the work of other processes does not count
            for _batch in loader:
                pass
            seconds[name].append(time.process_time() - start)
    table.add(
        "a sample: replayable augmentation / plain torchvision v2", seconds["ours"][1:], seconds["plain"][1:], 1.15
    )


MEMORY = """
import copy, re, sys, tempfile
import torch
from contenders import distilled, lightning
from kd_lightning.models import resnet8, resnet32

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024

size = int(sys.argv[1])
x, y = torch.zeros(size, 3, 4, 4), torch.zeros(size, dtype=torch.long)
x[:] = torch.randn(3, 4, 4)
held = x.numel() * 4 / 2**20 + y.numel() * 8 / 2**20
module = distilled(resnet8(1000), resnet32(1000), cache=tempfile.mkdtemp())
lightning(lambda: module, x, y, lambda: None, 2)
print(anonymous() - held)
"""


def memory(table, rounds):
    """Measure anonymous memory at the end of a cached run, without the data, with ten times the images.

    There are 1000 classes: in memory, the larger table would be an eighth of the total.
    """
    here = Path(__file__).parent
    megabytes = {1: [], 10: []}
    for _ in range(rounds):
        for times, found in megabytes.items():
            command = [sys.executable, "-c", MEMORY, str(4000 * times)]
            found.append(float(subprocess.check_output(command, cwd=here).split()[-1]))
        log(f"anonymous memory: {megabytes}")
    table.add("anonymous memory of a cached run: 40,000 images / 4,000", megabytes[10], megabytes[1], 1.05)


def imports(table, rounds):
    """Measure the import of the package and that of its dependencies, in seconds of processor time."""
    seconds = {"import lightning, torchvision, torchmetrics": [], "import kd_lightning": []}
    for turn in range(rounds + 1):
        for statement, found in seconds.items():
            start = sum(os.times()[2:4])  # of processes that have ended
            subprocess.run([sys.executable, "-c", statement], check=True)
            if turn:
                found.append(sum(os.times()[2:4]) - start)
    base, ours = seconds.values()
    table.add("import kd_lightning / lightning, torchvision and torchmetrics", ours, base, 1.05)


PARTS = {"imports": imports, "augmentation": augmentation, "memory": memory, "networks": networks}
ROUNDS = {"imports": 9, "augmentation": 15, "memory": 2, "networks": 9}


def main():
    """Run the selected parts. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="measure how cost grows, instead of the ratios")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="on a GPU: fewer images and epochs, nothing compiled")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=[*PARTS], help="measure some of the ratios")
    options = parser.parse_args()
    if options.device == "cuda":
        from throughput_cuda import run

        return run(quick=options.quick)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if options.growth:
        from growth import run

        return run()
    start, table = time.time(), Table()
    for name in options.only:
        PARTS[name](table, ROUNDS[name])
    packages = ("torch", "torchvision", "lightning", "torchdistill", "nvidia-modelopt")
    print(", ".join(f"{name} {version(name)}" for name in packages), f"\n{(time.time() - start) / 60:.0f} minutes")
    return int(table.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
