"""Texts of lists and files, tokens of any tokenizer, and what is refused."""

import json

import pytest
import torch

from kd_lightning import InputError, SemiSupervisedDataModule, TextSource

TEXTS = ["one", "two words", "a longer text of six words", "what else", "again", "the last of all these"] * 4
LABELS = ["short", "short", "long", "short", "short", "long"] * 4


class Words:
    """Stands for a tokenizer of transformers: a number for each word, 1 for the pad token."""

    pad_token_id = 1

    def __call__(self, text, *, truncation, max_length):
        assert truncation
        return {
            "input_ids": [10 + len(word) for word in text.split()][:max_length],
            "token_type_ids": [0] * len(text.split()[:max_length]),
        }


def pairs():
    return [*zip(TEXTS, LABELS, strict=True)]


def make(train=None, **kwargs):
    source = TextSource(train or pairs(), pairs()[:6], ["some text"] * 3, tokenizer=Words(), **kwargs)
    return SemiSupervisedDataModule(source, labeled=2, val_size=2, batch_size=5, unlabeled="source")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(workers):
    data = make(max_length=4)
    data.num_workers = workers
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert sorted(batch.x) == ["attention_mask", "input_ids", "token_type_ids"]
            for row, number in enumerate(batch.index.tolist()):
                text = TEXTS[number] if number < len(TEXTS) else "some text"
                expected = [10 + len(word) for word in text.split()][:4]
                rest = batch.x["input_ids"].shape[1] - len(expected)
                assert batch.x["input_ids"][row].tolist() == expected + [1] * rest
                assert batch.x["attention_mask"][row].tolist() == [1] * len(expected) + [0] * rest
                assert batch.x["token_type_ids"][row].tolist() == [0] * (len(expected) + rest)
                if batch.y[row] != -100:
                    assert ["long", "short"][batch.y[row]] == LABELS[number]
    assert data.class_names == ["long", "short"]
    assert data.train_dataloader().dataset.more_tensors == 2


def test_the_names_of_samples_do_not_depend_on_the_tokenizer(tmp_path):
    data, other = make(max_length=2), make()
    data.setup("")
    data.save_split(tmp_path / "split.json")
    assert data.identities("train") == other.identities("train")
    other.labeled = str(tmp_path / "split.json")
    other.setup("")
    assert other.split == data.split


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("labels", [LABELS, [0, 1, 2, 0, 1, 2] * 4])
def test_files(tmp_path, ending, labels):
    labels = [*labels]
    labels[3] = None
    path = tmp_path / f"data.{ending}"
    rows = [
        {"note": "x", "body": f'{text}, "quoted"\nline', "kind": label}
        for text, label in zip(TEXTS, labels, strict=True)
    ]
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    else:
        import csv

        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    parts = TextSource(path, str(path), path, tokenizer=Words(), text="body", label="kind").load()
    names = sorted({*LABELS}) if labels[0] == "short" else None
    expected = [-100 if one is None else names.index(one) if names else one for one in labels]
    assert parts.train.targets.tolist() == parts.test.targets.tolist() == expected
    assert parts.train.images.texts == [row["body"] for row in rows] == parts.unlabeled.texts
    assert parts.class_names == names
    assert parts.pad_token == 1


def test_a_tokenizer_without_pad_token_or_mask():
    class Plain:
        pad_token_id = None

        def __call__(self, text, **kwargs):
            return {"input_ids": torch.arange(len(text))}

    parts = TextSource([("abc", 0), ("a", 1)], tokenizer=Plain()).load()
    assert parts.pad_token == 0
    inputs, label = parts.train.images[0]
    assert inputs["attention_mask"].tolist() == [1, 1, 1] and label == 0
    with pytest.raises(InputError, match="tokenizer must return a mapping with input_ids, got list"):
        TextSource([("abc", 0)], tokenizer=lambda text, **kwargs: [1]).load().train.images[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,kind\na,0\n", r"train: .*a\.csv must have text and label in each row, but row 1 has text, kind"),
        ("text,label\na,0\nb\n", None),
        (None, r"train: .*a\.csv cannot be read"),
    ],
)
def test_files_that_do_not_fit(tmp_path, content, message):
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_text(content)
    source = TextSource(path, tokenizer=Words())
    if message is None:
        assert source.load().train.targets.tolist() == [0, -100]
        return
    with pytest.raises(InputError, match=message) as caught:
        source.load()
    assert "\n" not in str(caught.value)


def test_values_that_do_not_fit():
    with pytest.raises(InputError, match="max_length must be a whole number of at least 1, got 0"):
        TextSource([], tokenizer=Words(), max_length=0)
    with pytest.raises(
        InputError, match="a row must be .text, label., .text, label, strong text., or a text alone, but row 1 is 3"
    ):
        TextSource([("a", 0), 3], tokenizer=Words()).load()
    with pytest.raises(InputError, match="train: the train part of TextSource is empty"):
        SemiSupervisedDataModule(TextSource([], tokenizer=Words())).setup("")


