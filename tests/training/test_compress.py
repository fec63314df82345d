"""A smaller encoder learns the whole one's states: the loss by Hugging Face, the tokens, training, the plain folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtllm_fast import MTLLM, LoraSettings, TextRow, cli
from mtllm_fast.data.collate import collate
from mtllm_fast.data.store import TokenStore
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.models import HeadConfig, MTLLMConfig, PackedEncoder
from mtllm_fast.models.checkpointing import recompute_layers
from mtllm_fast.models.compile import compile_layers
from mtllm_fast.models.encoder import check_encoder
from mtllm_fast.models.encoders import family_of
from mtllm_fast.models.loading import base_tokenizer
from mtllm_fast.models.merge import save_encoder
from mtllm_fast.models.modes import without_dropout
from mtllm_fast.models.shrink import shrink
from mtllm_fast.training import CompressConfig, compress
from mtllm_fast.training.compress import WIDEST, build, ids_of_teacher
from mtllm_fast.training.live import ModelFlops
from mtllm_fast.training.run import Data
from mtllm_fast.training.stage import Stage
from tests.conftest import relative_error
from tests.data.test_trim import rows
from tests.models.test_encoder_families import CONFIGS, batch_of, make
from tests.models.test_shrink import build as build_whole
from tests.models.weights import stir
from tests.training.short_runs import logged, lost_in, optim, refused, same_weights, weights

HELD_OUT, CODES = 6, ("deu_Latn", "swh_Latn")
TRAINED = [row for code in CODES for row in rows(code)[HELD_OUT:]]
UNSEEN = [row for code in CODES for row in rows(code)[:HELD_OUT]]
KEPT = {"m2m_100": CODES, "mbart": ("en_XX",)}  # language codes, of encoders that have some
RATES = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")


def pair(key: str, folder: Path, whole: int = 4, small: int = 2) -> CompressConfig:
    """A whole encoder whose config has dropout, and the smaller one of it, which reads all texts as before."""
    teacher = build_whole(key, folder / "whole", whole)
    config = json.loads(Path(teacher, "config.json").read_text())
    config |= {name: 0.3 for name in RATES if name in config}
    Path(teacher, "config.json").write_text(json.dumps(config))
    shrink(teacher, folder / "small", [TRAINED, UNSEEN], layers=small, keep_languages=KEPT.get(key, ()))
    return CompressConfig(encoder=str(folder / "small"), teacher=teacher)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> CompressConfig:
    return pair("bert", tmp_path_factory.mktemp("bert"), 6, 3)


def stage_of(config: CompressConfig) -> Any:
    return build(config, Data(TRAINED), torch.float32).train()


def tokenizer_of(folder: str) -> StackTokenizer:
    return base_tokenizer(MTLLMConfig("encoder", folder))


def loss_of(stage: Stage, said: Sequence[TextRow]) -> Tensor:
    batch = collate(said, stage.student.require_tokenizer(), sides=("mt",), align=False)
    return stage.loss.total(stage(batch), stage.counts(batch))


def run(config: CompressConfig, output: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Train in `output`, on German and Swahili."""
    train = optim(tokens=512, max_length=128, lr=1e-2, warmup=0.0, keep=9, **changes)
    return compress(replace(config, output=str(output), train=train, resume=resume), TRAINED)


# ---- the loss
def by_transformers(folder: str) -> Any:
    """Hugging Face's own encoder in float64."""
    config = check_encoder(folder)
    family = family_of(config)
    model = family.encoder_of(family.load(folder, config, dtype=torch.float64)).eval()
    model.set_attn_implementation("eager")
    return model


def states_of(model: Any, tokenizer: StackTokenizer, said: Sequence[TextRow]) -> list[Tensor]:
    """States (T, E), what the first layer reads and of every layer before a final norm, each text alone, padded."""
    layers = family_of(model.config).layers(model)
    last: list[Tensor] = []
    handle = layers[-1].register_forward_hook(lambda layer, inputs, output: last.append(output))
    parts = []
    for ids in tokenizer.mt_side(said).ids:
        padded, mask = torch.full((2, 1, len(ids) + 5), tokenizer.mt.pad_token_id).unbind()
        padded[0, : len(ids)], mask[0] = torch.from_numpy(ids), torch.arange(len(ids) + 5) < len(ids)
        found = model(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states
        parts.append([state[0, : len(ids)] for state in (*found[:-1], last.pop())])
    handle.remove()
    return [torch.cat(states) for states in zip(*parts, strict=True)]


def mean(states: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a - b).square().mean() for a, b in zip(states, right, strict=True)]).mean()


