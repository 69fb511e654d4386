"""Thin and deep networks without shortcuts and without BatchNorm (FitNets)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError


class Maxout(nn.Module):
    """The larger of channels c and c + C of 2C channels: maxout with two pieces.

    Source: Goodfellow et al., "Maxout Networks" (2013), https://arxiv.org/abs/1302.4389.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ...) from (B, 2 C, ...)."""
        return torch.maximum(*x.chunk(2, dim=1))


class FitNet(nn.Sequential):
    """A thin, deep network that is hard to train without hints.

    It has stages ``stage1`` ... of 3x3 convolutions with max-pooling between them, global average pooling, a hidden
    layer, and a linear layer. Weights have torch's default initialisation.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (2014), https://arxiv.org/abs/1412.6550, appendix.

    Args:
        stages: Channels of each convolution, by stage. The default is the paper's FitNet 4.
        hidden: Units of the hidden layer. If None, there is no hidden layer.
        maxout: If True, maxout of two pieces follows each convolution and the hidden layer, as in the paper's
            convolutions. If False, ReLU follows, and the network is even harder to train.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Shapes:
        Input (B, in_channels, H, W), H and W at least 2 ** (stages - 1). Output (B, num_classes).

    Raises:
        InputError: If a layer has less than one channel or unit.

    >>> sum(p.numel() for p in FitNet(num_classes=10).parameters())
    2548602
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...] = ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6),
        hidden: int | None = 500,
        maxout: bool = True,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        if min((width for widths in stages for width in widths), default=1) < 1:
            raise InputError(f"stages must have at least 1 channel in every layer, got {stages}")
        if hidden is not None and hidden < 1:
            raise InputError(f"hidden must be at least 1 unit, got {hidden}")

        def block(layer: type[nn.Module], inputs: int, outputs: int, *args: int) -> nn.Module:
            return nn.Sequential(
                layer(inputs, outputs * (2 if maxout else 1), *args), Maxout() if maxout else nn.ReLU()
            )

        layers = OrderedDict[str, nn.Module]()
        channels = in_channels
        for number, widths in enumerate(stages, 1):
            stage = []
            for width in widths:
                stage.append(block(nn.Conv2d, channels, width, 3, 1, 1))
                channels = width
            layers[f"stage{number}"] = nn.Sequential(*stage)
            if number < len(stages):
                layers[f"pool{number}"] = nn.MaxPool2d(2)
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        if hidden is not None:
            layers["hidden"] = block(nn.Linear, channels, hidden)
        layers["fc"] = nn.Linear(channels if hidden is None else hidden, num_classes)
        super().__init__(layers)
