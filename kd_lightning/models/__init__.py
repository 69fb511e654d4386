"""The few small networks that torchvision and timm lack."""

from kd_lightning.models.digits import DigitsCNN

__all__ = ["DigitsCNN"]
