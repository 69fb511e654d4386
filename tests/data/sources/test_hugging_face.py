"""HuggingFaceSource: splits, columns and classes by name, labels without decoding, and what is refused."""

from pathlib import Path

import pytest
from PIL import Image as PILImage

datasets = pytest.importorskip("datasets")

from kd_lightning import HuggingFaceSource, InputError, SemiSupervisedDataModule  # noqa: E402
from kd_lightning.__main__ import main  # noqa: E402

NAMES = ["cat", "dog", "eel"]


def split(labels, first=0, feature=None, key="label", names=("image",)):
    pictures = [PILImage.new("RGB", (8, 8), (first + n, 0, 0)) for n in range(len(labels))]
    feature = datasets.ClassLabel(names=NAMES) if feature is None else feature
    features = datasets.Features({names[0]: datasets.Image(), key: feature})
    return datasets.Dataset.from_dict({names[0]: pictures, key: labels}, features=features)


def whole(**more):
    return datasets.DatasetDict({"train": split([0, 1, 2, 1, -1, 0]), "validation": split([2, 0], 100)} | more)


def content(part):
    return [part.images[n].getpixel((0, 0))[0] for n in range(len(part.images))], part.targets.tolist()


def test_splits_and_classes():
    parts = HuggingFaceSource(whole(test=split([1], 200)), image_size=8).load()
    assert content(parts.train) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 1, -100, 0])
    assert content(parts.val) == ([100, 101], [2, 0])
    assert content(parts.test) == ([200], [1])
    assert parts.class_names == NAMES
    data = SemiSupervisedDataModule(HuggingFaceSource(whole(), image_size=8), batch_size=4)
    data.setup("fit")
    assert data.split.val == [6, 7]
    assert data.split.unlabeled == [4]


def test_groups():
    """Numbers and texts are groups; a sample without one is a group of its own."""

    def of(people, first):
        return split([n % 2 for n in range(len(people))], first).add_column("person", people)

    made = datasets.DatasetDict(
        {
            "train": of([7.0, 7.0, 8.0, 8.0, 9.0, 9.0, None, None], 0),  # floats, since some are missing
            "test": of([9, 1], 100),
            "web": of([7, 8, 9, 5], 50),
        }
    )
    source = HuggingFaceSource(made, unlabeled="web", group="person", image_size=8)
    data = SemiSupervisedDataModule(source, batch_size=4, val_size=0.25, unlabeled="source")
    data.setup("fit")
    people = [7, 7, 8, 8, 9, 9, "own", "other", 7, 8, 9, 5]
    val = {people[n] for n in data.split.val}
    trained = {people[n] for n in data.split.labeled + data.unlabeled_indices()}
    assert val
    assert not trained & (val | {9})
    assert 5 in trained
    with pytest.raises(InputError, match="group: the columns of train must have 'patient', got image, label, person"):
        HuggingFaceSource(made, group="patient").load()


def test_other_names():
    made = datasets.DatasetDict(
        {
            "base": split([0, 1, 1], names=("photo",), key="species"),
            "holdout": split([2], 50, names=("photo",), key="species"),
            "web": split([0, 0], 70, names=("photo",), key="species"),
        }
    )
    options = {"train": "base", "val": "holdout", "unlabeled": "web", "input": "photo", "label": "species"}
    parts = HuggingFaceSource(made, **options).load()
    assert content(parts.val) == ([50], [2])
    assert parts.test is None
    assert [image.getpixel((0, 0))[0] for image in parts.unlabeled] == [70, 71]


def test_kinds_of_labels():
    texts = datasets.Value("string")
    parts = HuggingFaceSource(
        {"train": split(["b", "a", None], feature=texts), "test": split(["a"], feature=texts)}
    ).load()
    assert (parts.class_names, parts.train.targets.tolist(), parts.test.targets.tolist()) == (
        ["a", "b"],
        [1, 0, -100],
        [0],
    )
    several = datasets.List(datasets.ClassLabel(names=NAMES)) if hasattr(datasets, "List") else None
    parts = HuggingFaceSource({"train": split([[0, 2], [], None], feature=several)}).load()
    assert parts.train.targets[:2].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert parts.train.targets[2].isnan().all()
    rows = HuggingFaceSource({"train": split([[0], [-1]], feature=several)}).load().train.targets
    assert rows[1].isnan().all()  # not the last class
    parts = HuggingFaceSource({"train": split([0.5, -2.0], feature=datasets.Value("float32"))}).load()
    assert parts.train.targets.tolist() == [0.5, -2.0]
    assert parts.class_names is None