def test_a_tokenizer_of_transformers(tmp_path):
    """By its folder, without a network."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS for word in text.split()})
    model = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]")
    )
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "t"
    )
    source = TextSource(pairs(), tokenizer=str(tmp_path / "t"), max_length=3)
    data = SemiSupervisedDataModule(source, val_size=0, batch_size=4)
    for batch in data.train_dataloader():
        for row, number in enumerate(batch.index.tolist()):
            tokens = batch.x["input_ids"][row][batch.x["attention_mask"][row] == 1].tolist()
            assert tokens == [words.index(word) + 2 for word in TEXTS[number].split()[:3]]
    with pytest.raises(InputError, match="tokenizer: .*nothing is no folder of a tokenizer of transformers") as caught:
        TextSource(pairs(), tokenizer=str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)


def test_from_a_config(tmp_path):
    """The sources of this kind take their arguments from YAML."""
    import jsonargparse

    from kd_lightning import ImageMaskFolder
    from kd_lightning.data import Source

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--source", type=Source)
    name = f"{__name__}.Words"
    arguments = {"train": "a.csv", "tokenizer": {"class_path": name}, "max_length": 7}
    parsed = parser.parse_object({"source": {"class_path": "kd_lightning.TextSource", "init_args": arguments}})
    found = parser.instantiate_classes(parsed).source
    assert type(found.tokenizer).__name__ == "Words" and (found.train, found.max_length) == ("a.csv", 7)
    arguments = {"train": "a", "class_names": ["x", "y"], "image_size": [8, 9], "void": None}
    parsed = parser.parse_object({"source": {"class_path": "kd_lightning.ImageMaskFolder", "init_args": arguments}})
    masks = parser.instantiate_classes(parsed).source
    assert isinstance(masks, ImageMaskFolder) and masks.void is None and masks.class_names == ["x", "y"]


class TestStrongTexts:
    """Two texts of a sample: the second one is the strong view."""

    STRONG = [f"said {text} otherwise" for text in TEXTS]

    def tokens(self, text):
        return [10 + len(word) for word in text.split()]

    def check(self, data, strong):
        """All views of both texts, whatever their lengths."""
        seen = set()
        for batch in data.train_dataloader():
            for row, number in enumerate(batch.index.tolist()):
                for x, text in ((batch.x, TEXTS[number % len(TEXTS)]), (batch.x_strong, strong[number])):
                    assert x["input_ids"].shape == batch.x["attention_mask"].shape
                    assert x["input_ids"][row][x["attention_mask"][row] == 1].tolist() == self.tokens(text)
                seen.add(number)
        return seen

    @pytest.mark.parametrize("ending", ["csv", "jsonl", "rows"])
    def test_batches(self, tmp_path, ending):
        rows = [*zip(TEXTS, LABELS, self.STRONG, strict=True)]
        if ending == "rows":
            options = {"train": rows}
        else:
            named = [dict(zip(("text", "label", "other"), row, strict=True)) for row in rows]
            path = tmp_path / f"data.{ending}"
            if ending == "csv":
                path.write_text("\n".join(["text,label,other", *map(",".join, rows)]))
            else:
                path.write_text("\n".join(map(json.dumps, named)))
            options = {"train": path, "strong_text": "other"}
        source = TextSource(**options, test=options["train"], tokenizer=Words())
        data = SemiSupervisedDataModule(source, labeled=2, val_size=2, batch_size=5)
        assert self.check(data, self.STRONG) == {*range(len(TEXTS))} - {*data.split.val}
        for loader in (data.val_dataloader(), data.test_dataloader(), data.pool_dataloader()):
            for batch in loader:
                assert batch.x_strong is None and sorted(batch.x) == ["attention_mask", "input_ids", "token_type_ids"]
        plain = SemiSupervisedDataModule(TextSource(pairs(), tokenizer=Words()), labeled=2, val_size=2)
        assert data.identities("train") == plain.identities("train")  # a second text is no other sample

    def test_of_the_pool_alone(self):
        """Labeled texts are their own strong view."""
        pool = [(text, None, strong) for text, strong in zip(TEXTS, self.STRONG, strict=True)]
        source = TextSource(pairs(), unlabeled=pool, tokenizer=Words())
        data = SemiSupervisedDataModule(source, val_size=0, batch_size=5, unlabeled="source")
        assert self.check(data, [*TEXTS, *self.STRONG]) == {*range(2 * len(TEXTS))}

    @pytest.mark.parametrize(
        ("train", "unlabeled", "message"),
        [
            ([("a", 0, "b"), ("c", None)], None, "train: a text without a label must have a strong text, but row 1"),
            ([("a", 0, "b"), ("c", -1)], None, "train: a text without a label must have a strong text, but row 1"),
            ([("a", 0)], [("b", None, "c"), "d"], "unlabeled: a text without a label .* but row 1 has none"),
            ([("a", 0, 3)], None, "train: a row must be .text, label., .* or a text alone, but row 0 is"),
        ],
    )
    def test_rows_that_do_not_fit(self, train, unlabeled, message):
        with pytest.raises(InputError, match=message):
            TextSource(train, unlabeled=unlabeled, tokenizer=Words()).load()

    def test_files_that_do_not_fit(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0, "other": 3}')
        with pytest.raises(InputError, match=r"train: other of row 1 of .*a\.jsonl must be a text, got 3"):
            TextSource(tmp_path / "a.jsonl", strong_text="other", tokenizer=Words()).load()
        with pytest.raises(InputError, match="strong_text: no row of train has a text in the column 'wrong'"):
            TextSource(tmp_path / "a.jsonl", strong_text="wrong", tokenizer=Words()).load()
