"""Small networks that torchvision and timm lack.

Functions such as ``kd_lightning.models.resnet20`` build the networks of the usual distillation benchmark on CIFAR-100.
``from_pretrained`` loads trained networks of transformers.
"""

from kd_lightning.models.cifar_resnet import (
    CifarResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from kd_lightning.models.crepe import Crepe
from kd_lightning.models.digits import DigitsCNN
from kd_lightning.models.fitnet import FitNet
from kd_lightning.models.harmonic_net import HarmonicNet
from kd_lightning.models.hugging_face import from_pretrained
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.models.unet import UNet
from kd_lightning.models.vgg import CifarVGG, vgg8, vgg13
from kd_lightning.models.wide_resnet import WideResNet, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "Crepe",
    "DigitsCNN",
    "FitNet",
    "HarmonicNet",
    "UNet",
    "TextCNN",
    "CifarResNet",
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet8x4",
    "resnet32x4",
    "WideResNet",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
    "CifarVGG",
    "vgg8",
    "vgg13",
    "from_pretrained",
]
