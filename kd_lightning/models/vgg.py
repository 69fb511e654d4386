"""Plain convolutional networks for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from kd_lightning.errors import InputError


class CifarVGG(nn.Sequential):
    """VGG for small images, with BatchNorm, global pooling and one linear layer.

    It has five stages ``layer1`` ... ``layer5`` of 3x3 convolutions with 64, 128, 256, 512 and 512 channels. Each of
    the first three ends with max-pooling, which halves the resolution.

    Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2014),
    https://arxiv.org/abs/1409.1556.

    Args:
        depth: 5n + 3 for n convolutions per stage. It counts the original's three linear layers.
        num_classes: Number of logits.

    Shapes:
        Input (B, 3, H, W), H and W at least 8. Output (B, num_classes).

    Raises:
        InputError: If the depth is not 5n + 3 with n at least 1.

    >>> sum(p.numel() for p in CifarVGG(depth=8).parameters())
    3965028
    """

    def __init__(self, depth: int = 8, num_classes: int = 100) -> None:
        convolutions, rest = divmod(depth - 3, 5)
        if rest or convolutions < 1:
            raise InputError(f"depth must be 5n + 3 with n at least 1, such as 8, 13, got {depth}")

        def stage(inputs: int, outputs: int) -> nn.Module:
            layers: list[nn.Module] = []
            for channels in [inputs, *[outputs] * (convolutions - 1)]:
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers)

        super().__init__(
            OrderedDict[str, nn.Module](
                layer1=stage(3, 64),
                pool1=nn.MaxPool2d(2),
                layer2=stage(64, 128),
                pool2=nn.MaxPool2d(2),
                layer3=stage(128, 256),
                pool3=nn.MaxPool2d(2),
                layer4=stage(256, 512),
                layer5=stage(512, 512),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(512, num_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)


def vgg8(num_classes: int = 100) -> CifarVGG:
    """VGG-8, 3.97M parameters."""
    return CifarVGG(8, num_classes)


def vgg13(num_classes: int = 100) -> CifarVGG:
    """VGG-13, 9.46M parameters."""
    return CifarVGG(13, num_classes)
