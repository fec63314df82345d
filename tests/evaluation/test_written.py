"""Models that are read by what they write: labels and choices by their likelihood, numbers by exact match."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mtllm_fast import MTLLM, TextRow, cli
from mtllm_fast.data.prompt import Prompt
from mtllm_fast.evaluation import evaluate, get_task
from mtllm_fast.evaluation.answers import is_right, number_of
from mtllm_fast.evaluation.cells import CellStore
from mtllm_fast.evaluation.suite_file import read_suite, run_suite
from mtllm_fast.evaluation.systems import reading
from mtllm_fast.evaluation.tasks import FolderTask, Table, Task
from mtllm_fast.inference.likelihood import log_likelihoods
from mtllm_fast.inference.respond import Decoding, Responder
from mtllm_fast.models.heads import HeadConfig
from mtllm_fast.reporting import read_scores, write_report
from tests.tiny import LINES

PROMPT = Prompt("Q: ", "\nA:")
LANGUAGES = ("en", "fr", "sw")
CODES = {"en": "eng_Latn", "fr": "fra_Latn", "sw": "swh_Latn"}
LABELS = ("a", "e", "o")
NEW = 4
OPTIONS: dict[str, Any] = {"progress": False, "resamples": 100, "device": "cpu"}
WORDS = " ".join(LINES).replace(".", "").split()


def text(index: int) -> str:
    return " ".join(WORDS[(7 * index + k) % len(WORDS)] for k in range(2 + index % 5))


def digits_only(model: MTLLM) -> MTLLM:
    """What it writes are digits for the most part, of a kind that depends on the text."""
    llm = model.require_llm().model
    own = model.tokenizer.llm
    with torch.no_grad():
        for weight in llm.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0)
        kept = own.convert_tokens_to_ids(list("0123456789-"))
        head = llm.get_output_embeddings().weight
        rows = head[kept].clone()
        head.zero_()
        head[kept] = 4 * rows
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, encoder_folder: str, llm_folder: str) -> dict[str, str]:
    """Folders: a stack that was taught a prompt, an LLM alone without one, a stack with a head, one that cannot write."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)  # what they answer is that of chance, but not by chance
    made = {
        "stack": MTLLM.stack(encoder_folder, llm_folder, causal=True),
        "llm": MTLLM.stack(llm=llm_folder, reader="llm", causal=True),
        "head": MTLLM.stack(encoder_folder, llm_folder, causal=True, head=HeadConfig(labels=LABELS)),
        "two-way": MTLLM.stack(encoder_folder, llm_folder),
    }
    made["stack"].config.prompt = PROMPT
    for name, model in made.items():
        if name in ("stack", "llm"):
            digits_only(model)
        model.save_pretrained(root / name, include_base=True)
    return {name: str(root / name) for name in made}


def rows_of(language: str, count: int = 12) -> list[TextRow]:
    return [TextRow(text(k + 100 * LANGUAGES.index(language)), CODES[language], id=str(k)) for k in range(count)]


def write_mgsm(folder: Path, model: str) -> dict[str, list[bool]]:
    """MGSM's files in which every third gold answer is not that of the stack; which ones are."""
    loaded, right = MTLLM.from_pretrained(model), {}
    for language in LANGUAGES:
        answers = Responder(loaded, PROMPT, Decoding(NEW)).answers(rows_of(language))
        numbers = [number_of(one.text) for (one,) in answers]
        right[language] = [number is not None and k % 3 != 0 for k, number in enumerate(numbers)]
        golds = [n if hit else 77777 for n, hit in zip(numbers, right[language])]
        (folder / language).mkdir(parents=True)
        lines = [f"{row.text}\t{gold}\n" for row, gold in zip(rows_of(language), golds)]
        (folder / language / "test.tsv").write_text("".join(lines))
    assert all(2 < sum(hits) < 10 for hits in right.values())
    return right


