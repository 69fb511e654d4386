"""What tests of stored outputs share."""

import textwrap
from pathlib import Path

import pytest
import torch

SCRIPT = """
    import sys, torch
    sys.path.insert(0, {folder!r})
    from {module} import *
    from lightning.pytorch import Trainer

    if __name__ == "__main__":
        torch.set_num_threads(1)
        trainer = lambda **kwargs: Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, devices=2, strategy="ddp", **kwargs
        )
        module = fit(trainer, cache={cache}, cache_dtype="float32")
        if module.global_rank == 0:
            torch.save(module.student.state_dict(), {out!r})
"""


@pytest.fixture
def table_of_two_processes(tmp_path, monkeypatch, processes):
    """Calls ``fit`` of a test's file in two processes: live, then twice with one cache. Returns the cache's folder."""

    def make(file):
        monkeypatch.chdir(tmp_path)
        folder, module, results = str(Path(file).parent), Path(file).stem, []
        for number, cache in enumerate((None, str(tmp_path / "cache"), str(tmp_path / "cache"))):
            out = str(tmp_path / f"{number}.pt")
            script = textwrap.dedent(SCRIPT).format(folder=folder, module=module, cache=repr(cache), out=out)
            Path(f"run{number}.py").write_text(script)
            processes.run_ranks([f"run{number}.py"])
            results.append(torch.load(out))
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in results[0])
        (table,) = (tmp_path / "cache").iterdir()
        return table

    return make
