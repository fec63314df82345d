"""The backends that need CUDA or a package, without either: argument mapping, refusals, and equality of masks."""

from __future__ import annotations

import sys
from functools import partial
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mtllm_fast.models.attention import BACKENDS, AttentionPlan, choose_backend, varlen
from mtllm_fast.models.attention.flex import BLOCK, block_table, make_block_mask
from tests.models import attention_cases
from tests.models.attention_cases import FEATURES, LENGTHS, Features, check, packed

GRID = [pytest.param(lengths, id=name) for name, lengths in LENGTHS.items()]
CUDA = torch.device("cuda")


def documented_attention(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, left: int | None, right: int | None, cap: float
) -> Tensor:
    """What the FlashAttention packages document: row i attends to keys i - left to i + right, both included."""
    assert cu.dtype == torch.int32
    bounds = cu.tolist()
    assert all(first < last for first, last in pairwise(bounds)), "an empty sequence reached the kernel"
    group = q.shape[1] // k.shape[1]
    rows = []
    for first, last in pairwise(bounds):
        for i in range(first, last):
            low = first if left is None else max(first, i - left)
            high = last - 1 if right is None else min(last - 1, i + right)
            keys = k[low : high + 1].repeat_interleave(group, 1)
            values = v[low : high + 1].repeat_interleave(group, 1)
            scores = (keys * q[i]).sum(-1) * scale
            if cap > 0:
                scores = cap * torch.tanh(scores / cap)
            rows.append((scores.softmax(0)[..., None] * values).sum(0))
    return torch.stack(rows)


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    assert dropout_p == 0.0
    left, right = (None if side == -1 else side for side in window_size)
    right = 0 if causal else right
    return documented_attention(q, k, v, cu_seqlens_q, softmax_scale, left, right, softcap)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_2(q, k, v, *bounds, 0.0, softmax_scale, causal, window_size, softcap)


def flash_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
    seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
):  # fmt: skip
    assert -1 not in window_size
    left, right = window_size
    right = 0 if causal else right
    out = documented_attention(q, k, v, cu_seqlens_q, softmax_scale, left, right, softcap)
    return out, None


def torch_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("key has other heads than query")
    return flash_2(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, window_size=window_size)


FAKES = {
    "flash_attn_2": ("flash_attn", flash_2),
    "flash_attn_3": ("flash_attn_interface", flash_3),
    "flash_attn_4": ("flash_attn.cute", flash_4),
}


