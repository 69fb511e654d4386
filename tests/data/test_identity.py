"""Paths and contents of samples, and how samples of changed data are found."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from kd_lightning.data import DatasetSource, ImageFolder
from kd_lightning.data.identity import Identities, hash_item, identify, match


def write(path, value, size=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value // 2, 7)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        write(tmp_path / "cats" / f"{number}.png", number)
        write(tmp_path / "dogs" / f"{number}.png", 100 + number)
    return tmp_path


def of_folder(folder):
    return identify(ImageFolder(str(folder)).load().train.images)


class Listed(Dataset):
    """A dataset with a list of paths, and without a root."""

    def __init__(self, paths):
        self.paths = [str(path) for path in paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return Image.open(self.paths[index]), 0


class Plain(Dataset):
    """A dataset without paths."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index], 0


class TestIdentify:
    def test_files(self, folder):
        names = of_folder(folder)
        assert names.paths == [f"{kind}/{number}.png" for kind in ("cats", "dogs") for number in range(3)]
        assert len({*names.contents}) == 6
        assert {*map(len, names.contents)} == {16}

    def test_a_moved_folder_has_the_same_names(self, folder, tmp_path):
        before = of_folder(folder)
        (tmp_path / "elsewhere").mkdir()
        for kind in ("cats", "dogs"):
            (folder / kind).rename(tmp_path / "elsewhere" / kind)
        assert of_folder(tmp_path / "elsewhere") == before

    def test_a_file_that_is_replaced_in_the_same_process(self, folder):
        before = of_folder(folder)
        write(folder / "cats" / "0.png", 50)
        after = of_folder(folder)
        assert [a != b for a, b in zip(before.contents, after.contents, strict=True)] == [True] + [False] * 5

    def test_equal_contents_are_numbered(self, folder):
        (folder / "dogs" / "9.png").write_bytes((folder / "cats" / "0.png").read_bytes())
        names = of_folder(folder)
        assert names.contents[-1] == f"{names.contents[0]}#2"

    def test_one_folder_does_not_pass_for_another(self, folder):
        cats, dogs = (identify(Listed([folder / kind / "0.png"])) for kind in ("cats", "dogs"))
        assert (cats.paths, dogs.paths) == (["cats/0.png"], ["dogs/0.png"])

    def test_paths_are_in_nfc(self, tmp_path):
        write(tmp_path / unicodedata.normalize("NFD", "café") / "0.png", 1)
        assert of_folder(tmp_path).paths == [unicodedata.normalize("NFC", "café/0.png")]

    @pytest.mark.parametrize("kind", ["tensors", "items", "subset"])
    def test_samples_without_files(self, kind):
        x = torch.arange(12.0).reshape(6, 2)
        x[4] = x[1]
        images = {"tensors": TensorDataset(x), "items": Plain(list(x)), "subset": Subset(TensorDataset(x), range(6))}[
            kind
        ]
        names = identify(images)
        assert names.paths == [""] * 6
        assert names.contents == identify(TensorDataset(x)).contents  # of values, not of the kind of dataset
        assert names.contents[4] == f"{names.contents[1]}#2"
        assert len({*names.contents}) == 6

    def test_a_subset_has_the_names_of_the_whole(self, folder):
        images = ImageFolder(str(folder)).load().train.images
        whole, part = identify(images), identify(Subset(images, [5, 2]))
        assert (part.paths, part.contents) == (["dogs/2.png", "cats/2.png"], [whole.contents[5], whole.contents[2]])

    def test_a_random_dataset_has_no_contents(self):
        class Random(Plain):
            def __getitem__(self, index):
                return torch.rand(3), 0

        state = torch.get_rng_state()
        assert identify(Random([1, 2, 3])) == Identities([""] * 3, [""] * 3)
        assert torch.equal(torch.get_rng_state(), state)

    def test_paths_that_are_no_files(self):
        class Numbered(Plain):
            paths = ["a", "b"]

        names = identify(Numbered([torch.zeros(2), torch.ones(2)]))
        assert len({*names.contents} - {""}) == 2


@pytest.mark.parametrize(
    "items",
    [
        [1, 2, 1.0, True, None, "1", b"1"],
        [torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bfloat16)],
        [np.zeros(2), np.zeros((1, 2)), np.zeros(2, np.float32), np.array(["a", "b"]), np.float64(3)],
        [(1, 2), (12,), [[1], 2], {"a": 1}, {"b": 1}, {"a": 2}],
        [Image.new("L", (2, 3)), Image.new("L", (3, 2)), Image.new("RGB", (2, 3)), Image.new("P", (2, 3))],
    ],
)
def test_other_items_have_other_hashes(items):
    hashes = [hash_item(item) for item in items]
    assert len({*hashes}) == len(items)
    assert hashes == [hash_item(item) for item in items]


def names(**contents):
    return Identities([*contents], [*contents.values()])


class TestMatch:
    BEFORE = Identities(["a", "b", "c"], ["1", "2", "3"])

    @pytest.mark.parametrize(
        ("paths", "contents", "places", "text"),
        [
            ("abc", "123", [0, 1, 2], ""),
            ("cab", "312", [1, 2, 0], "another order"),
            ("acz", "134", [0, None, 1], "1 gone (b), 1 new"),
            ("axc", "123", [0, 1, 2], "1 renamed (b is x)"),
            ("abc", "213", [1, 0, 2], "2 renamed (a is b)"),  # two files changed names
            ("abc", "143", [0, 1, 2], "1 with another content (b)"),
            ("abc", "113", [0, 1, 2], "1 with another content (b)"),  # a copy of another file
            ("xyz", "456", [None] * 3, "3 gone (a), 3 new"),
        ],
    )
    def test_files(self, paths, contents, places, text):
        found = match(self.BEFORE, Identities([*paths], [*contents]))
        assert found.places == places
        assert found.describe() == text

    def test_a_deleted_copy_does_not_take_the_place_of_the_other(self):
        found = match(Identities(["a", "b"], ["1", "1#2"]), Identities(["b"], ["1"]))
        assert found.places == [None, 0]
        assert found.describe() == "1 gone (a)"

    def test_samples_without_files(self):
        before, now = Identities([""] * 4, ["1", "2", "2#2", "3"]), Identities([""] * 4, ["3", "2", "4", "2#2"])
        found = match(before, now)
        assert found.places == [None, 1, 3, 0]
        assert found.added == [2]

    def test_samples_without_any_name_are_not_found(self):
        assert match(Identities([""], [""]), Identities([""], [""])).places == [None]


def test_a_file_of_the_user_that_cannot_be_read(folder):
    images = DatasetSource(Listed(sorted(folder.rglob("*.png")))).load().train.images
    if os.geteuid() == 0:
        (folder / "cats" / "0.png").unlink()
    else:
        (folder / "cats" / "0.png").chmod(0)
    with pytest.raises(Exception, match="cats.0.png"):
        identify(images)
