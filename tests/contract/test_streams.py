"""The contract on streams: commands, resumption after a kill, two processes and two nodes."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from parts import StoppedError, save_stream
from safetensors.torch import load_file
from test_processes import recorded

from kd_lightning.__main__ import main

ROWS, EPOCHS, STEPS = 32, 3, 5  # 4 full batches, and one of 8 rows
PLAIN = {"class_path": "parts.Plain", "init_args": {"channels": 1, "num_classes": 10, "width": 16}}


def make_config(kind, batch_size=ROWS, workers=0):
    """A distilled student on a stream that this package deals out, or on one of Hugging Face."""
    train = {"class_path": "parts.NumberStream"} if kind == "dealt" else save_stream(Path("saved"))
    val = {"class_path": "parts.NumberStream", "init_args": {"count": 37, "seed": 1}}
    teacher = {**PLAIN, "init_args": PLAIN["init_args"] | {"width": 24}}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    return {
        "name": "quick",
        "model": {"class_path": "DistillModule", "init_args": {"student": PLAIN, "teacher": teacher, "optimizer": sgd}},
        "data": {
            "class_path": "StreamDataModule",
            "init_args": {
                "train": train,
                "val": val,
                "test": val,
                "batch_size": batch_size,
                "num_workers": workers,
                "strong_transform": None,
            },
        },
        "trainer": {
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "callbacks": [
                {"class_path": "parts.Stop"},
                {"class_path": "parts.RecordRows", "init_args": {"folder": "seen"}},
            ],
        },
        "checkpoint": {"monitor": None, "every_n_train_steps": 2, "save_top_k": -1},
    }


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def student(name="quick"):
    return load_file(f"runs/{name}/version_0/student.safetensors")


def test_commands(contract):
    arguments = contract.Story.write(make_config("dealt"), "config.yaml")
    main(["fit", *arguments])
    folder = Path("runs/quick/version_0")
    rows = (folder / "metrics.csv").read_text()
    assert "val/accuracy" in rows
    for command in ("validate", "test", "predict"):
        main([command, *arguments])
    assert json.loads((folder / "test.json").read_text())
    main(["export", str(folder), "--out", "student.onnx"])
    main(["compare", str(folder)])
    assert Path("student.onnx").stat().st_size > 1000
    (epochs,) = ({len(batch["index"]) for batch in one["batches"]} for one in recorded(1))
    assert epochs == {ROWS, 8}


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        ("dealt", 0),
        pytest.param("dealt", 2, marks=pytest.mark.slow),
        pytest.param("hugging face", 0, marks=pytest.mark.slow),
        ("hugging face", 2),
    ],
)
def test_interrupted_anywhere(kind, workers, monkeypatch, contract):
    """Killed again and again, in one of two runs before each step of the second epoch: bit-equal weights."""
    config = make_config(kind, workers=workers)
    config["checkpoint"]["every_n_train_steps"] = 1
    arguments = ["fit", *contract.Story.write(config, "config.yaml")]
    main(arguments)
    expected = student()
    first, last = STEPS - 1, 2 * STEPS + 2
    chains = [range(first, last + 1, 2), range(first + 1, last, 2)] if not workers else [(STEPS + 2, STEPS + 4)]
    for chain in chains:
        shutil.rmtree("runs/killed", ignore_errors=True)
        ckpt_path = []
        for step in chain:
            monkeypatch.setenv("STOP_AT", str(step))
            with pytest.raises(StoppedError):
                main([*arguments, "--name", "killed", *ckpt_path])
            ckpt_path = ["--ckpt_path", "runs/killed/version_0/checkpoints/last.ckpt"]
        monkeypatch.delenv("STOP_AT")
        main([*arguments, "--name", "killed", *ckpt_path])
        for name, tensor in student("killed").items():
            assert torch.equal(tensor, expected[name]), (*chain, name)


@pytest.mark.slow
@pytest.mark.dist
class TestProcesses:
    @pytest.mark.parametrize("nodes", [1, 2])
    def test_several_equal_one(self, nodes, contract, processes):
        main(["fit", *contract.Story.write(make_config("dealt"), "config.yaml")])
        arguments = ["fit", *contract.Story.write(make_config("dealt", ROWS // 2), "two.yaml"), "--name", "two"]
        processes.run_ranks([*arguments, *devices(nodes)], nodes=nodes)
        rows = [len(batch["index"]) for batch in recorded(1)[0]["batches"]]
        assert rows == [ROWS, ROWS, ROWS, ROWS, 8] * EPOCHS
        (one,), several = recorded(1), recorded(2)
        for number, batch in enumerate(one["batches"]):
            shares = [rank["batches"][number] for rank in several]
            assert sorted(batch["index"]) == sorted(shares[0]["index"] + shares[1]["index"])
        for epoch, losses in enumerate(one["losses"]):
            for rank in several:
                for name in losses.keys() - {"train/loss_step"}:
                    assert rank["losses"][epoch][name] == pytest.approx(losses[name], abs=1e-4), (epoch, name)
        expected = student()
        for name, tensor in student("two").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)

    def test_shares_of_hugging_face(self, contract, processes):
        """Each sample once, and no more batches on one process than on the other."""
        arguments = ["fit", *contract.Story.write(make_config("hugging face", 8), "config.yaml"), *devices(1)]
        processes.run_ranks(arguments)
        first, second = (rank["batches"] for rank in recorded(2))
        assert len(first) == len(second)
        names = [name for rank in (first, second) for batch in rank[: len(rank) // EPOCHS] for name in batch["index"]]
        assert len({*names}) == len(names) > 120

    @pytest.mark.parametrize("kind", ["dealt", "hugging face"])
    def test_killed_twice(self, kind, contract, processes):
        config = make_config(kind, ROWS // 4)
        config["checkpoint"]["every_n_train_steps"] = 1
        config["trainer"]["accumulate_grad_batches"] = 2
        arguments = ["fit", *contract.Story.write(config, "config.yaml"), *devices(1)]
        processes.run_ranks(arguments)
        expected = student()
        argv = [*arguments, "--name", "killed"]
        processes.run_ranks(argv, end=-signal.SIGKILL, KILL_AT="3")
        resume = ["--ckpt_path", "runs/killed/version_0/checkpoints/last.ckpt"]
        processes.run_ranks([*argv, *resume], end=-signal.SIGKILL, KILL_AT="6")
        processes.run_ranks([*argv, *resume])
        for name, tensor in student("killed").items():
            assert torch.equal(tensor, expected[name]), name

    def test_fewer_validation_samples_than_processes(self, contract, processes):
        config = make_config("dealt", ROWS // 2)
        config["data"]["init_args"]["val"]["init_args"]["count"] = 1
        arguments = ["fit", *contract.Story.write(config, "config.yaml"), *devices(1)]
        processes.run_ranks(arguments, end=2)
        assert "val: each of 2 processes needs a sample" in Path("output_0.txt").read_text()


def devices(nodes):
    counts = ["--trainer.devices", "2"] if nodes == 1 else ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
    return [*counts, "--trainer.strategy", "ddp"]
