"""Small networks whose layers are traced and paired."""

import torch
from torch import nn


class Student(nn.Module):
    """A side branch is computed first, and joins above; one layer is never reached."""

    def __init__(self):
        super().__init__()
        self.side = nn.Conv2d(3, 6, 1)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.5)
        self.mid = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(5, 6, 1, bias=False)
        self.unused = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        side = self.side(x).mean((2, 3))
        z = self.mid(self.drop(self.stem(x)).relu())
        return self.head(self.deep(z.relu()).mean((2, 3)) + side)


STEM = {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}
MID = STEM | {"mid.weight", "mid.bias"}
DEEP = MID | {"deep.weight"}


class Network(nn.Module):
    """A teacher."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU())
        self.top = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(7, 8, 1), nn.Sigmoid())
        self.unused = nn.Tanh()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.top(self.body(x)).mean((2, 3)))


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Sequences(nn.Module):
    """Convolutions over time, then a transformer; ``cut`` is applied to the maps."""

    def __init__(self, width, length=8, cut=lambda layer, x: layer(x)):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool1d(length)
        self.block = nn.TransformerEncoderLayer(width, 1, 4, batch_first=True)
        self.head = nn.Linear(width, 5)
        self.cut = cut

    def forward(self, x):
        tokens = self.pool(self.cut(self.conv, x)).transpose(1, 2)
        return self.head(self.block(tokens).mean(1))


WAVES = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0))


def sequences(*args, **kwargs):
    """Sequences with the weights of one seed."""
    torch.manual_seed(0)
    return Sequences(*args, **kwargs)


def random_tensor(*shape, seed=0):
    """Random float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
