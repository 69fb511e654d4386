"""What the contract puts into a run: killers, recorders, and a network that knows only its own samples."""

import json
import os
import signal
import threading
from pathlib import Path

import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.io import write_png
from torchvision.transforms import v2

from kd_lightning.batch import is_labeled
from kd_lightning.data import Digits, HuggingFaceSource, ImageTable
from kd_lightning.data.sources.source import Part
from kd_lightning.data.transforms import Compose


class StoppedError(Exception):
    """Stands for a fault that takes the process down."""


class Stop(Callback):
    """Ends the process before an optimiser step: STOP_AT=7 by an exception, KILL_AT=7 with a real SIGKILL.

    KILL_AT=7+0.02 waits for 0.02 seconds, whatever the process does then. These are variables of the environment, so
    that a run keeps its config.
    """

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step, _, seconds = os.environ.get("KILL_AT", "").partition("+")
        if step == str(trainer.global_step):
            if not seconds:
                os.kill(os.getpid(), signal.SIGKILL)
            timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True  # the process may end before
            timer.start()
        if os.environ.get("STOP_AT") == str(trainer.global_step):
            raise StoppedError


class FixedStatistics(Callback):
    """The student's batch normalisation divides by its running statistics, which stay as they are.

    Where the last maps have one position, statistics of 4 rows amplify rounding layer by layer. At the same weights,
    bfloat16 changes the output of the MobileNetV4 of feature_dinov3 by 75 %, and that of the ResNet-18 of
    feature_dinov2 by 14 %; soon they are other networks. Terms of the same features change by 0.2 % at most.
    """

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for layer in pl_module.student.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()