@pytest.fixture
def fake(monkeypatch):
    """Put stand-ins for the packages of these backends on the path, and no others."""

    def install(*names: str) -> None:
        for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers", "xformers.ops"):
            monkeypatch.setitem(sys.modules, module, None)
        for name in names:
            module, function = FAKES[name]
            stand_in = ModuleType(module)
            stand_in.flash_attn_varlen_func = function
            monkeypatch.setitem(sys.modules, module, stand_in)
            if module == "flash_attn.cute" and sys.modules["flash_attn"] is None:
                monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        choose_backend.cache_clear()

    yield install
    choose_backend.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that the GPU has this compute capability."""

    def pretend(major: int, minor: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        choose_backend.cache_clear()

    return pretend


call = partial(attention_cases.call, device=CUDA, dtype=torch.bfloat16, head_dim=128, value_dim=128)
VARLEN = ("varlen", "varlen of torch 2.11")  # it has no soft-cap: `test_refusals_say_why` shows that it refuses one


@pytest.mark.parametrize(
    ("backend", "features"),
    [
        (backend, features)
        for backend in (*FAKES, *VARLEN)
        for features in FEATURES.values()
        if features.width == 16 and (features.softcap is None or backend not in VARLEN)
    ],
)
@pytest.mark.parametrize("lengths", [(0, 1, 9, 12, 0, 3), (30, 1, 2)])
def test_flash_packages_get_what_they_document(backend, lengths, features, fake, monkeypatch) -> None:
    """Output and gradients through each package's documented arguments are the reference's."""
    if backend.startswith("varlen"):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
        if backend != "varlen":  # without enable_gqa
            options = frozenset({"scale", "window_size"})
            monkeypatch.setattr("mtllm_fast.models.attention.varlen.options", lambda: options)
            backend = "varlen"
    else:
        fake(backend)
    features = features._replace(window=features.window and min(features.window, 5))

    def attend(q, k, v, plan, *, scale, window, softcap):
        asked = call(
            device=q.device, dtype=q.dtype, heads=q.shape[1], kv_heads=k.shape[1], head_dim=16, value_dim=16,
            causal=plan.causal, scale=scale, window=window, softcap=softcap, needs_grad=True,
        )  # fmt: skip
        return BACKENDS[backend].attend(q, k, v, plan, asked)

    check(attend, packed(lengths), features)


@pytest.mark.parametrize(
    ("release", "right"),
    [("refuses groups", False), ("takes groups", True), ("means others", False), ("knows enable_gqa", True)],
)
def test_grouped_heads_of_a_torch_without_the_flag_are_tried_once(release, right, monkeypatch) -> None:
    calls = []

    def silent(query, key, value, *arguments, **options):
        calls.append(key.shape[1])
        if release == "refuses groups":
            return torch_varlen(query, key, value, *arguments, **options)
        if release == "means others" and key.shape[1] < query.shape[1]:
            key, value = (x.repeat(1, query.shape[1] // x.shape[1], 1) for x in (key, value))
        return torch_varlen(query, key, value, *arguments, enable_gqa=True, **options)

    known = {"scale", "window_size"} | ({"enable_gqa"} if release == "knows enable_gqa" else set())
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", silent)
    monkeypatch.setattr(varlen, "options", lambda: frozenset(known))
    varlen.takes_groups.cache_clear()
    with torch.no_grad():
        assert [varlen.takes_groups(torch.device("cpu")) for _ in range(2)] == [right, right]
    varlen.takes_groups.cache_clear()
    assert len(calls) == {"refuses groups": 1, "knows enable_gqa": 0}.get(release, 2)


def test_flash_2_passes_dropout_on(fake, monkeypatch) -> None:
    fake("flash_attn_2")
    seen = {}
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", lambda q, k, v, **kw: seen.update(kw) or q)
    q = torch.zeros(3, 4, 16)
    BACKENDS["flash_attn_2"].attend(q, q, q, AttentionPlan(packed((3,)), True), call(dropout=0.2, head_dim=16))
    assert seen["dropout_p"] == 0.2


@pytest.mark.parametrize(
    ("capability", "installed", "changes", "expected"),
    [
        (9, ("flash_attn_2", "flash_attn_3", "flash_attn_4"), {}, "flash_attn_3"),
        (9, ("flash_attn_2", "flash_attn_4"), {}, "flash_attn_4"),
        (10, ("flash_attn_2", "flash_attn_3", "flash_attn_4"), {}, "flash_attn_4"),
        (10, ("flash_attn_4",), {"head_dim": 80, "value_dim": 80}, "varlen"),
        (10, ("flash_attn_4",), {"softcap": 30.0}, "flash_attn_4"),
        (10, ("flash_attn_2", "flash_attn_4"), {"softcap": 30.0, "needs_grad": True}, "flash_attn_2"),
        (8, ("flash_attn_2",), {}, "varlen"),
        (8, ("flash_attn_2",), {"softcap": 30.0}, "flash_attn_2"),
        (8, ("flash_attn_2",), {"dropout": 0.1}, "flash_attn_2"),
        (8, ("flash_attn_2",), {"dropout": 0.1, "softcap": 30.0}, "sdpa"),
        (8, ("flash_attn_2",), {"head_dim": 20, "value_dim": 20}, "flash_attn_2"),
        (8, (), {}, "varlen"),
        (8, ("flash_attn_3", "flash_attn_4"), {}, "varlen"),
        (8, (), {"softcap": 30.0}, "sdpa"),
        (8, (), {"dtype": torch.float32}, "sdpa"),
        (8, (), {"head_dim": 512, "value_dim": 512}, "sdpa"),
        (8, (), {"value_dim": 64}, "sdpa"),
        (7, ("flash_attn_2",), {}, "sdpa"),
    ],
)
def test_choice_by_gpu_packages_and_features(capability, installed, changes, expected, fake, gpu) -> None:
    fake(*installed)
    gpu(capability)
    assert choose_backend(call(**changes)).name == expected


@pytest.mark.parametrize(
    ("backend", "capability", "changes", "reason"),
    [
        ("varlen", 7, {}, r"needs compute capability 8.0, this GPU has 7.0"),
        ("varlen", 8, {"dtype": torch.float32}, "takes float16 and bfloat16, not float32"),
        ("varlen", 8, {"head_dim": 100}, "multiples of 8, not 100"),
        ("varlen", 8, {"head_dim": 264, "value_dim": 264}, "heads up to 256, not 264"),
        ("varlen", 8, {"value_dim": 64}, "values as wide as keys, not 64 and 128"),
        ("varlen", 8, {"softcap": 5.0}, "has no soft-cap"),
        ("varlen", 8, {"dropout": 0.1}, "has no dropout"),
        ("flash_attn_2", 8, {"dropout": 0.1, "softcap": 5.0}, "no dropout together with a soft-cap"),
        ("flash_attn_3", 8, {}, "needs compute capability 9.0"),
        ("flash_attn_3", 10, {}, "no kernels for compute capability 10.0"),
        ("flash_attn_3", 9, {"dropout": 0.1}, "has no dropout"),
        ("flash_attn_4", 8, {}, "needs compute capability 9.0"),
        ("flash_attn_4", 9, {"head_dim": 256, "value_dim": 256}, "head sizes 64, 96 and 128, not 256"),
        ("flash_attn_4", 9, {"softcap": 5.0, "needs_grad": True}, "no backward pass with a soft-cap"),
        ("flash_attn_4", 9, {"window": 5, "needs_grad": True}, "backward pass with a window"),
        ("flash_attn_4", 9, {"dropout": 0.1}, "has no dropout"),
        ("flex", 9, {"dropout": 0.1}, "has no dropout"),
        ("flex", 9, {"dtype": torch.float64}, "not float64"),
        ("flex", 9, {"head_dim": 8}, "heads of at least 16, not 8"),
    ],
)
def test_refusals_say_why(backend, capability, changes, reason, fake, gpu) -> None:
    fake(*FAKES)
    gpu(capability)
    with pytest.raises(ValueError, match=f"attention={backend!r} cannot serve this call .*{backend} .*{reason}"):
        choose_backend(call(**changes), backend)


def test_varlen_of_an_older_torch(gpu, monkeypatch) -> None:
    gpu(8)
    module = "mtllm_fast.models.attention.varlen.options"
    monkeypatch.setattr(module, lambda: frozenset({"scale", "window_size"}))
    assert choose_backend(call(), "varlen").name == "varlen"
    assert choose_backend(call(kv_heads=2), "varlen").name == "varlen"
    choose_backend.cache_clear()
    monkeypatch.setattr(module, lambda: frozenset({"is_causal"}))
    with pytest.raises(ValueError, match="varlen_attn has no scale and window_size"):
        choose_backend(call(), "varlen")


def test_missing_and_broken_packages(fake, gpu, monkeypatch) -> None:
    fake()
    gpu(9)
    with pytest.raises(
        ValueError, match=r"flash_attn_3 is not installed \(built from.*flash_attn_2 is not installed \(pip"
    ):
        choose_backend(call(), "flash_attn")
    with pytest.raises(ValueError, match=r"xformers is not installed \(.*extra `xformers`"):
        choose_backend(call(), "xformers")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    with pytest.raises(ValueError, match=r"flash_attn_3 cannot be imported: .*flash_attn_varlen_func"):
        choose_backend(call(), "flash_attn_3")


def visible_pairs(lengths: tuple[int, ...], features: Features) -> Tensor:
    """(T, T) bool, written out pair by pair."""
    window = sum(lengths) if features.window is None else features.window

    def seen(i: int, j: int) -> bool:
        return 0 <= i - j < window if features.causal else abs(i - j) <= window

    blocks = [[[seen(i, j) for j in range(length)] for i in range(length)] for length in lengths if length]
    return torch.block_diag(*map(torch.tensor, blocks)).bool()


MASKS = [Features(causal, window) for causal in (False, True) for window in (None, 1, 20, 400)]


@pytest.mark.parametrize("features", MASKS)
@pytest.mark.parametrize("lengths", GRID)
def test_flex_mask(lengths, features) -> None:
    """The mask function is the reference's mask, and the table of blocks hides no visible pair."""
    total = sum(lengths)
    expected = visible_pairs(lengths, features)
    mask = make_block_mask(AttentionPlan(packed(lengths), features.causal), features.window)
    rows = torch.arange(total)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.mask_mod(zero, zero, rows[:, None], rows[None]), expected)
    partial, full = (torch.from_numpy(x) for x in block_table(tuple(n for n in lengths if n), *features[:2]))
    assert not bool((partial & full).any())
    blocks = -(-total // BLOCK)
    padded = torch.zeros(blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[:total, :total] = expected
    tiles = padded.view(blocks, BLOCK, blocks, BLOCK)
    assert torch.equal(full, tiles.all(3).all(1))
    assert bool((partial | full)[tiles.any(3).any(1)].all())
    assert torch.equal(mask.to_dense()[0, 0].bool(), partial | full)


@pytest.mark.parametrize(
    "features", [Features(causal, window) for causal in (False, True) for window in (254, 255, 256)]
)
def test_flex_mask_at_windows_that_end_with_a_block(features) -> None:
    test_flex_mask((512, 300), features)


@pytest.mark.parametrize("features", [f for f in MASKS if f.causal or f.window is None])
@pytest.mark.parametrize("lengths", GRID)
def test_xformers_mask(lengths, features) -> None:
    """The bias object that xformers gets stands for exactly the reference's mask."""
    pytest.importorskip("xformers")
    from mtllm_fast.models.attention.xformers import make_bias

    total = sum(lengths)
    plan = AttentionPlan(packed(lengths), features.causal)
    bias = make_bias(plan, features.window).materialize((total, total))
    expected = visible_pairs(lengths, features)
    assert torch.equal(bias == 0, expected) and bool(torch.isneginf(bias[~expected]).all())


@pytest.fixture
def xformers_ops(monkeypatch):
    """xformers with an operator that does what its documentation says, on the CPU."""
    ops = pytest.importorskip("xformers.ops")

    def documented(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.shape[0] == 1 and query.shape[2] == key.shape[2] and p == 0.0
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
        mask = attn_bias.materialize(tuple(scores.shape), scores.dtype)
        return torch.einsum("bhij,bjhd->bihd", (scores + mask).softmax(-1), value)

    monkeypatch.setattr(ops, "memory_efficient_attention", documented)
    for kernel in (ops.fmha.flash.FwOp, ops.fmha.cutlass.FwOp):
        monkeypatch.setattr(kernel, "is_available", lambda: True)
    choose_backend.cache_clear()
    return ops


@pytest.mark.parametrize("features", [f for f in FEATURES.values() if f.softcap is None and (f.causal or not f.window)])
@pytest.mark.parametrize("lengths", [LENGTHS["edges"], LENGTHS["many tiny"]])
def test_xformers_gets_what_it_documents(lengths, features, xformers_ops) -> None:
    def attend(q, k, v, plan, *, scale, window, softcap):
        asked = call(
            device=q.device, dtype=q.dtype, heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[2],
            value_dim=v.shape[2], causal=plan.causal, scale=scale, window=window, needs_grad=True,
        )  # fmt: skip
        return BACKENDS["xformers"].attend(q, k, v, plan, asked)

    check(attend, packed(lengths), features)


@pytest.mark.parametrize(
    ("capability", "changes", "reason"),
    [
        (8, {}, None),
        (7, {}, None),
        (8, {"dtype": torch.float32}, None),
        (8, {"dropout": 0.1}, None),
        (8, {"window": 5}, None),
        (8, {"window": 5, "causal": False}, "has no window that looks both ways"),
        (8, {"softcap": 5.0}, "has no soft-cap"),
        (8, {"dtype": torch.float64}, "not float64"),
        (8, {"head_dim": 12, "value_dim": 12}, "multiples of 8 in bfloat16, not 12"),
        (8, {"head_dim": 12, "value_dim": 12, "dtype": torch.float32}, None),
        (8, {"value_dim": 64}, "values as wide as keys"),
        (10, {}, None),
        (10, {"dtype": torch.float32}, "no kernel for float32 with head size 128 on this GPU"),
        (5, {}, "needs compute capability 6.0"),
    ],
)
def test_what_xformers_serves(capability, changes, reason, xformers_ops, gpu) -> None:
    gpu(capability)
    if reason is None:
        assert choose_backend(call(**changes), "xformers").name == "xformers"
    else:
        with pytest.raises(ValueError, match=f"xformers .*{reason}"):
            choose_backend(call(**changes), "xformers")