@pytest.mark.parametrize("key", ["bert", "xlm-roberta", "m2m_100", "mbart"])
def test_the_loss_and_its_gradient_are_those_of_hugging_face(key: str, tmp_path: Path) -> None:
    """Each of the two by its own tokenizer: the teacher reads what it would read by itself."""
    config = pair(key, tmp_path)
    said = [replace(row, language="en_XX") for row in UNSEEN] if key == "mbart" else UNSEEN
    stage, model = stage_of(config).double(), by_transformers(config.encoder)
    with torch.no_grad():  # away from the start, where both have the same state 0
        for one in (model, stage.student.encoder.model):
            one.get_input_embeddings().weight.mul_(1.1)
        theirs = states_of(by_transformers(config.teacher), tokenizer_of(config.teacher), said)
    own = states_of(model, tokenizer_of(config.encoder), said)
    assert len(own) == 3 and len(theirs) == 5
    expected, got = mean(own, theirs[::2]), loss_of(stage, said)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    for other in (mean(own[1:], theirs[1::2]), mean(own[1:], theirs[2::2]), mean(own, [theirs[i] for i in (0, 1, 4)])):
        assert other.item() != pytest.approx(expected.item(), rel=1e-2), "the control: layers off by one, no state 0"

    expected.backward()
    got.backward()
    mine = {name: p.grad for name, p in stage.student.encoder.model.named_parameters() if p.grad is not None}
    right = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == right.keys() and len(mine) > 20
    for name, gradient in mine.items():
        if not name.endswith(("key.bias", "k_proj.bias")):  # nothing but rounding
            assert relative_error(gradient, right[name]) < 1e-9, name
    # none is left out, which DistributedDataParallel would wait for: the final norm, that reads no state, is frozen
    assert all(p.grad is not None for p in stage.student.parameters() if p.requires_grad)
    frozen = {name for name, p in stage.student.encoder.model.named_parameters() if not p.requires_grad}
    assert frozen == ({"layer_norm.weight", "layer_norm.bias"} if key in KEPT else set())
    assert not any(p.requires_grad for p in stage.teacher.parameters())


@pytest.mark.parametrize("switch", ["again in backward", "compiled"])
def test_layers_that_are_run_again_or_compiled_give_the_same(bert: CompressConfig, switch: str) -> None:
    def gradients(stage: Any, said: Sequence[TextRow]) -> dict[str, Tensor]:
        stage.zero_grad()
        loss_of(stage, said).backward()
        return {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}

    plain, other = stage_of(bert), stage_of(bert)
    if switch == "again in backward":
        recompute_layers(other.student.encoder)
    else:
        compile_layers(other.student.encoder.layers, backend="eager")
    for said in (UNSEEN, UNSEEN[:3], UNSEEN[2:9]):  # the hooks of a batch are not those of the one before
        right, found = gradients(plain, said), gradients(other, said)
        assert right.keys() == found.keys() and all(torch.equal(found[name], right[name]) for name in right)
    control = gradients(other, UNSEEN[:1])
    assert not any(torch.equal(control[name], right[name]) for name in right), "the control: another text"


@pytest.mark.parametrize("key", [key for key in CONFIGS if key not in ("mt5", "roberta")])
def test_without_dropout_training_is_evaluation(key: str) -> None:
    made = make(key)
    for name in (*RATES, "dropout_rate", "embedding_dropout", "mlp_dropout"):
        if hasattr(made.config, name):
            setattr(made.config, name, 0.4)
    encoder = PackedEncoder(family_of(made.config).build(made.config)).train()
    batch = batch_of((5, 30))
    with torch.no_grad():
        right = encoder.eval()(batch)
        assert not torch.equal(encoder.train()(batch), right), "the control"
        without_dropout(encoder)
        assert torch.equal(encoder(batch), right) and encoder.training
    assert 0.4 in vars(encoder.model.config).values(), "what is saved has it"


