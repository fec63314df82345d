"""Every encoder family through the commands: doctor, tokenize, adapt, encode and plan agree on what is supported."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from mtllm_fast import MTLLM, Engine, LoraSettings, TextRow, cli, planning
from mtllm_fast.models.encoders import FAMILIES
from mtllm_fast.training import adapt as adapt_module  # noqa: F401  (its dataclass is read below)
from mtllm_fast.training.adapt import AdaptConfig
from tests.data.conftest import train_words
from tests.models.test_encoder_families import CONFIGS
from tests.tiny import LINES, nllb_tokenizer
from tests.training.short_runs import refused, same_weights

CLASSES = {
    "m2m_100": transformers.M2M100ForConditionalGeneration,
    "bert": transformers.BertForMaskedLM,
    "xlm-roberta": transformers.XLMRobertaModel,
    "roberta": transformers.RobertaModel,
    "modernbert": transformers.ModernBertModel,
    "mbart": transformers.MBartForConditionalGeneration,
    "t5": transformers.T5ForConditionalGeneration,
    "mt5": transformers.MT5EncoderModel,
    "umt5": transformers.UMT5EncoderModel,
}
LANGUAGES = {"m2m_100": "eng_Latn", "mbart": "en_XX"}


def tokenizer_of(key: str):
    if key == "m2m_100":
        return nllb_tokenizer(list(LINES))
    if key == "mbart":
        return train_words(["en_XX", "fr_XX"])
    words = train_words([])
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return words


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("".join(f"{LINES[k % 6]} {k}\n" for k in range(24)))
    return str(path)


def build(key: str, folder: Path, tokenizer=None) -> str:
    """A whole model of the family, as people publish it, with a tokenizer, by default its own."""
    tokenizer, config = tokenizer or tokenizer_of(key), CONFIGS[key]()
    config.vocab_size = len(tokenizer)
    if key == "t5":
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    CLASSES[key](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_family_is_here_and_in_the_help() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert sorted(types) == sorted(CLASSES)
    source = inspect.getsource(AdaptConfig)
    about = source[source.index("    encoder: str") : source.index("    llm: str")]
    for family in FAMILIES:
        assert family.about in " ".join(about.split())
        assert all(name in about for name in family.model_types)


@pytest.mark.parametrize("key", list(CLASSES))
def test_the_commands_take_it(
    key: str, text: str, llm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    encoder, code = build(key, tmp_path / "encoder"), LANGUAGES.get(key)
    cli.main(["doctor", "--encoder", encoder])
    said = capsys.readouterr().out
    assert f"family {key} (" in said and "2 layers of width 32" in said
    assert ("every text names its own" if code else "takes no codes") in said

    pair = ["--encoder", encoder, "--llm", llm_folder]
    sources = {"adapted": text}
    if key in (*LANGUAGES, "bert"):  # a store holds what the tokenizer says, of which there are three kinds
        sources["from_store"] = str(tmp_path / "store")
        cli.main(["tokenize", *pair, "--text", text, "--output", sources["from_store"], "--max-length", "64"])
    for name, source in sources.items():
        cli.main([
            "adapt", *pair, "--text", source, "--output", str(tmp_path / name), "--max-steps", "2", "--tokens", "256",
            "--max-length", "64", "--device", "cpu", "--report-to", "none", "--no-progress",
        ])  # fmt: skip
    assert all(same_weights(tmp_path / name, tmp_path / "adapted") for name in sources)
    adapted = MTLLM.from_pretrained(tmp_path / "adapted")
    trained = [value for name, value in adapted.state_dict().items() if ".lora_B." in name]
    assert trained and any(value.any() for value in trained)

    capsys.readouterr()
    named = ["--language", code] if code else []
    cli.main(["encode", "--model", str(tmp_path / "adapted"), "--input", text, "--output", str(tmp_path / "e.npy"),
              "--device", "cpu", *named])  # fmt: skip
    found = np.load(tmp_path / "e.npy")
    alone = np.concatenate([Engine(adapted).encode([f"{LINES[k]} {k}"], code) for k in range(6)])
    np.testing.assert_allclose(found[:6], alone, atol=1e-4)
    assert found.shape == (24, 48) and abs(found[:6][::-1] - alone).max() > 1e-2

    spec = planning.StepSpec(planning.config(encoder), planning.config(llm_folder), lora=LoraSettings(r=2))
    weights = sum(p.numel() for p in adapted.encoder.model.parameters())
    for cost in (planning.ours(spec, [(9, 10), (20, 20)]), planning.authors(spec, [(9, 10), (20, 20)])):
        assert cost.static["encoder weights"] == 2 * weights
        assert cost.flops["encoder"] > 0 and cost.flops["backward"] > 0


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("electra")
    config = transformers.ElectraConfig(vocab_size=len(train_words([])), hidden_size=32, embedding_size=32,
                                        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)  # fmt: skip
    transformers.ElectraModel(config).save_pretrained(folder)
    train_words([]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("command", ["doctor", "tokenize", "adapt", "finetune", "plan", "profile"])
def test_an_unknown_family_is_refused_alike(command: str, unknown: str, text: str, llm_folder: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    labelled = tmp_path / "t.tsv"
    labelled.write_text("text\tlabel\na\tx\nb\ty\n")
    output = ["--output", str(tmp_path / "out")]
    more = {
        "tokenize": ["--llm", llm_folder, "--text", text, *output],
        "adapt": ["--llm", llm_folder, "--text", text, *output],
        "finetune": ["--text", str(labelled), "--labels", "x", "y", "--device", "cpu", *output],
        "plan": ["--llm", llm_folder],
        "profile": ["--llm", llm_folder, "--text", text],
    }.get(command, [])
    error = refused(capsys, [command, "--encoder", unknown, *more])
    said = f"encoder={unknown!r}: model type 'electra' is not supported; supported: m2m_100 (NLLB-200, M2M-100)"
    assert said in error and error.count("\n") == 1
    assert all(family.about in error for family in FAMILIES)
    assert not (tmp_path / "out").exists()


def test_tokenize_refuses_what_adapt_would(text: str, llm_folder: str, tmp_path: Path, capsys) -> None:
    """A tokenizer of another encoder; and texts are cut where the encoder's positions end."""
    encoder = Path(build("bert", tmp_path / "encoder"))
    nllb_tokenizer(list(LINES)).save_pretrained(tmp_path / "wrong")
    (tmp_path / "wrong" / "config.json").write_bytes((encoder / "config.json").read_bytes())
    run = ["tokenize", "--llm", llm_folder, "--output", str(tmp_path / "out"), "--text", text]
    assert "it belongs to another encoder" in refused(capsys, [*run, "--encoder", str(tmp_path / "wrong")])
    assert not (tmp_path / "out").exists()
    long = tmp_path / "long.txt"
    long.write_text("the cat " * 200 + "\n")
    cli.main([*run[:-1], str(long), "--encoder", str(encoder)])
    ids = np.load(next((tmp_path / "out").glob("shard-*/mt.ids.npy")))
    assert len(ids) == json.loads((encoder / "config.json").read_text())["max_position_embeddings"] == 160


