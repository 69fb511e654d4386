"""U-Net for segmentation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kd_lightning.errors import InputError


class UNet(nn.Module):
    """U-Net: levels of convolutions with pooling between them, and the same levels back with shortcuts.

    Convolutions are padded, so that outputs have the size of the images, and BatchNorm follows each; the paper has
    neither. Sides that are no multiple of ``2 ** depth`` are padded at the bottom and at the right by their last
    pixels, and logits of these pixels are cut off.

    Layers are ``encoder.0`` (full size) to ``encoder.<depth>`` (smallest size), ``up`` and ``decoder`` of 0 (full size)
    to ``depth - 1``, and ``head``.

    Source: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation" (2015),
    https://arxiv.org/abs/1505.04597.

    Args:
        width: Channels at full size, at least 1. Each level below has twice as many. The paper has 64.
        depth: Number of poolings, at least 1. The paper has 4.
        in_channels: Channels of the images.
        num_classes: Number of logits of each pixel.

    Shapes:
        Input (B, in_channels, H, W). Output (B, num_classes, H, W).

    Raises:
        InputError: If ``width`` or ``depth`` is below 1.

    >>> sum(p.numel() for p in UNet(width=4, depth=2, num_classes=5).parameters())
    7569
    """

    def __init__(self, width: int = 64, depth: int = 4, in_channels: int = 3, num_classes: int = 2) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"width must be at least 1, got {width}")
        if depth < 1:
            raise InputError(f"depth must be at least 1, got {depth}")
        widths = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(
            _level(inputs, outputs) for inputs, outputs in zip([in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * channels, channels, 2, stride=2) for channels in widths[:-1])
        self.decoder = nn.ModuleList(_level(2 * channels, channels) for channels in widths[:-1])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W)."""
        height, width = x.shape[-2:]
        step = 2 ** len(self.up)
        bottom, right = -height % step, -width % step
        if bottom or right:
            x = pad(x, [0, right, 0, bottom], mode="replicate")
        shortcuts = []
        for level in self.encoder[:-1]:
            shortcuts.append(level(x))
            x = self.pool(shortcuts[-1])
        x = self.encoder[-1](x)
        for number in reversed(range(len(self.up))):
            x = self.decoder[number](torch.cat([shortcuts[number], self.up[number](x)], dim=1))
        logits: Tensor = self.head(x)
        return logits[..., :height, :width] if bottom or right else logits


def _level(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
