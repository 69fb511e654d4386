"""Dense outputs as rows: losses and metrics are written for logits (N, C)."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.errors import InputError


def to_rows(outputs: Tensor, class_dim: int | None = None, mask: Tensor | None = None) -> Tensor:
    """Turn dense outputs into rows, one for each position.

    Args:
        outputs: Logits such as (B, C, H, W) or (B, T, C), or any values (B, ...).
        class_dim: The dimension that holds classes, such as 1 for (B, C, H, W) and -1 for (B, T, C). Default: None,
            which means that there is none: without a mask the outputs stay as they are.
        mask: Which positions count, as booleans, or as integers that are not 0: the shape of the outputs without
            ``class_dim``, or its first dimensions. Default: None, which means all.

    Returns:
        (N, C), in the order of the positions. Without ``class_dim``, the selected values (N, ...).

    Raises:
        InputError: If the outputs lack the dimension, or the mask does not fit.

    >>> import torch
    >>> to_rows(torch.zeros(2, 5, 4, 4), class_dim=1).shape, to_rows(torch.zeros(2, 7, 5), class_dim=-1).shape
    (torch.Size([32, 5]), torch.Size([14, 5]))
    """
    if class_dim is not None:
        if outputs.ndim < 2 or not -outputs.ndim <= class_dim < outputs.ndim or class_dim % outputs.ndim == 0:
            raise InputError(
                f"class_dim must be a dimension of the outputs after the first, got {class_dim} for {[*outputs.shape]}"
            )
        outputs = outputs.movedim(class_dim, -1)
    if mask is None:
        return outputs if class_dim is None else outputs.reshape(-1, outputs.shape[-1])
    if mask.is_floating_point() or mask.is_complex():
        raise InputError(f"mask must be boolean, or integers that are not 0 where a position counts, got {mask.dtype}")
    positions = outputs.shape if class_dim is None else outputs.shape[:-1]
    if not mask.ndim or positions[: mask.ndim] != mask.shape:
        raise InputError(f"mask must have the shape of the positions, {[*positions]}, got {[*mask.shape]}")
    rows = outputs[mask.to(outputs.device) != 0]
    return rows if class_dim is None else rows.reshape(-1, rows.shape[-1])
