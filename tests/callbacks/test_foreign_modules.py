"""The callbacks that the command line adds never break a module that is not ours, whatever its batches and outputs."""

import csv
import json
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import (
    ActivationCalibration,
    Batch,
    CompileNetworks,
    EvaluationWriter,
    ExactResume,
    InputError,
    LayerwiseFinetuning,
    PredictionWriter,
    QuantizedWeightHistograms,
    SeedEveryStep,
    StudentWriter,
    SupervisedModule,
    load_weights,
    teach,
)
from kd_lightning.callbacks.any_batch import count_labeled, read_batch, rows_of_batch
from kd_lightning.quantization import quantize
from kd_lightning.quantization.calibration import activation_ranges, is_calibrated

ROWS, SAMPLES = 4, 12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


X = torch.randn(SAMPLES, 5, generator=generator())
Y = torch.arange(SAMPLES) % 3
IDS = torch.randint(0, 7, (SAMPLES, 6), generator=generator())


class Base(LightningModule):
    """Trains a network ``model.net``, of a dotted path as projects have."""

    def __init__(self, net=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {"net": nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)) if net is None else net}
        )

    @property
    def net(self):
        return self.model["net"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Pairs(Base):
    samples = [*zip(X, Y, strict=True)]

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0]).softmax(-1)


class Dicts(Pairs):
    """torchgeo's kind: an image under ``image``, further entries that the network does not get, texts."""

    samples = [{"image": x, "label": y, "crs": "epsg", "bounds": torch.ones(4)} for x, y in Pairs.samples]

    def loss(self, batch):
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def predict_step(self, batch, batch_idx):
        return {"probabilities": self.net(batch["image"]).softmax(-1)}


class TokenNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return SimpleNamespace(logits=self.head((self.table(input_ids) * mask[..., None]).sum(1)))


class Tokens(Pairs):
    samples = [
        {"input_ids": i, "attention_mask": torch.ones(6, dtype=torch.long), "labels": y}
        for i, y in zip(IDS, Y, strict=True)
    ]

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(TokenNet())

    def loss(self, batch):
        return F.cross_entropy(
            self.net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )

    def predict_step(self, batch, batch_idx):
        return self.net(**batch).logits.argmax(-1)


class Regression(Pairs):
    samples = [{"x": x, "target": x.sum()} for x in X]

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 1))

    def loss(self, batch):
        return F.mse_loss(self.net(batch["x"]).flatten(), batch["target"])

    def predict_step(self, batch, batch_idx):
        return self.net(batch["x"]).flatten()


class Manual(Pairs):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class NoValidation(Base):
    samples = Pairs.samples
    training_step, loss = Pairs.training_step, Pairs.loss


class ReturnsNone(Pairs):
    def validation_step(self, batch, batch_idx):
        return None

    def test_step(self, batch, batch_idx):
        return None

    def predict_step(self, batch, batch_idx):
        return None


class ReturnsLists(Pairs):
    """Returns what looks like predictions of other things than the batch's rows."""

    def validation_step(self, batch, batch_idx):
        return torch.arange(7)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))
        return [torch.arange(ROWS)]

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])[:1]


class OwnUnpack(Pairs):
    """Has methods of our names that do something else."""

    def unpack(self, batch, stage):
        raise AssertionError("not called")

    def call(self):
        raise AssertionError("not called")


class Boxes(Pairs):
    """Detection: lists of images and of dicts."""

    samples = [[x, {"boxes": torch.ones(n % 3, 4)}] for n, x in enumerate(X)]

    @staticmethod
    def collate(samples):
        return [x for x, _ in samples], [target for _, target in samples]

    def loss(self, batch):
        return self.net(torch.stack(batch[0])).square().mean()

    def predict_step(self, batch, batch_idx):
        return [{"boxes": torch.ones(2, 4)} for _ in batch[0]]


@dataclass
class Graph:
    x: torch.Tensor
    edges: torch.Tensor


class Graphs(Pairs):
    """A batch of a class of its own."""

    samples = [*X]

    @staticmethod
    def collate(samples):
        return Graph(torch.stack(samples), torch.zeros(2, 9, dtype=torch.long))

    def loss(self, batch):
        return self.net(batch.x).square().mean()

    def predict_step(self, batch, batch_idx):
        return self.net(batch.x)