class Record(Callback):
    """Writes which samples each rank saw, how many of them labeled, and the epoch's losses."""

    def __init__(self, folder: str):
        self.folder = folder
        self.batches = []
        self.losses = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append({"index": batch.index.tolist(), "labels": int(is_labeled(batch.y).sum())})

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})

    def on_fit_end(self, trainer, pl_module):
        found = {"batches": self.batches, "losses": self.losses, "world": trainer.world_size}
        path = Path(self.folder, f"{trainer.global_rank}_of_{trainer.world_size}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found))


class RecordRows(Record):
    """The same of batches without an index: the sum of each row's values names the sample."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        names = [round(float(row.sum()), 3) for row in batch.x]
        self.batches.append({"index": names, "labels": int(is_labeled(batch.y).sum())})


class NumberStream(IterableDataset):
    """Random rows whose order is another one in each epoch; a fourth of them have no label."""

    def __init__(self, count: int = 136, seed: int = 0):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.rand(self.count, 1, 8, 8, generator=generator)
        order = torch.randperm(self.count, generator=generator.manual_seed(self.seed + 1000 * self.epoch))
        for number in order.tolist():
            yield {"image": x[number], "label": None if number % 4 == 1 else number % 10}


def save_stream(folder, count=136):
    """Write such rows as a data set of Hugging Face, and return its arguments as a stream."""
    from datasets import Dataset, DatasetDict

    items = [*NumberStream(count)]
    columns = {"image": [item["image"].tolist() for item in items], "label": [item["label"] for item in items]}
    DatasetDict(train=Dataset.from_dict(columns)).save_to_disk(folder)
    return {"class_path": "HuggingFaceStream", "init_args": {"path": str(folder), "shuffle_buffer": 16}}


class PermuteHidden(Callback):
    """Deals the hidden labels anew, once the split is drawn; within its group where a coarse label tells that."""

    changed = 0

    def setup(self, trainer, pl_module, stage):
        data = trainer.datamodule
        parts = data._parts
        if parts.train.dense:
            if data.split.unlabeled:
                self._permute_masks(parts.train.images.mask_paths, data.split.unlabeled)
            return
        hidden = [(parts.train.targets, torch.tensor(data.split.unlabeled, dtype=torch.long))]
        if data.transductive:
            hidden.append((parts.test.targets, torch.arange(len(parts.test.targets))))
        if data.coarse is not None:
            targets, index = hidden.pop(0)
            group = data.coarse.members(len(data.class_names), data.class_names).int().argmax(dim=0)[targets[index]]
            hidden += [(targets, index[group == number]) for number in group.unique()]
        for targets, index in hidden:
            before = targets[index]
            targets[index] = before[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
            self.changed += int((targets[index] != before).sum())

    def _permute_masks(self, paths, index):
        """Each gets the mask of the next one."""
        for number, path in zip(index, [paths[other] for other in index[1:] + index[:1]], strict=True):
            self.changed += paths[number] != path
            paths[number] = path


class DigitsWithVal(Digits):
    """The digits with their own validation part: the last 100 of the training part."""

    def load(self):
        parts = super().load()
        images, targets = parts.train.images, parts.train.targets
        size = len(targets) - 100
        train, val = (Part(Subset(images, n), targets[n]) for n in (range(size), range(size, len(targets))))
        return parts._replace(train=train, val=val)


def _pictures(count):
    """Pictures of some digits, and the numbers that they show."""
    part = Digits().load().train
    for number in range(count):
        values = (part.images[number][0] * (255 / 16)).round().to(torch.uint8)
        yield Image.fromarray(values.squeeze(0).numpy()), int(part.targets[number])


def _grey_transforms():
    """From pictures to the tensors of Digits: augmented, and not."""
    grey = [v2.Grayscale(), v2.ToDtype(torch.float32, scale=True)]
    return Compose([*grey, Digits().train_transform]), Compose(grey)


class TableOfDigits(ImageTable):
    """Digits as pictures in one folder, and a table of labels, splits, weights, and groups of two pictures."""

    def __init__(self):
        super().__init__("digits/labels.csv", group="writer", image_size=8)
        self.train_transform, self.eval_transform = _grey_transforms()

    def prepare(self):
        if Path("digits/labels.csv").exists():
            return
        Path("digits").mkdir(exist_ok=True)
        lines = ["filename,label,split,weight,writer"]
        for number, (picture, label) in enumerate(_pictures(900)):
            picture.save(f"digits/{number}.png")
            split = "test" if number >= 700 else "train"
            lines.append(f"{number}.png,{label},{split},{1 + number % 2},{number // 2}")
        Path("digits/labels.csv").write_text("\n".join(lines))


class SavedDigits(HuggingFaceSource):
    """Digits as a folder that Hugging Face's datasets have written."""

    def __init__(self):
        super().__init__("saved_digits", image_size=8)
        self.train_transform, self.eval_transform = _grey_transforms()

    def prepare(self):
        from datasets import ClassLabel, Dataset, DatasetDict, Features
        from datasets import Image as Picture

        if Path("saved_digits").exists():
            return
        features = Features({"image": Picture(), "label": ClassLabel(names=[*"0123456789"])})
        pictures, labels = zip(*_pictures(900), strict=True)
        whole = Dataset.from_dict({"image": [*pictures], "label": [*labels]}, features=features)
        parts = {"train": range(600), "validation": range(600, 700), "test": range(700, 900)}
        DatasetDict({name: whole.select(rows) for name, rows in parts.items()}).save_to_disk("saved_digits")


class Plain(nn.Module):
    """No batch statistics and no dropout: a row's logits depend on that row alone."""

    def __init__(self, width: int = 16, channels: int = 1, num_classes: int = 10):
        super().__init__()
        layers = [
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
            nn.Linear(64 * channels, width),
            nn.Tanh(),
            nn.Linear(width, num_classes),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PlainMaps(nn.Sequential):
    """Logits (B, C, H, W) of each pixel alone."""

    def __init__(self, width: int = 16, channels: int = 3, num_classes: int = 5):
        super().__init__(nn.Conv2d(channels, width, 1), nn.Tanh(), nn.Conv2d(width, num_classes, 1))


class Texts(Dataset):
    """Texts of six words: several inputs of each sample, as a mapping."""

    def __init__(self, size: int = 480, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(40, (size, 6), generator=generator)
        self.lengths = torch.randint(2, 7, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        mask = (torch.arange(6) < self.lengths[index]).long()
        ids = self.ids[index] * mask
        return {"path": f"texts/{index}", "input_ids": ids, "attention_mask": mask, "labels": int(ids.sum()) % 4}


class TwoTexts(Texts):
    """The same, and another text of the same length for each: its strong view."""

    def __getitem__(self, index: int):
        item = super().__getitem__(index)
        mask = item["attention_mask"]
        return {**item, "x_strong": {"input_ids": (item["input_ids"] + 1) % 40 * mask, "attention_mask": mask}}


class Letters(Dataset):
    """Texts of ten letters, each of which is the label of the one before it."""

    def __init__(self, size: int = 480, seed: int = 0):
        steps = torch.randint(1, 3, (size, 10), generator=torch.Generator().manual_seed(seed))
        self.ids = steps.cumsum(dim=1) % 24

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class DropWords(nn.Module):
    """A random transform of one sample, which gets all of its inputs."""

    def __init__(self, rate: float = 0.2):
        super().__init__()
        self.rate = rate

    def forward(self, inputs):
        kept = torch.rand(len(inputs["input_ids"])) >= self.rate
        return {"input_ids": inputs["input_ids"] * kept, "attention_mask": inputs["attention_mask"]}


class WordNetwork(nn.Module):
    """Called with several inputs by name. A row's logits depend on that row alone."""

    def __init__(self, width: int = 8, dropout: float = 0.0, num_classes: int = 4):
        super().__init__()
        self.words = nn.Embedding(40, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        words = self.words(input_ids).tanh() * attention_mask.unsqueeze(-1)
        return self.head(self.dropout(words.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)))


class Sounds(Dataset):
    """Frames of sound, with a row of 360 labels or without labels."""

    def __init__(self, size: int = 64, labels: bool = False):
        generator = torch.Generator().manual_seed(int(labels))
        self.frames = torch.randn(size, 1024, generator=generator)
        self.targets = torch.full((size, 360), float("nan"))
        if labels:
            self.targets = (torch.rand(size, 360, generator=generator) < 0.02).float()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int):
        return self.frames[index], self.targets[index]


class Values(Dataset):
    """Five numbers, and two sums of them, of which one in eight is missing."""

    def __init__(self, size: int = 480, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 5, generator=generator)
        self.targets = torch.stack([self.x[:, :2].sum(dim=1), 3 * self.x[:, 2:].sum(dim=1)], dim=1)
        self.targets[torch.rand(size, 2, generator=generator) < 0.125] = float("nan")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index], self.targets[index]


class ValueNetwork(nn.Sequential):
    """Two values of five numbers."""

    def __init__(self, width: int = 8, dropout: float = 0.0):
        super().__init__(nn.Linear(5, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 2))


def save_masks(folder: str, size: int, side: int = 16):
    """Write random pictures as ``ImageMaskFolder`` reads them: classes 1, 2 and 3 are red, green and blue."""
    generator = torch.Generator().manual_seed(len(folder))
    for name in ("images", "masks"):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    for number in range(size):
        mask = torch.randint(4, (side // 4, side // 4), generator=generator).to(torch.uint8)
        mask = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
        picture = torch.randint(120, (3, side, side), generator=generator)
        for channel in range(3):
            picture[channel] += 120 * (mask == channel + 1)
        mask[0] = 255
        write_png(picture.to(torch.uint8), f"{folder}/images/{number}.png")
        write_png(mask.unsqueeze(0), f"{folder}/masks/{number}.png")
