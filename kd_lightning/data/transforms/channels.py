"""Three channels for grey images."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.data.transforms.base import BatchTransform, Images
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError


class RGB(BatchTransform):
    """Give images of one channel three equal ones. Images of three channels stay as they are.

    Raises:
        InputError: If an image has another number of channels.
    """

    takes_lists = True
    is_random = False
    moves_pixels = False

    def transform(self, images: Images, draws: Draws) -> Images:
        """Return a tensor for a tensor, and a list for a list."""
        if isinstance(images, Tensor):
            return _to_three(images)
        return [_to_three(image) for image in images]


def _to_three(images: Tensor) -> Tensor:
    channels = images.shape[-3]
    if channels not in (1, 3):
        raise InputError(f"images must have 1 or 3 channels, got {channels}")
    return images if channels == 3 else images.repeat_interleave(3, -3)
