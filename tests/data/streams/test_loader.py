"""Streams: each sample once, in the same batches whatever reads them, and exact resumption."""

import io
import itertools
import threading
from pathlib import PurePath

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from litdata import CombinedStreamingDataset, StreamingDataset
from litdata.streaming.writer import BinaryWriter
from torch.utils.data import IterableDataset, get_worker_info

from kd_lightning import InputError, StreamDataModule
from kd_lightning.data.streams.batches import StreamBatches
from kd_lightning.data.streams.loader import StreamLoader
from kd_lightning.data.streams.readers import make_reader
from kd_lightning.data.streams.views import StreamViews
from kd_lightning.data.transforms import Compose, RandomCrop

COUNT = 53


class Numbers(IterableDataset):
    """Samples whose value is their number."""

    def __init__(self, count=COUNT, seed=None):
        self.count, self.seed, self.epoch, self.reads = count, seed, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def order(self):
        if self.seed is None:
            return range(self.count)
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()

    def __iter__(self):
        for number in self.order():
            self.reads += 1
            yield torch.full((1, 4, 4), float(number)), number % 3


class WithState(Numbers):
    """The same, with a position that it can return to."""

    position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = -1 - state["position"]  # negative until the pass begins

    def __iter__(self):
        begin = -1 - self.position if self.position < 0 else 0
        for position, number in enumerate(self.order()[begin:], begin + 1):
            self.position = position
            self.reads += 1
            yield torch.full((1, 4, 4), float(number)), number % 3
        self.position = 0


class Forgetful(WithState):
    """A position that is lost, as that of a shuffle buffer."""

    def load_state_dict(self, state):
        self.position = -1


class Locked(WithState):
    """A dataset that cannot be copied."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lock = threading.Lock()


class OddState(WithState):
    """A position in an object that a checkpoint cannot hold."""

    def state_dict(self):
        return PurePath(str(self.position))

    def load_state_dict(self, state):
        super().load_state_dict({"position": int(str(state))})


class NoStateYet(WithState):
    """As mosaicml-streaming, whose method has other arguments."""

    def state_dict(self, samples):
        return {"position": samples}


class Unseeded(Numbers):
    def order(self):
        return torch.randperm(self.count).tolist()


class OwnShares(Numbers):
    """Each worker gets each n-th sample."""

    def order(self):
        info = get_worker_info()
        return range(0, self.count) if info is None else range(info.id, self.count, info.num_workers)


def hugging_face(count=COUNT, shards=4, buffer=None):
    columns = {"x": np.arange(count, dtype=np.float32).reshape(-1, 1).tolist(), "label": [n % 3 for n in range(count)]}
    features = Features({"x": [Value("float32")], "label": ClassLabel(names=["a", "b", "c"])})
    stream = Dataset.from_dict(columns, features=features).to_iterable_dataset(num_shards=shards).with_format("torch")
    return stream if buffer is None else stream.shuffle(seed=3, buffer_size=buffer)


def make_loader(dataset, batch_size=4, workers=0, rank=0, world=1, shared=False, transform=None):
    reader = make_reader(dataset, "train", shared=shared)
    views = StreamViews("train", (transform, None), 0, None, None, (None, None))
    compares = reader.checks and workers > 1
    batches = StreamBatches(reader, views, batch_size, rank, world, compares)
    return StreamLoader(batches, num_workers=workers)


def values(batch):
    return batch.x.flatten(1)[:, 0].int().tolist()


def read(loader, count=None):
    return [values(batch) for batch in itertools.islice(iter(loader), count)]


def stored(state):
    """A state as a checkpoint holds it."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(batches):
    return [*itertools.chain.from_iterable(batches)]


def read_rank(dataset, rank, world, batch_size):
    """The batches that one of several processes reads."""
    batches = make_loader(dataset, batch_size, rank=rank, world=world).dataset
    batches.reader.start(0, rank, world, 1, batch_size)
    return [values(loaded.batch) for loaded in batches]


