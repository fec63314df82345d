"""A fitted start of the projection is the minimum that it says it is."""

import numpy as np
import pytest
import torch

from mtllm_fast.data import TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.models import MTLLM, ProjectionConfig
from mtllm_fast.training import AdaptConfig
from mtllm_fast.training.projection_fit import HELD_OUT, PENALTIES, fit_projection, fit_softmax

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


def softmax_by_hand(
    x: np.ndarray, target: np.ndarray, table: np.ndarray, steps: int, penalty: float, *, weighted: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """W (D, E) and b (D,) after Adam on the gradients of the docstring's loss written out, float64, then scaled."""
    centre = table.mean(0)
    directions = (table - centre) / np.linalg.norm(table - centre, axis=1, keepdims=True)
    share = 1 / np.bincount(target)[target] if weighted else np.ones(len(target))
    share = share / share.sum()
    wanted = np.eye(len(table))[target]
    parameters = np.zeros((table.shape[1], x.shape[1])), np.zeros(table.shape[1])
    first, second = ([np.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(1, steps + 1):
        weight, bias = parameters
        logits = (x @ weight.T + bias) @ directions.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        up = ((p / p.sum(1, keepdims=True) - wanted) * share[:, None]) @ directions
        for k, gradient in enumerate((up.T @ x + penalty * weight, up.sum(0))):
            first[k] = 0.9 * first[k] + 0.1 * gradient
            second[k] = 0.999 * second[k] + 0.001 * gradient**2
            parameters[k][...] -= 0.02 * first[k] / (1 - 0.9**step) / (np.sqrt(second[k] / (1 - 0.999**step)) + 1e-8)
    weight, bias = parameters
    projected = x @ weight.T + bias
    scale = np.linalg.norm(table - centre, axis=1).mean() / np.linalg.norm(projected, axis=1).mean()
    return scale * weight, scale * bias + centre


@pytest.mark.parametrize("bias", [True, False])
def test_softmax_is_the_regression_that_it_says(bias: bool) -> None:
    """Tokens of unequal frequency, embeddings far from zero, a penalty that matters; near the minimum, since the bias
    begins with a gradient of nothing but rounding."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(16, 6, generator=generator) + 2.0
    frequency = torch.tensor([1, 2, 3, 4, 5, 8, 9, 13])
    tokens = torch.arange(8).repeat_interleave(frequency) * 2  # half of the table occurs
    states = torch.randn(len(tokens), 5, generator=generator) + tokens[:, None] / 4
    projection = torch.nn.Linear(5, 6, bias=bias)
    found = fit_softmax(projection, states, tokens, embeddings, steps=800, penalty=0.05)
    given = (states.double().numpy(), tokens.numpy() // 2, embeddings[::2].double().numpy(), 800)
    weight, offset = softmax_by_hand(*given, 0.05)
    assert np.allclose(projection.weight.detach(), weight, rtol=1e-3, atol=1e-3)
    if bias:
        assert np.allclose(projection.bias.detach(), offset, rtol=2e-3, atol=2e-3)
    assert found.pairs == len(tokens)
    for other in (softmax_by_hand(*given, 0.0), softmax_by_hand(*given, 0.05, weighted=False)):
        assert not np.allclose(other[0], weight, rtol=1e-2, atol=1e-2)


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