def test_generated_answers(models: dict[str, str], tmp_path: Path) -> None:
    """Accuracy is the exact match of what the model writes itself, with its interval and no macro-F1."""
    right = write_mgsm(tmp_path / "data", models["stack"])
    given: dict[str, Any] = {"max_new_tokens": NEW, "alignment": True}
    scores = evaluate({"ours": models["stack"]}, "mgsm", tmp_path / "data", **given, **OPTIONS)
    (ours,) = scores.models
    assert (ours.method, scores.labels, scores.metrics) == ("generation", (), ("accuracy",))
    for language, hits in right.items():
        found = ours.languages[language]
        assert found.accuracy == np.mean(hits) and found.macro_f1 is None and found.mt_code == CODES[language]
        assert found.accuracy_interval is not None and found.accuracy_interval[0] < found.accuracy
        retrieval = {"to_english", "from_english"} <= set(found.alignment)
        assert retrieval == (language != "en")  # sentence retrieval both ways, by the rows' numbers
    assert "writes its answers greedily after the prompt 'Q: <text>\\nA:', at most 4 tokens" in ours.notes[0]
    assert ours.counts["unfinished_answers"] == 36 and ours.counts["truncated"] == 0
    other = evaluate({"ours": models["stack"]}, "mgsm", tmp_path / "data", max_new_tokens=2, **OPTIONS)
    assert other.models[0].languages["fr"].accuracy < np.mean(right["fr"])  # control: other answers
    paths = write_report(scores, tmp_path / "report")
    assert read_scores(paths["json"]) == [scores]
    page, table = paths["html"].read_text(), paths["markdown"].read_text()
    assert "exact match of the last number in the answer" in page and "exact match" in table
    for content in (page, table):
        assert "macro-F1" not in content and "Macro-F1" not in content and "Guessing blindly" not in content
    assert "chance" not in table and paths["figure"].stat().st_size > 10_000
    assert json.loads(paths["json"].read_text())["tasks"][0]["models"][0]["languages"]["fr"]["macro_f1"] is None


def test_generated_answers_against_translate_test(models: dict[str, str], tmp_path: Path) -> None:
    """The LLM alone answers translations after a prompt that it is given; gaps are paired by row and tested."""
    right = write_mgsm(tmp_path / "data", models["stack"])
    task = get_task("mgsm")
    translations = [
        {"id": row.id, "language": language, "translation": f"English {row.text}"}
        for language in LANGUAGES[1:]
        for row in rows_of(language)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in translations))
    scores = evaluate(
        {"ours": models["stack"]},
        task,
        tmp_path / "data",
        translations=tmp_path / "t.jsonl",
        teacher=models["llm"],
        prompt=Prompt("Text: ", "\n"),
        max_new_tokens=NEW,
        **OPTIONS,
    )
    ours, test = scores.models
    assert test.method == "translate-test" and any("the prompt 'Text: <text>\\n'" in note for note in test.notes)
    assert any("'Q: <text>\\nA:'" in note for note in ours.notes)  # its own prompt stays its own
    responder = Responder(MTLLM.from_pretrained(models["llm"]), Prompt("Text: ", "\n"), Decoding(NEW))
    golds = {row.id: str(row.target) for row in task.rows(tmp_path / "data", "fr")}
    english = [replace(row, text=f"English {row.text}", language="eng_Latn") for row in rows_of("fr")]
    theirs = [is_right(one.text, golds[str(row.id)]) for row, (one,) in zip(english, responder.answers(english))]
    assert test.languages["fr"].accuracy == np.mean(theirs)
    gap = ours.languages["fr"].gap
    assert gap is not None and gap.accuracy == pytest.approx(np.mean(right["fr"]) - np.mean(theirs)) and gap.p < 1


