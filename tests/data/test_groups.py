"""Grouped splits: no group stands on two sides, sizes are near what was asked, and everything is said or refused."""

import csv
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from kd_lightning import (
    ClassSubset,
    CoarseLabels,
    DatasetSource,
    ImageFolder,
    ImageTable,
    InputError,
    RotatedClasses,
    SemiSupervisedDataModule,
)
from kd_lightning.cli.cross_fitting import stratified_folds
from kd_lightning.data.group_sampling import choose_groups
from kd_lightning.data.splits import make_split
from kd_lightning.runs.build import build


def random_case(seed, samples=200, classes=3, groups=30):
    generator = torch.Generator().manual_seed(seed)
    of_group = torch.randint(groups, (samples,), generator=generator)
    return torch.randint(classes, (samples,), generator=generator), [f"g{n}" for n in of_group.tolist()]


class TestSampling:
    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("size", [0.1, 0.3, 5])
    def test_whole_groups_and_about_the_size(self, seed, size):
        y, groups = random_case(seed)
        split = make_split(y, 0.5, size, seed, groups=groups)
        val, training = ({groups[n] for n in part} for part in (split.val, split.labeled + split.unlabeled))
        assert not val & training
        assert {*split.val} == {n for n, name in enumerate(groups) if name in val}
        wanted = [size if isinstance(size, int) else round(size * int((y == c).sum())) for c in range(3)]
        found = torch.bincount(y[split.val], minlength=3).tolist()
        assert sum(abs(a - b) for a, b in zip(wanted, found, strict=True)) <= 0.5 * sum(wanted)

    def test_seeds_and_nesting(self):
        y, groups = random_case(0)
        one, again, other = (make_split(y, 4, 0.2, seed, groups=groups) for seed in (1, 1, 2))
        assert one == again
        assert one.val != other.val
        larger = make_split(y, 9, 0.2, 1, groups=groups)
        assert larger.val == one.val
        assert {*one.labeled} <= {*larger.labeled}

    def test_groups_of_one_are_as_good_as_none(self):
        y, _ = random_case(3)
        split = make_split(y, None, 0.2, 0, groups=[str(n) for n in range(200)])
        assert torch.bincount(y[split.val]).tolist() == [round(0.2 * int((y == c).sum())) for c in range(3)]

    def test_a_class_keeps_a_sample_for_training(self):
        """Its only group is never chosen."""
        y = torch.tensor([0] * 6 + [1] * 3)
        groups = ["a", "a", "b", "b", "c", "c", "d", "d", "d"]
        for seed in range(10):
            split = make_split(y, None, 0.34, seed, groups=groups)
            assert {groups[n] for n in split.val} < {"a", "b", "c"}
        with pytest.raises(InputError, match="val_size: 0.5: no group can be for validation"):
            make_split(torch.tensor([0, 0, 1, 1]), None, 0.5, 0, groups=["a", "a", "b", "b"])

    def test_labels_without_strata(self):
        rows = torch.eye(4).repeat(5, 1)
        groups = [str(n // 4) for n in range(20)]
        split = make_split(rows, None, 0.4, 0, groups=groups)
        assert len(split.val) == 8
        assert len({groups[n] for n in split.val}) == 2

    def test_against_a_search(self):
        """With few groups, the choice is near the best of all."""
        from itertools import combinations

        for seed in range(10):
            y, groups = random_case(seed, samples=40, classes=2, groups=8)
            wanted = torch.tensor([4, 4])
            names = sorted({*groups})

            def gap(chosen, y=y, groups=groups, wanted=wanted):
                have = torch.bincount(y[[groups[n] in chosen for n in range(40)]], minlength=2)
                return int((have - wanted).abs().sum())

            best = min(gap({*some}) for size in range(1, 8) for some in combinations(names, size))
            found = gap(choose_groups(groups, y, wanted, seed))
            assert found <= best + 4


def patient(path):
    """The group of a path: what is before the dash."""
    return Path(path).name.split("-")[0]


def numbered(path):
    return 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """8 patients with 3 pictures of each class; the first two are in the test, too."""
    monkeypatch.chdir(tmp_path)
    for part, patients in (("train", range(8)), ("test", (0, 1, 20)), ("pool", (1, 5, 30))):
        for p in patients:
            for name in ("cat", "dog"):
                for n in range(3):
                    path = tmp_path / part / name / f"p{p}-{n}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), (10 * p, 80 * (name == "cat") + n, len(part))).save(path)
    return tmp_path


def module(made=None, **arguments):
    made = made or ImageFolder("train", "test", unlabeled="pool", image_size=8)
    defaults = {"group": patient, "val_size": 0.25, "batch_size": 8}
    data = SemiSupervisedDataModule(made, **(defaults | arguments))
    data.setup("fit")
    return data


def sides(data):
    trained = {*data.split.labeled, *data.unlabeled_indices()}
    return [{patient(data.path(n)) for n in part} for part in (trained, data.split.val)]


class TestModule:
    @pytest.mark.parametrize("arguments", [{}, {"labeled": 3}, {"unlabeled": "source"}, {"duplicates": "together"}])
    def test_no_group_stands_on_two_sides(self, folder, arguments, caplog):
        caplog.set_level("INFO")
        data = module(**arguments)
        trained, val = sides(data)
        assert val
        assert not trained & val
        assert not (trained | val) & {"p0", "p1", "p20"}
        if arguments.get("labeled"):
            assert len(data.split.labeled) == 6  # those left out are not among the ones that were asked for
        if arguments.get("unlabeled") == "source":
            assert "p30" in trained
        used = {index for batch in data.train_dataloader() for index in batch.index.tolist()}
        assert {patient(data.path(n)) for n in used} == trained
        assert "groups in training" in caplog.text

    def test_own_validation_part(self, folder):
        with pytest.warns(UserWarning, match=r"group: 12 samples are left out, .* \(train/cat/p0-0.png: group p0\)"):
            data = module(ImageFolder("train", val="test", image_size=8), val_size=None)
        assert sides(data) == [{f"p{n}" for n in range(2, 8)}, {"p0", "p1", "p20"}]

    def test_transductive_pool_is_the_test_part(self, folder):
        data = module(unlabeled="test")
        pool = {patient(data.path(n)) for n in data.unlabeled_indices()}
        assert pool == {"p0", "p1", "p20"}

    def test_saved_split_of_another_grouping(self, folder):
        module(group=None, labeled=None).save_split(Path("split.json"))
        with pytest.warns(UserWarning, match="samples are left out, since others of their group are in validation or"):
            data = module(labeled="split.json")
        trained, val = sides(data)
        assert not trained & val
        data.save_split(Path("again.json"))
        again = module(labeled="again.json")
        assert again.split.hash == data.split.hash

    def test_label_file_of_a_validation_group(self, folder):
        data = module(unlabeled="source")
        group = patient(data.path(data.split.val[0]))
        index = next(n for n in range(len(data.samples)) if patient(data.path(n)) == "p5" and "pool" in data.path(n))
        with Path("labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), (data.path(index), "cat")])
        data = module(unlabeled="source", label_file="labels.csv")
        trained, val = sides(data)
        assert not trained & val
        assert group in val

    @pytest.mark.parametrize("unlabeled", ["rest", "none", "source"])
    def test_coarse_labels_of_a_validation_group(self, folder, unlabeled):
        """Samples of the pool with a coarse label train, whatever the pool is."""
        paths = [path.as_posix() for path in sorted((folder / "pool").rglob("*.png"))]
        with Path("labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "kind"), *((path, "pet", "coarse") for path in paths)])
        coarse = CoarseLabels({"pet": ["cat", "dog"]}, fraction=0.0)
        leaks = []
        for seed in range(8):  # p5 is in validation for some of them
            data = module(labeled=1, label_file="labels.csv", coarse=coarse, unlabeled=unlabeled, seed=seed)
            used = {index for batch in data.train_dataloader() for index in batch.index.tolist()}
            trained, val = ({patient(data.path(n)) for n in part} for part in (used, data.split.val))
            assert "p30" in trained
            leaks.append("p5" in val)
            assert not trained & (val | {"p0", "p1", "p20"})
        assert any(leaks)

    def test_copies_stay_on_one_side_with_their_groups(self, folder):
        """One copy does not cost the other pictures of its group."""
        for name in ("cat", "dog"):
            shutil.copy(f"train/{name}/p2-0.png", f"train/{name}/p3-0.png")
        for seed in range(8):
            plain, data = (module(duplicates=policy, seed=seed) for policy in ("count", "together"))
            apart = len({"p2", "p3"} & {patient(plain.path(n)) for n in plain.split.val}) == 1
            assert data.split.val == plain.split.val
            assert len(plain.split.labeled) - len(data.split.labeled) == 2 * apart
            data.save_split(Path("split.json"))
            assert module(labeled="split.json", duplicates="together").split.hash == data.split.hash

    @pytest.mark.parametrize("wrap", [lambda source: ClassSubset(source, [1, 0]), RotatedClasses])
    def test_of_the_source_inside_a_source(self, folder, wrap):
        places = {"train": "train", "test": "test", "pool": "unlabeled"}
        rows = [
            (path.as_posix(), path.parent.name, patient(path), split, 2 + int(path.stem[-1]))
            for part, split in places.items()
            for path in sorted(Path(part).rglob("*.png"))
        ]
        with Path("labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "patient", "split", "weight"), *rows])
        source = wrap(ImageTable("labels.csv", ".", group="patient", image_size=8))
        pool = "rest" if isinstance(source, RotatedClasses) else "source"
        data = module(source, group=None, unlabeled=pool)
        trained, val = sides(data)
        assert val
        assert not trained & val
        assert not (trained | val) & {"p0", "p1", "p20"}
        for batch in data.train_dataloader():
            weights = dict(zip(batch.index.tolist(), batch.weight.tolist(), strict=True))
            labeled = weights.keys() & {*data.split.labeled}
            assert {n: weights[n] for n in labeled} == {n: 2 + int(Path(data.path(n)).stem[-1]) for n in labeled}

    def test_folds(self, folder):
        data = module()
        groups = data.sample_groups()
        labels = {n: "cat" if "cat" in data.path(n) else "dog" for n in data.split.labeled}
        folds = stratified_folds(labels, 3, 0, "--folds", groups)
        assert sorted(n for fold in folds for n in fold) == sorted(labels)
        of_folds = [{groups[n] for n in fold} for fold in folds]
        assert sum(map(len, of_folds)) == len(set.union(*of_folds))
        assert stratified_folds(labels, 3, 0, "--folds", groups) == folds
        with pytest.raises(InputError, match="--folds must be at most .*, the number of groups"):
            stratified_folds(labels, 30, 0, "--folds", groups)

    def test_table(self, folder):
        rows = [(p.as_posix(), p.parent.name, patient(p)) for p in sorted((folder / "train").rglob("*.png"))]
        with Path("labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "patient"), *rows])
        data = module(ImageTable("labels.csv", "train", group="patient", image_size=8), group=None)
        trained, val = sides(data)
        assert not trained & val
        assert len(trained | val) == 8
        with pytest.raises(InputError, match="group: the source has groups of its own"):
            module(ImageTable("labels.csv", "train", group="patient", image_size=8))

    def test_what_cannot_be(self, folder):
        with pytest.raises(InputError, match="group must return a text, got 3 for"):
            module(group=numbered)
        with pytest.raises(InputError, match="group: IndexError for"):
            module(group=lambda path: path.split("#")[1])
        source = DatasetSource(TensorDataset(torch.rand(9, 2), torch.arange(9) % 3))
        with pytest.raises(InputError, match="group: samples have no paths"):
            module(source)
        with pytest.raises(InputError, match="val_size: 0.25: no group can be for validation"):
            module(group=lambda path: "one", made=ImageFolder("train", image_size=8))
        with pytest.raises(InputError, match="val_size: 30 per class, but class 'cat' has 18 samples"):
            module(val_size=30)
        for size in (0, 0.25):
            with pytest.raises(InputError, match="group: no training sample is left, since all groups are in"):
                module(group=lambda path: "one", val_size=size)

    def test_a_function_that_depends_on_more_than_the_path(self, folder):
        calls = itertools.count()
        with pytest.raises(InputError, match=r"group must return the same text each time, got '0' and '66' for train"):
            module(group=lambda path: str(next(calls)))

    def test_an_error_of_the_function_is_one_line(self, folder):
        def several_lines(path):
            raise ValueError("no\npatient")

        with pytest.raises(InputError, match=r"^group: ValueError for train/cat/p0-0.png: no patient$"):
            module(group=several_lines)

    def test_from_yaml(self, folder, monkeypatch):
        Path("my_groups.py").write_text(
            "def patient(path: str) -> str:\n    return path.split('/')[-1].split('-')[0]\n"
        )
        monkeypatch.syspath_prepend(str(folder))
        arguments = {"source": {"class_path": "ImageFolder", "init_args": {"train": "train", "image_size": 8}}}
        arguments |= {"group": "my_groups.patient", "val_size": 0.25}
        data = build(
            SemiSupervisedDataModule, {"class_path": "kd_lightning.SemiSupervisedDataModule", "init_args": arguments}
        )
        data.setup("fit")
        trained, val = sides(data)
        assert val
        assert not trained & val
