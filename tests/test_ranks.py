"""What processes tell one another, and how they end."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kd_lightning.errors import InputError
from kd_lightning.ranks import gather, gather_rows, is_distributed, on_all_ranks, stop_if_recorded

SCRIPT = """
import torch
from kd_lightning.errors import InputError
from kd_lightning.ranks import (
    alone, gather, gather_rows, is_distributed, on_all_ranks, own_rows, sum_over_ranks, world_size
)

class Trainer:
    world_size = 2

def wrong():
    if rank == 1:
        raise OSError("no room")

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
assert is_distributed()
assert gather(Trainer, f"of {rank}") == ["of 0", "of 1"]
for counts in ([2, 1], [0, 3], [1, 0], [0, 0]):
    rows = torch.full((counts[rank], 2), float(rank), requires_grad=True)
    gathered = gather_rows(rows)
    assert gathered.tolist() == [[0.0, 0.0]] * counts[0] + [[1.0, 1.0]] * counts[1] and not gathered.requires_grad
    assert torch.equal(gathered[own_rows(rows)], rows)
    assert sum_over_ranks(rows.sum()).item() == 2 * counts[1]
    with alone():
        assert not is_distributed() and world_size() == 1
        assert sum_over_ranks(rows.sum()).item() == 2 * rank * counts[1]
        assert torch.equal(gather_rows(rows), rows) and own_rows(rows) == slice(0, len(rows))
    assert is_distributed() and world_size() == 2
on_all_ranks(Trainer, lambda: None, "cache")
try:
    on_all_ranks(Trainer, wrong, "cache")
except InputError as error:
    assert str(error) == "cache: no room"
else:
    raise AssertionError("the other process does not hear of it")
"""

# a reduction right before the end: without the wait at exit, about one process in five aborts
END = """
import sys
import torch
import kd_lightning.ranks

rank, path = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
for _ in range(30):
    torch.distributed.all_reduce(torch.ones(3))
"""


@pytest.mark.slow
def test_two_processes_hear_of_one_another(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("ranks.py").write_text(SCRIPT)
    processes.run_ranks(["ranks.py"])


@pytest.mark.slow
def test_two_processes_end_well(tmp_path):
    """Started afresh, since a forked process ends otherwise; they import no more than they need."""
    for attempt in range(8):
        command = [sys.executable, "-c", END]
        ranks = [
            subprocess.Popen([*command, str(rank), str(tmp_path / str(attempt))], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        for process in ranks:
            _, message = process.communicate(timeout=120)
            assert process.returncode == 0, message


def test_a_single_process():
    assert not is_distributed()
    assert gather(None, 3) == [3]
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(rows).tolist() == rows.tolist() and not gather_rows(rows).requires_grad
    done = []
    on_all_ranks(None, lambda: done.append(1), "cache")
    assert done == [1]


@pytest.mark.parametrize(
    ("error", "message"), [(OSError("no room"), "cache: no room"), (InputError("y: is missing"), "y: is missing")]
)
def test_what_is_wrong_with_the_input_is_one_line(error, message):
    def action():
        raise error

    with pytest.raises(InputError) as caught:
        on_all_ranks(None, action, "cache")
    assert str(caught.value) == message


def test_a_fault_of_the_program_stays_one():
    with pytest.raises(ZeroDivisionError):
        on_all_ranks(None, lambda: 1 / 0, "cache")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_recorded_signal_ends_a_pass(recorded):
    with pytest.raises(SIGTERMException) if recorded else nullcontext():
        stop_if_recorded(SimpleNamespace(received_sigterm=recorded))


BARS = """
import sys
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset
from kd_lightning import CoTeachingModule, PseudoLabelModule, teach
from kd_lightning.pseudo_labels.selection import FixedThreshold

def net():
    return torch.nn.Linear(4, 3)

class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

makes = {
    "teach": lambda: teach(Plain(), net(), "net"),
    "pseudo-labels": lambda: PseudoLabelModule(net(), selection=FixedThreshold(0.0)),
    "co-teaching": lambda: CoTeachingModule(net(), net(), forget_rate=0.2),
}
y = torch.arange(16) % 3
for name, make in makes.items():
    for bar in TQDMProgressBar(), RichProgressBar():
        torch.manual_seed(0)
        labels = y.where(torch.arange(16) % 2 == 0, -100) if name == "pseudo-labels" else y
        loader = DataLoader(TensorDataset(torch.randn(16, 4), labels), 4)
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, callbacks=[bar],
                          enable_checkpointing=False, enable_model_summary=False)
        trainer.fit(make(), loader)
        print(name, type(bar).__name__, "ended", flush=True)
        if name == "teach":
            found = {key: round(float(value), 5) for key, value in trainer.callback_metrics.items()}
            print("metrics:", sorted(found.items()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_bars_that_read_metrics_on_one_process(processes, tmp_path, monkeypatch):
    """They hung a run of several processes, at the end of its first epoch."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(BARS)
    processes.run_ranks(["script.py"])
    outputs = [Path(f"output_{rank}.txt").read_text() for rank in (0, 1)]
    assert outputs[0].count(" ended") == 6
    first, second = (re.findall("metrics: .*teach/hard.*teach/soft.*", output) for output in outputs)
    assert len(first) == 2 and first == second  # means over the samples of both
