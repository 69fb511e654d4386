"""YAML texts that would never end are refused."""

import pytest
import yaml

from kd_lightning.runs.yaml_file import UnboundedYAMLError, dump_yaml, load_dumped, load_yaml

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: &b [*b]", "line 2: a value holds itself"),
        ("a: &a {b: *a}", "line 1: a value holds itself"),
        ("&a {<<: *a}", "line 1: a value holds itself"),
        (LAUGHS, "repeat more than 100,000 values"),
        ("[" * 2000 + "]" * 2000, "nests too deeply"),
    ],
)
def test_unbounded(text, reason):
    with pytest.raises(UnboundedYAMLError, match=reason):
        load_yaml(text)


@pytest.mark.parametrize("text", ["a: [", "a: 2001-13-45", "!!python/object:os.system {}", "? [1]\n: 2"])
def test_other_errors_are_yaml_errors(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize("text", ["", "3", "a: &a [1, {b: 2}]\nc: *a\nd: {<<: {e: 1}, f: null}"])
def test_reads_what_safe_load_reads(text):
    assert load_yaml(text) == yaml.safe_load(text)


def test_reads_what_was_dumped():
    odd = {
        "a": [1e-5, float("inf"), -0.5, 10**20],
        "b": "1e3",
        "c": ["null", None, "", "~", "é", "x\n  y\n", " #", "\x07"],
    }
    whole = odd | {"d": {"e": odd["a"]}, "long": "word " * 60, 1: True, "true": "2001-01-01", "empty": [{}, []]}
    found = load_dumped(dump_yaml(whole))
    assert found == load_yaml(dump_yaml(whole)) == whole
    assert found["d"]["e"] is not found["a"]
