"""export, from its command line: the content of each format, its logits against PyTorch's, and bad input."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from onnx import numpy_helper
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.__main__ import main
from kd_lightning.data import Digits
from kd_lightning.data.evaluation_batches import calibration_batches
from kd_lightning.data.preprocessing import describe_preprocessing
from kd_lightning.data.splits import make_split
from kd_lightning.deploy.comparison import (
    QUANTIZED_TOLERANCE,
    TOLERANCE,
    Comparison,
    collect_logits,
    compare_logits,
)
from kd_lightning.deploy.export import FORMATS, export_student, load_exported, read_file_metadata
from kd_lightning.deploy.exporter import infer_task, predictor
from kd_lightning.deploy.metadata import KEYS
from kd_lightning.deploy.signature import without_last_token
from kd_lightning.errors import InputError
from kd_lightning.losses.base import predicted_labels
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import SupervisedModule
from kd_lightning.quantization.calibration import calibrate
from kd_lightning.quantization.layers import quantize
from kd_lightning.quantization.sizes import weight_levels
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import load_weights, save_weights

IMAGES = Digits().load().train.images.tensors[0]
SUFFIXES = ["onnx", "pt2", "safetensors"]
PREDICT = partial(predicted_labels, task="multiclass")


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """Runs of a float and of a quantised student, not to be changed."""
    folder = tmp_path_factory.mktemp("export")
    config = yaml.safe_load((root / "configs/student_digits.yaml").read_text())
    config["trainer"] |= {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": str(folder)}
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    plain = {"class_path": "DigitsCNN", "init_args": {"width": 4}}
    torch.manual_seed(0)
    torch.save(calibrate(quantize(DigitsCNN(4), 4), [IMAGES[:128]]).state_dict(), folder / "start.pt")
    quant = {"class_path": "kd_lightning.quantization.quantize", "init_args": {"model": plain, "weight_bits": 4}}
    start = {"class_path": "kd_lightning.load_weights", "init_args": {"model": quant, "path": str(folder / "start.pt")}}
    for name, student in {"plain": plain, "quant": start}.items():
        config |= {"name": name}
        config["model"]["init_args"]["student"] = student
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        main(["fit", "--config", str(folder / "config.yaml")])
    (folder / "start.pt").unlink()  # export does not need the weights that the student started from
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the float student's run."""
    return Path(shutil.copytree(trained / "plain/version_0", tmp_path / "run"))


def network(trained, name):
    fresh = quantize(DigitsCNN(4), 4) if name == "quant" else DigitsCNN(4)
    return load_weights(fresh, trained / name / "version_0/student.safetensors").eval()


@pytest.fixture(scope="module")
def files(trained):
    """The files of both runs, and the lines printed for each."""
    folder, printed = trained / "out", {}
    for name in ("plain", "quant"):
        for suffix in SUFFIXES:
            path = folder / f"{name}.{suffix}"
            with pytest.MonkeyPatch.context() as patch:
                lines = []
                patch.setattr("builtins.print", lambda *a, lines=lines, **_: lines.append(" ".join(map(str, a))))
                main(["export", str(trained / name / "version_0"), "--out", str(path)])
            printed[path.name] = "\n".join(lines)
    assert sorted(path.name for path in folder.iterdir()) == sorted(printed)  # and no other files
    return folder, printed


