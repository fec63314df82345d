"""A loss term from outside, as one would be added: a class and its line in `TERMS`; here with targets and row weights.

Every row's pooled state is to name the target tokens of the row through the LM head; rows weigh what they are given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.data.batch import Batch
from mtllm_fast.data.collate import collate
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.data.split import halves
from mtllm_fast.losses import TERMS, LossTerm, Objective
from mtllm_fast.losses.term import Given, Term, required
from mtllm_fast.models import LoraSettings
from mtllm_fast.training.stage import Stage
from tests.conftest import assert_matches
from tests.tiny import LINES

TARGETS = [[5, 9, 11], [7], [3, 3], [20, 4, 6, 8], [12], [2, 30]]
ROW_WEIGHT = [1.0, 0.5, 0.0, 2.0, 1.0, 0.25]


@dataclass(frozen=True)
class BagOfTargets(Term):
    """`-sum_b w_b sum_k log softmax(head(pooled_b) / tau)[target_bk]`, over weighted target tokens."""

    temperature: float = 1.0

    name = "bag"
    needs = frozenset({"lm_head", "targets"})
    lm_head_products = 2

    def weights(self, batch: Batch) -> torch.Tensor:
        targets = required(batch.targets)
        return required(batch.row_weight)[targets.sequence_ids]

    def count(self, batch: Batch) -> float:
        return float(self.weights(batch).sum())

    def forward(self, given: Given) -> LossTerm:
        head, targets, weights = required(given.lm_head), required(given.batch.targets), self.weights(given.batch)
        logits = F.linear(given.student.pooled(), head.weight.detach())[targets.sequence_ids]
        losses = F.cross_entropy(logits / self.temperature, targets.input_ids, reduction="none")
        return LossTerm((losses * weights).sum(), weights.sum())


@pytest.fixture
def stage(monkeypatch, encoder_folder, llm_folder) -> Stage:
    monkeypatch.setitem(TERMS, "bag", BagOfTargets)
    torch.manual_seed(0)
    student = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(dropout=0.0), dtype=torch.float32)
    return Stage(student, Objective({"pooled_mse": 1.0, "bag": 0.5, "kl": 0.0}, temperature=2.0))


def _batch(student: MTLLM) -> Batch:
    batch = collate([TextRow(line) for line in LINES], student.tokenizer, align=False)
    return replace(batch, targets=PackedBatch.from_sequences(TARGETS), row_weight=torch.tensor(ROW_WEIGHT))


def _by_hand(student: MTLLM, batch: Batch) -> dict[str, torch.Tensor]:
    """The means of both terms, row by row in float64."""
    own, taught = (
        [part.double().mean(0) for part in states.split(packed.lengths)]
        for states, packed in ((student.states(batch.mt), batch.mt), (student.teacher_states(batch.llm), batch.llm))
    )
    pooled = torch.stack([(s - t).square().mean() for s, t in zip(own, taught)]).mean()
    head, bag, count = student.llm.lm_head.weight.double(), 0.0, 0.0
    for state, targets, weight in zip(own, TARGETS, ROW_WEIGHT):
        log_p = (head.detach() @ state / 2.0).log_softmax(-1)
        bag, count = bag - weight * sum(log_p[token] for token in targets), count + weight * len(targets)
    return {"pooled_mse": pooled, "bag": bag / count}


def test_a_term_from_outside_trains_beside_one_of_the_librarys(stage) -> None:
    batch = _batch(stage.student)
    assert (stage.sides, stage.align, set(stage.weights)) == (("mt", "llm"), False, {"pooled_mse", "bag"})
    trained = [p for p in stage.student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss, hand = stage.step(batch), _by_hand(stage.student, batch)
        expected = hand["pooled_mse"] + 0.5 * hand["bag"]
        assert_matches(loss, expected.float(), 1e-5)
        mine, right = (torch.autograd.grad(x, trained[-1], retain_graph=True)[0] for x in (loss, expected))
        assert_matches(mine, right, 1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_the_parts_of_a_pack_add_up(stage) -> None:
    """Sums and counts of two halves are those of the whole, targets and row weights included."""
    batch = _batch(stage.student)
    whole, parts = stage(batch), [stage(half) for half in halves(batch)]
    assert stage.counts(batch) == {name: pytest.approx(float(term.count)) for name, term in whole.items()}
    for name, term in whole.items():
        assert_matches(sum(part[name].sum for part in parts), term.sum, 1e-5)
        assert float(sum(part[name].count for part in parts)) == pytest.approx(float(term.count))
    other = stage(replace(batch, row_weight=torch.tensor(ROW_WEIGHT[::-1])))
    assert float(other["bag"].sum.detach()) < 0.9 * float(whole["bag"].sum.detach()), "the control"


def test_what_a_term_needs_is_asked_for(stage) -> None:
    batch = replace(_batch(stage.student), targets=None)
    with pytest.raises(ValueError, match="bag > 0 needs targets: the rows have none"):
        stage(batch)
    with pytest.raises(ValueError, match=r"term 'bags': expected one of pooled_mse, paired_mse, .*, bag"):
        Objective({"bags": 1.0})
