"""The contrast of pooled states: by its definition in float64, what is no negative, and what gives nothing."""

from __future__ import annotations

import pytest
import torch

from mtllm_fast import MTLLM, LoraSettings, TextRow
from mtllm_fast.data.batch import Batch
from mtllm_fast.data.collate import collate
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.data.split import halves
from mtllm_fast.losses import DistillationLoss, DistillationWeights, Objective
from mtllm_fast.losses.contrast import info_nce, reference
from mtllm_fast.training import AdaptConfig
from mtllm_fast.training.stage import Stage
from tests.conftest import assert_matches, relative_error
from tests.tiny import LINES

B, D = 7, 24
SAME = torch.zeros(B, B, dtype=torch.bool)
SAME[1, 4] = SAME[4, 1] = SAME[2, 6] = SAME[6, 2] = True


def _states(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(B, D, generator=generator, dtype=dtype, requires_grad=True)
    return student, 0.3 * student.detach() + torch.randn(B, D, generator=generator, dtype=dtype)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("same", [None, SAME])
def test_against_the_definition(same, temperature) -> None:
    student, teacher = _states()
    found, expected = (f(student, teacher, temperature, same) for f in (info_nce, reference))
    assert_matches(found, expected.float(), 1e-5)
    mine, theirs = (torch.autograd.grad(x, student)[0] for x in (found, expected))
    assert_matches(mine, theirs.float(), 1e-5)
    other = info_nce(student, teacher, 1.1 * temperature, same)
    assert relative_error(other, expected) > 1e-3, "the control: another temperature"


@pytest.mark.parametrize("same", [None, SAME])
def test_gradcheck(same) -> None:
    student, teacher = _states(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: info_nce(s, teacher, 0.2, same), student)

    def wrong(states: torch.Tensor) -> torch.Tensor:  # the control: half of the gradient
        return info_nce(states.detach() + 0.5 * (states - states.detach()), teacher, 0.2, same)

    assert not torch.autograd.gradcheck(wrong, student, raise_exception=False)


def test_the_teacher_has_no_gradient() -> None:
    student, teacher = _states()
    teacher.requires_grad_()
    info_nce(student, teacher, 0.1).backward()
    assert teacher.grad is None and float(student.grad.abs().max()) > 0


def test_one_way_and_blind_to_length() -> None:
    student, teacher = _states()
    plain = info_nce(student, teacher, 0.1)
    assert_matches(info_nce(7 * student, teacher / 3, 0.1), plain, 1e-5)
    assert relative_error(info_nce(teacher, student, 0.1), plain) > 1e-2, "the other way is another loss"


def test_autocast_leaves_the_cosines_alone() -> None:
    student, teacher = _states()
    plain = info_nce(student, teacher, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(student, teacher, 0.05)
        rounded = torch.nn.functional.normalize(student) @ torch.nn.functional.normalize(teacher).T / 0.05
    assert_matches(found, plain, 1e-6)
    control = torch.nn.functional.cross_entropy(rounded.float(), torch.arange(B), reduction="sum")
    assert relative_error(control, plain) > 1e-4


# ---- the term on packs
def _pack(mt: list[list[int]], llm: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    torch.manual_seed(1)
    sides = [PackedBatch.from_sequences(side) for side in (mt, llm)]
    student = torch.randn(sides[0].num_tokens, D, requires_grad=True)
    return student, torch.randn(sides[1].num_tokens, D), Batch(*sides, ids=(None,) * len(mt))


def _pooled(states: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    return torch.stack([part.double().mean(0) for part in states.split(packed.lengths)])


A, A2, B1, C1, C2 = [5, 6, 7], [7, 6, 5], [9], [5, 6], [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("mt", "llm", "pairs"),
    [
        ([A, B1, C1, A2], [A, B1, C1, A2], []),
        ([A, B1, A, C1], [[1], [2], [1], [3]], [(0, 2)]),  # the text stands twice
        ([A, A2, B1, C1], [[1], [1], [2], [3]], [(0, 1)]),  # two translations of one text
        ([A, A, B1, C2], [[1], [2], [3], [4]], [(0, 1)]),  # one text with two originals
        ([A, B1, A, B1], [[1], [2], [1], [2]], [(0, 2), (1, 3)]),
    ],
)
def test_equal_texts_are_not_each_others_negatives(mt, llm, pairs) -> None:
    student, teacher, batch = _pack(mt, llm)
    weights = DistillationWeights(0.0, contrast=1.0, contrast_temperature=0.2)
    loss = DistillationLoss(weights)
    (name, found), *others = loss(student, teacher, batch).items()
    assert (name, others, loss.counts(batch), float(found.count)) == ("contrast", [], {"contrast": 4.0}, 4)
    same = torch.zeros(4, 4, dtype=torch.bool)
    for b, c in pairs:
        same[b, c] = same[c, b] = True
    pooled = _pooled(student, batch.mt), _pooled(teacher, batch.llm)
    expected = reference(*pooled, 0.2, same)
    assert_matches(found.sum, expected.float(), 1e-5)
    mine, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (found.sum, expected))
    assert_matches(mine, theirs, 1e-5)
    if pairs:
        assert relative_error(found.sum, reference(*pooled, 0.2)) > 1e-3, "the control: all are negatives"


@pytest.mark.parametrize("texts", [[A], [A, A, A]])
def test_without_negatives_there_is_no_loss(texts) -> None:
    student, teacher, batch = _pack(texts, texts)
    loss = Objective({"contrast": 1.0})
    terms = loss(student, teacher, batch)
    total = loss.total(terms, loss.counts(batch))
    (gradient,) = torch.autograd.grad(total, student)
    assert float(total.detach()) == 0.0 and float(gradient.abs().max()) == 0.0
    assert loss.counts(batch) == {"contrast": len(texts)}
    student, teacher, batch = _pack([*texts, B1], [*texts, B1])
    assert float(loss(student, teacher, batch)["contrast"].sum.detach()) > 0, "the control"


def test_a_text_of_choices_is_its_choices_end_to_end() -> None:
    student, teacher, batch = _pack([A, C2, A2], [C2, A, C1])
    spans = [torch.tensor([[[0, 2], [2, 3]], [[3, 5], [5, 7]], [[7, 8], [8, 10]]]),
             torch.tensor([[[0, 2], [2, 4]], [[4, 5], [5, 7]], [[7, 8], [8, 9]]])]  # fmt: skip
    batch = Batch(batch.mt, batch.llm, mt_spans=spans[0], llm_spans=spans[1])
    found = Objective({"contrast": 1.0}, contrast_temperature=0.3)(student, teacher, batch)["contrast"]
    pooled = [
        torch.stack([torch.cat([states[a:b].double().mean(0) for a, b in row]) for row in side.tolist()])
        for states, side in zip((student, teacher), spans)
    ]
    assert float(found.count) == 3
    assert_matches(found.sum, reference(*pooled, 0.3).float(), 1e-5)


def test_a_pack_is_not_the_sum_of_its_halves() -> None:
    """The one term so far whose gradient depends on what is packed together, and it says so."""
    student, teacher, batch = _pack([A, B1, C1, C2], [A, B1, C1, C2])
    loss = Objective({"contrast": 1.0, "pooled_mse": 1.0})
    whole, cut = loss(student, teacher, batch), halves(batch)[0].mt.num_tokens
    parts = [loss(student[:cut], teacher[:cut], halves(batch)[0]), loss(student[cut:], teacher[cut:], halves(batch)[1])]
    apart = {name: sum(part[name].sum for part in parts) for name in whole}
    assert relative_error(apart["pooled_mse"], whole["pooled_mse"].sum) < 1e-5
    assert relative_error(apart["contrast"], whole["contrast"].sum) > 1e-2
    assert [name for name, term in loss.terms.items() if term.compares_texts] == ["contrast"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"contrast": -1.0}, "contrast=-1"),
        ({"contrast_temperature": 0.0}, "contrast_temperature=0"),
        ({"contrast_temperature": float("nan")}, "contrast_temperature=nan"),
        ({"pooled_mse": 0.0}, "contrast, task: at least one"),
        ({"task": float("nan")}, "task=nan"),
    ],
)
def test_bad_weights(arguments, named) -> None:
    with pytest.raises(ValueError, match=named):
        DistillationWeights(**arguments)


