"""sft: the loss against a loop that concatenates by hand, what is trained, resuming, labels as targets, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import set_seed

from mtllm_fast import MTLLM, PackedBatch, ProjectionConfig, TextRow
from mtllm_fast.data import PackedDataset, read_rows
from mtllm_fast.data.collate import collate
from mtllm_fast.data.prompt import Prompt, Writing
from mtllm_fast.losses import TargetWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.models.inputs import read_with_targets
from mtllm_fast.training import SftConfig, sft
from mtllm_fast.training.run import Data
from mtllm_fast.training.sft import build
from tests.conftest import assert_matches
from tests.models.weights import stir
from tests.tiny import LINES
from tests.training.short_runs import logged, optim, weights

ROWS = [
    TextRow(f"{line} {i}", "eng_Latn", target=" ".join(line.split()[: 1 + i % 4])) for i, line in enumerate(LINES * 8)
]
PROMPT = Prompt("Text: ", "\nAgain: {text}\nFirst words:")
STEPS = 4


def config(encoder: str, llm: str, output: Path | str = "", **changes) -> SftConfig:
    train = optim(max_steps=STEPS, gradient_accumulation=2, tokens=400, save_steps=1, keep=STEPS + 1, lr=5e-3)
    settings = {
        "encoder": encoder, "llm": llm, "output": str(output), "prompt": PROMPT, "max_target_tokens": 16, "train": train,
        "projection": ProjectionConfig(boundary=True), "lora": LoraSettings(r=2, dropout=0.0),
    }  # fmt: skip
    settings |= changes
    prompt = settings.pop("prompt")
    if prompt is not None:
        settings |= {"before": prompt.before, "after": prompt.after}
    return SftConfig(**settings)


def by_hand(model: MTLLM, row: TextRow) -> tuple[Tensor, Tensor]:
    """Logits that predict a row's targets, and the targets, of one sequence that is put together by plain torch."""
    llm, tokens = model.llm.model, model.tokenizer.llm
    table = llm.get_input_embeddings()

    def plain(text: str) -> list[int]:
        return tokens(text, add_special_tokens=False)["input_ids"]

    before = [*model.tokenizer.llm_prefix, *plain("Text: ")]
    after = [*plain("\nAgain: "), *plain(row.text), *plain("\nFirst words:")]
    target = [*plain(row.target), tokens.eos_token_id]
    if model.config.reader == "llm":
        ids = [*before, *plain(row.text), *after, *target]
        embeds, total = table(torch.tensor(ids)), len(ids)
    else:
        text = PackedBatch.from_sequences(model.tokenizer.mt_side([row], ends=False).ids)
        states = model.encoder.final_norm(model.encoder(text, final_norm=False))
        parts = [table(torch.tensor(before)), model.projection.layers(states)]
        if model.projection.boundary is not None:
            parts.append(model.projection.boundary[None])
        embeds = torch.cat([*parts, table(torch.tensor([*after, *target]))])
        total = len(embeds)
    packed = PackedBatch.from_flat(torch.zeros(total, dtype=torch.int64), [total])
    states = model.llm(packed, embeds=embeds)
    logits = F.linear(states, llm.get_output_embeddings().weight)
    return logits[-len(target) - 1 : -1], torch.tensor(target)


