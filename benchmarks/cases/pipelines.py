"""Text in, batches or translations out: pack + collate and translate, on the demo world's texts and trained models.

python -m benchmarks.cases.pipelines
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtllm_fast.data.batch import Batch
from mtllm_fast.data.pack import token_budget_packs
from mtllm_fast.data.read import TextRow
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.miniworld.languages import ENGLISH
from mtllm_fast.miniworld.world import World

from .. import REPO
from ..common import Record, commit
from ..lengths import nli_texts, sentence_texts
from ..registry import Case, Study, Variant, Work, register
from ..run import main
from .states import demo_tokenizer, demo_translator, foreign_texts

BUDGET = 4096


# ---- pack + collate


@dataclass
class Texts:
    """Rows and the two tokenizers."""

    rows: list[TextRow]
    tokenizer: StackTokenizer


def make_texts(texts: str = "world", count: int = 512, *, dtype: torch.dtype, device: str) -> Texts:
    """English texts: "world" (the demo's documents), or "NLI" and "sentences" where the real data is present."""
    found: list[str] | None = None
    if texts == "NLI":
        pairs = nli_texts()
        found = [f"{a} {b}" for a, b in pairs[:count]] if pairs else None
    elif texts == "sentences":
        real = sentence_texts()
        found = list(real[:count]) if real else None
    if found is None:
        found = list(World(seed=1).documents(count))
    return Texts([TextRow(text, ENGLISH) for text in found], demo_tokenizer())


def collate_ours(align: bool, p: Texts) -> list[Batch]:
    """Tokenise both sides, pack to a budget best-fit, align, batch: what the loader does with a window of rows."""
    from mtllm_fast.data.batch import tokenise_rows

    tokenised = tokenise_rows(p.rows, p.tokenizer, ("mt", "llm"))
    sides = [tokenised.sides[name].ids for name in ("mt", "llm")]
    costs = [(len(a), len(b)) for a, b in zip(*sides, strict=True)]
    return [tokenised.batch(pack, align) for pack in token_budget_packs(costs, BUDGET)]


def collate_padded(p: Texts) -> list[tuple[Any, Any]]:
    """Both tokenizers called with padding on batches of 32 texts in their order; nothing is aligned."""
    return [
        tuple(
            tokenizer([row.text for row in p.rows[i : i + 32]], padding=True, return_tensors="pt", padding_side="right")
            for tokenizer in (p.tokenizer.mt, p.tokenizer.llm)
        )  # type: ignore[misc]
        for i in range(0, len(p.rows), 32)
    ]


def tokenise_only(p: Texts) -> list[Any]:
    """The tokenizers' own work: the least that any collation costs."""
    texts = [row.text for row in p.rows]
    return [tokenizer.backend_tokenizer.encode_batch(texts) for tokenizer in (p.tokenizer.mt, p.tokenizer.llm)]


def content(p: Texts, batches: list[Any]) -> dict[str, Tensor]:
    """The tokens of either side without special ones, sorted: batches hold the same rows in another order."""
    found: dict[str, Tensor] = {}
    for index, (name, tokenizer) in enumerate((("mt", p.tokenizer.mt), ("llm", p.tokenizer.llm))):
        parts = []
        for batch in batches:
            if isinstance(batch, Batch):
                parts.append(getattr(batch, name).input_ids)
            else:
                parts.append(batch[index]["input_ids"][batch[index]["attention_mask"].bool()])
        ids = torch.cat(parts)
        special = torch.tensor(tokenizer.all_special_ids)
        found[name] = ids[~torch.isin(ids, special)].sort().values.double()
    return found


def content_exact(p: Texts) -> dict[str, Tensor]:
    """The same, one text at a time."""
    out = {}
    for name, tokenizer in (("mt", p.tokenizer.mt), ("llm", p.tokenizer.llm)):
        ids = [i for row in p.rows for i in tokenizer(row.text, add_special_tokens=False)["input_ids"]]
        out[name] = torch.tensor(ids).sort().values.double()
    return out


def text_shape(p: Texts) -> dict[str, int]:
    return {"B": len(p.rows), "characters": sum(len(row.text) for row in p.rows)}


register(
    Case(
        name="pack_collate",
        about="texts to batches: both tokenizers, packing to a budget of 4,096 tokens, alignment",
        make=make_texts,
        sizes={
            "quick": ({"label": "demo texts", "texts": "world", "count": 256},),
            "cpu": tuple({"label": n, "texts": n, "count": 1024} for n in ("NLI", "sentences")),
            "cuda": (),
        },
        variants={
            "ours": Variant(partial(collate_ours, True), content, ours=True, devices=("cpu",)),
            "ours, unaligned": Variant(partial(collate_ours, False), content, ours=True, devices=("cpu",)),
            "padded": Variant(collate_padded, content, devices=("cpu",)),
            "tokenizers alone": Variant(tokenise_only, gated=False, devices=("cpu",)),
        },
        reference=content_exact,
        tolerance={"fp32": 1e-9},
        shape=text_shape,
        warm={"texts": "world", "count": 4},
        floor_variant="tokenizers alone",
        sources=("mtllm_fast/data/*.py",),
    )
)


# ---- translate


@dataclass
class Foreign:
    """Texts of one language and the demo's trained MT model."""

    texts: list[str]
    language: str


def make_foreign(language: str = "xda_Deva", count: int = 192, *, dtype: torch.dtype, device: str) -> Foreign:
    return Foreign(foreign_texts(language, count), language)


def translate_ours(p: Foreign) -> list[str]:
    """Translator: rows sorted by length, batches by token budget."""
    return demo_translator().translate(p.texts, p.language, ENGLISH, max_tokens=2048)  # type: ignore[no-any-return]


def translate_padded(batch: int, p: Foreign) -> list[str]:
    """`generate` on batches of texts in their order, padded to the longest, as a plain loop does."""
    translator = demo_translator()
    tokenizer, model = translator.tokenizer.mt, translator.model
    settings = copy.deepcopy(model.generation_config)
    settings.max_length, settings.num_beams, settings.do_sample = None, 1, False
    out: list[str] = []
    for i in range(0, len(p.texts), batch):
        rows = [TextRow(text, p.language) for text in p.texts[i : i + batch]]
        ids = [torch.from_numpy(x) for x in translator.tokenizer.mt_side(rows).ids]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        with torch.no_grad():
            found = model.generate(
                input_ids=padded,
                attention_mask=(padded != tokenizer.pad_token_id).long(),
                generation_config=settings,
                forced_bos_token_id=translator.tokenizer.language_id(ENGLISH),
                max_new_tokens=2 * padded.shape[1] + 32,
            )
        out += tokenizer.batch_decode(found, skip_special_tokens=True)
    return out


def same(p: Foreign, texts: list[str]) -> dict[str, Tensor]:
    """Whether every text is what the model gives for it alone: 1 and 0."""
    alone = _alone(p)
    return {"translations": torch.tensor([float(a.strip() == b.strip()) for a, b in zip(texts, alone, strict=True)])}


_ALONE: dict[str, str] = {}


def _alone(p: Foreign) -> list[str]:
    for text in p.texts:
        if text not in _ALONE:
            _ALONE[text] = translate_padded(1, Foreign([text], p.language))[0]
    return [_ALONE[text] for text in p.texts]


def first_texts(p: Foreign) -> Foreign:
    return Foreign(p.texts[:24], p.language)


def all_ones(p: Foreign) -> dict[str, Tensor]:
    return {"translations": torch.ones(len(p.texts))}


def translate_work(p: Foreign) -> Work:
    """Products of encoder and decoder over the tokens of source and translation (taken as equally many)."""
    translator = demo_translator()
    tokens = sum(len(x) for x in translator.tokenizer.mt_side([TextRow(t, p.language) for t in p.texts]).ids)
    weights = sum(x.numel() for n, x in translator.model.named_parameters() if x.dim() == 2 and "embed" not in n)
    head = translator.model.get_output_embeddings().weight.numel()
    return Work(0.0, 2.0 * tokens * (weights + head))


register(
    Case(
        name="translate",
        about="greedy translation of the demo world's sentences into English by its trained MT model",
        make=make_foreign,
        sizes={
            "quick": ({"label": "48 texts", "count": 48},),
            "cpu": ({"label": "384 texts", "count": 384},),
            "cuda": (),
        },
        variants={
            "ours": Variant(translate_ours, same, ours=True, devices=("cpu",)),
            "padded, 32 in order": Variant(partial(translate_padded, 32), same, devices=("cpu",)),
            "one by one": Variant(partial(translate_padded, 1), same, devices=("cpu",), slow=True),
        },
        reference=all_ones,
        tolerance={"fp32": 1e-9},
        shape=lambda p: {"B": len(p.texts), "characters": sum(map(len, p.texts))},
        warm={"count": 2},
        work=translate_work,
        small=first_texts,
        sources=("mtllm_fast/inference/translator.py",),
    )
)


# ---- encode

# Weights of the layers of encode.py in units of D²: 4 encoder layers, 4 of a Llama with an MLP of 2.75 D, the
# projection. Attention's own products are left out, so the floor is a little low.
ENCODE_WEIGHTS = 4 * (4 + 8) + 4 * (4 + 3 * 2.75) + 1


def encode(device: str, repeats: int, memory: bool, quick: bool) -> list[Record]:
    """The records of `encode.py`, in a process of its own; none outside a clone, whose tests it needs."""
    if not (REPO / "tests" / "tiny.py").is_file():
        return []
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.cases.encode", "--device", device, "--json", file.name]
        command += ["--texts", "64" if quick else "256", "--repeats", str(repeats)]
        command += ["--threads", str(torch.get_num_threads()), *(() if memory else ("--no-memory",))]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        rows = json.loads(Path(file.name).read_text() or "[]")
    if not rows:
        raise RuntimeError(f"benchmarks.cases.encode failed:\n{done.stderr}")
    records = []
    for row in rows:
        record = Record(**row)
        record.case, _, record.size = record.case.partition(", ")
        record.ours, record.commit = record.variant == "ours", commit()
        record.gate_detail.pop("control", None)  # what the gate must refuse is no error of the variant
        record.floor_flops = 2.0 * ENCODE_WEIGHTS * record.shape["D"] ** 2 * record.shape["T"]
        records.append(record)
    return records


register(
    Study(
        name="encode",
        about="Engine.encode of texts of real lengths, tokenisation included, against the padded Hugging Face loop",
        run=encode,
        sources=("mtllm_fast/inference/*.py", "mtllm_fast/models/attention/*.py"),
    )
)


if __name__ == "__main__":
    sys.exit(main(cases=("pack_collate", "translate"), prog="benchmarks.cases.pipelines"))
