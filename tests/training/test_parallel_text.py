"""Stage 1 on a parallel corpus with `contrast`: the teacher reads its own text, from a cache too, and a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mtllm_fast import MTLLM, TextRow, cli, read_rows
from mtllm_fast.data import PackedDataset
from mtllm_fast.data.batch import Batch
from mtllm_fast.data.collate import collate
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.failures import RunFailed
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.training import AdaptConfig, adapt
from mtllm_fast.training.inputs import has_teacher_text, rows_digest
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.teacher_cache import KeyedRows, TeacherCache, open_or_build, text_key
from tests.tiny import LINES
from tests.training.short_runs import in_pack, logged, nothing_loaded, optim, same_weights, stopped_in, weights

# "translations": the words in another order. The encoder knows no digits, so it reads a line that comes again as equal.
ROWS = [
    TextRow(" ".join(reversed(f"{line} {i}".split())), "fra_Latn", teacher_text=f"{line} {i}")
    for i, line in enumerate(LINES * 16)
]
STEPS = 4
WEIGHTS = DistillationWeights(pooled_mse=0.5, contrast=1.0, contrast_temperature=0.2)


_optim = partial(optim, max_steps=STEPS, gradient_accumulation=2, tokens=160, lr=5e-3)


def _config(encoder: str, llm: str, output: Path, **changes) -> AdaptConfig:
    settings = {"lora": LoraSettings(dropout=0.1), "loss": WEIGHTS, "train": _optim()}
    return AdaptConfig(encoder, llm, str(output), **{**settings, **changes})


# ---- digests
def test_rows_without_a_teacher_text_keep_their_digests() -> None:
    """What runs and caches have recorded before there was one."""
    rows = [TextRow("The river.", "eng_Latn", "A mill.", 1, "a"), TextRow("Été", choices=("x", "y"))]
    known = "2 rows 11847a5977afdb095ee9c985b43dc1753aba4831952e5e8a2445c361b3adc274"
    assert rows_digest(rows) == known
    keys = ["b9ad04a1975b0a2e98a33e6792e7a86f", "7654c9b6c0f34b3d64238d8a86d1daa1"]
    assert [text_key(row).hex() for row in rows] == keys
    plain = TextRow("Été", "fra_Latn")
    others = [plain, replace(plain, teacher_text="Summer"), replace(plain, teacher_text="Winter")]
    others += [replace(plain, teacher_text=""), replace(plain, target="Summer")]
    pair = replace(plain, text_pair="Hiver", teacher_text="Summer")
    others += [replace(pair, teacher_pair="Winter"), replace(pair, teacher_pair="Cold")]
    others += [replace(plain, soft_label=(-0.5, -1.0)), replace(plain, soft_label=(-1.0, -0.5))]
    assert len({rows_digest([row]) for row in others}) == len(others)


def test_a_key_is_of_what_the_teacher_reads() -> None:
    """A parallel corpus shares the states of its English with any other run on it."""
    row = TextRow("Été", "fra_Latn", teacher_text="Summer")
    assert text_key(row) == text_key(TextRow("Summer")) == text_key(replace(row, text="L'été"))
    assert text_key(row) != text_key(TextRow("Été"))
    assert (has_teacher_text([TextRow("a"), row]), has_teacher_text([TextRow("a")])) == (True, False)


# ---- training
def _loss_by_hand(student: MTLLM, batches: list[Batch]) -> dict[str, float]:
    """Both terms over the texts of a step, text by text; the teacher reads what `ROWS` say by the order of names.

    "all": the contrast with equal texts among the negatives.
    """
    squares, contrasts, with_all = [], [], []
    tokenizer = student.tokenizer
    with torch.no_grad():
        for batch in batches:
            rows = [ROWS[int(name)] for name in batch.ids]
            english = tokenizer.llm_side([TextRow(row.teacher_text) for row in rows])
            theirs = PackedBatch.from_sequences(english.ids)
            own, taught = (
                torch.stack([part.double().mean(0) for part in states.split(packed.lengths)])
                for states, packed in ((student.states(batch.mt), batch.mt), (student.teacher_states(theirs), theirs))
            )
            squares += (own - taught).square().mean(-1).tolist()
            read = [ids.tolist() for ids in batch.mt.input_ids.split(batch.mt.lengths)]
            for index, state in enumerate(own):
                scores = torch.stack([torch.cosine_similarity(state, other, dim=0) for other in taught]) / 0.2
                others = [c for c in range(len(own)) if c == index or read[c] != read[index]]
                contrasts.append(float(scores[others].logsumexp(0) - scores[index]))
                with_all.append(float(scores.logsumexp(0) - scores[index]))
    found = {"pooled_mse": squares, "contrast": contrasts, "all": with_all}
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_a_run_on_a_parallel_corpus(encoder_folder, llm_folder, tmp_path) -> None:
    """Logged terms are those by hand; stopped and resumed it ends with the same weights."""
    rows = [replace(row, id=str(i)) for i, row in enumerate(ROWS)]
    train = _optim(save_steps=1, keep=STEPS + 1)
    config = _config(encoder_folder, llm_folder, tmp_path / "run", lora=LoraSettings(dropout=0.0), train=train)
    adapt(config, rows)
    log = logged(tmp_path / "run")
    student = MTLLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    student.tokenizer.max_mt_tokens = student.tokenizer.max_llm_tokens = 48
    packs = iter(PackedDataset(rows, student.tokenizer, max_tokens=160, seed=config.train.seed, align=False))
    for step in range(1, STEPS + 1):
        batches = [next(packs) for _ in range(2)]
        if step == 1:
            continue
        student.load_state_dict(weights(tmp_path / f"run/checkpoint-{step - 1}"), strict=False)
        by_hand = _loss_by_hand(student, batches)
        for name in ("pooled_mse", "contrast"):
            assert log[step][name] == pytest.approx(by_hand[name], rel=1e-4), (step, name)
        assert by_hand["all"] != pytest.approx(by_hand["contrast"], rel=1e-2), "the control"

    adapt(_config(encoder_folder, llm_folder, tmp_path / "whole"), ROWS)  # with dropout
    with stopped_in(4):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "cut"), ROWS)
    assert max(logged(tmp_path / "cut")) == 2
    adapt(_config(encoder_folder, llm_folder, tmp_path / "cut", resume=True), ROWS)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert not same_weights(tmp_path / "whole", tmp_path / "run"), "the control"
    again = {"resume": True, "train": _optim(max_steps=STEPS + 1)}
    changed = [*ROWS[:-1], replace(ROWS[-1], teacher_text="another")]
    with pytest.raises(ValueError, match="--resume: rows has changed"):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "whole", **again), changed)
    loss = replace(WEIGHTS, contrast_temperature=0.3)
    with pytest.raises(ValueError, match=r"--resume: loss\.contrast_temperature=0\.3"):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "whole", loss=loss, resume=True), ROWS)


def test_a_pack_is_not_split_where_its_texts_are_compared(encoder_folder, llm_folder, tmp_path) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    said = r"contrast compares the texts of a pack .*so it cannot be split; go on with"
    with pytest.raises(RunFailed, match=said), in_pack(3, fail):
        adapt(_config(encoder_folder, llm_folder, tmp_path / "run"), ROWS)
    other = _config(encoder_folder, llm_folder, tmp_path / "other", loss=DistillationWeights())
    with in_pack(3, fail):
        assert adapt(other, ROWS)["train_loss"] > 0, "the control: of other terms it is"


# ---- the cache
@pytest.fixture
def cached(encoder_folder, llm_folder, tmp_path) -> Callable[[list[TextRow]], tuple[MTLLM, TeacherCache]]:
    def make(rows: list[TextRow]) -> tuple[MTLLM, TeacherCache]:
        torch.manual_seed(3)
        student = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(dropout=0.0), dtype=torch.float32)
        cache, _ = open_or_build(tmp_path / "cache", rows, student, max_tokens=96, max_length=48, bf16=False)
        return student, cache

    return make


def test_cached_contrast_is_that_of_the_teacher_on_the_fly(cached, matches) -> None:
    """Its own text, and two translations of one: no negatives of each other either way."""
    twice = replace(ROWS[0], text="another translation of the first")
    rows = [*ROWS[:5], twice, ROWS[2], TextRow("The mill", "eng_Latn"), TextRow("Le moulin", teacher_text="The mill")]
    student, cache = cached(rows)
    found, batches = [], {}
    for name in ("fly", "cache"):
        stage = Stage(student, DistillationLoss(WEIGHTS), teacher=cache if name == "cache" else None)
        batch = batches[name] = collate(list(KeyedRows(rows)), student.tokenizer, sides=stage.sides, align=False)
        terms = stage(batch)
        student.zero_grad()
        stage.step(batch).backward()
        found.append(
            (torch.stack([term.sum for term in terms.values()]), student.projection.layers.weight.grad.clone())
        )
    for mine, theirs in zip(found[1], found[0], strict=True):
        matches(mine, theirs, 1e-4)
    taught, states = cache.teach(batches["cache"])
    same = taught.llm.digests[:, None] == taught.llm.digests
    assert same.triu(1).nonzero().tolist() == [[0, 5], [2, 6], [7, 8]]
    # the control: the texts of the student alone
    apart = replace(taught, llm=PackedBatch.from_sequences([[i] for i in range(9)]))
    blind = DistillationLoss(WEIGHTS)(student.states(apart.mt), states, apart)
    assert abs(float(blind["contrast"].sum.detach() / found[0][0][1].detach()) - 1) > 1e-2


def test_adapt_from_a_cache_is_the_run_without_it(encoder_folder, llm_folder, tmp_path) -> None:
    # all texts in one pack: with a cache the teacher's side takes no room in it, and another pack is another contrast
    few, train = ROWS[:12], _optim(tokens=1024, gradient_accumulation=1, max_steps=8)
    settings = {"train": train, "lora": LoraSettings(dropout=0.0)}
    for name, cache in (("plain", ""), ("cached", str(tmp_path / "cache"))):
        adapt(_config(encoder_folder, llm_folder, tmp_path / name, teacher_cache=cache, **settings), few)
    plain, found = (weights(tmp_path / name) for name in ("plain", "cached"))
    for name, value in plain.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), name
    log = logged(tmp_path / "plain")
    assert log[8]["contrast"] < 0.9 * log[1]["contrast"]
    own = [replace(row, teacher_text=None) for row in few]
    adapt(_config(encoder_folder, llm_folder, tmp_path / "own", **settings), own)
    other = weights(tmp_path / "own")["projection.layers.weight"]
    assert not torch.allclose(other, plain["projection.layers.weight"], rtol=1e-3), "the control: another teacher"


# ---- what is refused, and the command
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss": DistillationWeights(kl=1.0)}, "teacher_text: paired_mse and kl compare tokens"),
        ({"loss": DistillationWeights(paired_mse=1.0)}, "teacher_text: paired_mse and kl compare tokens"),
        ({"init": "ridge"}, "init='ridge': the projection is fitted on one text"),
    ],
)
def test_refused_before_anything_is_loaded(changes, named, tmp_path, monkeypatch) -> None:
    nothing_loaded(monkeypatch)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"fr": "été", "en": "summer"}) + "\n")
    stream = read_rows(path, text_column="fr", teacher_text_column="en", language="fra_Latn")
    for rows in (ROWS, stream):
        with pytest.raises(ValueError, match=named) as caught:
            adapt(_config("encoder", "llm", tmp_path / "run", **changes), rows)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    with pytest.raises(Exception, match="encoder"):  # the control: without a teacher's text it goes on to load
        adapt(_config("encoder", "llm", tmp_path / "run", **changes), [replace(row, teacher_text=None) for row in ROWS])


def test_rows_that_must_be_read_to_know_are_refused_when_they_are(encoder_folder, llm_folder, tmp_path) -> None:
    class Rows:
        def __iter__(self):
            return iter(ROWS)

    config = _config(encoder_folder, llm_folder, tmp_path / "run", loss=DistillationWeights(paired_mse=1.0))
    with pytest.raises(ValueError, match="align=True: rows with a teacher_text"):
        adapt(config, Rows())
    assert not (tmp_path / "run").exists()


def test_the_command(encoder_folder, llm_folder, tmp_path, capsys) -> None:
    lines = [json.dumps({"fr": row.text, "en": row.teacher_text, "de": row.text + " x"}) + "\n" for row in ROWS]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    (tmp_path / "same.txt").write_text("".join(f"{row.text}\n" for row in ROWS))
    common = ["--encoder", encoder_folder, "--llm", llm_folder, "--max-length", "48"]
    base = ["adapt", *common, "--no-progress", "--report-to", "none", "--device", "cpu", "--tokens", "160"]
    base += ["--max-steps", "2", "--log-steps", "1", "--loss.contrast", "1", "--loss.pooled-mse", "0"]
    base += ["--output", str(tmp_path / "run")]
    text = ["--text", str(tmp_path / "pairs.jsonl"), "--text-column", "fr"]

    def run(*more: str) -> str:
        with suppress(SystemExit):
            cli.main([*base, *text, *more])
        return capsys.readouterr().err

    assert "language is missing: beside a teacher_text_column" in run("--teacher-text-column", "en")
    assert "'es'" in run("--teacher-text-column", "es", "--language", "fra_Latn")
    assert not (tmp_path / "run").exists()
    run("--teacher-text-column", "en", "--language", "fra_Latn")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["source"]["teacher_text_column"], record["source"]["language"]) == ("en", "fra_Latn")
    assert (record["loss"]["contrast"], record["loss"]["contrast_temperature"]) == (1.0, 0.1)
    said = run("--teacher-text-column", "de", "--language", "fra_Latn", "--resume", "--max-steps", "3")
    assert "--resume: source.teacher_text_column='de'" in said
    run("--teacher-text-column", "en", "--language", "fra_Latn", "--resume", "--max-steps", "3")
    assert sorted(logged(tmp_path / "run")) == [1, 2, 3]
    cli.main(["tokenize", *common, "--text", str(tmp_path / "same.txt"), "--output", str(tmp_path / "tokens")])
    capsys.readouterr()
    text = ["--text", str(tmp_path / "tokens")]
    assert "--teacher-text-column: is for text" in run("--teacher-text-column", "en", "--output", str(tmp_path / "no"))
