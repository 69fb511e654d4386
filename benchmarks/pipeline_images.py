"""Images before they meet a network, for benchmarks/pipeline.py: augmentation alone, and image files."""

import inspect
import tempfile
import time
from pathlib import Path

import numpy as np
import recipes
import torch
import torchvision
from measuring import Child, log
from PIL import Image
from torch.utils.data import DataLoader

from kd_lightning import ImageFolder, SemiSupervisedDataModule

try:
    from kd_lightning.data.transforms import BatchTransform, Draws
except ImportError:  # of an earlier state of this package
    BatchTransform = Draws = None

BATCH, SIZE = 64, 224
BEFORE = """
from pipeline_images import folder_loader, epoch
loader = folder_loader(sys.argv[1])
turn()
while True:
    turn(epoch(loader))
"""


def augmentation(table, rounds):
    """Measure the CPU time of a batch's augmentation, for the whole batch and one image at a time."""
    torch.set_flush_denormal(True)
    generator = torch.Generator().manual_seed(0)
    digits = recipes.digits_images(BATCH)[0]
    small = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    rows = {
        "digits, affine": (digits, recipes.DIGITS),
        "32 x 32, crop, flip and normalise": (small, recipes.SMALL),
        "digits, strong view": (digits, recipes.STRONG_DIGITS),
        "32 x 32, strong view": (small, recipes.STRONG_SMALL),
    }
    for name, (images, (whole, single)) in rows.items():
        if BatchTransform is None or not isinstance(whole, BatchTransform):
            log(f"skipped: {name}: this package transforms one image at a time")
            continue
        seconds = {"whole": [], "single": []}
        for view in range(rounds + 2):
            start = time.process_time()
            whole(images, Draws(0, torch.arange(BATCH), torch.full((BATCH,), view)))
            middle = time.process_time()
            torch.stack([single(image) for image in images])
            seconds["whole"].append(middle - start)
            seconds["single"].append(time.process_time() - middle)
        found = [values[2:] for values in seconds.values()]
        table.add(f"augmentation of {BATCH}: {name}: whole batch / single images", *found, unit=(1000, "ms"))


def write_pictures(folder, count, width=500, height=375):
    """Write JPEG pictures of two classes: smooth shapes, edges and noise; about 100 KB each."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = Path(folder) / ("cats", "dogs")[number % 2] / f"{number:05}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        smooth = Image.fromarray(random.integers(0, 255, (9, 12, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        blocks = Image.fromarray(random.integers(0, 255, (30, 40, 3), np.uint8)).resize((width, height), Image.NEAREST)
        noise = random.normal(0, 12, (height, width, 1))
        pixels = 0.7 * np.asarray(smooth) + 0.3 * np.asarray(blocks) + noise
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def folder_loader(folder, **options):
    """The training loader of our datamodule, with the default transforms."""
    source = ImageFolder(str(folder), image_size=SIZE)
    return SemiSupervisedDataModule(source, val_size=0, batch_size=BATCH, **options).train_dataloader()


def epoch(loader):
    """CPU seconds of an epoch of batches."""
    start = time.process_time()
    for _batch in loader:
        pass
    return time.process_time() - start


def files(table, rounds, pictures=512, base=None):
    """Measure batches of 224 x 224 pixels from JPEG files, without a network."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "pictures"
        write_pictures(folder, pictures)
        size = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / pictures / 1000
        log(f"{pictures} pictures of {size:.0f} KB")
        theirs = torchvision.datasets.ImageFolder(str(folder), recipes.PHOTOS[1])
        loaders = {
            "torchvision": DataLoader(theirs, batch_size=BATCH, shuffle=True),
            "from files": folder_loader(folder),
        }
        if "decoded" in inspect.signature(SemiSupervisedDataModule).parameters:
            loaders["from the store"] = folder_loader(folder, decoded=str(Path(root) / "decoded"))
        ways = {name: lambda loader=loader: epoch(loader) for name, loader in loaders.items()}
        child = None if base is None else Child(BEFORE, folder, package=base)
        if child is not None:
            ways["before"] = child.turn
        seconds = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                taken = way()
                if number:  # the first epoch is a warm-up, and fills the store
                    seconds[name].append(taken)
        if child is not None:
            child.close()
    unit = (1000 / pictures, "ms an image")
    for name, least, most in (("from the store", 2.5, 0.35), ("from files", 1.6, 0.6)):
        if name not in seconds:
            log(f"skipped: {name}: this package has no store")
            continue
        row = f"JPEG: torchvision.datasets.ImageFolder and DataLoader / {name}"
        table.add(row, seconds["torchvision"], seconds[name], least=least, unit=unit)
        if "before" in seconds:
            table.add(f"JPEG: {name} / from files before", seconds[name], seconds["before"], most, unit=unit)
