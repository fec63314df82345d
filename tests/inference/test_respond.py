"""Answers into a file: records, killing and resuming, sampling, what made a file, and what stands in the way of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from mtllm_fast import MTLLM, TextRow, cli, read_rows
from mtllm_fast.data.prompt import Prompt
from mtllm_fast.inference.respond import Decoding, Output, Responder, respond_file
from tests.forked import Forked
from tests.inference.test_translate_file import Killed, killed_and_resumed, stop_after

WORDS = ["river", "bread", "cheese", "light", "stone", "train", "night", "teacher", "apple", "bridge"]
ROWS = [
    TextRow(" ".join(WORDS[(i + k) % 10] for k in range(1 + i % 7)), ("fra_Latn", "deu_Latn")[i % 2], id=f"r{i}")
    for i in range(40)
]
PROMPT = Prompt("Say: ", "\nAnswer:")
SETTINGS = {"model": "tiny"}
SAMPLED = Decoding(5, temperature=1.0, samples=2, seed=7)


def livelier(model: MTLLM) -> MTLLM:
    """As initialised it says nearly the same to everything, and hardly ever ends."""
    with torch.no_grad():
        for weight in model.llm.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0)
    model.llm.model.generation_config.eos_token_id = [model.tokenizer.llm.eos_token_id, *range(200, 260)]
    return model


@pytest.fixture(scope="module", params=["stack", "llm"])
def model(request: pytest.FixtureRequest, encoder_folder: str, llm_folder: str) -> MTLLM:
    encoder = encoder_folder if request.param == "stack" else None
    torch.manual_seed(2)
    return livelier(MTLLM.stack(encoder, llm_folder, reader=request.param, causal=True))


def respond(model: MTLLM, output: Path, decoding: Decoding = SAMPLED, rows: Any = ROWS, **options: Any) -> Any:
    given = {"settings": SETTINGS, "window": 8, **options}
    return respond_file(Responder(model, PROMPT, decoding), rows, Output(output, **given))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("decoding", [Decoding(5), SAMPLED], ids=["greedy", "sampled"])
def test_stopped_and_resumed_gives_the_same_bytes(
    model: MTLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, decoding: Decoding
) -> None:
    whole, output = tmp_path / f"whole{ending}", tmp_path / f"a{ending}"
    report = respond(model, whole, decoding)
    assert (report.rows, report.resumed) == (40, 0)
    for windows in (0, 2, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, windows)
            with pytest.raises(Killed):
                respond(model, output, decoding)
        assert not output.exists()
    again = respond(model, output, decoding)
    assert (again.rows, again.resumed) == (40, 24) and again.counts == report.counts
    assert output.read_bytes() == whole.read_bytes()
    first, second = ((tmp_path / f"{path.name}.run.json").read_text() for path in (whole, output))
    assert first == second
    assert len(list(tmp_path.iterdir())) == 4
    other = respond(model, tmp_path / f"b{ending}", replace(decoding, max_new_tokens=4))
    assert other.rows == 40 and (tmp_path / f"b{ending}").read_bytes() != whole.read_bytes()


def test_records(model: MTLLM, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    report = respond(model, output)
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
    assert list(records[0]) == ["id", "language", "text", "sample", "target", "score", "finished"]
    assert [(record["id"], record["sample"]) for record in records] == [(f"r{i}", k) for i in range(40) for k in (0, 1)]
    assert [record["text"] for record in records[::2]] == [row.text for row in ROWS]
    assert [record["language"] for record in records[::2]] == [row.language for row in ROWS]
    answers = [answer for some in Responder(model, PROMPT, SAMPLED).answers(ROWS) for answer in some]
    assert [record["target"] for record in records] == [answer.text for answer in answers]
    assert [record["score"] for record in records] == pytest.approx([a.score for a in answers], abs=1e-5)
    assert [record["finished"] for record in records] == [answer.finished for answer in answers]
    unfinished = sum(not answer.finished for answer in answers)
    empty = sum(not answer.text.strip() for answer in answers)
    assert 0 < unfinished < 80 and empty and report.counts == {"unfinished": unfinished, "empty": empty}
    rows = list(read_rows(output, target_column="target", language_column="language", id_column="id"))
    assert [row.target for row in rows] == [answer.text for answer in answers if answer.text.strip()]
    table = respond(model, tmp_path / "a.parquet", also=("text_pair",)) and pq.read_table(tmp_path / "a.parquet")
    kept = [{name: value for name, value in row.items() if name != "text_pair"} for row in table.to_pylist()]
    assert kept == records and table.column("text_pair").null_count == 80
    assert json.loads(table.schema.metadata[b"mtllm_respond"])["prompt"] == {"before": "Say: ", "after": "\nAnswer:"}


def test_samples_depend_on_seed_and_row_alone(model: MTLLM, tmp_path: Path) -> None:
    def targets(name: str, decoding: Decoding = SAMPLED, **options: Any) -> list[str]:
        respond(model, tmp_path / name, decoding, **{"rows": ROWS[:20], **options})
        return [json.loads(line)["target"] for line in (tmp_path / name).read_text(encoding="utf-8").split("\n")[:-1]]

    whole = targets("a.jsonl")
    assert targets("b.jsonl", window=40) == targets("c.jsonl", replace(SAMPLED, max_tokens=30), window=3) == whole
    assert targets("d.jsonl", rows=ROWS[:11]) == whole[:22]
    assert targets("e.jsonl", replace(SAMPLED, samples=3))[::3] == whole[::2]
    longer = targets("f.jsonl", replace(SAMPLED, max_new_tokens=7))
    assert all(more.startswith(short.rstrip("�")) for more, short in zip(longer, whole)) and longer != whole
    for changed in (replace(SAMPLED, seed=8), replace(SAMPLED, temperature=2.0)):
        other = targets(f"{changed.seed} {changed.temperature}.jsonl", changed)
        assert sum(one != two for one, two in zip(other, whole)) > 20
    assert targets("g.jsonl", rows=ROWS[19::-1])[::-2] != whole[::2]  # other numbers in the source
    same = targets("h.jsonl", rows=[ROWS[3]] * 6)
    assert len(set(same)) > 6  # nor are equal texts answered alike
    greedy = targets("i.jsonl", Decoding(5), rows=[ROWS[3]] * 6)
    assert len(set(greedy)) == 1


def test_several_processes_share_the_work(model: MTLLM, tmp_path: Path) -> None:
    alone, output = tmp_path / "alone.jsonl", tmp_path / "a.jsonl"
    whole = respond(model, alone)
    reports = [respond(model, output, rank=rank, world_size=3) for rank in range(3)]
    assert [report.complete for report in reports] == [False, False, True] and reports[-1].counts == whole.counts
    assert output.read_bytes() == alone.read_bytes()


def test_answers_of_another_model_or_prompt_are_not_gone_on_with(
    model: MTLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            respond(model, output)
    with pytest.raises(ValueError, match=r"had other settings \(model was 'tiny' and is 'large'\)"):
        respond(model, output, settings={"model": "large"})
    with pytest.raises(ValueError, match=r"had other settings \(seed was 7 and is 8\)"):
        respond(model, output, replace(SAMPLED, seed=8))
    responder = Responder(model, Prompt("Say: ", "\nAnswer: "), SAMPLED)
    with pytest.raises(ValueError, match=r"had other settings \(prompt was .*'\\nAnswer:'.* and is .*'\\nAnswer: '"):
        respond_file(responder, ROWS, Output(output, SETTINGS, window=8))
    respond(model, output)
    with pytest.raises(ValueError, match="exists; pass --overwrite"):
        respond(model, output)
    about = json.loads((tmp_path / "a.jsonl.run.json").read_text())
    assert (about["model"], about["seed"], about["rows"], about["prompt"]["before"]) == ("tiny", 7, 40, "Say: ")
    respond(model, output, rows=ROWS[:8], overwrite=True)
    assert len(output.read_text(encoding="utf-8").split("\n")) == 17
    assert json.loads((tmp_path / "a.jsonl.run.json").read_text())["rows"] == 8
    with pytest.raises(ValueError, match="text: holds no text to respond"):
        respond(model, tmp_path / "none.jsonl", rows=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.run.json"]


def test_killed_between_output_and_end(model: MTLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is in its place, its folder is still there: the same call says what it would have said."""
    whole = respond(model, tmp_path / "whole.jsonl")
    output = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("mtllm_fast.inference.records.Parts.remove", lambda _: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            respond(model, output)
    assert output.exists() and (tmp_path / "a.jsonl.part").exists()
    report = respond(model, output)
    assert (report.rows, report.resumed, report.counts) == (40, 40, whole.counts)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "a.jsonl.part").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"samples": 2}, "samples=2: greedy answers are all the same; give a temperature"),
        ({"seed": -1}, "seed=-1"),
        ({"max_tokens": 256}, "max_tokens=256: a batch holds no prompt and answer of max_new_tokens=256"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Decoding(**settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, encoder_folder: str, llm_folder: str) -> dict[str, str]:
    """Saved models: a stack with a prompt of its own, one whose LLM is bidirectional, an encoder alone."""
    root, made = tmp_path_factory.mktemp("models"), {"llm": llm_folder, "encoder": encoder_folder}
    for name, options in {"stack": {"causal": True}, "two-way": {}, "alone": {"reader": "encoder"}}.items():
        torch.manual_seed(2)
        model = MTLLM.stack(encoder_folder, None if name == "alone" else llm_folder, **options)
        if name == "stack":
            model.config.prompt = PROMPT
            livelier(model)
        model.save_pretrained(root / name, include_base=True)
        made[name] = str(root / name)
    return made


def run(folders: dict[str, str], tmp_path: Path, *options: str, model: str = "stack") -> None:
    named = ["--llm", folders["llm"]] if model == "llm" else ["--model", folders[model]]
    text = tmp_path / "in.jsonl"
    if not text.exists():
        rows = [*ROWS, TextRow(" ", "fra_Latn", id="e"), TextRow("x", "xx", id="u")]
        lines = [{"q": row.text, "code": row.language, "n": row.id, "more": "M"} for row in rows]
        text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--text", str(text), "--text-column", "q", "--id-column", "n", "--device", "cpu", "--no-progress"]
    cli.main(["respond", *named, *given, "--language-column", "code", "--max-new-tokens", "5", *options])


def test_command(capsys: pytest.CaptureFixture[str], folders: dict[str, str], tmp_path: Path) -> None:
    """A stack answers its own prompt unless another is named; rows that cannot be read are counted and left out."""
    run(folders, tmp_path, "--output", str(tmp_path / "a.jsonl"))
    out, err = capsys.readouterr()
    assert "respond: 40 texts -> " in out and "0 truncated" in out and "met the length limit" in out and "empty" in out
    assert "2 rows skipped: 1 empty, 1 unknown language 'xx'" in err
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    loaded = MTLLM.from_pretrained(folders["stack"])
    expected = [one.text for (one,) in Responder(loaded, PROMPT, Decoding(5)).answers(ROWS)]
    assert [record["target"] for record in records] == expected and [r["id"] for r in records] == [r.id for r in ROWS]
    about = json.loads((tmp_path / "a.jsonl.run.json").read_text())
    assert about["prompt"] == {"before": "Say: ", "after": "\nAnswer:"} and about["model"] == folders["stack"]
    more = ["--after", "!", "--pair-column", "more", "--limit", "7"]
    run(folders, tmp_path, "--output", str(tmp_path / "b.parquet"), *more)
    other = Responder(loaded, Prompt(PROMPT.before, "!"), Decoding(5))
    rows = [replace(row, text_pair="M") for row in ROWS[:7]]
    assert [row["target"] for row in pq.read_table(tmp_path / "b.parquet").to_pylist()] == [
        one.text for (one,) in other.answers(rows)
    ]
    assert "respond: 7 texts -> " in capsys.readouterr().out


def test_command_with_an_llm_alone(capsys: pytest.CaptureFixture[str], folders: dict[str, str], tmp_path: Path) -> None:
    """It reads its own tokens, so that a language that no encoder knows is no matter."""
    sampled = ["--temperature", "1.5", "--samples", "2", "--seed", "3"]
    around = ["--before", "<|begin|>Q: ", "--after", "\nA:", "--max-length", "4"]
    run(folders, tmp_path, "--output", str(tmp_path / "a.jsonl"), *sampled, *around, model="llm")
    out = capsys.readouterr().out
    assert "respond: 41 texts x 2 answers -> " in out and "0 truncated" not in out
    model = MTLLM.stack(llm=folders["llm"], reader="llm", causal=True)
    model.tokenizer.max_llm_tokens = 4
    decoding = Decoding(5, temperature=1.5, samples=2, seed=3)
    expected = Responder(model, Prompt("<|begin|>Q: ", "\nA:"), decoding).answers([*ROWS, TextRow("x", "xx")])
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [record["target"] for record in records] == [one.text for some in expected for one in some]
    assert records[-1]["language"] == "xx"


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        ("stack", ["--llm", "x"], "either --llm LLM or --model FOLDER"),
        ("stack", ["--text", ""], "--text is missing"),
        ("stack", ["--output", "a.txt"], "ending in .parquet or .jsonl"),
        ("stack", ["--text-column", "body"], "text_column 'body'"),
        ("stack", ["--id-column", "body"], "id_column 'body'"),
        ("stack", ["--text", "nosuch.txt"], "'nosuch.txt': no such file"),
        ("stack", ["--max-new-tokens", "0"], "max_new_tokens=0"),
        ("stack", ["--samples", "2"], "samples=2: greedy answers"),
        ("stack", ["--max-tokens", "5"], "max_tokens=5: a batch holds no prompt"),
        ("stack", ["--before", "{pair}"], "--pair-column is missing: the prompt has {pair}"),
        ("stack", ["--before", "{texts}"], "prompt.before: {texts} is none of {text} and {pair}"),
        ("stack", ["--max-length", "3"], "--max-length 3: must be at least 4"),
        ("stack", ["--labels", "a"], "labels=['a']: expected at least two different names"),
        ("stack", ["--labels", "a", "b", "a"], "labels=['a', 'b', 'a']"),
        ("stack", ["--labels", "a", "b"], "--max-new-tokens: does not go with --labels"),
        ("two-way", [], "has a bidirectional LLM"),
        ("alone", [], "has no LLM"),
        ("encoder", [], "config.json is of a 'm2m_100' model, not of an MTLLM"),
    ],
)
def test_bad_commands(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folders: dict[str, str],
    tmp_path: Path,
    model: str,
    options: list[str],
    match: str,
) -> None:
    """One line that names the argument, before a model is loaded or anything written."""
    monkeypatch.setattr(MTLLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as caught:
        run(folders, tmp_path, "--output", str(tmp_path / "a.jsonl"), *options, model=model)
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip()
    assert match in message and message.count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_killed_with_signal_9(
    forked: Forked, capsys: pytest.CaptureFixture[str], llm_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_text("\n".join(row.text for row in ROWS * 3) + "\n")

    def command(output: Path) -> list[str]:
        files = ["--text", str(tmp_path / "in.txt"), "--output", str(output)]
        size = ["--window", "10", "--max-new-tokens", "12", "--temperature", "1.2", "--device", "cpu"]
        return ["respond", "--llm", llm_folder, *files, *size]

    killed_and_resumed(forked, command, tmp_path / "whole.parquet", tmp_path / "a.parquet")
    out = capsys.readouterr().out
    assert out.count("respond: 120 texts") == 2 and out.count("by an earlier run") == 1


def test_two_processes_begin_anew(
    forked: Forked, capsys: pytest.CaptureFixture[str], llm_folder: str, tmp_path: Path
) -> None:
    """With --overwrite neither what is there nor a stopped run's windows come into the output."""
    (tmp_path / "in.txt").write_text("\n".join(row.text for row in ROWS) + "\n")
    files = ["--text", str(tmp_path / "in.txt"), "--output", str(tmp_path / "a.jsonl"), "--device", "cpu"]
    command = ["respond", "--llm", llm_folder, *files, "--window", "4", "--max-new-tokens", "3", "--no-progress"]
    cli.main(command)
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_text("what was there\n")
    (tmp_path / "a.jsonl.part").mkdir()
    (tmp_path / "a.jsonl.part" / "run.json").write_text('{"model": "another"}')
    said = forked.group(*command, "--overwrite")
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    assert sum("respond: 40 texts" in one for one in said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.run.json", "in.txt"]