# ---- the tokens
@pytest.mark.parametrize("key", ["bert", "m2m_100"])
def test_the_teacher_reads_what_it_would_read_by_itself(key: str, tmp_path: Path) -> None:
    config = pair(key, tmp_path)
    own, whole = tokenizer_of(config.encoder), tokenizer_of(config.teacher)
    ids = ids_of_teacher(own, whole, config)
    assert len(own.mt) == len(ids) < len(whole.mt)
    theirs, mine = whole.mt_side(TRAINED).ids, own.mt_side(TRAINED).ids
    assert all(ids[torch.from_numpy(a)].tolist() == b.tolist() for a, b in zip(mine, theirs, strict=True))
    assert not any(a.tolist() == b.tolist() for a, b in zip(mine, theirs)), "the control: they are numbered anew"
    assert whole.mt.convert_ids_to_tokens(ids.tolist()) == own.mt.convert_ids_to_tokens(range(len(ids)))

    other = base_tokenizer(MTLLMConfig("encoder", build_whole("xlm-roberta", tmp_path / "other")))
    other.mt.backend_tokenizer.post_processor = None
    same = StackTokenizer(other.mt, None)
    if key == "bert":  # the same tokens, but nothing around a text
        with pytest.raises(ValueError, match=r"teacher='.*whole': its tokenizer puts other special tokens around"):
            ids_of_teacher(own, same, config)
    whole.mt.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"teacher=.*: its tokenizer lacks 1 of the [\d,]+ tokens of .*, '<new>' for"):
        ids_of_teacher(whole, tokenizer_of(config.teacher), config)


# ---- training
def test_training_lowers_the_loss_on_text_that_was_not_seen_too(bert: CompressConfig, tmp_path: Path) -> None:
    stage = stage_of(bert)
    before = loss_of(stage, UNSEEN).item()
    run(bert, tmp_path / "run", max_steps=40)
    log = logged(tmp_path / "run")
    assert len(log) == 40 and log[40]["paired_mse"] < 0.6 * log[1]["paired_mse"]

    student = MTLLM.from_pretrained(tmp_path / "run")
    start = stage.student.state_dict()
    trained = {name for name, weight in student.state_dict().items() if not torch.equal(weight, start[name])}
    assert trained == {name for name, p in stage.student.named_parameters() if p.requires_grad}
    stage.student.load_state_dict(student.state_dict())
    assert loss_of(stage, UNSEEN).item() < 0.7 * before
    assert student.encoder.model.config.hidden_dropout_prob == 0.3, "whoever trains it on has its dropout"


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(bert: CompressConfig, tmp_path: Path) -> None:
    run(bert, tmp_path / "whole", max_steps=4, save_steps=2)
    with lost_in(4):
        run(bert, tmp_path / "part", max_steps=4, save_steps=2)
    assert not (tmp_path / "part/model.safetensors").exists() and (tmp_path / "part/checkpoint-2").is_dir()
    run(bert, tmp_path / "part", resume=True, max_steps=4, save_steps=2)
    assert same_weights(tmp_path / "part", tmp_path / "whole")
    assert not same_weights(tmp_path / "part", tmp_path / "whole/checkpoint-2")
    with pytest.raises(ValueError, match="--resume: teacher has changed since the run"):
        run(replace(bert, teacher=bert.encoder), tmp_path / "part", resume=True, max_steps=4, save_steps=2)


def test_the_loss_over_the_variance_of_the_teachers_states(bert: CompressConfig, tmp_path: Path) -> None:
    """Every state and dimension about its own mean: a student of those means would have a loss of 1."""
    plain = run(bert, tmp_path / "plain", max_steps=1)
    metrics = run(replace(bert, over_variance=True), tmp_path / "over", max_steps=1)
    with torch.no_grad():
        states = states_of(by_transformers(bert.teacher), tokenizer_of(bert.teacher), TRAINED)
    variance = float(torch.cat(states[::2], -1).var(0, correction=0).mean())
    assert metrics["teacher_variance"] == {"paired_mse": pytest.approx(variance, rel=1e-5)}
    assert metrics["train_loss"] == pytest.approx(plain["train_loss"] / variance, rel=1e-5)


