"""Stage 3 with the rows' own labels: `task` and `rank_weights` by hand, by name, from a cache, refused, resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mtllm_fast import MTLLM, TextRow, cli
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.losses.head_kl import label_ranks
from mtllm_fast.models import LoraSettings
from mtllm_fast.models.heads import HeadConfig
from mtllm_fast.training import DistillConfig, distill
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.task_teacher import TaughtLabels
from tests.models.weights import stir
from tests.tiny import LINES
from tests.training.short_runs import logged, nothing_loaded, optim, same_weights, stopped_in, weights

NAMES = ("neg", "neutral", "pos")  # of the teacher
ASKED = ["pos", "neg", "neutral"]  # of the task: an order that is not its own inverse
ROWS = [TextRow(f"{line} {i}", label=int("001020010002"[i]), id=str(i)) for i, line in enumerate(LINES * 2)]
UNLABELLED = replace(ROWS[5], label=None)
ALL = DistillationWeights(0.5, head_kl=1.0, temperature=2.0, contrast=0.25, task=2.0, rank_weights=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, encoder_folder, llm_folder) -> Path:
    """Adapted stacks, one with dropout, and task teachers, with adapters that matter."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    models = {}
    for name, dropout in (("adapted", 0.0), ("dropout", 0.1)):
        models[name] = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(dropout=dropout))
    for name, head in (("teacher", HeadConfig(labels=NAMES)), ("choice", HeadConfig("choice"))):
        models[name] = MTLLM.stack(None, llm_folder, reader="llm", head=head, lora=LoraSettings())
    for name, model in models.items():
        stir(model, 0.1, "lora_B", "head.linear").save_pretrained(root / name)
    return root


_optim = partial(optim, tokens=1024, max_steps=4, lr=5e-3, warmup=0.0)


def _config(folders: Path, output: Path, model: str = "adapted", teacher: str = "teacher", **changes) -> DistillConfig:
    settings = {"loss": ALL, "train": _optim()}
    return DistillConfig(str(folders / model), str(folders / teacher), str(output), **{**settings, **changes})


