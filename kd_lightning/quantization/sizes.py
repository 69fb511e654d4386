"""Measure a network's weights: levels, bits, bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.quantization.layers import quantized_layers


def weight_levels(layer: Any) -> tuple[Tensor, Tensor]:
    """Return a quantised layer's weights and their rounded levels, both in units of the scale of their channel.

    Returns:
        The float weights (before rounding), and integers of the same shape.
    """
    with torch.no_grad():
        rounded = layer.quant_weight()
        return layer.weight / rounded.scale, rounded.int(float_datatype=False)


def bits_of(layer: Any) -> tuple[int | str, int]:
    """Return the bits of a quantised layer's weights (or ``"ternary"``) and of its input (32 if it is float)."""
    weight = int(layer.weight_quant.bit_width())
    ternary = weight == 2 and layer.weight_quant.is_narrow_range
    activation = int(layer.input_quant.bit_width()) if layer.input_quant.is_quant_enabled else 32
    return "ternary" if ternary else weight, activation


def precision_of(model: nn.Module) -> str:
    """Return the precision as papers write it: ``fp32``, ``8A-4W``, ``8A-ternary``; mixed ones joined by a plus."""
    found = dict.fromkeys(bits_of(layer) for layer in quantized_layers(model).values())
    names = [f"{inputs}A-{weights if weights == 'ternary' else f'{weights}W'}" for weights, inputs in found]
    return " + ".join(names) or "fp32"


class Size(NamedTuple):
    """The size of a network's weights.

    Attributes:
        stored: Bytes with quantised weights at their bits (ternary ones at 2), a float32 scale for each channel and
            each activation, and all other tensors (skipped layers, biases, normalisation) at their own type.
        coded: Bytes with the quantised weights of each layer at the entropy of their levels, the limit of an entropy
            coder.
    """

    stored: float
    coded: float


def size_of(model: nn.Module) -> Size:
    """Return the size of a network's weights in bytes; a shared weight counts once."""
    layers = quantized_layers(model)
    seen = {id(layer.weight) for layer in layers.values()}
    held = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    rest = [t for key, t in held.items() if t.is_floating_point() and key not in seen]
    bits = 8.0 * sum(tensor.numel() * tensor.element_size() for tensor in rest)
    coded = bits
    for layer in layers.values():
        _, levels = weight_levels(layer)
        weight, _ = bits_of(layer)
        scales = 32 * layer.quant_weight().scale.numel()
        share = torch.unique(levels, return_counts=True)[1].double() / levels.numel()
        bits += scales + levels.numel() * (2 if weight == "ternary" else int(weight))
        coded += scales + levels.numel() * float(-(share * share.log2()).sum())
    return Size(bits / 8, coded / 8)
