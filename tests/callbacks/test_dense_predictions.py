"""PredictionWriter and EvaluationWriter where the module has class_dim, and for the regression task."""

import csv
import json
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import Batch, EvaluationWriter, InputError, PredictionWriter, SupervisedModule
from kd_lightning.callbacks.dense_predictions import palette, predicted_positions, write_mask
from kd_lightning.callbacks.sample_names import file_stems
from kd_lightning.data.identity import Identities
from kd_lightning.runs.results import read_result
from kd_lightning.runs.weights import save_weights

HEIGHT, WIDTH, CLASSES = 3, 5, 4
MAPS = torch.randn(7, CLASSES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, CLASSES, (7, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))


def batches(x, y=None, size=3, index=True, **fields):
    """A loader of batches. ``x`` are the outputs, since the network is the identity."""
    numbers = torch.arange(len(x) if isinstance(x, torch.Tensor) else len(next(iter(x.values()))))
    rows = numbers.split(size)

    def of(part, some):
        if isinstance(part, dict):
            return {name: value[some] for name, value in part.items()}
        return None if part is None else part[some]

    made = [
        Batch(
            of(x, some), of(y, some), some if index else None, **{name: of(part, some) for name, part in fields.items()}
        )
        for some in rows
    ]
    return DataLoader(made, batch_size=None)


class Data(LightningDataModule):
    """Names its samples by path."""

    def __init__(self, loader, paths=None, class_names=None):
        super().__init__()
        self.loader, self.paths, self.class_names = loader, paths, class_names

    def predict_dataloader(self):
        return self.loader

    def identities(self, part):
        return Identities([*self.paths], [f"hash {path}" for path in self.paths])


def predict(quiet_trainer, module, loader, **names):
    trainer = quiet_trainer(callbacks=[PredictionWriter()])
    trainer.predict(module, datamodule=Data(loader, **names)) if names.get("paths") else trainer.predict(module, loader)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def module(class_dim=1, **kwargs):
    return SupervisedModule(nn.Identity(), class_dim=class_dim, **kwargs)


# Masks.


def test_masks_hold_the_class_of_each_pixel(quiet_trainer, tmp_path):
    predict(quiet_trainer, module(), batches(MAPS))
    rows = read(tmp_path / "predictions.csv")
    assert [row["prediction"] for row in rows] == [f"predictions/00000{k}.png" for k in range(7)]
    for row, scores in zip(rows, MAPS.double().numpy(), strict=True):
        with Image.open(tmp_path / row["prediction"]) as image:
            assert (image.mode, image.size) == ("P", (WIDTH, HEIGHT))
            np.testing.assert_array_equal(np.array(image), scores.argmax(0))
            colours = np.array(image.convert("RGB"))
        expected = np.array(palette()).reshape(-1, 3)[scores.argmax(0)]
        np.testing.assert_array_equal(colours, expected)


def test_palette_against_the_voc_development_kit():
    """``VOClabelcolormap`` in its own words: bit by bit."""
    expected = []
    for number in range(256):
        colour, rest = [0, 0, 0], number
        for shift in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= (rest >> channel & 1) << shift
            rest >>= 3
        expected += colour
    assert palette() == expected
    assert len({tuple(palette()[start : start + 3]) for start in range(0, 768, 3)}) == 256


def test_binary_maps(quiet_trainer, tmp_path):
    predict(quiet_trainer, module(task="binary"), batches(MAPS[:, :1]))
    for number in range(7):
        found = np.array(Image.open(tmp_path / f"predictions/00000{number}.png"))
        np.testing.assert_array_equal(found, MAPS[number, 0].numpy() > 0)


def test_many_classes_take_16_bits(tmp_path):
    for classes, mode in (([0, 255], "P"), ([0, 256], "I;16"), ([1, 65535], "I;16")):
        write_mask(tmp_path / "a.png", torch.tensor([classes]))
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode == mode
            assert np.array(image).tolist() == [classes]
    for classes in ([-100, 0], [0, 65536]):
        with pytest.raises(InputError, match=r"a mask must have classes 0 ... 65535"):
            write_mask(tmp_path / "a.png", torch.tensor([classes]))