class TestOrder:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_each_sample_once_in_order(self, workers):
        batches = read(make_loader(Numbers(), workers=workers))
        assert [len(batch) for batch in batches] == [4] * 13 + [1]
        assert flat(batches) == [*range(COUNT)]

    def test_batches_of_several_processes_are_one_of_one(self):
        whole = read(make_loader(Numbers(), batch_size=12))
        shares = [read_rank(Numbers(), rank, 3, 4) for rank in range(3)]
        for number, batch in enumerate(whole):
            assert sorted(flat(share[number] for share in shares if number < len(share))) == batch

    @pytest.mark.parametrize("workers", [0, 6])
    def test_hugging_face_shards(self, workers):
        found = flat(read(make_loader(hugging_face(), workers=workers)))
        assert sorted(found) == [*range(COUNT)]

    @pytest.mark.parametrize("shards", [1, 3, 4])
    def test_hugging_face_processes(self, shards):
        found = [flat(read_rank(hugging_face(shards=shards), rank, 2, 4)) for rank in range(2)]
        assert sorted(found[0] + found[1]) == [*range(COUNT)]
        assert min(map(len, found)) > COUNT / 4

    def test_epochs_differ_where_the_stream_is_shuffled(self):
        for make in (lambda: Numbers(seed=1), lambda: hugging_face(buffer=8)):
            loader = make_loader(make())
            first, second = read(loader), read(loader)
            assert first != second
            assert sorted(flat(first)) == sorted(flat(second)) == [*range(COUNT)]
            loader = make_loader(make())
            assert [read(loader), read(loader)] == [first, second]

    def test_numbers_are_unique_and_augmentation_follows_from_them(self):
        crop = Compose([RandomCrop(4, padding=2)])
        loaders = [make_loader(Numbers(), 4, workers, transform=crop) for workers in (0, 2)]
        one, two = (torch.cat([batch.x for batch in loader]) for loader in loaders)
        assert torch.equal(one, two)
        evaluation = make_loader(hugging_face(), 4, 2)
        evaluation.training = False
        assert len({*torch.cat([batch.index for batch in evaluation]).tolist()}) == COUNT
        loader = make_loader(Numbers(), 64, transform=crop)
        assert not torch.equal(next(iter(loader)).x, next(iter(loader)).x)  # of another epoch

    def test_labels(self):
        batch = next(iter(make_loader(Numbers())))
        assert batch.y.tolist() == [0, 1, 2, 0]
        assert batch.labeled.tolist() == [0, 1, 2, 3]


class TestShares:
    def test_of_its_own(self):
        found = read(make_loader(OwnShares(), workers=3, shared=True))
        assert sorted(flat(found)) == [*range(COUNT)]

    def test_not_declared(self):
        with pytest.raises(InputError, match="set shared: true if the dataset itself gives each"):
            read(make_loader(OwnShares(), workers=2))

    def test_declared_but_there_are_none(self):
        with pytest.raises(InputError, match="shared is true, but several processes or workers read the same"):
            read(make_loader(Numbers(), workers=2, shared=True))

    def test_unseeded_shuffling(self):
        with pytest.raises(InputError, match="or seed its shuffling"):
            read(make_loader(Unseeded(), workers=2))


@pytest.fixture(autouse=True)
def _no_version_check(monkeypatch):
    """Litdata asks the package index for a newer version."""
    monkeypatch.setattr("litdata.streaming.dataset._check_version_and_prompt_upgrade", lambda version: None)


@pytest.fixture(scope="module")
def optimized(tmp_path_factory):
    """The same samples as a folder that litdata has written."""
    folder = tmp_path_factory.mktemp("litdata") / "out"
    writer = BinaryWriter(str(folder), chunk_size=8)
    for number, (x, label) in enumerate(Numbers()):
        writer.add_item(number, {"x": x, "label": label})
    writer.done()
    writer.merge()
    return str(folder)


