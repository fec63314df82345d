"""Soft labels: from a file through the batch to the loss, and what a head learns from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mtllm_fast import MTLLM
from mtllm_fast.data.batch import Batch
from mtllm_fast.data.collate import collate
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.data.read import TextRow, read_rows
from mtllm_fast.losses import LabelWeights
from mtllm_fast.models import HeadConfig, TaskHead
from tests.conftest import assert_matches

D = 8
SOFT = ((-0.1, -2.5, -5.0), (-3.0, -0.2, -2.0), (-40.0, -41.0, -43.5))  # the last as of sums over long answers


@pytest.fixture
def tokenizer(encoder_folder: str):
    return MTLLM.stack(encoder_folder, reader="encoder").require_tokenizer()


@pytest.fixture
def pack() -> tuple[torch.Tensor, Batch, TaskHead]:
    torch.manual_seed(0)
    packed = PackedBatch.from_sequences([[1] * n for n in (3, 1, 4)])
    states = torch.randn(packed.num_tokens, D, requires_grad=True)
    batch = Batch(packed, None, labels=torch.tensor([0, 1, 0]), soft_labels=torch.tensor(SOFT), ids=(None,) * 3)
    return states, batch, TaskHead(D, HeadConfig(labels=("a", "b", "c")))


def by_hand(states: torch.Tensor, batch: Batch, head: TaskHead, temperature: float) -> torch.Tensor:
    """The sum over texts in float64."""
    pooled = torch.stack([part.double().mean(0) for part in states.split(batch.mt.lengths)])
    q = ((pooled @ head.linear.weight.double().T) / temperature).softmax(-1)
    p = (torch.tensor(SOFT, dtype=torch.float64) / temperature).exp()
    p = p / p.sum(-1, keepdim=True)
    return temperature**2 * (p * (p / q).log()).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_term_is_the_kl_from_the_rows_own_distribution(pack, temperature: float) -> None:
    states, batch, head = pack
    loss = LabelWeights(task=0.0, label_kl=1.0, temperature=temperature).objective()
    found = loss(states, None, batch, task_head=head)["label_kl"]
    expected = by_hand(states, batch, head, temperature)
    assert found.count == 3 and loss.counts(batch) == {"label_kl": 3}
    assert_matches(found.sum.detach(), expected.detach(), 1e-5)
    mine = torch.autograd.grad(found.sum, (states, head.linear.weight))
    theirs = torch.autograd.grad(expected, (states, head.linear.weight))
    for one, other in zip(mine, theirs, strict=True):
        assert_matches(one, other, 1e-5)
    with pytest.raises(AssertionError):  # another temperature is another loss
        assert_matches(found.sum.detach(), by_hand(states, batch, head, 3 - temperature), 1e-2)


def test_a_constant_added_to_a_row_changes_nothing(pack) -> None:
    states, batch, head = pack
    loss = LabelWeights(task=0.0, label_kl=1.0).objective()
    moved = Batch(batch.mt, None, soft_labels=batch.soft_labels - torch.tensor([[1.0], [7.0], [0.5]]), ids=batch.ids)
    terms = [loss(states, None, one, task_head=head)["label_kl"].sum for one in (batch, moved)]
    assert_matches(terms[0], terms[1], 1e-5)


def test_rows_without_soft_labels_are_refused(pack) -> None:
    states, batch, head = pack
    loss = LabelWeights(task=0.0, label_kl=1.0).objective()
    with pytest.raises(ValueError, match="label_kl > 0 needs soft labels: the rows have none"):
        loss(states, None, Batch(batch.mt, None, labels=batch.labels, ids=batch.ids), task_head=head)


def test_soft_labels_come_from_a_file_to_the_batch(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "soft.jsonl"
    rows = [
        {"text": "one two", "label": "b", "scores": [-1.0, -0.5]},
        {"text": "three", "label": "a", "scores": [0, -2]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"label_column": "label", "labels": ("a", "b"), "language": "eng_Latn"}
    read = list(read_rows(path, soft_label_column="scores", **options))
    assert [(row.label, row.soft_label) for row in read] == [(1, (-1.0, -0.5)), (0, (0.0, -2.0))]
    batch = collate(read, tokenizer, sides=("mt",), align=False)
    assert batch.soft_labels.tolist() == [[-1.0, -0.5], [0.0, -2.0]] and batch.soft_labels.dtype == torch.float32
    assert collate(list(read_rows(path, **options)), tokenizer, sides=("mt",), align=False).soft_labels is None


@pytest.mark.parametrize(
    "value",
    ["[0.7, 0.3]", "[-1.0]", "[-1, -2, -3]", '"b"', '"-1"', "null", "[-1, null]", "[-1, NaN]", "[-1, -Infinity]", "{}"],
)
def test_what_is_no_log_probability_for_each_label_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "soft.jsonl"
    path.write_text('{"text": "one", "scores": [-1, -2]}\n{"text": "two", "scores": ' + value + "}\n")
    rows = read_rows(path, soft_label_column="scores", labels=("a", "b"))
    with pytest.raises(ValueError, match=r"soft_label_column 'scores': .* at .*soft.jsonl:2 is no list of 2 log-prob"):
        list(rows)


def test_bad_arguments_are_refused(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "soft.jsonl"
    path.write_text('{"text": "one", "scores": [-1, -2]}\n')
    with pytest.raises(ValueError, match="soft_label_column='scores': holds a number per label; name the labels"):
        read_rows(path, soft_label_column="scores")
    rows = [TextRow("one", "eng_Latn", soft_label=(-1.0, -2.0)), TextRow("two", "eng_Latn")]
    with pytest.raises(ValueError, match=r"soft_label: every row needs one, .* they have \[0, 2\]"):
        collate(rows, tokenizer, sides=("mt",), align=False)
