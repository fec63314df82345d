"""What a run reads, known by content: it may move with its folder, and may not change before the run is continued."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..data.language import ENGLISH_CODES, language_read, reads_language
from ..data.read import RowStream, TextRow, resolve
from ..data.store import TokenStore
from ..jobs.fingerprint import of_file
from ..jobs.ledger import differing
from ..models import MTLLM
from ..models.storage import read_config

_MODEL_FILES = ("*.safetensors", "config.json", "tokenizer.json", "sentencepiece.bpe.model", "tokenizer.model")


def files_of(source: RowStream | str | Path) -> dict[str, str]:
    """Digest by file name of a stream's files, a model folder (its path) or one file; {} for names of the hub."""
    if isinstance(source, RowStream):
        try:
            paths = resolve(source.source)
        except (FileNotFoundError, ValueError):
            return {}
        root = Path(source.source)
        return {path.relative_to(root).as_posix() if root.is_dir() else path.name: of_file(path) for path in paths}
    folder = Path(source)
    if folder.is_file():
        return {folder.name: of_file(folder)}
    if not folder.is_dir():
        return {}
    return {path.name: of_file(path) for pattern in _MODEL_FILES for path in sorted(folder.glob(pattern))}


def rows_digest(rows: Iterable[TextRow]) -> str:
    """Number and SHA-256 of rows that are at hand."""
    found, count = hashlib.sha256(), 0
    for row in rows:
        parts: tuple[object, ...] = (row.text, row.language or ENGLISH_CODES[0], row.text_pair, row.label, row.choices)
        if row.teacher_text is not None:  # rows without one keep the digest that they had
            parts += ("teacher_text", row.teacher_text, *(() if row.teacher_pair is None else (row.teacher_pair,)))
        if row.target is not None:
            parts += ("target", row.target, *(() if row.finished else ("unfinished",)))
        if row.soft_label is not None:
            parts += ("soft_label", row.soft_label)
        found.update(repr(parts).encode("utf-8", "surrogatepass"))
        count += 1
    return f"{count} rows {found.hexdigest()}"


def has_teacher_text(rows: object) -> bool:
    """Whether rows have a text of their own for the teacher; False for an iterable that must be read to know."""
    if isinstance(rows, RowStream):
        return "teacher_text_column" in rows.wanted
    return isinstance(rows, Sequence) and any(row.teacher_text is not None for row in rows)


def check_teacher_text(rows: object, needs_pairs: bool) -> None:
    """Refuse, before anything is loaded, losses that compare single tokens where the teacher reads another text.

    Raises:
        ValueError: naming both.
    """
    if needs_pairs and has_teacher_text(rows):
        raise ValueError(
            "teacher_text: paired_mse and kl compare tokens that end at the same character, and the teacher reads "
            "another text; use pooled_mse, contrast and head_kl"
        )


def check_language(rows: object, student: MTLLM) -> None:
    """What a stream says of its texts' language fits a student that reads through an encoder.

    Raises:
        ValueError: an unknown language, or none beside texts for the teacher: the student's would be read as English.
    """
    if not isinstance(rows, RowStream) or student.side == "llm":
        return
    tokenizer = student.require_tokenizer()
    if named := rows.language or rows.wanted.get("language_column"):
        language_read(tokenizer, "mt", named, "language")
    elif has_teacher_text(rows) and reads_language(tokenizer, "mt"):
        raise ValueError("language is missing: beside a teacher_text_column, name the language that the text is in")


def identity(source: object) -> dict[str, str]:
    """Digests by name of one thing that a run reads: a token store, a stream, a list of rows, a model's folder."""
    if isinstance(source, TokenStore):
        paths = [path for path in sorted(source.folder.rglob("*")) if path.is_file()]
        return {path.relative_to(source.folder).as_posix(): of_file(path) for path in paths}
    if isinstance(source, (RowStream, str, Path)):
        return files_of(source)
    if isinstance(source, Sequence):
        return {"": rows_digest(source)}
    return {}


def model_inputs(model: str, *, encoder: str = "", llm: str = "") -> dict[str, str]:
    """The model that a stage starts from and its base models, where they are now; by name, those that are named."""
    named = {"model": model, "encoder": encoder, "llm": llm}
    try:
        config = read_config(Path(model)) if model else None
    except ValueError:  # said where it is loaded
        config = None
    if config is not None:
        named |= {"encoder": encoder or config.encoder or "", "llm": llm or config.llm or ""}
    return {role: name for role, name in named.items() if name}


def adapted_base(model: str, named: Mapping[str, str]) -> tuple[str, str]:
    """Role and place of the base model that carries the adapters, which is the LLM where there is one.

    Args:
        named: from `model_inputs`; a base model that it does not have lies in the folder of `model`.
    """
    own = Path(model)
    role = "llm" if "llm" in named or (model and (own / "llm").is_dir()) else "encoder"
    return role, named.get(role) or str(own / role)


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first difference in words, None where there is none."""
    for name in sorted(differing(before, now)):
        return f"{name + ': ' if name else ''}{_in_words(before.get(name))} then, {_in_words(now.get(name))} now"
    return None


def _in_words(digest: str | None) -> str:
    if digest is None:
        return "not there"
    what, _, content = digest.rpartition(" ")
    return f"{what} ({content[:8]}…)" if what else digest
