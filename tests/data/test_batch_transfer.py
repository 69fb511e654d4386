"""The hooks of batch transfer outside of a fit."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from kd_lightning.batch import Batch
from kd_lightning.data.batch_transfer import HOOKS, own_hooks, read_by, transfer
from kd_lightning.errors import InputError

CPU = torch.device("cpu")
BATCH = Batch(torch.ones(2, 3), torch.tensor([0, 1]))


class Module(LightningModule):
    """Each hook leaves a digit."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch * 10 + 1

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        assert device == CPU
        return batch * 10 + 2

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch * 10 + 3


class Data(LightningDataModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch * 10 + 7


class Asking(LightningDataModule):
    """As in Lightning's own example of augmentation on the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return Batch(batch.x + 1, batch.y) if self.trainer.training else batch


def test_hooks_of_the_module_count_where_the_data_have_none():
    module = Module()
    assert own_hooks(module).keys() == {*HOOKS}
    assert own_hooks(LightningModule()) == own_hooks(LightningDataModule()) == {}
    plain, data = LightningDataModule(), Data()
    assert transfer(read_by(plain, own_hooks(module), Batch.from_any), 0, CPU) == 123
    assert transfer(read_by(data, own_hooks(module), Batch.from_any), 0, CPU) == 127
    assert transfer(data, 5, CPU) == 57  # it stays as it is
    assert transfer(module, 0, CPU) == 123


def test_without_hooks_a_batch_is_moved():
    found = transfer(LightningDataModule(), BATCH, torch.device("meta"))
    assert found.x.is_meta
    assert found.y.is_meta


@pytest.mark.parametrize("owner", ["data", "module"])
def test_hooks_that_ask_their_trainer(owner, capfd):
    class AskingModule(LightningModule):
        on_after_batch_transfer = Asking.on_after_batch_transfer

    module, data = AskingModule(), Asking()
    torch.use_deterministic_algorithms(True)
    try:
        source = data if owner == "data" else read_by(LightningDataModule(), own_hooks(module), Batch.from_any)
        assert torch.equal(transfer(source, BATCH, CPU).x, torch.ones(2, 3))
        assert torch.equal(transfer(source, BATCH, CPU, training=True).x, torch.full((2, 3), 2.0))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert module._trainer is None
    assert data.trainer is None
    assert "GPU" not in "".join(capfd.readouterr())


def test_a_trainer_of_its_own_stays():
    data = Asking()
    data.trainer = own = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert torch.equal(transfer(data, BATCH, CPU, training=True).x, torch.ones(2, 3))
    assert data.trainer is own


def test_a_hook_that_fails():
    class Failing(LightningDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch["image"]

    with pytest.raises(InputError, match=r"on_before_batch_transfer fails outside of a fit: TypeError: "):
        transfer(Failing(), BATCH, CPU)
