"""A fitted start of the projection is the minimum that it says it is."""

import numpy as np
import pytest
import torch

from mtllm_fast.data import TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.models import MTLLM, ProjectionConfig
from mtllm_fast.training import AdaptConfig
from mtllm_fast.training.projection_fit import HELD_OUT, PENALTIES, fit_projection

TEXTS = ["the cat sat on the mat", "a dog ran", "two birds sing in the old tree", "rain falls on the hill"] * 8
ROWS = [TextRow(text) for text in TEXTS]


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
    before = picked(student, ROWS)
    found = fit_projection(student, ROWS, "softmax", len(ROWS))
    after = picked(student, ROWS)
    assert after == pytest.approx(found.score, abs=0.02)
    assert after > 0.8
    assert before < 0.5, "the control: a random projection does not"


def least_squares(x: np.ndarray, y: np.ndarray, penalty: float, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ridge as ordinary least squares on rows that are added for the penalty: (E, D) and (D,)."""
    means = (x.mean(0), y.mean(0)) if bias else (np.zeros(x.shape[1]), np.zeros(y.shape[1]))
    a = x - means[0]
    a = np.concatenate([a, np.sqrt(penalty * (a**2).sum() / a.shape[1]) * np.eye(a.shape[1])])
    b = np.concatenate([y - means[1], np.zeros((x.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(a, b, rcond=None)[0]
    return weight, means[1] - means[0] @ weight


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_is_the_least_squares_solution_at_the_spread_of_the_embeddings(
    encoder_folder: str, llm_folder: str, matches, bias: bool
) -> None:
    student = MTLLM.stack(encoder_folder, llm_folder, projection=ProjectionConfig(bias=bias)).eval()
    batch = collate(ROWS, student.tokenizer, sides=("mt", "llm"), align=True)
    with torch.no_grad():
        x = student.encoder(batch.mt)[batch.mt_rows].double().numpy()
        y = student.llm.model.get_input_embeddings()(batch.llm.input_ids[batch.llm_rows]).double().numpy()
    held = int(HELD_OUT * len(x))
    r_squared = []
    for penalty in PENALTIES:
        weight, offset = least_squares(x[:-held], y[:-held], penalty, bias)
        centre = y[:-held].mean(0) if bias else 0.0
        missed = ((x[-held:] @ weight + offset - y[-held:]) ** 2).sum()
        r_squared.append(1 - missed / ((y[-held:] - centre) ** 2).sum())
    best = int(np.argmax(r_squared))

    found = fit_projection(student, ROWS, "ridge", len(ROWS))
    assert (found.pairs, found.penalty) == (len(x), PENALTIES[best])
    assert found.score == pytest.approx(r_squared[best], abs=1e-6)
    weight, _ = least_squares(x, y, PENALTIES[best], bias)
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (np.zeros(x.shape[1]), np.zeros(y.shape[1]))
    shrunk = np.linalg.norm((x - mean_x) @ weight) / np.linalg.norm(y - mean_y)
    assert shrunk < 0.999, "the control: unscaled, the projected states spread less than the embeddings"
    weight /= shrunk
    offset = mean_y - mean_x @ weight
    matches(student.projection.layers.weight, torch.from_numpy(weight.T), 1e-5)
    if bias:
        matches(student.projection.layers.bias, torch.from_numpy(offset), 1e-5)


@pytest.mark.parametrize("kind", ["ridge", "softmax"])
def test_only_the_first_rows_are_read(student: MTLLM, kind: str) -> None:
    def rows():
        yield from ROWS[:4]
        raise AssertionError("read on")

    fit_projection(student, rows(), kind, 4)


def test_what_cannot_be_fitted_is_refused(encoder_folder: str, llm_folder: str, student: MTLLM) -> None:
    with pytest.raises(ValueError, match=r"init_rows=1: \d tokens .* at least 10"):
        fit_projection(student, [TextRow("the")], "ridge", 1)
    mlp = MTLLM.stack(encoder_folder, llm_folder, projection=ProjectionConfig(kind="mlp"))
    with pytest.raises(ValueError, match="init='ridge': only a linear projection"):
        fit_projection(mlp, ROWS, "ridge", 4)
    for settings, named in (
        ({"init": "ridge", "projection": ProjectionConfig(kind="mlp")}, "init='ridge': only a linear"),
        ({"init": "lasso"}, "init='lasso': expected one of none, ridge, softmax"),
        ({"init_rows": 0}, "init_rows=0"),
    ):
        with pytest.raises(ValueError, match=named):
            AdaptConfig(**settings)
