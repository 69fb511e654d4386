"""load_weights and save_weights: odd checkpoints, compiled networks, extra state, tied weights, buffers."""

import argparse
import dataclasses
import datetime
import decimal
import functools
import io
import os
import pickle
import zipfile
from collections import deque
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from kd_lightning import DistillModule, InputError, load_weights
from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.layers import quantize
from kd_lightning.runs.weights import match_keys, metadata_texts, plain_key, save_weights


class Color(Enum):
    RED = 1


class Odd(LightningModule):
    """Saves hyperparameters that torch does not load by itself."""

    def __init__(self, net, path=Path("a"), color=Color.RED):
        super().__init__()
        self.save_hyperparameters(ignore="net")
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Text(nn.Module):
    """Has extra state that is no tensor, before all weights."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def get_extra_state(self):
        return self.text

    def set_extra_state(self, state):
        self.text = state


class Counts(nn.Module):
    """Has extra state that is a tensor, of any shape."""

    def __init__(self, *counts):
        super().__init__()
        self.counts = torch.tensor(counts)

    def get_extra_state(self):
        return self.counts

    def set_extra_state(self, state):
        self.counts = state


def compiled(net, form):
    if form == "whole":
        return torch.compile(net, backend="eager")
    if form == "in place":
        net.compile(backend="eager")
    if form == "part":
        net[0] = torch.compile(net[0], backend="eager")
    if form == "both":
        net[0] = torch.compile(net[0], backend="eager")
        return torch.compile(net, backend="eager")
    return net


FORMS = ["none", "whole", "part", "both", "in place"]


def is_equal(net, other):
    states = [{plain_key(k): v for k, v in n.state_dict().items()} for n in (net, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_checkpoint_with_odd_hyperparameters(quiet_trainer, loader, tmp_path, student):
    trainer = quiet_trainer()
    trainer.fit(Odd(student), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="PosixPath"):
        torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert is_equal(load_weights(DigitsCNN(4), tmp_path / "a.ckpt"), student)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_odd_objects_beside_the_state_dict(tmp_path, student, key):
    torch.save({"args": Color.RED, key: student.state_dict()}, tmp_path / "a.pt")
    assert is_equal(load_weights(DigitsCNN(4), tmp_path / "a.pt"), student)


def test_odd_objects_in_the_state_dict(tmp_path, student):
    torch.save({"state_dict": {**student.state_dict(), "0.x": Color.RED}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a.pt was refused: state_dict.0.x holds an object of .*Color, .* run code"):
        load_weights(DigitsCNN(4), tmp_path / "a.pt")
    torch.save(student, tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt was refused: it holds an object of .*DigitsCNN"):
        load_weights(DigitsCNN(4), tmp_path / "a.pt")


@pytest.mark.parametrize("form", FORMS)
def test_deployed_keys_are_those_without_compilation(tmp_path, form, student):
    save_weights(compiled(student, form).state_dict(), tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors").keys() == DigitsCNN(4).state_dict().keys()


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("loaded", FORMS)
def test_compiled_networks_read_each_others_files(tmp_path, saved, loaded, student):
    net = compiled(student, saved)
    torch.save({f"student.{key}": value for key, value in net.state_dict().items()}, tmp_path / "a.pt")
    for prefix in (None, "student."):
        fresh = compiled(DigitsCNN(4), loaded)
        assert is_equal(load_weights(fresh, tmp_path / "a.pt", prefix), student)


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "student.module._orig_mod."])
def test_compiled_under_ddp(tmp_path, prefix, student):
    torch.save({prefix + key: value for key, value in student.state_dict().items()}, tmp_path / "a.pt")
    for given in (None, prefix):
        assert is_equal(load_weights(DigitsCNN(4), tmp_path / "a.pt", given), student)


def test_float_weights_into_a_compiled_quantised_network(tmp_path, student):
    torch.save(compiled(student, "whole").state_dict(), tmp_path / "a.pt")
    net = load_weights(compiled(quantize(DigitsCNN(4), 4), "whole"), tmp_path / "a.pt")
    assert torch.equal(net._orig_mod[0].weight, student[0].weight)


def test_match_keys():
    assert match_keys({"s._orig_mod.a": 1, "b": 2}, {"s.a": 0}) == {"s.a": 1, "b": 2}
    assert match_keys({"s.a": 1}, {"s._orig_mod.a": 0}) == {"s._orig_mod.a": 1}
    same = {"a": 1}
    assert match_keys(same, {"a": 0}) is same


class TestRoundTrip:
    def deploy(self, net, path):
        save_weights(net.state_dict(), path, {})
        return path

    def test_extra_state(self, tmp_path):
        def make(text, *counts):
            return nn.Sequential(Text(text), Counts(*counts), nn.Linear(2, 2))

        net = make("trained", 1, 2)
        fresh = load_weights(make("new", 0), self.deploy(net, tmp_path / "a.safetensors"))
        assert torch.equal(fresh[2].weight, net[2].weight)
        assert fresh[0].text == "new"  # safetensors hold tensors alone
        assert torch.equal(fresh[1].counts, torch.tensor([1, 2]))
        torch.save({"state_dict": net.state_dict()}, tmp_path / "a.ckpt")
        assert load_weights(make("new", 0), tmp_path / "a.ckpt")[0].text == "trained"
        torch.save({f"student.{k}": v for k, v in net.state_dict().items()}, tmp_path / "a.ckpt")
        assert load_weights(make("new", 0), tmp_path / "a.ckpt")[0].text == "trained"

    def test_tied_weights(self, tmp_path):
        def make(tied=True):
            net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
            if tied:
                net[1].weight = net[0].weight
            return net

        net = make()
        file = self.deploy(net, tmp_path / "a.safetensors")
        for tied in (True, False):
            fresh = load_weights(make(tied), file)
            assert is_equal(fresh, net)
            assert (fresh[0].weight is fresh[1].weight) == tied

    def test_buffers(self, tmp_path):
        def make(value):
            net = nn.Sequential(nn.BatchNorm1d(2))
            net.register_buffer("saved", torch.tensor(value))
            net.register_buffer("built", torch.tensor(7), persistent=False)
            return net

        net = make(1)
        net[0](torch.randn(4, 2))
        fresh = load_weights(make(0), self.deploy(net, tmp_path / "a.safetensors"))
        assert is_equal(fresh, net)
        assert (fresh.saved, fresh.built) == (1, 7)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    def test_dtypes(self, tmp_path, dtype):
        net = nn.Linear(2, 2).to(dtype)
        fresh = load_weights(nn.Linear(2, 2).to(dtype), self.deploy(net, tmp_path / "a.safetensors"))
        assert torch.equal(fresh.weight.float(), net.weight.float())

    def test_views_and_other_layouts(self, tmp_path):
        net = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        net.register_buffer("view", torch.arange(6).view(2, 3).t())
        fresh = nn.Conv2d(2, 4, 3)
        fresh.register_buffer("view", torch.zeros(3, 2, dtype=torch.int64))
        assert is_equal(load_weights(fresh, self.deploy(net, tmp_path / "a.safetensors")), net)


def test_metadata_that_utf8_cannot_represent(tmp_path):
    save_weights({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"t": "a\udcffb", "names": ["\udcff"]})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["t"] == "a?b"
    assert metadata_texts({"a": "text", "b": [1, None]}) == {"a": "text", "b": "[1, null]"}


def test_equal_weights_make_equal_files(tmp_path):
    """Also the text before the tensors, so that a hash of the file stands for the weights."""
    metadata = {key: key for key in "abcdefgh"}
    state = {"weight": torch.arange(3.0), "count": torch.tensor(2)}
    contents = set()
    for _ in range(4):
        save_weights(state, tmp_path / "a.safetensors", metadata)
        contents.add((tmp_path / "a.safetensors").read_bytes())
    assert len(contents) == 1
    assert all(torch.equal(value, state[key]) for key, value in load_file(tmp_path / "a.safetensors").items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata


# Files of other trainings.


class Node(dict):
    """As OmegaConf's nodes: a mapping with a state of its own that leads back to itself."""

    def __init__(self, **items):
        super().__init__(**items)
        self.parent, self.flags = self, {"path": Path("a")}

    def __reduce__(self):
        return type(self), (), vars(self), None, iter(self.items())


