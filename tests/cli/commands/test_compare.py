"""compare: its command line. The tables are tested in ``tests/runs/figures``."""

import pytest
import yaml

from kd_lightning.__main__ import main
from kd_lightning.runs.results import Result, write_result
from kd_lightning.runs.run import Run


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs/a/version_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "a", "seed_everything": 0, "model": {}}))
    Run.write_state(folder, finished=True)
    for part, n in (("test", 300), ("val", 200)):
        write_result(Result(part, n, {"accuracy": n / 1000}, None, folder), [])
    return folder


@pytest.mark.parametrize(("options", "part", "n"), [([], "test", 300), (["--part", "val"], "val", 200)])
def test_command_line(run, capsys, options, part, n):
    main(["compare", str(run.parent), *options, "--out", str(run / "out")])
    printed = capsys.readouterr().out
    assert f"({part}, n = {n})" in printed and f"{n / 10:.2f}" in printed
    assert (run / "out/comparison.md").is_file()


def test_compare_needs_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path)])
    assert end.value.code == 2
    assert f"{tmp_path} is no run" in capsys.readouterr().err
