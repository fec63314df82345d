"""The trainer against a loop written by hand: weights of the terms, schedule, optimizer, means in the log; who teaches.

Each test was seen to fail with the fault that it is there for: `parts.append(scaled)`, no warm-up, the tie-break's sign,
the log's mean over packs or over all steps, dropout in the teacher, the bare LLM in the task teacher's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.data import PackedDataset
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import HeadConfig, LoraSettings
from mtllm_fast.training import AdaptConfig, adapt
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.task_teacher import TEACHER, add_teacher
from mtllm_fast.training.trainer import PackedTrainer
from tests.conftest import relative_error
from tests.models.weights import stir
from tests.tiny import LINES
from tests.training.short_runs import logged, optim

ROWS = [TextRow(f"{line} {i}") for i, line in enumerate(LINES * 12)]
WEIGHTS = {"pooled_mse": 1.0, "paired_mse": 0.25, "kl": 4.0}
STEPS, PACKS, WARMUP, LR, DECAY, CLIP = 5, 2, 2, 3e-3, 0.1, 0.5


def _student(encoder: str, llm: str) -> MTLLM:
    torch.manual_seed(0)
    return stir(MTLLM.stack(encoder, llm, lora=LoraSettings(dropout=0.0), dtype=torch.float32))


def _dataset(student: MTLLM) -> PackedDataset:
    assert student.tokenizer is not None
    student.tokenizer.max_mt_tokens = student.tokenizer.max_llm_tokens = 48
    return PackedDataset(ROWS, student.tokenizer, max_tokens=96, seed=42)


@dataclass
class Hand:
    losses: list[float]
    terms: list[dict[str, float]]
    weights: dict[str, Tensor]


def _by_hand(encoder: str, llm: str, *, weighted: bool = True, warmup: int = WARMUP) -> Hand:
    """STEPS steps of PACKS packs: sums over counts, AdamW written out, a rate that rises and falls linearly."""
    student = _student(encoder, llm)
    step = Stage(student, DistillationLoss(DistillationWeights(**WEIGHTS, temperature=2.0)))
    step.train()
    packs = iter(_dataset(student))
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(2))
    losses, means = [], []
    for index in range(STEPS):
        batches = [next(packs) for _ in range(PACKS)]
        found = [step(batch) for batch in batches]
        mean = {name: sum(t[name].sum for t in found) / sum(float(t[name].count) for t in found) for name in WEIGHTS}
        loss = sum((WEIGHTS[name] if weighted else 1.0) * value for name, value in mean.items())
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        losses.append(float(loss.detach()))
        means.append({name: float(value.detach()) for name, value in mean.items()})
        rate = LR * (index / warmup if index < warmup else (STEPS - index) / (STEPS - warmup))
        with torch.no_grad():
            for name, p in trained.items():
                g = gradients[name] * min(1.0, CLIP / float(norm + 1e-6))
                first[name].mul_(0.9).add_(g, alpha=0.1)
                second[name].mul_(0.999).addcmul_(g, g, value=0.001)
                if not name.endswith("bias"):
                    p.mul_(1 - rate * DECAY)
                corrected = first[name] / (1 - 0.9 ** (index + 1))
                p.sub_(rate * corrected / ((second[name] / (1 - 0.999 ** (index + 1))).sqrt() + 1e-8))
    return Hand(losses, means, {name: p.detach().clone() for name, p in trained.items()})


SETTINGS = {"max_steps": STEPS, "gradient_accumulation": PACKS, "warmup": WARMUP / STEPS, "lr": LR, "clip": CLIP}
_optim = partial(optim, **SETTINGS, weight_decay=DECAY, log_steps=3)


def _moved(actual: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest error of what training changed, relative to the change: the start is the same and would hide it."""
    return max(relative_error(actual[name] - start[name], expected[name] - start[name]) for name in expected)


def test_the_trainer_takes_the_steps_that_a_hand_written_loop_takes(encoder_folder, llm_folder, tmp_path) -> None:
    student = _student(encoder_folder, llm_folder)
    start = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
    step = Stage(student, DistillationLoss(DistillationWeights(**WEIGHTS, temperature=2.0)))
    trainer = PackedTrainer(step, _dataset(student), _optim(), tmp_path / "run", steps=STEPS)
    (tmp_path / "run").mkdir(exist_ok=True)
    metrics = trainer.run(resume=False)
    made = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
    hand = _by_hand(encoder_folder, llm_folder)
    assert _moved(made, hand.weights, start) < 1e-3
    for name, control in {"terms without weights": {"weighted": False}, "a longer warm-up": {"warmup": 3}}.items():
        assert _moved(made, _by_hand(encoder_folder, llm_folder, **control).weights, start) > 1e-2, name
    # the first log is of three steps, and of the terms before their weights
    step, entry = next(iter(logged(tmp_path / "run").items()))
    assert step == 3
    assert entry["loss"] == pytest.approx(sum(hand.losses[:3]) / 3, rel=1e-5)
    for name in WEIGHTS:
        assert entry[name] == pytest.approx(sum(means[name] for means in hand.terms[:3]) / 3, rel=1e-5), name
    assert metrics["train_loss"] == pytest.approx(sum(hand.losses) / STEPS, rel=1e-5)
    assert len({round(loss, 4) for loss in hand.losses}) == STEPS, "equal losses would have equal means"


