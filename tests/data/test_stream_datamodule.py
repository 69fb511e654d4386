"""Fits on streams: totals of a step, exact resumption, evaluation, and what needs random access."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset
from torchvision.transforms import v2

from kd_lightning import (
    CoTeachingModule,
    DatasetSource,
    DistillModule,
    EnsembleDistillModule,
    ExactResume,
    FixedThreshold,
    FlexMatch,
    HintModule,
    HuggingFaceSource,
    HuggingFaceStream,
    InputError,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    StreamDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.data.transforms import strong_small
from kd_lightning.losses import EarlyLearningLoss

DIM, CLASSES, COUNT = 6, 3, 46


class Rows(IterableDataset):
    """Random rows with labels of all, or of some. The order of each epoch is another one."""

    def __init__(self, count: int = COUNT, unlabeled: int = 0, seed: int = 0, shape: tuple[int, ...] = (DIM,)):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.rand(count, *shape, generator=generator)
        self.y = torch.randint(CLASSES, (count,), generator=generator)
        self.unlabeled, self.seed, self.epoch = unlabeled, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def order(self):
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.x)).tolist()

    def __iter__(self):
        for number in self.order():
            label = None if self.unlabeled and number % self.unlabeled == 0 else int(self.y[number])
            yield {"x": self.x[number], "label": label}


def network(width=8):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.ReLU(), nn.LazyLinear(CLASSES))


def make(width=8, dim=DIM):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, CLASSES))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


def fit(module, data, tmp_path, ckpt_path=None, **options):
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False} | options
    callbacks = [*options.pop("callbacks", []), ExactResume()]
    trainer = Trainer(default_root_dir=tmp_path, enable_model_summary=False, callbacks=callbacks, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


class TestFit:
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_equals_steps_by_hand(self, tmp_path, accumulate):
        """The mean over all labels of an optimiser step, in float64 by hand; the last step is shorter."""
        stream, student = Rows(unlabeled=4), make()
        expected = copy.deepcopy(student).double()
        optimizer = sgd(expected.parameters())
        for epoch in range(2):
            stream.set_epoch(epoch)
            items = [*stream]
            for first in range(0, len(items), 8 * accumulate):
                step = items[first : first + 8 * accumulate]
                known = [item for item in step if item["label"] is not None]
                logits = expected(torch.stack([item["x"] for item in known]).double())
                optimizer.zero_grad()
                F.cross_entropy(logits, torch.tensor([item["label"] for item in known])).backward()
                optimizer.step()
        module = SupervisedModule(student, optimizer=sgd)
        fit(module, StreamDataModule(Rows(unlabeled=4), batch_size=8), tmp_path, accumulate_grad_batches=accumulate)
        for found, other in zip(module.student.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(found.double(), other, rtol=1e-5, atol=1e-6)

    def test_soft_term_learns_from_all(self, tmp_path):
        """Without labels, a student follows its teacher."""
        torch.manual_seed(1)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(DIM, CLASSES))
        module = DistillModule(make(), Teacher(teacher), soft_weight=1.0, optimizer=sgd)
        data = StreamDataModule(Rows(400), Rows(100, seed=1), labeled=False, batch_size=8)
        trainer = fit(module, data, tmp_path, max_epochs=6, limit_val_batches=100)
        assert trainer.callback_metrics["val/teacher_kl"] < 0.02
        assert trainer.callback_metrics["train/hard"] == 0

    def test_evaluation_counts_each_sample_once(self, tmp_path):
        module, test = SupervisedModule(make()), Rows(37, seed=5)
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        data = StreamDataModule(Rows(), Rows(seed=4), test, batch_size=8)
        (found,) = trainer.test(module, data, verbose=False)
        with torch.no_grad():
            logits = module.student(test.x)
        assert found["test/accuracy"] == pytest.approx(float((logits.argmax(1) == test.y).double().mean()))
        assert found["test/loss"] == pytest.approx(float(F.cross_entropy(logits, test.y)), rel=1e-5)
        predicted = trainer.predict(module, data)
        assert sum(len(batch["probabilities"] if isinstance(batch, dict) else batch) for batch in predicted) == 37

    def test_online_pseudo_labels(self, tmp_path):
        shape = (1, 8, 8)
        data = StreamDataModule(
            Rows(unlabeled=2, shape=shape),
            batch_size=8,
            strong_transform=strong_small([0.5], [0.5], 8),
            train_transform=nn.Identity(),
        )
        module = PseudoLabelModule(make(dim=64), selection=FixedThreshold(0.3), optimizer=sgd)
        trainer = fit(module, data, tmp_path)
        assert trainer.global_step == 12
        assert 0 < trainer.callback_metrics["train/unsupervised"] < math.inf

    @pytest.mark.parametrize("form", ["row", "named", "unlabeled"])
    def test_strong_views_of_the_stream(self, form):
        """Rows of Hugging Face with two texts; and the same with a named column of inputs."""

        def text(number, word):
            ids = [word] * (2 + number % 3)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}

        def row(number):
            more = {"x_strong": text(number + 1, 7), "teacher_inputs": text(number, 5)}
            inputs = text(number, 9) if form == "row" else {"tokens": text(number, 9)}
            return inputs | more | ({} if form == "unlabeled" else {"label": number % 2})

        rows = [row(number) for number in range(8)]
        column = None if form == "row" else "tokens"
        data = StreamDataModule(rows, rows, batch_size=4, input=column, labeled=form != "unlabeled")
        for number, batch in enumerate(data.train_dataloader()):
            for place, sample in enumerate(range(4 * number, 4 * number + 4)):
                for x, expected in (
                    (batch.x, text(sample, 9)),
                    (batch.x_strong, text(sample + 1, 7)),
                    (batch.teacher_inputs, text(sample, 5)),
                ):
                    assert x["input_ids"][place][x["attention_mask"][place] == 1].tolist() == expected["input_ids"]
        if form != "unlabeled":
            assert all(batch.x_strong is None and len(batch.x) == 2 for batch in data.val_dataloader())

    @pytest.mark.parametrize(
        ("task", "label"),
        [
            ("multilabel", lambda n: [0, 1, n % 2]),
            ("regression", lambda n: [n / 7, 0.5, -1.0]),
            ("regression", lambda n: [n % 5 - 8, 1, 2]),
            ("regression", lambda n: n % 4),
            ("binary", lambda n: n % 2 == 0),
        ],
    )
    def test_batches_without_labels_of_each_task(self, tmp_path, task, label):
        """They count next to nothing, also if they come first, when the shape of the labels is not known."""
        labels = [None if n < 8 or n % 5 == 0 else label(n) for n in range(24)]
        x = torch.rand(24, DIM, generator=torch.Generator().manual_seed(0))
        width = len(label(1)) if isinstance(label(1), list) else 1
        torch.manual_seed(0)
        student = nn.Linear(DIM, width)
        expected = copy.deepcopy(student).double()
        optimizer = sgd(expected.parameters())
        loss = F.mse_loss if task == "regression" else F.binary_cross_entropy_with_logits
        for first in range(0, 24, 4):
            known = [n for n in range(first, first + 4) if labels[n] is not None]
            if known:
                target = torch.tensor([labels[n] for n in known], dtype=torch.double).view(len(known), width)
                optimizer.zero_grad()
                loss(expected(x[known].double()), target).backward()
                optimizer.step()
        module = SupervisedModule(student, task=task, optimizer=sgd)
        items = [*zip(x, labels, strict=True)]
        trainer = fit(module, StreamDataModule(items, items, batch_size=4), tmp_path, max_epochs=1)
        for found, other in zip(student.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(found.double(), other, rtol=1e-5, atol=1e-6)
        assert math.isfinite(trainer.callback_metrics["val/loss"])

    @pytest.mark.parametrize("label", [-1, -100, [2, -1]])
    def test_whole_numbers_of_regression_that_may_be_missing_labels(self, tmp_path, label):
        items = [(torch.ones(DIM), [3, 3] if isinstance(label, list) else 3), (torch.ones(DIM), label)]
        module = SupervisedModule(nn.Linear(DIM, 2 if isinstance(label, list) else 1), task="regression")
        with pytest.raises(
            InputError, match="^train: sample 1 of the stream: .* give floats, and NaN for a missing one"
        ):
            fit(module, StreamDataModule(items), tmp_path)

    def test_token_sequences(self):
        items = [{"input_ids": [*range(1, n + 1)], "attention_mask": [1] * n, "labels": n % 3} for n in (2, 4, 3)]
        (batch,) = StreamDataModule(items, pad_token=9).train_dataloader()
        assert batch.x["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9]]
        assert batch.x["attention_mask"].sum(dim=1).tolist() == [2, 4, 3]
        assert batch.y.tolist() == [2, 1, 0]


class TestResume:
    @pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (3, 0), pytest.param(2, 2, marks=pytest.mark.slow)])
    def test_equals_an_unbroken_fit_twice(self, tmp_path, accumulate, workers):
        def parts():
            seed_everything(0)
            data = StreamDataModule(Rows(unlabeled=3), Rows(seed=1), batch_size=4, num_workers=workers)
            return SupervisedModule(make(), optimizer=sgd), data

        options = {"accumulate_grad_batches": accumulate, "max_epochs": 3, "num_sanity_val_steps": 0}
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        whole, data = parts()
        trainer = fit(whole, data, tmp_path, callbacks=[every], **options)
        last = trainer.global_step
        steps = -(-12 // accumulate)
        assert last == 3 * steps
        for number in (1, steps - 1, steps, steps + 1, last):
            module, data = parts()
            again = ModelCheckpoint(tmp_path / "second", "{step}", every_n_train_steps=1, save_top_k=-1)
            other = fit(module, data, tmp_path, tmp_path / f"step={number}.ckpt", callbacks=[again], **options)
            assert other.global_step == last
            assert all(map(torch.equal, module.student.parameters(), whole.student.parameters()))
            between = number + (last - number) // 2
            if between > number:
                module, data = parts()
                fit(module, data, tmp_path, tmp_path / "second" / f"step={between}.ckpt", **options)
                assert all(map(torch.equal, module.student.parameters(), whole.student.parameters()))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 8}, "^batch_size: the checkpoint was trained with 4, got 8"),
            ({"seed": 3}, "^seed: the checkpoint was trained with 0, got 3"),
            ({"labeled": False}, "^labeled: the checkpoint was trained with True, got False"),
            ({"train_transform": nn.Identity()}, "^train_transform: the checkpoint was trained with None, got Iden"),
            ({"train": Rows(seed=7)}, "^train: the stream gives other samples than before the resume"),
        ],
    )
    def test_refuses_others(self, tmp_path, options, message):
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(SupervisedModule(make()), StreamDataModule(Rows(), batch_size=4), tmp_path, callbacks=[every], max_epochs=1)
        data = StreamDataModule(**({"train": Rows(), "batch_size": 4} | options))
        with pytest.raises(InputError, match=message):
            fit(SupervisedModule(make()), data, tmp_path, tmp_path / "step=5.ckpt")


def pictures(folder, count=20):
    """A data set of pictures, as ``save_to_disk`` writes it."""
    images = [Image.new("RGB", (20 + n, 30), (n * 10, 0, 0)) for n in range(count)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog", "eel"])})
    part = Dataset.from_dict({"image": images, "label": [n % 3 for n in range(count)]}, features=features)
    DatasetDict(train=part, test=part).save_to_disk(folder)


class TestHuggingFace:
    def test_saved_folder(self, tmp_path):
        pictures(tmp_path / "saved")
        train = HuggingFaceStream(str(tmp_path / "saved"), shuffle_buffer=8)
        test = HuggingFaceStream(str(tmp_path / "saved"), "test")
        data = StreamDataModule(train, test=test, image_size=16, batch_size=8)
        batches = [*data.train_dataloader()]
        assert [batch.x.shape for batch in batches] == [(8, 3, 16, 16), (8, 3, 16, 16), (4, 3, 16, 16)]
        assert data.class_names == ["cat", "dog", "eel"]
        assert next(iter(data.test_dataloader())).y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert batches[0].y.tolist() != [0, 1, 2, 0, 1, 2, 0, 1]

    def test_files(self, tmp_path):
        columns = {"text": ["a", "b"], "value": [[1.0, 2.0], [3.0, 4.0]], "kind": ["yes", "no"]}
        features = Features({"text": Value("string"), "value": [Value("float32")], "kind": Value("string")})
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
        stream = HuggingFaceStream("parquet", data_files=str(tmp_path / "*.parquet"))
        options = {"input": "value", "label": "kind", "class_names": ["no", "yes"]}
        (batch,) = StreamDataModule(stream, **options).train_dataloader()
        assert batch.x.tolist() == [[1, 2], [3, 4]]
        assert batch.y.tolist() == [1, 0]
        with pytest.raises(InputError, match="must have 'colour', got text, value, kind"):
            next(iter(StreamDataModule(stream, **(options | {"input": "colour"})).train_dataloader()))

    def test_pictures_as_bytes(self, tmp_path):
        """Parquet of other packages has {bytes, path} without the type of a picture."""
        picture = Image.new("RGB", (20, 10), (200, 0, 0))
        exif = picture.getexif()
        exif[0x0112] = 6  # turned by a quarter
        picture.save(tmp_path / "a.jpg", exif=exif)
        content = (tmp_path / "a.jpg").read_bytes()
        items = [{"image": {"bytes": content, "path": None}, "label": 1}]
        items += [{"image": {"bytes": None, "path": str(tmp_path / "a.jpg")}, "label": 0}]
        transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        (batch,) = StreamDataModule(items, train_transform=transform).train_dataloader()
        assert batch.x.shape == (2, 3, 20, 10)
        assert torch.equal(batch.x[0], batch.x[1])
        items[0]["image"]["bytes"] = b"none"
        with pytest.raises(InputError, match="^train: sample 0 of the stream: image cannot be read: Unidentified"):
            next(iter(StreamDataModule(items, train_transform=transform).train_dataloader()))

    @pytest.mark.parametrize(("path", "split"), [("nowhere", "train"), ("saved", "holdout")])
    def test_cannot_be_opened(self, tmp_path, monkeypatch, path, split):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        pictures("saved", 3)
        with pytest.raises(InputError, match=f"^HuggingFaceStream: {path}, split {split}: "):
            StreamDataModule(HuggingFaceStream(path, split)).setup("fit")
        with pytest.raises(InputError, match="^shuffle_buffer must be at least 2"):
            HuggingFaceStream(path, shuffle_buffer=1)


def test_shared_of_some_parts():
    data = StreamDataModule(Rows(), Rows(), shared=["train"])
    data.setup("fit")
    assert not data.train_dataloader().dataset.reader.deals
    assert data.val_dataloader().dataset.reader.deals
    with pytest.raises(InputError, match=r"^shared must be a boolean, or some of train, val, test, got \['valid'\]"):
        StreamDataModule(Rows(), shared=["valid"])


class TestNeedsRandomAccess:
    """What cannot work on a stream is refused in one line that names what does."""

    def test_balanced_class_weights(self, tmp_path):
        module = SupervisedModule(make(), class_weights="balanced")
        with pytest.raises(InputError, match=r"^class_weights: balanced needs a datamodule with visible_labels\(\)"):
            fit(module, StreamDataModule(Rows()), tmp_path)

    def test_refreshed_pseudo_labels(self, tmp_path):
        module = PseudoLabelModule(make(), pseudo_labels="refreshed")
        with pytest.raises(InputError, match="SemiSupervisedDataModule has them, got StreamDataModule"):
            fit(module, StreamDataModule(Rows()), tmp_path, callbacks=[PseudoLabelRefresh()])

    def test_cached_teacher(self, tmp_path):
        module = DistillModule(make(), Teacher(make(), cache=tmp_path / "cache"))
        with pytest.raises(InputError, match="cache"):
            fit(module, StreamDataModule(Rows()), tmp_path)

    def test_selection_that_needs_an_index(self, tmp_path):
        module = PseudoLabelModule(make(), selection=FlexMatch(0.9))
        with pytest.raises(InputError, match="FlexMatch needs a datamodule with unlabeled_indices"):
            fit(module, StreamDataModule(Rows()), tmp_path)

    def test_losses_that_remember_samples(self, tmp_path):
        module = SupervisedModule(make(), hard_loss=EarlyLearningLoss())
        with pytest.raises(InputError, match="hard_loss|EarlyLearningLoss"):
            fit(module, StreamDataModule(Rows()), tmp_path)

    def test_teachers_drawn_for_samples(self, tmp_path):
        def module(**options):
            return EnsembleDistillModule(make(), [make(), make(12)], **options)

        with pytest.raises(InputError, match="^draw_per: sample needs batches with an index"):
            fit(module(strategy="random", draw_per="sample"), StreamDataModule(Rows()), tmp_path)
        with pytest.warns(UserWarning, match="^relabel: batches have no view, so a teacher is sampled uniformly"):
            fit(module(strategy="relabel"), StreamDataModule(Rows()), tmp_path)

    def test_co_teaching_and_hints_work(self, tmp_path):
        for module in (
            CoTeachingModule(make(), make(12), forget_rate=0.2),
            HintModule(make(), Teacher(make(12)), hints={"1": "1"}, hint_epochs=1),
        ):
            assert fit(module, StreamDataModule(Rows(), batch_size=8), tmp_path).global_step == 12

    @pytest.mark.parametrize("source", [lambda: DatasetSource(Rows()), lambda: DatasetSource(iter([]))])
    def test_source(self, source):
        with pytest.raises(InputError, match="StreamDataModule"):
            SemiSupervisedDataModule(source()).setup("fit")

    def test_hugging_face_source(self):
        stream = Dataset.from_dict({"x": [1]}).to_iterable_dataset()
        with pytest.raises(InputError, match="StreamDataModule"):
            SemiSupervisedDataModule(HuggingFaceSource({"train": stream})).setup("fit")
