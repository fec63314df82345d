"""A smaller encoder out of a whole one, as a folder of its own: fewer tokens, fewer layers. No training.

tokens   Those that given texts do not need go, with their rows of the embeddings (data/trim.py). The states of a text
         that needs none of them stay the same, bit for bit. Multilingual encoders have most of their parameters there.
layers   Every f-th one stays, the last one among them: layer i of the N is layer i f of the whole encoder. What the
         others did has to be learnt again: the states are good for nothing before the encoder has been distilled.

The first steps of BiStil. Source: arXiv 2306.01709.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import nn

from ..data.read import TextRow
from ..data.tokenise import StackTokenizer
from ..data.trim import Trimmed, changed, count, trim
from ..jobs.durable import (
    check_folder_above,
    mark_complete,
    replace_folder,
    room,
    staged,
    write_failure,
    write_json,
)
from .config import MTLLMConfig
from .encoder import PackedEncoder, check_encoder, fit_tokenizer
from .encoders import FAMILIES, family_of
from .loading import base_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RECORD = "shrunk.json"
Texts = Sequence[Iterable[TextRow]]
_DEPTHS = ("num_hidden_layers", "encoder_layers")  # what configs call the number of layers


@dataclass(frozen=True)
class Size:
    """How large an encoder is.

    Fields:
        tokens: rows of the embeddings. layers, parameters: how many, embeddings included.
        embeddings: share of the parameters that are token embeddings.
        megabytes: of its weights.
    """

    tokens: int
    layers: int
    parameters: int
    embeddings: float
    megabytes: float


@dataclass(frozen=True)
class Reading:
    """How a smaller vocabulary reads texts.

    Fields:
        texts: how many. other: that are read in other tokens than before. refused: those among them that are not read,
            because a character of theirs is known no more.
    """

    texts: int
    other: int
    refused: int


@dataclass(frozen=True)
class Shrunk:
    """What came of it.

    Fields:
        texts: how the texts that tokens were kept for are read. held_out: other texts. None where there were none.
        tokens_read: of those texts. unreadable: texts among them that the whole tokenizer fails on.
        removed_characters: how many characters are known no more.
    """

    encoder: str
    before: Size
    after: Size
    texts: Reading | None = None
    held_out: Reading | None = None
    tokens_read: int = 0
    unreadable: int = 0
    removed_characters: int = 0


def shrink(
    encoder: str,
    output: str | Path,
    texts: Texts = (),
    *,
    layers: int | None = None,
    min_frequency: float = 0.0,
    keep_languages: Sequence[str] = (),
    held_out: Texts = (),
    overwrite: bool = False,
) -> Shrunk:
    """Write the smaller encoder, with its tokenizer, into the folder `output`, which is whole or not there.

    Its tokenizer is a plain fast one that reads as before: with the special tokens, and the language that the whole
    tokenizer writes by itself, but without methods of its class such as NLLB's `src_lang`.

    Args:
        encoder: folder or hub name.
        texts: sources (each re-iterable) whose tokens stay; none keeps the vocabulary.
        layers: how many stay, a divisor of how many there are; None: all.
        min_frequency: relative frequency in one of the sources that a token needs to stay, 1e-6 in the source of the
            method; 0: it is in there. Texts with a rarer one are then read in other tokens, and counted.
        keep_languages: language codes that stay; none: all.
        held_out: sources of which only is counted how they are read.
        overwrite: the folder may be a smaller encoder from before, which is replaced in the end.

    Raises:
        ValueError: before anything is loaded, what cannot be done with this encoder or tokenizer, or an output that
            exists; a folder that would not come back as it was written.
        OSError: the folder cannot be written.
    """
    folder = Path(output).absolute()
    if folder.exists() and not (overwrite and (folder / RECORD).is_file()):
        what = f"holds no {RECORD}, so it is no smaller encoder to be replaced" if overwrite else "exists"
        raise ValueError(f"output={str(output)!r}: {what}; name a folder that does not exist")
    check_folder_above("--output", folder)
    config = check_encoder(encoder)
    if not texts and layers is None:
        raise ValueError("texts, layers: neither is given, so that nothing would be smaller")
    for name, given in (("keep_languages", keep_languages), ("held_out", held_out), ("min_frequency", min_frequency)):
        if given and not texts:
            raise ValueError(f"{name}={given!r}: says which tokens stay, for which there must be texts")
    if not 0 <= min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency}: must be in [0, 1)")
    chosen = _chosen_layers(encoder, config, layers)

    tokenizer = base_tokenizer(MTLLMConfig(reader="encoder", encoder=encoder))
    fit_tokenizer(tokenizer, config, encoder)
    kept_codes = [tokenizer.language_id(code) for code in keep_languages]
    trimmed, seen = None, None
    if texts:
        codes = [tokenizer.language_id(code) for code in tokenizer.languages]
        seen = count(tokenizer.mt, texts)
        trimmed = trim(
            tokenizer.mt,
            seen,
            min_frequency=min_frequency,
            languages=codes,
            kept_languages=kept_codes or codes,
        )

    model = PackedEncoder.from_pretrained(encoder)
    before = _size(model)
    _keep_layers(model, chosen)
    if trimmed is not None:
        _keep_tokens(model, trimmed.rows)
    shrunk = Shrunk(encoder, before, _size(model))
    if seen is not None and trimmed is not None:
        removed = len(trimmed.removed)
        shrunk = replace(shrunk, tokens_read=seen.tokens, unreadable=seen.unreadable, removed_characters=removed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder, "making") as staging:
        try:
            model.model.save_pretrained(staging)
            (tokenizer.mt if trimmed is None else trimmed.tokenizer).save_pretrained(str(staging))
            again = _checked(staging, model, tokenizer, trimmed)
            if trimmed is not None:
                trimmed = replace(trimmed, tokenizer=again.mt)
                shrunk = replace(shrunk, texts=_reading(tokenizer, trimmed, texts))
                shrunk = replace(shrunk, held_out=_reading(tokenizer, trimmed, held_out) if held_out else None)
            write_json(staging / RECORD, asdict(shrunk))
            mark_complete(staging)
            replace_folder(staging, folder)
        except ValueError:
            raise
        except Exception as error:
            if (reason := write_failure(error)) is None:
                raise
            raise OSError(f"--output {folder}: {reason}; {room(folder, int(shrunk.after.megabytes * 1e6))}") from error
    return shrunk


def _chosen_layers(encoder: str, config: PreTrainedConfig, layers: int | None) -> list[int]:
    """Which layers stay, from 0. Raises ValueError where they cannot be so many, or the family's cannot go."""
    family = family_of(config)
    total = family.num_layers(config)
    if layers is None:
        return list(range(total))
    if not family.even_layers:
        able = ", ".join(name for known in FAMILIES if known.even_layers for name in known.model_types)
        raise ValueError(
            f"layers={layers}: the layers of encoder={encoder!r} ({config.model_type}) are not built alike, so that "
            f"none can go; families whose are: {able}"
        )
    if layers < 1 or total % layers:
        divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise ValueError(f"layers={layers}: encoder={encoder!r} has {total}, of which every f-th stays: {divisors}")
    factor = total // layers
    return list(range(factor - 1, total, factor))


