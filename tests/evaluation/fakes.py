"""An engine without a network: its embeddings and logits are simple functions of the text."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace

import numpy as np

LANGUAGES = ("arb_Arab", "eng_Latn", "fra_Latn", "swh_Latn")


class FakeEngine:
    """Reads the words `k0`, `k1`, ... of a text: they are its class. `labels` None means a model without a head."""

    def __init__(
        self, labels=None, *, side="mt", languages=LANGUAGES, fallbacks=None, kind="classification", classes=3
    ):
        tokenizer = SimpleNamespace(
            languages=tuple(languages), fallbacks=dict(fallbacks or {}), side=lambda name, rows, ends: None
        )
        head = None if labels is None and kind == "classification" else object()
        config = SimpleNamespace(
            labels=list(labels) if labels else None,
            head=head,
            prompt=None,
            reader="stack",
            causal=False,
            fusion=None,
        )
        self.model = SimpleNamespace(side=side, tokenizer=tokenizer, head=head, config=config)
        self.tokenizer, self.truncated = tokenizer, 0
        self.classes = classes
        self.seen: list = []

    def _features(self, rows):
        rows = list(rows)
        self.seen.extend(rows)
        out = np.zeros((len(rows), self.classes + 2), np.float32)
        for index, row in enumerate(rows):
            for word in (row.text + " " + (row.text_pair or "")).split():
                if word.startswith("k") and word[1:].isdigit():
                    out[index, int(word[1:])] += 1
            out[index, -1] = len(row.text) / 10
        return out

    def classify(self, rows):
        # logit order is the order of the model's own labels
        return self._features(rows)[:, : len(self.model.config.labels)]

    def encode_rows(self, rows):
        features = self._features(rows)
        for start in range(0, len(features), 3):
            yield features[start : start + 3]


def write_folder(
    root, languages=("eng_Latn", "fra_Latn", "swh_Latn"), labels=("a", "b", "c"), rows=12, words=("k0", "k1", "k2")
):
    """A folder task `<root>/<language>/<split>.tsv` with the class of a row in its text."""
    for language in languages:
        folder = root / language
        folder.mkdir(parents=True)
        for split, count in (("train", 3 * rows), ("dev", rows), ("test", rows)):
            lines = [f"{language} {words[i % len(labels)]} word{i}\t{labels[i % len(labels)]}" for i in range(count)]
            (folder / f"{split}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return root


def put(path: Path, text: str) -> Path:
    """A file with these very characters, in folders that are made for it; compressed where its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