@pytest.mark.parametrize(("reader", "boundary"), [("stack", False), ("stack", True), ("llm", False)])
def test_the_loss_is_that_of_sequences_put_together_by_hand(reader, boundary, encoder_folder, llm_folder) -> None:
    projection = ProjectionConfig(boundary=boundary)
    stage = build(
        config(encoder_folder, llm_folder, projection=projection) if reader == "stack"
        else config("", llm_folder, reader="llm", projection=ProjectionConfig()),
        Data(ROWS), torch.float32,
    )  # fmt: skip
    model = stage.student
    if boundary:
        torch.nn.init.normal_(model.projection.boundary)
    stir(model)
    stage.eval()
    rows = ROWS[:5]
    batch = collate(rows, model.tokenizer, sides=(model.side,), prompt=PROMPT)
    loss = stage.step(batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pairs = [by_hand(model, row) for row in rows]
    expected = F.cross_entropy(torch.cat([z for z, _ in pairs]), torch.cat([y for _, y in pairs]))
    expected.backward()
    assert_matches(loss, expected, 1e-5)
    right = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == right.keys() and len(right) > 4
    for name, gradient in right.items():
        assert_matches(got[name], gradient, 2e-4)
    shifted = F.cross_entropy(torch.cat([z for z, _ in pairs])[1:], torch.cat([y for _, y in pairs])[:-1])
    assert abs(float((shifted - expected).detach())) > 2e-3, "the control: one token off is another loss"


def test_the_kl_is_to_the_bare_llm_on_the_same_target_rows(encoder_folder, llm_folder) -> None:
    weights = TargetWeights(target_ce=0.0, kl=1.0, temperature=2.0)
    torch.manual_seed(5)
    stage = build(config(encoder_folder, llm_folder, loss=weights), Data(ROWS), torch.float32).eval()
    alone = build(config("", llm_folder, reader="llm", projection=ProjectionConfig()), Data(ROWS), torch.float32).eval()
    assert stage.sides == ("mt", "llm") and stage.align is False
    with torch.no_grad():  # far enough from the teacher for fp32 to tell a part in ten thousand of their difference
        stage.student.projection.layers.weight.mul_(20.0)
    rows = ROWS[:4]
    batch = collate(rows, stage.student.tokenizer, prompt=PROMPT)
    with torch.no_grad():
        student = torch.cat([by_hand(stage.student, row)[0] for row in rows])
        teacher = torch.cat([by_hand(alone.student, row)[0] for row in rows])  # its LoRA is the identity as yet
        log_q, log_p = (F.log_softmax(z / 2.0, -1) for z in (student, teacher))
        expected = 4.0 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        assert_matches(stage.step(batch), expected, 1e-4)
        shifted = 4.0 * F.kl_div(log_q[1:], log_p[:-1], reduction="batchmean", log_target=True)
    assert abs(float(shifted / expected) - 1) > 1e-2, "the control: the teacher one token off"


def test_runs_log_resume_and_save_their_prompt(encoder_folder, llm_folder, tmp_path) -> None:
    settings = config(encoder_folder, llm_folder, tmp_path / "run")
    metrics = sft(settings, ROWS, source={"text": "lines"})
    first = logged(tmp_path / "run")
    assert sorted(first) == list(range(1, STEPS + 1)) and first[STEPS]["loss"] < first[1]["loss"]
    student = MTLLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    assert student.config.prompt == PROMPT and student.config.projection.boundary
    assert float(student.projection.boundary.detach().abs().max()) > 0, "the boundary is trained"
    # the mean of a step by hand, over all targets of its packs
    student.tokenizer.max_mt_tokens = student.tokenizer.max_llm_tokens = 48
    student.load_state_dict(weights(tmp_path / f"run/checkpoint-{STEPS - 1}"), strict=False)
    packs = PackedDataset(
        ROWS, student.tokenizer, max_tokens=400, seed=42, sides=("mt",), shuffle_buffer=2**20, writing=Writing(PROMPT, 16)
    )  # fmt: skip
    batches = list(packs)[2 * (STEPS - 1) : 2 * STEPS]
    with torch.no_grad():
        terms = []
        for batch in batches:
            read = read_with_targets(student, batch)
            logits = F.linear(read.states[read.rows], student.llm.lm_head.weight)
            terms.append(F.cross_entropy(logits, batch.targets.input_ids, reduction="none"))
    assert first[STEPS]["target_ce"] == pytest.approx(float(torch.cat(terms).mean()), rel=1e-4)

    whole = weights(tmp_path / "run")
    part = config(encoder_folder, llm_folder, tmp_path / "part")
    part.train.max_steps = 2
    sft(part, ROWS, source={"text": "lines"})
    part.train.max_steps, part.resume = STEPS, True
    with pytest.raises(ValueError, match="--resume: after="):
        sft(
            config(encoder_folder, llm_folder, tmp_path / "part", resume=True, prompt=Prompt()),
            ROWS,
            source={"text": "lines"},
        )
    again = sft(config(encoder_folder, llm_folder, tmp_path / "run", resume=True), ROWS, source={"text": "lines"})
    assert again["train_loss"] == metrics["train_loss"]
    assert metrics["data"]["truncated"].get("target", 0) == 0 and whole


@pytest.mark.parametrize(
    ("train_llm", "train_projection", "trained"),
    [(False, True, {"projection"}), (True, False, {"lora"}), (True, True, {"projection", "lora"})],
)
def test_what_is_trained(train_llm, train_projection, trained, encoder_folder, llm_folder, tmp_path) -> None:
    settings = config(
        encoder_folder, llm_folder, tmp_path / "run", train_llm=train_llm, train_projection=train_projection
    )
    settings.train.max_steps = 1
    set_seed(settings.train.seed)
    before = {n: p.clone() for n, p in build(settings, Data(ROWS), torch.float32).student.named_parameters()}
    sft(settings, ROWS)
    after = dict(MTLLM.from_pretrained(tmp_path / "run", dtype=torch.float32).named_parameters())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"lora" if ".lora_" in name else name.split(".")[0] for name in changed} == trained
    assert (tmp_path / "run/config.json").is_file() and train_llm == any(".lora_" in name for name in after)


