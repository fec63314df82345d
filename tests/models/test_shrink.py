"""Smaller encoders: the states of kept texts bit for bit, layers by hand, folders that are whole or not there."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, PreTrainedTokenizerFast

from mtllm_fast import MTLLM, Engine, TextRow, cli, read_rows
from mtllm_fast.data.collate import collate
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.models import MTLLMConfig, PackedEncoder
from mtllm_fast.models.encoders import FAMILIES
from mtllm_fast.models.loading import base_tokenizer
from mtllm_fast.models.shrink import RECORD, Shrunk, shrink
from mtllm_fast.training import AdaptConfig, adapt
from tests.conftest import REPO
from tests.data.test_trim import CODES, rows, texts
from tests.models.test_encoder_families import CONFIGS
from tests.models.test_families_in_commands import CLASSES, LANGUAGES
from tests.models.weights import enlarge
from tests.tiny import nllb_tokenizer
from tests.training.short_runs import optim

E5 = Path(os.environ.get("MTLLM_E5", REPO / "models" / "e5-small"))  # as `mtllm fetch` makes it
EVEN = {"m2m_100", "mbart", "bert", "xlm-roberta", "roberta"}


def tokenizer_of(key: str) -> PreTrainedTokenizerFast:
    """Of six languages; with the codes of the family, where it has some."""
    every = [text for code in CODES for text in texts(code)]
    if key == "m2m_100":
        return nllb_tokenizer(every, 1500)
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        every, trainers.BpeTrainer(vocab_size=1500, special_tokens=specials, show_progress=False)
    )
    ends = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    codes = ["en_XX", "fr_XX"] if key == "mbart" else []
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=codes, **names)


def build(key: str, folder: Path, layers: int = 2) -> str:
    """A whole model of the family with more rows of embeddings than tokens, away from its small initialisation."""
    tokenizer, config = tokenizer_of(key), CONFIGS[key]()
    config.vocab_size = len(tokenizer) + 5
    if layers != 2:
        for name in ("num_hidden_layers", "encoder_layers"):
            if hasattr(config, name):
                setattr(config, name, layers)
    if key == "t5":
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    enlarge(CLASSES[key](config), 3.0, noise=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def states(folder: str | Path, said: list[str], code: str | None) -> torch.Tensor:
    encoder = PackedEncoder.from_pretrained(str(folder)).eval()
    stack = base_tokenizer(MTLLMConfig(reader="encoder", encoder=str(folder)))
    encoder.take_tokenizer(stack)
    batch = collate([TextRow(text, code) for text in said], stack, sides=("mt",), align=False)
    with torch.no_grad():
        return encoder(batch.mt)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return build("bert", tmp_path_factory.mktemp("whole") / "bert", 6)


KEPT = [rows("deu_Latn"), rows("swh_Latn")]


@pytest.mark.parametrize("key", list(CLASSES))
def test_the_states_of_kept_texts_are_the_same_bits(key: str, tmp_path: Path) -> None:
    whole, code = build(key, tmp_path / "whole"), LANGUAGES.get(key)
    made = shrink(whole, tmp_path / "small", KEPT, keep_languages=[code] if code else [])
    kept = [text for source in KEPT for text in (row.text for row in source)]
    for start in range(0, len(kept), 24):
        part = kept[start : start + 24]
        assert torch.equal(states(whole, part, code), states(tmp_path / "small", part, code))
    assert made.texts.texts == len(kept) and (made.texts.other, made.texts.refused) == (0, 0)

    old, new = (PackedEncoder.from_pretrained(str(f)) for f in (whole, tmp_path / "small"))
    stack = base_tokenizer(MTLLMConfig(reader="encoder", encoder=str(tmp_path / "small")))
    assert new.vocab_size == len(stack.mt) == made.after.tokens < made.before.tokens == old.vocab_size
    width = old.model.get_input_embeddings().embedding_dim
    assert old.model.num_parameters() - new.model.num_parameters() == width * (old.vocab_size - new.vocab_size)
    assert made.before.parameters == sum(p.numel() for p in old.model.parameters())
    assert made.after.parameters == sum(p.numel() for p in new.model.parameters())
    assert made.after.embeddings == pytest.approx(width * new.vocab_size / made.after.parameters)
    assert made.after.megabytes == pytest.approx(4 * made.after.parameters / 1e6)
    with pytest.raises(ValueError, match="which the full vocabulary had and this trimmed one lacks"):
        states(tmp_path / "small", texts("tha_Thai")[:1], code)
    # the control: one row of the embeddings that another token should have
    small = AutoModel.from_pretrained(tmp_path / "small") if key in ("bert", "roberta") else None
    if small is not None:
        used = StackTokenizer(stack.mt, None).mt_side([TextRow(kept[0])]).ids[0]
        with torch.no_grad():
            small.get_input_embeddings().weight[used[2]] = small.get_input_embeddings().weight[used[3]]
        small.save_pretrained(tmp_path / "small")
        assert not torch.equal(states(whole, kept[:1], code), states(tmp_path / "small", kept[:1], code))


@pytest.mark.parametrize("key", sorted(EVEN))
def test_every_second_layer(key: str, tmp_path: Path) -> None:
    """Layers 2 and 4 of 4 (counted from 1), put together by hand; the first of each pair gives something else."""
    whole, code = build(key, tmp_path / "whole", 4), LANGUAGES.get(key)
    made = shrink(whole, tmp_path / "small", layers=2)
    assert (made.before.layers, made.after.layers, made.texts) == (4, 2, None)
    said = texts("deu_Latn")[:6]
    got = states(tmp_path / "small", said, code)
    stack = base_tokenizer(MTLLMConfig(reader="encoder", encoder=whole))

    def by_hand(*which: int) -> torch.Tensor:
        encoder = PackedEncoder.from_pretrained(whole).eval()
        layers = [encoder.layers[i] for i in which]
        while len(encoder.layers):
            del encoder.layers[0]
        encoder.layers.extend(layers)
        with torch.no_grad():
            return encoder(collate([TextRow(t, code) for t in said], stack, sides=("mt",), align=False).mt)

    assert torch.equal(got, by_hand(1, 3))
    assert not torch.equal(got, by_hand(0, 2)) and not torch.equal(got, by_hand(2, 3))
    assert PackedEncoder.from_pretrained(str(tmp_path / "small")).num_layers == 2


def test_which_families_have_even_layers(tmp_path: Path, bert: str) -> None:
    assert {name for family in FAMILIES if family.even_layers for name in family.model_types} == EVEN
    for key in set(CLASSES) - EVEN:
        whole = build(key, tmp_path / key)
        with pytest.raises(ValueError, match=rf"layers=1: the layers of encoder=.* \({key}\) are not built alike"):
            shrink(whole, tmp_path / "small", layers=1)
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match=r"layers=4: encoder=.* has 6, of which every f-th stays: 1, 2, 3, 6"):
        shrink(bert, tmp_path / "small", layers=4)


def test_both_at_once_and_what_the_folder_says(bert: str, tmp_path: Path) -> None:
    made = shrink(bert, tmp_path / "new" / "small", KEPT, layers=3, held_out=[rows("tha_Thai"), rows("vie_Latn")])
    said = json.loads((tmp_path / "new" / "small" / RECORD).read_text())
    assert said["after"]["layers"] == made.after.layers == 3 and said["encoder"] == bert
    assert made.held_out.texts == 2 * len(texts("tha_Thai"))
    assert made.held_out.refused == len(texts("tha_Thai")) <= made.held_out.other
    shallow = shrink(bert, tmp_path / "shallow", layers=3)
    assert shallow.after.tokens == made.before.tokens
    kept = texts("deu_Latn")[:9]
    assert torch.equal(states(tmp_path / "shallow", kept, None), states(tmp_path / "new" / "small", kept, None))


def test_weights_keep_their_dtype(bert: str, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModel.from_pretrained(bert, dtype=torch.bfloat16).save_pretrained(half)
    base_tokenizer(MTLLMConfig(reader="encoder", encoder=bert)).mt.save_pretrained(half)
    made = shrink(str(half), tmp_path / "small", KEPT)
    assert PackedEncoder.from_pretrained(str(tmp_path / "small")).model.dtype == torch.bfloat16
    assert made.after.megabytes == pytest.approx(2 * made.after.parameters / 1e6)


def test_a_token_id_that_the_config_names_moves_with_its_token(tmp_path: Path) -> None:
    """ModernBERT names five; the mask's goes with a tokenizer that has it last."""
    whole = build("modernbert", tmp_path / "whole")
    file = Path(whole) / "config.json"
    config = json.loads(file.read_text())
    last = config["vocab_size"] - 6
    file.write_text(json.dumps(config | {"sep_token_id": last, "eos_token_id": [2, last]}))
    tokenizer = base_tokenizer(MTLLMConfig(reader="encoder", encoder=whole)).mt
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<end>") == last + 1
    tokenizer.save_pretrained(whole)
    file.write_text(json.dumps(config | {"sep_token_id": last + 1, "eos_token_id": [2, last + 1]}))
    made = shrink(whole, tmp_path / "small", KEPT)
    small = PackedEncoder.from_pretrained(str(tmp_path / "small")).model.config
    assert small.sep_token_id == made.after.tokens - 1 and small.eos_token_id == [2, made.after.tokens - 1]
    assert small.pad_token_id == 1


