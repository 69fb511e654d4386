"""The base of whole-batch transforms, and chains of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from kd_lightning.data.transforms.buffers import empty_batch
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError

Images = Tensor | list[Tensor]
"""A batch of images (B, C, H, W), or a list of B images (C, H, W) of any sizes."""

_DETERMINISTIC: tuple[type[nn.Module], ...] = (
    v2.CenterCrop,
    v2.Grayscale,
    v2.Identity,
    v2.Normalize,
    v2.Pad,
    v2.Resize,
    v2.RGB,
    v2.ToDtype,
    v2.ToImage,
    v2.ToPureTensor,
)
_OF_MODULES = vars(nn.Module())  # attributes that every module has


class BatchTransform(nn.Module, ABC):
    """A transform of a whole batch at once. A view's pixels depend on (seed, index, view) alone.

    A subclass implements :meth:`transform`. Pixels of a row must not depend on the other rows, to the bit.

    Attributes:
        takes_lists: Whether :meth:`transform` takes a list of images of different sizes. It then returns a list, or
            images of one size as a tensor.
        is_random: Whether :meth:`transform` makes draws.
    """

    takes_lists = False
    is_random = True

    def forward(self, images: Any, draws: Draws | None = None) -> Any:
        """Transform images.

        Args:
            images: (B, C, H, W), or a list of images (C, H, W), or one image: (C, H, W), a PIL image or a v2 image.
            draws: Random numbers of the rows. Default: None, which means that torch's global generator seeds them.

        Returns:
            A tensor (B, C, H, W), or (C, H, W) for one image.

        Raises:
            InputError: If images of a list have different sizes, and the transform needs one size, or if the draws are
                those of another number of images.
        """
        one = not isinstance(images, list) and (not isinstance(images, Tensor) or images.ndim == 3)
        if one:
            images = to_tensor(images).unsqueeze(0)
        if draws is None:
            rows = torch.arange(len(images))
            seed = int(torch.randint(2**63 - 1, ())) if self.is_random else 0
            draws = Draws(seed, rows, torch.zeros_like(rows))
        if len(draws) != len(images):
            raise InputError(f"draws must have a row for each of {len(images)} images, got {len(draws)}")
        if isinstance(images, list) and not self.takes_lists:
            images = stack(images)
        result = self.transform(images, draws)
        return result[0] if one else result

    def extra_repr(self) -> str:
        """The arguments."""
        own = {name: value for name, value in vars(self).items() if name not in _OF_MODULES and name[0] != "_"}
        return ", ".join(f"{name}={value!r}" for name, value in own.items())

    @abstractmethod
    def transform(self, images: Any, draws: Draws) -> Any:
        """Return transformed images (B, C, H', W').

        Args:
            images: (B, C, H, W), uint8 or float; if :attr:`takes_lists`, also a list of images (C, H, W).
            draws: Random numbers of the rows. Each call makes equally many draws for each row.
        """


class Compose(BatchTransform):
    """Whole-batch transforms, one after another.

    Args:
        transforms: Whole-batch transforms, or transforms of torchvision v2 without randomness (``ToDtype``,
            ``Normalize``, ``Resize``, ``CenterCrop``, ``Pad``, ``RGB``, ``Grayscale``, ...).

    Raises:
        InputError: For any other transform.
    """

    def __init__(self, transforms: Sequence[nn.Module]) -> None:
        super().__init__()
        for part in transforms:
            if not isinstance(part, BatchTransform) and type(part) not in _DETERMINISTIC:
                raise InputError(
                    "transforms must be whole-batch transforms (kd_lightning.data.transforms), or transforms of "
                    f"torchvision.transforms.v2 without randomness, got {type(part).__module__}.{type(part).__name__}; "
                    "torchvision.transforms.v2.Compose takes any transforms, one image at a time"
                )
        self.transforms = nn.ModuleList(transforms)
        self._first = 0  # number of the first part's stream

    @property
    def takes_lists(self) -> bool:  # type: ignore[override]
        """Whether the first transform takes a list of images of different sizes."""
        return len(self.transforms) > 0 and bool(getattr(self.transforms[0], "takes_lists", False))

    @property
    def is_random(self) -> bool:  # type: ignore[override]
        """Whether a part makes draws."""
        return any(getattr(part, "is_random", False) for part in self.transforms)

    def transform(self, images: Any, draws: Draws) -> Any:
        """Each part has a stream of its own, so that its random numbers do not depend on the other parts."""
        for number, part in enumerate(self.transforms):
            stream = draws.stream(self._first + number)
            images = part(images, stream) if isinstance(part, BatchTransform) else part(images)
        return images if isinstance(images, list) else plain(images)

    def split(self) -> tuple[Compose, Compose]:
        """Split into the parts that take lists of images, and the rest. Together they give what this one gives."""
        parts = [*self.transforms]
        count = next((n for n, part in enumerate(parts) if not getattr(part, "takes_lists", False)), len(parts))
        head, tail = Compose(parts[:count]), Compose(parts[count:])
        head._first, tail._first = self._first, self._first + count
        return head, tail


def to_tensor(image: Any) -> Tensor:
    """Return an image as a tensor (C, H, W) of its own type: uint8 for pictures of 8 bits.

    Args:
        image: A PIL image, a tensor (C, H, W) or an array (H, W, C).
    """
    return plain(image if isinstance(image, Tensor) else v2.functional.to_image(image))


def plain(image: Tensor) -> Tensor:
    """Return a tensor without the class of torchvision's images."""
    return image if type(image) is Tensor else image.as_subclass(Tensor)


def stack(
    images: Sequence[Tensor],
    what: str = "images of a batch",
    remedy: str = "a resize or a crop brings them to one size",
) -> Tensor:
    """Stack images of one size.

    Args:
        images: B images (C, H, W).
        what: What they are, for the message.
        remedy: What brings them to one size, for the message.

    Raises:
        InputError: If their sizes or types differ.
    """
    kinds = sorted({(tuple(image.shape), str(image.dtype)) for image in images})
    if len(kinds) != 1:
        shapes = [*dict.fromkeys(shape for shape, _ in kinds)]
        got = shapes[:3] if len(shapes) > 1 else [dtype for _, dtype in kinds]
        raise InputError(f"{what} must have one shape and type, got {got}; {remedy}")
    return torch.stack([*images], out=empty_batch(len(images), images[0]))