def test_goes_on_from_a_model_and_keeps_its_prompt(encoder_folder, llm_folder, tmp_path) -> None:
    first = config(encoder_folder, llm_folder, tmp_path / "mapping", train_llm=False)
    first.train.max_steps = 1
    sft(first, ROWS)
    second = config(
        "",
        "",
        tmp_path / "next",
        model=str(tmp_path / "mapping"),
        prompt=None,
        lora=LoraSettings(),
        projection=ProjectionConfig(),
    )
    second.train.max_steps = 1
    sft(second, ROWS)
    model = MTLLM.from_pretrained(tmp_path / "next")
    assert model.config.prompt == PROMPT and "student" in model.config.adapters
    written = model.generate([ROWS[0].text], "eng_Latn", before=PROMPT.before, after="\n", max_new_tokens=3)
    assert len(written) == 1


def test_labels_are_targets(encoder_folder, llm_folder, tmp_path) -> None:
    rows = [TextRow(line, "eng_Latn", label=i % 2) for i, line in enumerate(LINES * 4)]
    settings = config(encoder_folder, llm_folder, tmp_path / "run", prompt=Prompt(after="\nOdd or even:"))
    settings.train.max_steps = 1
    stage = build(settings, Data(rows, labels=["even", "odd"]), torch.float32)
    batch = collate(list(stage.rows)[:2], stage.student.tokenizer, sides=("mt",), prompt=Prompt("", "\nOdd or even:"))
    words = [
        stage.student.tokenizer.llm.decode(ids[:-1]) for ids in batch.targets.input_ids.split(batch.targets.lengths)
    ]
    assert words == ["even", "odd"]
    settings.train.max_steps, settings.train.epochs = -1, 2
    metrics = sft(settings, rows, valid_rows=rows[:4], labels=["even", "odd"])
    model = MTLLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    with torch.no_grad():
        likelier = []
        for row in rows[:4]:
            sums = []
            for word in ("even", "odd"):
                one = collate(
                    [replace(row, target=word)], model.tokenizer, sides=("mt",), prompt=Prompt("", "\nOdd or even:")
                )
                read = read_with_targets(model, one)
                logits = F.linear(read.states[read.rows], model.llm.lm_head.weight)
                sums.append(-float(F.cross_entropy(logits, one.targets.input_ids, reduction="sum")))
            likelier.append(sums.index(max(sums)) == row.label)
    assert metrics["best_eval_accuracy"] == sum(likelier) / 4