def write_labelled(folder: Path, model: str, prompt: Prompt = PROMPT) -> dict[str, float]:
    """A labelled task in which every fourth label is not the one that the model finds likeliest; the accuracy."""
    loaded, accuracy = MTLLM.from_pretrained(model), {}
    for language in LANGUAGES:
        rows = rows_of(language, 16)
        found, _ = log_likelihoods(loaded, rows, [LABELS] * len(rows), prompt)
        likeliest = [int(values.argmax()) for values in found]
        labels = [(best + (k % 4 == 0)) % 3 for k, best in enumerate(likeliest)]
        (folder / language).mkdir(parents=True)
        lines = [f"{row.id}\t{row.text}\t{LABELS[label]}\n" for row, label in zip(rows, labels)]
        (folder / language / "test.tsv").write_text("id\ttext\tlabel\n" + "".join(lines))
        accuracy[language] = 0.75
    return accuracy


MINI = FolderTask("mini", LABELS, (Table(id="id"),), english="en", mt_codes=CODES)


@pytest.mark.parametrize("name", ["stack", "llm"])
def test_labels_by_their_likelihood(models: dict[str, str], tmp_path: Path, name: str) -> None:
    expected = write_labelled(tmp_path / "data", models[name])
    prompt = None if name == "stack" else PROMPT  # the LLM alone has none of its own
    scores = evaluate({"ours": models[name]}, MINI, tmp_path / "data", prompt=prompt, **OPTIONS)
    (ours,) = scores.models
    assert ours.method == "log-likelihood of the labels" and "after the prompt 'Q: <text>\\nA:'" in ours.notes[0]
    assert {code: found.accuracy for code, found in ours.languages.items()} == expected
    assert all(found.macro_f1 is not None for found in ours.languages.values())
    page = write_report(scores, tmp_path / "report")["html"].read_text()
    assert "the label that it would most likely write counts" in page and "Macro-F1" in page
    loaded = MTLLM.from_pretrained(models[name])
    loaded.config.prompt = Prompt("", "?")  # control: another prompt is another reading
    other = evaluate({"ours": loaded}, MINI, tmp_path / "data", **OPTIONS).models[0]
    assert any(other.languages[code].accuracy != expected[code] for code in LANGUAGES)


def test_choices_by_their_likelihood(models: dict[str, str], tmp_path: Path) -> None:
    """Rows of a choice task are read with their choices, as `mtllm sft` reads them, and answered by one of them."""
    (tmp_path / "fr").mkdir()
    loaded = MTLLM.from_pretrained(models["stack"])
    rows = [replace(row, choices=(WORDS[k], WORDS[k + 1], WORDS[k + 2])) for k, row in enumerate(rows_of("fr"))]
    found, _ = log_likelihoods(loaded, rows, [row.choices or () for row in rows], PROMPT)
    gold = [(int(values.argmax()) + (k % 4 == 0)) % 3 for k, values in enumerate(found)]
    header = "id\ttext\ta\tb\tc\tlabel\n"
    lines = ["\t".join([str(r.id), r.text, *(r.choices or ()), str(g)]) + "\n" for r, g in zip(rows, gold)]
    (tmp_path / "fr/test.tsv").write_text(header + "".join(lines))
    table = Table(id="id", choices=("a", "b", "c"))
    task = FolderTask("quiz", ("1", "2", "3"), (table,), english="en", mt_codes=CODES, kind="choice")
    (ours,) = evaluate({"ours": models["stack"]}, task, tmp_path, **OPTIONS).models
    assert ours.method == "log-likelihood of the choices" and ours.languages["fr"].accuracy == 0.75
    bare, _ = log_likelihoods(
        loaded, [replace(row, choices=None) for row in rows], [r.choices or () for r in rows], PROMPT
    )
    assert any(abs(a[0] - b[0]) > 1e-3 for a, b in zip(found, bare))  # control: the choices are read