def test_padding_is_cut_off(quiet_trainer, tmp_path):
    mask = torch.ones(7, HEIGHT, WIDTH, dtype=torch.bool)
    mask[2, 2:], mask[2, :, 3:] = False, False
    mask[4, 0, 0] = False  # a hole stays
    predict(quiet_trainer, module(), batches(MAPS, mask=mask))
    sizes = [Image.open(tmp_path / f"predictions/00000{number}.png").size for number in range(7)]
    assert sizes == [(WIDTH, HEIGHT)] * 2 + [(3, 2)] + [(WIDTH, HEIGHT)] * 4


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["x/a.jpg", "x/b.png"], ["a", "b"]),
        (["x/a.jpg", "y/a.jpg"], ["000000_a", "000001_a"]),
        (["a.jpg", "A.png"], ["000000_a", "000001_A"]),  # one file, where cases do not count
        (["000001_a.png", "x/a.png", "y/a.png"], ["000000_000001_a", "000001_a", "000002_a"]),
        (["é.png", "é.png"], ["000000_é", "000001_é"]),
        (["x/é 1.tar.gz", "b"], ["é 1.tar", "b"]),
    ],
)
def test_names_of_files_do_not_collide(paths, expected):
    data = SimpleNamespace(identities=lambda part: Identities(paths, paths))
    stem_of = file_stems(data, lambda index: (paths[index], paths[index]), "test")
    assert [stem_of(index) for index in range(len(paths))] == expected


def test_masks_are_named_after_their_pictures(quiet_trainer, tmp_path):
    paths = [f"{'ab'[k % 2]}/{k}.jpg" for k in range(7)]
    predict(quiet_trainer, module(), batches(MAPS), paths=paths)
    rows = read(tmp_path / "predictions.csv")
    assert [(row["path"], row["prediction"]) for row in rows] == [
        (path, f"predictions/{k}.png") for k, path in enumerate(paths)
    ]
    found = np.array(Image.open(tmp_path / "predictions/6.png"))
    np.testing.assert_array_equal(found, MAPS[6].argmax(0))


def test_files_of_an_earlier_call_go(quiet_trainer, tmp_path):
    predict(quiet_trainer, module(), batches(MAPS))
    (tmp_path / "predictions" / "own.png").write_bytes(b"of somebody else")
    predict(quiet_trainer, module(), batches(MAPS[:2]))
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["000000.png", "000001.png", "own.png"]
    predict(quiet_trainer, module(-1), batches(MAPS[:, :, 0].movedim(1, -1)))
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["own.png"]
    assert not (tmp_path / "predictions.csv").exists()
    predict(quiet_trainer, module(), batches(MAPS))
    assert not (tmp_path / "predictions.jsonl").exists()


def test_several_loaders_have_folders(quiet_trainer, tmp_path):
    trainer = quiet_trainer(callbacks=[PredictionWriter()])
    trainer.predict(module(), [batches(MAPS[:2]), batches(MAPS[3:6])])
    names = [row["prediction"] for row in read(tmp_path / "predictions.csv")]
    assert names == [f"predictions/00000{k}.png" for k in range(2)] + [
        f"predictions/loader_1/00000{k}.png" for k in range(3)
    ]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / names[3])), MAPS[4].argmax(0))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_several_values_of_a_pixel_are_no_mask(task, quiet_trainer, tmp_path, caplog):
    with caplog.at_level("INFO"):
        predict(quiet_trainer, module(task=task), batches(MAPS))
    assert "of each pixel are no mask of one class" in caplog.text
    assert not (tmp_path / "predictions.csv").exists()


def test_volumes_are_no_masks():
    with pytest.raises(InputError, match="no map or sequence for each sample"):
        predicted_positions(torch.rand(2, 4, 3, 3, 3), "multiclass", 1)


# Tokens.

LENGTHS = torch.tensor([3, 1, 6, 2])
MASK = (torch.arange(6) < LENGTHS[:, None]).long()
TOKENS = torch.randn(4, 6, CLASSES, generator=torch.Generator().manual_seed(2))


class Tokens(nn.Module):
    def forward(self, logits, attention_mask):
        return logits


def tokens(task="multiclass", **kwargs):
    return SupervisedModule(Tokens(), class_dim=-1, task=task, **kwargs)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("names", [None, ["noun", "verb", "é", "other"]])
def test_a_line_for_each_sequence_without_padding(names, quiet_trainer, tmp_path):
    loader = batches({"logits": TOKENS, "attention_mask": MASK}, size=3)
    predict(quiet_trainer, tokens(), loader, paths=[f"{k}.txt" for k in range(4)], class_names=names)
    found = lines(tmp_path / "predictions.jsonl")
    assert [line["index"] for line in found] == [0, 1, 2, 3]
    assert [line["path"] for line in found] == [f"{k}.txt" for k in range(4)]
    for line, logits, length in zip(found, TOKENS, LENGTHS.tolist(), strict=True):
        classes = logits[:length].double().numpy().argmax(1).tolist()
        assert line["prediction"] == [names[k] if names else k for k in classes]


