"""Label files of samples with several labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from kd_lightning.data import DatasetSource, ImageTable, SemiSupervisedDataModule, SymmetricNoise
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError

NAMES = ["bat", "cat", "dog"]
Y = torch.tensor([[n & 1, n >> 1 & 1, n >> 2 & 1] for n in range(16)])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """16 pictures with three labels each, the current folder."""
    monkeypatch.chdir(tmp_path)
    write_table(NAMES)
    for number in range(16):
        Image.fromarray(np.full((8, 8, 3), 9 * number, dtype=np.uint8)).save(f"{number:02}.png")


def write_table(names):
    columns = [NAMES.index(name) for name in names]
    lines = [f"{number:02}.png,{','.join(str(int(row[c])) for c in columns)}" for number, row in enumerate(Y)]
    Path("table.csv").write_text("\n".join([f"path,{','.join(names)}", *lines, ""]))


def make(text=None, **kwargs):
    if text is not None:
        Path("labels.csv").write_text(text)
        kwargs["label_file"] = "labels.csv"
    kwargs = {"labeled": [0.0, None][kwargs.pop("all", True)], "val_size": 0} | kwargs
    data = SemiSupervisedDataModule(ImageTable("table.csv", image_size=8), **kwargs)
    data.setup("")
    return data


def test_rows_replace_labels_and_empty_cells_are_missing():
    data = make("index,dog,bat,cat,score\n3,1,0,,0.5\n5,,,,\n4,,1,,\n")
    assert data.class_names == NAMES
    visible, expected = data.visible_labels(), Y.float()
    expected[3] = torch.tensor([0, torch.nan, 1])
    expected[4] = torch.tensor([1, torch.nan, torch.nan])
    torch.testing.assert_close(visible, expected, equal_nan=True)  # sample 5 is not labeled yet, and stays
    assert data.split.label_rows == [[3, [0, None, 1], "clean", 1.0], [4, [1, None, None], "clean", 1.0]]


def test_kind_missing_hides_all_labels():
    data = make("path,kind,bat\n03.png,missing,1\n")
    assert data.visible_labels()[3].isnan().all() and data.split.unlabeled == [3]


def test_new_labels_of_unlabeled_samples():
    first = make(labeled=0.3)
    new = first.split.unlabeled[0]
    data = make(f"index,bat,cat,dog\n{new},1,1,1\n", labeled=0.3)
    assert data.split.labeled == sorted([*first.split.labeled, new])
    assert data.visible_labels()[new].tolist() == [1, 1, 1]


def test_a_split_has_the_labels():
    """Also where the classes have other numbers by then; new classes have no label."""
    data = make("index,bat,cat,dog\n3,1,0,\n")
    data.save_split(Path("split.json"))
    again = make(labeled="split.json")
    torch.testing.assert_close(again.visible_labels(), data.visible_labels(), equal_nan=True)
    Split.load(Path("split.json"), Y)
    write_table(["dog", "cat", "bat"])
    with pytest.warns(UserWarning, match="the classes, and their numbers, have changed"):
        other = make(labeled="split.json")
    order = [other.class_names.index(name) for name in NAMES]
    torch.testing.assert_close(other.visible_labels()[3][order], torch.tensor([1, 0, torch.nan]), equal_nan=True)


def test_validation_labels():
    split = make(val_size=0.4).split
    val = split.val[0]
    row = ",".join(str(1 - int(value)) for value in Y[val])
    with pytest.raises(InputError, match=f"sample {val} is in the validation part and cannot be trained on"):
        make(f"index,bat,cat,dog\n{val},{row}\n", val_size=0.4)
    data = make(f"index,bat,cat,dog\n{val},{row}\n", val_size=0.4, correct_val=True)
    assert data.validation_labels()[val].tolist() == (1 - Y[val]).tolist()
    same = ",".join(str(int(value)) for value in Y[val])
    other = split.labeled[0]
    data = make(f"index,bat,cat,dog\n{val},{same}\n{other},1,1,1\n", val_size=0.4)  # nothing changes
    assert [row[0] for row in data.split.label_rows] == [other]


def test_names_are_numbers_where_there_are_none():
    source = DatasetSource(TensorDataset(torch.rand(16, 4), Y))
    Path("labels.csv").write_text("index,0,2\n3,1,0\n")
    data = SemiSupervisedDataModule(source, val_size=0, label_file="labels.csv")
    data.setup("")
    torch.testing.assert_close(data.visible_labels()[3], torch.tensor([1, torch.nan, 0]), equal_nan=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,bat\n3,2\n", "labels.csv, line 2: bat must be 0, 1 or empty, got '2'"),
        (
            "index,label\n3,cat\n",
            "must have a column of zeros and ones for each class, such as bat, .* got index",
        ),
        (
            "index,bat,kind\n3,1,noisy\n",
            "the row: a sample of several labels has kind clean or missing, got 'noisy",
        ),
        ("index,bat,weight\n3,1,0.5\n", "line 2: the row: a sample of several labels has weight 1, got 0.5"),
        ("bat,cat\n1,1\n", "must have the columns index or path"),
        ("index,bat\n3,1\n3,0\n", "line 3: sample 3 comes twice, with another label"),
    ],
)
def test_bad_input(text, message):
    with pytest.raises(InputError, match=message) as caught:
        make(text)
    assert "\n" not in str(caught.value)


def test_noise_is_of_one_class():
    with pytest.raises(InputError, match="label_noise, coarse and label_file need samples of one class each"):
        make("index,bat\n3,1\n", label_noise=SymmetricNoise(0.1))


@pytest.mark.parametrize("name", ["score", "image"])
def test_a_class_with_the_name_of_a_column(name):
    table = Path("table.csv")
    table.write_text(table.read_text().replace("bat", name))
    with pytest.raises(InputError, match=f"class '{name}' is a column of label files, .*; rename the class"):
        make("index,cat\n3,1\n")


def test_a_class_without_a_column():
    """Its name may be misspelt, and earlier labels of it are gone."""
    with pytest.warns(
        UserWarning, match="labels.csv has no column for the classes cat, dog; .* no label of them"
    ) as warned:
        data = make("index,bat,Dog\n3,1,0\n")
    assert any("columns that are not read: Dog" in str(one.message) for one in warned)
    torch.testing.assert_close(data.visible_labels()[3], torch.tensor([1, torch.nan, torch.nan]), equal_nan=True)


def test_rows_of_a_split_that_cannot_be():
    data = make("index,bat\n3,1\n")
    for row, message in (
        ([3, 1, "clean", 1.0], "must have 3 labels 0, 1 or null, got 1"),
        ([3, [1, 0], "clean", 1.0], "must have 3 labels"),
        ([3, [1, 0, 2], "clean", 1.0], "must have 3 labels"),
        ([3, [1, 0, 1], "coarse", 1.0], "kind clean or missing, got 'coarse'"),
    ):
        data.split.with_label_rows([row]).save(Path("split.json"))
        with pytest.raises(InputError, match=f"the label row of sample 3.*{message}"):
            make(labeled="split.json")