@dataclasses.dataclass
class Settings:
    path: Path = Path("a")


HYPERPARAMETERS = {
    "path": Path("a"),
    "enum": Color.RED,
    "partial": functools.partial(torch.optim.Adam, lr=0.1),
    "module": nn.Linear(2, 2),
    "namespace": argparse.Namespace(path=Path("a"), lr=0.1),
    "node": Node(a=Node(b=1)),
    "dataclass": Settings(),
    "numpy scalar": np.float64(0.1),
    "numpy array": np.arange(3),
    "numpy objects": np.array([Path("a"), None], dtype=object),
    "numpy generator": np.random.default_rng(0),
    "time": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "decimal": decimal.Decimal("0.1"),
    "class": torch.optim.SGD,
    "generator": torch.Generator(),
    "deque": deque([Path("a")]),
    "optimizer": torch.optim.Adam([nn.Parameter(torch.ones(1))]),
}


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Theirs(LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        self.model = layers(seed)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_hyperparameters_of_any_kind(tmp_path, name, is_zip):
    state = Theirs().state_dict()
    content = {"hyper_parameters": {name: HYPERPARAMETERS[name], "all": [HYPERPARAMETERS[name]]}, "state_dict": state}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=is_zip)
    assert is_equal(load_weights(Theirs(1), tmp_path / "a.ckpt"), Theirs())
    assert is_equal(load_weights(layers(1), tmp_path / "a.ckpt"), layers())


