"""The table of selections: data without leaks, ways that train, figures of pseudo-labels, and tables by hand."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_lightning.models import CifarResNet


@pytest.fixture(scope="module")
def script(root):
    """Imports a script, which lies in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        yield importlib.import_module


class Images:
    """Noisy images with a bar for each class, 60 of each for training, in place of Fashion-MNIST."""

    def __init__(self, folder, train):
        count = 600 if train else 100
        generator = torch.Generator().manual_seed(int(train))
        self.targets = torch.arange(count) % 10
        self.data = torch.randint(0, 100, (count, 28, 28), dtype=torch.uint8, generator=generator)
        for number, y in enumerate(self.targets):
            self.data[number, 2 * y : 2 * y + 4, 4:24] += 150


@pytest.fixture
def tasks(script, tmp_path, monkeypatch):
    """The tasks, on tiny data and networks."""
    tasks, fashion = script("selections_tasks"), script("fashion")
    monkeypatch.setattr(fashion, "FashionMNIST", Images)
    monkeypatch.setattr(fashion, "VAL", 100)
    monkeypatch.setattr(fashion, "BATCH", 100)

    def network(num_classes=10):
        return CifarResNet(8, (2, 2, 2, 4), num_classes, in_channels=1)

    for name, value in {"STEPS": 4, "EVERY": 2, "POOL": 100, "STUDENT": network, "TEACHER": network}.items():
        monkeypatch.setattr(tasks, name, value)
    torch.save(network().state_dict(), tmp_path / "teacher.pt")
    return tasks


def test_samples_of_a_split(script):
    """Fewer labels are a part of more, the pool is the same, and no sample is in both."""
    tasks, y = script("selections_tasks"), torch.arange(90) % 3
    few, more = (tasks.draw(y, [n, n, 2 * n], [5, 6, 7], seed=3) for n in (2, 4))
    for (rows, known), n in ((few, 2), (more, 4)):
        assert len({*rows.tolist()}) == len(rows) == 18 + 4 * n and rows.sort().values.equal(rows)
        assert y[rows[known]].bincount().tolist() == [n, n, 2 * n]
        assert y[rows[~known]].bincount().tolist() == [5, 6, 7]
    assert {*few[0][few[1]].tolist()} < {*more[0][more[1]].tolist()}
    assert few[0][~few[1]].equal(more[0][~more[1]])
    assert not few[0].equal(tasks.draw(y, [2, 2, 4], [5, 6, 7], seed=4)[0])
    with pytest.raises(AssertionError, match="class 1 has 30"):
        tasks.draw(y, [2, 20, 2], [5, 11, 5], seed=0)


def test_the_tail_is_100_to_1(script):
    tail = script("selections_tasks").tail
    assert tail(100) == [100, 60, 36, 22, 13, 8, 5, 3, 2, 1]
    assert abs(sum(tail(None, 10_000)) - 10_000) < 5 and 95 < tail(None, 10_000)[0] / tail(None, 10_000)[-1] < 105


def test_every_way_has_four_tries_and_selections_of_its_own(script):
    tasks = script("selections_tasks")
    ways = {*tasks.Fashion.ways, *tasks.Mails.ways}
    assert ways == tasks.TRIES.keys()
    assert all(len(own) == len({*own}) == 4 for own in tasks.TRIES.values())
    assert {*tasks.LongTail.ways.values(), *tasks.OpenSet.ways.values()} <= ways
    for way in {*tasks.RULES, *tasks.ROUNDS}:
        first, again = (tasks.way_of(way, tasks.TRIES[way][0][1]) for _ in range(2))
        one, other = (
            made.keywords["selection"] if not callbacks else callbacks[0].selection
            for made, callbacks in (first, again)
        )
        assert isinstance(one, nn.Module) and one is not other  # no fit shares a state


