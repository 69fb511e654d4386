"""Students of low precision: quantisation-aware layers, their ranges, and what they weigh.

The quantised layers are brevitas's; this module chooses among its quantisers, and never imports it before a network
is quantised.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
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
_RANGE = "input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"


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


def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Give the activations of a quantised network their ranges: the largest magnitude on these batches.

    The network computes in the mode that it is in: in training mode the ranges are those of BatchNorm's batch
    statistics, which is right for a network that starts from nothing. Its buffers and the random generators are left
    as they were. Without quantised activations nothing is done.

    Args:
        model: From :func:`quantize`; changed in place.
        batches: Inputs (B, ...), ``(x, y)`` or ``Batch``; a few hundred samples suffice.

    Returns:
        The same network.

    Raises:
        InputError: If there is no batch, or an activation is no finite number.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.input_quant.is_quant_enabled}
    if not layers:
        return model
    largest: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        found = x.detach().abs().amax().float()
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    device = next(iter(layers.values())).weight.device
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(_kept_buffers(model))
        for name, layer in layers.items():
            layer.input_quant.disable_quant = True
            stack.callback(setattr, layer.input_quant, "disable_quant", False)
            hook = layer.register_forward_pre_hook(
                lambda _, args, named, name=name: note(name, args[0] if args else named["input"]), with_kwargs=True
            )
            stack.callback(hook.remove)
        for batch in batches:
            model((batch if isinstance(batch, Tensor) else Batch.of(batch).x).to(device))
    if not largest:
        raise InputError("batches: calibration needs at least one")
    for name, value in largest.items():
        if not value.isfinite():
            raise InputError(f"the input of {name} holds numbers that are not finite; its range cannot be calibrated")
        with torch.no_grad():
            _range(layers[name]).fill_(max(float(value), 1e-6))
    return model


def is_calibrated(model: nn.Module) -> bool:
    """Whether any activation range is another than a new network's; True where there is none to calibrate."""
    ranges = activation_ranges(model)
    return not ranges or any(float(value.detach()) != _UNCALIBRATED for value in ranges.values())


def activation_ranges(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned largest magnitude of each quantised layer's input, by the layer's name."""
    layers = quantized_layers(model)
    return {name: _range(layer) for name, layer in layers.items() if layer.input_quant.is_quant_enabled}


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The quantised layers by name; none in a float network."""
    loaded = sys.modules.get("brevitas.nn.quant_layer")
    if loaded is None:
        return {}
    kind = loaded.QuantWeightBiasInputOutputLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def is_range(key: str) -> bool:
    """Whether an entry of a state dict is an activation's range, which float checkpoints do not have."""
    return key.endswith(_RANGE)


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


def _range(layer: Any) -> nn.Parameter:
    value: nn.Parameter = layer.get_parameter(_RANGE)
    return value


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
