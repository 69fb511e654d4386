"""Several processes learn what one learns at the same global batch: two on one machine, two nodes, plain loaders.

Each config's processes are forked (see tests/processes/fork_server.py), which saves their imports. One config is
started by Lightning's own launcher and by ``torchrun``, too.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forked import free_port
from safetensors.torch import load_file

from kd_lightning.__main__ import main
from kd_lightning.runs.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.dist]
ROWS = 32  # of the global batch


def run(command, contract, **kwargs):
    end = subprocess.run(
        command, env=contract.environment(), capture_output=True, text=True, timeout=300, check=False, **kwargs
    )
    assert not end.returncode, end.stderr[-3000:]


def recorded(world):
    return [json.loads(Path(f"seen/{rank}_of_{world}.json").read_text()) for rank in range(world)]


@pytest.fixture
def arguments(each_module, tmp_path, monkeypatch, contract):
    """A quick run of one config of each module, on networks without batch statistics, that records what it sees."""
    monkeypatch.chdir(tmp_path)
    path, changes = each_module
    if contract.module_of(path) == "SimKDModule":
        pytest.skip("its projector has batch statistics")
    config = contract.without_batch_statistics(contract.quick(path, **changes))
    record = {"class_path": "parts.Record", "init_args": {"folder": "seen"}}
    config["trainer"]["callbacks"] = [*config["trainer"].get("callbacks", []), record]
    data = config["data"]["init_args"]
    data["batch_size"] = ROWS
    if "labeled_batch_size" in data:
        data["labeled_batch_size"] = ROWS // 4
    return ["fit", *contract.Story.write(config, "config.yaml")]


def assert_equal_to_one_process(world=2):
    """Same losses in every epoch, on disjoint shards whose labels are mixed unevenly."""
    (one,), several = recorded(1), recorded(world)
    assert one["losses"][-1].keys() >= {"train/loss", "train/hard"} or not sum(b["labels"] for b in one["batches"])
    for epoch, losses in enumerate(one["losses"]):
        for rank in several:
            assert rank["losses"][epoch].keys() == losses.keys()
            for name in losses.keys() - {"train/loss_step"}:
                assert rank["losses"][epoch][name] == pytest.approx(losses[name], abs=1e-4), (epoch, name)
    assert len(one["batches"]) == 8
    for number, batch in enumerate(one["batches"]):
        shares = [rank["batches"][number] for rank in several]
        assert sorted(batch["index"]) == sorted(index for share in shares for index in share["index"])
        assert len(batch["index"]) == ROWS
        assert batch["labels"] == sum(share["labels"] for share in shares)


def is_uneven():
    return any(len({rank["batches"][n]["labels"] for rank in recorded(2)}) > 1 for n in range(8))


@pytest.fixture
def half(arguments):
    """Arguments under which each of two processes takes half a batch."""
    labeled = yaml.safe_load(Path("config.yaml").read_text())["data"]["init_args"].get("labeled_batch_size")
    share = ["--data.init_args.labeled_batch_size", str(labeled // 2)] if labeled else []
    return ["--data.init_args.batch_size", str(ROWS // 2), "--trainer.strategy", "ddp", *share]


ON_NODES = {"cached_digits", "fixmatch_digits", "refresh_digits", "segmentation_distill"}
"""Configs that run on two nodes, too: stored outputs, two streams, tables of a callback, files."""


def test_only_what_is_stored_depends_on_nodes(root):
    """To all else, two nodes are two processes."""
    words = re.compile(r"local_rank|local_world_size|node_rank|num_devices|num_nodes|LOCAL_RANK|NODE_RANK|GROUP_RANK")
    files = [path for path in (root / "kd_lightning").rglob("*.py") if words.search(path.read_text())]
    rooms = {path.parent.name: path.name for path in files if not {"cli", "runs"} & {*path.parts}}
    assert rooms == {"data": "decoded.py", "teachers": "cache_fill.py"}


def test_two_processes_and_two_nodes_equal_one(arguments, half, each_module, processes):
    main(arguments)
    processes.run_ranks([*arguments, *half, "--trainer.devices", "2"])
    assert_equal_to_one_process()
    # where every row has its label, or every batch the same number, there is nothing to be uneven
    whole = all(batch["labels"] in (0, ROWS) for batch in recorded(1)[0]["batches"])
    assert is_uneven() or whole or any("labeled_batch_size" in argument for argument in half)
    if each_module[0].stem not in ON_NODES or each_module[1]:
        return
    forget_two()
    processes.run_ranks([*arguments, *half, "--trainer.devices", "1", "--trainer.num_nodes", "2"], nodes=2)
    assert_equal_to_one_process()


@pytest.mark.parametrize("each_module", [("cached_digits", {}), ("fixmatch_digits", {})], ids=str, indirect=True)
def test_two_processes_are_killed_twice(arguments, half, processes):
    """Both at once: after an epoch's last batch, and within the next epoch. Their losses are those of all batches."""
    often = ["--checkpoint.every_n_train_steps", "1", "--trainer.max_epochs", "3"]
    argv = [*arguments, *half, *often, "--trainer.devices", "2"]
    processes.run_ranks(argv)
    whole = recorded(2)[0]["losses"]
    argv += ["--name", "killed"]
    processes.run_ranks(argv, end=-signal.SIGKILL, KILL_AT="4")
    resume = ["--ckpt_path", "runs/killed/version_0/checkpoints/last.ckpt"]
    processes.run_ranks([*argv, *resume], end=-signal.SIGKILL, KILL_AT="7")
    processes.run_ranks([*argv, *resume])
    assert [path.name for path in Path("runs/killed").iterdir()] == ["version_0"]
    ends = [load_file(f"runs/{name}/version_0/student.safetensors") for name in ("quick", "killed")]
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())
    for rank in recorded(2):
        assert len(rank["losses"]) == 2  # the resumed epoch is the second
        for losses, before in zip(rank["losses"], whole[1:], strict=True):
            for name in ("train/loss", "train/hard", "val/loss"):
                assert losses.get(name, 0) == pytest.approx(before.get(name, 0), abs=1e-6), name


