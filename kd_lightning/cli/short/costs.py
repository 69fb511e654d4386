"""What a network costs: parameters, megabytes, multiplications and time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.cli.short.networks import Network
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.quantization.sizes import size_of

_ROWS = 4  # of the batch whose training step is timed


class Costs(NamedTuple):
    """What a network costs on this machine.

    Attributes:
        parameters: Number of parameters.
        megabytes: Size of its weights in MB (10^6 bytes).
        macs: Multiply-accumulates for one picture.
        latency: Milliseconds for one picture, on the CPU.
        forward: Seconds for one picture of a batch, on the CPU.
        step: Seconds for one picture of a training step, on the CPU.
    """

    parameters: int
    megabytes: float
    macs: float
    latency: float
    forward: float
    step: float


def measure(model: nn.Module, network: Network, classes: int, image_size: int) -> Costs:
    """Measure a network on random pictures. Its weights stay as they are, but for statistics of normalisations.

    Args:
        model: The network as it was built.
        network: The name that it was built by.
        classes: Number of classes.
        image_size: Side of the pictures in pixels.

    Raises:
        InputError: If it does not take RGB pictures of this size, or does not give a logit for each class.
    """
    what = f"{network.option}: {network.name}"
    x = torch.rand(_ROWS, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            logits = logits_of(model.eval()(x[:1]), what)
    except Exception as error:  # of a network that takes other inputs, can be anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        size = f"{image_size}x{image_size}"
        hint = f"; it takes {fixed}x{fixed}: --image-size {fixed}" if (fixed := fixed_size(model)) else ""
        raise InputError(f"{what} does not take RGB pictures of {size} pixels{hint}; its error: {reason}") from error
    if logits.shape != (1, classes):
        raise InputError(f"{what} must give logits (B, {classes}), one for each class, got {[*logits.shape]} for B = 1")
    latency = Timer("with no_grad(): net(x)", globals={"net": model, "x": x[:1], "no_grad": torch.no_grad})
    ms = latency.blocked_autorange(min_run_time=0.05).median * 1000
    with torch.no_grad():
        forward = _seconds(lambda: model(x)) / _ROWS
    model.train()

    def train() -> None:
        torch.autograd.backward(logits_of(model(x), what).sum())

    step = _seconds(train) / _ROWS
    parameters = sum(p.numel() for p in model.parameters())
    return Costs(parameters, size_of(model).stored / 1e6, counter.get_total_flops() / 2, ms, forward, step)


def _seconds(call: Callable[[], object]) -> float:
    """Return the time of the second of two calls."""
    for _ in range(2):
        start = time.perf_counter()
        call()
    return time.perf_counter() - start


def fixed_size(model: nn.Module) -> int | None:
    """Return the side of the pictures that a network is made for, None if it takes others."""
    config: Any = getattr(model, "pretrained_cfg", None)  # of timm's networks
    if isinstance(config, dict) and (config.get("fixed_input_size") or config.get("min_input_size")):
        return int((config.get("min_input_size") or config["input_size"])[-1])
    size = getattr(model, "image_size", None)  # torchvision's Vision Transformer
    return size if isinstance(size, int) else None
