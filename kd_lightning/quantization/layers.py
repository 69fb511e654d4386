"""Replace a network's layers by quantisation-aware ones.

The quantised layers and quantisers come from brevitas. It is imported when the first network is quantised.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from torch import nn

from kd_lightning.errors import InputError

WEIGHT_BITS = (8, 4, 2, "ternary")
INITIAL_RANGE = 8.0
"""The range of activations before calibration. No ReLU6 gives this value, so it marks a range as not calibrated."""

_QUANTIZABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# These stay float: they have few parameters, and deployment folds them into the layer before.
_FLOAT_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
# The largest level lies this many standard deviations of |w| above the mean of |w|. The values are near the least
# squared error on Gaussian weights, and do not depend on a layer's single largest weight. 8 bits use the maximum.
_SIGMAS = {4: 3.0, 2: 2.0, "ternary": 0.7}


def quantize(
    model: nn.Module,
    weight_bits: int | str = 8,
    activation_bits: int | None = 8,
    skip: Sequence[str] = ("first", "last"),
) -> nn.Module:
    """Return a trainable low-precision copy of a CNN or MLP.

    brevitas's layers replace linear layers and convolutions. Their forward pass rounds the weights, with one scale for
    each output channel that follows from its weights. It also rounds the layer's inputs, with one learned range, see
    :func:`~kd_lightning.quantization.calibrate`. Gradients pass straight through the rounding. The float weights stay
    under their names, so float checkpoints load. Normalisation layers and biases stay float.

    Args:
        model: The network, trained or not. It is not changed.
        weight_bits: 8 or 4 (symmetric: 255 or 15 levels), 2 (4 levels: -2, -1, 0, 1), or ``"ternary"`` (-1, 0, 1;
            Li et al., "Ternary Weight Networks", 2016, https://arxiv.org/abs/1605.04711).
        activation_bits: Bits of each quantised layer's input: 8 (signed), or None, which leaves inputs float.
        skip: Layers that stay float: ``"first"`` and ``"last"`` (in the order in which the network holds its layers),
            names of layers (with all layers below them), and names of parameters.

    Returns:
        The copy, in the mode of the original.

    Raises:
        InputError: If the extra ``quant`` is not installed; for other bit widths; if a layer with weights cannot be
            quantised and is not in ``skip``; if the network has no layer of a name in ``skip``; if layers share a
            weight; if no layer is left to quantise; if the network is already quantised.
    """
    _check_bits(weight_bits, activation_bits)
    brevitas = _brevitas()
    if quantized_layers(model):
        raise InputError("model is already quantised")
    selected = _select_layers(model, skip)
    model = deepcopy(model)
    weight_quant = _weight_quantizers(brevitas, weight_bits)
    arguments: dict[str, Any] = {"return_quant_tensor": False}
    if activation_bits is not None:
        base = brevitas.quant.Int8ActPerTensorFloatMinMaxInit
        arguments["input_quant"] = type("Activation", (base,), {"min_val": -INITIAL_RANGE, "max_val": INITIAL_RANGE})
    training = {name: module.training for name, module in model.named_modules()}
    parameters = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    replaced = {
        kind: (getattr(brevitas.nn, f"Quant{kind.__name__}"), arguments | {"weight_quant": lambda m: weight_quant(m)})
        for kind in _QUANTIZABLE
    }
    before = dict(model.named_modules(remove_duplicate=False))
    float_names = [name for name, module in before.items() if type(module) in _QUANTIZABLE and name not in selected]
    model = brevitas.quantize.layerwise_quantize(model, replaced, float_names)
    new = {id(before[name]): model.get_submodule(name) for name in selected}
    for name, module in before.items():  # brevitas replaces a layer only at the first of its names
        if id(module) in new:
            model.set_submodule(name, new[id(module)])
    for name, module in model.named_modules():  # new layers are in training mode, with weights that require a gradient
        module.training = training.get(name, training[""])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameters.get(name, True))
    return model


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return the quantised layers by name; none in a float network."""
    loaded = sys.modules.get("brevitas.nn.quant_layer")
    if loaded is None:
        return {}
    kind = loaded.QuantWeightBiasInputOutputLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


class _Brevitas(NamedTuple):
    nn: Any
    quant: Any
    quantize: Any


def _brevitas() -> _Brevitas:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fast_hadamard_transform")
            import brevitas.graph.quantize
            import brevitas.nn
            import brevitas.quant
    except ImportError as error:
        raise InputError(f"quantize needs the extra quant: pip install 'kd-lightning[quant]' ({error})") from error
    return _Brevitas(brevitas.nn, brevitas.quant, brevitas.graph.quantize)


def _check_bits(weight_bits: int | str, activation_bits: int | None) -> None:
    if isinstance(weight_bits, bool | float) or weight_bits not in WEIGHT_BITS:
        raise InputError(f"weight_bits must be one of {', '.join(map(str, WEIGHT_BITS))}, got {weight_bits!r}")
    if isinstance(activation_bits, bool | float) or activation_bits not in (8, None):
        raise InputError(f"activation_bits must be 8, or null for float activations, got {activation_bits!r}")


def _select_layers(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Return the names of the layers to quantise."""
    if isinstance(skip, str):
        raise InputError(f"skip must be a list of names, got {skip!r}")
    names = [name for name in skip if name not in ("first", "last")]
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for name in names:
        if name not in modules and name not in parameters:
            raise InputError(
                f"skip must name layers or parameters of {type(model).__name__}, or be first or last, got {name!r}"
            )

    def skipped(name: str) -> bool:
        return any(name == top or name.startswith(f"{top}.") for top in names)

    layers = {name: m for name, m in modules.items() if _is_quantizable(m)}
    ends = [*layers]
    ends = ends[: "first" in skip] + ends[len(ends) - ("last" in skip) :]
    selected = [name for name in layers if name not in ends and not skipped(name)]
    if selected == [""]:
        raise InputError(
            f"model is a single {type(model).__name__}, which cannot be quantised; put it in nn.Sequential"
        )
    for name, module in modules.items():
        if isinstance(module, nn.TransformerEncoderLayer) and not skipped(name):  # it skips its layers in eval mode
            raise InputError(f"{name or 'model'} (TransformerEncoderLayer) cannot be quantised; name it in skip")
        if name in layers or isinstance(module, _FLOAT_LAYERS):
            continue
        own = [f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters(recurse=False)]
        if left := [key for key in own if not skipped(key)]:
            what = f"{name} ({type(module).__name__})" if name else f"parameter {left[0]} of {type(module).__name__}"
            raise InputError(
                f"{what} cannot be quantised; name it in skip to leave it float. Allowed are "
                f"{', '.join(kind.__name__ for kind in _QUANTIZABLE)}, without computed weights or transposed groups"
            )
    owners: dict[int, str] = {}
    for name, module in layers.items():
        other = owners.setdefault(id(module.weight), name)
        if other != name and (name in selected or other in selected):
            raise InputError(f"{other} and {name} share a weight, which cannot be quantised; name both in skip")
    if not selected:
        raise InputError(
            f"nothing is left to quantise: {type(model).__name__} has {len(layers)} layers that can be quantised, and "
            f"skip ({', '.join(skip)}) leaves them all float"
        )
    return selected


def _is_quantizable(module: nn.Module) -> bool:
    """Whether a layer can be quantised: its weight is a plain parameter, and it has no groups if it is transposed."""
    grouped = isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1
    return type(module) in _QUANTIZABLE and "weight" in module._parameters and not grouped


def _weight_quantizers(brevitas: _Brevitas, weight_bits: int | str) -> Any:
    """Return a function from a layer to brevitas's quantiser of its weights."""
    bits = 2 if weight_bits == "ternary" else weight_bits
    settings: dict[str, Any] = {"bit_width": bits, "narrow_range": weight_bits != 2}
    by_spread = settings | {"scaling_stats_op": "mean_sigma_std", "sigma": _SIGMAS.get(weight_bits)}
    base = brevitas.quant.Int8WeightPerChannelFloat
    largest, spread = type("LargestWeight", (base,), settings), type("WeightSpread", (base,), by_spread)

    def select(layer: nn.Module) -> Any:
        channels = getattr(layer, "out_channels", None) or layer.out_features
        single = layer.weight.numel() == channels  # type: ignore[operator]
        return largest if weight_bits == 8 or single else spread  # a single weight has no standard deviation

    return select