def run_file(path, x, name):
    """An independent reader of each format."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    return load_weights(quantize(DigitsCNN(4), 4) if name == "quant" else DigitsCNN(4), path).eval()(x)


@pytest.mark.parametrize("name", ["plain", "quant"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_logits_and_metadata(trained, files, name, suffix):
    folder, printed = files
    path, net = folder / f"{name}.{suffix}", network(trained, name)
    for count in (1, 3, 100):
        x = IMAGES[-count:]
        with torch.no_grad():
            expected, found = net(x), run_file(path, x, name)
        top = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=top * (1e-5 if name == "plain" else 2e-2))
    if suffix == "onnx":
        model = onnx.load(path)
        found = {entry.key: entry.value for entry in model.metadata_props}
        assert model.opset_import[0].version == 17 == int(found.pop("opset"))
        assert found.pop("onnx")
    elif suffix == "pt2":
        extra = {"metadata.json": ""}
        torch.export.load(path, extra_files=extra)
        found = json.loads(extra["metadata.json"])
    else:
        with safe_open(path, "pt") as content:
            found = content.metadata()
    assert ("brevitas" in found) == (name == "quant")
    assert found["kd_lightning"]
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads(found["classes"]) == [*"0123456789"]
    assert json.loads(found["input_shape"]) == [1, 8, 8]
    assert found["task"] == "multiclass"
    assert found["transform"] == repr(Digits().eval_transform)
    assert json.loads(found["preprocessing"]) == describe_preprocessing(Digits().eval_transform, (1, 8, 8))
    run = Run(trained / name / "version_0")
    assert (found["run"], found["weights_sha256"]) == (run.identity, run.weights_hash)
    assert found["input_dtype"] == "float32"
    val = run.datamodule().val_dataloader()
    right = sum(int((network(trained, name)(batch.x).argmax(1) == batch.y).sum()) for batch in val)
    assert json.loads(found["accuracy"]) == {
        "part": "validation",
        "correct": right,
        "n": 119,
        "value": right / 119,
    }
    assert found["precision"] == ("fp32" if name == "plain" else "8A-4W")
    assert (found["file"], found["weights"]) == ("student.safetensors", "step 34")
    assert str(trained).encode() not in path.read_bytes()
    assert sys.prefix.encode() not in path.read_bytes()  # nor the folders of the exporting machine
    text = printed[path.name]
    assert "checked on 119 validation images" in text
    assert "100.00 % of the predictions agree (0 of 119 differ)" in text
    assert f"{path.stat().st_size / 1000:.1f} KB" in text
    assert ("opset 17" in text) == (suffix == "onnx")
    assert ("default settings" in text) == (name == "quant" and suffix == "onnx")
    assert ("in 8 bits" in text) == (name == "quant" and suffix == "onnx")


def test_onnx_holds_integers(trained, files):
    model = onnx.load(files[0] / "quant.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] == 2  # the inputs of two layers
    assert kinds["DequantizeLinear"] == 4  # and their weights
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    held = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    integers = {array.shape: array for array in held if array.dtype == np.int8 and array.ndim == 4}
    net = network(trained, "quant")
    assert set(integers) == {(8, 4, 3, 3), (16, 8, 3, 3)}
    for layer in (net[3], net[7]):
        levels = weight_levels(layer)[1].numpy()
        assert np.array_equal(integers[levels.shape], levels)
        assert 1 < len(np.unique(levels)) <= 15
    assert {array.shape for array in held if array.dtype == np.float32 and array.ndim == 4} == {(4, 1, 3, 3)}


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(2, -2, 1), ("ternary", -1, 1), (8, -127, 127)])
def test_levels_of_other_precisions(tmp_path, bits, lowest, highest):
    torch.manual_seed(0)
    net = calibrate(quantize(DigitsCNN(4), bits, skip=()), [IMAGES[:64]]).eval()
    batches = [IMAGES[:1], IMAGES[1:50]]
    export_student(net, batches[0], tmp_path / "x.onnx", "onnx", {})
    result = compare_logits(
        collect_logits(net, batches),
        collect_logits(load_exported(tmp_path / "x.onnx", "onnx", DigitsCNN), batches),
        PREDICT,
    )
    assert result.agrees(QUANTIZED_TOLERANCE)
    held = [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "x.onnx").graph.initializer]
    weights = [array for array in held if array.dtype == np.int8 and array.ndim > 1]
    assert len(weights) == 4
    assert (min(w.min() for w in weights), max(w.max() for w in weights)) == (lowest, highest)


def test_biases_stay_as_written(tmp_path):
    """By default, onnxruntime rounds the biases of such networks to integers."""
    torch.manual_seed(0)
    first = [nn.ConvTranspose2d(1, 8, 2), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2), nn.ReLU()]
    net = quantize(nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 10)), 4, skip=())
    calibrate(net, [IMAGES[:64]]).eval()
    batches, path = IMAGES.split(100), tmp_path / "x.onnx"
    export_student(net, batches[0], path, "onnx", {})
    expected = collect_logits(net, batches)
    written = compare_logits(expected, collect_logits(load_exported(path, "onnx", DigitsCNN), batches), PREDICT)
    assert written.agrees(QUANTIZED_TOLERANCE)
    rewritten = collect_logits(load_exported(path, "onnx", DigitsCNN, as_written=False), batches)
    assert compare_logits(expected, rewritten, PREDICT).typical > 100 * written.typical


@pytest.mark.slow
def test_torch_export_needs_neither_brevitas_nor_this_package(trained, files):
    code = "import sys, torch\nsys.modules |= {'brevitas': None, 'kd_lightning': None}\n"
    code += f"print(torch.export.load({str(files[0] / 'quant.pt2')!r}).module()(torch.ones(5, 1, 8, 8)).tolist())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        expected = network(trained, "quant")(torch.ones(5, 1, 8, 8))
    torch.testing.assert_close(torch.tensor(json.loads(found.splitlines()[-1])), expected)


def spoil_scale(factor):
    def spoil(model):
        scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        tensor = next(t for t in model.graph.initializer if t.name in scales and len(t.dims) == 1)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))

    return spoil


def swap_channels(model):
    tensor = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4)
    levels = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.roll(levels, 1, axis=0), tensor.name))


@pytest.mark.parametrize("spoil", [spoil_scale(1.2), spoil_scale(1.02), swap_channels])
def test_spoiled_file_does_not_agree(trained, files, tmp_path, spoil):
    batches, net = IMAGES.split(64), network(trained, "quant")
    model = onnx.load(files[0] / "quant.onnx")
    expected = collect_logits(net, batches)
    good = compare_logits(
        expected, collect_logits(load_exported(files[0] / "quant.onnx", "onnx", DigitsCNN), batches), PREDICT
    )
    spoil(model)
    onnx.save(model, tmp_path / "spoiled.onnx")
    bad = compare_logits(
        expected, collect_logits(load_exported(tmp_path / "spoiled.onnx", "onnx", DigitsCNN), batches), PREDICT
    )
    assert good.agrees(QUANTIZED_TOLERANCE)
    assert not bad.agrees(QUANTIZED_TOLERANCE)


def test_comparison_by_hand():
    expected = torch.tensor([[1.0, 0.0], [0.0, -4.0], [1.0, 2.0]])
    found = torch.tensor([[1.0, 0.1], [0.0, -4.0], [2.5, 2.0]])
    result = compare_logits(expected, found, PREDICT)
    assert result == pytest.approx((3, 1.5, 1.5 / 4, 0.1 / 4, 3, 1))
    assert result.agreement == pytest.approx(2 / 3)
    result = compare_logits(expected, found, partial(predicted_labels, task="multilabel"))
    assert (result.predictions, result.changed) == (6, 1)  # 0.1 is a yes, 0 is none
    assert compare_logits(torch.zeros(2, 3), torch.zeros(2, 3), PREDICT).agrees(0)
    assert not compare_logits(expected, expected * torch.nan, PREDICT).agrees(1)
    with pytest.raises(InputError, match=re.escape("logits of shape [3, 1], PyTorch [3, 2]")):
        compare_logits(expected, found[:, :1], PREDICT)


@pytest.mark.parametrize(
    ("relative", "typical", "decisions", "changed", "good"),
    [
        (0.05, 0.005, 119, 1, True),
        (0.051, 0.0, 119, 0, False),
        (0.04, 0.0051, 119, 0, False),
        (0.05, 0.0, 119, 2, False),
        (0.05, 0.0, 4000, 5, True),
        (0.05, 0.0, 4000, 6, False),
    ],
)
def test_what_agrees(relative, typical, decisions, changed, good):
    assert Comparison(decisions, 1.0, relative, typical, decisions, changed).agrees(0.05) == good


def test_networks_that_wrap_their_logits(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = DigitsCNN(4)

        def forward(self, x):
            return {"features": x, "logits": self.inner(x)}

    net, x = Wrapped().eval(), IMAGES[:5]
    for form, name in {"onnx": "x.onnx", "torch_export": "x.pt2"}.items():
        export_student(net, x, tmp_path / name, form, {})
        found = load_exported(tmp_path / name, form, Wrapped)(x)
        torch.testing.assert_close(found, net.inner(x).detach(), rtol=1e-4, atol=1e-5)


def test_fixed_batch_shows(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(int(x.shape[0]), 64)

    export_student(Fixed(), IMAGES, tmp_path / "x.onnx", "onnx", {})
    with pytest.raises(InputError, match=re.escape("the student fails on a batch of shape [3, 1, 8, 8]")):
        collect_logits(load_exported(tmp_path / "x.onnx", "onnx", Fixed), [IMAGES[:2], IMAGES[:3]])


def test_network_that_cannot_be_exported(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(InputError, match="Branching cannot be exported as torch_export: GuardOnDataDependentSymNode"):
        export_student(Branching(), IMAGES, tmp_path / "x.pt2", "torch_export", {})


def test_task():
    run = SimpleNamespace(model_arguments={"task": "multilabel"}, metadata={})
    assert infer_task(run, torch.zeros(2, 1)) == "multilabel"
    run.model_arguments = {}
    assert [infer_task(run, torch.zeros(2, *shape)) for shape in [(), (1,), (3,)]] == [
        "binary",
        "binary",
        "multiclass",
    ]
    for metadata, task in (({"task": "multilabel"}, "multilabel"), ({"task": "null"}, "multiclass")):
        assert infer_task(SimpleNamespace(model_arguments={}, metadata=metadata), torch.zeros(2, 3)) == task


def test_checkpoint_and_format(run, tmp_path, capsys):
    (run / "student.safetensors").unlink()
    checkpoint = next((run / "checkpoints").glob("last*.ckpt"))
    out = tmp_path / "new/folder/deployed"
    main(["export", str(run), "--out", str(out), "--format", "safetensors", "--checkpoint", str(checkpoint)])
    renamed = out.rename(out.with_suffix(".safetensors"))
    found, expected = load_weights(DigitsCNN(4), renamed), load_weights(DigitsCNN(4), checkpoint)
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    with safe_open(renamed, "pt") as content:
        assert content.metadata()["file"] == content.metadata()["weights"] == checkpoint.name
    text = capsys.readouterr().out
    assert "deployed: safetensors, fp32" in text
    assert f"its weights are those of {checkpoint}\n" in text


def test_output_names_the_deployed_weights(trained, files):
    """Their metadata has the checkpoint or the step."""
    path = trained / "plain/version_0/student.safetensors"
    for suffix in SUFFIXES:
        assert f"its weights are the deployed ones, {path} (step 34)\n" in f"{files[1][f'plain.{suffix}']}\n"


def test_training_images_without_a_validation_part(run, tmp_path, capsys):
    make_split(Digits().load().train.targets, 3, 0, 0).save(run / "split.json")
    main(["export", str(run), "--out", str(tmp_path / "x.safetensors")])
    assert "checked on 30 training images" in capsys.readouterr().out


def test_images_without_labels(run, tmp_path, capsys):
    """A student that learned from its teacher alone has no labels, and a file needs none."""
    make_split(Digits().load().train.targets, 0, 0, 0).save(run / "split.json")
    change("data.init_args.unlabeled", "rest")(run)
    main(["export", str(run), "--out", str(tmp_path / "x.safetensors")])
    assert re.search(r"checked on \d{3,} training images", capsys.readouterr().out)


def test_images_are_those_of_the_runs_own_split(run, tmp_path, capsys):
    """The config may name a label file that is gone, and a split of another day."""
    make_split(Digits().load().train.targets, 3, 2, 0).save(run / "split.json")
    change("data.init_args.label_file", str(tmp_path / "gone.csv"))(run)
    main(["export", str(run), "--out", str(tmp_path / "x.safetensors")])
    assert "checked on 20 validation images" in capsys.readouterr().out


def test_classes_are_those_of_the_fit(run, tmp_path):
    """The folders of a source may have other names by now."""
    names = [*"abcdefghij"]
    save_weights(DigitsCNN(4).state_dict(), run / "student.safetensors", {"classes": names})
    main(["export", str(run), "--out", str(tmp_path / "x.safetensors")])
    with safe_open(tmp_path / "x.safetensors", "pt") as content:
        assert json.loads(content.metadata()["classes"]) == names


def test_file_that_does_not_agree_is_not_written(trained, tmp_path, capsys):
    out = tmp_path / "student.onnx"
    out.write_text("the good one of yesterday")
    with pytest.raises(SystemExit) as end:
        main(["export", str(trained / "plain/version_0"), "--out", str(out), "--tolerance", "0"])
    assert end.value.code == 1
    assert "STOP: the file does not agree with PyTorch" in capsys.readouterr().out
    assert out.read_text() == "the good one of yesterday"
    assert [*tmp_path.iterdir()] == [out]


def change(key, value):
    def apply(run):
        config = yaml.safe_load((run / "config.yaml").read_text())
        node = config
        for name in key.split(".")[:-1]:
            node = node[name]
        node[key.split(".")[-1]] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return apply


GONE = {"class_path": "ImageFolder", "init_args": {"train": "gone/images"}}


@pytest.mark.parametrize(
    ("spoil", "args", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), [], "run is no run: it has no config.yaml"),
        (
            lambda run: None,
            ["--format", "tflite"],
            "format must be one of onnx, onnx_fp16, onnx_int8, torch_export, executorch, safetensors, got 'tflite'",
        ),
        (
            lambda run: None,
            ["--out", "student.pt"],
            "out must end in .onnx, .fp16.onnx, .int8.onnx, .pt2, .pte, .safetensors, or --format",
        ),
        (lambda run: None, ["--tolerance", "-1"], "tolerance must be at least 0, got -1"),
        (lambda run: None, ["--tolerance", "nan"], "tolerance must be at least 0, got nan"),
        (
            lambda run: (run / "student.safetensors").unlink(),
            [],
            "--ckpt_path last, or name one of run/checkpoints/",
        ),
        (lambda run: None, ["--checkpoint", "no.ckpt"], "no weights file at no.ckpt"),
        (lambda run: (run / "config.yaml").write_text("a: [b"), [], "config.yaml cannot be read: "),
        (lambda run: (run / "config.yaml").write_text("3"), [], "config.yaml is not the config of a run"),
        (change("model.init_args", {"net": 3}), [], "run: kd_lightning.SupervisedModule has no student"),
        (change("model.init_args.student.init_args.width", 8), [], "student.safetensors do not fit DigitsCNN"),
        (change("model.init_args.student.class_path", "my.Net"), [], "the student of run cannot be built"),
        (change("data", None), [], "config.yaml has no data"),
        (change("data.init_args.source", GONE), [], "the data of run cannot be read"),
        (lambda run: Path("x.onnx").mkdir(), ["--out", "x.onnx"], "x.onnx cannot be written: it is a folder"),
        (lambda run: Path("file").touch(), ["--out", "file/x.onnx"], "cannot be written: "),
    ],
)
def test_wrong_input(run, fails, monkeypatch, spoil, args, message):
    monkeypatch.chdir(run.parent)
    spoil(run)
    before = set(run.parent.rglob("*"))
    assert message in fails("export", "run", *([] if "--out" in args else ["--out", "student.onnx"]), *args)
    assert set(run.parent.rglob("*")) == before


def test_folder_of_runs_and_nothing_trained(run, fails):
    shutil.rmtree(run / "checkpoints")
    (run / "student.safetensors").unlink()
    assert "no student.safetensors; train it first" in fails("export", str(run), "--out", "x.onnx")
    assert "name one of its runs: run" in fails("export", str(run.parent), "--out", "x.onnx")


@pytest.mark.parametrize(("name", "package"), [("plain", "onnx"), ("plain", "onnxruntime"), ("quant", "onnxoptimizer")])
def test_without_the_extra(trained, fails, monkeypatch, tmp_path, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    found = fails("export", str(trained / name / "version_0"), "--out", str(tmp_path / "x.onnx"))
    assert "onnx needs the extra export: pip install 'kd-lightning[export]'" in found
    assert not [*tmp_path.iterdir()]


def test_tolerances_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"default {TOLERANCE:g}, for quantised students {QUANTIZED_TOLERANCE:g}" in text


# Formats that round, and all formats.


@pytest.fixture(scope="module")
def good(trained, tmp_path_factory):
    """A run whose student is trained well: rounding shows in accuracy, not on random weights."""
    run = Path(shutil.copytree(trained / "plain/version_0", tmp_path_factory.mktemp("good") / "run"))
    data = Run(run).datamodule()
    rows = data.split.labeled + data.split.unlabeled
    x, y = IMAGES[rows], Digits().load().train.targets[rows]
    torch.manual_seed(0)
    net = DigitsCNN(4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    save_weights(net.state_dict(), run / "student.safetensors", Run(run).metadata)
    assert accuracy_of(net.eval(), data) > 0.9
    return run


def accuracy_of(network, data):
    """Right predictions on the validation part."""
    right = [network(batch.x).argmax(1) == batch.y for batch in data.val_dataloader()]
    return float(torch.cat(right).float().mean())


@pytest.fixture(scope="module")
def every(good):
    """All files of the well-trained run, and what was printed."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, **_: lines.append(" ".join(map(str, a))))
        patch.setattr("rich.console.Console.print", lambda self, table: lines.append(table))
        main(["export", str(good), "--all"])
    return good / "export", lines