def forget_two():
    for path in Path("seen").glob("*_of_2.json"):
        path.unlink()


@pytest.mark.parametrize("each_module", [("cached_digits", {})], ids=str, indirect=True)
def test_lightning_and_torchrun_start_them(arguments, half, contract):
    """On the config whose processes share a cache."""
    main(arguments)
    run([sys.executable, "-m", "kd_lightning", *arguments, *half, "--trainer.devices", "2"], contract)
    assert_equal_to_one_process()
    forget_two()
    training = ["-m", "kd_lightning", *arguments, *half, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    run_two_nodes(training, contract)
    assert_equal_to_one_process()


def run_two_nodes(training, contract):
    """Both nodes on this machine; once more on another port where they do not find each other."""
    for last in (False, True):
        port = free_port()
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        outputs = [Path(f"node_{rank}.txt") for rank in range(2)]
        nodes = [
            subprocess.Popen(
                [*command, "--node-rank", str(rank), *training],
                env=contract.environment(),
                stdout=outputs[rank].open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]
        try:
            for node in nodes:
                node.wait(timeout=150)
        except subprocess.TimeoutExpired:
            if last:
                raise AssertionError("\n\n".join(output.read_text()[-3000:] for output in outputs)) from None
            continue
        finally:
            for node in nodes:
                node.kill()
        for node, output in zip(nodes, outputs, strict=True):
            assert not node.returncode, output.read_text()[-3000:]
        return


SCRIPT = """
import json, os, sys, torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lightning.pytorch import Trainer, Callback
from kd_lightning import DistillModule
from parts import Plain, Record
from functools import partial

def run(devices, batch):
    torch.manual_seed(0)
    x, y = torch.rand(256, 1, 8, 8), torch.arange(256) % 10
    y[1::2] = -100  # rank 0 has all labels, and its first batch one less
    y[0] = -100
    module = DistillModule(Plain(16), Plain(24), soft_weight=0.5, optimizer=partial(torch.optim.SGD, lr=0.1))
    losses = []
    class Losses(Callback):
        def on_train_epoch_end(self, trainer, module):
            losses.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2,
                      logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      callbacks=[Losses()])
    data = TensorDataset(x, y)
    sampler = DistributedSampler(data, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer.fit(module, DataLoader(data, batch, sampler=sampler))
    if trainer.is_global_zero:
        weights = torch.cat([p.flatten() for p in module.student.parameters()]).tolist()
        open(f"plain_{devices}.json", "w").write(json.dumps({"losses": losses, "weights": weights}))

if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[1]), int(sys.argv[2]))
"""


def test_plain_loader_with_labels_on_one_process_alone(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    exec(SCRIPT, here := {"__name__": "train"})
    here["run"](1, ROWS)
    processes.run_ranks(["train.py", "2", str(ROWS // 2)])
    one, two = (json.loads(Path(f"plain_{devices}.json").read_text()) for devices in (1, 2))
    for mine, theirs in zip(one["losses"], two["losses"], strict=True):
        for name in ("train/loss", "train/hard", "train/soft"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert torch.tensor(one["weights"]).sub(torch.tensor(two["weights"])).abs().max() < 1e-5


def test_accumulated_batches_of_two_processes_equal_one_batch(tmp_path, monkeypatch, contract, processes):
    """Labels are counted over the whole optimiser step."""
    monkeypatch.chdir(tmp_path)
    path = next(path for path in contract.CONFIGS if path.stem == "distill_digits")
    config = contract.without_batch_statistics(contract.quick(path))
    config["trainer"] |= {"max_epochs": 1, "limit_val_batches": 0}
    ends = []
    for batch, options in {ROWS: [], ROWS // 4: ["2", "--trainer.accumulate_grad_batches", "2"]}.items():
        config["data"]["init_args"]["batch_size"] = batch
        config["trainer"]["limit_train_batches"] = 32 * (2 if options else 1)  # whole batches alone: equal shards
        config["name"] = str(batch)
        command = ["fit", *contract.Story.write(config, f"{batch}.yaml")]
        if options:
            processes.run_ranks([*command, "--trainer.strategy", "ddp", "--trainer.devices", *options])
        else:
            main(command)
        last = torch.load(f"runs/{batch}/version_0/checkpoints/last.ckpt", weights_only=True)
        ends.append((last["global_step"], torch.cat([t.flatten() for t in last["state_dict"].values()])))
    assert ends[0][0] == ends[1][0] == 32
    assert (ends[0][1] - ends[1][1]).abs().max() < 1e-5


def test_started_together_each_has_its_folder(config, processes):
    """Ten command lines of one name at once."""
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    command = ["fit", "--config", "config.yaml", "--seed_everything"]
    codes, outputs = processes.run(*(([*command, str(seed)], {}) for seed in range(10)))
    assert codes == [0] * 10, outputs
    seeds = set()
    for folder in Path("runs/tiny").iterdir():
        run = Run(folder)
        last = torch.load(run.last_checkpoint(), weights_only=True)["state_dict"]
        deployed = load_file(run.weights)
        assert all(torch.equal(deployed[key], last[f"student.{key}"]) for key in deployed)
        assert run.finished
        assert len(run.rows()) > 1
        assert json.loads((folder / "split.json").read_text())["seed"] == 0
        seeds.add(run.seed)
    assert seeds == set(range(10))
