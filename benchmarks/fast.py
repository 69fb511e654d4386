"""What each setting that ``fast: true`` may pick is worth on a CPU.

Run: python benchmarks/fast.py [--compile] [--networks DigitsCNN resnet8]     (10 minutes; with --compile 20)

A step is forward, backward and optimiser on one batch of 64 random images. All settings take turns within one process,
a step each. A ratio is CPU time over that of the plain step (float32, contiguous memory, optimiser without "fused"):
the median of the ratios of single steps, with their 10th and 90th percentile. "picked" is what fast: true picks:
channels last, for Adam the fused form, and with one thread, on a CPU that has instructions for bfloat16, bf16-mixed.
--compile also compiles each network with inductor, from an empty cache, and prints the CPU seconds of the first step.
With several threads, nothing else may run: threads that wait for one another spin.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from copy import deepcopy

import torch
import torchvision
from torch import nn

from kd_lightning.models import DigitsCNN, resnet8, wrn_16_2

# threads that wait do not count, and compilers run in this process
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "MALLOC_ARENA_MAX": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
ENVIRONMENT |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**32))
if __name__ == "__main__" and os.environ | ENVIRONMENT != {**os.environ}:
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)

NETWORKS = {  # how it is built, shape of an image, number of steps
    "DigitsCNN": (lambda: DigitsCNN(8), (1, 8, 8), 300),
    "resnet8": (lambda: resnet8(num_classes=100), (3, 32, 32), 40),
    "wrn_16_2": (lambda: wrn_16_2(num_classes=100), (3, 32, 32), 12),
    "resnet18": (lambda: torchvision.models.resnet18(), (3, 224, 224), 4),
}
OPTIMIZERS = {
    "SGD": lambda parameters, fused: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=fused),
    "Adam": lambda parameters, fused: torch.optim.Adam(parameters, lr=0.001, fused=fused),
}
PLAIN = {"channels_last": False, "optimizer": "SGD", "fused": False, "bf16": False, "compiled": False}
SETTINGS = {
    "SGD": {},
    "Adam": {"optimizer": "Adam"},
    "channels last": {"channels_last": True},
    "fused SGD": {"fused": True},
    "fused Adam": {"optimizer": "Adam", "fused": True},
    "bf16-mixed": {"bf16": True},
    "bf16-mixed, channels last": {"bf16": True, "channels_last": True},
    "picked, SGD": {"channels_last": True},
    "picked, Adam": {"channels_last": True, "optimizer": "Adam", "fused": True},
}
COMPILED = {
    "compiled": {"compiled": True},
    "compiled, channels last": {"compiled": True, "channels_last": True},
}


def cpu_seconds():
    """CPU seconds of this process and of the compilers that it started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Contender:
    """One network, trained under one setting."""

    def __init__(self, network, optimizer, channels_last, fused, bf16, compiled):
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.optimizer = OPTIMIZERS[optimizer](network.parameters(), fused)
        self.network = torch.compile(network) if compiled else network
        self.bf16 = bf16
        self.seconds = []

    def step(self, x, y):
        """Train one step, and record its CPU seconds."""
        start = time.process_time()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = nn.functional.cross_entropy(self.network(x), y)
        loss.backward()
        self.optimizer.step()
        loss.item()
        self.seconds.append(time.process_time() - start)


def measure(name, threads, settings):
    """Print the rows of one network."""
    torch.set_num_threads(threads)
    make, shape, steps = NETWORKS[name]
    torch.manual_seed(0)
    first = make()
    x, y = torch.randn(64, *shape), torch.randint(10, (64,))
    contenders, firsts = {}, {}
    for setting, changes in settings.items():
        if setting.startswith("picked"):
            changes = changes | {"bf16": threads == 1 and torch.cpu._is_avx512_bf16_supported()}
        contenders[setting] = Contender(deepcopy(first), **(PLAIN | changes))
        start = cpu_seconds()
        contenders[setting].step(x, y)
        firsts[setting] = cpu_seconds() - start
    for contender in contenders.values():
        contender.step(x, y)
        contender.seconds.clear()
    for _ in range(steps):
        for contender in contenders.values():
            contender.step(x, y)
    for setting, contender in contenders.items():
        base = contenders["Adam" if "Adam" in setting else "SGD"]
        ratios = [a / b for a, b in zip(contender.seconds, base.seconds, strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=10, method="inclusive")
        first = f"{firsts[setting]:.1f}" if "compiled" in setting else ""
        print(
            f"| {name} | {threads} | {setting} | {1000 * statistics.median(contender.seconds):.2f} "
            f"| {statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} | {first} |",
            flush=True,
        )


def main():
    """Parse the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--compile", action="store_true", help="also compile the networks")
    options = parser.parse_args()
    print("| network | threads | setting | CPU ms a step | ratio | 10 % to 90 % | first step, CPU s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for threads in options.threads:
            for name in options.networks:
                measure(name, threads, SETTINGS | (COMPILED if options.compile else {}))


if __name__ == "__main__":
    main()
