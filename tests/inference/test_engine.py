"""Order, windows, packs and background preparation change nothing; pooling, choices, merged adapters, 8-bit weights."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from mtllm_fast import MTLLM, Engine, HeadConfig, LoraSettings, TextRow
from mtllm_fast.inference import engine as module
from mtllm_fast.inference.cpu_linear import OneDnnLinear, fast_linear
from mtllm_fast.models.compile import compile_layers
from tests.conftest import assert_matches, relative_error
from tests.tiny import LINES

CODES = ("eng_Latn", "fra_Latn", "zho_Hans", "swh_Latn")


@pytest.fixture(scope="module")
def stack(encoder_folder, llm_folder) -> MTLLM:
    model = MTLLM.stack(encoder_folder, llm_folder, lora=LoraSettings(r=4), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # a new adapter is the identity
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def texts() -> list[str]:
    words = " ".join(LINES).split()
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=rng.choice((1, 2, 5, 40)))) for _ in range(60)]


@pytest.fixture(scope="module")
def codes() -> list[str]:
    rng = random.Random(1)
    return [rng.choice(CODES) for _ in range(60)]


@pytest.fixture(scope="module")
def one_by_one(stack, texts, codes) -> torch.Tensor:
    engine = Engine(stack, ahead=0)
    return torch.from_numpy(np.concatenate([engine.encode([text], code) for text, code in zip(texts, codes)]))


@pytest.mark.parametrize(
    "options", [{}, {"window": 7, "max_tokens": 50}, {"window": 7, "ahead": 0}, {"window": 3, "ahead": 4}]
)
def test_rows_in_order_whatever_the_windows(stack, texts, codes, one_by_one, options) -> None:
    got = torch.from_numpy(Engine(stack, **options).encode(texts, codes))
    assert_matches(got, one_by_one, 1e-5)
    assert relative_error(got.flip(0), one_by_one) > 1e-2  # control: order is visible at this tolerance


def test_mixed_languages_equal_one_language_at_a_time(stack, texts, codes) -> None:
    engine = Engine(stack)
    mixed = engine.encode(texts, codes)
    for code in CODES:
        chosen = [k for k, c in enumerate(codes) if c == code]
        alone = engine.encode([texts[k] for k in chosen], code)
        assert_matches(torch.from_numpy(mixed[chosen]), torch.from_numpy(alone), 1e-5)
        other = engine.encode([texts[k] for k in chosen], "deu_Latn")
        assert relative_error(torch.from_numpy(other), torch.from_numpy(alone)) > 1e-3  # control: the language matters


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling(stack, texts, pooling) -> None:
    got = torch.from_numpy(Engine(stack).encode(texts[:8], pooling=pooling))
    assert stack.tokenizer is not None
    side = stack.tokenizer.mt_side([TextRow(text) for text in texts[:8]])
    expected = []
    for ids in side.ids:
        tokens = torch.from_numpy(ids)[None]
        states = stack(tokens).last_hidden_state[0]
        expected.append({"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling])
    assert_matches(got, torch.stack(expected).detach(), 1e-5)


def test_normalize(stack, texts) -> None:
    plain = Engine(stack).encode(texts[:5])
    unit = Engine(stack).encode(texts[:5], normalize=True)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)


def test_equal_rows_are_run_once(stack, monkeypatch) -> None:
    texts, codes = ["a river", "the mill", "a river", "a river"], ["eng_Latn", "eng_Latn", "eng_Latn", "fra_Latn"]
    seen = []
    states = stack.states
    monkeypatch.setattr(stack, "states", lambda packed: seen.append(packed.num_sequences) or states(packed))
    got = Engine(stack).encode(texts, codes)
    assert sum(seen) == 3
    assert (got[0] == got[2]).all()
    assert abs(got[0] - got[3]).max() > 1e-3  # another language is another row


def test_a_long_stream_is_never_held(stack) -> None:
    """The rows read ahead of the results given out are a few windows, however long the stream is."""
    read = 0

    def rows():
        nonlocal read
        for k in range(400):
            read += 1
            yield TextRow(f"{LINES[k % 6]} {k}")

    given, furthest = 0, 0
    for part in Engine(stack, window=10).encode_rows(rows()):
        given += len(part)
        furthest = max(furthest, read - given)
    assert given == 400
    assert furthest <= 30


def test_preparation_runs_beside_the_model(stack) -> None:
    """The next window is read while the caller still holds this one; closing the stream ends the thread."""
    reached = threading.Event()

    def rows():
        yield from (TextRow(f"text {k}") for k in range(4))
        reached.set()
        yield from (TextRow(f"text {k}") for k in range(400))

    windows = Engine(stack, window=2).encode_rows(rows())
    next(windows)
    next(windows)
    assert reached.wait(5)
    windows.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mtllm-tokenise")]
    with pytest.raises(ZeroDivisionError):
        list(Engine(stack).encode_rows(TextRow(str(1 // k)) for k in (1, 0)))


def test_skipped_windows_are_not_tokenised(stack, texts, monkeypatch) -> None:
    whole = list(Engine(stack, window=10).encode_windows(map(TextRow, texts)))
    count = 0
    mt_side = type(stack.tokenizer).mt_side

    def counted(self, rows, **options):
        nonlocal count
        count += len(rows)
        return mt_side(self, rows, **options)

    monkeypatch.setattr(type(stack.tokenizer), "mt_side", counted)
    rest = list(Engine(stack, window=10).encode_windows(map(TextRow, texts), skip=lambda index: index != 3))
    assert [window.index for window in rest] == [3]
    assert (rest[0].values == whole[3].values).all()
    assert count == 10


def test_score_choices(encoder_folder, llm_folder) -> None:
    model = MTLLM.stack(encoder_folder, llm_folder, head=HeadConfig("choice"), dtype=torch.float32).eval()
    rows = [
        TextRow("Which one floats?", choices=("a stone", "a boat", "an anchor")),
        TextRow("Where?", choices=("here", "there")),
        TextRow("Which one floats?", choices=("a stone", "a boat")),
        TextRow("Who knew why the lights went out?", "fra_Latn", choices=("nobody", "she", "a teacher")),
    ]
    scores = Engine(model, window=3).score_choices(rows)
    assert scores.shape == (4, 3)
    assert np.isneginf(scores[1:3, 2]).all()
    alone = np.full((4, 3), -np.inf, np.float32)
    for k, row in enumerate(rows):
        alone[k, : len(row.choices)] = Engine(model).score_choices([row])[0]
    finite = np.isfinite(alone)
    assert (np.isfinite(scores) == finite).all()
    assert_matches(torch.from_numpy(scores[finite]), torch.from_numpy(alone[finite]), 1e-5)
    with pytest.raises(ValueError, match=r"rows\[1\] has no choices"):
        Engine(model).score_choices([rows[0], TextRow("text")])
    classifier = MTLLM.stack(encoder_folder, llm_folder, head=HeadConfig(labels=("a", "b")))
    with pytest.raises(ValueError, match="'classification' head"):
        Engine(classifier).score_choices(rows)


def test_merged_adapters(stack, texts) -> None:
    weights = {name: value.clone() for name, value in stack.state_dict().items()}
    expected = torch.from_numpy(Engine(stack).encode(texts))
    with stack.llm.adapter(None):
        bare = torch.from_numpy(Engine(stack).encode(texts))
    engine = Engine(stack, merge_adapters=True)
    changed = [name for name, value in stack.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed and all("base_layer" in name for name in changed)
    assert_matches(torch.from_numpy(engine.encode(texts)), expected, 1e-4)
    assert relative_error(bare, expected) > 1e-2  # control: without the adapter it is another model
    with pytest.raises(ValueError, match="merged"):
        stack.llm.save("nowhere")
    engine.unmerge_adapters()
    assert all(torch.equal(value, weights[name]) for name, value in stack.state_dict().items())
    assert_matches(torch.from_numpy(engine.encode(texts)), expected, 1e-6)


def test_compile(encoder_folder, llm_folder, texts) -> None:
    """Graphs do not depend on the lengths of a batch: a second, different pass makes none anew."""
    from torch._dynamo.utils import counters

    model = MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32).eval()
    expected = torch.from_numpy(Engine(model).encode(texts))
    torch.compiler.reset()
    compile_layers(model.llm.decoder.layers, backend="eager")  # code generation is torch's own affair
    engine = Engine(model, max_tokens=300)
    engine.compiled = True
    assert_matches(torch.from_numpy(engine.encode(texts)), expected, 1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    engine.encode([text + " again" for text in texts[::2]])
    assert counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


def test_linear_layers_on_the_cpu() -> None:
    """Plain fp32 layers go to oneDNN and give torch's numbers; everything else is left to torch."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    for bias in (None, torch.randn(3, generator=generator)):
        with OneDnnLinear(), torch.no_grad():
            got = torch.nn.functional.linear(x, weight, bias)
            wide = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_matches(got, torch.nn.functional.linear(x, weight, bias), 1e-5)
        assert wide.dtype == torch.float64
        assert_matches(got, wide.float(), 1e-5)