def test_the_means_leave_out_a_skipped_step(encoder_folder, llm_folder, tmp_path, monkeypatch) -> None:
    """The second of three steps changes nothing: the log is the mean of the first and third, each logged alone."""
    plain = Stage.forward

    def run(name: str, log_steps: int) -> list[dict]:
        count = [0]

        def forward(self, batch):
            count[0] += 1
            terms = plain(self, batch)
            if count[0] in (3, 4):  # two packs a step
                for term in terms.values():
                    term.sum.register_hook(lambda gradient: gradient * float("nan"))
            return terms

        monkeypatch.setattr(Stage, "forward", forward)
        config = AdaptConfig(
            encoder=encoder_folder, llm=llm_folder, output=str(tmp_path / name), lora=LoraSettings(dropout=0.0),
            loss=DistillationWeights(pooled_mse=1.0, paired_mse=0.5), train=_optim(max_steps=3, log_steps=log_steps),
        )  # fmt: skip
        metrics = adapt(config, ROWS)
        assert metrics["skipped_steps"] == 1
        return [*logged(tmp_path / name).values(), metrics]

    first, _, third, _ = run("each", 1)
    assert first["pooled_mse"] != pytest.approx(third["pooled_mse"], rel=1e-3)
    entry, metrics = run("once", 3)
    for name in ("loss", "pooled_mse", "paired_mse"):
        assert entry[name] == pytest.approx((first[name] + third[name]) / 2, rel=1e-6), name
    assert metrics["train_loss"] == pytest.approx((first["loss"] + third["loss"]) / 2, rel=1e-6)


def test_the_step_compares_the_students_own_states_with_the_teachers(encoder_folder, llm_folder) -> None:
    """Stage 1's pooled MSE from means of rows that are cut out by hand."""
    student = _student(encoder_folder, llm_folder)
    step = Stage(student, DistillationLoss(DistillationWeights(pooled_mse=1.0)))
    batch = next(iter(_dataset(student)))
    terms = step(batch)
    with torch.no_grad():
        sides = ((student.states(batch.mt), batch.mt), (student.teacher_states(batch.llm), batch.llm))
        mine, right = (torch.stack([part.mean(0) for part in states.split(packed.lengths)]) for states, packed in sides)
        expected = (mine - right).square().mean(-1).sum()
        longer = (1.01 * mine - right).square().mean(-1).sum()
    assert float(terms["pooled_mse"].sum) == pytest.approx(float(expected), rel=1e-5)
    assert float(longer) != pytest.approx(float(expected), rel=1e-4), "the control"


# ---- who teaches in stage 3
@pytest.fixture(scope="module")
def teacher(tmp_path_factory, llm_folder) -> str:
    """A task teacher whose adapter matters, with much dropout."""
    folder = tmp_path_factory.mktemp("teacher")
    head = HeadConfig("classification", ("good", "bad"))
    lora = LoraSettings(dropout=0.5, alpha=40.0)  # another scale than the student's
    torch.manual_seed(2)
    model = MTLLM.stack(None, llm_folder, reader="llm", lora=lora, head=head, dtype=torch.float32)
    stir(model).save_pretrained(folder)
    return str(folder)


def test_the_task_teacher_teaches_without_its_dropout(encoder_folder, llm_folder, teacher) -> None:
    student = _student(encoder_folder, llm_folder)
    add_teacher(student, teacher)
    step = Stage(student, DistillationLoss(), adapter=TEACHER)
    step.train()
    batch = next(iter(_dataset(student)))
    assert batch.llm is not None
    _, taught = step.taught(batch)
    alone = MTLLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        expected = alone.states(batch.llm)
        bare = student.teacher_states(batch.llm)
        alone.train()
        dropped = alone.states(batch.llm)
    assert relative_error(taught, expected) < 1e-5
    assert relative_error(bare, expected) > 1e-2, "the bare LLM is another teacher"
    assert relative_error(dropped, expected) > 1e-2, "and so is one in train mode"
    assert student.training, "the student trains on"


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 1.0), (0.5, 0.4), (0.5, 0.8)], 1),  # the lower loss among equals
        ([(0.5, 0.4), (0.5, 1.0), (0.5, 0.8)], 0),
        ([(0.5, 0.1), (0.51, 9.0), (0.5, 0.2)], 1),  # and nothing but equals: one row of 100 counts more than any loss
        ([(0.5, 0.1), (0.5, 0.1), (0.49, 0.0)], 0),
    ],
)
def test_the_loss_settles_ties_alone(scores, best, encoder_folder, llm_folder, tmp_path) -> None:
    """Without training: what `evaluate` gives for each of three validations."""
    left = iter(scores)

    def validate() -> dict[str, float]:
        accuracy, loss = next(left)
        return {"accuracy": accuracy, "loss": loss}

    student = _student(encoder_folder, llm_folder)
    step = Stage(student, DistillationLoss(), validate=validate)
    optim = _optim(max_steps=3)
    trainer = PackedTrainer(step, _dataset(student), optim, Path(tmp_path), steps=3, validate_steps=1)
    found = [trainer.evaluate()["eval_selection"] for _ in scores]
    assert found.index(max(found)) == best
