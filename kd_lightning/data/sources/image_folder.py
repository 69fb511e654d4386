"""A source of folders of images."""

from __future__ import annotations

from kd_lightning.data.sources._parts import dataset_part, unlabeled_parts
from kd_lightning.data.sources.image_files import IMAGE_ENDINGS, ClassFolders, FlatFolder, class_names
from kd_lightning.data.sources.image_loader import Loader, load_image
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms.recipes import photo_side, photo_transforms
from kd_lightning.errors import InputError


class ImageFolder(Source):
    """Folders of images with one subfolder per class.

    Images may lie at any depth, and links are followed. Files and folders of the system (``.ipynb_checkpoints``,
    ``__MACOSX``, ``._0.jpg``, ``Thumbs.db``, ...) and files whose ending is that of no image are passed over; how many
    is logged. A subfolder without images is a class without samples. A subfolder that another argument names, such as
    ``photos/unlabeled`` of ``photos``, is no class. Class names are compared in Unicode NFC.

    Args:
        train: Folder of the training part. None: the images of ``unlabeled`` are the training part, which has no label.
        test: Folder of the test part. Its subfolders are some or all of those of ``train``. Default: None, which means
            none.
        unlabeled: Folder of images without labels, at any depth. Default: None, which means none.
        val: Folder of your own validation part, as ``test``. Default: None, which means that the datamodule takes
            ``val_size`` of the training part. Without ``train``, the subfolders of ``val`` and ``test`` are the
            classes.
        image_size: Height and width in pixels that the default transforms crop, or one number for a square; at least 1.
        loader: Function from the path of a file to a picture: a PIL image or a tensor (C, H, W). In YAML: the import
            path of a function, or a ``class_path`` of a class whose objects can be called. Default:
            :func:`~kd_lightning.data.sources.image_loader.load_image`.
        endings: Endings of the files that ``loader`` reads, such as ``[.npy]``. Default: None, which means those of
            images.

    Raises:
        InputError: If ``image_size`` is out of range, if an ending does not begin with a dot, or if there is neither
            ``train`` nor ``unlabeled``.
    """

    def __init__(
        self,
        train: str | None = None,
        test: str | None = None,
        unlabeled: str | None = None,
        image_size: int | tuple[int, int] = 224,
        loader: Loader = load_image,
        endings: list[str] | None = None,
        val: str | None = None,
    ) -> None:
        if train is None and unlabeled is None:
            raise InputError("train or unlabeled must name a folder of images, got neither")
        self.train = train
        self.test = test
        self.val = val
        self.unlabeled = unlabeled
        self.loader = loader
        self.endings = IMAGE_ENDINGS if endings is None else tuple(ending.lower() for ending in endings)
        if not self.endings or not all(ending.startswith(".") and len(ending) > 1 for ending in self.endings):
            raise InputError(f"endings must be one or more, each of which begins with a dot, got {endings}")
        self.train_transform, self.eval_transform = photo_transforms(image_size)
        self.stored_side = photo_side(image_size)

    def load(self) -> Parts:
        """List the files.

        Raises:
            InputError: If a folder is missing or has no images, or the test or validation part has a class that the
                others lack.
        """
        unlabeled, classes = None, None
        if self.unlabeled is not None:
            unlabeled = FlatFolder("unlabeled", self.unlabeled, self.loader, self.endings)
        folders = {"train": self.train, "test": self.test, "val": self.val}
        if self.train is None:
            classes = class_names([folder for folder in (self.val, self.test) if folder is not None])
        found = {}
        for name, folder in folders.items():
            if folder is not None:
                others = [other for other in (*folders.values(), self.unlabeled) if other not in (None, folder)]
                found[name] = ClassFolders(name, folder, classes, self.loader, self.endings, others)
                classes = found[name].classes
        parts = {name: dataset_part(part) for name, part in found.items()}
        if unlabeled is not None and self.train is None:
            return unlabeled_parts(unlabeled, parts.get("test"), parts.get("val"), classes)
        return Parts(parts["train"], parts.get("test"), unlabeled, classes, val=parts.get("val"))