def test_cells_are_reused_and_computed_again(models: dict[str, str], tmp_path: Path) -> None:
    write_mgsm(tmp_path / "sums", models["stack"])
    write_labelled(tmp_path / "labels", models["stack"])
    (tmp_path / "labels/en/train.tsv").write_text((tmp_path / "labels/en/test.tsv").read_text())

    def run(name: str, task: str | Task, source: str, **options: Any) -> tuple[int, int, Any]:
        store = CellStore(tmp_path / f"cells-{source}")
        scores = evaluate({name: models[name]}, task, tmp_path / source, cells=store, **{**OPTIONS, **options})
        return store.reused, store.written, scores

    sums: dict[str, Any] = {"max_new_tokens": NEW}
    first = run("stack", "mgsm", "sums", **sums)
    assert first[:2] == (0, 4)  # three cells and what is said of the model
    again = run("stack", "mgsm", "sums", **sums)
    assert again[0] >= 3 and again[1] == 0 and again[2] == first[2]
    path = next((tmp_path / "cells-sums").rglob("fr.safetensors"))
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["cell"])
        assert file.get_tensor("gold").tolist() == [1] * 12 and file.get_tensor("logits").shape == (12, 2)
    answers = Responder(MTLLM.from_pretrained(models["stack"]), PROMPT, Decoding(NEW)).answers(rows_of("fr"))
    assert about["answers"] == [one.text for (one,) in answers]
    assert run("stack", "mgsm", "sums", max_new_tokens=3)[1] == 4
    lines = (tmp_path / "sums/fr/test.tsv").read_text().replace("77777", "66666")
    (tmp_path / "sums/fr/test.tsv").write_text(lines)
    assert run("stack", "mgsm", "sums", max_new_tokens=3)[1] == 2  # other gold answers of one
    given: dict[str, Any] = {"prompt": PROMPT}
    assert run("llm", MINI, "labels", **given)[1] == 4 and run("llm", MINI, "labels", **given)[1] == 0
    assert run("llm", MINI, "labels", prompt=Prompt("", "?"))[1] == 4
    probe = run("llm", MINI, "labels")[2].models[0]
    assert probe.method == "linear probe"  # without a prompt it is what it always was
    head = run("head", MINI, "labels")
    assert head[1] == 4 and run("head", MINI, "labels", **given)[1] == 0  # a head asks for no prompt
    path = next((tmp_path / "cells-labels/head").rglob("fr.safetensors"))
    with safe_open(path, framework="numpy") as file:
        assert "answers" not in json.loads(file.metadata()["cell"])  # as earlier versions wrote it


def test_suite_and_command(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = write_mgsm(tmp_path / "data", models["stack"])
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"output: {tmp_path / 'out'}\nmodels:\n  ours: {models['stack']}\n  llm: {models['llm']}\ndevice: cpu\n"
        f"tasks:\n  - {{task: mgsm, data: {tmp_path / 'data'}, before: 'Q: ', max_new_tokens: {NEW}}}\nresamples: 50\n"
    )
    ((scores,), store) = run_suite(read_suite(suite), progress=False)
    assert scores.models[0].languages["sw"].accuracy == np.mean(right["sw"]) and store.written == 8
    assert "the prompt 'Q: <text>\\n'" in scores.models[1].notes[0]
    cli.main(["evaluate", "--suite", str(suite), "--no-progress"])
    assert "generation" in capsys.readouterr().out
    given = ["--task", "mgsm", "--data", str(tmp_path / "data"), "--resamples", "50", "--no-progress"]
    options = ["--max-new-tokens", str(NEW), "--output", str(tmp_path / "scores")]
    cli.main(["evaluate", "--model", models["stack"], *given, *options])
    out = capsys.readouterr().out
    assert "(generation): 3 of 3 languages, 36 rows" in out and "36 unfinished answers" in out and "F1" not in out
    (written,) = read_scores(tmp_path / "scores/scores.json")
    assert written.models[0].languages["fr"].accuracy == np.mean(right["fr"])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("llm", [], "was not taught to write (`mtllm sft`), and 'mgsm' wants written answers; name the prompt"),
        ("head", [], "was not taught to write"),
        ("two-way", ["--before", ""], "has a bidirectional LLM, and the answers of 'mgsm' are written by a causal one"),
        ("stack", ["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        ("stack", ["--max-tokens", "200"], "max_tokens=200: a batch holds no prompt and answer of max_new_tokens=256"),
        ("stack", ["--after", "{texts}"], "prompt.after: {texts} is none of"),
    ],
)
def test_bad_commands(
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    match: str,
) -> None:
    (tmp_path / "data/fr").mkdir(parents=True)
    (tmp_path / "data/fr/test.tsv").write_text("Combien ?\t3\n")
    monkeypatch.setattr(MTLLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    given = ["--task", "mgsm", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "scores"), "--no-progress"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "--model", models[name], *given, *options])
    message = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and match in message and "\n" not in message
    assert not (tmp_path / "scores").exists()