def _keep_layers(packed: PackedEncoder, chosen: Sequence[int]) -> None:
    for index in reversed(range(len(packed.layers))):
        if index not in chosen:
            del packed.layers[index]
    config: Any = packed.model.config
    for name in _DEPTHS:
        if hasattr(config, name):
            setattr(config, name, len(chosen))


def _keep_tokens(packed: PackedEncoder, rows: NDArray[Any]) -> None:
    """Leave the embeddings of the tokens `rows`, and number the config's special tokens by them."""
    embedding = packed.model.get_input_embeddings()
    kept = embedding.weight.detach()[torch.from_numpy(rows)].clone()
    embedding.weight = nn.Parameter(kept, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(rows)
    new = {old: place for place, old in enumerate(rows.tolist())}
    config: Any = packed.model.config
    for name, value in list(vars(config).items()):
        if name.endswith("token_id") and isinstance(value, int):
            setattr(config, name, new.get(value))
        elif name.endswith("token_id") and isinstance(value, list):
            setattr(config, name, [new[old] for old in value if old in new])
    config.vocab_size = len(rows)


def _size(packed: PackedEncoder) -> Size:
    weights = list(packed.model.parameters())
    parameters = sum(weight.numel() for weight in weights)
    embedding = packed.model.get_input_embeddings().weight
    return Size(
        tokens=embedding.shape[0],
        layers=packed.num_layers,
        parameters=parameters,
        embeddings=embedding.numel() / parameters,
        megabytes=sum(weight.nbytes for weight in weights) / 1e6,
    )


def _checked(folder: Path, made: PackedEncoder, whole: StackTokenizer, trimmed: Trimmed | None) -> StackTokenizer:
    """The tokenizer in `folder`, whose weights are those of `made`, and whose special tokens those of `whole`.

    Raises:
        ValueError: they are not.
    """
    read = PackedEncoder.from_pretrained(str(folder))
    again = base_tokenizer(MTLLMConfig(reader="encoder", encoder=str(folder)))
    fit_tokenizer(again, read.model.config, str(folder))
    mine, theirs = made.model.state_dict(), read.model.state_dict()
    wrong = [name for name in mine if name not in theirs or not torch.equal(mine[name], theirs[name])]
    if wrong or mine.keys() != theirs.keys() or read.max_positions != made.max_positions:
        raise ValueError(f"encoder: it does not come back as it was written ({wrong[:2]})")
    for code in again.languages or (None,):
        row = [TextRow("", code)]
        old, new = whole.mt_side(row).ids[0], again.mt_side(row).ids[0]
        if not (new if trimmed is None else trimmed.rows[new]).tolist() == old.tolist():
            raise ValueError(f"tokenizer: it does not come back as it was written (language {code})")
    return again


def _reading(whole: StackTokenizer, trimmed: Trimmed, texts: Texts) -> Reading:
    number, other, refused = changed(whole.mt, trimmed, texts)
    return Reading(number, other, refused)
