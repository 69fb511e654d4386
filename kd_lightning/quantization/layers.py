"""Students of low precision: quantisation-aware layers, their ranges, and what they weigh.

The quantised layers are brevitas's; this module chooses among its quantisers, and never imports it before a network
is quantised.
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
SUPPORTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Their few numbers stay float: who deploys a network folds them into the layer before.
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
# How many standard deviations of |w| above its mean the largest level lies: about the least squared error on Gaussian
# weights (ternary, 4 levels) without the largest weight of a wide layer spoiling it (15 levels). 8 bits: the maximum.
_SIGMAS = {4: 3.0, 2: 2.0, "ternary": 0.7}
# The range of activations that nobody calibrated. No ReLU6 ends there, so that it tells.
_UNCALIBRATED = 8.0


def quantize(
    model: nn.Module,
    weight_bits: int | str = 8,
    activation_bits: int | None = 8,
    skip: Sequence[str] = ("first", "last"),
) -> nn.Module:
    """A trainable low-precision copy of a CNN or MLP.

    Linear layers and convolutions become brevitas's: weights are rounded on the way forward (a scale for each output
    channel, a function of its weights), and so are the layer's inputs (one learned range, see :func:`calibrate`);
    gradients pass through the rounding. The float weights behind them keep their names, so float checkpoints load.
    Normalisation layers and biases stay float.

    Args:
        model: The network, trained or not; it is left as it was.
        weight_bits: 8 and 4 (symmetric: 255 and 15 levels), 2 (4 levels: -2, -1, 0, 1) or ``"ternary"`` (-1, 0, 1,
            as of Li et al. 2016).
        activation_bits: Of each quantised layer's input, 8 (signed); None leaves inputs float.
        skip: What stays float: ``"first"`` and ``"last"`` of these layers in the order in which the network holds
            them, and names of layers (with all that is below) or of parameters.

    Returns:
        The copy, in the mode of the original.

    Raises:
        InputError: Without the extra ``quant``; for bit widths other than those; for a layer with weights that cannot
            be quantised and is not in ``skip``; for a name in ``skip`` that the network does not have; for layers that
            share a weight; if nothing is left to quantise, or the network is already quantised.
    """
    _check_bits(weight_bits, activation_bits)
    brevitas = _brevitas()
    if quantized_layers(model):
        raise InputError("model is already quantised")
    chosen = _choose(model, skip)
    model = deepcopy(model)
    weight_quant = _weight_quantizers(brevitas, weight_bits)
    arguments: dict[str, Any] = {"return_quant_tensor": False}
    if activation_bits is not None:
        base = brevitas.quant.Int8ActPerTensorFloatMinMaxInit
        arguments["input_quant"] = type("Activation", (base,), {"min_val": -_UNCALIBRATED, "max_val": _UNCALIBRATED})
    training = {name: module.training for name, module in model.named_modules()}
    parameters = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    replaced = {
        kind: (getattr(brevitas.nn, f"Quant{kind.__name__}"), arguments | {"weight_quant": lambda m: weight_quant(m)})
        for kind in SUPPORTED
    }
    before = dict(model.named_modules(remove_duplicate=False))
    left = [name for name, module in before.items() if type(module) in SUPPORTED and name not in chosen]
    model = brevitas.quantize.layerwise_quantize(model, replaced, left)
    new = {id(before[name]): model.get_submodule(name) for name in chosen}
    for name, module in before.items():  # brevitas replaces a layer of several names at the first one alone
        if id(module) in new:
            model.set_submodule(name, new[id(module)])
    for name, module in model.named_modules():  # brevitas's layers come in training mode, their weights unfrozen
        module.training = training.get(name, training[""])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameters.get(name, True))
    return model


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The quantised layers by name; none in a float network."""
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
        raise InputError(f"activation_bits must be 8, or null for float ones, got {activation_bits!r}")


def _choose(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """The names of the layers to quantise."""
    if isinstance(skip, str):
        raise InputError(f"skip must be a list of names, got {skip!r}")
    names = [name for name in skip if name not in ("first", "last")]
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for name in names:
        if name not in modules and name not in parameters:
            raise InputError(f"skip: {name!r} is no layer of {type(model).__name__}, nor first or last")

    def skipped(name: str) -> bool:
        return any(name == top or name.startswith(f"{top}.") for top in names)

    layers = {name: m for name, m in modules.items() if _is_supported(m)}
    ends = [*layers]
    ends = ends[: "first" in skip] + ends[len(ends) - ("last" in skip) :]
    chosen = [name for name in layers if name not in ends and not skipped(name)]
    if chosen == [""]:
        raise InputError(
            f"model is a single {type(model).__name__}, which cannot be quantised; put it in nn.Sequential"
        )
    for name, module in modules.items():
        if isinstance(module, nn.TransformerEncoderLayer) and not skipped(name):  # in eval mode never calls its layers
            raise InputError(f"{name or 'model'} (TransformerEncoderLayer) cannot be quantised; name it in skip")
        if name in layers or isinstance(module, _NORMS):
            continue
        own = [f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters(recurse=False)]
        if left := [key for key in own if not skipped(key)]:
            what = f"{name} ({type(module).__name__})" if name else f"parameter {left[0]} of {type(module).__name__}"
            raise InputError(
                f"{what} cannot be quantised; to leave it float, name it in skip. Quantised are "
                f"{', '.join(kind.__name__ for kind in SUPPORTED)}; no computed weights, no transposed groups"
            )
    owners: dict[int, str] = {}
    for name, module in layers.items():
        other = owners.setdefault(id(module.weight), name)
        if other != name and (name in chosen or other in chosen):
            raise InputError(f"{other} and {name} share a weight, which cannot be quantised; name both in skip")
    if not chosen:
        raise InputError(
            f"nothing is left to quantise: {type(model).__name__} has {len(layers)} layers of those kinds, and skip "
            f"({', '.join(skip)}) leaves them all float"
        )
    return chosen


def _is_supported(module: nn.Module) -> bool:
    """Not: those whose weight is computed (normalised, pruned), and brevitas has no scales for transposed groups."""
    grouped = isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1
    return type(module) in SUPPORTED and "weight" in module._parameters and not grouped


def _weight_quantizers(brevitas: _Brevitas, weight_bits: int | str) -> Any:
    """For a layer, brevitas's quantiser of its weights."""
    bits = 2 if weight_bits == "ternary" else weight_bits
    settings: dict[str, Any] = {"bit_width": bits, "narrow_range": weight_bits != 2}
    by_spread = settings | {"scaling_stats_op": "mean_sigma_std", "sigma": _SIGMAS.get(weight_bits)}
    base = brevitas.quant.Int8WeightPerChannelFloat
    largest, spread = type("LargestWeight", (base,), settings), type("WeightSpread", (base,), by_spread)

    def choose(layer: nn.Module) -> Any:
        outputs = getattr(layer, "out_channels", None) or layer.out_features
        alone = layer.weight.numel() == outputs  # type: ignore[operator]
        return largest if weight_bits == 8 or alone else spread  # one weight has no spread

    return choose