def test_long_targets_are_cut_counted_and_have_no_end(encoder_folder, llm_folder, tmp_path) -> None:
    rows = [TextRow(line, "eng_Latn", target=" ".join(LINES)) for line in LINES * 3]
    settings = config(encoder_folder, llm_folder, tmp_path / "run", max_target_tokens=5)
    settings.train.max_steps = 1
    metrics = sft(settings, rows)
    assert metrics["data"]["truncated"]["target"] == metrics["data"]["rows"] > 0
    tokenizer = MTLLM.from_pretrained(tmp_path / "run").tokenizer
    packs = PackedDataset(rows, tokenizer, max_tokens=1200, sides=("mt",), writing=Writing(PROMPT, 5))
    targets = next(iter(packs)).targets
    assert set(targets.lengths) == {5} and tokenizer.llm.eos_token_id not in targets.input_ids.tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": ""}, "--encoder is missing"),
        ({"llm": ""}, "--llm is missing"),
        ({"reader": "llm", "projection": ProjectionConfig()}, "reads without one"),
        ({"train_llm": False, "train_projection": False}, "nothing is trained"),
        (
            {"reader": "llm", "encoder": "", "projection": ProjectionConfig(), "loss": TargetWeights(kl=1.0)},
            r"loss\.kl=1\.0",
        ),
    ],
)
def test_what_it_refuses_is_said_before_anything_is_loaded(changes, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        sft(config(**{"encoder": "no", "llm": "no", "output": tmp_path / "run", **changes}), ROWS)
    assert not (tmp_path / "run").exists()


def test_settings_that_mean_nothing_are_refused() -> None:
    for changes, said in (
        ({"max_target_tokens": 0}, "max_target_tokens=0"),
        ({"reader": "both"}, "reader='both'"),
        ({"reader": "llm"}, "reader='llm' has none"),
    ):
        with pytest.raises(ValueError, match=said):
            config("no", "no", **changes)
    with pytest.raises(ValueError, match=r"prompt\.after: \{txt\}"):
        Prompt(after="{txt}")
    with pytest.raises(ValueError, match="label_smoothing=1"):
        TargetWeights(label_smoothing=1.0)


def test_rows_and_models_that_do_not_fit(encoder_folder, llm_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="target: 1 of"):
        sft(config(encoder_folder, llm_folder, tmp_path / "a"), [TextRow("a", "eng_Latn"), *ROWS])
    with pytest.raises(ValueError, match=r"prompt\.after: \{pair\}"):
        sft(config(encoder_folder, llm_folder, tmp_path / "b", prompt=Prompt(after="{pair}")), ROWS)
    narrow = config(encoder_folder, llm_folder, tmp_path / "c")
    narrow.train.tokens = 60
    with pytest.raises(ValueError, match="tokens"):
        sft(narrow, ROWS)
    assert not any((tmp_path / name).exists() for name in "abc")


def test_a_prompt_that_is_given_is_taken_part_by_part(encoder_folder, llm_folder, tmp_path) -> None:
    first = config(encoder_folder, llm_folder, tmp_path / "first", prompt=Prompt("Text: ", ""))
    first.train.max_steps = 0
    sft(first, ROWS)
    for given, expected in (
        ({}, Prompt("Text: ", "")),
        ({"after": "\n"}, Prompt("Text: ", "\n")),
        ({"before": ""}, Prompt("", "")),
    ):
        changes = {
            "model": str(tmp_path / "first"),
            "prompt": None,
            "projection": ProjectionConfig(),
            "lora": LoraSettings(),
        }
        settings = config("", "", tmp_path / "next", **changes, **given)
        assert build(settings, Data(ROWS), torch.float32).student.config.prompt == expected


def test_an_answer_that_was_cut_has_no_end(encoder_folder, llm_folder, tmp_path) -> None:
    path = tmp_path / "answers.jsonl"
    records = [{"text": line, "target": "a b", "finished": i % 2 == 0} for i, line in enumerate(LINES)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = list(read_rows(path, target_column="target", finished_column="finished", language="eng_Latn"))
    tokenizer = build(config(encoder_folder, llm_folder), Data(ROWS), torch.float32).student.tokenizer
    batch = collate(rows, tokenizer, sides=("mt",), prompt=PROMPT)
    ends = [
        ids[-1].item() == tokenizer.llm.eos_token_id for ids in batch.targets.input_ids.split(batch.targets.lengths)
    ]
    assert ends == [record["finished"] for record in records]
    path.write_text(json.dumps({"text": "a", "target": "b", "finished": "no"}) + "\n" + json.dumps(records[0]) + "\n")
    stream = read_rows(path, target_column="target", finished_column="finished")
    assert len(list(stream)) == 1 and stream.counts.failed == 1


def test_a_text_in_the_prompt_that_is_cut_is_counted(encoder_folder, llm_folder) -> None:
    tokenizer = build(config(encoder_folder, llm_folder), Data(ROWS), torch.float32).student.tokenizer
    tokenizer.max_llm_tokens = 5
    assert PROMPT.ids(ROWS[:3], tokenizer)[2] == 3
    assert Prompt("", "\n").ids(ROWS[:3], tokenizer)[2] == 0, "the control: a prompt without the text"


def test_resuming_with_other_labels_is_refused(encoder_folder, llm_folder, tmp_path) -> None:
    rows = [TextRow(line, "eng_Latn", label=i % 2) for i, line in enumerate(LINES * 4)]
    settings = config(encoder_folder, llm_folder, tmp_path / "run")
    settings.train.max_steps = 1
    sft(settings, rows, labels=["even", "odd"])
    settings.resume = True
    with pytest.raises(ValueError, match="--resume: labels="):
        sft(settings, rows, labels=["yes", "no"])


def test_texts_of_another_language_are_not_read_as_english_in_silence(encoder_folder, llm_folder, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    records = [{"text": line, "english": line, "target": "a"} for line in LINES * 3]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = config(encoder_folder, llm_folder, tmp_path / "run", loss=TargetWeights(kl=1.0))
    settings.train.max_steps = 1
    columns = {"target_column": "target", "teacher_text_column": "english"}
    with pytest.raises(ValueError, match="language is missing: beside a teacher_text_column"):
        sft(settings, read_rows(path, **columns))
    assert not (tmp_path / "run").exists()
    sft(settings, read_rows(path, **columns, language="swh_Latn"))