@pytest.mark.parametrize("key", ["net", "weights", "ema_weights"])
def test_the_only_state_dict_under_another_key(tmp_path, key):
    content = {key: layers().state_dict(), "acc": 0.5, "epoch": 3, "args": argparse.Namespace(path=Path("a"))}
    torch.save(content, tmp_path / "a.pt")
    assert is_equal(load_weights(layers(1), tmp_path / "a.pt"), layers())


def test_two_state_dicts_under_other_keys(tmp_path):
    torch.save({"generator": layers().state_dict(), "critic": layers(1).state_dict()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a.pt holds several state dicts, generator, critic; save one of them"):
        load_weights(layers(), tmp_path / "a.pt")


def test_a_file_without_a_state_dict(tmp_path):
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a.pt holds no state dict, but dict with epoch, loss$"):
        load_weights(layers(), tmp_path / "a.pt")
    torch.jit.script(layers()).save(tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"cannot be read as weights: it is a TorchScript program, which torch.jit"):
        load_weights(layers(), tmp_path / "a.pt")


class TestWhichNetwork:
    """Two networks of one kind in a file: a prefix is never guessed."""

    def save(self, path, **states):
        torch.save({"state_dict": {f"{p}.{k}": v for p, s in states.items() for k, v in s.items()}}, path)
        return path

    @pytest.mark.parametrize("average", ["ema.module", "ema_model", "a", "z"])
    def test_an_average_beside_the_network(self, tmp_path, average):
        path = self.save(tmp_path / "a.ckpt", **{"model": layers().state_dict(), average: layers(1).state_dict()})
        with pytest.raises(InputError, match=r"holds several networks that fit, under .*; set prefix to one of them"):
            load_weights(layers(2), path)
        assert is_equal(load_weights(layers(2), path, "model."), layers())
        assert is_equal(load_weights(layers(2), path, f"{average}."), layers(1))

    def test_a_student_comes_first(self, tmp_path):
        path = self.save(tmp_path / "a.ckpt", ema=layers(1).state_dict(), student=layers().state_dict())
        assert is_equal(load_weights(layers(2), path), layers())

    def test_equal_weights_under_two_names(self, tmp_path):
        path = self.save(tmp_path / "a.ckpt", model=layers().state_dict(), net=layers().state_dict())
        assert is_equal(load_weights(layers(2), path), layers())

    def test_a_layer_of_a_network(self, tmp_path):
        """Of all layers that have its names, the shape decides; of two of one shape, neither is taken."""
        torch.save(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)).state_dict(), tmp_path / "a.pt")
        assert load_weights(nn.Linear(3, 2), tmp_path / "a.pt").weight.shape == (2, 3)
        torch.save(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).state_dict(), tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"under 0\., 1\."):
            load_weights(nn.Linear(3, 3), tmp_path / "a.pt")


