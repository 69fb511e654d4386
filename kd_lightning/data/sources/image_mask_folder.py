"""A source of pictures with masks as files."""

from __future__ import annotations

from pathlib import Path

from kd_lightning.data.sources.dense_labels import LabelRules, dense_part
from kd_lightning.data.sources.image_files import FlatFolder
from kd_lightning.data.sources.mask_files import IMAGES, MaskFiles
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms.recipes import segmentation_transforms
from kd_lightning.errors import InputError


class ImageMaskFolder(Source):
    """Folders of pictures with a mask of class numbers for each: semantic segmentation.

    A part is a folder with the subfolders ``images`` and ``masks``. A mask has the path of its picture but for the
    ending, which is ``.png``: ``images/a/1.jpg`` and ``masks/a/1.png``. It is grey or has a palette, of up to 16 bits,
    and holds class numbers. A picture without a mask is unlabeled. Pictures are found as by
    :class:`~kd_lightning.data.sources.image_folder.ImageFolder`.

    The default transforms are those of :func:`~kd_lightning.data.transforms.recipes.segmentation_transforms`: random
    crop, mirror image and colours in training; evaluation resizes the whole picture.

    Args:
        train: Folder of the training part.
        test: Folder of the test part. Default: None, which means none.
        unlabeled: Folder of pictures without masks, at any depth; if it has a subfolder ``images``, that one. Default:
            None, which means none.
        class_names: Names of the classes, by number. Default: None, which means that classes are not checked.
        void: Class number of positions without a label, which neither train nor count in metrics. None for no such
            number.
        image_size: Height and width in pixels of the default transforms, or one number for a square; at least 1.
        val: Folder of your own validation part. Default: None, which means that the datamodule takes ``val_size`` of
            the training part.

    Raises:
        InputError: If ``image_size`` or ``void`` is out of range.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        unlabeled: str | None = None,
        class_names: list[str] | None = None,
        void: int | None = 255,
        image_size: int | tuple[int, int] = 224,
        val: str | None = None,
    ) -> None:
        if void is not None and (isinstance(void, bool) or not isinstance(void, int) or void < 0):
            raise InputError(f"void must be a class number of at least 0, or null for none, got {void!r}")
        self.train = train
        self.test = test
        self.val = val
        self.unlabeled = unlabeled
        self.class_names = class_names
        self.void = void
        self.train_transform, self.eval_transform = segmentation_transforms(image_size)

    def load(self) -> Parts:
        """List the files.

        Raises:
            InputError: If a folder is missing, or pictures and masks do not fit.
        """
        rules = LabelRules(len(self.class_names) if self.class_names else None, self.void)
        train, test, val = (
            None if folder is None else dense_part(MaskFiles(name, folder), rules)
            for name, folder in (("train", self.train), ("test", self.test), ("val", self.val))
        )
        assert train is not None
        unlabeled = None
        if self.unlabeled is not None:
            inner = Path(self.unlabeled).expanduser() / IMAGES
            unlabeled = FlatFolder("unlabeled", str(inner) if inner.is_dir() else self.unlabeled)
        return Parts(train, test, unlabeled, self.class_names, void=self.void, val=val)