def test_how_a_model_is_read(models: dict[str, str]) -> None:
    configs = {name: MTLLM.from_pretrained(folder).config for name, folder in models.items()}
    task, sums = MINI, get_task("mgsm")
    assert [reading(configs[name], task, None, name) for name in configs] == ["likelihood", "probe", "head", "probe"]
    assert [reading(configs[name], task, PROMPT, name) for name in configs] == [
        "likelihood",
        "likelihood",
        "head",
        "probe",
    ]
    assert reading(configs["head"], sums, PROMPT, "head") == "generation"


@pytest.mark.parametrize("command", ["finetune --llm L", "distill --model L --teacher L"])
def test_heads_are_not_trained_on_written_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = 'kind: generated\nlanguages: [eng_Latn]\nfiles: "{language}.{split}.csv"\n'
    (tmp_path / "sums.yaml").write_text(text)
    (tmp_path / "eng_Latn.train.csv").write_text("text,label\nHow many?,18\n")
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--task", str(tmp_path / "sums.yaml"), "--output", str(tmp_path / "run")])
    assert "its answers are written, not chosen by a head; train with `mtllm sft`" in capsys.readouterr().err


def test_answers_are_trained_on_and_scored(
    encoder_folder: str, llm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """respond -> sft -> evaluate: a stack that learns the LLM's own answers comes to write them itself."""
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in LINES))
    for name in ("student", "llm"):
        model = MTLLM.stack(llm=llm_folder, reader="llm", causal=True)
        with torch.no_grad():  # as initialised its frozen head cannot say anything for sure
            model.require_llm().model.get_output_embeddings().weight.mul_(20.0)
        llm = (digits_only(model) if name == "llm" else model).require_llm()
        llm.save(tmp_path / name)
        model.require_tokenizer().llm.save_pretrained(tmp_path / name)
    answers, run = str(tmp_path / "answers.jsonl"), str(tmp_path / "run")
    quiet = ["--no-progress", "--device", "cpu"]
    around = ["--before", "Q: ", "--after", "\nA:"]
    made = ["--llm", str(tmp_path / "llm"), "--text", str(tmp_path / "in.txt"), "--output", answers]
    cli.main(["respond", *made, *around, "--max-new-tokens", "3", *quiet])
    records = [json.loads(line) for line in Path(answers).read_text().split("\n")[:-1]]
    assert len({record["target"] for record in records}) > 2
    trained = [
        "--encoder",
        encoder_folder,
        "--llm",
        str(tmp_path / "student"),
        "--text",
        answers,
        "--language",
        "eng_Latn",
    ]
    steps = ["--max-steps", "60", "--lr", "1e-2", "--tokens", "2048", "--report-to", "none"]
    cli.main(["sft", *trained, *around, *steps, "--output", run, "--no-progress", "--device", "cpu"])
    (tmp_path / "data/en").mkdir(parents=True)
    asked = [(record["text"], number_of(record["target"])) for record in records]
    lines = [f"{text}\t{number}\n" for text, number in asked if number is not None]
    (tmp_path / "data/en/test.tsv").write_text("".join(lines))
    assert len(lines) > 3
    untrained = MTLLM.stack(encoder_folder, str(tmp_path / "student"), causal=True)
    given = {"before": untrained, "after": run}
    scores = evaluate(given, "mgsm", tmp_path / "data", prompt=PROMPT, max_new_tokens=4, **OPTIONS)
    before, after = (model.languages["en"].accuracy for model in scores.models)
    assert after >= 0.8 > before
    assert "generation" in scores.models[1].method and capsys.readouterr().out