def test_selected_shuffled_and_formatted_datasets():
    """Labels follow their images, and formats do not matter."""
    made = split([0, 1, 2, 1, 0, 2])
    chosen = made.shuffle(seed=1).select([4, 1, 0]).with_format("torch")
    parts = HuggingFaceSource(chosen).load()
    pixels, labels = content(parts.train)
    assert labels == [[0, 1, 2, 1, 0, 2][pixel] for pixel in pixels]
    assert len({*pixels}) == 3


def test_labels_are_read_without_decoding(monkeypatch):
    made = HuggingFaceSource(whole())
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kwargs: pytest.fail("decoded"))
    made.load()


def test_pictures_that_are_not_decoded():
    made = split([0, 1, 2])
    plain = made.cast_column("image", datasets.Image(decode=False))
    assert isinstance(plain[0]["image"], dict)
    parts = HuggingFaceSource({"train": plain, "test": plain.select([2]), "pool": plain}, unlabeled="pool").load()
    assert content(parts.train) == ([0, 1, 2], [0, 1, 2])
    assert content(parts.test) == ([2], [2])
    assert [image.getpixel((0, 0))[0] for image in parts.unlabeled] == [0, 1, 2]
    grey = made.cast_column("image", datasets.Image(mode="L", decode=False))
    assert HuggingFaceSource(grey).load().train.images[0].mode == "L"
    assert isinstance(plain[0]["image"], dict)  # the user's own dataset stays


def test_content_names_a_sample(tmp_path):
    """The same pictures from another folder, in another order."""
    whole().save_to_disk(tmp_path / "one")
    moved = datasets.DatasetDict(
        {"train": whole()["train"].select([5, 4, 3, 2, 1, 0]), "validation": whole()["validation"]}
    )
    moved.save_to_disk(tmp_path / "other")
    one, other = (
        SemiSupervisedDataModule(HuggingFaceSource(str(tmp_path / name), image_size=8), labeled=1)
        for name in ("one", "other")
    )
    one.setup("fit")
    one.save_split(tmp_path / "split.json")
    other.labeled = tmp_path / "split.json"
    other.setup("fit")
    assert {one.content(n) for n in one.split.labeled} == {other.content(n) for n in other.split.labeled}


def test_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole(test=split([1, 0], 200)).save_to_disk("pets")
    Path("run.yaml").write_text(
        """
name: pets
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: SupervisedModule
  init_args: {student: {class_path: torchvision.models.resnet18, init_args: {num_classes: 3}}}
data:
  class_path: SemiSupervisedDataModule
  init_args: {source: {class_path: HuggingFaceSource, init_args: {data: pets, image_size: 8}}, batch_size: 3}
"""
    )
    main(["fit", "--config", "run.yaml"])
    main(["test", "--config", "run.yaml"])
    assert Path("runs/pets/version_0/student.safetensors").is_file()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HuggingFaceSource("gone"), "data: gone is no folder of a saved dataset"),
        (lambda: HuggingFaceSource(whole(), input="label"), "train: the column label must hold images, got ClassLabel"),
        (lambda: HuggingFaceSource(3), "data must be a DatasetDict, or the folder of a saved one, got int"),
        (lambda: HuggingFaceSource(whole(), test="extra"), "test: there is no split 'extra'; there are train, valid"),
        (
            lambda: HuggingFaceSource(whole(test=split([1])), val="test"),
            "test and val must be different splits, got 'test' for both",
        ),
        (lambda: HuggingFaceSource(whole(), val="train"), "val and train must be different splits, got 'train'"),
        (lambda: HuggingFaceSource(whole(), input="photo"), "input: the columns must have 'photo', got image, label"),
        (lambda: HuggingFaceSource(whole(), label="kind"), "label: the columns must have 'kind', got image, label"),
        (
            lambda: HuggingFaceSource({"train": split([0], names=("photo",))}),
            "input: the columns must have image or img",
        ),
        (
            lambda: HuggingFaceSource(whole(test=split([0], feature=datasets.ClassLabel(names=["x"])))),
            "test: its classes in the column label must be those of train",
        ),
        (lambda: HuggingFaceSource(whole(test=split([0], names=("photo",)))), "test: the columns must have 'image'"),
        (
            lambda: HuggingFaceSource({"train": split([0, 1]).to_iterable_dataset()}),
            "train: a dataset of length and index is needed for splits, labels and caches, got a stream",
        ),
        (
            lambda: HuggingFaceSource({"train": split([0]).with_transform(lambda rows: rows)}),
            r"train: a transform \(set_transform\) cannot be replayed; use data.train_transform",
        ),
    ],
)
def test_what_cannot_be(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        make().load()
