"""Checks of a teacher whose features are learned from: channels, and the inputs that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import is_labeled
from kd_lightning.features.representation import NEIGHBORS, knn_accuracy
from kd_lightning.teachers.findings import Finding
from kd_lightning.teachers.regression_checks import FEW

_DEAD = 1e-6  # standard deviation of a dead channel, as a share of the largest deviation or mean
_MANY = 0.1  # share of dead channels
_RULES = 0.5  # share of the variance that one channel has, so that it rules a squared distance
_OVERSHOOT = 0.25  # of bicubic resizing, in units of pixels in [0, 1]
_NARROW = 0.5  # range of pixels in [0, 1]: photographs reach from dark to bright


def neighbors(features: Tensor, y: Tensor | None, what: str) -> Finding:
    """Compare the k-NN accuracy of the teacher's features with chance, the share of the most frequent class.

    Args:
        features: (N, D).
        y: Classes (N,), -100 where one is missing; None if there are none, or if labels are no classes.
        what: Name of the labels in the text.
    """
    known = None if y is None else is_labeled(y)
    n = 0 if known is None else int(known.sum())
    if y is None or known is None or n <= NEIGHBORS or len(classes := torch.unique(y[known])) < 2:
        return Finding("teacher", f"not checked: {n} {what} are too few, or of one class")
    y = torch.searchsorted(classes, y[known])
    accuracy, chance = knn_accuracy(features[known], y), float(y.bincount().max()) / n
    text = f"k-NN accuracy of its features {accuracy:.1%} of {n} {what} (chance {chance:.1%})"
    error = 3 * (chance * (1 - chance) / n) ** 0.5
    if n < FEW or accuracy > chance + error:
        return Finding("teacher", text)
    hint = "its features do not tell these classes apart: is it trained? are its layer and its inputs the right ones?"
    return Finding("teacher", text, hint)


def channels(layer: str, rows: Tensor, *, scale_matters: bool) -> Finding:
    """Check the channels of a teacher's feature: finite, alive, and of comparable scales.

    Args:
        layer: Dotted path of the layer in the teacher's network.
        rows: Samples, or their positions, (M, C).
        scale_matters: Whether the loss of a term that does not standardize the feature grows with the scale of a
            channel, as squared distances do.
    """
    name = f"features of {layer or 'the output'}"
    rows = rows.double()
    if not rows.isfinite().all():
        hint = "check its weights, and whether its inputs are finite"
        return Finding(
            name, f"not finite for {int((~rows.isfinite()).any(dim=1).sum())} of {len(rows)} rows", hint, "error"
        )
    if len(rows) < 2:
        return Finding(name, "not checked: there is one row alone")
    deviation, size = rows.std(dim=0), rows.mean(dim=0).abs()
    least = _DEAD * torch.maximum(deviation.max(), size)
    dead, count = int((deviation <= least).sum()), rows.shape[1]
    if dead == count:
        hint = "the same for all inputs, so that there is nothing to learn: is it the right layer? is it trained?"
        return Finding(name, f"all {count} channels are constant over {len(rows)} rows", hint, "error")
    alive = deviation[deviation > least]
    share = float(deviation.max().square() / deviation.square().sum())
    text = (
        f"{count} channels, {dead} dead, standard deviations {float(alive.min()):.3g} to {float(alive.max()):.3g}, the "
        f"largest has {share:.0%} of the variance ({len(rows)} rows)"
    )
    if dead > _MANY * count:
        return Finding(name, text, "many channels never change: is it the right layer, before or after its activation?")
    if scale_matters and count > 2 and share > _RULES:
        return Finding(name, text, "one channel rules the loss; set standardize: ChannelStandardization of the term")
    return Finding(name, text)


def input_size(network: nn.Module, x: Any) -> Finding:
    """Compare the size of the inputs with the one that the network declares, as those of timm and transformers do.

    Args:
        network: The network.
        x: Inputs after the teacher's preprocessing.
    """
    name, wanted = "input size", _declared(network).get("input_size")
    if wanted is None:
        return Finding(name, "not checked: the network does not declare it")
    if not isinstance(x, Tensor) or x.ndim != 4:
        return Finding(name, "not checked: the inputs are no pictures")
    got, wanted = [*x.shape[2:]], [*wanted[-2:]]
    text = f"{got}, the network was made for {wanted}"
    hint = f"resize them: Teacher(network, preprocess=v2.Resize({wanted})), or set the size of the network"
    return Finding(name, text, hint if min(got) < min(wanted) else None)


def input_range(network: nn.Module, x: Any) -> Finding:
    """Check whether the inputs can be pictures in [0, 1] under the normalisation that the network declares.

    Args:
        network: The network.
        x: Inputs after the teacher's preprocessing.
    """
    name, declared = "normalisation", _declared(network)
    mean, std = declared.get("mean"), declared.get("std")
    if mean is None or std is None:
        return Finding(name, "not checked: the network does not declare it")
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != len(mean):
        return Finding(name, f"not checked: the inputs are no pictures of {len(mean)} channels")
    mean_, std_ = (torch.tensor(value, dtype=torch.double, device=x.device).view(1, -1, 1, 1) for value in (mean, std))
    raw = x.double() * std_ + mean_
    low, high = float(raw.min()), float(raw.max())
    text = (
        f"the network declares mean {_short(mean)} and std {_short(std)}; without it pixels are {low:.2g} to {high:.2g}"
    )
    transform = f"v2.Normalize({_short(mean)}, {_short(std)})"
    hint = f"normalise pixels in [0, 1] so: Teacher(network, preprocess={transform})"
    is_right = low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT and high - low >= _NARROW
    return Finding(name, text, None if is_right else hint)


def _declared(network: nn.Module) -> Mapping[str, Any]:
    """Return the input size (..., H, W), mean and standard deviation that a network declares, as far as it does."""
    given = getattr(network, "pretrained_cfg", None)  # of timm
    if given is not None:
        given = given if isinstance(given, Mapping) else vars(given)
        found = {name: given.get(name) for name in ("input_size", "mean", "std")}
        size = getattr(getattr(network, "patch_embed", None), "img_size", None)
        return found if size is None else found | {"input_size": size}
    side = getattr(getattr(network, "config", None), "image_size", None)  # of transformers
    return {} if side is None else {"input_size": side if isinstance(side, list | tuple) else (side, side)}


def _short(values: Any) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
