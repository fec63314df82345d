import numpy as np
import pytest

from mtllm_fast.evaluation.probe import fit_probe


def blobs(count, seed, shift=2.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    features = generator.normal(size=(count, 8)).astype(np.float32) * 5 + 100
    features[np.arange(count), labels] += 5 * shift
    features[:, 7] = 3.0  # constant
    return features, labels


def test_separates_blobs_and_is_deterministic():
    train, dev, test = blobs(300, 0), blobs(60, 1), blobs(300, 2)
    probe = fit_probe(*train, *dev, 3)
    accuracy = (probe.logits(test[0]).argmax(1) == test[1]).mean()
    assert accuracy > 0.8
    assert (probe.logits(test[0]).argmax(1) == np.roll(test[1], 1)).mean() < 0.4  # and the threshold means something
    again = fit_probe(*train, *dev, 3)
    assert np.array_equal(probe.weight, again.weight)
    assert probe.penalty == again.penalty


def test_reaches_the_minimum(matches):
    import torch

    features, labels = blobs(90, 3, shift=1.0)
    probe = fit_probe(features, labels, features, labels, 3, penalties=(0.1,))
    weight = torch.tensor(probe.weight, requires_grad=True)
    bias = torch.tensor(probe.bias, requires_grad=True)
    inputs = torch.from_numpy((features.astype(np.float64) - probe.mean) / probe.scale)
    loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, torch.as_tensor(labels))
    (loss + 0.05 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5
    assert (0.1 * weight).abs().max() > 1e-3  # the penalty alone has a far larger gradient


def test_chooses_the_penalty_on_dev():
    generator = np.random.default_rng(0)
    noise, labels = generator.normal(size=(40, 60)), np.arange(40) % 2
    dev, dev_labels = generator.normal(size=(200, 60)), np.arange(200) % 2
    probe = fit_probe(noise, labels, dev, dev_labels, 2, penalties=(1e-4, 1e3))
    strong = fit_probe(noise, labels, dev, dev_labels, 2, penalties=(1e3,))
    weak = fit_probe(noise, labels, dev, dev_labels, 2, penalties=(1e-4,))
    assert probe.dev_accuracy >= max(strong.dev_accuracy, weak.dev_accuracy)


@pytest.mark.parametrize(
    ("features", "labels", "match"),
    [
        (np.zeros((0, 3)), [], "features: expected"),
        (np.zeros((2, 3)), [0], "features: expected"),
        (np.full((2, 3), np.nan), [0, 1], "not finite"),
    ],
)
def test_bad_input(features, labels, match):
    with pytest.raises(ValueError, match=match):
        fit_probe(features, labels, np.ones((1, 3)), [0], 2)
