"""Tiny networks without BatchNorm, whose results do not depend on the other samples of a batch; and their data."""

from collections import OrderedDict

import torch
from torch import nn
from torch.utils.data import DataLoader


def small(width=3, seed=0, classes=4):
    """Two convolutions and a linear layer for pictures (B, 1, 8, 8)."""
    torch.manual_seed(seed)
    layers = OrderedDict(
        first=nn.Conv2d(1, width, 3, padding=1),
        act=nn.Tanh(),
        second=nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        act2=nn.Tanh(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(2 * width, classes),
    )
    return nn.Sequential(layers)


class Counting(nn.Module):
    """Counts its passes."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


def layers_of(network, x):
    """The outputs of all layers, by name; "" is that of the last one."""
    outputs = {}
    for name, layer in network.named_children():
        x = outputs[name] = layer(x)
    return outputs | {"": x}


def pictures(count=12, seed=5, classes=4):
    """Pictures and labels."""
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(count) % classes


class Resumable(DataLoader):
    """Goes on where a run stopped in mid-epoch."""

    done = start = 0

    def state_dict(self):
        return {"done": self.done % len(self)}

    def load_state_dict(self, state):
        self.start = state["done"]

    def __iter__(self):
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.done = number + 1
                yield batch