def with_codes(key: str):
    """Hugging Face's own tokenizer of the family."""
    if key == "m2m_100":
        return nllb_tokenizer(list(LINES))
    pieces = dict.fromkeys(["▁", *"▁".join(LINES), *(f"▁{word}" for line in LINES for word in line.split())])
    return transformers.MBart50Tokenizer(vocab=[(piece, -1.0) for piece in ["<unk>", "<s>", "</s>", *pieces]])


@pytest.mark.parametrize("key", list(LANGUAGES))
def test_a_tokenizer_without_codes_is_refused_alike(
    key: str, text: str, llm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """No language is ignored in silence: every door says that the encoder has another tokenizer; nothing is written."""
    encoder = build(key, tmp_path / "encoder", train_words([]))
    message = f"tokenizer: has no language codes, but encoder {encoder!r} ({key}) begins every text with one"
    with pytest.raises(ValueError) as refusal:
        MTLLM.stack(encoder, llm_folder)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)
    cli.main(["doctor", "--encoder", encoder])
    said = [line for line in capsys.readouterr().out.splitlines() if "language" in line]
    assert len(said) == 1 and said[0].startswith(message)

    # a model that was stacked with codes, and whose tokenizer has lost them since
    other = build(key, tmp_path / "other", with_codes(key))
    stack = MTLLM.stack(other, llm_folder)
    stack.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model/mt_tokenizer").iterdir():
        file.unlink()
    train_words([]).save_pretrained(tmp_path / "model/mt_tokenizer")
    labelled = tmp_path / "t.tsv"
    labelled.write_text("text\tlabel\na\tx\nb\ty\n")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    output, pair = ["--output", str(tmp_path / "out")], ["--encoder", encoder, "--llm", llm_folder]
    trained = [*output, "--device", "cpu", "--report-to", "none", "--no-progress", "--max-steps", "2"]
    for command, named in (
        (["tokenize", *pair, "--text", text, *output], encoder),
        (["adapt", *pair, "--text", text, *trained], encoder),
        (["finetune", "--encoder", encoder, "--text", str(labelled), "--labels", "x", "y", *trained], encoder),
        (["encode", "--model", str(tmp_path / "model"), "--input", text, "--output", str(tmp_path / "e.npy"),
          "--device", "cpu", "--language", LANGUAGES[key]], other),
    ):  # fmt: skip
        error = refused(capsys, command)
        assert error.count("\n") == 1 and message.replace(encoder, named) in error, command
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before, command

    # the control: with codes, two languages are read as Hugging Face's own tokenizer reads them
    plain, (one, two) = with_codes(key), (LANGUAGES[key], {"m2m_100": "fra_Latn", "mbart": "fr_XX"}[key])
    read = {}
    for code in (one, two):
        plain.src_lang = code
        read[code] = [plain(line).input_ids for line in LINES]
        found = stack.tokenizer.mt_side([TextRow(line, code) for line in LINES]).ids
        assert [ids.tolist() for ids in found] == read[code]
    assert all(a[0] != b[0] and a[1:] == b[1:] and len(a) > 4 for a, b in zip(read[one], read[two]))


def test_an_mbart_that_ends_with_its_language_is_refused(llm_folder: str, tmp_path: Path) -> None:
    """mBART-25 reads `A </s> en_XX`, mBART-50 `en_XX A </s>`, under one model type."""
    pieces = [(piece, -1.0) for piece in ("<unk>", "<s>", "</s>", "▁", "▁the", "▁cat")]
    old, new = transformers.MBartTokenizer(vocab=pieces), transformers.MBart50Tokenizer(vocab=pieces, src_lang="en_XX")
    for tokenizer, at in ((old, -1), (new, 0)):
        assert tokenizer("the cat").input_ids[at] == tokenizer.convert_tokens_to_ids("en_XX")
    with pytest.raises(ValueError, match=r"tokenizer: ends a text with its language \(mBART-25\)") as refusal:
        MTLLM.stack(build("mbart", tmp_path / "old", old), llm_folder)
    assert "\n" not in str(refusal.value)
    assert MTLLM.stack(build("mbart", tmp_path / "new", new), llm_folder).tokenizer.languages
