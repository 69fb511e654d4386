"""Views with dense labels: image and mask move together, and what training may not see is in no batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from kd_lightning import DatasetSource, InputError, SemiSupervisedDataModule
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.sources.dense_labels import LabelRules
from kd_lightning.data.transforms import (
    BatchTransform,
    ColorJitter,
    Compose,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    Resize,
)
from kd_lightning.data.views.dense_dataset import DenseViewDataset

COUNT, CLASSES, HEIGHT, WIDTH, NEW = 22, 5, 12, 16, 99
MASKS = torch.randint(0, CLASSES, (COUNT, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0))
IMAGES = torch.stack([MASKS * 7, MASKS * 11, torch.arange(COUNT).view(-1, 1, 1).expand_as(MASKS)], 1).to(torch.uint8)
"""The first two channels show the mask, the third the number of the sample."""


class Pictures(Dataset):
    """Pictures of different sizes (``ragged``) with masks, as pairs, mappings or arrays; some without a mask."""

    def __init__(self, kind="pair", ragged=False, missing=(), numbers=range(COUNT)):
        self.kind, self.ragged, self.missing, self.numbers = kind, ragged, missing, [*numbers]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        number = self.numbers[index]
        cut = number % 4 if self.ragged else 0
        image, mask = (
            IMAGES[number, :, : HEIGHT - cut, : WIDTH - 2 * cut],
            MASKS[number, : HEIGHT - cut, : WIDTH - 2 * cut],
        )
        mask = None if number in self.missing else mask.to(torch.uint8)
        if self.kind in ("pictures", "arrays"):
            image = image.permute(1, 2, 0).contiguous().numpy()
            mask = None if mask is None else mask.numpy()
        if self.kind == "pictures":
            palette = Image.fromarray(mask).convert("P") if mask is not None else None
            if palette is not None:
                palette.putdata(mask.ravel().tolist())
            return Image.fromarray(image), palette
        return {"image": image, "mask": mask} if self.kind == "mapping" else (image, mask)


def make(dataset=None, test=None, **kwargs):
    source = DatasetSource(dataset or Pictures(), test, dense=True, class_names=[*"abcde"])
    return SemiSupervisedDataModule(source, **({"labeled": 8, "val_size": 3, "batch_size": 4} | kwargs))


def crops():
    """Whole-batch geometry: pictures of any size to one, then new pixels, mirror images and colours."""
    return Compose(
        [Resize([20, 24]), RandomCrop(18, padding=4, fill=NEW), RandomHorizontalFlip(), RandomVerticalFlip()]
    )


def check(batch, labeled):
    """The mask of each labeled row is what its image shows; other rows have no label."""
    shown = batch.x[:, 0].float().div(7)
    new = batch.x[:, 2] == NEW
    for row, number in enumerate(batch.index.tolist()):
        inside = batch.y[row] != -100
        if number not in labeled:
            assert not inside.any()
            continue
        assert inside.any()
        assert torch.equal(inside, ~new[row])
        assert torch.equal(shown[row][inside].long(), batch.y[row][inside])
        assert (batch.x[row, 2][inside] == number).all()


NEAREST = v2.InterpolationMode.NEAREST
GEOMETRIES = {
    "none": v2.Identity(),  # without a transform, pictures become floats
    "whole": Compose([RandomCrop((8, 10), padding=3, fill=NEW), RandomHorizontalFlip(), RandomVerticalFlip()]),
    "whole affine": RandomAffine(40, (0.2, 0.2), (0.8, 1.2), 10, NEAREST, fill=NEW),
    "one": v2.Compose(
        [v2.RandomCrop((8, 10), padding=3, fill=NEW), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    ),
    "one affine": v2.RandomAffine(40, (0.2, 0.2), (0.8, 1.2), 10, NEAREST, fill=NEW),
    "one perspective": v2.RandomPerspective(0.4, 1.0, NEAREST, fill=NEW),
    "one rotation": v2.RandomRotation(50, NEAREST, expand=False, fill={tv_tensors.Image: NEW, tv_tensors.Mask: 3}),
    "one pad": v2.Pad(3, fill=NEW),
    "one zoom": v2.Compose([v2.RandomZoomOut(fill=NEW, side_range=(1.0, 1.4), p=1.0), v2.RandomCrop((12, 16))]),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("kind", ["pair", "mapping", "arrays", "pictures", "memory"])
def test_image_and_mask_move_together(name, kind):
    """New pixels have no label, whatever a transform fills in, and whatever the mask holds there."""
    dataset = TensorDataset(IMAGES, MASKS) if kind == "memory" else Pictures(kind)
    transform = GEOMETRIES[name]
    if kind in ("arrays", "pictures") and not isinstance(transform, BatchTransform):
        transform = v2.Compose([transform, v2.ToImage()])
    unchanged = v2.ToImage() if kind != "memory" else v2.Identity()
    data = make(dataset, train_transform=transform, eval_transform=unchanged)
    seen = set()
    for batch in data.train_dataloader():
        check(batch, data.split.labeled)
        assert batch.y.dtype == torch.int64
        seen.update(batch.index.tolist())
    assert len(seen) == COUNT - 3
    for batch in data.val_dataloader():
        assert torch.equal(batch.y, MASKS[batch.index])
        assert torch.equal(batch.x[:, 0], IMAGES[batch.index, 0])
    for batch in data.pool_dataloader():
        check(batch, data.split.labeled)


@pytest.mark.parametrize("kind", ["pair", "pictures"])
def test_pictures_of_different_sizes(kind):
    resize = Resize([20, 24])
    data = make(Pictures(kind, ragged=True), train_transform=crops(), eval_transform=resize)
    for batch in data.train_dataloader():
        assert batch.x.shape[1:] == (3, 18, 18)
        assert torch.equal(batch.x[:, 2] == NEW, batch.y == -100) or set(batch.index.tolist()) - {*data.split.labeled}
        for row, number in enumerate(batch.index.tolist()):
            if number in data.split.labeled:  # a resize mixes values at borders of a mask
                same = (batch.x[row, 0].float() / 7 - batch.y[row]).abs() < 0.01
                assert same[batch.y[row] != -100].float().mean() > 0.05
    for batch in data.val_dataloader():
        expected = [
            v2.functional.resize(Pictures(ragged=True)[n][1][None], [20, 24], v2.InterpolationMode.NEAREST_EXACT)
            for n in batch.index.tolist()
        ]
        assert torch.equal(batch.y, torch.cat(expected).long())


@pytest.mark.parametrize("name", ["whole", "one", "one affine"])
def test_the_image_is_that_of_a_source_without_masks(name):
    """The draws do not depend on the masks, nor on which labels may be seen."""
    transform, plain = (
        GEOMETRIES[name],
        SemiSupervisedDataModule(
            DatasetSource(TensorDataset(IMAGES, torch.zeros(COUNT, dtype=torch.long))),
            val_size=0,
            batch_size=COUNT,
            train_transform=GEOMETRIES[name],
        ),
    )
    expected = {int(n): x for b in plain.train_dataloader() for n, x in zip(b.index, b.x, strict=True)}
    for labeled in (2, 20):
        data = make(TensorDataset(IMAGES, MASKS), train_transform=transform, labeled=labeled, val_size=0)
        for batch in data.train_dataloader():
            assert all(torch.equal(expected[int(n)], x) for n, x in zip(batch.index, batch.x, strict=True))


@pytest.mark.parametrize("strong", ["none", "whole", "one"])
@pytest.mark.parametrize("name", ["whole", "one affine", "none"])
def test_replay(name, strong):
    """The same views in any batch, in workers, after a skip, and in the same state of the generators."""
    by = {"none": None, "whole": Compose([ColorJitter(0.5)]), "one": v2.ColorJitter(0.5)}[strong]

    def views(skip=0, **kwargs):
        data = make(train_transform=GEOMETRIES[name], strong_transform=by, **kwargs)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        loader.load_state_dict({"epoch": 2, "batches": skip})
        found = {}
        for batch in loader:
            strong = batch.x if by is None else batch.x_strong
            found |= {int(n): row for n, *row in zip(batch.index, batch.view, batch.x, batch.y, strong, strict=True)}
        return found

    torch.manual_seed(3)
    first, state = views(), torch.get_rng_state()
    torch.manual_seed(3)
    views(batch_size=7)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (views(batch_size=7), views(num_workers=2), views(skip=2)):
        assert other
        for number, row in other.items():
            assert all(map(torch.equal, row, first[number]))
    if by is not None:
        assert any(not torch.equal(x, strong) for _, x, _, strong in first.values())


class TestStrongViews:
    def test_are_made_from_the_weak_view(self):
        weak = Compose([RandomCrop((8, 10), padding=3, fill=NEW), RandomHorizontalFlip()])
        for strong in (v2.RandomInvert(1.0), Compose([_Invert()])):
            for transform in (weak, GEOMETRIES["one"]):
                for batch in make(train_transform=transform, strong_transform=strong).train_dataloader():
                    assert torch.equal(batch.x_strong, 255 - batch.x)

    @pytest.mark.parametrize(
        "strong",
        [
            RandomHorizontalFlip(1.0),
            Compose([ColorJitter(0.1), RandomAffine(0, (0.2, 0.2))]),
            Resize([6, 8]),
            v2.RandomHorizontalFlip(1.0),
            v2.RandomAffine(20),
            v2.Resize((6, 8)),
            v2.RandomCrop((12, 16), padding=2),
        ],
    )
    @pytest.mark.parametrize("labeled", [8, 0])
    def test_must_not_move_the_mask(self, strong, labeled):
        """Also where no row has a label, so that a moved mask is equal to the mask."""
        for weak in (RandomHorizontalFlip(), v2.RandomHorizontalFlip(), None):
            data = make(train_transform=weak, strong_transform=strong, labeled=labeled)
            with pytest.raises(InputError, match=r"^strong_transform must leave dense labels where they are") as caught:
                [*data.train_dataloader()]
            assert "\n" not in str(caught.value)

    def test_of_another_shape_or_without_a_mask(self):
        with pytest.raises(InputError, match="strong_transform must return the shape"):
            [*make(strong_transform=v2.Grayscale()).train_dataloader()]
        with pytest.raises(InputError, match="with a tensor mask, got"):
            [*make(strong_transform=lambda entries: entries["image"]).train_dataloader()]
        with pytest.raises(InputError, match="strong_transform must leave"):
            [*make(strong_transform=lambda e: {"image": e["image"], "mask": e["mask"] * 0}).train_dataloader()]
        kept = make(strong_transform=lambda e: {"image": 255 - e["image"], "mask": e["mask"]})
        assert all(torch.equal(batch.x_strong, 255 - batch.x) for batch in kept.train_dataloader())

    def test_whole_batches_take_images(self):
        data = make(
            train_transform=lambda e: {"a": e["image"], "b": e["image"], "mask": e["mask"]},
            strong_transform=ColorJitter(0.1),
        )
        with pytest.raises(InputError, match=r"strong_transform: whole-batch transforms take images"):
            [*data.train_dataloader()]


class _Invert(BatchTransform):
    moves_pixels = False

    def transform(self, images, draws):
        return 255 - images


class TestHiddenLabels:
    def test_no_transform_gets_them(self):
        got = []

        class Spy(nn.Module):
            def forward(self, entries):
                got.append((int(entries["image"][2, 0, 0]), entries["mask"].as_subclass(torch.Tensor).clone()))
                return entries

        data = make(train_transform=Spy(), strong_transform=Spy())
        [*data.train_dataloader()], [*data.pool_dataloader()]
        labeled = {*data.split.labeled}
        assert {number in labeled for number, _ in got} == {True, False}
        for number, mask in got:
            assert torch.equal(mask.long(), MASKS[number]) if number in labeled else (mask == -100).all()

    def test_the_main_process_hides_them_once_more(self):
        """If a dataset has labels that the table has not."""
        table = LabelTable(torch.tensor([0, -100, 0]), dense=True)
        views = DenseViewDataset(
            [Pictures()], torch.arange(3), None, 0, visible=torch.ones(3).bool(), rules=LabelRules()
        )
        batch = table.fill(views.__getitems__([0, 1, 2]))
        assert (batch.y[1] == -100).all()
        assert torch.equal(batch.y[::2], MASKS[:3:2])
        assert batch.labeled.tolist() == [0, 2]
        floats = table.fill(
            views.__getitems__([0, 1, 2]).map(lambda t: t.float() if t.dtype == torch.int64 and t.ndim > 1 else t)
        )
        assert floats.y[1].isnan().all()

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("unlabeled", ["rest", "none", "source", "test"])
    def test_in_no_training_batch(self, unlabeled, workers):
        source = DatasetSource(
            Pictures(missing=(1, 2)), Pictures(numbers=range(6)), Pictures(numbers=range(5)), dense=True
        )
        data = SemiSupervisedDataModule(
            source,
            labeled=6,
            val_size=4,
            batch_size=5,
            unlabeled=unlabeled,
            num_workers=workers,
            labeled_batch_size=None if unlabeled == "none" else 2,
        )
        labeled, seen = None, set()
        for batch in data.train_dataloader():
            labeled = {*data.split.labeled}
            seen.update(batch.index.tolist())
            for row, number in enumerate(batch.index.tolist()):
                known = torch.equal(batch.y[row], MASKS[number]) if number in labeled else (batch.y[row] == -100).all()
                assert known
        extra = {"rest": COUNT - 10, "none": 0, "source": 5, "test": 6}[unlabeled]
        assert len(labeled) == 6
        assert not labeled & {1, 2}
        assert len(seen) == 6 + extra
        for batch in data.test_dataloader():
            assert torch.equal(batch.y, MASKS[batch.index])

    def test_a_broken_mask_that_is_not_seen(self):
        class Broken(Pictures):
            def __getitem__(self, index):
                image, mask = super().__getitem__(index)
                return (image, mask) if index < 4 else (image,)

        source = DatasetSource(Pictures(numbers=range(4)), unlabeled=Broken(), dense=True)
        data = SemiSupervisedDataModule(source, unlabeled="source", val_size=0, batch_size=4)
        assert sum(len(batch) for batch in data.train_dataloader()) == 4 + COUNT


@pytest.mark.parametrize("labels", ["values", "several values", "several classes"])
@pytest.mark.parametrize("name", ["whole", "whole affine", "one", "one affine", "none"])
def test_other_labels_than_masks_of_classes(name, labels):
    """Depths (H, W), (D, H, W), and zeros and ones (L, H, W) move as masks do."""
    y = MASKS.float() / 3 if labels == "values" else torch.stack([MASKS.float(), -MASKS.float()], 1)
    y[0, ..., 0, 0] = float("nan")
    y = (torch.stack([MASKS, 4 - MASKS], 1) > 2).long() if labels == "several classes" else y
    source = DatasetSource(TensorDataset(IMAGES, y), dense=True)
    data = SemiSupervisedDataModule(source, labeled=12, val_size=3, batch_size=5, train_transform=GEOMETRIES[name])
    for batch in data.train_dataloader():
        assert batch.y.shape[1:-2] == y.shape[1:-2]
        assert batch.y.dtype == y.dtype
        shown = batch.x[:, 0].float() / 7
        for row, number in enumerate(batch.index.tolist()):
            missing = batch.y[row].isnan() if y.is_floating_point() else batch.y[row] == -100
            if number not in data.split.labeled:
                assert missing.all()
                continue
            inside = (batch.x[row, 2] != NEW).expand_as(missing)
            found, expected = batch.y[row], shown[row].expand_as(missing)
            if labels == "values":
                expected = expected / 3
            elif labels == "several values":
                expected = torch.stack([shown[row], -shown[row]])
            else:
                expected = (torch.stack([shown[row], 4 - shown[row]]) > 2).long()
            assert torch.equal(missing | ~inside, missing if number == 0 else ~inside)
            known = ~missing
            assert torch.allclose(found[known].float(), expected[known].float(), atol=1e-5)


def test_an_input_of_the_same_size_moves_as_well():
    """Depth beside an image: torchvision would leave the second tensor where it is."""

    class Two(Pictures):
        def __getitem__(self, index):
            image, mask = super().__getitem__(index)
            return {"image": image, "depth": mask.float(), "scale": torch.ones(2), "labels": mask}

    data = make(Two(), train_transform=GEOMETRIES["one"])
    for batch in data.train_dataloader():
        assert sorted(batch.x) == ["depth", "image", "scale"]
        inside = batch.x["image"][:, 2] != NEW
        assert torch.equal(batch.x["depth"][inside], batch.x["image"][:, 0][inside] / 7.0)
        for row, number in enumerate(batch.index.tolist()):
            if number in data.split.labeled:
                assert torch.equal(batch.y[row][inside[row]].float(), batch.x["depth"][row][inside[row]])


def test_teacher_inputs_of_a_transform():
    """A transform may add inputs of the teacher, which move with the image."""

    class Larger(nn.Module):
        def forward(self, entries):
            entries = v2.RandomHorizontalFlip()(entries)
            entries["teacher_inputs"] = entries["image"].repeat_interleave(2, 1).repeat_interleave(2, 2)
            return entries

    for batch in make(train_transform=Larger(), strong_transform=v2.RandomInvert(1.0)).train_dataloader():
        assert torch.equal(batch.teacher_inputs[:, :, ::2, 1::2], batch.x)
        assert torch.equal(batch.x_strong, 255 - batch.x)


@pytest.mark.parametrize("strong", [None, Compose([ColorJitter(0.5)])])
def test_another_device(strong):
    """Whole-batch transforms that run there; the CPU stands for it."""
    transform = Compose([RandomResizedCrop(8, scale=(0.5, 1)), RandomHorizontalFlip(), Normalize([0] * 3, [1] * 3)])
    data = make(
        Pictures(ragged=True), train_transform=transform, eval_transform=Resize([8, 8]), strong_transform=strong
    )
    for loader in (data.train_dataloader(), data.val_dataloader(), data.pool_dataloader()):
        expected = [*loader]
        assert loader.dataset.device is None
        loader.dataset.device = torch.device("cpu")
        for one, other in zip([*loader], expected, strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)
            assert strong is None or one.x_strong is None or torch.equal(one.x_strong, other.x_strong)


@pytest.mark.parametrize(
    ("items", "transform", "message"),
    [
        (
            (IMAGES[0], MASKS[0, :6]),
            RandomHorizontalFlip(),
            r"height and width of their image, \[12, 16\], got \[6, 16\]",
        ),
        ((IMAGES[0], MASKS[0, :6]), v2.RandomHorizontalFlip(), r"height and width of their image"),
        (
            (IMAGES[0], torch.arange(4)),
            RandomHorizontalFlip(),
            r"whole-batch transforms move masks \(H, W\), got labels",
        ),
        ((IMAGES[0], MASKS[0]), lambda e: {**e, "mask": e["mask"].float()}, r"of the type that it gets, torch.int64"),
        ((IMAGES[0], MASKS[0]), lambda e: e["image"], r"with a tensor mask, got \[3, 12, 16\] for sample "),
        ((IMAGES[0], MASKS[0]), v2.Lambda(lambda e: {"image": e}), r"with a tensor mask"),
    ],
)
def test_what_does_not_fit(items, transform, message):
    data = SemiSupervisedDataModule(DatasetSource(_Same(items), dense=True), val_size=0, train_transform=transform)
    with pytest.raises(InputError, match=message) as caught:
        [*data.train_dataloader()]
    assert "\n" not in str(caught.value)


class _Same(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index > 2:
            raise IndexError
        return self.item


def test_a_transform_that_cannot_move_masks():
    class Own(BatchTransform):
        def transform(self, images, draws):
            return images.flip(3)

    with pytest.raises(InputError, match="Own must implement transform_masks"):
        make(train_transform=Own()).train_dataloader()
    with pytest.raises(InputError, match="Own must implement transform_masks"):
        make(strong_transform=Compose([Own()])).train_dataloader()


def test_without_a_transform_labels_have_any_shape():
    """Frames of sound (F,) with labels (T, L), for instance; a sample without labels has their shape."""
    x, y = torch.randn(9, 40), torch.randint(0, 2, (9, 6, 3)).float()
    y[2] = float("nan")
    data = SemiSupervisedDataModule(DatasetSource(TensorDataset(x, y), dense=True), val_size=2, batch_size=3, labeled=4)
    found = 0
    for batch in data.train_dataloader():
        assert batch.y.shape[1:] == (6, 3)
        known = ~batch.y.isnan().flatten(1).any(1)
        assert torch.equal(batch.y[known], y[batch.index[known]])
        found += int(known.sum())
    assert found == 4
    assert 2 in data.split.unlabeled


def test_parts_of_datasets():
    pictures = Pictures()
    data = make(
        ConcatDataset([Subset(pictures, range(10)), Subset(pictures, range(10, COUNT))]), labeled=None, val_size=0
    )
    for batch in data.train_dataloader():
        assert torch.equal(batch.y, MASKS[batch.index])
    assert data.train_dataloader().dataset.more_tensors == 1
    assert np.array_equal(data.image(3), IMAGES[3])
