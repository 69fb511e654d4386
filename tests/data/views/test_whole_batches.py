"""Views of whole-batch transforms: the same pixels in each batch, order, worker and device."""

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from kd_lightning import Batch, Digits, InputError, SemiSupervisedDataModule
from kd_lightning.data.sources.pixels import read_pixels
from kd_lightning.data.transforms import BatchTransform, Compose, Draws
from kd_lightning.data.views import dataset as module
from kd_lightning.data.views.dataset import ViewDataset, collate
from kd_lightning.data.views.table import ViewTable


class Noise(BatchTransform):
    def transform(self, images, draws):
        return images + draws.uniform(shape=images.shape[1:]).float()


class Corner(BatchTransform):
    """A random corner of 4x4 pixels. It takes images of different sizes."""

    takes_lists = True

    def transform(self, images, draws):
        places = draws.integers(0, 1, (2,)).tolist()
        return torch.stack([im[:, y : y + 4, x : x + 4] for im, (y, x) in zip(images, places, strict=True)])


class Pictures:
    """PIL images of different sizes."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        torch.manual_seed(index)
        return Image.fromarray(torch.randint(256, (5 + index % 3, 6 + index % 2), dtype=torch.uint8).numpy())


def crops(tail=True):
    return Compose([Corner(), v2.ToDtype(torch.float32, scale=True), *([Noise()] if tail else [])])


def kinds():
    digits = Digits().load().train.images
    one_by_one = [digits[n][0] for n in range(30)]
    return {
        "rows": ViewDataset([digits], torch.arange(30), Noise(), 3),
        "items": ViewDataset([one_by_one], torch.arange(30), Noise(), 3),
        "two parts": ViewDataset([one_by_one[:10], one_by_one[10:]], torch.arange(30), Noise(), 3),
        "lists": ViewDataset([Pictures()], torch.arange(30), crops(), 3),
        "strong": ViewDataset([digits], torch.arange(30), Noise(), 3, Compose([Noise()])),
        "strong lists": ViewDataset([Pictures()], torch.arange(30), crops(), 3, crops(tail=False)),
        "weak alone": ViewDataset([digits], torch.arange(30), Noise(), 3, v2.RandomCrop(8, padding=1)),
        "strong alone": ViewDataset([digits], torch.arange(30), v2.RandomCrop(8, padding=1), 3, Noise()),
        "no weak": ViewDataset([digits], torch.arange(30), None, 3, Noise()),
    }


def pixels(dataset, keys, workers=0, size=4):
    batches = [*DataLoader(dataset, size, sampler=keys, num_workers=workers, collate_fn=collate)]
    found = [key for batch in batches for key in zip(batch.index.tolist(), batch.view.tolist(), strict=True)]
    views = (
        zip(
            *(
                torch.cat([getattr(b, name) for b in batches])
                for name in ("x", "x_strong")
                if getattr(b, name) is not None
            ),
            strict=True,
        )
        if (b := batches[0])
        else ()
    )
    return dict(zip(found, views, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", kinds())
def test_same_view_same_pixels(kind, workers):
    dataset, keys = kinds()[kind], [(i, v) for i in range(25) for v in range(2)]
    expected = pixels(dataset, keys)
    for size in (1, 7, 50):
        again = pixels(dataset, keys[::-1], workers, size)
        assert expected.keys() == again.keys()
        assert all(torch.equal(a, b) for k in keys for a, b in zip(expected[k], again[k], strict=True))
    if kind not in ("no weak",):
        assert not torch.equal(expected[3, 0][0], expected[3, 1][0])
    if len(expected[3, 0]) == 2:
        assert not torch.equal(*expected[3, 0])


def test_first_and_strong_view_by_hand():
    """The strong view has random numbers of its own, also with the same transform."""
    dataset = ViewDataset([Digits().load().train.images], torch.arange(30), Noise(), 3, Noise())
    batch = dataset.__getitems__([(4, 1), (2, 0)])
    draws = Draws(3, torch.tensor([4, 2]), torch.tensor([1, 0]))
    raw = torch.stack([dataset.images[0][n][0] for n in (4, 2)])
    assert torch.equal(batch.x, raw + draws.uniform(shape=(1, 8, 8)).float())
    strong = Draws(3, torch.tensor([4, 2]), torch.tensor([1, 0])).stream(-1)
    assert torch.equal(batch.x_strong, raw + strong.uniform(shape=(1, 8, 8)).float())


def test_two_parts_of_a_source_are_those_of_one():
    made = kinds()
    keys = [(n, 2) for n in range(30)]
    assert torch.equal(made["two parts"].__getitems__(keys).x, made["items"].__getitems__(keys).x)
    assert torch.equal(made["rows"].__getitems__(keys).x, made["items"].__getitems__(keys).x)


def test_generators_are_left_alone():
    for dataset in kinds().values():
        images = dataset.images[0]
        if isinstance(images, Pictures):
            continue
        state = torch.get_rng_state()
        dataset.__getitems__([(0, 0), (1, 5)])
        assert torch.equal(torch.get_rng_state(), state)


def test_few_pictures_are_in_memory_at_a_time(monkeypatch):
    lengths = []

    class Counting(Corner):
        def transform(self, images, draws):
            lengths.append(len(images))
            return super().transform(images, draws)

    dataset = ViewDataset([Pictures()], torch.arange(30), Compose([Counting(), Noise()]), 3)
    whole = dataset.__getitems__([(n, 0) for n in range(30)]).x
    assert lengths == [30]
    sizes = [read_pixels(dataset.images, n).nbytes for n in range(30)]
    for most in (1, 3000, sum(sizes)):
        lengths.clear()
        monkeypatch.setattr(module, "CHUNK", most)
        assert torch.equal(dataset.__getitems__([(n, 0) for n in range(30)]).x, whole)
        ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
        assert ends[-1] == 30
        # the limit is reached by the last image of each part, never before
        assert all(sum(sizes[end - length : end - 1]) < most for end, length in zip(ends, lengths, strict=True))
        assert all(sum(sizes[end - length : end]) >= most for end, length in zip(ends[:-1], lengths[:-1], strict=True))
    assert lengths == [30]


@pytest.mark.parametrize("kind", ["rows", "items", "lists", "strong", "strong lists"])
def test_another_device(kind):
    """A device other than that of the loader gets raw images, and runs the rest of the transform."""
    here = kinds()[kind]
    there = ViewDataset(here.images, here.indices, here.transform, 3, here.strong_transform, torch.device("cpu"))
    assert there.device is not None
    keys = [(n, 1) for n in range(20)]
    raw = there.__getitems__(keys)
    assert raw.x.dtype == (torch.float32 if "lists" not in kind else raw.x.dtype)
    if "lists" not in kind:
        assert torch.equal(
            raw.x, torch.stack([here.images[0][n][0] if kind != "items" else here.images[0][n] for n in range(20)])
        )
        assert raw.x_strong is None
    made, expected = there.finish(raw), here.__getitems__(keys)
    assert torch.equal(made.x, expected.x) and torch.equal(made.index, expected.index)
    assert kind not in ("strong", "strong lists") or torch.equal(made.x_strong, expected.x_strong)
    assert here.finish(expected) is expected


@pytest.mark.parametrize("kind", ["weak alone", "strong alone"])
def test_a_transform_of_single_images_runs_in_the_loader(kind):
    here = kinds()[kind]
    there = ViewDataset(here.images, here.indices, here.transform, 3, here.strong_transform, torch.device("cpu"))
    assert there.device is None


def test_table_on_another_device():
    """Rows of a table are those of the loader, and its key names device and transform."""
    here = kinds()["rows"]
    there = ViewDataset(here.images, here.indices, here.transform, 3, device=torch.device("cpu"))
    tables = [ViewTable(one, 2) for one in (here, there)]
    batches = [[table.finish(batch) for batch in table.read([range(9), [59, 3]])] for table in tables]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.view, other.view)
    parts = [table.parts() for table in tables]
    assert parts[0].pop("transform") != parts[1].pop("transform")
    assert parts[0] == parts[1]


def test_shapes_of_the_two_views():
    images = TensorDataset(torch.rand(9, 1, 8, 8))
    for device in (None, torch.device("cpu")):
        dataset = ViewDataset([images], torch.arange(9), Noise(), 3, Compose([v2.CenterCrop(4)]), device)
        with pytest.raises(InputError, match=r"strong_transform.*\[1, 4, 4\] and \[1, 8, 8\]"):
            dataset.finish(dataset.__getitems__([(0, 0)]))


def test_images_that_need_a_crop_first():
    dataset = ViewDataset([Pictures()], torch.arange(9), Compose([Noise()]), 3)
    with pytest.raises(InputError, match="one shape"):
        dataset.__getitems__([(0, 0), (1, 0)])


def test_single_view_is_a_row_of_the_batch():
    dataset = kinds()["strong"]
    one, batch = dataset[3, 1], dataset.__getitems__([(3, 1)])
    for name in ("x", "x_strong", "index", "view"):
        assert torch.equal(getattr(one, name), getattr(batch, name)[0])
    stacked = collate([dataset[3, 1], dataset[4, 0]])
    assert isinstance(stacked, Batch)
    assert torch.equal(stacked.x_strong, dataset.__getitems__([(3, 1), (4, 0)]).x_strong)


@pytest.mark.parametrize("options", [{}, {"strong_transform": Noise()}, {"labeled_batch_size": 8}])
def test_a_loader_on_another_device(options):
    """Labels are looked up on the CPU, and everything is on the device afterwards; the meta device stands for a GPU."""
    data = SemiSupervisedDataModule(Digits(), labeled=10, batch_size=32, **options)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.pool_dataloader()):
        expected = [*loader]
        loader.dataset.device = torch.device("meta")
        found = [*loader]
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.mean_labels == other.mean_labels
            for name, value in vars(other).items():
                if isinstance(value, torch.Tensor):
                    there = getattr(one, name)
                    assert there.device.type == "meta" and there.shape == value.shape, name
