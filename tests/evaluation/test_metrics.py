import numpy as np
import pytest

from mtllm_fast.evaluation.metrics import accuracy, confusion_matrix, f1_per_class, macro_f1


def brute_force_macro_f1(predictions, gold, num_classes):
    scores = []
    for label in range(num_classes):
        hits = sum(p == g == label for p, g in zip(predictions, gold))
        predicted = sum(p == label for p in predictions)
        true = sum(g == label for g in gold)
        if predicted + true == 0:
            continue
        precision = hits / predicted if predicted else 0.0
        recall = hits / true if true else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(20))
def test_against_brute_force(seed):
    generator = np.random.default_rng(seed)
    classes, count = int(generator.integers(2, 8)), int(generator.integers(1, 40))
    gold = generator.integers(0, classes, count)
    predictions = np.where(generator.random(count) < 0.5, gold, generator.integers(0, classes, count))
    assert accuracy(predictions, gold) == pytest.approx(
        sum(p == g for p, g in zip(predictions, gold)) / count, abs=1e-12
    )
    expected = brute_force_macro_f1(predictions.tolist(), gold.tolist(), classes)
    assert macro_f1(predictions, gold, classes) == pytest.approx(expected, abs=1e-12)
    matrix = confusion_matrix(predictions, gold, classes)
    assert matrix.sum() == count
    assert all(matrix[g, p] == sum((gold == g) & (predictions == p)) for g in range(classes) for p in range(classes))


def test_the_tolerance_sees_one_changed_row():
    gold = np.arange(1000) % 7
    predictions = gold.copy()
    predictions[0] = 3
    assert macro_f1(predictions, gold, 7) != pytest.approx(1.0, abs=1e-12)
    assert accuracy(predictions, gold) == pytest.approx(0.999, abs=1e-12)


def test_absent_classes_do_not_count():
    assert macro_f1([0, 1], [0, 1], 5) == 1.0
    assert np.isnan(f1_per_class([0, 1], [0, 1], 3)[2])
    assert macro_f1([2, 1], [0, 1], 5) == pytest.approx(1 / 3)  # a class that is only predicted counts, with F1 0


@pytest.mark.parametrize(
    ("predictions", "gold", "match"),
    [
        ([], [], "no rows"),
        ([0, 1], [0], "one length"),
        ([0, 7], [0, 1], r"predictions.*0\.\.2"),
        ([0, 1], [0, -1], "gold"),
    ],
)
def test_bad_input(predictions, gold, match):
    with pytest.raises(ValueError, match=match):
        confusion_matrix(predictions, gold, 3)
    if len(predictions) != len(gold) or not predictions:
        with pytest.raises(ValueError, match=match):
            accuracy(predictions, gold)