def test_lists_of_labels_and_of_values(quiet_trainer, tmp_path):
    loader = batches({"logits": TOKENS, "attention_mask": MASK})
    predict(quiet_trainer, tokens("multilabel"), loader)
    for line, logits, length in zip(lines(tmp_path / "predictions.jsonl"), TOKENS, LENGTHS.tolist(), strict=True):
        assert line["prediction"] == [[k for k in range(CLASSES) if token[k] > 0] for token in logits[:length]]
    predict(quiet_trainer, tokens("regression"), loader)
    for line, logits, length in zip(lines(tmp_path / "predictions.jsonl"), TOKENS, LENGTHS.tolist(), strict=True):
        np.testing.assert_allclose(line["prediction"], logits[:length].numpy(), rtol=1e-5)


# Regression.


@pytest.mark.parametrize("outputs", [1, 3])
def test_regressed_values_are_columns(outputs, quiet_trainer, tmp_path):
    values = 10 * torch.randn(7, outputs, generator=torch.Generator().manual_seed(3))
    predict(quiet_trainer, SupervisedModule(nn.Identity(), task="regression"), batches(values))
    rows = read(tmp_path / "predictions.csv")
    columns = ["output"] if outputs == 1 else [f"output_{k}" for k in range(outputs)]
    found = [[float(row[name]) for name in columns] for row in rows]
    np.testing.assert_allclose(found, values.numpy(), rtol=1e-5)
    assert {row["prediction"] for row in rows} == {""}


# Results of a test.


@pytest.fixture
def evaluate(quiet_trainer, tmp_path):
    def run(module, loader):
        logger = CSVLogger(tmp_path / "logs", name="name", version=0)
        folder = tmp_path / "logs/name/version_0"
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(module.student.state_dict(), folder / "student.safetensors", {})
        trainer = quiet_trainer(logger=logger, callbacks=[EvaluationWriter()])
        (logged,) = trainer.test(module, loader, verbose=False)
        result = read_result(folder, "test")
        return logged, result, result.predictions()

    return run


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor * x


def test_share_of_right_pixels_of_each_sample(evaluate):
    y = LABELS.clone()
    y[1, 0], y[2] = -100, -100  # void, and an unlabeled sample
    logged, result, rows = evaluate(SupervisedModule(Scaled(), class_dim=1), batches(MAPS, y))
    for row, labels, scores in zip(rows, y.numpy(), MAPS.numpy(), strict=True):
        known = labels != -100
        assert row.labels == known.sum()
        if known.any():
            assert row.correct == pytest.approx((scores.argmax(0) == labels)[known].mean(), rel=1e-6)
        else:
            assert math.isnan(row.correct) and row.label == ""
    assert result.samples == 6
    total = sum(row.correct * row.labels for row in rows if row.labels) / sum(row.labels for row in rows)
    assert total == pytest.approx(logged["test/accuracy"], rel=1e-5)


def test_other_masks_have_another_label_text(evaluate):
    module = SupervisedModule(Scaled(), class_dim=1)
    first = [row.label for row in evaluate(module, batches(MAPS, LABELS))[2]]
    other = LABELS.clone()
    other[3, 1, 1] = (other[3, 1, 1] + 1) % CLASSES
    second = [row.label for row in evaluate(module, batches(MAPS, other, size=2))[2]]
    assert [k for k, (one, two) in enumerate(zip(first, second, strict=True)) if one != two] == [3]


class ScaledTokens(Scaled):
    def forward(self, logits, attention_mask):
        return self.factor * logits


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_of_a_sequence_count_without_padding(causal, evaluate):
    y = torch.randint(0, CLASSES, (4, 6), generator=torch.Generator().manual_seed(4))
    module = SupervisedModule(ScaledTokens(), class_dim=-1, causal=causal)
    inputs = {"logits": TOKENS, "attention_mask": MASK}
    logged, _, rows = evaluate(module, batches(inputs, y.masked_fill(MASK == 0, -100)))
    for row, labels, scores, length in zip(rows, y.numpy(), TOKENS.numpy(), LENGTHS.tolist(), strict=True):
        predicted = scores[:length].argmax(1)
        right = predicted[:-1] == labels[1:length] if causal else predicted == labels[:length]
        assert row.labels == len(right)
        assert math.isnan(row.correct) if not len(right) else row.correct == pytest.approx(right.mean())
    total = sum(row.correct * row.labels for row in rows if row.labels) / sum(row.labels for row in rows)
    assert total == pytest.approx(logged["test/accuracy"], rel=1e-5)
    long = {"logits": torch.cat([TOKENS, TOKENS], 1), "attention_mask": nn.functional.pad(MASK, (0, 6))}
    padded = nn.functional.pad(y.masked_fill(MASK == 0, -100), (0, 6), value=-100)
    assert evaluate(module, batches(long, padded))[2] == rows or causal  # NaN of the shortest is not equal to itself


