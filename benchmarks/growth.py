"""How the cost of cached teachers grows, for benchmarks/throughput.py --growth (about 10 minutes)."""

import copy
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from contenders import BATCH, alone, distilled, ensemble, lightning
from measuring import anonymous_memory
from turns import Turns

from kd_lightning.cache.codecs import DenseCodec
from kd_lightning.cache.store import OutputCache
from kd_lightning.models import resnet8, resnet32

SIZE, EPOCHS = 1024, 6


def data(classes):
    """In-memory images with random labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, 3, 32, 32, generator=generator), torch.randint(classes, (SIZE,), generator=generator)


def compete(ways):
    """Train in turns: {name: seconds of each epoch}."""
    turns = Turns(EPOCHS, SIZE // BATCH)
    for name, way in ways.items():
        turns.add(name, way)
    return turns.run()


def against(seconds, base):
    """The median of the ratios of single epochs of each contender over those of the base."""
    return {
        name: statistics.median(a / b for a, b in zip(found, seconds[base], strict=True))
        for name, found in seconds.items()
    }


def teachers():
    """Print the time of an epoch with 1, 2, 4 and 8 teachers, cached and live."""
    torch.manual_seed(0)
    student, experts = resnet8(100), [resnet32(100) for _ in range(8)]
    x, y = data(100)
    ways = {"alone": partial(lightning, lambda: alone(copy.deepcopy(student)), x, y)}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2, 4, 8):
            for name, cache in (("cached", folder), ("live", None)):

                def make(count=count, cache=cache):
                    return ensemble(copy.deepcopy(student), copy.deepcopy(experts[:count]), cache)

                ways[f"{name} {count}"] = partial(lightning, make, x, y)
        found = against(compete(ways), "alone")
    print("| teachers | epoch, cached / student alone | epoch, live / student alone |\n|---|---|---|")
    for count in (1, 2, 4, 8):
        print(f"| {count} | {found[f'cached {count}']:.2f} | {found[f'live {count}']:.2f} |", flush=True)


def classes():
    """Print the time of an epoch with 10 to 10,000 classes."""
    print("\n| classes | epoch, cached / alone | the 10 likeliest, cached / alone | bytes a view | of the 10 |")
    print("|---|---|---|---|---|")
    for count in (10, 100, 1000, 10000):
        x, y = data(count)
        torch.manual_seed(0)
        student, teacher = resnet8(count), resnet32(count)
        ways = {"alone": partial(lightning, lambda: alone(copy.deepcopy(student)), x, y)}  # noqa: B023
        with tempfile.TemporaryDirectory() as folder:
            for name, top in (("all", None), ("top", min(10, count - 1))):

                def make(top=top, folder=folder, student=student, teacher=teacher):
                    return distilled(copy.deepcopy(student), copy.deepcopy(teacher), cache=folder, cache_top_k=top)

                ways[name] = partial(lightning, make, x, y)
            found = against(compete(ways), "alone")
            sizes = sorted(path.stat().st_size // SIZE for path in Path(folder).glob("*/outputs"))
        few, whole = (sizes[0], sizes[-1]) if count > 10 else (sizes[-1], sizes[0])
        print(f"| {count} | {found['all']:.2f} | {found['top']:.2f} | {whole} | {few} |", flush=True)


def samples():
    """Print the cost of the cache alone, with random logits of 100 classes, and 10 thousand to a million rows."""
    form, chunk = DenseCodec(100, "float16"), 1024
    logits = form.encode(torch.randn(chunk, 100, generator=torch.Generator().manual_seed(0)))
    print("\n| rows | size, MiB | fill, µs a row | check, µs a row | read 64 rows, µs | anonymous memory, MiB |")
    print("|---|---|---|---|---|---|")
    for rows in (10**4, 10**5, 10**6):
        with tempfile.TemporaryDirectory() as folder:
            cache = OutputCache(Path(folder), "made-up", {}, rows, form.row_bytes, chunk=chunk)
            before, start = anonymous_memory(), time.perf_counter()
            for number in range(cache.chunks):
                cache.write(number, logits[: len(cache.rows_of(number))])
            filled = time.perf_counter()
            assert not cache.damaged(range(cache.chunks))
            checked = time.perf_counter()
            order = np.random.default_rng(0).integers(0, rows, (2000, 64))
            form.decode(cache.read(order[0]))
            began = time.perf_counter()
            for numbers in order:
                form.decode(cache.read(numbers))
            reading = (time.perf_counter() - began) / len(order)
            memory = anonymous_memory() - before
        costs = [1e6 * (filled - start) / rows, 1e6 * (checked - filled) / rows, 1e6 * reading]
        cells = " | ".join(f"{cost:.2f}" for cost in costs)
        print(f"| {rows:,} | {cache.size / 2**20:.0f} | {cells} | {memory:.1f} |", flush=True)


def run():
    """Print all tables. Return the exit status."""
    teachers()
    classes()
    samples()
    return 0
