"""A store of decoded pictures: each image file is decoded once, and read as pixels from then on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from torchvision import datasets
from torchvision.transforms.v2.functional import resize_image

from kd_lightning.cache.content import fingerprint
from kd_lightning.cache.pictures import Picture, PictureStore, PictureTable
from kd_lightning.cache.store import format_size
from kd_lightning.data.file_hashes import FileNotes, hash_file, hash_files, number_of
from kd_lightning.data.sources.image_files import ClassFolders, FlatFolder
from kd_lightning.data.sources.image_loader import Loader, load_image
from kd_lightning.data.sources.images import Images, part_of, path_of, printable, read_image
from kd_lightning.data.sources.mask_files import MaskFiles
from kd_lightning.data.sources.pixels import DecodedImages, read_pixels
from kd_lightning.data.sources.rotated_classes import RotatedImages
from kd_lightning.data.sources.torchvision_files import TorchvisionFiles
from kd_lightning.errors import InputError
from kd_lightning.ranks import gather, on_all_ranks

RULES = 1
"""Version of the rules by which a file becomes pixels. Another number gives another folder."""
_HEADERS, _READ = 10_000, 64
"""Number of absent pictures whose sizes are read before they are decoded; of a user's loader, which decodes them."""


class _File(NamedTuple):
    """An image file: the dataset that reads it, the item, and by how many quarter turns the item is rotated."""

    images: Any
    number: int
    turns: int = 0


