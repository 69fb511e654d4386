"""Logit adjustment of a trained network, folded into its head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.features.heads import find_head, logits_from


@torch.no_grad()
def adjust_head(network: nn.Module, priors: Sequence[float], tau: float = 1.0, head: str | None = None) -> nn.Module:
    r"""Correct a trained network for classes that were not equally frequent, by :math:`z_c - \tau \log \pi_c`.

    The head's bias takes the correction, so that costs, weights and exported files stay those of the network. It is for
    networks whose head gives the logits, and that were trained with plain cross-entropy. After a training with
    :class:`~kd_lightning.losses.LogitAdjustmentLoss`, it would correct twice.

    Source: Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), https://arxiv.org/abs/2007.07314,
    equation 9 (post-hoc).

    Args:
        network: The network, changed in place.
        priors: pi: shares or numbers of the training labels of each class, above 0.
        tau: Strength of the correction, finite.
        head: Dotted name of the layer. Default: None, see :func:`~kd_lightning.features.heads.find_head`.

    Returns:
        The same network.

    Raises:
        InputError: If there is no head, or one of a single output; if priors do not fit it.

    >>> network = nn.Linear(4, 2)
    >>> before = network.bias.tolist()
    >>> [round(a - b, 2) for a, b in zip(adjust_head(network, [3, 1]).bias.tolist(), before)]
    [0.29, 1.39]
    """
    layer = network.get_submodule(find_head(network, head))
    values, classes = [*map(float, priors)], logits_from(layer)
    if classes < 2:
        raise InputError(f"adjust_head: the network must have at least 2 outputs, got {classes}")
    if len(values) != classes or not all(0.0 < value < math.inf for value in values):
        raise InputError(f"priors must be {classes} finite numbers above 0, one for each output, got {values}")
    if not math.isfinite(tau):
        raise InputError(f"tau must be finite, got {tau}")
    counts = torch.tensor(values, dtype=torch.float64)
    shift = tau * (counts / counts.sum()).log()
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    bias = torch.zeros(len(shift), dtype=weight.dtype, device=weight.device) if layer.bias is None else layer.bias
    corrected = (bias.double() - shift.to(weight.device)).to(weight.dtype)  # type: ignore[operator]
    if layer.bias is None:
        layer.bias = nn.Parameter(corrected, requires_grad=weight.requires_grad)
    else:
        layer.bias.copy_(corrected)  # type: ignore[operator]
    return network