KINDS = [
    Pairs,
    Dicts,
    Tokens,
    Regression,
    Manual,
    NoValidation,
    ReturnsNone,
    ReturnsLists,
    OwnUnpack,
    Boxes,
    Graphs,
]


def loader(kind):
    return DataLoader(kind.samples, batch_size=ROWS, collate_fn=getattr(kind, "collate", None))


def added(path="model.net"):
    """What the command line adds, for a module with a student and without."""
    callbacks = [SeedEveryStep(), ExactResume(), EvaluationWriter(), PredictionWriter()]
    return callbacks + [kind(path) for kind in (StudentWriter, ActivationCalibration, QuantizedWeightHistograms)]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb(quiet_trainer, tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = kind()
        quiet_trainer(logger=CSVLogger(tmp_path / "alone"), max_epochs=2).fit(
            alone, loader(kind), loader(kind) if kind is not NoValidation else None
        )
        module = kind()
        trainer = quiet_trainer(logger=CSVLogger(tmp_path), max_epochs=2, callbacks=added())
        trainer.fit(module, loader(kind), None if kind is NoValidation else loader(kind))
        for key, value in alone.state_dict().items():
            assert torch.equal(module.state_dict()[key], value), "the callbacks changed the training"
        if kind is not NoValidation:
            trainer.validate(module, loader(kind), verbose=False)
            trainer.test(module, loader(kind), verbose=False)
            trainer.predict(module, loader(kind))
    (student,) = tmp_path.rglob("student.safetensors")
    assert load_weights(kind().net, student).state_dict().keys() == module.net.state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    [
        (Pairs, [5], None),
        (Dicts, [5], None),  # what the network gets, not what the batch holds
        (Tokens, {"input_ids": [6], "attention_mask": [6]}, {"input_ids": "int64", "attention_mask": "int64"}),
        (Boxes, [5], None),
        (Graphs, [5], None),
    ],
)
def test_the_input_shape_is_what_the_network_gets(quiet_trainer, tmp_path, kind, shape, dtype):
    quiet_trainer(callbacks=[StudentWriter("model.net")]).fit(kind(), loader(kind))
    found = metadata(tmp_path / "student.safetensors")
    assert json.loads(found["input_shape"]) == shape
    assert json.loads(found.get("input_dtype", "null")) == dtype


def test_the_input_shape_of_our_modules_with_mappings(quiet_trainer, tmp_path):
    quiet_trainer(callbacks=[StudentWriter()]).fit(SupervisedModule(TokenNet()), loader(Tokens))
    found = metadata(tmp_path / "student.safetensors")
    assert json.loads(found["input_shape"]) == {"input_ids": [6], "attention_mask": [6]}


# Predictions: the right file, or none and one line.


def predict(quiet_trainer, outputs, caplog, task=None, names=None, samples=Pairs.samples):
    """Predict in batches of 4; ``outputs`` gives what the step returns for the rows."""

    class Theirs(LightningModule):
        def predict_step(self, batch, batch_idx):
            rows = slice(batch_idx * ROWS, batch_idx * ROWS + ROWS)
            return outputs(rows)

    module = Theirs()
    if task is not None:
        module.task = task
    trainer = quiet_trainer(callbacks=[PredictionWriter()])
    if names is not None:
        trainer.datamodule = SimpleNamespace(class_names=names)
    caplog.clear()
    with caplog.at_level("INFO"):
        trainer.predict(module, DataLoader(samples, batch_size=ROWS))
    lines = [m for m in caplog.messages if m.startswith("no predictions.csv is written")]
    return trainer.default_root_dir + "/predictions.csv", lines


LOGITS = torch.randn(SAMPLES, 3, generator=generator(2)) * 3


