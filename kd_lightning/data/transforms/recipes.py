"""Transforms: the sources' defaults, and strong augmentations for the second view of FixMatch (Sohn et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, float32, nn, uint8
from torchvision.transforms import v2

from kd_lightning.data.transforms.auto_augment import RandAugment
from kd_lightning.data.transforms.base import BatchTransform, Compose, Images
from kd_lightning.data.transforms.channels import RGB
from kd_lightning.data.transforms.color import ColorJitter, GaussianBlur, RandomGrayscale
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.data.transforms.erasing import RandomErasing
from kd_lightning.data.transforms.geometry import RandomAffine, RandomCrop, RandomHorizontalFlip, read_size
from kd_lightning.data.transforms.normalize import Normalize
from kd_lightning.data.transforms.resize import CenterCrop, RandomResizedCrop, Resize, ResizeToCover
from kd_lightning.errors import InputError

_ROUNDING = 0.02
"""How far values of images may lie outside of [0, 1], as after a resize or in half precision."""


def to_float() -> BatchTransform:
    """From PIL images or uint8 tensors to float tensors in [0, 1]."""
    return Compose([v2.ToDtype(float32, scale=True)])


def photo_transforms(image_size: int | Sequence[int]) -> tuple[BatchTransform, BatchTransform]:
    """Training and evaluation transforms for photographs, normalised as torchvision's pretrained networks expect.

    Training crops a random area, 3/4 to 4/3 as wide as the output has it. Evaluation shrinks or enlarges the picture
    until it covers 8/7 of the output, and crops its centre. Neither changes the proportions otherwise.

    Args:
        image_size: Height and width of the output in pixels, or one number for a square; at least 1.

    Raises:
        InputError: If ``image_size`` is out of range.
    """
    size, ratio = _read_size("image_size", image_size, least=1)
    normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return (
        Compose([RGB(), RandomResizedCrop(size, ratio=ratio), RandomHorizontalFlip(), normalize]),
        Compose([RGB(), _resize_to_cover(size), CenterCrop(size), normalize]),
    )


def segmentation_transforms(image_size: int | Sequence[int]) -> tuple[BatchTransform, BatchTransform]:
    """Training and evaluation transforms for photographs with masks, normalised as :func:`photo_transforms` does.

    Training crops a random area, half to twice as wide as the output has it, mirrors at random, and changes brightness,
    contrast and saturation of the image alone. Evaluation resizes the whole picture to the output, so that each
    position counts: it changes the proportions of a picture that has others. Masks get the nearest label.

    Args:
        image_size: Height and width of the output in pixels, or one number for a square; at least 1.

    Raises:
        InputError: If ``image_size`` is out of range.
    """
    height, width = read_size("image_size", image_size)
    crop = RandomResizedCrop([height, width], scale=(0.25, 1.0), ratio=(width / height / 2, width / height * 2))
    normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return (
        Compose([RGB(), crop, RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4), normalize]),
        Compose([RGB(), Resize([height, width]), normalize]),
    )


def photo_side(image_size: int | Sequence[int]) -> int:
    """Return the short side in pixels that a picture needs for the evaluation transform of :func:`photo_transforms`."""
    return max(read_size("image_size", image_size)) * 8 // 7


def small_image_transforms(
    mean: Sequence[float], std: Sequence[float], size: int, *, flip: bool, padding: int = 4
) -> tuple[BatchTransform, BatchTransform]:
    """Training and evaluation transforms for small images, normalised by the mean and std of each channel.

    Training crops a square of ``size`` pixels after ``padding`` pixels of zeros, and mirrors at random if ``flip``.
    """
    normalize = Normalize(mean, std)
    crop = [RandomCrop(size, padding=padding), *([RandomHorizontalFlip()] if flip else [])]
    return Compose([*crop, normalize]), Compose([normalize])


def strong_digits() -> BatchTransform:
    """Strong view of ``Digits``, from and to float tensors (1, 8, 8) in [0, 1].

    Random rotation, shift by one pixel, scale, shear, brightness and contrast; 2x2 pixels are erased. With stronger
    values people mistake one digit for another.
    """
    return Compose(
        [
            RandomAffine(
                # shifts are rounded to whole pixels: this is a shift by one pixel in 3 of 8 cases
                degrees=25,
                translate=(0.1, 0.1),
                scale=(0.8, 1.2),
                shear=10,
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            ColorJitter(brightness=0.3, contrast=0.3),
            _cutout(1 / 4),
        ]
    )


def strong_small(
    mean: list[float], std: list[float], size: int = 32, padding: int = 4, flip: bool = True
) -> BatchTransform:
    """FixMatch's strong view of small images such as those of CIFAR-10.

    Crop and flip as in the weak view, then two operations of RandAugment, which are FixMatch's 14, then Cutout of a
    square of half the side. New pixels have the mean colour. FixMatch samples the strength of each operation and skips
    half of them; torchvision's RandAugment applies all, at a third of the range.

    Args:
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel of images in [0, 1], above 0.
        size: Side of the output in pixels, at least 2.
        padding: Pixels around the image that a crop may include, at least 0.
        flip: Whether to mirror images at random. Set it to false if a mirror image is of another class, as for digits.

    Returns:
        A transform from images (B, C, H, W), uint8 or float in [0, 1], to normalised ones (B, C, size, size); or from
        one PIL image or tensor (C, H, W).

    Raises:
        InputError: For values out of range.
    """
    if not mean or len(mean) != len(std):
        raise InputError(f"mean and std must have a number for each channel, got {mean} and {std}")
    if min(std) <= 0:
        raise InputError(f"std must be above 0, got {std}")
    _read_size("size", size, least=2)
    if padding < 0:
        raise InputError(f"padding must be at least 0, got {padding}")
    crop = [RandomCrop(size, padding=padding), *([RandomHorizontalFlip()] if flip else [])]
    return Compose([v2.ToDtype(uint8, scale=True), *crop, *_strong_tail(mean, std)])


def strong_photos(size: int | tuple[int, int] = 224) -> BatchTransform:
    """Strong view of photographs, normalised as torchvision's pretrained networks expect.

    Crop of random size and flip as in ``ImageFolder``'s default, then RandAugment and Cutout as in
    :func:`strong_small`.

    Args:
        size: Height and width of the output in pixels, or one number for a square; at least 2.

    Returns:
        A transform from images (B, C, H, W), or a list of images of different sizes, uint8 or float in [0, 1], grey or
        colour, to normalised ones (B, 3, height, width); or from one PIL image or tensor (C, H, W).

    Raises:
        InputError: For a size below 2.
    """
    side, ratio = _read_size("size", size, least=2)
    crop = [RandomResizedCrop(side, ratio=ratio), RandomHorizontalFlip()]
    return Compose([_ToBytes(), RGB(), *crop, *_strong_tail([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


def strong_colors(
    mean: Sequence[float] = (0.485, 0.456, 0.406), std: Sequence[float] = (0.229, 0.224, 0.225)
) -> BatchTransform:
    """Strong view of images with dense labels: colours and sharpness change, and no pixel moves.

    It is ST++'s strong view without Cutout: brightness, contrast and saturation by up to a half, hue by up to a
    quarter of the circle; a fifth of the images become grey; Gaussian blur of a standard deviation of 0.1 to 2 pixels.
    ST++ leaves out some of these at random.

    Source: Yang et al., "ST++: Make Self-training Work Better for Semi-supervised Semantic Segmentation" (2022),
    https://arxiv.org/abs/2106.05095.

    Args:
        mean: Mean of each channel, as the weak view is normalised. The default is that of photographs.
        std: Standard deviation of each channel, as the weak view is normalised, above 0.

    Returns:
        A transform from and to normalised images (B, C, H, W), C = 1 or 3, such as weak views, H and W at least 5; or
        from one image (C, H, W).

    Raises:
        InputError: For values out of range. In a call, for images of whole numbers, which are not normalised, and on
            the CPU for values that are none of images with this mean and std.
    """
    if not mean or len(mean) != len(std):
        raise InputError(f"mean and std must have a number for each channel, got {mean} and {std}")
    if min(std) <= 0:
        raise InputError(f"std must be above 0, got {std}")
    jitter = ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25)
    blur = GaussianBlur(9, sigma=(0.1, 2.0))
    return Compose([_FromNormalized(mean, std), jitter, RandomGrayscale(0.2), blur, Normalize(mean, std)])


def _strong_tail(mean: list[float], std: list[float]) -> list[nn.Module]:
    """Two operations of RandAugment on uint8 images, then normalised images, then Cutout of half the side."""
    augment = RandAugment(num_ops=2, magnitude=10, fill=[255 * value for value in mean])
    return [augment, Normalize(mean, std), _cutout(1 / 2)]


def _cutout(share: float) -> RandomErasing:
    """Set a square, whose side is this share of the image's, to 0: the mean colour of normalised images."""
    return RandomErasing(p=1.0, scale=(share**2, share**2), ratio=(1.0, 1.0), value=0)


