"""The least-squares start of the projection is the minimum that it says it is."""

import pytest
import torch

from mtllm_fast.data import TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.models import MTLLM, ProjectionConfig
from mtllm_fast.training.projection_fit import fit_projection

TEXTS = ["the cat sat on the mat", "a dog ran", "two birds sing in the old tree", "rain falls on the hill"] * 8


@pytest.fixture
def student(encoder_folder: str, llm_folder: str) -> MTLLM:
    return MTLLM.stack(encoder_folder, llm_folder)


def residual(student: MTLLM, rows: list[TextRow]) -> tuple[float, float]:
    batch = collate(rows, student.tokenizer, sides=("mt", "llm"), align=True)
    with torch.no_grad():
        x = student.projection(student.encoder(batch.mt))[batch.mt_rows]
        e = student.llm.model.get_input_embeddings()(batch.llm.input_ids[batch.llm_rows])
    return float((x - e).square().sum()), float((e - e.mean(0)).square().sum())


def test_the_fit_explains_what_it_reports_and_no_small_change_is_better(student: MTLLM) -> None:
    rows = [TextRow(text) for text in TEXTS]
    before, _ = residual(student, rows)
    explained = fit_projection(student, rows, len(rows), ridge=0.0 + 1e-9)
    after, variance = residual(student, rows)
    assert after < 0.9 * before
    assert explained == pytest.approx(1 - after / variance, abs=1e-3)
    assert abs((1 - before / variance) - explained) > 1e-2, "the control: another projection explains another share"
    weight = student.projection.layers.weight
    for seed in range(3):
        nudge = 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * weight.std().detach()
        with torch.no_grad():
            weight.add_(nudge)
        assert residual(student, rows)[0] > after
        with torch.no_grad():
            weight.sub_(nudge)


def test_only_the_first_rows_are_read(student: MTLLM) -> None:
    def rows():
        yield from (TextRow(text) for text in TEXTS[:4])
        raise AssertionError("read on")

    fit_projection(student, rows(), 4)


def test_an_mlp_is_refused(encoder_folder: str, llm_folder: str) -> None:
    student = MTLLM.stack(encoder_folder, llm_folder, projection=ProjectionConfig(kind="mlp"))
    with pytest.raises(ValueError, match="init_rows"):
        fit_projection(student, [TextRow("the cat")], 1)