@pytest.mark.parametrize("way", ["supervised, strong views", "AdaMatch", "refresh, TopKPerClass", "FixMatch with the "])
def test_a_way_trains(tasks, tmp_path, way):
    way = next(own for own in tasks.Fashion.ways if own.startswith(way))
    found = tasks.Fashion(tmp_path, 4).fit("test", 0, way, tasks.TRIES[way][0])
    assert 0 <= found["accuracy"] <= 100
    steps = [record["step"] for record in found["records"]]
    assert steps == ([] if way.startswith("supervised") else [2, 4])
    assert all(0 <= record["coverage"] <= 100 and record["unknown"] is None for record in found["records"])


def test_hidden_labels_change_no_weight(tasks, tmp_path, monkeypatch):
    """The truth of the pool is read by the records alone."""
    weights, found, fit = [], [], tasks.Images.fit

    def fit_and_store(self, *args):
        network, figures = fit(self, *args)
        weights.append(network.state_dict())
        return network, figures

    monkeypatch.setattr(tasks.Images, "fit", fit_and_store)
    images = tasks.Images(tmp_path, "test", 0)
    rows, known = tasks.draw(images.parts["train"][1], [4] * 10, [10] * 10, 0)
    for factor in (1, 0):  # as they are, and all of the first class
        images = tasks.Images(tmp_path, "test", 0)
        x, y = images.parts["train"]
        y = y.clone()
        y[rows[~known]] *= factor
        images.parts["train"] = x, y
        found.append(tasks.train_images(images, rows, known, *tasks.way_of("FreeMatch", 0.99), 0.01, "FreeMatch"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert found[0]["records"] != found[1]["records"]


@pytest.mark.parametrize("way", ["ABC", "supervised, adjusted", "FixMatch, adjusted"])
def test_a_long_tail_trains(tasks, tmp_path, monkeypatch, way):
    monkeypatch.setattr(tasks, "tail", lambda first, total=None: [*range(11 if total is None else 20, 1, -1)][:10])
    found = tasks.LongTail(tmp_path, "reversed").fit("test", 0, way, (0.01, 0.8))
    assert 0 <= found["balanced"] <= 100


def test_scikit_learn_gets_the_labels_alone(script):
    """Two clouds with one label each."""
    classical = script("selections_tasks").classical
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) + 6 * (torch.arange(40) % 2).unsqueeze(1)
    y = torch.where(torch.arange(40) < 2, torch.arange(40) % 2, -1)
    for way, setting in (("LabelSpreading", (10, 0.2)), ("SelfTrainingClassifier", (1.0, 0.75))):
        predicted = classical(way, setting, x.numpy(), y.numpy(), x.numpy())
        assert predicted.tolist() == (torch.arange(40) % 2).tolist()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("way", ["SoftMatch", "supervised, strong views", "SelfTrainingClassifier"])
def test_mails_train(tasks, monkeypatch, way, normalised):
    """Three clouds of vectors are told apart."""

    def letters(folder, part, features):
        targets = torch.arange(90) % 3
        noise = torch.randn(90, 16, generator=torch.Generator().manual_seed(len(part)))
        return SimpleNamespace(targets=targets, features=noise + 4 * nn.functional.one_hot(targets, 16))

    monkeypatch.setattr(tasks, "Letters", letters)
    monkeypatch.setattr(tasks.Mails, "steps", 20)
    found = tasks.Mails("folder", normalised).fit("test", 0, way, tasks.TRIES[way][2])
    assert found["macro F1"] > 60
    assert len(found.get("records", [])) == (10 if way == "SoftMatch" else 0)


def test_unknown_classes_are_in_the_pool_alone(tasks, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tasks, "train_images", lambda images, rows, known, *rest: seen.append((images, rows, known, rest))
    )
    monkeypatch.setattr(tasks.OpenSet, "labels", 5)
    for way in tasks.OpenSet.ways:
        tasks.OpenSet(tmp_path).fit("test", 0, way, (0.01, 0.8))
    for (images, rows, known, rest), way in zip(seen, tasks.OpenSet.ways, strict=True):
        classes, y = rest[-1], images.parts["train"][1][rows]
        assert {*y[known].tolist()} == {*classes} and len(classes) == 6
        unknown = sum(int((y[~known] == number).sum()) for number in range(10) if number not in classes)
        assert unknown == (0 if way.endswith("no unknown classes") else 48)
        assert len(y[~known]) - unknown == 48


def test_open_set_figures_are_of_known_classes(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.OpenSet, "labels", 5)
    found = tasks.OpenSet(tmp_path).fit("test", 0, "FixMatch, OpenSetFilter", (0.01, 0.0))
    assert 0 <= found["accuracy"] <= 100 and found["records"][-1]["unknown"] is not None


def test_watch_counts_weights(script):
    """Four decisions by hand, of which one is of an unknown class."""
    watch = script("selections_watch").Watch(torch.tensor([0, 1, 1, -1]), every=2)
    module = SimpleNamespace(pseudo_labels="online", selection=nn.Identity())
    watch.on_fit_start(None, module)
    target = nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 2)
    watch._listen(None, (target, None, torch.arange(4)), (target, torch.tensor([1.0, 0.5, 0.5, 0.25])))
    trainer = SimpleNamespace(global_step=1, callbacks=[watch])
    watch.on_train_batch_end(trainer, module, None, None, 0)
    assert watch.records == []  # not due
    trainer.global_step = 2
    watch.on_train_batch_end(trainer, module, None, None, 1)
    right = round(100 * 1.5 / 2.25, 2)
    assert watch.records == [{"step": 2, "coverage": 56.25, "precision": right, "of all": 50.0, "unknown": 25.0}]