class DecodedPictures:
    """A folder of decoded pictures, by the contents of their files.

    A picture has the pixels that the source's loader returns, shrunk such that its short side is ``side`` pixels:
    bilinear, antialiased, as ``torchvision.transforms.v2.Resize(side)`` does. Smaller pictures stay as they are.

    Pictures are found by content: files may be renamed, moved, added and removed, and several data sets may share one
    folder. Only what is absent is decoded. Another ``side`` or another loader has a subfolder of its own. A user's
    loader must return the same picture for files of the same content.

    Args:
        folder: Folder of the store.
        side: Short side in pixels, at least 1. Default: None, which means that pictures have their full size.

    Raises:
        InputError: If ``side`` is out of range.
    """

    def __init__(self, folder: str | Path, side: int | None = None) -> None:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
            raise InputError(f"decoded_side must be a whole number of at least 1, got {side!r}")
        self.folder = Path(folder).expanduser().absolute()
        self.side = side
        self.notes = FileNotes(self.folder / "files")
        self._opened: dict[int, StoredPictures] = {}

    def recall(self, parts: Sequence[Images], trainer: Trainer | None = None) -> None:
        """Take the hashes of unchanged files from the store, so that ``identify`` does not read these files.

        Size and times of all files are compared with those of an earlier fit. Changed files are hashed, and a random
        sample of the others. Call it on every process at the start of a fit, before anything else hashes the files.

        Args:
            parts: Parts of a source.
            trainer: The trainer. Default: None, which means a single process.

        Raises:
            InputError: On all processes: if images are not read from files by a loader, or a file cannot be read.
        """
        self._opened.clear()
        paths: list[str] = []
        found: list[bool] = []
        writes = trainer is None or trainer.local_rank == 0

        def recall() -> None:
            paths.extend(path for part in parts for path in _paths(_files_of(part)[0]))
            found.append(self.notes.recall(paths, write=writes))

        on_all_ranks(trainer, recall, "decoded")
        if any(gather(trainer, found[0])):  # each process has a sample of its own
            on_all_ranks(trainer, lambda: found[0] or self.notes.recall(paths, trust=False, write=writes), "decoded")

    def fill(self, parts: Sequence[Images], trainer: Trainer | None = None, threads: int = 1) -> list[StoredPictures]:
        """Decode what is absent, and return the parts as they are read from the store.

        Call it on every process. All processes decode together, also those of other fits.

        Args:
            parts: Parts of a source.
            trainer: The trainer. Default: None, which means a single process.
            threads: Number of threads of this process that decode, at least 1. A user's loader runs in one.

        Raises:
            InputError: On all processes: if images are not read from files by a loader, if a file cannot be read or has
                no picture of 8 bits with 1 or 3 channels, or if the folder cannot be written or has no room.
        """
        stored: list[StoredPictures] = []

        def fill() -> None:
            for part in parts:
                stored.append(self._fill(part, trainer, max(threads, 1)))

        with isolate_rng(include_cuda=False):  # so that a run is the same whether the store is filled or found
            on_all_ranks(trainer, fill, "decoded")
        return stored

    def open(self, parts: Sequence[Images], trainer: Trainer | None = None, threads: int = 1) -> list[StoredPictures]:
        """Return the parts as they are read from the store. What is absent is decoded at the first call.

        The arguments are those of :meth:`fill`. A part is opened once, until the next :meth:`recall`.
        """
        absent = [part for part in parts if id(part) not in self._opened]
        self._opened |= {id(one.part): one for one in self.fill(absent, trainer, threads)} if absent else {}
        return [self._opened[id(part)] for part in parts]

    def _fill(self, part: Images, trainer: Trainer | None, threads: int) -> StoredPictures:
        files, loader = _files_of(part)
        paths = _paths(files)
        contents = np.array([*map(number_of, hash_files(paths))], np.uint64)
        store = PictureStore(self.folder, self._parts(loader))
        missing = store.missing(contents)
        if len(missing):
            wanted: dict[int, list[_File]] = {content: [] for content in missing.tolist()}
            for content, file in zip(contents.tolist(), files, strict=True):
                if content in wanted:
                    wanted[content].append(file)
            self._decode(store, wanted, loader, trainer, threads)
        is_pil = loader is load_image or isinstance(read_image([files[0].images], files[0].number), Image.Image)
        turns = np.array([file.turns for file in files], np.uint8)
        return StoredPictures(part, store.table(contents), paths, turns, is_pil=is_pil)

    def _parts(self, loader: Loader) -> dict[str, str]:
        """What decides the pixels beside the content of a file."""
        own = "" if loader is load_image else fingerprint(loader)
        return {"side": str(self.side), "loader": own, "rules": str(RULES)}

    def _decode(
        self,
        store: PictureStore,
        wanted: dict[int, list[_File]],
        loader: Loader,
        trainer: Trainer | None,
        threads: int,
    ) -> None:
        """Announce the size of absent pictures, and decode them."""
        size, estimated = self._size(wanted, loader)
        free = store.check_room(size)
        about = "about " if estimated else ""
        rank_zero_info(
            f"decoded: decoding {len(wanted)} pictures, {about}{format_size(size)}, into {store.folder}, where "
            f"{format_size(free)} are free"
        )
        own = loader is not load_image
        is_shown = trainer is not None and trainer.is_global_zero and trainer.progress_bar_callback is not None
        with Progress(disable=not is_shown) as progress:
            bar = progress.add_task("decoded pictures", total=len(wanted))
            store.fill(
                wanted,
                lambda content: self._read(content, wanted[content] if own else wanted[content][:1]),
                threads=1 if own else threads,
                report=lambda absent: progress.update(bar, completed=len(wanted) - absent),
            )

    def _size(self, wanted: dict[int, list[_File]], loader: Loader) -> tuple[float, bool]:
        """Bytes of pictures, and whether they are estimated from some of them."""
        contents = [*wanted]
        own = loader is not load_image
        some = np.random.default_rng().permutation(len(contents))[: _READ if own else _HEADERS].tolist()
        sizes = [self._size_of(contents[number], wanted[contents[number]][0], own) for number in some]
        return sum(sizes) / len(sizes) * len(contents), len(sizes) < len(contents)

    def _size_of(self, content: int, file: _File, own: bool) -> int:
        if own:
            return self._read(content, [file, file]).nbytes  # twice, since the loader may be random
        try:
            with Image.open(_paths([file])[0]) as image:  # reads the header alone
                short, long = sorted(image.size)
        except Exception:  # decoders raise errors of any class; another decoder may read it
            return self._read(content, [file]).nbytes
        if self.side is not None and self.side < short:
            short, long = self.side, int(self.side * long / short)
        return 3 * short * long

    def _read(self, content: int, files: list[_File]) -> Picture:
        """Decode a picture (H, W, C) of files of equal content, and compare the pictures of these files."""
        picture = self._read_file(content, files[0])
        for file in files[1:]:
            if not np.array_equal(self._read_file(content, file), picture):
                first, second = map(printable, _paths([files[0], file]))
                raise InputError(
                    f"decoded: loader must return one picture for equal files, got different ones for {first} and "
                    f"{second}; remove decoded"
                )
        return picture

    def _read_file(self, content: int, file: _File) -> Picture:
        (path,) = _paths([file])
        pixels = read_pixels([file.images], file.number)
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel():
            raise InputError(
                f"decoded: pictures must be uint8 (C, H, W) with 1 or 3 channels, got {str(pixels.dtype)[6:]} "
                f"{[*pixels.shape]} for {printable(path)}; remove decoded, or set another loader"
            )
        if self.side is not None and min(pixels.shape[1:]) > self.side:
            pixels = resize_image(pixels, [self.side], antialias=True)
        if number_of(hash_file(path)) != content:  # reads the file only if size or times have changed
            raise InputError(f"decoded: image {printable(path)} changes while it is read; start again")
        return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


