"""Packed attention: the contract, the CPU backends against the reference, and the choice of a backend."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_fast.doctor import attention_backends
from mtllm_fast.models import MTLLM, PackedLLM
from mtllm_fast.models.attention import BACKENDS, AttentionPlan, attention, choose_backend, reference
from mtllm_fast.models.attention.sdpa import ShortHalf, make_buckets, make_runs
from tests.conftest import assert_matches, relative_error
from tests.models.attention_cases import FEATURES, LENGTHS, Features, call, check, inputs, packed

GRID = [pytest.param(lengths, id=name) for name, lengths in LENGTHS.items()]


def named(backend: str):
    """`attention` with the backend `backend`, in the shape that `check` calls."""

    def attend(q, k, v, plan, **options):
        return attention(q, k, v, AttentionPlan(plan.batch, plan.causal, backend), **options)

    return attend


def sees(features: Features, length: int) -> list[list[int]]:
    """Rows that each row of one sequence sees, found by what its output depends on."""
    batch = packed((3, length, 2))
    (q, k, v), _ = inputs(batch, features)
    seen = []
    for row in range(3, 3 + length):
        v.requires_grad_()
        out = reference(q, k, v, batch.lengths, causal=features.causal, scale=0.25, window=features.window)
        (gradient,) = torch.autograd.grad(out[row].sum(), v)
        seen.append([int(i) - 3 for i in gradient.abs().sum((1, 2)).nonzero().flatten()])
    return seen


def test_the_contract_by_behaviour() -> None:
    """Hugging Face's windows: looking back the row itself counts, looking both ways it does not."""
    assert sees(Features(causal=True), 3) == [[0], [0, 1], [0, 1, 2]]
    assert sees(Features(), 3) == [[0, 1, 2]] * 3
    assert sees(Features(causal=True, window=2), 4) == [[0], [0, 1], [1, 2], [2, 3]]
    assert sees(Features(window=1), 4) == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert call(window=2).sides == (1, 0)
    assert call(window=2, causal=False).sides == (2, 2)
    assert call().sides == (None, 0)
    assert call(causal=False).sides == (None, None)


@pytest.fixture(params=["in place", "buckets"])
def layout(request, monkeypatch):
    """Both ways of laying sequences out, whatever their size would choose."""
    monkeypatch.setattr("mtllm_fast.models.attention.sdpa._CALL_BYTES", 0 if request.param == "in place" else 1 << 40)


@pytest.mark.parametrize("features", list(FEATURES.values()), ids=list(FEATURES))
@pytest.mark.parametrize("lengths", GRID)
def test_sdpa(lengths, features, layout) -> None:
    check(named("sdpa"), packed(lengths), features)


