"""load_weights: every kind of file, and what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kd_lightning import InputError, load_weights
from kd_lightning.models import DigitsCNN


@pytest.fixture
def fresh():
    torch.manual_seed(9)
    return DigitsCNN(8)


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "content",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": prefixed(s, "student."), "epoch": 3},
        lambda s: {"state_dict": prefixed(s, "net.") | {"loss.weight": torch.ones(3)}},
        lambda s: prefixed(s, "module."),
        lambda s: {"state_dict": prefixed(s, "student._orig_mod.")},
        lambda s: {"state_dict": prefixed({k: 0 * v for k, v in s.items()}, "teacher.") | prefixed(s, "student.")},
    ],
)
def test_finds_the_networks_weights(tmp_path, teacher, fresh, content):
    torch.save(content(teacher.state_dict()), tmp_path / "w.pt")
    assert load_weights(fresh, tmp_path / "w.pt") is fresh
    assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in teacher.state_dict().items())


def test_prefix_by_name(tmp_path, teacher, fresh):
    zeros = {key: 0 * tensor for key, tensor in teacher.state_dict().items()}
    torch.save(prefixed(zeros, "student.") | prefixed(teacher.state_dict(), "teacher."), tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt", prefix="teacher.")
    assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in teacher.state_dict().items())


def test_safetensors(tmp_path, teacher, fresh):
    save_file(teacher.state_dict(), tmp_path / "w.safetensors")
    load_weights(fresh, tmp_path / "w.safetensors")
    assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in teacher.state_dict().items())


def test_names_what_does_not_fit(tmp_path, teacher):
    state = teacher.state_dict()
    state["3.extra"] = torch.ones(1)
    del state["0.weight"]
    torch.save(state, tmp_path / "w.pt")
    message = (
        r"1 missing: 0.weight; 1 unexpected: 3.extra; \d+ of another shape: .* \[8\] in the file, \[4\] in the model"
    )
    with pytest.raises(InputError, match=message):
        load_weights(DigitsCNN(4), tmp_path / "w.pt")


class Evil:
    """Its unpickling would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_malicious_file_is_refused_and_not_run(tmp_path, fresh):
    torch.save({"state_dict": Evil(tmp_path / "evil")}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="refused"):
        load_weights(fresh, tmp_path / "w.pt")
    assert not (tmp_path / "evil").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # it would have run
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files(tmp_path, teacher, fresh, name):
    with pytest.raises(InputError, match=f"no weights file at .*{name}"):
        load_weights(fresh, tmp_path / name)
    save = save_file if name.endswith("safetensors") else torch.save
    save(teacher.state_dict(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not weights at all"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=name):
            load_weights(fresh, tmp_path / name)


def test_file_without_a_state_dict(tmp_path, fresh):
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds no state dict, but list"):
        load_weights(fresh, tmp_path / "w.pt")