class _FromNormalized(BatchTransform):
    """Convert normalised images to floats in [0, 1]."""

    is_random = False
    moves_pixels = False

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return new images (B, C, H, W)."""
        if not images.is_floating_point():
            raise InputError(f"strong_colors takes normalised images, got {images.dtype}")
        if images.shape[1] != len(self.mean):
            raise InputError(f"images must have {len(self.mean)} channels, as mean and std have, got {images.shape[1]}")
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        unit = images * std + mean
        if unit.device.type == "cpu" and unit.numel():  # elsewhere it would wait for the device
            low, high = (float(value) for value in unit.aminmax())
            if low < -_ROUNDING or high > 1 + _ROUNDING:
                raise InputError(
                    f"strong_colors: mean {self.mean} and std {self.std} must be those of the weak view, but give "
                    f"values of {low:.2f} to {high:.2f}, not 0 to 1"
                )
        return unit.clamp_(0, 1)


class _ToBytes(BatchTransform):
    """Convert images to uint8, the range of RandAugment's ``fill``. Float images are in [0, 1]."""

    takes_lists = True
    moves_pixels = False

    def transform(self, images: Images, draws: Draws) -> Images:
        """Return a tensor for a tensor, and a list for a list."""
        if isinstance(images, list):
            return [v2.functional.to_dtype(image, uint8, scale=True) for image in images]
        converted: Tensor = v2.functional.to_dtype(images, uint8, scale=True)
        return converted


def _resize_to_cover(size: int | list[int]) -> BatchTransform:
    """Resize images so that they cover 8/7 of a size."""
    if isinstance(size, list):
        return ResizeToCover([side * 8 // 7 for side in size])
    return Resize(size * 8 // 7)


def _read_size(name: str, size: int | Sequence[int], *, least: int) -> tuple[int | list[int], tuple[float, float]]:
    """Check a size.

    Returns:
        The side of a square, else height and width; lowest and highest width over height of a crop that is resized to
        it.

    Raises:
        InputError: If it is no whole number from ``least``, and no two of them.
    """
    height, width = read_size(name, size, least)
    shape = width / height
    ratio = (3 / 4 * shape, 4 / 3 * shape)
    return (height if height == width else [height, width]), ratio
