"""Checks of the first dense training batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.errors import InputError
from kd_lightning.inputs import describe

if TYPE_CHECKING:
    from kd_lightning.modules.supervised import SupervisedModule

_LEAST = 8  # labels that equal their tokens by chance are fewer: of a masked language model one of ten does


class DenseChecks:
    """Checks the first training batch that has labels, and warns once if means are those of single batches."""

    def __init__(self) -> None:
        self._labels_are_checked = self._warned = False

    def check(self, module: SupervisedModule, batch: Batch) -> None:
        """Check a training batch of a module with ``class_dim``.

        Args:
            module: The module.
            batch: The batch.

        Raises:
            InputError: If the labels are the tokens that the network gets, so that it would learn to copy them.
        """
        if not self._warned and batch.dense_means is None and _accumulates(module):
            self._warned = True
            rank_zero_warn(
                "accumulate_grad_batches: the data loader gives no numbers of labels and positions (dense_means), so "
                "each batch's mean counts the same, however many positions it has; SemiSupervisedDataModule gives them"
            )
        if not self._labels_are_checked and batch.y is not None:
            self._labels_are_checked = check_tokens(batch, module.causal)


def check_tokens(batch: Batch, causal: bool) -> bool:
    """Raise InputError if labels are the tokens of their own position; if ``causal``, those of the next one.

    Args:
        batch: The batch, with ``y``.
        causal: Whether outputs are compared with the label of the next position.

    Returns:
        Whether there were enough labels to know it, or there are no tokens.
    """
    x: Any = batch.x.get("input_ids") if isinstance(batch.x, Mapping) else batch.x
    y, mask = batch.y, batch.position_mask
    if not isinstance(x, Tensor) or y is None or x.shape != y.shape or x.ndim != 2 or x.is_floating_point():
        return True
    known = is_labeled(y) if mask is None or mask.shape != y.shape else is_labeled(y) & (mask != 0)
    if causal:  # labels y[t] = x[t + 1] would be shifted twice
        x, y, known = x[:, 1:], y[:, :-1], known[:, :-1]
    if int(known.sum()) < _LEAST:
        return False
    if (x == y)[known].all() and (y[known] != y[known][0]).any():
        raise InputError(
            "causal: with true, the loss shifts labels, but they are shifted already: give input_ids as labels"
            if causal
            else "causal: with false, labels that are the input_ids teach the network to copy them; set causal: true"
        )
    return True


def check_strong_view(batch: Batch) -> None:
    """Raise InputError if the strong view of dense samples has other positions than the weak one, as far as is seen."""
    weak, strong, mask = batch.x, batch.x_strong, batch.position_mask
    if strong is None:
        return
    if describe(weak) != describe(strong):
        raise InputError(f"x_strong must have the positions of x, got {describe(strong)} and {describe(weak)}")
    own = strong.get("attention_mask") if isinstance(strong, Mapping) else None
    if own is not None and mask is not None and own.shape == mask.shape and not torch.equal(own != 0, mask != 0):
        raise InputError("x_strong must have the positions of x, got another attention_mask")


def check_strong_transform(data: Any) -> None:
    """Raise InputError if the views of a datamodule's samples get geometries of their own, as far as is known.

    Each view makes its own draws. So a position of the strong view is one of the weak view only if no random step of
    either moves pixels. Of samples with dense labels the strong view is made from the weak one, which may be any.

    Args:
        data: The datamodule, or None.
    """
    if getattr(data, "strong_transform", None) is None:
        return
    is_dense = getattr(getattr(data, "samples", None), "dense", False)
    for name in ("strong_transform",) if is_dense else ("train_transform", "strong_transform"):
        for part in _parts_of(getattr(data, name, None)):
            if _moves_at_random(part):
                raise InputError(
                    f"{name}: {type(part).__name__} moves pixels at random, but with class_dim each position of the "
                    "strong view must be that of the weak view; leave it out of both views"
                )


def _parts_of(transform: Any) -> Iterator[nn.Module]:
    """Yield the transforms inside a transform that have no further ones inside. Those of torchvision hold lists."""
    if not isinstance(transform, nn.Module):
        return
    lists = [value for value in vars(transform).values() if isinstance(value, list | tuple)]
    inner = [*transform.children(), *(one for values in lists for one in values if isinstance(one, nn.Module))]
    for part in inner:
        yield from _parts_of(part)
    if not inner:
        yield transform


def _moves_at_random(part: nn.Module) -> bool:
    if isinstance(part, BatchTransform):
        return part.moves_pixels and part.is_random
    kind = type(part)
    is_geometry = kind.__module__ == "torchvision.transforms.v2._geometry"
    return is_geometry and kind.__name__.startswith(("Random", "Elastic", "ScaleJitter"))


def _accumulates(module: SupervisedModule) -> bool:
    return module._trainer is not None and module.trainer.accumulate_grad_batches > 1
