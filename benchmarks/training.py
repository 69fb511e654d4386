"""What the benchmarks of accuracy share: the training, its measurement, finished fits on disk, and processes."""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from measuring import code_hash, log
from scipy import stats
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR


def make_trainer(**options):
    """Make a trainer for the CPU that writes nothing and does not validate."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", "limit_val_batches": 0} | silent | options)


def train(steps, seed, make_network, method, data, callbacks=(), lr=0.01):
    """Train for so many steps, with AdamW and a cosine schedule. Return the module.

    Args:
        steps: Number of steps.
        seed: Seed of initial weights and order. The datamodule has its own.
        make_network: Function that makes the network. It is called after seeding, so the initial weights depend on the
            seed alone.
        method: Function of the network, the optimiser and the schedule that makes the module.
        data: Datamodule.
        callbacks: Callbacks.
        lr: First learning rate.
    """
    schedule = partial(CosineAnnealingLR, T_max=steps)
    options = {"optimizer": partial(AdamW, lr=lr, weight_decay=0.01), "lr_scheduler": schedule, "lr_interval": "step"}
    seed_everything(seed, verbose=False)
    module = method(make_network(), **options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(max_steps=steps, max_epochs=-1, callbacks=[*callbacks], default_root_dir=folder)
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps
    return module


@torch.no_grad()
def accuracy(network, loader):
    """The percentage of samples that the network predicts right."""
    network.eval()
    right = torch.cat([network(batch.x).argmax(dim=1) == batch.y for batch in loader])
    return 100 * float(right.double().mean())


def measure(module, data):
    """Accuracy in %, on validation images if there are some, else on test images."""
    return accuracy(module.student, data.val_dataloader() or data.test_dataloader())


def spread(values, digits=2):
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def difference(values, others, comparisons=1):
    """Mean of the paired differences, and its 95 % interval, corrected (Bonferroni) for the number of comparisons."""
    gaps = [one - other for one, other in zip(values, others, strict=True)]
    half = stats.t.ppf(1 - 0.025 / comparisons, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    mean = statistics.mean(gaps)
    return mean, mean - half, mean + half


def interval(values, others, digits=2, comparisons=1):
    """The same as text."""
    mean, low, high = (f"{number:+.{digits}f}" for number in difference(values, others, comparisons))
    return f"{mean} [{low}, {high}]"


def holm(p_values):
    """P values, corrected for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, row in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[row]))
        corrected[row] = highest
    return corrected


def versions(*others):
    """Names and versions of the main libraries, and of others."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", *others))


class Fits:
    """Figures of finished fits, in a file of JSON lines: an interrupted benchmark continues with the next fit.

    A figure counts only for the same settings, versions and sources. Sources are those of the package, of the script,
    and of the files of this folder that the script imports. Make it in the script's first process.

    Args:
        store: The file. Default: None, which means none.
    """

    def __init__(self, store=None):
        loaded = {*sys.modules, Path(sys.argv[0]).stem}
        code = code_hash([file for file in Path(__file__).parent.glob("*.py") if file.stem in loaded])
        self.store, self.known = store, {"code": code, "versions": versions("scikit-learn")}

    def get(self, settings, fit):
        """Return the figures of a fit: those of the file, or those that ``fit()`` returns, which are appended to it.

        Args:
            settings: List of all that this fit does not share with the other fits of the script.
            fit: Function that trains, and returns figures that JSON can express.
        """
        key = json.loads(json.dumps(self.known | {"settings": settings}))
        lines = self.store.read_text().splitlines() if self.store is not None and self.store.exists() else []
        for found in map(json.loads, lines):
            if found["key"] == key:
                return found["figures"]
        line = json.dumps({"key": key, "figures": fit()})
        if self.store is not None:
            with self.store.open("a") as file:
                file.write(line + "\n")
        figures = json.loads(line)["figures"]
        log(f"{settings}: {figures}")
        return figures


def quiet():
    """One thread, and no messages of Lightning."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def in_parallel(function, cases, processes):
    """Call a function for each case, in so many processes of one thread each. Return the results in order."""
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=quiet) as pool:
        return list(pool.map(function, cases))


def make_parser(description):
    """Make a parser with ``--store`` and ``--processes``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="file of finished fits, from which an interrupted run continues")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each; default: 2")
    return parser
