"""The journal of a search: what is tried, by whom, and what outlives a process."""

import json
import signal
from pathlib import Path

import pytest

from kd_lightning.cli.tuning.space import Setting
from kd_lightning.cli.tuning.study import Search
from kd_lightning.cli.tuning.trial import Metric
from kd_lightning.errors import InputError

ACCURACY = Metric("val/accuracy", "max", best=True)
SPACE = [Setting("a.lr", 0.001, 1.0, log=True), Setting("a.w", 0.1, 1.0), Setting("t.n", values=(1, 2, 4))]
OWN = {"a.lr": 0.03, "a.w": 0.5, "t.n": 4}


def search(folder=Path("tuning"), total=8, space=SPACE, own=OWN, metric=ACCURACY, identity=("config",)):
    return Search(folder, "tiny", identity, space, own, metric, total)


def value_of(values):
    values = OWN | values
    return 1 - abs(values["a.lr"] - 0.1) - abs(values["a.w"] - 0.3) - values["t.n"] / 100


def run(one, most=100):
    """Run trials to their end; the settings of each."""
    found = []
    while len(found) < most and (started := one.start()) is not None:
        found.append(started.values)
        one.end(started, [value_of(started.values)], value_of(started.values))
    return found


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_first_trial_has_the_own_values_and_all_lie_in_the_space():
    one = search(total=12)
    tried = run(one)
    assert tried[0] == {} and len(tried) == 12 and all(tried[1:])
    for values in tried[1:]:
        assert values.keys() == OWN.keys()
        assert 0.001 <= values["a.lr"] <= 1 and 0.1 <= values["a.w"] <= 1 and values["t.n"] in (1, 2, 4)
    ended = one.ended()
    assert [trial.number for trial in ended] == [*range(1, 13)]
    assert {trial.state for trial in ended} == {"complete"}
    best = max(map(value_of, tried))
    assert one.best().value == best and value_of(one.best().values) == best
    assert one.is_done and one.start() is None


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    unbroken = run(search(tmp_path / "unbroken", total=9))
    parts = []
    for _ in range(2):  # as two processes in turn
        parts += run(search(total=9), most=3)
        stopped = search(total=9)
        stopped.stop(stopped.start())
    parts += run(search(total=9))
    assert parts == unbroken
    assert len(run(search(total=10))) == 1


def test_fewer_trials_than_there_are():
    """The first N count, so that both searches are compared by as many."""
    whole = search(total=12)
    run(whole)
    few = search(total=4)
    assert few.is_done and few.start() is None
    assert few.ended() == whole.ended()[:4]
    assert few.best().value == max(trial.value for trial in whole.ended()[:4])


def test_fewer_trials_while_another_process_runs_one_of_them(monkeypatch):
    one = search(total=4)
    monkeypatch.setattr(one, "_end_dead", lambda: None)  # of this process, whose lock it would have
    started = [one.start() for _ in range(4)]
    for late in (0, 1, 3):
        one.end(started[late], [0.5], 0.5)
    few = search(total=3)
    assert [trial.number for trial in few.ended()] == [1, 2] and not few.is_done and few.running() == 1


def test_another_config_never_continues():
    run(search(total=2))
    other = search(identity=("other",))
    assert other.ended() == []
    assert other.start().own
    assert len(search(total=2).ended()) == 2


def test_own_values_outside_of_the_space():
    """They are the first trial all the same."""
    own = {"a.lr": 5.0, "a.w": 0.5, "t.n": 3}
    one = search(own=own)
    first = one.start()
    assert first.own and first.values == {}
    one.end(first, [0.9], 0.9)
    second = one.start()
    assert second.values.keys() == own.keys() and second.values["t.n"] in (1, 2, 4)
    one.end(second, [0.1], 0.1)
    assert one.best().values == {}


def test_less_is_better():
    one = search(metric=Metric("val/loss", "min", best=True), total=3)
    for value in (0.5, 0.2, 0.7):
        one.end(one.start(), [value], value)
    assert one.best().value == 0.2
    assert [one.metric.is_better(*pair) for pair in ((0.1, 0.2), (0.2, 0.1), (0.1, 0.1))] == [True, False, False]


