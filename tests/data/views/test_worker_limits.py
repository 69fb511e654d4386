"""Workers that cannot send their batches end the run; they would otherwise be waited for without end."""

import resource

import pytest
import torch

from kd_lightning import Digits, InputError, SemiSupervisedDataModule


@pytest.fixture
def loader():
    data = SemiSupervisedDataModule(Digits(), num_workers=2, batch_size=64)
    data.setup("fit")
    return data.train_dataloader()


def test_batches_of_workers_lie_in_shared_memory(loader):
    assert next(iter(loader)).x.is_shared()


def test_full_shared_memory(loader, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the workers, which are forked
    with pytest.raises(InputError, match="num_workers: /dev/shm.* is full .*lower num_workers or batch_size"):
        next(iter(loader))


def test_the_main_process_shares_nothing():
    data = SemiSupervisedDataModule(Digits())
    data.setup("fit")
    assert not next(iter(data.train_dataloader())).x.is_shared()


def test_too_few_open_files(loader):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, before[1]))
    try:
        with pytest.raises(InputError, match="num_workers: 2 workers need about .* open files, but the limit is 30"):
            next(iter(loader))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
