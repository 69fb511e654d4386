"""load_weights and save_weights: odd checkpoints, compiled networks, extra state, tied weights, buffers."""

from enum import Enum
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from kd_lightning import InputError, load_weights
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
