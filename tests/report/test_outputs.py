"""Outputs of networks on samples, for the report."""

from dataclasses import replace

import pytest
import torch
import yaml

from kd_lightning.batch import Batch
from kd_lightning.data import Digits
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import SupervisedModule
from kd_lightning.report.outputs import Network
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import save_weights

PART = Digits().load().train


class Reads(SupervisedModule):
    """Changes inputs where it reads a batch, and leaves labels out."""

    def unpack(self, batch):
        return Batch(1 - batch.x, None, index=batch.index)


class Hooked(SupervisedModule):
    """Changes inputs where they come to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return replace(batch, x=1 - batch.x)


@pytest.mark.parametrize("kind", ["Reads", "Hooked"])
def test_a_module_reads_batches_itself(tmp_path, kind):
    torch.manual_seed(0)
    net = DigitsCNN(4).eval()
    student = {"class_path": "DigitsCNN", "init_args": {"width": 4}}
    data = {"class_path": "SemiSupervisedDataModule", "init_args": {"source": "Digits", "labeled": 2, "batch_size": 7}}
    config = {"model": {"class_path": f"{__name__}.{kind}", "init_args": {"student": student}}, "data": data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    save_weights(net.state_dict(), tmp_path / "student.safetensors", {})
    network = Network(Run(tmp_path))
    network.data.setup("fit")
    index = torch.arange(20)
    dataset = network.data.val_dataloader().dataset.of(index, network.data.eval_transform)
    labels, (found,) = network.run_all(dataset, LabelTable(PART.targets), network.student)
    assert torch.equal(labels, PART.targets[index])
    expected = net(1 - PART.images.tensors[0][index]).softmax(1).double()
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