def test_what_a_weight_needs() -> None:
    assert DistillationWeights().needs == {"teacher"}
    assert DistillationWeights(0.0, contrast=1.0).needs == {"teacher"}
    assert DistillationWeights(0.0, task=1.0).needs == {"task_head", "labels"}
    assert DistillationWeights(kl=1.0).needs_pairs and not DistillationWeights(contrast=1.0).needs_pairs


# ---- after an inner layer
def _stage(encoder_folder: str, llm_folder: str, layer: int | None) -> Stage:
    torch.manual_seed(0)
    model = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=2, dropout=0.0), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(0, 0.1)
    weights = DistillationWeights(0.0, contrast=1.0, contrast_temperature=0.2, contrast_layer=layer)
    return Stage(model, DistillationLoss(weights), train_projection=True).eval()


def test_after_an_inner_layer(encoder_folder: str, llm_folder: str) -> None:
    """Of the states that Hugging Face's `output_hidden_states` gives; weights above have no part in it."""
    stage = _stage(encoder_folder, llm_folder, 1)
    model, rows = stage.student, [TextRow(text, "eng_Latn") for text in LINES[:5]]
    batch = collate(rows, model.require_tokenizer(), align=False)
    found = stage(batch)["contrast"]

    def pooled(packed: PackedBatch, embeds: torch.Tensor, layer: int) -> torch.Tensor:
        llm, states = model.require_llm(), []
        plain = llm.decoder
        implementation, plain.config._attn_implementation = plain.config._attn_implementation, "eager"
        try:
            for part in embeds.split(packed.lengths):
                mask = torch.zeros(1, 1, len(part), len(part))
                out = plain(inputs_embeds=part[None], attention_mask=mask, output_hidden_states=True)
                states.append(out.hidden_states[layer][0].mean(0))
        finally:
            plain.config._attn_implementation = implementation
        return torch.stack(states)

    with torch.no_grad():
        table = model.require_llm().model.get_input_embeddings()
        student = pooled(batch.mt, model.projected(batch.mt), 1)
        last = pooled(batch.mt, model.projected(batch.mt), 2)
        with model.teacher():
            teacher = pooled(batch.llm, table(batch.llm.input_ids), 1)
    assert_matches(found.sum.detach(), reference(student, teacher, 0.2).float(), 1e-4)
    assert relative_error(found.sum, reference(last, teacher, 0.2)) > 1e-2, "the control: another layer"
    found.sum.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in gradients.values())
    reached = {name for name, grad in gradients.items() if float(grad.abs().max()) > 0}
    assert {".layers.0." in name for name in reached if ".lora_" in name} == {True}, "the second layer is above"
    assert any(name.startswith("projection.") for name in reached)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DistillationWeights(contrast_layer=2), "contrast_layer=2: is that of contrast, whose weight is 0"),
        (lambda: DistillationWeights(contrast=1.0, contrast_layer=0), "contrast_layer=0: layers are counted from 1"),
        (
            lambda: AdaptConfig(teacher_cache="c", loss=DistillationWeights(contrast=1.0, contrast_layer=1)),
            "loss.contrast_layer=1: teacher_cache='c' holds the last states alone",
        ),
    ],
)
def test_an_inner_layer_that_cannot_be(make, said) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_an_inner_layer_that_the_llm_lacks(encoder_folder: str, llm_folder: str) -> None:
    with pytest.raises(ValueError, match=r"loss\.contrast_layer=3: the LLM has 2 layers"):
        _stage(encoder_folder, llm_folder, 3)