class TestLitData:
    def test_each_sample_once(self, optimized):
        for workers in (0, 2):
            found = flat(read(make_loader(StreamingDataset(optimized, shuffle=True), workers=workers)))
            assert sorted(found) == [*range(COUNT)]
            assert found != [*range(COUNT)]

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_processes(self, optimized, shuffle):
        found = [flat(read_rank(StreamingDataset(optimized, shuffle=shuffle), rank, 2, 4)) for rank in range(2)]
        assert sorted(found[0] + found[1]) == [*range(COUNT)]

    def test_made_with_and_without_a_known_number_of_processes(self, optimized, monkeypatch):
        """A process that a launcher has started knows the number, and litdata then drops samples in that one alone."""
        first = StreamingDataset(optimized, shuffle=True)
        monkeypatch.setenv("WORLD_SIZE", "2")
        second = StreamingDataset(optimized, shuffle=True)
        assert (first.drop_last, second.drop_last) == (False, True)
        found = [flat(read_rank(dataset, rank, 2, 4)) for rank, dataset in enumerate((first, second))]
        assert sorted(found[0] + found[1]) == [*range(COUNT)]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resume(self, optimized, workers):
        def make():
            return make_loader(StreamingDataset(optimized, shuffle=True), workers=workers)

        whole = make()
        first, second = read(whole), read(whole)
        assert first != second
        loader = make()
        assert read(loader, 5) == first[:5]
        resumed = make()
        resumed.load_state_dict(loader.state_dict())
        assert read(resumed) == first[5:]
        assert read(resumed) == second

    def test_one_for_two_parts_is_refused(self, optimized):
        """Its pass over the validation part would end the one over the training part."""
        stream = StreamingDataset(optimized)
        with pytest.raises(InputError, match="^val: it is the StreamingDataset of train; give each its own$"):
            StreamDataModule(stream, stream).setup("fit")

    def test_others_of_it_are_refused(self, optimized):
        both = CombinedStreamingDataset([StreamingDataset(optimized), StreamingDataset(optimized)], seed=1)
        with pytest.raises(InputError, match="^train: of litdata a StreamingDataset can be read, got Combined"):
            StreamDataModule(both).setup("fit")


CASES = {
    "skipped": (Numbers, {}),
    "shuffled": (lambda: Numbers(seed=5), {}),
    "own state": (WithState, {}),
    "own state, shuffled": (lambda: WithState(seed=5), {}),
    "own state is lost": (Forgetful, {}),
    "not copied": (Locked, {}),
    "state of another class": (OddState, {}),
    "state that is not given": (NoStateYet, {}),
    "own shares": (OwnShares, {"shared": True}),
    "hugging face": (hugging_face, {}),
    "hugging face, buffer": (lambda: hugging_face(buffer=8), {}),
}


FORKED = {"own state, shuffled", "own shares", "hugging face, buffer"}  # of each way of reading one