class StoredPictures(DecodedImages):
    """The images of a part, read from a store of decoded pictures.

    Args:
        part: The part.
        table: The pictures, by index.
        paths: Path of each image's file.
        turns: Quarter turns counterclockwise by which each image is rotated, (N,).
        is_pil: Whether an item is a PIL image, as the loader returns it, else a tensor.
    """

    def __init__(
        self, part: Images, table: PictureTable, paths: list[str], turns: np.ndarray[Any, Any], *, is_pil: bool
    ) -> None:
        self.part = part
        self.table = table
        self.paths = paths
        self.turns = turns if turns.any() else None
        self.is_pil = is_pil

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int, /) -> Any:
        pixels = self.pixels(index)
        if not self.is_pil:
            return pixels
        picture = pixels.permute(1, 2, 0).numpy()
        return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)

    def pixels(self, index: int) -> Tensor:
        """Return an image as uint8 (C, H, W). In memory, channels come last.

        Raises:
            InputError: If the store is damaged.
        """
        pixels = torch.from_numpy(self.table.read(index)).permute(2, 0, 1)
        turns = 0 if self.turns is None else int(self.turns[index])
        return torch.rot90(pixels, turns, (1, 2)) if turns else pixels


def _files_of(part: Images) -> tuple[list[_File], Loader]:
    """Return the file of each item of a part, and the loader of all of them."""
    files = _files(part, range(len(part)))
    loaders = [_loader_of(images) for images in {id(file.images): file.images for file in files}.values()]
    if any(loader is not loaders[0] for loader in loaders):
        raise InputError("decoded: all images of a part must have one loader; remove decoded")
    return files, loaders[0] if loaders else load_image


def _files(images: Images, numbers: Sequence[int]) -> list[_File]:
    """Find the file of each item, in subsets, joined and rotated datasets, too."""
    if type(images) is Subset:
        return _files(images.dataset, [int(images.indices[number]) for number in numbers])  # type: ignore[arg-type]
    if type(images) is ConcatDataset:
        inner = (part_of(images.datasets, number) for number in numbers)  # type: ignore[arg-type]
        return [file for part, number in inner for file in _files(part, [number])]
    if type(images) is RotatedImages:
        whole = (divmod(number, len(images.images)) for number in numbers)
        return [
            file._replace(turns=(file.turns + turns) % 4)
            for turns, number in whole
            for file in _files(images.images, [number])
        ]
    return [_File(images, number) for number in numbers]


def _loader_of(images: Any) -> Loader:
    """The function that reads the files of a dataset; a subclass may return other images."""
    kinds = (ClassFolders, FlatFolder, MaskFiles, TorchvisionFiles, datasets.ImageFolder, datasets.DatasetFolder)
    if type(images) not in kinds or getattr(images, "transforms", None) is not None:
        raise InputError(
            "decoded: images must be read from files by a loader, as by ImageFolder, and without a transform of the "
            f"dataset, got {type(images).__name__}; remove decoded"
        )
    loader: Loader = images.loader
    return loader


def _paths(files: Sequence[_File]) -> list[str]:
    return [str(path_of([file.images], file.number)) for file in files]