class TestPredictions:
    @pytest.fixture
    def run(self, quiet_trainer, tmp_path, caplog):
        def run(outputs, **kwargs):
            _, lines = predict(quiet_trainer, outputs, caplog, **kwargs)
            path = tmp_path / "predictions.csv"
            return (read(path) if path.is_file() else None), lines

        return run

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_class_ids(self, run, dtype):
        rows, lines = run(lambda part: Y[part].to(dtype))
        assert not lines
        assert [*rows[0]] == ["index", "path", "content", "prediction"]
        assert [int(row["prediction"]) for row in rows] == Y.tolist()

    def test_class_ids_of_one_column_and_of_booleans(self, run):
        assert [row["prediction"] for row in run(lambda part: Y[part, None])[0]] == [str(y) for y in Y.tolist()]
        rows, _ = run(lambda part: Y[part] == 1)
        assert [int(row["prediction"]) for row in rows] == (Y == 1).int().tolist()

    def test_zeros_and_ones_of_labels(self, run):
        rows, lines = run(lambda part: (LOGITS[part] > 0).long(), task="multilabel")
        assert not lines
        assert [*rows[0]] == ["index", "path", "content", "prediction"]
        assert [row["prediction"] for row in rows] == [
            ";".join(str(c) for c, z in enumerate(zs) if z > 0) for zs in LOGITS.tolist()
        ]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_probabilities(self, run, dtype):
        p = LOGITS.softmax(-1).to(dtype)
        rows, _ = run(lambda part: p[part])
        assert [*rows[0]][3:] == ["prediction", "0", "1", "2"]
        assert [int(row["prediction"]) for row in rows] == p.argmax(1).tolist()
        assert [float(row["2"]) for row in rows] == pytest.approx(p[:, 2].double().tolist(), rel=1e-5)

    def test_logits_are_no_probabilities(self, run):
        rows, _ = run(lambda part: LOGITS[part])
        assert [*rows[0]][3:] == ["prediction", "output_0", "output_1", "output_2"]
        assert {row["prediction"] for row in rows} == {""}
        assert [float(row["output_2"]) for row in rows] == pytest.approx(LOGITS[:, 2].tolist(), rel=1e-5)

    def test_one_batch_of_logits_is_enough(self, run):
        p = LOGITS.softmax(-1)
        for odd in range(SAMPLES // ROWS):
            rows, _ = run(lambda part, odd=odd: LOGITS[part] if part.start == odd * ROWS else p[part])
            assert "output_0" in rows[0], odd

    def test_logits_of_the_multiclass_task(self, run):
        rows, _ = run(lambda part: LOGITS[part], task="multiclass")
        assert "output_0" in rows[0]
        assert [int(row["prediction"]) for row in rows] == LOGITS.argmax(1).tolist()

    def test_independent_sigmoids_are_no_distribution(self, run):
        rows, _ = run(lambda part: LOGITS[part].sigmoid())
        assert "output_0" in rows[0]
        assert rows[0]["prediction"] == ""

    @pytest.mark.parametrize("values", [LOGITS[:, 0], LOGITS[:, 0].sigmoid(), LOGITS[:, :1]])
    def test_one_number_without_a_task(self, run, values):
        rows, _ = run(lambda part: values[part])
        assert [*rows[0]][3:] == ["prediction", "output"]
        assert [float(row["output"]) for row in rows] == pytest.approx(values.flatten().tolist(), rel=1e-5)
        assert {row["prediction"] for row in rows} == {""}

    def test_nan_predicts_no_class(self, run):
        p = LOGITS.softmax(-1).clone()
        p[5] = float("nan")
        rows, _ = run(lambda part: p[part], task="multiclass")
        assert [row["prediction"] for row in rows] == [
            "" if n == 5 else str(y) for n, y in enumerate(p.argmax(1).tolist())
        ]

    @pytest.mark.parametrize(
        ("outputs", "problem"),
        [
            (lambda part: {"logits": LOGITS[part]}, "returned dict, no tensor"),
            (lambda part: (LOGITS[part], Y[part]), "returned tuple, no tensor"),
            (lambda part: None, "returned NoneType, no tensor"),
            (lambda part: LOGITS[part][:2], r"returned \[2, 3\] for a batch of 4 rows"),
            (lambda part: LOGITS[part].mean(), r"returned \[\] for a batch of 4 rows"),
            (lambda part: LOGITS[part].T, r"returned \[3, 4\] for a batch of 4 rows"),
            (lambda part: LOGITS[part][..., None].expand(-1, -1, 6), r"dense outputs \[4, 3, 6\]"),
            (lambda part: IDS[part], r"integers \[4, 6\], not one class for each sample"),
            (lambda part: LOGITS[part].to(torch.complex64), r"complex numbers \[4, 3\]"),
            (lambda part: LOGITS[part] if part.start else Y[part], "several kinds or widths"),
            (lambda part: LOGITS[part] if part.start else LOGITS[part][:, :2], "several kinds or widths"),
            (lambda part: LOGITS[part] if part.start else None, "returned NoneType"),
        ],
    )
    def test_no_file_but_one_line(self, run, outputs, problem):
        rows, lines = run(outputs)
        assert rows is None
        (line,) = lines
        assert re.search(problem, line)

    def test_an_earlier_file_is_named(self, run):
        assert run(lambda part: Y[part])[0]
        rows, (line,) = run(lambda part: None)
        assert rows is not None
        assert line.endswith("predictions.csv is that of an earlier call")

    def test_each_loader_counts_from_zero(self, quiet_trainer, tmp_path):
        class Theirs(LightningModule):
            def predict_step(self, batch, batch_idx, dataloader_idx):
                return batch[1]

        loaders = [DataLoader(Pairs.samples, batch_size=ROWS) for _ in range(2)]
        quiet_trainer(callbacks=[PredictionWriter()]).predict(Theirs(), loaders)
        assert [int(row["index"]) for row in read(tmp_path / "predictions.csv")] == [*range(SAMPLES)] * 2


# What callbacks read of a batch.


class TestAnyBatch:
    @pytest.mark.parametrize(
        ("batch", "rows", "labeled"),
        [
            (X, 12, 12),
            ((X, Y), 12, 12),
            ((X, torch.where(Y == 0, -100, Y)), 12, 8),
            ({"image": X, "label": Y, "bounds": torch.ones(3, 4)}, 12, 12),  # rows of the labels
            ({"image": X, "label": Y[:5]}, 12, 12),  # labels of something else
            ({"x": X, "y": torch.tensor(1.0)}, 12, 12),
            (Batch(X, Y[:, None].float().masked_fill(Y[:, None] == 1, float("nan"))), 12, 8),
            (Graph(X, torch.zeros(12, 2)), 12, 12),
            (Graph(X, torch.zeros(2, 9)), None, 0),
            ([[X[0], X[1]], [{"boxes": torch.ones(2, 4)}]], None, 0),
            (torch.tensor(1.0), None, 0),
            ("text", None, 0),
            ([], None, 0),
            (None, None, 0),
            ({}, None, 0),
        ],
    )
    def test_rows_and_labels(self, batch, rows, labeled):
        module = Pairs()
        assert (rows_of_batch(module, batch), count_labeled(module, batch)) == (rows, labeled)

    def test_the_modules_own_unpack_counts_also_for_a_batch(self):
        class Half(SupervisedModule):
            def unpack(self, batch):
                return Batch(super().unpack(batch).x[:2])

        for batch in (X, Batch(X), (X, Y)):
            assert len(read_batch(Half(nn.Identity()), batch)) == 2

    def test_a_method_of_the_same_name_that_does_something_else(self):
        for kind in (OwnUnpack, type("Other", (Pairs,), {"unpack": lambda self, batch: [*batch]})):
            assert len(read_batch(kind(), (X, Y))) == SAMPLES


# The path of the network.

NAMED = [StudentWriter, ActivationCalibration, QuantizedWeightHistograms, LayerwiseFinetuning, CompileNetworks]


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("path", [None, "model.nett", "net.model"])
def test_a_wrong_path(quiet_trainer, kind, path):
    arguments = {"network": path} if path else {}
    if kind is CompileNetworks:
        arguments["backend"] = None
    with pytest.raises(
        InputError, match=rf"{kind.__name__}: network: Pairs has no network '{path or 'student'}'; nearest: .*model"
    ):
        quiet_trainer(callbacks=[kind(**arguments)]).fit(Pairs(), loader(Pairs))


@pytest.mark.parametrize("kind", NAMED)
def test_the_message_names_the_taught_network(quiet_trainer, kind):
    taught = teach(Pairs(), nn.Linear(5, 3), network="model.net")
    with pytest.raises(InputError, match=r"no network 'student'; nearest: model\.net(,|$)"):
        quiet_trainer(callbacks=[kind()]).fit(taught, loader(Pairs))


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("path", ["model.net", "model", ""])
def test_a_right_path(quiet_trainer, kind, path):
    arguments = {"backend": None, "channels_last": True} if kind is CompileNetworks else {}
    if kind is LayerwiseFinetuning:  # neither a ModuleDict nor the whole module can be traced
        arguments = {"head": "model.net.2".removeprefix(path).lstrip(".")}
    quiet_trainer(callbacks=[kind(network=path, **arguments)]).fit(Pairs(), loader(Pairs))


def test_the_named_network_alone_is_compiled(quiet_trainer):
    seen = []

    class Watch(Pairs):
        def training_step(self, batch, batch_idx):
            seen.append([name for name, part in self.named_modules() if part._compiled_call_impl is not None])
            return super().training_step(batch, batch_idx)

    quiet_trainer(callbacks=[CompileNetworks(backend="eager", network="model.net")]).fit(Watch(), loader(Pairs))
    assert seen[0] == ["model.net"]


def test_the_named_network_is_the_one_that_freezes(quiet_trainer):
    module = Pairs()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    quiet_trainer(callbacks=[LayerwiseFinetuning(1, network="model.net")]).fit(module, loader(Pairs))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.net.2.weight", "model.net.2.bias"}


def test_the_module_itself_is_written_without_its_teacher(quiet_trainer, tmp_path):
    class Itself(Pairs):
        def forward(self, x):
            return self.net(x)

        def loss(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    soft = nn.Module()
    soft.register_buffer("weight", torch.ones(()))  # no weight of the student
    soft.forward = lambda s, t: ((s - t) ** 2).mean()
    taught = teach(Itself(), nn.Linear(5, 3), network="", soft_loss=soft)
    quiet_trainer(callbacks=[StudentWriter("")]).fit(taught, loader(Pairs))
    load_weights(Itself(), tmp_path / "student.safetensors")


# Calibration on what the network really gets.


class Quantised(Base):
    def __init__(self):
        super().__init__(quantize(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), 4, skip=()))


class QuantisedPairs(Quantised, Pairs):
    pass


class QuantisedDicts(Quantised, Dicts):
    def loss(self, batch):
        return F.cross_entropy(self.net(2 * batch["image"]), batch["label"])


class QuantisedGraphs(Quantised, Graphs):
    pass


@pytest.mark.parametrize(("kind", "factor"), [(QuantisedPairs, 1), (QuantisedDicts, 2), (QuantisedGraphs, 1)])
def test_calibration(quiet_trainer, kind, factor):
    """The range of the first layer is the largest magnitude of its first inputs."""
    module, found = kind(), {}

    class Watch(ActivationCalibration):
        def on_train_batch_end(self, trainer, pl_module, *args):
            found.setdefault("calibrated", is_calibrated(pl_module.net))

    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    quiet_trainer(callbacks=[Watch("model.net")]).fit(module, loader(kind))
    assert found["calibrated"]
    first = next(iter(activation_ranges(module.net).values()))
    assert float(first) == pytest.approx(factor * float(X[:ROWS].abs().max()))
    assert not module.net._forward_pre_hooks


def test_calibration_of_our_modules_on_mappings(quiet_trainer):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, a, b):
            return self.layer(a - b)

    net = quantize(Two(), 4, skip=())
    samples = [{"a": x, "b": -x, "label": y} for x, y in Pairs.samples]
    module = SupervisedModule(net, optimizer=lambda p: torch.optim.SGD(p, 0.0))
    quiet_trainer(callbacks=[ActivationCalibration()]).fit(module, DataLoader(samples, batch_size=ROWS))
    assert float(next(iter(activation_ranges(net).values()))) == pytest.approx(2 * float(X[:ROWS].abs().max()))


def test_calibration_uses_the_modules_call(quiet_trainer):
    class Doubled(SupervisedModule):
        def call(self, network, x):
            return network(2 * x)

    net = quantize(nn.Sequential(nn.Linear(5, 3)), 4, skip=())
    module = Doubled(net, optimizer=lambda p: torch.optim.SGD(p, 0.0))
    quiet_trainer(callbacks=[ActivationCalibration()]).fit(module, loader(Pairs))
    assert float(next(iter(activation_ranges(net).values()))) == pytest.approx(2 * float(X[:ROWS].abs().max()))