class TestResume:
    @pytest.mark.parametrize(
        ("case", "workers"),
        [
            pytest.param(case, workers, marks=pytest.mark.slow if workers and case not in FORKED else [])
            for case in CASES
            for workers in (0, 2)
        ],
    )
    def test_equals_an_unbroken_pass(self, case, workers):
        make, options = CASES[case]
        whole = make_loader(make(), workers=workers, **options)
        every = [read(whole), read(whole)]
        points = ((1, 1), (2, 5), (6, 3), (13, 1), (len(every[0]), 0))
        for first, second in points if not workers else points[1:3]:
            loader = make_loader(make(), workers=workers, **options)
            assert read(loader, first) == every[0][:first]
            state = stored(loader.state_dict())
            loader = make_loader(make(), workers=workers, **options)
            loader.load_state_dict(state)
            assert loader.state_dict() == state
            assert read(loader, second) == every[0][first : first + second]
            state = stored(loader.state_dict())  # a second time
            loader = make_loader(make(), workers=workers, **options)
            loader.load_state_dict(state)
            assert read(loader) == every[0][first + second :]
            assert read(loader) == every[1]

    def test_own_state_reads_no_sample_again_but_those_of_one_batch(self):
        loader = make_loader(WithState(), batch_size=4)
        read(loader, 10)
        resumed = make_loader(dataset := WithState(), batch_size=4)
        resumed.load_state_dict(loader.state_dict())
        copies = []
        resumed.dataset._blocks = lambda reader, *args, **kwargs: (
            copies.append(reader.dataset),
            StreamBatches._blocks(resumed.dataset, reader, *args, **kwargs),
        )[1]
        assert len(read(resumed)) == 4
        assert copies[0].reads == COUNT - 36
        assert dataset.reads == 0

    def test_other_number_of_workers(self):
        """Where this package deals out the samples, the order does not depend on it."""
        loader = make_loader(WithState(), workers=2)
        found = read(loader, 5)
        resumed = make_loader(WithState(), workers=3)
        resumed.load_state_dict(loader.state_dict())
        assert flat(found + read(resumed)) == [*range(COUNT)]

    @pytest.mark.parametrize("make", [Unseeded, lambda: Numbers(9), lambda: Numbers(seed=6)])
    @pytest.mark.parametrize("workers", [0, 1])
    def test_refuses_other_samples(self, make, workers):
        loader = make_loader(Numbers(seed=5))
        read(loader, 6)
        resumed = make_loader(make(), workers=workers)
        resumed.load_state_dict(loader.state_dict())
        with pytest.raises(InputError, match="^train: the stream gives other samples than before the resume"):
            read(resumed)

    @pytest.mark.parametrize("make", [Numbers, lambda: Numbers(seed=6), Unseeded])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_refuses_other_samples_after_an_epoch(self, make, workers):
        loader = make_loader(Numbers(seed=5))
        read(loader)
        resumed = make_loader(make(), workers=workers)
        resumed.load_state_dict(loader.state_dict())
        resumed._passes = 1
        with pytest.raises(InputError, match="^train: the stream gives other samples than before the resume"):
            read(resumed)

    @pytest.mark.parametrize("case", CASES)
    def test_after_an_epoch(self, case):
        make, options = CASES[case]
        whole = make_loader(make(), **options)
        read(whole)
        loader = make_loader(make(), **options)
        read(loader, 5)
        between = make_loader(make(), **options)
        between.load_state_dict(loader.state_dict())
        read(between)
        resumed = make_loader(make(), **options)
        resumed.load_state_dict(between.state_dict())
        resumed._passes = 1
        assert read(resumed) == read(whole)


class TestBadInput:
    @pytest.mark.parametrize("training", [True, False])
    def test_no_samples(self, training):
        loader = make_loader(Numbers(0))
        loader.training = training
        with pytest.raises(InputError, match="^train: the stream has no samples$"):
            read(loader)

    def test_read_once(self):
        for value in (iter([1]), (n for n in range(3))):
            with pytest.raises(InputError, match="^train must be a dataset whose __iter__ begins anew, but"):
                StreamDataModule(value).setup("fit")
        with pytest.raises(InputError, match="int has no __iter__"):
            StreamDataModule(3).setup("fit")

    def test_error_names_the_sample(self):
        class Broken(Numbers):
            def __iter__(self):
                yield from itertools.islice(super().__iter__(), 5)
                raise OSError("gone")

        for workers in (0, 1):
            with pytest.raises(InputError, match="^train: sample 5 of the stream cannot be read: OSError: gone$"):
                read(make_loader(Broken(), workers=workers))

    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ([("x", "cat")], "labels are texts, such as 'cat'; they need class_names"),
            ([(torch.ones(2), -7)], "sample 0 of the stream: labels must be class numbers 0, 1, ..., or -1"),
            ([(torch.ones(2), [0, 1]), (torch.ones(2), [0, 4])], "sample 1 of the stream: labels must be 0, 1, or -1"),
            ([torch.ones(2)], r"must be \(image, label\)"),
            ([(torch.ones(2), torch.ones(3, 3))], "must have one label, or one row of them"),
        ],
    )
    def test_labels(self, items, message):
        with pytest.raises(InputError, match=message):
            read(make_loader(items))

    def test_values(self):
        with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
            StreamDataModule(Numbers(), batch_size=0)
        with pytest.raises(InputError, match="the StreamDataModule has no test stream"):
            StreamDataModule(Numbers()).test_dataloader()
        split = __import__("datasets.distributed").distributed.split_dataset_by_node
        with pytest.raises(InputError, match="^train: give the whole dataset"):
            StreamDataModule(split(hugging_face(), 0, 2)).setup("fit")