def test_all_formats_are_in_the_table(every):
    folder, lines = every
    table = next(line for line in lines if not isinstance(line, str))
    names, sizes, latencies, _, accuracies, differences = ([*column.cells] for column in table.columns)
    installed = importlib.util.find_spec("executorch") is not None
    expected = [name for name in FORMATS if name != "executorch" or installed]
    assert names == ["PyTorch", *expected]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"student{FORMATS[name]}" for name in expected)
    for name, size in zip(names[1:], sizes[1:], strict=True):
        assert float(size) == pytest.approx((folder / f"student{FORMATS[name]}").stat().st_size / 1000, abs=0.1)
    assert all(float(latency) > 0 for latency in latencies)
    assert all("of 119)" in accuracy for accuracy in accuracies)
    assert all(float(difference) < 1e-4 for name, difference in zip(names, differences, strict=True) if name == "onnx")
    text = "\n".join(line for line in lines if isinstance(line, str))
    assert ("left out: executorch needs the extra edge: pip install 'kd-lightning[edge]'" in text) != installed


# float16 rounds weights and activations of four layers by 2^-11 each, together 4e-3
@pytest.mark.parametrize(("name", "limit", "size"), [("fp16", 4e-3, 0.75), ("int8", 0.1, 0.75)])
def test_rounded_files(good, every, name, limit, size):
    path = every[0] / f"student.{name}.onnx"
    data, net = Run(good).datamodule(), load_weights(DigitsCNN(4), good / "student.safetensors").eval()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float)"

    def run(x):
        return torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])

    with torch.no_grad():
        expected, found = net(IMAGES[:200]), run(IMAGES[:200])
    assert 0 < float((found - expected).abs().max() / expected.abs().max()) < limit
    before, after = accuracy_of(net, data), accuracy_of(run, data)
    assert after >= before - 0.02
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["accuracy"])["value"] == pytest.approx(after, abs=1e-6)
    assert metadata["format"] == f"onnx_{name}"
    assert metadata["onnxruntime"] == onnxruntime.__version__
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4]
    kind = {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[name]
    assert len(weights) == 3 and all(tensor.data_type == kind for tensor in weights)
    if name == "int8":
        levels = np.concatenate([numpy_helper.to_array(tensor).ravel() for tensor in weights])
        assert levels.min() >= -64 and levels.max() <= 64  # 7 bits: CPUs without VNNI overflow with 8


def test_a_rounded_file_that_is_worse_is_not_written(good, tmp_path, capsys, monkeypatch):
    """Ranges of other inputs spoil the integers."""
    monkeypatch.setattr(
        "kd_lightning.deploy.exporter.calibration_batches", lambda *_: [SimpleNamespace(x=IMAGES[:64] * 0.01)]
    )
    with pytest.raises(SystemExit) as end:
        main(["export", str(good), "--out", str(tmp_path / "student.int8.onnx")])
    assert end.value.code == 1
    text = capsys.readouterr().out
    assert re.search(
        r"STOP: .*PyTorch \(\d+ of 119 predictions are wrong that PyTorch has right, allowed are 1 \+ 0.01", text
    )
    assert not [*tmp_path.iterdir()]


def test_calibration_is_on_training_images_under_the_evaluation_transform(good):
    data = Run(good).datamodule()
    found = torch.cat([batch.x for batch in calibration_batches(data, torch.device("cpu"), 100)])
    assert found.shape == (100, 1, 8, 8)
    own = {tuple(image.flatten().tolist()) for image in IMAGES[data.split.labeled + data.split.unlabeled]}
    val = {tuple(image.flatten().tolist()) for image in IMAGES[data.split.val]}
    drawn = {tuple(image.flatten().tolist()) for image in found}
    assert drawn <= own and len(drawn & val) <= len(own & val)
    again = torch.cat([batch.x for batch in calibration_batches(data, torch.device("cpu"), 100)])
    assert torch.equal(found, again)


@pytest.mark.parametrize("name", ["onnx_fp16", "onnx_int8", "executorch"])
def test_students_of_low_precision_are_refused(trained, fails, tmp_path, name):
    args = ["export", str(trained / "quant/version_0"), "--out", str(tmp_path / "x"), "--format", name]
    assert f"{name} takes float students; onnx holds the integers of one of low precision" in fails(*args)
    assert not [*tmp_path.iterdir()]


def test_all_of_a_student_of_low_precision(trained, tmp_path, capsys):
    main(["export", str(trained / "quant/version_0"), "--all", "--out", str(tmp_path / "all")])
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [f"student.{suffix}" for suffix in SUFFIXES]
    text = capsys.readouterr().out
    for name in ("onnx_fp16", "onnx_int8", "executorch"):
        assert f"left out: {name}: takes float students\n" in text


def test_default_path_and_options_that_do_not_fit(run, fails, capsys):
    main(["export", str(run)])
    assert [path.name for path in (run / "export").iterdir()] == ["student.onnx"]
    main(["export", str(run), "--format", "safetensors"])
    assert (run / "export/student.safetensors").is_file()
    capsys.readouterr()
    assert "--all writes all formats; leave out one of --format and --all" in fails(
        "export", str(run), "--all", "--format", "onnx"
    )
    file = str(run / "config.yaml")
    assert f"out must be a folder with --all, got the file {file}" in fails("export", str(run), "--all", "--out", file)


class Reads(SupervisedModule):
    """Reads a batch, and calls its network, in its own way."""

    def unpack(self, batch):
        batch = super().unpack(batch)
        return replace(batch, x=1 - batch.x)

    def call(self, network, x):
        return 3 * network(x)


def test_a_module_that_reads_and_calls_in_its_own_way(run, tmp_path, capsys):
    """The file does as the module does, and no picture's way to the input is described that is not the module's."""
    change("model.class_path", f"{__name__}.Reads")(run)
    out = tmp_path / "x.pt2"
    main(["export", str(run), "--out", str(out)])
    data, student = Run(run).datamodule(), Run(run).student().eval()
    x, y = (torch.cat(parts) for parts in zip(*((batch.x, batch.y) for batch in data.val_dataloader()), strict=True))
    torch.testing.assert_close(torch.export.load(out).module()(x), 3 * student(x), rtol=1e-4, atol=1e-4)
    metadata = read_file_metadata(out)
    correct = json.loads(metadata["accuracy"])["correct"]
    assert correct == int((student(1 - x).argmax(1) == y).sum()) != int((student(x).argmax(1) == y).sum())
    assert metadata["preprocessing"] == "null"
    assert "do not describe the way from a picture to the input" in capsys.readouterr().out


class Loaders(LightningDataModule):
    """Pairs of another project; ``hooked`` turns them where they come to the device."""

    eval_transform = Digits().eval_transform

    def __init__(self, hooked: bool = False) -> None:
        super().__init__()
        self.hooked = hooked
        if hooked:
            self.on_after_batch_transfer = lambda batch, dataloader_idx: [1 - batch[0], batch[1]]

    def val_dataloader(self):
        part = Digits().load().train
        return DataLoader(TensorDataset(part.images.tensors[0][:60], part.targets[:60]), 30)

    train_dataloader = val_dataloader


@pytest.mark.parametrize("hooked", [False, True])
def test_data_of_the_user_are_described_without_hooks_alone(run, tmp_path, hooked):
    change("data", {"class_path": f"{__name__}.Loaders", "init_args": {"hooked": hooked}})(run)
    (run / "split.json").unlink()
    main(["export", str(run), "--out", str(tmp_path / "x.safetensors")])
    found = read_file_metadata(tmp_path / "x.safetensors")
    x, y = IMAGES[:60], Digits().load().train.targets[:60]
    correct = int((Run(run).student().eval()(1 - x if hooked else x).argmax(1) == y).sum())
    assert json.loads(found["accuracy"])["correct"] == correct
    assert (found["preprocessing"] == "null") == hooked


def test_preprocessing_that_gives_other_inputs_is_not_described(run, tmp_path, monkeypatch, capsys):
    wrong = describe_preprocessing(Digits().eval_transform, (1, 8, 8)) | {"mean": [0.1], "std": [1.0]}
    monkeypatch.setattr("kd_lightning.deploy.exporter.describe_data", lambda *_: wrong)
    main(["export", str(run), "--out", str(tmp_path / "x.safetensors")])
    assert read_file_metadata(tmp_path / "x.safetensors")["preprocessing"] == "null"
    assert "do not describe the way from a picture to the input" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_are_read_by_one_function(files, suffix, tmp_path):
    found = read_file_metadata(files[0] / f"plain.{suffix}")
    assert found["format"] == FORMAT_OF[suffix]
    assert found.keys() - {"torch", "onnx"} <= KEYS.keys()
    (tmp_path / f"x.{suffix}").write_bytes(b"no file of that kind")
    with pytest.raises(InputError, match=f"x.{suffix} cannot be read: "):
        read_file_metadata(tmp_path / f"x.{suffix}")


@pytest.mark.slow
def test_executorch(good, tmp_path):
    runtime = pytest.importorskip("executorch.runtime")
    path = tmp_path / "student.pte"
    main(["export", str(good), "--out", str(path)])
    method = runtime.Runtime.get().load_program(path).load_method("forward")
    net = load_weights(DigitsCNN(4), good / "student.safetensors").eval()
    for x in IMAGES[:20].split(1):
        with torch.no_grad():
            torch.testing.assert_close(method.execute([x])[0], net(x), rtol=1e-4, atol=1e-4)
    found = read_file_metadata(path)
    assert json.loads(found["preprocessing"]) == describe_preprocessing(Digits().eval_transform, (1, 8, 8))
    assert found["format"] == "executorch"
    assert sys.prefix.encode() not in path.read_bytes() and str(good).encode() not in path.read_bytes()


# Dense outputs, several inputs, and values.

WORDS, TAGS = 12, 3
FORMAT_OF = {"onnx": "onnx", "pt2": "torch_export", "safetensors": "safetensors"}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer = nn.Embedding(WORDS, 5), nn.Conv1d(5, TAGS, 3, padding=1)

    def forward(self, input_ids, attention_mask):
        words = self.words(input_ids) * attention_mask.unsqueeze(-1)
        return self.layer(words.transpose(1, 2)).transpose(1, 2)


class Fixed5(Tagger):
    """It holds a number for each of 5 tokens."""

    def forward(self, input_ids, attention_mask):
        length = int(input_ids.shape[1])
        return super().forward(input_ids, attention_mask) + torch.arange(length).view(1, length, 1)


def sequences(count, length):
    ids = torch.randint(WORDS, (count, length), generator=torch.Generator().manual_seed(length))
    mask = (torch.arange(length) < 1 + torch.arange(count)[:, None] % length).long()
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sequences_of_any_length(tmp_path, suffix):
    path, file_format = tmp_path / f"x.{suffix}", FORMAT_OF[suffix]
    net = Tagger().eval()
    export_student(net, sequences(4, 5), path, file_format, {})
    load = load_exported(path, file_format, Tagger)
    for count, length in ((1, 5), (3, 9), (2, 2)):
        x = sequences(count, length)
        with torch.no_grad():
            torch.testing.assert_close(load(x), net(**x), rtol=1e-5, atol=1e-6)
    if suffix == "onnx":  # an independent reader
        x = {name: part.numpy() for name, part in sequences(3, 7).items()}
        found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], x)[0]
        expected = net(**sequences(3, 7)).detach().numpy()
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_outputs_of_several_lengths_are_compared(tmp_path):
    batches = [sequences(2, 5), sequences(3, 8)]
    logits = collect_logits(lambda x: Tagger()(**x), batches)
    assert logits.shape == (5, 8, TAGS)
    assert (logits[:2, 5:] == 0).all()


def test_a_length_that_is_fixed_is_found(tmp_path):
    """A trace holds the length as a number."""
    net, path = Fixed5().eval(), tmp_path / "x.onnx"
    x = sequences(4, 5)
    export_student(net, x, path, "onnx", {})
    batches = [x, without_last_token(x)]
    with pytest.raises(
        InputError, match=r"fails on a batch of shape \{input_ids: \[4, 4\], attention_mask: \[4, 4\]\}"
    ):
        collect_logits(load_exported(path, "onnx", Fixed5), batches)


def test_predictions_of_maps_are_in_their_dimension():
    logits = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[0, :, 1, 1] = logits[0, :, 1, 1].flip(0)
    found = compare_logits(logits, other, predictor("multiclass", 1))
    assert (found.predictions, found.changed) == (2 * 3 * 5, 1)
    values = compare_logits(logits, logits + 1e-6, predictor("regression", 1))
    assert (values.predictions, values.changed) == (0, 0) and values.agrees(1e-4)


def test_nested_inputs_are_refused():
    with pytest.raises(InputError, match="export needs a student that takes tensors, by position or by name"):
        export_student(Tagger(), {"a": {"b": torch.zeros(2, 3)}}, Path("x.onnx"), "onnx", {})
