"""The base of whole-batch transforms, and chains of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from kd_lightning.data.transforms.buffers import empty_batch
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.data.transforms.masks import Masks, check_sizes, check_type, masks_by_torchvision
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

    A subclass implements :meth:`transform`. Pixels of a row must not depend on the other rows, to the bit. For images
    with dense labels it also implements :meth:`transform_masks`, or sets ``moves_pixels = False``.

    Attributes:
        takes_lists: Whether :meth:`transform` takes a list of images of different sizes. It then returns a list, or
            images of one size as a tensor.
        is_random: Whether :meth:`transform` makes draws.
        moves_pixels: Whether :meth:`transform` moves pixels or changes the size. If not, masks stay as they are.
    """

    takes_lists = False
    is_random = True
    moves_pixels = True

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

    def with_masks(self, images: Images, masks: Masks, draws: Draws) -> tuple[Any, Any]:
        """Transform images and their masks by the same draws, and check that they fit each other before and after.

        Args:
            images: (B, C, H, W), or a list of images (C, H, W).
            masks: (B, H, W), int64, or a list of masks (H, W).
            draws: Random numbers of the rows.

        Returns:
            Images as the transform returns them, and masks (B, H', W'), or a list of masks (H', W').

        Raises:
            InputError: If images and masks have different sizes, or if the transform has no masks, see
                :meth:`check_masks`.
        """
        check_sizes(images, masks)
        again = draws.copy()
        images = self(images, draws)
        masks = self.masks(masks, again)
        name = f"masks of {type(self).__name__}"
        if self.moves_pixels and draws.drawn != again.drawn:
            got = f"{draws.drawn} numbers for images and {again.drawn} for masks"
            raise InputError(f"{name} must make the draws of images, used or not, got {got}; streams separate draws")
        check_sizes(images, masks, name)
        return images, masks

    def masks(self, masks: Masks, draws: Draws) -> Masks:
        """Move masks as images move by the same draws, to the nearest position.

        Each call makes draws. Those of the images must be a copy, see :meth:`with_masks`.

        Args:
            masks: (B, H, W), int64, or a list of masks (H, W).
            draws: Random numbers of the rows, as the images got them.

        Returns:
            (B, H', W'), int64, or a list of masks (H', W'). Positions that come from outside of the image are -100.

        Raises:
            InputError: If masks are of another type or shape, if the draws are those of another number of masks, or if
                the transform has no masks, see :meth:`check_masks`.
        """
        self.check_masks()
        if len(draws) != len(masks):
            raise InputError(f"draws must have a row for each of {len(masks)} masks, got {len(draws)}")
        masks = [plain(mask) for mask in masks] if isinstance(masks, list) else plain(masks)
        check_type(masks)
        if isinstance(masks, list) and not self.takes_lists:
            masks = stack(masks, "masks of a batch")
        if self.moves_pixels:
            masks = self.transform_masks(masks, draws)
            check_type(masks, f"masks of {type(self).__name__}")
        return masks

    def check_masks(self) -> None:
        """Check that the transform can move dense labels.

        Raises:
            InputError: If the class that implements :meth:`transform` neither implements :meth:`transform_masks` nor
                sets ``moves_pixels = False``. A base class of it does not count: it may move other pixels.
        """
        names = [{*vars(one)} for one in type(self).__mro__]
        moved = next(number for number, own in enumerate(names) if own & {"transform", "forward"})
        declared = next(number for number, own in enumerate(names) if own & {"transform_masks", "moves_pixels"})
        missing = self.moves_pixels and type(self).transform_masks is BatchTransform.transform_masks
        if missing or declared > moved:
            raise InputError(
                f"{type(self).__name__} must implement transform_masks to move dense labels as it moves pixels, or set "
                "moves_pixels = False if it changes colours only"
            )

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

    def transform_masks(self, masks: Any, draws: Draws) -> Any:
        """Return masks (B, H', W'), or a list of masks (H', W'), as :meth:`transform` moves their images.

        It makes the draws of :meth:`transform`, in the same order, used or not. A transform that calls others gives
        each a stream of its own in both methods (``draws.stream(number)``). Positions from outside of the image are
        -100.

        Args:
            masks: (B, H, W), int64; if :attr:`takes_lists`, also a list of masks (H, W).
            draws: Random numbers of the rows, as :meth:`transform` gets them.
        """
        raise NotImplementedError


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
        for part, stream in self._streams(draws):
            images = part(images, stream) if isinstance(part, BatchTransform) else part(_joined(images))
        return images if isinstance(images, list) else plain(images)

    def transform_masks(self, masks: Any, draws: Draws) -> Any:
        """Each part moves masks by the stream that it moves images by."""
        for part, stream in self._streams(draws):
            if isinstance(part, BatchTransform):
                masks = part.masks(masks, stream)
            else:
                masks = masks_by_torchvision(part, _joined(masks, "masks of a batch"))
        return masks

    def with_masks(self, images: Images, masks: Masks, draws: Draws) -> tuple[Any, Any]:
        """Transform images and masks part by part, so that each part is checked, and named in a message."""
        if type(self) is not Compose:  # a subclass may do more
            return super().with_masks(images, masks, draws)
        check_sizes(images, masks)
        check_type(masks)
        if len(draws) != len(images):
            raise InputError(f"draws must have a row for each of {len(images)} images, got {len(draws)}")
        if not self.takes_lists:
            images, masks = _joined(images), _joined(masks, "masks of a batch")
        for part, stream in self._streams(draws):
            if isinstance(part, BatchTransform):
                images, masks = part.with_masks(images, masks, stream)
            else:
                images, masks = part(_joined(images)), masks_by_torchvision(part, _joined(masks, "masks of a batch"))
        images = images if isinstance(images, list) else plain(images)
        check_sizes(images, masks)
        return images, masks

    def check_masks(self) -> None:
        """Check that each part can move dense labels.

        Raises:
            InputError: If one can not, see :meth:`BatchTransform.check_masks`.
        """
        super().check_masks()
        for part in self.transforms:
            if isinstance(part, BatchTransform):
                part.check_masks()

    def _streams(self, draws: Draws) -> Iterator[tuple[nn.Module, Draws]]:
        for number, part in enumerate(self.transforms, self._first):
            yield part, draws.stream(number)

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


def _joined(images: Any, what: str = "images of a batch") -> Any:
    """Return images as one tensor: a transform of torchvision changes only the first tensor of a list."""
    return stack(images, what) if isinstance(images, list) else images


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
