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


def picked(student: MTLLM, rows: list[TextRow]) -> float:
    """Share of aligned tokens whose projected state is nearest, by centred dot product, to the LLM's own embedding."""
    batch = collate(rows, student.tokenizer, sides=("mt", "llm"), align=True)
    with torch.no_grad():
        x = student.projection(student.encoder(batch.mt))[batch.mt_rows]
    types, target = batch.llm.input_ids[batch.llm_rows].unique(return_inverse=True)
    table = student.llm.model.get_input_embeddings().weight.detach()[types]
    directions = torch.nn.functional.normalize(table - table.mean(0), dim=-1)
    return float((((x - table.mean(0)) @ directions.T).argmax(-1) == target).float().mean())


def test_projected_states_pick_out_the_embeddings_of_their_characters(student: MTLLM) -> None:
    rows = [TextRow(text) for text in TEXTS]
    before = picked(student, rows)
    found = fit_projection(student, rows, len(rows))
    after = picked(student, rows)
    assert after == pytest.approx(found, abs=0.02)
    assert after > 0.8
    assert before < 0.5, "the control: a random projection does not"


def test_only_the_first_rows_are_read(student: MTLLM) -> None:
    def rows():
        yield from (TextRow(text) for text in TEXTS[:4])
        raise AssertionError("read on")

    fit_projection(student, rows(), 4)


def test_an_mlp_is_refused(encoder_folder: str, llm_folder: str) -> None:
    student = MTLLM.stack(encoder_folder, llm_folder, projection=ProjectionConfig(kind="mlp"))
    with pytest.raises(ValueError, match="init_rows"):
        fit_projection(student, [TextRow("the cat")], 1)
