"""Which samples decide: the validation part, or folds in which each labeled sample validates once."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.io import write_png

from kd_lightning import Digits, ImageFolder, SemiSupervisedDataModule
from kd_lightning.cli.tuning.joined_source import JoinedSource
from kd_lightning.cli.tuning.judge import LEAST_SAMPLES, _validated, find_judge, of_fold
from kd_lightning.data.sources.source import Part, Parts, Source
from kd_lightning.errors import InputError
from kd_lightning.runs.class_paths import find_class


def data_of(**arguments):
    return SemiSupervisedDataModule(arguments.pop("source", None) or Digits(), **arguments)


def folds_of(judge, **arguments):
    """The datamodule of each fold."""
    found = []
    for split in judge.splits:
        data = data_of(**(arguments | {"labeled": split}))
        data.setup("")
        found.append(data)
    return found


def test_enough_validation_samples(tmp_path):
    judge = find_judge(data_of(labeled=10), tmp_path)
    assert judge.splits == [] and judge.samples == 119 >= LEAST_SAMPLES and judge.sizes == [119]
    assert judge.text == "the 119 validation samples decide" and judge.has_validation
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("limit", "samples"), [(None, 119), (1.0, 119), (2, 119), (1, 64), (0.5, 64), (0, 0)])
def test_batches_that_validation_leaves_out_do_not_decide(limit, samples):
    assert _validated(119, 64, limit) == samples


@pytest.mark.parametrize(("val_size", "samples", "text"), [(1, 60, "10 validation"), (0, 50, "0 validation")])
def test_folds(tmp_path, val_size, samples, text):
    data = data_of(labeled=5, val_size=val_size)
    judge = find_judge(data, tmp_path)
    whole = data.split
    assert judge.samples == samples == sum(judge.sizes) and len(judge.splits) == 5
    assert judge.has_validation == bool(val_size)
    assert judge.text.startswith(f"{text} samples are fewer than 100, so 5 folds of all {samples} labeled")
    validated = Counter()
    for fold, size in zip(folds_of(judge, val_size=val_size), judge.sizes, strict=True):
        split = fold.split
        assert len(split.val) == size
        assert {*split.labeled} == {*whole.labeled, *whole.val} - {*split.val}
        assert split.unlabeled == whole.unlabeled and not split.held_out
        visible = fold.visible_labels()
        assert (visible[split.val] == -100).all()
        assert torch.equal(fold.validation_labels()[split.val], fold.samples.parts.train.targets[split.val])
        assert {*fold.validation_labels()[split.val].tolist()} == {*range(10)}
        assert not {*fold.unlabeled_indices()} & {*split.val}
        validated.update(split.val)
    assert validated == Counter([*whole.labeled, *whole.val])


def test_small_classes_have_fewer_folds_and_the_smallest_is_refused(tmp_path):
    judge = find_judge(data_of(labeled=3, val_size=0), tmp_path)
    assert len(judge.splits) == 3 and judge.samples == 30
    with pytest.raises(
        InputError, match=r"--tune: 0 validation samples are too few .* need 2 of each class, got 1 of 0"
    ):
        find_judge(data_of(labeled=1, val_size=0), tmp_path)
    with pytest.raises(InputError, match=r"no training sample has a label"):
        find_judge(data_of(labeled=0, val_size=0, unlabeled="rest"), tmp_path)


class Tensors(Source):
    """Pictures in memory with any targets."""

    def __init__(self, targets):
        x = torch.randn(len(targets), 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.part = Part(TensorDataset(x), targets)

    def load(self):
        return Parts(self.part, self.part)


def test_regression_and_several_labels(tmp_path):
    y = torch.arange(40) % 2
    for targets in (y.float(), torch.stack([y, 1 - y], 1).float()):
        source = Tensors(targets)
        judge = find_judge(data_of(source=source, val_size=0.1), tmp_path)
        assert len(judge.splits) == 5 and judge.samples == 40
        assert all(len(fold.split.val) == 8 for fold in folds_of(judge, source=source))


def test_rows_of_a_label_file(tmp_path, monkeypatch):
    """They are in the splits, also where they correct labels, and where only they know one."""
    monkeypatch.chdir(tmp_path)
    digits = Digits().load().train.targets
    plain = data_of(labeled=4, val_size=1)
    plain.setup("")
    new, corrected = plain.split.unlabeled[0], plain.split.labeled[0]
    rows = {new: (int(digits[new]) + 1) % 10, corrected: (int(digits[corrected]) + 1) % 10}
    text = "index,label,kind\n" + "".join(f"{index},{label},noisy\n" for index, label in rows.items())
    Path("labels.csv").write_text(text)
    data = data_of(labeled=4, val_size=1, label_file="labels.csv")
    judge = find_judge(data, tmp_path / "tuning")
    assert judge.samples == 51
    seen = {}
    for split in judge.splits:
        config = of_fold(
            {
                "data": {"class_path": "D", "init_args": {"labeled": 4, "label_file": "labels.csv"}},
                "trainer": {"limit_val_batches": 2},
            },
            split,
        )
        arguments = config["data"]["init_args"]
        assert config["trainer"]["limit_val_batches"] is None
        assert arguments == {"labeled": str(split), "label_file": None}
        fold = data_of(**arguments, val_size=1)
        fold.setup("")
        for index, label in rows.items():
            if index in fold.split.val:
                seen[index] = int(fold.validation_labels()[index])
                assert fold.visible_labels()[index] == -100
            else:
                assert fold.visible_labels()[index] == label
    assert seen == rows


def photos(folder, test=("g9",)):
    generator = torch.Generator().manual_seed(0)
    for part, groups in (("train", [f"g{n}" for n in range(6)]), ("test", test)):
        for group in groups:
            for label in ("cat", "dog"):
                for number in range(2):
                    file = folder / part / label / f"{group}_{label}{number}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_png(torch.randint(256, (3, 12, 12), dtype=torch.uint8, generator=generator), str(file))
    return folder


def group_of_file(path):
    return Path(path).name.split("_")[0]


def test_groups_stay_whole(tmp_path):
    folder = photos(tmp_path / "photos")
    source = ImageFolder(str(folder / "train"), str(folder / "test"), image_size=8)
    arguments = {"source": source, "val_size": 0.2, "group": group_of_file}
    data = data_of(**arguments)
    judge = find_judge(data, tmp_path)
    assert judge.splits and judge.samples == 24
    groups = data.sample_groups()
    validated = Counter()
    for fold in folds_of(judge, **arguments):
        parts = [{groups[index] for index in part} for part in (fold.split.labeled, fold.split.val)]
        assert not parts[0] & parts[1] and all(parts)
        validated.update(fold.split.val)
    assert validated == Counter(range(24))


def test_an_own_validation_part_that_is_small_is_among_the_folds(tmp_path):
    folder = photos(tmp_path / "photos")
    source = ImageFolder(str(folder / "train"), val=str(folder / "test"), image_size=8)
    data = data_of(source=source, labeled=4)
    judge = find_judge(data, tmp_path)
    assert judge.joins_val and judge.samples == 8 + 4 and len(judge.splits) == 5
    config = {"data": {"class_path": "D", "init_args": {"source": {"class_path": "S"}}}, "trainer": {}}
    joined = of_fold(config, judge.splits[0], joins_val=True)["data"]["init_args"]["source"]
    kind = find_class(joined["class_path"])
    assert joined["init_args"] == {"source": {"class_path": "S"}} and kind is JoinedSource
    validated = Counter()
    for fold in folds_of(judge, source=kind(source)):
        assert fold.eval_transform is source.eval_transform and fold.train_transform is source.train_transform
        assert {*fold.split.labeled} == {*data.split.labeled, *data.split.val} - {*fold.split.val}
        assert fold.split.unlabeled == data.split.unlabeled
        validated.update(fold.split.val)
    assert validated == Counter([*data.split.labeled, *data.split.val])
    assert sorted(data.split.val) == [24, 25, 26, 27]
