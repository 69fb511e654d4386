"""From files of pictures to a network's inputs, as in a run's evaluation; a file that cannot be read is no error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_image

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.sources.image_files import IMAGE_ENDINGS
from kd_lightning.data.sources.image_loader import Loader, load_image, why_unreadable
from kd_lightning.data.sources.image_table import ListedImages
from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.views.dataset import ViewDataset, shorten_worker_errors
from kd_lightning.data.views.worker_limits import check_open_files, share
from kd_lightning.errors import InputError
from kd_lightning.inputs import describe

_PROBES = (37, 53), (64, 41)
"""Width and height of two pictures, which show whether a transform brings all pictures to one size."""


class Loaded(NamedTuple):
    """Some of the pictures.

    Attributes:
        rows: Number of each in the list of all.
        groups: The rows that could be read, and their inputs (B, C, H, W): one group for each size.
        errors: Why the others cannot be read, by row.
    """

    rows: list[int]
    groups: list[tuple[list[int], Tensor]]
    errors: dict[int, str]


@dataclass(frozen=True)
class PictureInputs:
    """How files become inputs.

    Attributes:
        transform: The evaluation transform.
        shape: Inputs (C, H, W) that the network was trained on; None if they are not known.
        dense: Whether outputs are dense. Height and width of a picture may then be others than those of training.
        loader: Function from the path of a file to a picture.
        endings: Endings of the files that it reads.
        with_mask: Whether the transform takes a picture and its mask.
    """

    transform: Any
    shape: tuple[int, ...] | None = None
    dense: bool = False
    loader: Loader = load_image
    endings: tuple[str, ...] = IMAGE_ENDINGS
    with_mask: bool = False

    def load(self, paths: Sequence[str], batch_size: int, workers: int) -> Iterator[Loaded]:
        """Read pictures in their order.

        Args:
            paths: The files.
            batch_size: Pictures of a batch.
            workers: Processes that read them; 0 for none but this one.

        Raises:
            InputError: If the transform does not return pictures of the network's channels, or if the system lacks
                memory or files for the workers.
        """
        loader: DataLoader[Any] = DataLoader(
            _Files(paths, *self._fitting()),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_collate,  # type: ignore[arg-type]  # of __getitems__, which returns no list
            pin_memory=torch.cuda.is_available(),
        )
        check_open_files(loader)
        yield from shorten_worker_errors(loader)  # type: ignore[misc]  # written for batches

    def _fitting(self) -> tuple[Any, Loader, tuple[int | None, ...] | None]:
        """Return the transform, the loader, and the shape of inputs, with None for sizes that are not checked.

        A network of one channel was trained on grey pictures, such as MNIST's. Colours then become grey.
        """
        transform = self.transform
        if self.with_mask and not isinstance(transform, BatchTransform):
            transform = _WithoutMask(transform)
        if self.shape is None:
            return transform, self.loader, None
        loader, probed = self.loader, self._probe(transform, "RGB")
        if self.loader is load_image and self.shape[0] == 1 and (probed is None or probed[0][0] != 1):
            loader, probed = load_grey, self._probe(transform, "L")
        if probed is not None and self.loader is load_image and probed[0][0] != self.shape[0]:
            raise InputError(
                f"the transform of pictures gives {probed[0][0]} channels, but the network takes {self.shape[0]}"
            )
        fixed = probed is not None and probed[0] == probed[1]
        sizes = (None, None) if fixed or self.dense else self.shape[1:]
        return transform, loader, (self.shape[0], *sizes)

    def _probe(self, transform: Any, mode: str) -> list[tuple[int, ...]] | None:
        """Return the shapes that the transform gives for pictures of two sizes; None if it takes none of them."""
        shapes = []
        for size in _PROBES:
            try:
                x = ViewDataset([_OnePicture(mode, size)], torch.tensor([0]), transform, 0)[0].x
                shapes.append(tuple(x.shape))
            except Exception:  # transforms raise errors of any class
                return None
        return shapes


class _OnePicture:
    """A grey or white picture."""

    def __init__(self, mode: str, size: tuple[int, int]) -> None:
        self.picture = Image.new(mode, size, "white")

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int, /) -> Any:
        return self.picture


class _WithoutMask:
    """A transform of a picture, from one that takes a picture and its mask."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, picture: Any) -> Any:
        image = picture if isinstance(picture, Tensor) else to_image(picture)
        mask = tv_tensors.Mask(torch.full(image.shape[-2:], IGNORE_INDEX))
        return self.transform({"image": tv_tensors.Image(image), "mask": mask})["image"]


class _Files(Dataset[Any]):
    """The inputs of a list of files."""

    def __init__(
        self, paths: Sequence[str], transform: Any, loader: Loader, shape: tuple[int | None, ...] | None
    ) -> None:
        self.paths = paths
        self.shape = shape
        self.views = ViewDataset([ListedImages([*paths], "", loader)], torch.arange(len(paths)), transform, 0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, rows: list[int]) -> Loaded:
        """Read a batch; picture by picture if one of them cannot be read, or has another size."""
        try:
            return Loaded(rows, [(rows, self._read(rows))], {})
        except Exception:  # transforms and loaders of the user raise errors of any class
            pass
        errors: dict[int, str] = {}
        groups: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for row in rows:
            try:
                x = self._read([row])
                groups.setdefault((*x.shape, x.dtype), []).append((row, x))  # type: ignore[arg-type]
            except Exception as error:
                errors[row] = why_unreadable(error, self.paths[row])
        found = [([row for row, _ in group], torch.cat([x for _, x in group])) for group in groups.values()]
        return Loaded(rows, found, errors)

    def _read(self, rows: list[int]) -> Tensor:
        x = self.views.__getitems__([(row, 0) for row in rows]).x
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise InputError(f"the transform of a picture must give (C, H, W), got {describe(x)} for a batch")
        if self.shape is not None and any(
            want not in (None, have) for want, have in zip(self.shape, x.shape[1:], strict=True)
        ):
            raise InputError(
                f"it becomes {[*x.shape[1:]]}, but the network was trained on {[*self.shape]}, and the evaluation "
                "transform does not resize"
            )
        return x


def load_grey(path: str) -> Image.Image:
    """Load an image file as a grey picture of 8 bits; the one of :func:`load_image` without its colours."""
    return load_image(path).convert("L")


def _collate(loaded: Loaded) -> Loaded:
    return loaded._replace(groups=[(rows, share(x)) for rows, x in loaded.groups])
