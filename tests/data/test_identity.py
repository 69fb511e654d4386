"""Paths and contents of samples, and how samples of changed data are found."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from kd_lightning.data import DatasetSource, ImageFolder, RotatedClasses
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
        [torch.eye(2), torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(), torch.eye(3).to_sparse()],
        [torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj(), torch.nested.nested_tensor([torch.ones(1)] * 2)],
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


class Tiles(Dataset):
    """Three tiles of each file."""

    def __init__(self, paths, tiles=(0, 1, 2)):
        self.paths = [str(path) for path in paths for _ in tiles]
        self.tiles = [tile for _ in paths for tile in tiles]
        self.targets = [tile % 2 for tile in self.tiles]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        tile = self.tiles[index]
        return Image.open(self.paths[index]).crop((tile, 0, tile + 1, 4)), tile % 2


@pytest.fixture
def pictures(tmp_path):
    """Three pictures whose columns differ."""
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


class TestSeveralItemsOfAFile:
    """The file alone does not say which sample is which."""

    def test_a_tile_is_gone(self, pictures):
        before, now = Tiles(pictures), Tiles(pictures, (1, 2))
        found = match(identify(before), identify(now))
        assert found.places == [None, 0, 1, None, 2, 3, None, 4, 5]

    def test_are_no_copies(self, pictures):
        assert not [content for content in identify(Tiles(pictures)).contents if "#" in content]

    def test_a_subset_has_the_names_of_the_whole(self, pictures):
        whole, part = identify(Tiles(pictures)), identify(Subset(Tiles(pictures), [0, 4, 4]))
        assert part.contents == [whole.contents[0], whole.contents[4], f"{whole.contents[4]}#2"]

    def test_rotations(self, folder, monkeypatch):
        images = RotatedClasses(ImageFolder(str(folder))).load().train.images
        monkeypatch.setattr(type(images), "__getitem__", None)  # they are named without reading them
        names = identify(images)
        assert len({content.partition("#")[0] for content in names.contents}) == 24
        (folder / "cats" / "0.png").unlink()
        found = match(names, identify(RotatedClasses(ImageFolder(str(folder))).load().train.images))
        assert found.places == [None if n % 6 == 0 else n // 6 * 5 + n % 6 - 1 for n in range(24)]

    def test_random_tiles_have_the_content_of_the_file(self, pictures):
        class Random(Tiles):
            def __getitem__(self, index):
                return torch.rand(3), 0

        assert all(identify(Random(pictures)).contents)

    def test_a_file_that_is_listed_twice(self, pictures):
        """It is one picture, as it is where it is listed once."""
        names = identify(Listed([*pictures, pictures[1]]))
        assert names.contents == [*identify(Listed(pictures)).contents, f"{names.contents[1]}#2"]

    def test_joined_datasets(self, pictures):
        """Each has the names that it has alone."""
        files, tensors = Listed(pictures), TensorDataset(torch.arange(3.0).reshape(3, 1))
        joined = ConcatDataset([files, tensors, files])
        names = identify(joined)
        alone = [identify(files).contents, identify(tensors).contents]
        assert names.contents == [*alone[0], *alone[1], *(f"{content}#2" for content in alone[0])]
        assert identify(Subset(joined, [4, 6])).contents == [alone[1][1], alone[0][0]]
        assert names.paths == [*identify(files).paths, "", "", "", *identify(files).paths]

    def test_rotated_tiles(self, pictures):
        names = identify(RotatedClasses(DatasetSource(Tiles(pictures))).load().train.images)
        assert len({content.partition("#")[0] for content in names.contents}) == len(names)


def test_rarely_random_datasets_have_no_contents():
    """Of 60 items about 11 are another at the second reading."""

    class Flipped(Plain):
        def __getitem__(self, index):
            return self.items[index].flip(0) if torch.rand(()) < 0.1 else self.items[index], 0

    images = Flipped([torch.arange(2.0) + number for number in range(60)])
    for seed in range(20):
        torch.manual_seed(seed)
        assert not any(identify(images).contents), seed


def test_a_list_of_paths_that_does_not_name_the_items(folder):
    """A dataset that selects some of its files lists more paths than it has items."""

    class Selected(Listed):
        chosen = (5, 3)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Image.open(self.paths[self.chosen[index]]), 0

    names = identify(Selected(sorted(folder.rglob("*.png"))))
    assert names.paths == ["", ""]
    assert names.contents == [
        hash_item(Image.open(folder / "dogs" / name).convert("RGB")) for name in ("2.png", "0.png")
    ]


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(12).reshape(4, 3),
        torch.rand(4),
        torch.rand(4, 3, 2).permute(0, 2, 1),
        torch.rand(4, 0),
        torch.rand(4, 2) > 0.5,
        torch.rand(4, 2).bfloat16(),
    ],
)
def test_values_in_memory_are_named_as_items(values):
    assert identify(TensorDataset(values)).contents[0] == hash_item(values[0])
    assert [name.partition("#")[0] for name in identify(TensorDataset(values)).contents] == [*map(hash_item, values)]