def _pooled(states: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([part.double().mean(0) for part in states.split(lengths)])


def _first_step(folders: Path, rows: list[TextRow], gold: list[int]) -> dict[str, float]:
    """The terms of the first step, which holds all rows: models apart, in float64, classes in the teacher's order."""
    student = MTLLM.from_pretrained(folders / "adapted", dtype=torch.float32).eval()
    teacher = MTLLM.from_pretrained(folders / "teacher", dtype=torch.float32).eval()
    head, labels = teacher.head.linear.weight.detach().double(), torch.tensor(gold)
    mt = collate(rows, student.tokenizer, sides=("mt",)).mt
    llm = collate(rows, teacher.tokenizer, sides=("llm",)).llm
    with torch.no_grad():
        own, taught = _pooled(student.states(mt), mt.lengths), _pooled(teacher.states(llm), llm.lengths)
    q, p = ((x @ head.T / 2).softmax(-1) for x in (own, taught))
    ranks = label_ranks(taught @ head.T, labels)
    assert len(ranks.unique()) == 3, "all kinds of rows are there"
    kl = 4 * (p * (p / q).log()).sum(-1)
    return {
        "task": float(F.cross_entropy(own @ head.T, labels)),
        "head_kl": float((kl / ranks).mean()),
        "unweighted": float(kl.mean()),
        "pooled_mse": float((own - taught).square().mean()),
    }


def test_terms_by_hand_and_labels_by_name(folders, tmp_path) -> None:
    """The first step: names in another order, none, and from a cache."""
    gold = [NAMES.index(ASKED[row.label]) for row in ROWS]
    by_hand, unmapped = _first_step(folders, ROWS, gold), _first_step(folders, ROWS, [row.label for row in ROWS])
    for term in ("task", "head_kl"):
        assert by_hand[term] != pytest.approx(unmapped[term], rel=1e-2), "the control: by number"
    assert by_hand["unweighted"] > 1.1 * by_hand["head_kl"], "the control: without weights"
    for name, labels, expected, cache in (
        ("mapped", ASKED, by_hand, ""),
        ("plain", None, unmapped, ""),
        ("cached", ASKED, by_hand, str(tmp_path / "cache")),
    ):
        config = _config(folders, tmp_path / name, teacher_cache=cache, train=_optim(max_steps=1))
        distill(config, ROWS, labels=labels)
        log = logged(tmp_path / name)[1]
        for term in ("task", "head_kl", "pooled_mse"):
            assert log[term] == pytest.approx(expected[term], rel=1e-4), (name, term)
        total = 0.5 * log["pooled_mse"] + log["head_kl"] + 0.25 * log["contrast"] + 2 * log["task"]
        assert log["loss"] == pytest.approx(total, rel=1e-5)
    mapped, cached = (weights(tmp_path / name) for name in ("mapped", "cached"))
    for name, value in mapped.items():
        assert torch.allclose(cached[name], value, rtol=1e-3, atol=1e-4), name


def test_labels_alone(folders, tmp_path) -> None:
    """No teacher runs, its head is frozen, and the student learns the labels."""
    sides, plain = set(), Stage.forward

    def forward(self, batch):
        sides.add((batch.mt is not None, batch.llm is not None))
        return plain(self, batch)

    loss = DistillationWeights(0.0, task=1.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stage, "forward", forward)
        distill(_config(folders, tmp_path / "run", loss=loss, train=_optim(max_steps=20)), ROWS, labels=ASKED)
    log = logged(tmp_path / "run")
    assert sides == {(True, False)} and log[20]["task"] < 0.5 * log[1]["task"]
    mine, theirs = (weights(folder) for folder in (tmp_path / "run", folders / "teacher"))
    assert torch.equal(mine["head.linear.weight"], theirs["head.linear.weight"])
    assert not any(".teacher." in name for name in mine)


def test_choices(folders, tmp_path) -> None:
    """The label is the number of a choice; score by score in float64."""
    rows = [TextRow(line, choices=("yes", "or no", "a river"), label=(2 * i) % 3) for i, line in enumerate(LINES)]
    config = _config(folders, tmp_path / "run", teacher="choice", train=_optim(max_steps=1))
    distill(config, rows, labels=["1", "2", "3"])
    student = MTLLM.from_pretrained(folders / "adapted", dtype=torch.float32).eval()
    teacher = MTLLM.from_pretrained(folders / "choice", dtype=torch.float32).eval()
    batch = collate(rows, student.tokenizer, align=False)
    scores = []
    with torch.no_grad():
        for states, spans in ((student.states(batch.mt), batch.mt_spans), (teacher.states(batch.llm), batch.llm_spans)):
            means = [[states[a:b].double().mean(0) for a, b in row] for row in spans.tolist()]
            scores.append(torch.stack([torch.stack(row) for row in means]) @ teacher.head.linear.weight.double()[0])
    ranks = label_ranks(scores[1], batch.labels)
    assert len(ranks.unique()) > 1
    q, p = ((x / 2).softmax(-1) for x in scores)
    log = logged(tmp_path / "run")[1]
    assert log["task"] == pytest.approx(float(F.cross_entropy(scores[0], batch.labels)), rel=1e-4)
    weighted = float((4 * (p * (p / q).log()).sum(-1) / ranks).mean())
    assert log["head_kl"] == pytest.approx(weighted, rel=1e-4)
    wrong = [*rows[:-1], replace(rows[-1], label=3, id="last")]
    with pytest.raises(ValueError, match=r"loss\.task=2\.0: row 'last' has 3 choices and the label 3"):
        distill(_config(folders, tmp_path / "no", teacher="choice"), wrong)


def test_a_run_goes_on(folders, tmp_path) -> None:
    """Stopped in its second step, with dropout, a validation and a cache, it ends with the same weights."""
    train = _optim(tokens=160, max_steps=6)
    settings = {"model": "dropout", "train": train, "teacher_cache": str(tmp_path / "cache")}

    def run(name: str, **changes) -> dict:
        return distill(_config(folders, tmp_path / name, **{**settings, **changes}), ROWS, ROWS[:6], labels=ASKED)

    run("whole")
    with stopped_in(2):
        run("cut")
    assert max(logged(tmp_path / "cut")) == 2
    run("cut", resume=True)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    run("other", loss=replace(ALL, rank_weights=False))
    assert not same_weights(tmp_path / "other", tmp_path / "whole"), "the control"
    with pytest.raises(ValueError, match=r"--resume: loss\.rank_weights=False"):
        run("whole", resume=True, loss=replace(ALL, rank_weights=False))


# ---- what is refused
@pytest.mark.parametrize(
    ("loss", "rows", "labels", "named"),
    [
        (ALL, [*ROWS[:5], UNLABELLED], ASKED, r"loss\.task=2\.0: needs the labels of all rows, but row '5'"),
        (ALL, [TextRow("a river")], None, r"loss\.task=2\.0: needs the labels of all rows, but row 'a river' has none"),
        (replace(ALL, task=0.0), [TextRow("a river")], None, r"loss\.rank_weights=True: needs the labels of all rows"),
        (ALL, [replace(ROWS[0], label=6)], None, "has 3 labels, but a row has the label 6"),
        (ALL, ROWS, ["good", "bad", "so so"], "has the labels neg, neutral, pos, but the task has good, bad, so so"),
    ],
)
def test_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch, loss, rows, labels, named) -> None:
    nothing_loaded(monkeypatch)
    with pytest.raises(ValueError, match=named) as caught:
        distill(_config(folders, tmp_path / "run", loss=loss), rows, labels=labels)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    with pytest.raises(AssertionError, match="a model was loaded"):  # the control: other losses read no labels
        distill(_config(folders, tmp_path / "run", loss=DistillationWeights()), [TextRow("a river")], labels=ASKED)