def test_autocast_decides_the_precision_of_a_pass(encoder_folder, llm_folder, texts) -> None:
    """Validation of a run in bf16: oneDNN's fp32 product does not step in, so the layers run in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(fast_linear(torch.device("cpu")), OneDnnLinear)
    engine = Engine(MTLLM.stack(encoder_folder, llm_folder))
    exact = engine.encode(texts[:4], "eng_Latn")
    with torch.autocast("cpu", torch.bfloat16):
        found = engine.encode(texts[:4], "eng_Latn")
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 5e-2


def test_quantize(encoder_folder, llm_folder, texts, monkeypatch) -> None:
    model = MTLLM.stack(encoder_folder, llm_folder, dtype=torch.float32).eval()
    with monkeypatch.context() as patch:
        patch.setattr("mtllm_fast.inference.quantize.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install 'mtllm-fast\[quant\]'"):
            Engine(model, quantize="int8")
    pytest.importorskip("torchao")
    expected = torch.from_numpy(Engine(model).encode(texts))
    got = torch.from_numpy(Engine(model, quantize="int8").encode(texts))
    assert 1e-6 < relative_error(got, expected) < 0.1
    with pytest.raises(ValueError, match="int4"):
        Engine(model, quantize="int4")


def test_errors_name_the_argument(stack) -> None:
    engine = Engine(stack)
    cases = [
        (lambda: Engine(stack, max_tokens=0), "max_tokens=0"),
        (lambda: Engine(stack, window=0), "window=0"),
        (lambda: Engine(stack, ahead=-1), "ahead=-1"),
        (lambda: engine.encode(["a", " "]), r"texts\[1\] is empty"),
        (lambda: engine.encode(["a"], "fra_Lat"), "fra_Latn"),
        (lambda: engine.encode(["a"], ["eng_Latn", "fra_Latn"]), "languages: 2 codes for 1"),
        (lambda: engine.encode(["a"], pooling="max"), "pooling='max'"),
        (lambda: engine.classify([TextRow("a")]), "no task head"),
        (lambda: engine.score_choices([TextRow("a", choices=("b",))]), "no task head"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for wrong, message in (("a", "one str"), (["a", None], r"texts\[1\] is NoneType")):
        with pytest.raises(TypeError, match=message):
            engine.encode(wrong)
    assert engine.encode([]).shape == (0, stack.hidden_size)


def test_default_budget_by_width(stack) -> None:
    assert module.default_budget(stack) == 8192
    assert 512 <= Engine(stack).max_tokens <= 8192


def test_truncated_rows_are_counted(stack) -> None:
    engine = Engine(stack)
    engine.encode([" ".join(LINES * 20), "short"])
    assert engine.truncated == 1


def test_classify_texts(encoder_folder, llm_folder, tmp_path) -> None:
    """Names and probabilities of texts from a generator are those of the head by hand; a bad text loses only itself."""
    head = HeadConfig(labels=("news", "sport", "other"))
    model = MTLLM.stack(encoder_folder, llm_folder, head=head, dtype=torch.float32).eval()
    with torch.no_grad():
        model.head.linear.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    engine = Engine(str(tmp_path), window=2)
    assert isinstance(engine.model, MTLLM)
    found = engine.classify((line for line in LINES), "eng_Latn")
    assert found.classes == head.labels
    vectors = torch.from_numpy(engine.encode(LINES))
    logits = (vectors @ model.head.linear.weight.T).detach()
    assert model.head.linear.bias is None
    assert_matches(torch.from_numpy(found.probabilities), torch.softmax(logits, -1), 1e-5)
    assert found.labels == [head.labels[k] for k in logits.argmax(1)]
    texts = [LINES[0], " ", LINES[1], None]
    some = engine.classify(texts, ["eng_Latn"] * 4, on_bad_text="nan")
    assert some.labels == [found.labels[0], None, found.labels[1], None]
    assert np.isnan(some.probabilities[[1, 3]]).all()
    assert_matches(torch.from_numpy(some.probabilities[[0, 2]]), torch.from_numpy(found.probabilities[:2]), 1e-5)
    encoded = engine.encode(texts, on_bad_text="nan")
    assert np.isnan(encoded[[1, 3]]).all()
    assert_matches(torch.from_numpy(encoded[[0, 2]]), vectors[:2], 1e-5)
    assert np.isnan(engine.encode(["", " "], on_bad_text="nan")).all()
    with pytest.raises(ValueError, match=r"texts\[1\] is empty"):
        engine.classify(texts, "eng_Latn")
    with pytest.raises(TypeError, match=r"texts\[1\] is NoneType"):
        engine.encode([LINES[0], None])
    with pytest.raises(TypeError, match="languages is missing"):
        engine.classify(LINES)
    with pytest.raises(ValueError, match="on_bad_text='skip'"):
        engine.encode(LINES, on_bad_text="skip")
    with pytest.raises(ValueError, match=r"no such folder|no config"):
        Engine(str(tmp_path / "absent"))


def test_what_neighbours_call_a_model(stack, capsys, tmp_path) -> None:
    assert stack.device == torch.device("cpu") and stack.dtype == torch.float32
    assert stack.num_parameters() == sum(p.numel() for p in stack.parameters())
    trainable = sum(p.numel() for p in stack.parameters() if p.requires_grad)
    assert 0 < stack.num_parameters(only_trainable=True) == trainable < stack.num_parameters()
    stack.print_trainable_parameters()
    assert f"trainable params: {trainable:,d} || all params: " in capsys.readouterr().out