def test_dropped_entries_keep_the_mean(script):
    drop = script("selections_tasks").Drop(0.5)
    found = drop(torch.ones(200, 50))
    assert {*found.unique().tolist()} == {0.0, 2.0} and 0.95 < float(found.mean()) < 1.05


@pytest.fixture
def measured(script, monkeypatch):
    """The script, with known figures: the second try is the best; FreeMatch is 3 points better."""
    selections = script("selections")

    def figures(cell, part, seed, way, setting):
        tries = selections.TRIES.get(way)
        if part == "val":
            assert seed in selections.TUNING_SEEDS[cell]
            return {"accuracy": 50.0 + 10 * (setting == tries[1]), "macro F1": 50.0 + 10 * (setting == tries[2])}
        number = [*selections.TRIES].index(way) if tries else 50 + len(way)
        score = 70.0 + 3 * (way == "FreeMatch") + seed**2 + 0.0001 * number * (seed == 1)  # no two ways are the same
        record = {"step": 2000, "coverage": 40.0, "precision": 90.0, "unknown": 20.0}
        return {"accuracy": score, "macro F1": score, "records": [record]}

    monkeypatch.setattr(selections, "in_parallel", lambda function, cases, _: [figures(*case) for case in cases])
    return selections


def test_settings_are_selected_at_250_labels(measured):
    cells = ["40 labels", "long tail, pool uniform", "mails"]
    best, tried = measured.select(None, cells, 1)
    assert {cell for cell, _ in best} == {"250 labels", "mails"}
    assert best["250 labels", "FixMatch"] == (0.01, 0.95) and best["mails", "FixMatch"] == (0.03, 0.8)
    assert tried["250 labels", "FixMatch"][0.01, 0.8] == 50
    assert measured.ways_of("long tail, pool uniform")["ABC"] == ("250 labels", "FixMatch")