def test_pruning_starts_after_five_whole_trials_and_never_hits_the_own_values():
    one = search(total=20)
    for number in range(5):
        started = one.start()
        assert not any(one.report(started, step, 0.5) for step in range(1, 9)), number
        one.end(started, [0.5], 0.5)
    bad = one.start()
    assert not one.report(bad, 1, 0.1)  # before a quarter of its fit
    assert one.report(bad, 2, 0.1)
    one.prune(bad, "after epoch 1")
    good = one.start()
    assert not one.report(good, 2, 0.6)
    one.fail(good, "weights are not finite")
    states = [(trial.state, trial.value, trial.reason) for trial in one.ended()[5:]]
    assert states == [("pruned", 0.1, "after epoch 1"), ("failed", None, "weights are not finite")]
    assert one.best().value == 0.5


def test_the_first_trial_is_not_pruned_when_another_process_repeats_it(monkeypatch):
    one = search(total=20)
    monkeypatch.setattr(one, "_end_dead", lambda: None)  # of this process, whose lock it would have
    first = one.start()
    for _ in range(6):
        started = one.start()
        one.report(started, 2, 0.9)
        one.end(started, [0.9], 0.9)
    one.stop(first)
    again = one.start()
    assert again.own and again.number == 1
    assert not one.report(again, 2, 0.0)
    assert one.start().number == 8


def test_all_failed():
    one = search(total=3)
    for number in range(3):
        one.fail(one.start(), f"reason {number}")
    assert one.is_done
    with pytest.raises(InputError, match=r"--tune: all 3 trials of tiny have failed; the first: reason 0"):
        one.best()


def test_equal_settings_have_the_same_value():
    one = search(space=[SPACE[2]], own={"t.n": 4}, total=9)
    first = one.start()
    assert one.same_as(first) is None
    one.end(first, [0.25], 0.25)
    seen = {4}
    while (started := one.start()) is not None:
        same = one.same_as(started)
        assert (same is not None) == (started.values["t.n"] in seen)
        seen.add(started.values["t.n"])
        one.end(started, [0.25], 0.25)
    assert one.best().number == 1


def test_no_setting_means_one_trial():
    one = search(space=[], own={}, total=9)
    assert run(one) == [{}] and one.is_done and len(one.ended()) == 1


def test_stopping_removes_the_folder():
    one = search()
    started = one.start()
    (started.folder / "fit_0").mkdir()
    one.stop(started)
    assert not started.folder.exists()
    assert one.ended() == [] and one.running() == 0
    assert one.start().number == 1


def test_a_line_that_a_killed_process_has_left_is_cut():
    run(search(total=3))
    journal = Path("tuning/journal.log")
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_id":"x')
    assert len(search(total=3).ended()) == 3
    run(search(total=5))
    assert len(search(total=5).ended()) == 5
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*lines[:5], b"no json", *lines[5:], b""]))
    with pytest.raises(InputError, match="journal of the search is damaged"):
        search(total=3)


SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_study import search, value_of
name, kill = sys.argv[1], sys.argv[2] == "kill"
one = search(total=10)
while (started := one.start()) is not None:
    (started.folder / "fit_0").mkdir()
    if kill and started.number >= 3:
        Path("killed.json").write_text(json.dumps([started.number, started.values, str(started.folder)]))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    one.end(started, [value_of(started.values)], value_of(started.values))
    with Path(f"{{name}}.txt").open("a") as file:
        file.write(f"{{started.number}}\\n")
"""


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_process_and_two_at_once(processes, tmp_path):
    Path("script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    unbroken = run(search(tmp_path / "unbroken", total=10))
    codes, _ = processes.run((["script.py", "first", "kill"], {}))
    assert codes == [-signal.SIGKILL]
    number, values, folder = json.loads(Path("killed.json").read_text())
    assert (number, values) == (3, unbroken[2]) and Path(folder).is_dir()
    one = search(total=10)
    assert len(one.ended()) == 2 and one.running() == 1
    codes, outputs = processes.run(*((["script.py", name, "no"], {}) for name in ("second", "third")))
    assert codes == [0, 0], outputs
    assert not Path(folder).exists()  # of the trial that was killed
    assert one.is_done and one.running() == 0
    done = [Path(f"{name}.txt") for name in ("first", "second", "third")]
    numbers = [int(line) for file in done if file.is_file() for line in file.read_text().split()]
    assert sorted(numbers) == [*range(1, 11)]  # each once
    assert sum(trial.values == {} for trial in one.ended()) == 1
    assert {json.dumps(trial.values) for trial in one.ended()} >= {json.dumps(values)}
