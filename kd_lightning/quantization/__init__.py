"""Students of low precision: quantised layers, calibration of their ranges, and their size."""

from kd_lightning.quantization.calibration import activation_ranges, calibrate, is_calibrated, is_range_key
from kd_lightning.quantization.layers import quantize, quantized_layers
from kd_lightning.quantization.sizes import Size, bits_of, precision_of, size_of, weight_levels

__all__ = [
    "Size",
    "activation_ranges",
    "bits_of",
    "calibrate",
    "is_calibrated",
    "is_range_key",
    "precision_of",
    "quantize",
    "quantized_layers",
    "size_of",
    "weight_levels",
]