def test_weights_that_are_trained_are_float32(bert: CompressConfig, tmp_path: Path) -> None:
    run(bert, tmp_path / "run", base_weights="bf16", bf16=True, max_steps=2)
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}
    stage = build(bert, Data(TRAINED), torch.bfloat16)
    assert stage.teacher.encoder.model.dtype == torch.bfloat16 and stage.student.dtype == torch.float32


def test_the_teacher_is_in_the_count_of_flops(bert: CompressConfig) -> None:
    stage = stage_of(bert)
    batch = collate(UNSEEN, stage.student.tokenizer, sides=("mt",), align=False)
    alone, both = ModelFlops(stage.student)(batch), ModelFlops(stage.student, (), stage.beside)(batch)
    linear = [m for m in stage.teacher.encoder.modules() if isinstance(m, nn.Linear)]
    attention = 4 * 6 * 32 * sum(n * n for n in batch.mt.lengths)
    assert both - alone == 2 * sum(m.weight.numel() for m in linear) * batch.mt.num_tokens + attention


# ---- what is refused
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": ""}, "--encoder is missing"),
        ({"teacher": ""}, "--teacher is missing"),
        ({"teacher": "./nosuch"}, r"teacher='\./nosuch'"),
        ({"swapped": True}, r"teacher='.*small': has 3 layers, no multiple of the 6 of encoder='.*whole'"),
        ({"teacher": "wide"}, r"teacher='.*wide': its states are 64 wide, those of encoder='.*small' 32"),
        ({"teacher": "family"}, r"teacher='.*family': is a 'xlm-roberta' model, encoder='.*small' a 'bert' one"),
        ({"base_weights": "int8"}, r"base_weights='int8': all weights of the encoder are trained"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    bert: CompressConfig, changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(PackedEncoder, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    for name, key, width in (("wide", "bert", 64), ("family", "xlm-roberta", 32)):
        config = CONFIGS[key]()
        config.hidden_size, config.num_hidden_layers = width, 6
        config.save_pretrained(tmp_path / name)
    if (teacher := changes.get("teacher")) in ("wide", "family"):
        changes = {"teacher": str(tmp_path / teacher)}
    if "swapped" in changes:
        changes = {"encoder": bert.teacher, "teacher": bert.encoder}
    train = {name: value for name, value in changes.items() if name == "base_weights"}
    with pytest.raises(ValueError, match=said):
        run(replace(bert, **{n: v for n, v in changes.items() if n not in train}), tmp_path / "run", **train)
    assert not (tmp_path / "run").exists()


def test_tokens_and_no_text_are_refused(bert: CompressConfig, tmp_path: Path, capsys) -> None:
    config = replace(bert, output=str(tmp_path / "run"), train=optim())
    store = TokenStore.__new__(TokenStore)
    with pytest.raises(ValueError, match="rows: this stage reads text, not a token store"):
        compress(config, store)
    with pytest.raises(ValueError, match="the training data holds no usable row"):
        compress(config, [])
    words = ["compress", "--encoder", bert.encoder, "--teacher", bert.teacher, "--output", str(tmp_path / "run")]
    (tmp_path / "store.json").write_text("{}")
    for more, said in (
        ([], "--text is missing"),
        (["--text", str(tmp_path)], "holds tokens, made by `mtllm tokenize`"),
    ):
        assert said in refused(capsys, [*words, *more])
    assert not (tmp_path / "run").exists()


def test_states_that_a_gpu_cannot_compare_are_refused(bert: CompressConfig, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    from mtllm_fast.kernels.hidden_mse_launch import MAX_WIDTH

    assert WIDEST == MAX_WIDTH
    module = sys.modules["mtllm_fast.training.compress"]
    monkeypatch.setattr(module, "on_gpu", lambda optim: True)
    monkeypatch.setattr(module, "WIDEST", 127)
    with pytest.raises(
        ValueError, match=r"encoder=.*: 4 states of width 32 are compared side by side, and a GPU compar"
    ):
        run(bert, tmp_path / "run")


# ---- a plain encoder
@pytest.mark.parametrize("key", ["bert", "m2m_100"])
def test_a_plain_encoder_of_the_result(key: str, tmp_path: Path, capsys) -> None:
    config = pair(key, tmp_path)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": r.text, "code": r.language}) + "\n" for r in TRAINED))
    run_folder, plain = tmp_path / "run", tmp_path / "plain"
    cli.main(
        [
            "compress", "--encoder", config.encoder, "--teacher", config.teacher, "--text", str(text), "--output",
            str(run_folder), "--language-column", "code", "--max-steps", "3", "--lr", "1e-2", "--tokens", "512",
            "--report-to", "none", "--no-progress",
        ]
    )  # fmt: skip
    convert = ["convert", "--model", str(run_folder), "--to", "encoder", "--output", str(plain)]
    cli.main(convert)
    model = MTLLM.from_pretrained(run_folder)
    alone, small = (MTLLM.stack(str(folder), reader="encoder").eval() for folder in (plain, config.encoder))
    batch = collate(UNSEEN, model.tokenizer, sides=("mt",), align=False)
    again = collate(UNSEEN, alone.tokenizer, sides=("mt",), align=False)
    assert torch.equal(again.mt.input_ids, batch.mt.input_ids)
    with torch.no_grad():
        assert torch.equal(alone.states(again.mt), model.states(batch.mt))
        assert not torch.equal(small.states(batch.mt), model.states(batch.mt)), "the control: it was trained"
        theirs = states_of(by_transformers(str(plain)), alone.tokenizer, UNSEEN)[-1]
        assert relative_error(alone.encoder(again.mt, final_norm=False), theirs) < 1e-5
    # it can be what another run starts from, and is written again only if that is meant
    again_config = CompressConfig(encoder=str(plain), teacher=config.teacher)
    assert loss_of(stage_of(again_config), UNSEEN).item() < loss_of(stage_of(config), UNSEEN).item()
    assert "holds a model already" in refused(capsys, convert)
    cli.main([*convert, "--overwrite"])
    assert torch.equal(MTLLM.stack(str(plain), reader="encoder").eval().states(again.mt), model.states(batch.mt))
    assert not list(plain.glob(".saving*"))


def test_adapters_are_merged_and_heads_refused(
    bert: CompressConfig, encoder_folder, llm_folder, tmp_path: Path
) -> None:
    adapted = stir(MTLLM.stack(bert.encoder, reader="encoder", lora=LoraSettings(r=2), dtype=torch.float32)).eval()
    batch = collate(UNSEEN, adapted.tokenizer, sides=("mt",), align=False)
    with torch.no_grad():
        right, bare = adapted.states(batch.mt), MTLLM.stack(bert.encoder, reader="encoder").eval().states(batch.mt)
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain/model-00001-of-00002.safetensors").write_bytes(b"left by another model")
        save_encoder(adapted, tmp_path / "plain")
        found = MTLLM.stack(str(tmp_path / "plain"), reader="encoder").eval().states(batch.mt)
    assert relative_error(found, right) < 1e-5 < relative_error(bare, right)
    assert [path.name for path in (tmp_path / "plain").glob("*.safetensors")] == ["model.safetensors"]
    with pytest.raises(ValueError, match="model: has a task head"):
        save_encoder(MTLLM.stack(bert.encoder, reader="encoder", head=HeadConfig("choice")), tmp_path / "no")
    with pytest.raises(ValueError, match="reader='stack'; only one that is an encoder alone"):
        save_encoder(MTLLM.stack(encoder_folder, llm_folder), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_shrink_replaces_only_what_it_made(bert: CompressConfig, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(
        ValueError, match=r"output=.*: holds no shrunk\.json, so it is no smaller encoder to be replaced"
    ):
        shrink(bert.teacher, tmp_path / "other", layers=3, overwrite=True)
    shrink(bert.teacher, tmp_path / "small", layers=3)
    with pytest.raises(ValueError, match=r"output=.*: exists"):
        shrink(bert.teacher, tmp_path / "small", layers=2)
    shrink(bert.teacher, tmp_path / "small", layers=2, overwrite=True)
    assert PackedEncoder.from_pretrained(str(tmp_path / "small")).num_layers == 2
    assert list((tmp_path / "other").iterdir()) == []