ODD_TENSORS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: torch.complex(x, x),
    "integers": lambda x: (100 * x).int(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_of_another_kind(tmp_path, kind):
    """Nothing is loaded, not even what comes before them."""
    state = layers().state_dict()
    torch.save({**state, "2.weight": ODD_TENSORS[kind](state["2.weight"])}, tmp_path / "a.pt")
    net = layers(1)
    with pytest.raises(
        InputError, match=rf"1 of another kind: 2.weight {kind} in the file, floats in the model"
    ) as error:
        load_weights(net, tmp_path / "a.pt")
    assert "\n" not in str(error.value)
    assert is_equal(net, layers(1))


class Counted(nn.Module):
    """A network with tensors of several types."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("halves", torch.zeros(2, dtype=torch.float16))
        self.register_buffer("small", torch.zeros(2, dtype=torch.int8))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", torch.tensor([True, False]), "1 of another kind: weight integers in the file, floats in the model"),
        ("small", torch.tensor([1.0, 2.5]), "1 of another kind: small floats in the file, integers in the model"),
        ("small", torch.tensor([1, 300]), "1 out of range: small torch.int64 in the file, torch.int8 in the model"),
        ("small", torch.tensor([1.0, 300.0]), "1 out of range: small torch.float32 in the file, torch.int8"),
        ("mask", torch.tensor([0, 2]), "1 out of range: mask torch.int64 in the file, torch.bool in the model"),
        ("halves", torch.tensor([1.0, 7e4]), "1 out of range: halves torch.float32 in the file, torch.float16 in the"),
        ("small", torch.tensor([1.0, torch.nan]), "1 of another kind: small floats in the file"),
    ],
)
def test_values_that_torch_would_change(tmp_path, key, value, message):
    torch.save({**Counted().state_dict(), key: value}, tmp_path / "a.pt")
    net = Counted()
    with pytest.raises(InputError, match=message):
        load_weights(net, tmp_path / "a.pt")
    assert not net.state_dict()[key].any()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", torch.tensor([1e38, 0.1], dtype=torch.float64)),
        ("halves", torch.tensor([0.1, torch.inf])),
        ("halves", torch.tensor([1.0, 2.0]).to(torch.float8_e5m2)),
        ("small", torch.tensor([1.0, -3.0])),
        ("mask", torch.tensor([0, 1], dtype=torch.uint8)),  # as older versions of torch saved masks
        ("num_batches_tracked", torch.tensor(6.5)),  # of a mean over checkpoints
    ],
)
def test_other_types_of_one_kind(tmp_path, key, value):
    torch.save({**Counted().state_dict(), key: value}, tmp_path / "a.pt")
    found = load_weights(Counted(), tmp_path / "a.pt").state_dict()[key]
    torch.testing.assert_close(
        found.double(), value.double().trunc() if value.ndim == 0 else value.double(), rtol=1e-3, atol=0
    )


def test_a_network_without_memory(tmp_path):
    torch.save(layers().state_dict(), tmp_path / "a.pt")
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(InputError, match="0.weight floats in the file, meta in the model"):
        load_weights(net, tmp_path / "a.pt")


def test_a_network_of_shapes_that_are_not_known_yet(tmp_path):
    torch.save({"net.weight": torch.ones(2, 3), "net.bias": torch.zeros(2)}, tmp_path / "a.pt")
    assert load_weights(nn.LazyLinear(2), tmp_path / "a.pt").weight.shape == (2, 3)


def test_tensors_that_share_memory(tmp_path):
    whole, net = torch.randn(20), layers()
    state = net.state_dict() | {"0.weight": whole[:12].view(4, 3), "2.bias": whole[4:6], "0.bias": whole[::5]}
    torch.save({"state_dict": state, "odd": Path("a")}, tmp_path / "a.pt")
    found = load_weights(net, tmp_path / "a.pt")
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())


class Named(torch.Tensor):
    """A tensor of another class."""


@pytest.mark.parametrize("odd", [{}, {"odd": Path("a")}])
def test_tensors_of_a_class_of_their_own(tmp_path, odd):
    state = layers().state_dict()
    state["0.bias"].note = "an attribute"
    content = {"state_dict": state | {"2.weight": state["2.weight"].as_subclass(Named)}, **odd}
    torch.save(content, tmp_path / "a.pt")
    assert is_equal(load_weights(layers(1), tmp_path / "a.pt"), layers())
    content["state_dict"]["2.weight"].scale = 2.0  # whatever it means
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match="2.weight holds an object of torch._tensor._rebuild_from_type_v2"):
        load_weights(layers(1), tmp_path / "a.pt")


def test_bfloat16(tmp_path):
    torch.save({"state_dict": layers().bfloat16().state_dict(), "odd": Path("a")}, tmp_path / "a.pt")
    assert is_equal(load_weights(layers(1), tmp_path / "a.pt"), layers().bfloat16().float())


# Files that would run code: their tensors come, or a refusal, and nothing runs.


class Call:
    """Pickles to a call of ``os.system``."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


class EvilDict(dict):
    """A mapping that calls ``os.system`` when it is filled, and when it gets its state."""

    def __init__(self, file, items):
        super().__init__(items)
        self.file = file

    def __reduce__(self):
        items = iter([(Call(self.file), 1), *self.items()])
        return type(self), (Call(self.file), {}), {"a": Call(self.file)}, None, items


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
class TestMalicious:
    @pytest.fixture
    def save(self, tmp_path, is_zip):
        def save(content):
            torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=is_zip)
            return tmp_path / "a.ckpt"

        return save

    @pytest.mark.parametrize("place", ["hyper_parameters", "callbacks", "optimizer_states"])
    def test_beside_the_weights(self, save, tmp_path, place):
        evil = {"a": [{"b": Call(tmp_path / "ran")}], "c": EvilDict(tmp_path / "ran", {"d": 1})}
        path = save({place: evil, "state_dict": Theirs().state_dict(), "after": Call(tmp_path / "ran")})
        assert is_equal(load_weights(layers(1), path), layers())
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("place", ["value", "key", "mapping", "metadata", "extra state"])
    def test_within_the_weights(self, save, tmp_path, place):
        state, evil = layers().state_dict(), Call(tmp_path / "ran")
        if place == "value":
            state["2.weight"] = evil
        elif place == "key":
            state[evil] = torch.ones(1)
        elif place == "mapping":
            state = EvilDict(tmp_path / "ran", state)
        elif place == "metadata":
            state._metadata["0"]["version"] = evil
        else:
            state["0._extra_state"] = evil
        net = layers(1)
        with pytest.raises(InputError, match=r"a.ckpt was refused: state_dict.* holds an object of "):
            load_weights(net, save({"state_dict": state}))
        assert is_equal(net, layers(1))
        assert not (tmp_path / "ran").exists()

    def test_a_whole_module(self, save, tmp_path):
        """Its tensors lie inside of what is not read."""
        module = layers()
        module.evil = Call(tmp_path / "ran")
        for content in (module, {"model": module}, {"state_dict": module}, [module]):
            with pytest.raises(InputError, match="a.ckpt was refused|holds no state dict"):
                load_weights(layers(1), save(content))
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "saved_id", [("module", Call("ran"), "file", "source"), ("storage", Call("ran"), "0", "cpu", 1), Call("ran")]
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older format"])
def test_malicious_persistent_ids(tmp_path, monkeypatch, saved_id, is_zip):
    """torch replaces such an id by a storage, or in older files by a class, whose source it compares."""
    monkeypatch.chdir(tmp_path)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return saved_id if value == "replace" else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"state_dict": {"weight": "replace"}})
    torch.save({"a": torch.ones(1)}, "whole.pt", _use_new_zipfile_serialization=is_zip)
    if is_zip:
        with zipfile.ZipFile("whole.pt") as whole, zipfile.ZipFile("a.pt", "w") as archive:
            for name in whole.namelist():
                archive.writestr(name, stream.getvalue() if name.endswith("data.pkl") else whole.read(name))
    else:
        head = b"".join(pickle.dumps(part, 2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {}))
        Path("a.pt").write_bytes(head + stream.getvalue() + pickle.dumps([], 2))
    with pytest.raises(InputError, match="a.pt was refused"):
        load_weights(nn.Linear(1, 1), "a.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "whole.pt"}


@pytest.mark.parametrize("with_teacher", [True, False])
def test_lightnings_own_way_to_load(quiet_trainer, loader, tmp_path, student, teacher, with_teacher):
    """``load_from_checkpoint`` takes the networks as arguments; for test and predict the teacher may be None."""
    module = DistillModule(student, teacher, soft_weight=0.25)
    trainer = quiet_trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    networks = {"student": DigitsCNN(4), "teacher": teacher if with_teacher else None}
    found = DistillModule.load_from_checkpoint(tmp_path / "a.ckpt", **networks)
    assert found.soft_weight == 0.25
    assert is_equal(found.student, student)
    assert len(trainer.predict(found, loader())) == 3
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'teacher'"):
        DistillModule.load_from_checkpoint(tmp_path / "a.ckpt", student=DigitsCNN(4))