@pytest.mark.parametrize("features", [FEATURES[key] for key in ("plain", "causal window soft-cap", "grouped")])
@pytest.mark.parametrize("lengths", [LENGTHS["edges"], LENGTHS["many tiny"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sdpa_in_other_dtypes(dtype, lengths, features, layout) -> None:
    check(named("sdpa"), packed(lengths), features, dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("masked", [None, "bool", "added"])
def test_short_half_has_the_gradients_of_its_formula(masked, causal) -> None:
    """First and second derivatives by differences in float64, and the gradients of torch's own attention."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = normal(2, 4, 5, 3), normal(2, 2, 5, 3), normal(2, 2, 5, 2)
    mask = None
    if masked:
        causal = False  # as torch's attention, it takes one of the two
        mask = (torch.rand(2, 1, 5, 5, generator=generator) < 0.6) | torch.eye(5, dtype=torch.bool)
        mask = mask if masked == "bool" else torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)

    def own(q, k, v, scale=0.7):
        return ShortHalf.apply(q, k, v, mask, causal, scale)

    assert torch.autograd.gradcheck(own, (q, k, v))
    assert torch.autograd.gradgradcheck(own, (q, k, v))
    direction = torch.randn(2, 4, 5, 2, generator=generator, dtype=torch.float64)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=0.7, enable_gqa=True
    )
    right = torch.autograd.grad(torchs, (q, k, v), direction)
    for got, other, want in zip(
        torch.autograd.grad(own(q, k, v), (q, k, v), direction),
        torch.autograd.grad(own(q, k, v, 0.7001), (q, k, v), direction),
        right,
    ):
        assert relative_error(got, want) < 1e-12
        assert relative_error(other, want) > 1e-7  # a scale that is off by a ten-thousandth is seen


@pytest.mark.parametrize("features", list(FEATURES.values()), ids=list(FEATURES))
@pytest.mark.parametrize("lengths", GRID)
def test_flex_forward(lengths, features) -> None:
    check(named("flex"), packed(lengths), features, gradients=False)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 45)),
)
def test_sdpa_on_any_lengths(lengths, causal, window) -> None:
    batch = packed(tuple(lengths))
    features = Features(causal, window, heads=(2, 1), width=8)
    (q, k, v), _ = inputs(batch, features)
    out = attention(q, k, v, AttentionPlan(batch, causal), window=window)
    expected = reference(q, k, v, batch.lengths, causal=causal, scale=8**-0.5, window=window)
    assert out.shape == expected.shape
    if batch.num_tokens:
        assert_matches(out, expected, 1e-12)


@pytest.mark.parametrize(
    ("features", "wrong"),
    [
        (Features(causal=True, window=20), {"window": 21}),
        (Features(causal=True, window=20), {"window": 19}),
        (Features(window=20), {"window": 21}),
        (Features(softcap=2.0), {"softcap": 2.2}),
        (Features(), {"scale": 0.26}),
        (Features(causal=True), {"causal": False}),
        (Features(), {"lengths": (195,)}),
    ],
)
def test_the_comparison_notices(features, wrong) -> None:
    """A window off by one, another cap or scale, a look ahead or into the next sequence fails the comparison."""
    wrong = dict(wrong)
    lengths = wrong.pop("lengths", None)

    def attend(q, k, v, plan, **options):
        batch = packed(lengths) if lengths else plan.batch
        changes = {**options, **wrong}
        return attention(q, k, v, AttentionPlan(batch, changes.pop("causal", plan.causal)), **changes)

    with pytest.raises(AssertionError, match="relative_error"):
        check(attend, packed(LENGTHS["edges"]), features)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_windows_about_as_long_as_a_sequence(backend, causal) -> None:
    """A window of length - 1 still hides the first row from the last (causal); one of the length hides nothing."""
    for lengths in ((12,), (12, 11, 5, 12), (3, 2, 1)):
        batch = packed(lengths)
        q, k, v = (x.float() for x in inputs(batch, Features())[0])
        for window in sorted({max(n + d, 1) for n in lengths for d in (-2, -1, 0, 1)}):
            out = attention(q, k, v, AttentionPlan(batch, causal, backend), window=window)
            expected = reference(q.double(), k.double(), v.double(), lengths, causal=causal, scale=0.25, window=window)
            assert_matches(out.double(), expected, 1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_exclusive_windows_count_the_row_itself_both_ways(backend, causal) -> None:
    batch = packed((12, 5, 1))
    q, k, v = (x.float() for x in inputs(batch, Features())[0])
    for window in (1, 2, 6):
        out = attention(q, k, v, AttentionPlan(batch, causal, backend, exclusive=True), window=window)
        pieces = []
        for q_s, k_s, v_s in zip(*(x.split(batch.lengths) for x in (q, k, v))):  # Gemma 3: |i - j| < w
            apart = torch.arange(len(q_s))[:, None] - torch.arange(len(q_s))
            hidden = (apart < 0) | (apart >= window) if causal else apart.abs() >= window
            scores = (torch.einsum("ihd,jhd->hij", q_s, k_s) / 4).masked_fill(hidden, -torch.inf)
            pieces.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v_s))
        assert_matches(out, torch.cat(pieces), 1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_another_scale(backend, softcap) -> None:
    batch = packed((12, 5, 1))
    q, k, v = (x.float() for x in inputs(batch, Features())[0])
    out = attention(q, k, v, AttentionPlan(batch, True, backend), scale=0.1, softcap=softcap)
    expected = reference(*(x.double() for x in (q, k, v)), batch.lengths, causal=True, scale=0.1, softcap=softcap)
    assert_matches(out.double(), expected, 1e-5)


def test_what_is_not_finite_stays_in_its_sequence(layout) -> None:
    """Padding must not read another sequence: 0 times NaN is NaN."""
    batch = packed((9, 8, 3, 9))
    q, k, v = (x.float() for x in inputs(batch, Features())[0])
    for x in (q, k, v):
        x[17:20] = torch.nan
    out = attention(q, k, v, AttentionPlan(batch, False, "sdpa"))
    kept = torch.ones(29, dtype=torch.bool)
    kept[17:20] = False
    assert out[17:20].isnan().all()
    expected = reference(*(x[kept] for x in (q, k, v)), (9, 8, 9), causal=False, scale=0.25)
    assert_matches(out[kept], expected, 1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_layers_of_one_plan_keep_their_own_caps_and_windows(backend) -> None:
    """What one layer leaves in the plan is not taken for a layer with another soft-cap or window."""
    batch = packed((12, 5, 9))
    plan = AttentionPlan(batch, True, backend)
    q, k, v = (x.float() for x in inputs(batch, Features())[0])
    seen = []
    for softcap, window in ((2.0, None), (5.0, None), (None, 4), (5.0, 4), (2.0, 3), (None, None), (2.0, None)):
        out = attention(q, k, v, plan, softcap=softcap, window=window)
        expected = reference(
            *(x.double() for x in (q, k, v)), batch.lengths, causal=True, scale=0.25, window=window, softcap=softcap
        )
        assert_matches(out.double(), expected, 1e-5)
        seen.append(out)
    assert torch.equal(seen[-1], seen[0])
    for one in range(len(seen) - 1):  # control: they are all different
        assert all(relative_error(seen[one], other) > 1e-3 for other in seen[:one])


def test_buckets_leave_ordered_rows_where_they_are() -> None:
    cpu = torch.device("cpu")
    assert make_buckets((4, 4, 4), cpu).rows is None
    assert make_buckets((90, 90, 20, 20, 4), cpu).rows is None
    assert make_buckets((4, 90), cpu).rows is not None
    many = make_buckets((7,) * 500 + (6,) * 500, cpu)
    assert many.shapes == [(1000, 7)]
    assert make_buckets(tuple(range(5, 500)), cpu).shapes[0][0] > 50
    assert make_runs((7, 7, 3, 7)).shapes == [(2, 7), (1, 3), (1, 7)]


def test_empty_and_wrong_inputs() -> None:
    empty = packed((0, 0))
    q = torch.zeros(0, 2, 8, requires_grad=True)
    out = attention(q, q, q, AttentionPlan(empty, True))
    assert out.shape == (0, 2, 8)
    out.sum().backward()
    assert q.grad.shape == q.shape
    plan = AttentionPlan(packed((3,)), True)
    good, bad = torch.zeros(3, 4, 8), torch.zeros(3, 3, 8)
    with pytest.raises(ValueError, match="no multiple"):
        attention(good, bad, bad, plan)
    with pytest.raises(ValueError, match=r"\(T, H, d\)"):
        attention(good, good[..., :4], good, plan)
    with pytest.raises(ValueError, match="2 rows, the plan's batch has 3"):
        attention(good[:2], good[:2], good[:2], plan)
    with pytest.raises(ValueError, match="one dtype"):
        attention(good, good.double(), good, plan)
    with pytest.raises(ValueError, match="window=0"):
        attention(good, good, good, plan, window=0)


def test_values_may_be_narrower() -> None:
    batch = packed((5, 1, 9))
    (q, k, v), _ = inputs(batch, Features())
    out = attention(q, k, v[..., :4], AttentionPlan(batch, True))
    assert_matches(out, reference(q, k, v[..., :4], batch.lengths, causal=True, scale=0.25), 1e-12)


def test_autocast_decides_the_dtype() -> None:
    batch = packed((5, 9))
    q, k, v = (x.float() for x in inputs(batch, Features())[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k.bfloat16(), v, AttentionPlan(batch, False)).dtype == torch.bfloat16


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_dropout_of_sdpa(softcap) -> None:
    """Dropped weights are scaled up, so that outputs keep their mean; without dropout nothing is random."""
    torch.manual_seed(0)
    batch = packed((40, 30, 7) * 4)
    q, k = (x.float() for x in inputs(batch, Features())[0][:2])
    ones = torch.ones_like(k)
    plan = AttentionPlan(batch, False)
    out = attention(q, k, ones, plan, dropout=0.25, softcap=softcap)
    assert abs(float(out.mean()) - 1) < 0.03
    assert float(out.std()) > 0.05
    assert relative_error(attention(q, k, ones, plan, softcap=softcap), torch.ones_like(out)) < 1e-6


def test_a_named_backend_is_never_replaced() -> None:
    with pytest.raises(ValueError, match=r"'varlen' cannot serve this call.*varlen runs on CUDA only"):
        choose_backend(call(), "varlen")
    with pytest.raises(ValueError, match="flex has no backward pass on the CPU"):
        choose_backend(call(needs_grad=True), "flex")
    with pytest.raises(ValueError, match="flex has no dropout"):
        choose_backend(call(dropout=0.1), "flex")
    with pytest.raises(ValueError, match=r"flash_attn_3, .*flash_attn_2: runs on CUDA only"):
        choose_backend(call(), "flash_attn")
    with pytest.raises(ValueError, match="'nonsense': expected one of flash_attn, "):
        choose_backend(call(), "nonsense")
    assert choose_backend(call(), "flex").name == "flex"
    assert choose_backend(call()).name == "sdpa"


def test_the_choice_is_logged_once(caplog) -> None:
    choose_backend.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="mtllm_fast"):
        for _ in range(3):
            choose_backend(call(window=7))
    (record,) = caplog.records
    assert record.getMessage().startswith("packed attention: sdpa for cpu, float32, head size 64, causal, window 7")
    assert "varlen, flash_attn_2, xformers: runs on CUDA only" in record.getMessage()


def test_models_take_a_name(encoder_folder, llm_folder) -> None:
    model = MTLLM.stack(encoder_folder, llm_folder, attention="sdpa").eval()
    assert model.encoder.attention == model.llm.attention == model.attention == "sdpa"
    batch = packed((5, 3))
    model.attention = None
    with torch.no_grad():
        expected = model.llm(batch)
        model.attention = "flex"
        assert_matches(model.llm(batch), expected, 1e-5)
        assert_matches(model.encoder(batch), model.encoder(batch, AttentionPlan(batch, False, "sdpa")), 1e-5)
        model.attention = "varlen"
        with pytest.raises(ValueError, match="varlen runs on CUDA only"):
            model.llm(batch)
        with pytest.raises(ValueError, match="varlen runs on CUDA only"):
            model.encoder(batch)
    with pytest.raises(ValueError, match="attention='fast'"):
        model.attention = "fast"
    assert model.attention == "varlen"
    with pytest.raises(ValueError, match="attention='fast'"):
        PackedLLM.from_pretrained(llm_folder, attention="fast")


def test_the_doctor_lists_every_backend() -> None:
    checks = {check.name: check for check in attention_backends()}
    assert list(checks) == list(BACKENDS)
    assert checks["sdpa"].works
    assert all(check.reason for check in checks.values())
    if not torch.cuda.is_available():
        assert [name for name, check in checks.items() if check.works] == ["flex", "sdpa"]
        assert checks["varlen"].reason == "runs on CUDA only"
