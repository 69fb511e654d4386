"""Mixup and CutMix: each training image is mixed with another one, and so are their labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError


class Mix(ABC):
    """Mix the images of a batch with their partners.

    What is drawn for a row depends on its random numbers alone, which are those of its sample and view.
    """

    @abstractmethod
    def plan(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw how the rows are mixed.

        Args:
            draws: Random numbers of the rows.
            shape: Shape of an image, (C, H, W) for :class:`CutMix`.

        Returns:
            The share of each row's own image in its label, (B,) float64; and its share in each pixel, (B, 1, ...)
            float64, which broadcasts with the images.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    def check(self, images: Tensor) -> None:
        """Raise InputError for images that cannot be mixed."""
        if not images.is_floating_point():
            is_picture = images.dtype == torch.uint8 and images.ndim == 4
            remedy = "set a train_transform that returns floats"
            remedy = remedy if is_picture else "whole numbers such as token ids cannot be mixed, but embeddings can"
            raise InputError(f"mix needs images of floats, got {images.dtype}; {remedy}")


class MixUp(Mix):
    """x = a x_i + (1 - a) x_j with a from Beta(alpha, alpha), and so the labels.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018), https://arxiv.org/abs/1710.09412

    Args:
        alpha: Parameter of the Beta distribution, finite and above 0. Smaller values mix less.

    Raises:
        InputError: If ``alpha`` is out of range.
    """

    def __init__(self, alpha: float = 0.2) -> None:
        self.alpha = _checked(alpha)

    def plan(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw one share a row."""
        own = _beta(self.alpha, draws)
        return own, own.view(-1, *[1] * len(shape))


class CutMix(Mix):
    """Paste a box of image j into image i. Labels are mixed by the area.

    The box has the share 1 - a of the area, with a from Beta(alpha, alpha), and the image's aspect ratio. Its centre is
    uniform; what lies outside the image is cut off, and the share follows the area that is left.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (2019),
    https://arxiv.org/abs/1905.04899

    Args:
        alpha: Parameter of the Beta distribution, finite and above 0.

    Raises:
        InputError: If ``alpha`` is out of range.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = _checked(alpha)

    def plan(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw one box a row."""
        if len(shape) != 3:
            raise InputError(f"CutMix needs images (C, H, W), got {[*shape]}")
        half = 0.5 * (1 - _beta(self.alpha, draws)).sqrt()
        outside = []
        for size in shape[1:]:
            center = draws.integers(0, size - 1).double()
            places, reach = torch.arange(size, dtype=torch.float64), (half * size).floor()
            low, high = center - reach, center + reach
            outside.append((places < low[:, None]) | (places >= high[:, None]))
        rows, columns = outside
        own = (rows[:, :, None] | columns[:, None, :]).double()
        return own.mean(dim=(1, 2)), own[:, None]

    def check(self, images: Tensor) -> None:
        """Any type of number can be pasted."""


class OneOf(Mix):
    """One of several mixes for each row, with equal probabilities.

    Args:
        mixes: At least one mix.

    Raises:
        InputError: If there is none, or one of them is none.
    """

    def __init__(self, mixes: list[Mix]) -> None:
        if not mixes:
            raise InputError("mixes must have at least one mix, got none")
        self.mixes = [check_mix(mix, "mixes") for mix in mixes]

    def plan(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw which one, and as it does."""
        chosen = draws.integers(0, len(self.mixes) - 1)
        plans = [mix.plan(draws.stream(number), shape) for number, mix in enumerate(self.mixes)]
        own = torch.stack([plan[0] for plan in plans])[chosen, torch.arange(len(draws))]
        shares = torch.broadcast_tensors(*(plan[1] for plan in plans))  # type: ignore[no-untyped-call]
        pixels = torch.stack([*shares])[chosen, torch.arange(len(draws))]
        return own, pixels

    def check(self, images: Tensor) -> None:
        """Raise InputError for images that one of them cannot mix."""
        for mix in self.mixes:
            mix.check(images)


def mix_images(images: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """Return ``share * images + (1 - share) * partners`` in the images' type.

    Args:
        images: (B, ...).
        partners: Of the same shape.
        share: From :meth:`Mix.plan`, (B, 1, ...).
    """
    if not images.is_floating_point():
        return torch.where(share > 0.5, images, partners)
    share = share.to(images.dtype)
    return images * share + partners * (1 - share)


def check_mix(mix: Mix, name: str) -> Mix:
    """Return a mix. Raise InputError for anything else, such as a transform of torchvision; ``name`` is the option."""
    if not isinstance(mix, Mix):
        raise InputError(
            f"{name} must be MixUp, CutMix or OneOf of kd_lightning.data.transforms, or another Mix, got "
            f"{type(mix).__module__}.{type(mix).__name__}"
        )
    return mix


def check_plan(mix: Mix, share: Tensor, rows: int) -> None:
    """Raise InputError unless the shares that a mix plans are (B,) numbers in [0, 1]."""
    if share.shape != (rows,) or not bool(((share >= 0) & (share <= 1)).all()):
        got = [*share.shape] if share.shape != (rows,) else f"{share.min().item():g} ... {share.max().item():g}"
        raise InputError(f"mix: {type(mix).__name__} must plan one share in [0, 1] for each of {rows} rows, got {got}")


def _checked(alpha: float) -> float:
    if not 0 < alpha < math.inf:
        raise InputError(f"alpha must be finite and above 0, got {alpha}")
    return float(alpha)


def _beta(alpha: float, draws: Draws) -> Tensor:
    """Draw from Beta(alpha, alpha) by the inverse of its distribution function, (B,) float64."""
    return torch.from_numpy(np.asarray(betaincinv(alpha, alpha, draws.uniform().cpu().numpy())))
