"""TorchScript programs that compute as in training mode, whatever their mode is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning import InputError, Teacher

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))


class Always(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Guarded(nn.Module):
    def forward(self, x):
        if self.training and x.shape[0] > 1:
            x = F.dropout(x, 0.5)
        return F.dropout(x, 0.5, self.training)


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2, dropout=0.5)

    def forward(self, x):
        return self.lstm(x)[0]


def trace(network, training):
    return torch.jit.trace(network.train(training), X, check_trace=False)


RANDOM = {
    "dropout": lambda: nn.Dropout(0.5),
    "norm": lambda: nn.BatchNorm1d(4),
    "rrelu": lambda: nn.RReLU(),
    "lstm": Lstm,
    "guarded": Guarded,
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "nested": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Dropout(0.1))),
}
SAME = {
    "no dropout": lambda: nn.Dropout(0.0),
    "norm of the batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
}


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_a_trace_in_training_mode_is_refused(make):
    with pytest.raises(
        InputError, match=r"its TorchScript program (draws|normalises) .*\(aten::\w+\).* model.eval\(\)"
    ):
        Teacher(trace(make(), True))


@pytest.mark.parametrize("make", [*RANDOM.values(), *SAME.values()], ids=[*RANDOM, *SAME])
def test_what_has_a_mode_of_its_own_is_allowed(make):
    network = make().eval()
    forms = [trace(network, False), torch.jit.script(network), torch.jit.script(make().train())]
    forms.append(torch.jit.freeze(torch.jit.script(make().eval())))
    for form in forms:
        teacher = Teacher(form)
        # the second call runs the program as optimised for the first one, which may round otherwise
        torch.testing.assert_close(teacher(X), teacher(X), rtol=1e-5, atol=1e-6)
    Teacher(trace(make(), True)) if make in SAME.values() else None


def test_functions_without_training_are_refused():
    for program in (torch.jit.script(Always()), trace(Always(), False)):
        with pytest.raises(InputError, match=r"draws random numbers \(aten::dropout_?\)"):
            Teacher(program)


def test_a_program_inside_a_network_is_named():
    with pytest.raises(InputError, match="its TorchScript module 1.0 draws"):
        Teacher(nn.Sequential(nn.Linear(4, 4), nn.Sequential(trace(nn.Dropout(0.5), True))))


@pytest.mark.slow
def test_the_example_of_a_trace_does_not_count(tmp_path, monkeypatch, processes):
    """In two processes it may be another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(
        """
import sys
import torch
from kd_lightning import Teacher
torch.manual_seed(0)
network = torch.nn.Linear(4, 3)
torch.manual_seed(int(sys.argv[1]))
print(Teacher(torch.jit.trace(network, torch.rand(2, 4))).fingerprint())
"""
    )
    codes, outputs = processes.run((["script.py", "0"], {}), (["script.py", "1"], {}))
    assert codes == [0, 0], outputs
    first, second = (output.split()[-1] for output in outputs)
    assert first == second
