"""`mask_targets` of sft: which tokens of a target the LLM does not see, that it does not, and that it still has to write
them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from mtllm_fast import MTLLM, ProjectionConfig, TextRow
from mtllm_fast.data import PackedDataset, read_rows
from mtllm_fast.data.batch import Batch, tokenise_rows
from mtllm_fast.data.prompt import NO_TOKEN, Prompt, Writing, mask_token, masked
from mtllm_fast.data.split import halves
from mtllm_fast.losses import TargetWeights
from mtllm_fast.models.inputs import compose, read_with_targets
from mtllm_fast.training import SftConfig, sft
from mtllm_fast.training.run import Data
from mtllm_fast.training.sft import build
from tests.conftest import assert_matches, relative_error
from tests.tiny import LINES
from tests.training.short_runs import logged, optim

ROWS = [TextRow(f"{line} {i}", "eng_Latn", target=f"{line} {i}", id=str(i)) for i, line in enumerate(LINES * 4)]
PROMPT = Prompt("Text: ", "\nAgain:")


@pytest.fixture(scope="module")
def student(encoder_folder, llm_folder) -> MTLLM:
    torch.manual_seed(0)
    return MTLLM.stack(
        encoder_folder, llm_folder, causal=True, projection=ProjectionConfig(boundary=True), dtype=torch.float32
    ).eval()


def batch_of(student: MTLLM, rows: list[TextRow], share: float, seed: int = 0, sides=("mt",)) -> Batch:
    return tokenise_rows(rows, student.tokenizer, sides, Writing(PROMPT, None, share, seed)).batch(
        range(len(rows)), False
    )


def seen(batch: Batch) -> list[list[int]]:
    """What the LLM reads of each target."""
    ends = [ids.tolist() for ids in batch.after.input_ids.split(batch.after.lengths)]
    return [ids[-length:] for ids, length in zip(ends, batch.targets.lengths, strict=True)]


def true(batch: Batch) -> list[list[int]]:
    return [ids.tolist() for ids in batch.targets.input_ids.split(batch.targets.lengths)]


def test_the_choice_is_one_of_seed_and_row() -> None:
    row, target = ROWS[0], list(range(5, 20_005))
    for share in (0.2, 0.5):
        found = masked(row, target, 3, Writing(PROMPT, None, share, 1))
        assert sum(token == 3 for token in found) / len(found) == pytest.approx(share, abs=0.015)
        assert all(token in (3, own) for token, own in zip(found, target, strict=True))
        assert masked(row, target, 3, Writing(PROMPT, 9, share, 1)) == found
    half = Writing(PROMPT, None, 0.5, 1)
    others = [
        masked(row, target, 3, replace(half, seed=2)),
        masked(replace(row, text="another"), target, 3, half),
        masked(replace(row, target="another"), target, 3, half),
    ]
    assert all(other != masked(row, target, 3, half) for other in others)
    assert masked(replace(row, text="\ud800"), [5], 3, half) in ([3], [5]), "whatever a text is made of"
    assert masked(row, target, 3, replace(half, masked=1.0)) == [3] * len(target)


def test_packs_and_neighbours_do_not_matter(student) -> None:
    alone = {row.id: seen(batch_of(student, [row], 0.5))[0] for row in ROWS}
    assert any(NO_TOKEN in ids for ids in alone.values())
    student.tokenizer.max_mt_tokens = student.tokenizer.max_llm_tokens = 48
    for options in ({"max_tokens": 300}, {"max_tokens": 800, "shuffle_buffer": 99, "epoch": 3, "seed": 5}):
        packs = PackedDataset(ROWS, student.tokenizer, sides=("mt",), writing=Writing(PROMPT, 32, 0.5), **options)
        for batch in packs:
            assert seen(batch) == [alone[name] for name in batch.ids]
    first, second = halves(batch_of(student, ROWS[:5], 0.5))
    assert seen(first) + seen(second) == [alone[row.id] for row in ROWS[:5]]


def test_what_stands_for_a_token() -> None:
    def token(mask: int | None, unknown: int | None) -> int:
        ids = {"mask_token_id": mask, "unk_token_id": unknown, "bos_token_id": 1, "eos_token_id": 2}
        return mask_token(SimpleNamespace(llm=SimpleNamespace(**ids)))  # type: ignore[arg-type]

    assert (token(7, 3), token(None, 3), token(None, 0)) == (7, 3, 0)
    assert token(None, None) == token(None, 1) == token(None, 2) == NO_TOKEN, "one that ends a text says that it ends"


def test_the_llm_reads_the_mask_and_writes_the_truth(student, llm_folder) -> None:
    """The loss against a loop that puts embeddings end to end, zeros where a token is masked."""
    rows, plain_llm = ROWS[:4], AutoModel.from_pretrained(llm_folder).eval()
    table = plain_llm.get_input_embeddings()
    batch, plain = batch_of(student, rows, 0.5), batch_of(student, rows, 0.0)
    assert true(batch) == true(plain) == seen(plain) and seen(batch) != seen(plain)
    assert all(ids[-1] == student.tokenizer.llm.eos_token_id for ids in true(batch))

    def of(ids: list[int], hidden: list[bool] | None = None) -> Tensor:
        found = table(torch.tensor(ids))
        return found if hidden is None else found * ~torch.tensor(hidden)[:, None]

    logits, labels = [], []
    prompts = PROMPT.ids(rows, student.tokenizer)
    with torch.no_grad():
        texts = student.projected(batch.mt).split(batch.mt.lengths)
        for i, (own, read) in enumerate(zip(true(batch), seen(batch), strict=True)):
            hidden = [token != truth for token, truth in zip(read, own, strict=True)]
            parts = [of(prompts[0][i]), texts[i], student.projection.boundary[None], of(prompts[1][i]), of(own, hidden)]
            states = plain_llm(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0]
            logits.append(F.linear(states[-len(own) - 1 : -1], student.llm.lm_head.weight))
            labels.append(torch.tensor(own))
        expected = F.cross_entropy(torch.cat(logits), torch.cat(labels))
        weights = TargetWeights().objective()

        def loss(batch: Batch) -> Tensor:
            read = read_with_targets(student, batch)
            given = replace(batch, mt=read.packed, mt_rows=read.rows)
            terms = weights(read.states, None, given, lm_head=student.llm.lm_head, side="mt")
            return weights.total(terms, weights.counts(batch))

        assert_matches(loss(batch), expected, 1e-5)
        assert relative_error(loss(plain), expected) > 1e-3, "the control: without masks it is another loss"


def test_a_masked_token_does_not_reach_the_llm(student) -> None:
    rows = ROWS[:3]
    batch = batch_of(student, rows, 0.5)
    table = student.llm.model.get_input_embeddings()
    hidden = {own for a, b in zip(true(batch), seen(batch)) for own, read in zip(a, b) if read != own}
    shown = {read for ids in seen(batch) for read in ids} | set(batch.before.input_ids.tolist())
    shown |= set(batch.after.input_ids.tolist())
    table.weight.requires_grad_(True)
    try:
        read_with_targets(student, batch).states.square().sum().backward()
        rows_with_gradient = set(table.weight.grad.abs().amax(1).nonzero().flatten().tolist())
    finally:
        table.weight.grad = None
        table.weight.requires_grad_(False)
    assert hidden - shown and not rows_with_gradient & (hidden - shown)
    assert rows_with_gradient == shown - {NO_TOKEN}
    # all of it masked: two targets of one length are read alike, and nothing else of them is
    with torch.no_grad():
        first = batch_of(student, [replace(rows[0], target="apples")], 1.0)
        length = first.targets.num_tokens
        words = ("river", "bridge", "light", "cheese", "bread", "stone", "night")
        same = [w for w in words if batch_of(student, [replace(rows[0], target=w)], 1.0).targets.num_tokens == length]
        assert same
        for share, equal in ((1.0, True), (0.0, False)):
            one, other = (batch_of(student, [replace(rows[0], target=word)], share) for word in ("apples", same[0]))
            states = [read_with_targets(student, each).states for each in (one, other)]
            assert torch.equal(*states) is equal and true(one) != true(other)
    inputs = compose(student.require_stack(), batch.mt, batch.before, batch.after)
    assert int(inputs.batch.input_ids.max()) < student.llm.vocab_size and NO_TOKEN in batch.after.input_ids.tolist()


def test_the_teacher_of_the_kl_reads_the_truth(encoder_folder, llm_folder) -> None:
    config = SftConfig(
        encoder=encoder_folder, llm=llm_folder, mask_targets=0.5, loss=TargetWeights(1.0, kl=1.0), before="Text: ",
        after="\nAgain:", max_target_tokens=32,
    )  # fmt: skip
    stage = build(config, Data(ROWS), torch.float32)
    assert (stage.writing.masked, stage.writing.seed) == (0.5, config.train.seed)
    batch = batch_of(stage.student, ROWS[:3], 0.5, sides=("mt", "llm"))
    plain = batch_of(stage.student, ROWS[:3], 0.0, sides=("mt", "llm"))
    assert torch.equal(batch.llm.input_ids, plain.llm.input_ids) and seen(batch) != seen(plain)


def test_runs_learn_with_masks_and_lines_are_their_own_targets(encoder_folder, llm_folder, tmp_path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(row.text for row in ROWS) + "\n")
    rows = read_rows(tmp_path / "lines.txt", target_column="text", language="eng_Latn")
    assert [(row.text, row.target) for row in rows] == [(row.text, row.text) for row in ROWS]
    with pytest.raises(ValueError, match=r"target_column 'target': .*is plain text and has no columns"):
        read_rows(tmp_path / "lines.txt", target_column="target")
    losses = {}
    for share in (0.0, 0.5):
        train = optim(max_steps=12, tokens=400, lr=1e-2, warmup=0.0)
        config = SftConfig(
            encoder=encoder_folder, llm=llm_folder, output=str(tmp_path / f"run-{share}"), mask_targets=share, train=train,
            max_target_tokens=32,
        )  # fmt: skip
        sft(config, rows)
        losses[share] = [entry["loss"] for entry in logged(tmp_path / f"run-{share}").values()]
        assert losses[share][-1] < losses[share][0] - 0.1
    assert losses[0.0] != losses[0.5]
