"""Wide residual networks for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kd_lightning.errors import InputError


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, and a shortcut, projected where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()  # not in place, so that any layer's output can be captured
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return feature maps (B, outputs, H / stride, W / stride), before an activation."""
        activated = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        out: Tensor = residual + (x if self.shortcut is None else self.shortcut(activated))
        return out


class WideResNet(nn.Sequential):
    """Wide residual network for small images, without dropout.

    It has three stages ``layer1`` ... ``layer3`` of pre-activation blocks. The second and third halve the resolution.

    Source: Zagoruyko, Komodakis, "Wide Residual Networks" (2016), https://arxiv.org/abs/1605.07146.

    Args:
        depth: 6n + 4 for n blocks per stage. It counts the blocks' convolutions, the first one, and three projections.
        widen_factor: Factor of the stages' 16, 32 and 64 channels, at least 1.
        num_classes: Number of logits.

    Shapes:
        Input (B, 3, H, W). Output (B, num_classes).

    Raises:
        InputError: If the depth is not 6n + 4 with n at least 1, or the widen_factor is below 1.

    >>> sum(p.numel() for p in WideResNet(depth=16, widen_factor=2).parameters())
    703284
    """

    def __init__(self, depth: int = 16, widen_factor: int = 2, num_classes: int = 100) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise InputError(f"depth must be 6n + 4 with n at least 1, such as 16, 28, 40, got {depth}")
        if widen_factor < 1:
            raise InputError(f"widen_factor must be at least 1, got {widen_factor}")

        def stage(inputs: int, outputs: int, stride: int) -> nn.Module:
            first = PreActivationBlock(inputs, outputs, stride)
            return nn.Sequential(first, *(PreActivationBlock(outputs, outputs) for _ in range(blocks - 1)))

        widths = [widen_factor * width for width in (16, 32, 64)]
        layers = OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
            layer1=stage(16, widths[0], 1),
            layer2=stage(widths[0], widths[1], 2),
            layer3=stage(widths[1], widths[2], 2),
            bn1=nn.BatchNorm2d(widths[2]),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(widths[2], num_classes),
        )
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


def wrn_16_1(num_classes: int = 100) -> WideResNet:
    """WRN-16-1, 0.18M parameters."""
    return WideResNet(16, 1, num_classes)


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    """WRN-16-2, 0.70M parameters."""
    return WideResNet(16, 2, num_classes)


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    """WRN-40-1, 0.57M parameters."""
    return WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    """WRN-40-2, 2.26M parameters."""
    return WideResNet(40, 2, num_classes)
