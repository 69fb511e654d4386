"""Residual networks for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kd_lightning.errors import InputError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()  # not in place, so that any layer's output can be captured
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return feature maps (B, outputs, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.downsample(x))
        return out


class CifarResNet(nn.Sequential):
    """Residual network for small images, with projections where the shape changes.

    It has three stages ``layer1`` ... ``layer3`` of basic blocks. The second and third halve the resolution.

    Source: He et al., "Deep Residual Learning for Image Recognition" (2015), https://arxiv.org/abs/1512.03385, section
    4.2.

    Args:
        depth: Number of layers with weights, without projections: 6n + 2 for n blocks per stage.
        widths: Channels of the first convolution and of the three stages.
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Shapes:
        Input (B, in_channels, H, W). Output (B, num_classes).

    Raises:
        InputError: If the depth is not 6n + 2 with n at least 1.

    >>> sum(p.numel() for p in CifarResNet(depth=20).parameters())
    278324
    """

    def __init__(
        self,
        depth: int = 20,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 100,
        in_channels: int = 3,
    ) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise InputError(f"depth must be 6n + 2 with n at least 1, such as 8, 20, 56, got {depth}")

        def stage(inputs: int, outputs: int, stride: int) -> nn.Module:
            first = BasicBlock(inputs, outputs, stride)
            return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))

        stem, *_, last = widths
        layers = OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(in_channels, stem, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(stem),
            relu=nn.ReLU(),
            layer1=stage(stem, widths[1], 1),
            layer2=stage(widths[1], widths[2], 2),
            layer3=stage(widths[2], widths[3], 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(last, num_classes),
        )
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet8(num_classes: int = 100) -> CifarResNet:
    """ResNet-8, 0.08M parameters."""
    return CifarResNet(8, num_classes=num_classes)


def resnet14(num_classes: int = 100) -> CifarResNet:
    """ResNet-14, 0.18M parameters."""
    return CifarResNet(14, num_classes=num_classes)


def resnet20(num_classes: int = 100) -> CifarResNet:
    """ResNet-20, 0.28M parameters."""
    return CifarResNet(20, num_classes=num_classes)


def resnet32(num_classes: int = 100) -> CifarResNet:
    """ResNet-32, 0.47M parameters."""
    return CifarResNet(32, num_classes=num_classes)


def resnet44(num_classes: int = 100) -> CifarResNet:
    """ResNet-44, 0.67M parameters."""
    return CifarResNet(44, num_classes=num_classes)


def resnet56(num_classes: int = 100) -> CifarResNet:
    """ResNet-56, 0.86M parameters."""
    return CifarResNet(56, num_classes=num_classes)


def resnet110(num_classes: int = 100) -> CifarResNet:
    """ResNet-110, 1.74M parameters."""
    return CifarResNet(110, num_classes=num_classes)


def resnet8x4(num_classes: int = 100) -> CifarResNet:
    """ResNet-8, four times as wide (the first convolution twice), 1.23M parameters."""
    return CifarResNet(8, (32, 64, 128, 256), num_classes)


def resnet32x4(num_classes: int = 100) -> CifarResNet:
    """ResNet-32, four times as wide (the first convolution twice), 7.43M parameters."""
    return CifarResNet(32, (32, 64, 128, 256), num_classes)
