"""A small network for 8x8 grey images."""

from torch import Tensor, nn


class DigitsCNN(nn.Sequential):
    """Three convolutions and a linear layer.

    Args:
        width: Channels of the first convolution. The second and third have 2 and 4 times as many.
        num_classes: Number of logits.
        dropout: Probability of dropping a feature before the linear layer.

    Shapes:
        Input (B, 1, H, W), H and W at least 4. Output (B, num_classes).

    >>> sum(p.numel() for p in DigitsCNN(width=4).parameters())
    1702
    """

    def __init__(self, width: int = 16, num_classes: int = 10, dropout: float = 0.0) -> None:
        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *block(1, width),
            *block(width, 2 * width),
            nn.MaxPool2d(2),
            *block(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits
