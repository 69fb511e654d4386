"""Products of all pairs of vectors, for losses that compare samples or classes."""

from contextlib import nullcontext

import torch
from torch import Tensor


def products(vectors: Tensor) -> Tensor:
    """Return the products (..., B, B) of all pairs of vectors (..., B, D), in their type also under autocast."""
    device = vectors.device.type
    own_type = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with own_type:
        return vectors @ vectors.transpose(-1, -2)
