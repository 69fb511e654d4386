"""The cost of distillation, compared with training alone, a plain loop, and other libraries.

Run: python benchmarks/throughput.py                 (at most 30 minutes; exit status 1 if a ratio misses its goal)
     python benchmarks/throughput.py --growth        (how cost grows with teachers, classes and samples)
     python benchmarks/throughput.py --device cuda   (ResNet-50 to ResNet-18 at 224 pixels, bf16, channels last;
                                                      with --quick for make gpu)

The extra ``bench`` is needed. On the CPU, one thread runs on one core, and times are CPU time. All contenders take
turns within one process, a batch each, for 9 epochs after one for warm-up. Batches have 64 images, which lie in memory.

A ratio is the median of the ratios of single epochs, which were measured in the same rounds. Its spread is the 10th and
90th percentile of the same ratios. All threads share one memory arena that returns nothing to the system. Caches are
full; to fill one costs a pass of the teacher over each view. Modules of this package run without logger and progress
bar.

The part ``networks`` has random images of 32 x 32 pixels, 100 classes and no augmentation. The part ``end_to_end`` has
augmentation. Ours is for whole batches, in our datamodule with 4 views of each image. The others call torchvision's v2
for one tensor at a time in a DataLoader, the way that is fastest for images of 32 x 32 pixels (PIL images take longer).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from measuring import Table, cpu_seconds, log, set_environment, use_one_core

if __name__ == "__main__":
    set_environment()

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
RIVALS = "torchdistill", "modelopt", "plain loop"
AT_LEAST = {"digits": 3.0, "ResNet-32 to ResNet-8": 2.2}  # rivals / cached, with augmentation


def networks(table, rounds):
    """Measure every contender on both pairs of networks, without augmentation."""
    from contenders import compete

    import kd_lightning.models

    for name, (student, teacher, size) in PAIRS.items():
        log(name)
        makers = [partial(getattr(kd_lightning.models, made), 100) for made in (student, teacher)]
        with tempfile.TemporaryDirectory() as cache:
            seconds = compete(*makers, size, rounds, cache, log)
        for of, over, most, least in RATIOS:
            table.add(f"{name}: {of} / {over}", seconds[of], seconds[over], most, least, unit=(1, "s an epoch"))


def end_to_end(table, rounds):
    """Measure ours and the other libraries with augmentation."""
    import recipes
    import torch
    from contenders import compete_end_to_end

    from kd_lightning.models import DigitsCNN, resnet8, resnet32

    digits = recipes.digits_images(19 * 64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1280, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (1280,), generator=generator)
    pairs = {
        "digits": (partial(DigitsCNN, 8), partial(DigitsCNN, 32), *digits, recipes.DIGITS),
        "ResNet-32 to ResNet-8": (partial(resnet8, 100), partial(resnet32, 100), images, labels, recipes.SMALL),
    }
    for name, (student, teacher, x, y, transforms) in pairs.items():
        log(f"{name}, end to end")
        epochs, each = (4 * rounds, 19) if name == "digits" else (rounds, 1)  # a step of the digits is short
        with tempfile.TemporaryDirectory() as cache:
            seconds = compete_end_to_end(student, teacher, x, y, transforms, epochs, each, cache, log)
        rows = [(rival, "cached", None, AT_LEAST[name]) for rival in RIVALS]
        rows.append(("cached", "student alone", None if name == "digits" else 1.05, None))
        for of, over, most, least in rows:
            row = f"{name}, augmentation included: {of} / {over}"
            table.add(row, seconds[of], seconds[over], most, least, unit=(1, "s an epoch"))


def augmentation(table, rounds):
    """Measure the time of a sample with a user's transform of single images, in the datamodule and in a DataLoader."""
    import torch
    from contenders import Augmented
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
    loaders = {
        "ours": data.train_dataloader(),
        "plain": DataLoader(Augmented(images, labels, transform), 64, shuffle=True),
    }
    seconds = {name: [] for name in loaders}
    for _ in range(rounds + 1):
        for name, loader in loaders.items():
            start = time.process_time()  # one thread that waits for nothing: the work of other processes does not count
            for _batch in loader:
                pass
            seconds[name].append(time.process_time() - start)
    name, unit = "a sample: replayable augmentation / plain torchvision v2", (1e6 / len(images), "µs")
    table.add(name, seconds["ours"][1:], seconds["plain"][1:], 1.15, unit=unit)


MEMORY = """
import sys, tempfile
import torch
from contenders import distilled, lightning
from measuring import anonymous_memory
from kd_lightning.models import resnet8, resnet32

size = int(sys.argv[1])
x, y = torch.zeros(size, 3, 4, 4), torch.zeros(size, dtype=torch.long)
x[:] = torch.randn(3, 4, 4)
held = x.numel() * 4 / 2**20 + y.numel() * 8 / 2**20
module = distilled(resnet8(1000), resnet32(1000), cache=tempfile.mkdtemp())
lightning(lambda: module, x, y, lambda: None, 2)
print(anonymous_memory() - held)
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
    name = "anonymous memory of a cached run: 40,000 images / 4,000"
    table.add(name, megabytes[10], megabytes[1], 1.05, unit=(1, "MiB"))


def imports(table, rounds):
    """Measure the import of a module of the package and that of its dependencies, in seconds of processor time."""
    others = "import lightning.pytorch, torchvision, torchmetrics"
    seconds = {others: [], "from kd_lightning import DistillModule": []}
    for turn in range(rounds + 1):
        for statement, found in seconds.items():
            taken = cpu_seconds([sys.executable, "-c", statement])
            if turn:
                found.append(taken)
    base, ours = seconds.values()
    table.add(f"from kd_lightning import DistillModule / {others}", ours, base, 1.05)


PARTS = {"imports": imports, "augmentation": augmentation, "memory": memory}
PARTS |= {"networks": networks, "end_to_end": end_to_end}
ROUNDS = {"imports": 9, "augmentation": 15, "memory": 2, "networks": 9, "end_to_end": 9}


def main():
    """Run the selected parts. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="measure how cost grows, instead of the ratios")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="on a GPU: fewer images and epochs, nothing compiled")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=[*PARTS], help="measure some of the ratios")
    parser.add_argument("--rounds", type=int, help="number of epochs or repetitions of each part")
    parser.add_argument("--store", help="file of finished parts: an interrupted run of the same code goes on")
    options = parser.parse_args()
    if options.device == "cuda":
        from throughput_cuda import run

        return run(quick=options.quick)
    use_one_core()
    if options.growth:
        from growth import run

        return run()
    start, table = time.time(), Table(options.store)
    for name in options.only:
        rounds = options.rounds or ROUNDS[name]
        table.run(name, {"rounds": rounds}, partial(PARTS[name], rounds=rounds))
    packages = ("torch", "torchvision", "lightning", "torchdistill", "nvidia-modelopt")
    print(", ".join(f"{name} {version(name)}" for name in packages), f"\n{(time.time() - start) / 60:.0f} minutes")
    return int(table.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
