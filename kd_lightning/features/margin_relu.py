"""The margin ReLU of "A Comprehensive Overhaul of Feature Distillation" (OFD)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError


class MarginReLU(nn.Module):
    r"""Limit a teacher's feature before its ReLU from below, at a margin of each channel.

    .. math:: \max(x_c, m_c), \qquad m_c = \operatorname{E}[x_c \mid x_c < 0]

    The margin is the mean of the channel's values below 0 in the features that it is fitted to; 0 if there are none.
    (The authors' code computes the mean from the teacher's last batch norm, for normal distributions.) It is the
    ``standardize`` of a term with :class:`~kd_lightning.losses.features.ofd.OFDLoss`.

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation" (ICCV 2019),
    https://arxiv.org/abs/1904.01866.

    Attributes:
        margin: (C,) margins, at most 0. Zeros before the fit, (0,) before :meth:`build`.

    Shape:
        - fit: (M, C), rows are samples, or positions of maps.
        - feature, output: (B, C, ...), the same shape. Half precision becomes float32.

    >>> relu = MarginReLU()
    >>> relu.fit(torch.tensor([[-1.0, 2.0], [-3.0, -4.0], [5.0, 6.0]]))
    >>> relu(torch.tensor([[-3.0, -3.0], [7.0, -9.0]]))
    tensor([[-2., -3.],
            [ 7., -4.]])
    """

    margin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("margin", torch.zeros(0))
        self._is_fitted = False  # to read the margins would wait for the device

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` has run, or the values of a fit were loaded."""
        return self._is_fitted

    def build(self, channels: int) -> None:
        """Set the number of margins before they are fitted, so that averages of weights can have copies of them."""
        if not self.is_fitted:
            self.margin = self.margin.new_zeros(channels)

    def fit(self, features: Tensor) -> None:
        """Find the margins, in float64 on the CPU.

        Args:
            features: (M, C), the teacher's features of M samples, or at M positions of maps.

        Raises:
            InputError: If it is fitted already; if features are not (M, C), or not finite; or if none is below 0, as
                after a ReLU.
        """
        if self.is_fitted:
            raise InputError(f"MarginReLU is fitted already, to {len(self.margin)} channels")
        if features.ndim != 2 or not features.numel():
            raise InputError(f"MarginReLU is fitted to features (M, C) of at least one row, got {[*features.shape]}")
        rows = features.detach().to("cpu", torch.float64)
        if not rows.isfinite().all():
            raise InputError("MarginReLU: features must be finite, got NaN or infinity")
        below = rows < 0
        if not below.any():
            raise InputError("MarginReLU: no feature of the teacher is below 0; set the layer before the ReLU")
        margin = rows.masked_fill(~below, 0).sum(dim=0) / below.sum(dim=0).clamp(min=1)
        self.margin = margin.to(self.margin.device, torch.float32)
        self._is_fitted = True

    def forward(self, feature: Tensor) -> Tensor:
        """Return the limited feature.

        Raises:
            InputError: If it is not fitted, or was fitted to another number of channels.
        """
        if not self.is_fitted:
            raise InputError("MarginReLU is not fitted; call fit(features) first, with the teacher's features (M, C)")
        if feature.ndim < 2 or feature.shape[1] != len(self.margin):
            raise InputError(
                f"MarginReLU is fitted to {len(self.margin)} channels, so features must be (B, {len(self.margin)}, "
                f"...), got {[*feature.shape]}"
            )
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        return feature.maximum(self.margin.to(feature.dtype).view(-1, *[1] * (feature.ndim - 2)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the number of channels of the stored margins, which is not known before the fit."""
        if (stored := state_dict.get(f"{prefix}margin")) is not None and stored.shape != self.margin.shape:
            self.margin = self.margin.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_fitted = bool(self.margin.any())
