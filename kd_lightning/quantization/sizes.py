"""What a network's weights take: levels, bits, bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.quantization.layers import quantized_layers


def weight_levels(layer: Any) -> tuple[Tensor, Tensor]:
    """A quantised layer's weights and the levels they are rounded to, both in units of their channel's scale.

    Returns:
        The float weights (as the layer holds them), and integers of the same shape.
    """
    with torch.no_grad():
        rounded = layer.quant_weight()
        return layer.weight / rounded.scale, rounded.int(float_datatype=False)


def bits_of(layer: Any) -> tuple[int | str, int]:
    """Bits of a quantised layer's weights (or ``"ternary"``), and of its input (32 where it is float)."""
    weight = int(layer.weight_quant.bit_width())
    ternary = weight == 2 and layer.weight_quant.is_narrow_range
    activation = int(layer.input_quant.bit_width()) if layer.input_quant.is_quant_enabled else 32
    return "ternary" if ternary else weight, activation


def precision_of(model: nn.Module) -> str:
    """As papers write it: ``fp32``, ``8A-4W``, ``8A-ternary``; mixed ones joined by a plus."""
    found = dict.fromkeys(bits_of(layer) for layer in quantized_layers(model).values())
    names = [f"{inputs}A-{weights if weights == 'ternary' else f'{weights}W'}" for weights, inputs in found]
    return " + ".join(names) or "fp32"


class Size(NamedTuple):
    """What a network's weights take, in bytes.

    Attributes:
        stored: Quantised weights at their bits (ternary ones at 2) and a float32 scale for each channel and each
            activation; all else (skipped layers, biases, normalisation with its statistics) as it is.
        coded: The same with quantised weights at the entropy of their levels, layer by layer: what an ideal entropy
            coder would reach.
    """

    stored: float
    coded: float


def size_of(model: nn.Module) -> Size:
    """What the weights of a network take."""
    layers = quantized_layers(model)
    seen = {id(layer.weight) for layer in layers.values()}
    held = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}  # a shared one once
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