def test_tables(measured, capsys):
    cells = ["250 labels", "open set", "mails", "mails, normalised"]
    best, tried = measured.select(None, cells, 1)
    values = measured.compare(None, cells, best, 3, 1)
    assert {cell: len(own["FixMatch"]) for cell, own in values.items()} == dict(zip(cells, (3, 3, 5, 5), strict=True))
    measured.show(values, best, tried)
    out = capsys.readouterr().out
    assert "| FreeMatch | 74.67 ± 2.08 |" in out
    assert "| FreeMatch | +3.0 [+3.0, +3.0], P 0.000 |" in out
    assert "| FixMatch, OpenSetFilter | 71.67 ± 2.08 |" in out and "| 40.0 | 90.0 | 20.0 |" in out
    assert "**0.01, 0.95: 60.0**" in out
    assert "| mails, normalised | macro F1 % |" in out
    assert "at steps 500, 1000, 2000 | 250 labels |" in out and "| FreeMatch | -, -, 40; 90.0 |" in out


def test_one_split_has_no_differences(measured, capsys):
    best, tried = measured.select(None, ["250 labels"], 1)
    measured.show(measured.compare(None, ["250 labels"], best, 1, 1), best, tried)
    out = capsys.readouterr().out
    assert "| FreeMatch | 73.00 |" in out and "points over" not in out


def test_longer_fits_have_settings_of_their_own(script, tasks, tmp_path):
    longer = script("selections_longer")
    fits, seen = SimpleNamespace(get=lambda settings, fit: (settings, fit())), []
    task = SimpleNamespace(fit=lambda *arguments: seen.append(arguments))
    assert longer.get(fits, task, (10_000, 2, "SoftMatch")) == ([10_000, 2, "SoftMatch"], None)
    assert seen == [("test", 2, "SoftMatch", (0.03, 0.999), 10_000)]
    found = tasks.Fashion(tmp_path, 4).fit("test", 0, "FixMatch", (0.03, 0.0), 2 * tasks.STEPS)
    assert found["records"][-1]["step"] == 2 * tasks.STEPS


def test_differences_are_corrected_for_the_rows(measured):
    own = {"FixMatch": [1.0, 2.0, 3.0], "a": [2.0, 3.5, 4.0], "b": [1.0, 2.5, 3.0]}
    found = measured.over(own, "FixMatch")
    # differences of a: 1, 1.5, 1: t = 7 of 2 degrees of freedom, P = 0.0198; of b: 0, 0.5, 0: t = 1, P = 0.4226
    assert found == {"FixMatch": "", "a": "+1.2 [+0.4, +1.9], P 0.040", "b": "+0.2 [-0.6, +0.9], P 0.423"}
    assert set(measured.over({"FixMatch": [1.0], "a": [2.0]}, "FixMatch").values()) == {""}


def test_records_without_a_figure_are_left_out(measured):
    found = [{"records": [{"step": 1, "precision": None}, {"step": 2, "precision": 80.0}]}]
    found += [{"records": [{"step": 1, "precision": 90.0}, {"step": 2, "precision": 90.0}]}]
    assert measured.mean_records(found, "precision") == {2: 85.0}


def test_the_picture_is_small(measured, tmp_path):
    records = [{"step": step, "coverage": step / 5, "precision": 90.0} for step in range(100, 600, 100)]
    measured.draw({"250 labels": {way: [{"records": records}] * 3 for way in measured.RULES}}, tmp_path / "a.png")
    assert 5_000 < (tmp_path / "a.png").stat().st_size < 60_000


def test_each_selection_is_a_row_of_costs(script, monkeypatch):
    cost, rows = script("selections_cost"), []
    assert {"FixMatch, again", "TopKPerClass", "FreeMatch"} < cost.SELECTIONS.keys()
    monkeypatch.setattr(cost, "STUDENT", lambda: CifarResNet(8, (2, 2, 2, 4), 10, in_channels=1))
    monkeypatch.setattr(cost, "SELECTIONS", {name: cost.SELECTIONS[name] for name in ("FixMatch", "FlexMatch")})

    class Table:
        def add(self, name, of, over, most, unit):
            rows.append((name, len(of), len(over), most))

    cost.measure(Table(), rounds=1, steps=1)
    assert rows == [("FlexMatch / FixMatch", 1, 1, 1.02)]
