"""One baseline for each distinct config."""

from copy import deepcopy
from pathlib import Path

import pytest

from kd_lightning.cli.baseline import baseline_of, with_seed
from kd_lightning.cli.methods.baselines import describe_baselines, find_baselines
from kd_lightning.cli.methods.read import MethodConfig
from kd_lightning.cli.parse import parse_config
from kd_lightning.errors import InputError
from kd_lightning.runs.run import Run
from kd_lightning.runs.yaml_file import dump_yaml


def test_equal_baselines_are_shared_and_others_are_explained(config):
    methods = []
    for name, path, value in (
        ("a", ("model", "soft_weight"), 0.5),
        ("b", ("data", "batch_size"), 48),
        ("c", ("model", "soft_weight"), 0.75),  # of the method alone
    ):
        one = deepcopy(config) | {"name": name}
        one["trainer"]["limit_train_batches"] = 2
        one[path[0]]["init_args"][path[1]] = value
        methods.append(MethodConfig(f"{name}.yaml", parse_config(one, "experiment")))
    shared, own = find_baselines(methods, 2)
    assert (shared.methods, own.methods) == ([0, 2], [1])
    assert [one["seed_everything"] for one in shared.configs] == [0, 1]
    expected = parse_config(baseline_of(with_seed(methods[0].config, 1)), "experiment")
    assert shared.configs[1] == expected and expected["name"] == "a_alone"
    first, second = describe_baselines([shared, own], methods)
    assert first == "a_alone is the baseline of a and c: the student alone with their settings."
    assert second.startswith("b_alone is the baseline of b: the student alone with its settings (data.batch_size: 48, ")
    assert "data.batch_size: 48, not 32" in second
    (line,) = describe_baselines([shared], methods)
    assert line.startswith("One baseline for all methods, a_alone: ")

    methods[1].config["model"]["class_path"] = "FeatureDistillModule"
    with pytest.raises(InputError, match=r"^b.yaml: experiment compares a student with itself trained on labels"):
        find_baselines(methods, 1)

    # a baseline that was trained for c in an earlier experiment counts
    folder = methods[2].config["trainer"]["default_root_dir"] + "/c_alone/version_0"
    Run.write_state(Path(folder), finished=True)
    trained = parse_config(baseline_of(with_seed(methods[2].config, 0)), "experiment")
    Path(folder, "config.yaml").write_text(dump_yaml(trained))
    assert find_baselines([methods[0], methods[2]], 1)[0].configs[0]["name"] == "c_alone"