# ---- in use
@pytest.fixture(scope="module")
def small(bert: str, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("small") / "bert"
    shrink(bert, folder, KEPT)
    return str(folder)


def test_a_text_with_what_is_gone_is_left_out_of_training_and_counted(small, llm_folder, tmp_path) -> None:
    config = AdaptConfig(small, llm_folder, str(tmp_path / "run"), train=optim(max_steps=2))
    metrics = adapt(config, [*rows("swh_Latn", slice(8)), *rows("tha_Thai", slice(3))])
    assert metrics["data"]["skipped_rows"] == 3
    model = MTLLM.from_pretrained(tmp_path / "run")
    found = Engine(model).encode([texts("swh_Latn")[0], texts("tha_Thai")[0], texts("deu_Latn")[0]], on_bad_text="nan")
    assert np.flatnonzero(np.isnan(found).any(1)).tolist() == [1]
    alone = Engine(model).encode([texts("swh_Latn")[0], texts("deu_Latn")[0]])
    np.testing.assert_allclose(found[[0, 2]], alone, atol=1e-5)
    with pytest.raises(ValueError, match=r"row 1: text 'แมว.* holds '.', which the full vocabulary had"):
        Engine(model).encode([texts("swh_Latn")[0], texts("tha_Thai")[0]])


def test_a_tokenizer_of_the_whole_encoder_is_refused(small, bert) -> None:
    whole = base_tokenizer(MTLLMConfig(reader="encoder", encoder=bert))
    with pytest.raises(ValueError, match="it belongs to another encoder"):
        PackedEncoder.from_pretrained(small).take_tokenizer(whole)


def test_the_command(bert, tmp_path, capsys) -> None:
    for code in ("deu_Latn", "tha_Thai"):
        (tmp_path / f"{code}.txt").write_text("\n".join(texts(code)) + "\n")
    line = f"shrink --encoder {bert} --text {tmp_path}/deu_Latn.txt --held-out {tmp_path}/tha_Thai.txt --layers 3 "
    cli.main(f"{line} --output {tmp_path}/small".split())
    out = capsys.readouterr().out
    count = len(texts("deu_Latn"))
    assert f"text: 0 of {count} texts are read in other tokens than before, 0 of these are refused" in out
    assert f"held-out text: {count} of {count} texts are read in other tokens than before, {count} of these" in out
    assert "6 -> 3 layers" in out and "distil the encoder before you use it" in out
    cli.main(["convert", "--from", "encoder", "--model", f"{tmp_path}/small", "--output", f"{tmp_path}/reader"])
    encode = f"encode --model {tmp_path}/reader --input {tmp_path}/deu_Latn.txt --output {tmp_path}/e.npy --no-progress"
    cli.main(encode.split())
    right = states(tmp_path / "small", texts("deu_Latn"), None)
    assert np.load(tmp_path / "e.npy").shape == (count, right.shape[1])


# ---- whole or not there
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "texts, layers: neither is given"),
        ({"layers": 2, "keep_languages": ["eng_Latn"]}, r"keep_languages=\['eng_Latn'\]: says which tokens stay"),
        ({"layers": 2, "min_frequency": 1e-6}, "min_frequency=1e-06: says which tokens stay"),
        ({"texts": KEPT, "min_frequency": 1.0}, r"min_frequency=1.0: must be in \[0, 1\)"),
        ({"texts": KEPT, "keep_languages": ["eng_Latn"]}, "'eng_Latn': the MT tokenizer has no language codes"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_what_is_refused_before_weights_are_read(bert, tmp_path, monkeypatch, options, said: str) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(PackedEncoder, "from_pretrained", never)
    with pytest.raises(ValueError, match=said):
        shrink(bert, tmp_path / "small", **options)
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(bert, tmp_path) -> None:
    (tmp_path / "small").mkdir()
    with pytest.raises(ValueError, match="exists; name a folder that does not"):
        shrink(bert, tmp_path / "small", layers=2)
    (tmp_path / "file").write_text("a")
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        shrink(bert, tmp_path / "file" / "small", layers=2)
    assert not list((tmp_path / "small").iterdir())


@pytest.mark.parametrize("fault", ["weights", "tokenizer", "disk"])
def test_what_goes_wrong_leaves_nothing(bert, tmp_path, monkeypatch, fault: str) -> None:
    """A folder that would not come back as it was meant, and a full disk."""
    encoder_class = type(PackedEncoder.from_pretrained(bert).model)
    save, error, said = encoder_class.save_pretrained, ValueError, "does not come back as it was written"

    def wrong(self, folder, **options) -> None:
        with torch.no_grad():
            self.get_input_embeddings().weight[[5, 6]] = self.get_input_embeddings().weight[[6, 5]]
        save(self, folder, **options)
        with torch.no_grad():
            self.get_input_embeddings().weight[[5, 6]] = self.get_input_embeddings().weight[[6, 5]]

    if fault == "weights":
        monkeypatch.setattr(encoder_class, "save_pretrained", wrong)
    elif fault == "tokenizer":
        plain = PreTrainedTokenizerFast.save_pretrained

        def other(self, folder) -> None:
            plain(self, folder)
            file = Path(folder) / "tokenizer.json"
            state = json.loads(file.read_text())
            state["post_processor"] = None
            file.write_text(json.dumps(state))

        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", other)
    else:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(encoder_class, "save_pretrained", full)
        error, said = OSError, r"No space left on device; it needs [\d,]+ bytes"
    with pytest.raises(error, match=said):
        shrink(bert, tmp_path / "small", KEPT)
    assert not list(tmp_path.iterdir())


def test_killed_half_way(forked, bert, tmp_path) -> None:
    """SIGKILL when the files are written and not yet named: nothing of that name, and the next call cleans up."""
    code = (
        "import os, signal, sys; from mtllm_fast.models import shrink as module\n"
        "from tests.models.test_shrink import KEPT\n"
        "module.mark_complete = lambda folder: ((folder / 'litter').touch(), os.kill(os.getpid(), signal.SIGKILL))\n"
        "module.shrink(sys.argv[1], sys.argv[2], KEPT)"
    )
    output = tmp_path / "small"
    forked.start(bert, output, code=code)
    ended, out = forked.wait()
    assert ended == -signal.SIGKILL, out
    left = tmp_path / ".small.making"
    assert not output.exists() and (left / "litter").exists() and (left / "model.safetensors").exists()
    assert isinstance(shrink(bert, output, KEPT), Shrunk)
    assert not left.exists() and not (output / "litter").exists() and (output / "complete.json").exists()


# ---- real data and a real encoder
@pytest.fixture(scope="module")
def real(data_root: Path, tmp_path_factory) -> tuple[Path, Path]:
    """multilingual-E5-small trimmed on SIB-200 in English and Swahili."""
    if not (E5 / "complete.json").is_file():
        pytest.skip(f"no multilingual-E5-small at {E5} (MTLLM_E5)")
    folder = tmp_path_factory.mktemp("real") / "small"
    sources = [read_rows(data_root / "sib200" / code / "dev.tsv") for code in ("eng_Latn", "swh_Latn")]
    held_out = [read_rows(data_root / "sib200" / "tha_Thai" / "dev.tsv")]
    made = shrink(str(E5), folder, sources, held_out=held_out)
    assert (made.texts.other, made.held_out.refused) == (0, 99)
    assert made.before.tokens == 250_037 and made.after.tokens < 12_000 and made.after.parameters < 27e6
    return data_root, folder


def test_a_real_encoder(real) -> None:
    data, folder = real
    for code in ("eng_Latn", "swh_Latn"):
        said = [row.text for row in read_rows(data / "sib200" / code / "dev.tsv")][:33]
        assert torch.equal(states(E5, said, None), states(folder, said, None))
    with pytest.raises(ValueError, match="which the full vocabulary had"):
        states(folder, [next(iter(read_rows(data / "sib200" / "rus_Cyrl" / "dev.tsv"))).text], None)