def test_binary_and_multilabel_maps(evaluate):
    y = (LABELS > 1).long()
    rows = evaluate(SupervisedModule(Scaled(), class_dim=1, task="binary"), batches(MAPS[:, :1], y))[2]
    expected = ((MAPS[:, 0] > 0) == (y > 0)).double().mean((1, 2)).tolist()
    assert [row.correct for row in rows] == pytest.approx(expected, rel=1e-6)
    y = (torch.rand(MAPS.shape, generator=torch.Generator().manual_seed(5)) > 0.5).float()
    rows = evaluate(SupervisedModule(Scaled(), class_dim=1, task="multilabel"), batches(MAPS, y))[2]
    expected = ((MAPS > 0) == (y > 0)).double().flatten(1).mean(1).tolist()
    assert [row.correct for row in rows] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_binary_labels_as_floats(shape, evaluate):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    y = torch.tensor([1.0, 0, 1, 0, 1, 0, math.nan]).view(shape)
    rows = evaluate(SupervisedModule(Scaled(), task="binary"), batches(logits, y))[2]
    assert [row.label for row in rows] == ["1", "0", "1", "0", "1", "0", ""]
    expected = ((logits > 0) == (y > 0.5)).flatten()[:6].double().tolist()
    assert [row.correct for row in rows[:6]] == expected


def test_several_labels_as_floats(evaluate):
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(8))
    y = (torch.rand(7, 3, generator=torch.Generator().manual_seed(9)) > 0.5).float()
    y[0, 0] = math.nan
    rows = evaluate(SupervisedModule(Scaled(), task="multilabel"), batches(logits, y))[2]
    known = ~y.isnan()
    expected = (((logits > 0) == (y > 0.5)) & known).sum(1) / known.sum(1)
    assert [row.correct for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3), (7, 40)])
def test_error_of_each_regressed_sample(shape, evaluate):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    y = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    if len(shape) > 1 and shape[1] > 1:
        y[2, 1], y[3] = math.nan, math.nan
    logged, result, rows = evaluate(SupervisedModule(Scaled(), task="regression"), batches(values, y))
    expected = np.abs(values.double().numpy() - y.double().numpy()).reshape(7, -1)
    for row, errors in zip(rows, expected, strict=True):
        known = errors[~np.isnan(errors)]
        assert row.labels == len(known)
        assert math.isnan(row.correct)
        assert math.isnan(row.error) if not len(known) else row.error == pytest.approx(known.mean(), rel=1e-6)
    total = sum(row.error * row.labels for row in rows if row.labels) / sum(row.labels for row in rows)
    assert total == pytest.approx(logged["test/mae"], rel=1e-5)
    assert result.samples == sum(bool(row.labels) for row in rows)


def test_error_of_a_regressed_map(evaluate):
    y = MAPS[:, :1] + torch.linspace(0, 1, 7)[:, None, None, None]
    logged, _, rows = evaluate(SupervisedModule(Scaled(), class_dim=1, task="regression"), batches(MAPS[:, :1], y))
    assert [row.error for row in rows] == pytest.approx(torch.linspace(0, 1, 7).tolist(), abs=1e-6)
    assert logged["test/mae"] == pytest.approx(0.5, rel=1e-5)


# Several processes.

SCRIPT = """
    import sys
    sys.path.insert(0, {folder!r})
    from test_dense_predictions import *
    from lightning.pytorch import Trainer

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 7
        def __getitem__(self, k):
            return MAPS[k], LABELS[k]

    if __name__ == "__main__":
        torch.set_num_threads(1)
        torch.manual_seed(0)
        module = SupervisedModule(Scaled(), class_dim=1)
        logger = CSVLogger({root!r}, name="name", version=0)
        trainer = Trainer(
            accelerator="cpu", devices={devices}, strategy={strategy!r}, logger=logger, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[PredictionWriter(), EvaluationWriter()],
        )
        folder = Path({root!r}) / "name/version_0"
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(module.student.state_dict(), folder / "student.safetensors", {{}})
        loader = DataLoader(Rows(), 2)
        trainer.test(module, loader, verbose=False)
        trainer.predict(module, loader, return_predictions=False)
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    for devices, strategy in ((1, "auto"), (2, "ddp")):
        root = tmp_path / str(devices)
        script = tmp_path / f"run{devices}.py"
        text = textwrap.dedent(SCRIPT)
        script.write_text(
            text.format(folder=str(Path(__file__).parent), root=str(root), devices=devices, strategy=strategy)
        )
        processes.run_ranks([script.name], world=devices)
    one, two = (tmp_path / number / "name/version_0" for number in "12")
    assert (one / "predictions.csv").read_text() == (two / "predictions.csv").read_text()
    assert read_result(one, "test").predictions() == read_result(two, "test").predictions() != []
    names = sorted(path.name for path in (one / "predictions").iterdir())
    assert names == sorted(path.name for path in (two / "predictions").iterdir()) != []
    for name in names:
        assert (one / "predictions" / name).read_bytes() == (two / "predictions" / name).read_bytes()
