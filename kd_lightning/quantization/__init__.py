"""Students of low precision: quantised layers, their ranges, and their size."""

from kd_lightning.quantization.calibration import calibrate, is_calibrated
from kd_lightning.quantization.layers import quantize, quantized_layers
from kd_lightning.quantization.sizes import Size, precision_of, size_of

__all__ = [
    "quantize",
    "quantized_layers",
    "calibrate",
    "is_calibrated",
    "Size",
    "precision_of",
    "size_of",
]
