"""Standardization of a teacher's features: its channels get comparable scales, so that none of them rules the loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.hadamard import equal_variance_rotation

_DEAD = 1e-6  # standard deviation of a dead channel, as a share of the largest deviation or mean


class _Standardization(nn.Module):
    """A linear map of features to mean 0, fitted once.

    Attributes:
        mean: (C,) means that are subtracted; (0,) before the fit.
        scale: (C,) factors, or a matrix (C, C), that the rest is multiplied by; (0,) before the fit.
    """

    mean: Tensor
    scale: Tensor
    _scale_dims: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(0))
        self.register_buffer("scale", torch.zeros(0))
        self._is_fitted = False  # to read the values would wait for the device

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` has run, or the values of a fit were loaded."""
        return self._is_fitted

    def fit(self, features: Tensor) -> None:
        """Find the means and scales. It is computed in float64 on the CPU, and stored in float32.

        Call it once: with other values in the middle of a training, the student would learn from another target.

        Args:
            features: (M, C), the teacher's features of M samples, or at M positions of maps or tokens.

        Raises:
            InputError: If it is fitted already, or if features are not (M, C), not finite, or all constant.
        """
        name = type(self).__name__
        if self.is_fitted:
            raise InputError(
                f"{name} is fitted already, to {len(self.mean)} channels; use a new one for other features"
            )
        if features.ndim != 2 or not features.numel():
            raise InputError(f"{name} is fitted to features (M, C) of at least one row, got {[*features.shape]}")
        if not features.isfinite().all():
            raise InputError(f"{name}: features must be finite, got NaN or infinity")
        rows = features.detach().to("cpu", torch.float64)
        mean = rows.mean(dim=0)
        deviation = rows.std(dim=0, correction=0)
        dead = deviation <= _DEAD * mean.abs().clamp(min=deviation.max())
        if dead.all():
            raise InputError(f"{name}: all {len(dead)} channels are constant in {len(rows)} rows of features")
        self.mean = mean.to(self.mean.device, torch.float32)
        self.scale = self._find_scale(rows - mean, dead).to(self.scale.device, torch.float32)
        self._is_fitted = True

    def _find_scale(self, centred: Tensor, dead: Tensor) -> Tensor:
        """Return the factors (C,) or the matrix (C, C), of centred features (M, C) and of which channels are dead."""
        raise NotImplementedError

    def forward(self, feature: Tensor) -> Tensor:
        """Return the standardized feature.

        Args:
            feature: (B, C, ...). The result has its shape, and its type, at least float32.

        Raises:
            InputError: If it is not fitted, or was fitted to another number of channels.
        """
        feature = self._prepare(feature)
        shape = (-1, *[1] * (feature.ndim - 2))
        return self._multiply(self.scale.to(feature.dtype), feature - self.mean.view(shape).to(feature.dtype))

    def inverse(self, feature: Tensor) -> Tensor:
        """Return the feature (B, C, ...) that :meth:`forward` standardizes to the given one."""
        feature = self._prepare(feature)
        shape = (-1, *[1] * (feature.ndim - 2))
        # the rows of a matrix are orthogonal, and of one length
        back = 1 / self.scale if self.scale.ndim == 1 else self.scale.T / self.scale[0].square().sum()
        return self._multiply(back.to(feature.dtype), feature) + self.mean.view(shape).to(feature.dtype)

    def _prepare(self, feature: Tensor) -> Tensor:
        """Check the feature (B, C, ...), and return it in at least float32."""
        name = type(self).__name__
        if not self.is_fitted:
            raise InputError(f"{name} is not fitted; call fit(features) first, with the teacher's features (M, C)")
        if feature.ndim < 2 or feature.shape[1] != len(self.mean):
            raise InputError(
                f"{name} is fitted to {len(self.mean)} channels, so features must be (B, {len(self.mean)}, ...), got "
                f"{[*feature.shape]}"
            )
        return feature.to(torch.promote_types(feature.dtype, torch.float32))

    @staticmethod
    def _multiply(scale: Tensor, feature: Tensor) -> Tensor:
        if scale.ndim == 1:
            return feature * scale.view(-1, *[1] * (feature.ndim - 2))
        device = feature.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return (feature.movedim(1, -1) @ scale.T).movedim(-1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Standardization:
        """Move the values to another device. Their type stays: half precision would shift large means."""
        mean, scale = self.mean, self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mean, self.scale = mean.to(self.mean.device), scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the sizes of the stored values, which are not known before the fit.

        Raises:
            InputError: If they are those of another kind of standardization.
        """
        for name, dims in (("mean", 1), ("scale", self._scale_dims)):
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.numel() and stored.ndim != dims:
                raise InputError(
                    f"standardize: {prefix}{name} {[*stored.shape]} of the file is of another standardization than "
                    f"{type(self).__name__}"
                )
            if stored is not None and stored.shape != getattr(self, name).shape:
                setattr(self, name, getattr(self, name).new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_fitted = bool(self.scale.any())


class ChannelStandardization(_Standardization):
    r"""Give each channel of a teacher's feature mean 0 and variance 1.

    .. math:: x'_c = (x_c - \mu_c) / \sigma_c

    :math:`\mu_c` and :math:`\sigma_c` are the mean and the (population) standard deviation of the features that it is
    fitted to. A dead channel, which is constant in them, is divided by the root mean square of the others' deviations,
    so that rounding errors do not become a target.

    This is the usual standardization that "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation"
    (Ranzinger et al. 2024, https://arxiv.org/abs/2410.01680) compares with its own, :class:`PHIStandardization`.

    Shape:
        - fit: (M, C), rows are samples, or positions of maps or tokens.
        - feature, output: (B, C, ...), the same shape. Half precision becomes float32.

    >>> standardize = ChannelStandardization()
    >>> standardize.fit(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    >>> standardize(torch.tensor([[3.0, 10.0]]))
    tensor([[ 1., -1.]])
    """

    _scale_dims: ClassVar[int] = 1

    def _find_scale(self, centred: Tensor, dead: Tensor) -> Tensor:
        variance = centred.square().mean(dim=0)
        return torch.where(dead, variance[~dead].mean(), variance).rsqrt()


class PHIStandardization(_Standardization):
    r"""PHI-S: rotate a teacher's feature so that all channels have one variance, then scale it to variance 1.

    .. math:: x' = \phi^{-1} H U^T (x - \mu), \qquad \phi^2 = \tfrac{1}{C} \sum_c \lambda_c

    The covariance of the features that it is fitted to is :math:`U \operatorname{diag}(\lambda) U^T`; H is a normalized
    Hadamard matrix. Each channel of the result has variance 1. All directions are scaled alike, so that distances and
    angles between (centred) features stay, and an error in any direction costs the same. A dead channel is harmless,
    since no direction has a factor of its own.

    Where no Hadamard matrix can be built for C channels (see :func:`~kd_lightning.features.hadamard.hadamard`), H is a
    rotation that gives all channels one variance for the given :math:`\lambda`. (The authors' code takes a random one,
    whose variances differ.)

    Source: Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation" (2024),
    https://arxiv.org/abs/2410.01680.

    Shape:
        - fit: (M, C), rows are samples, or positions of maps or tokens. With M below C it works as well.
        - feature, output: (B, C, ...), the same shape. Half precision becomes float32.

    >>> standardize = PHIStandardization()
    >>> standardize.fit(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    >>> standardize(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).square().sum(dim=1)  # 9 and 1, divided by (9 + 1) / 4
    tensor([3.6000, 0.4000])
    """

    _scale_dims: ClassVar[int] = 2

    def _find_scale(self, centred: Tensor, dead: Tensor) -> Tensor:
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        variances = variances.clamp(min=0)
        scale: Tensor = equal_variance_rotation(variances) @ directions.T / variances.mean().sqrt()
        return scale