class Stream:
    """Rows that are known only once they are read."""

    def __init__(self, rows: list[TextRow]) -> None:
        self.rows, self.read = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row


def test_labels_of_a_stream_are_checked_as_it_is_read(folders, tmp_path) -> None:
    head = HeadConfig(labels=NAMES)
    stream = Stream(ROWS)
    mapped = TaughtLabels(stream, head, ASKED, "teacher", "loss.task=1.0")
    assert stream.read == 1, "one row says whether there are labels"
    assert [NAMES[row.label] for row in mapped] == [ASKED[row.label] for row in ROWS]
    assert [row.id for row in mapped] == [row.id for row in ROWS], "as often as needed"
    assert len(TaughtLabels(ROWS, head, ASKED, "teacher", "x")) == len(ROWS)
    with pytest.raises(TypeError):
        len(mapped)
    unlabelled = Stream([*ROWS[:5], UNLABELLED])
    with pytest.raises(ValueError, match=r"loss\.task=2\.0: needs the labels of all rows, but row '5' has none"):
        distill(_config(folders, tmp_path / "run"), unlabelled, labels=ASKED)
    assert not (tmp_path / "run").exists()


def test_the_command(folders, tmp_path, capsys) -> None:
    lines = "".join(f"{row.text}\t{ASKED[row.label]}\n" for row in ROWS)
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + lines)
    command = ["distill", "--model", str(folders / "adapted"), "--teacher", str(folders / "teacher"), "--device", "cpu"]
    command += ["--text", str(tmp_path / "rows.tsv"), "--labels", *ASKED, "--output", str(tmp_path / "run")]
    command += ["--max-steps", "1", "--log-steps", "1", "--tokens", "1024", "--max-length", "48"]
    command += ["--no-progress", "--report-to", "none", "--loss.head-kl", "1", "--loss.temperature", "2"]
    cli.main([*command, "--loss.task", "2", "--loss.rank-weights"])
    gold = [NAMES.index(ASKED[row.label]) for row in ROWS]
    by_hand, log = _first_step(folders, ROWS, gold), logged(tmp_path / "run")[1]
    for term in ("task", "head_kl"):
        assert log[term] == pytest.approx(by_hand[term], rel=1e-4)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["loss"]["task"], record["loss"]["rank_weights"]) == (2.0, True)
