"""The fp8 base: rounding of rows, both products against fp64, LoRA over it, teacher and student, what leaves it alone."""

from __future__ import annotations

import copy

import pytest
import torch
from mtllm_fast.kernels.fp8_linear import (
    FP8,
    _quantise_rows,
    dequantised_rows,
    fp8_linear,
    fp8_product,
    quantise_rows,
    reference,
    reference_rows,
    row_scales,
)
from torch import nn

from mtllm_fast import MTLLM, TextRow
from mtllm_fast.losses import DistillationLoss
from mtllm_fast.models.checkpointing import kept_bytes_per_token, recompute_layers
from mtllm_fast.models.frozen import Fp8Linear, dequantised, fp8_backward, fp8_forward, quantize_frozen
from mtllm_fast.models.lora import LoraLinear, fuse_lora
from mtllm_fast.models.merge import merge
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.switches import apply_switches, check_layers
from tests.models.test_lora import layer_of, relative
from tests.tiny import LINES, build_encoder_folder, build_llm_folder
from tests.training.short_runs import optim
from tests.training.test_switches import CPU, WEIGHTS, _batch, _gradient, _student

ROUNDING = 2.0**-4  # of e4m3: half a step of its 3 bits of mantissa
LEAST = 2.0**-10  # half its least number


def rows(count=40, width=48, seed=0):
    """Rows of very different sizes, with large numbers among small ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) * torch.logspace(-6, 6, count)[:, None]
    x[3, 5] *= 3000.0
    x[7:8] = 0.0
    return x


def within(x, q, scale) -> bool:
    """Whether every number is where rounding to nearest leaves it."""
    error = (dequantised_rows(q.view(FP8), scale) - x.double()).abs()
    return bool((error <= torch.maximum(ROUNDING * x.double().abs(), LEAST * scale[:, None].double())).all())


# ---- rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_nearest(dtype) -> None:
    x = (rows() if dtype != torch.float16 else rows().clamp(-6e4, 6e4)).to(dtype)
    q, scale = quantise_rows(x)
    assert q.dtype == torch.uint8 and scale.dtype == torch.float32 and scale.shape == (40,)
    assert within(x, q, scale)
    q = q.view(FP8)
    assert torch.equal(scale, torch.exp2(scale.log2().round()))  # powers of two
    most = q.float().abs().amax(1)
    assert bool((most[scale > 2.0**-126] > 223).all()) and float(most.max()) <= 448
    assert not q[7].float().any()
    # controls: the scales of other rows, or of columns, or the neighbouring number of e4m3
    assert not within(x, q, scale.roll(1))
    assert not within(x, q, row_scales(x.t())[:40])
    assert not within(x, (q.view(torch.uint8) + 1).view(FP8), scale)
    coarse = (x.float() / scale[:, None]).to(torch.float8_e5m2).float().to(FP8)  # a bit of mantissa less
    assert not within(x, coarse, scale)


def test_scales_at_the_edges() -> None:
    most = torch.tensor([448.0, 448.1, 447.9, 224.0, 0.0, 1e-45, 3e38, 1.0, 2.0**-118])
    assert row_scales(most[:, None]).log2().tolist() == [0, 1, 0, -1, -126, -126, 120, -8, -126]
    q, scale = quantise_rows(torch.diag(most) + 0.0)
    assert within(torch.diag(most), q, scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_row_alone(bad) -> None:
    x, (w, scale) = torch.randn(6, 32), quantise_rows(rows(16, 32))
    right = fp8_linear(x, w, scale, fast=True)
    x[2, 9] = bad
    got = fp8_linear(x, w, scale, fast=True)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3, 4, 5]], right[[0, 1, 3, 4, 5]]) and right.isfinite().all()


def test_no_rows_and_one() -> None:
    w, scale = quantise_rows(torch.randn(16, 32))
    assert fp8_linear(torch.randn(0, 32), w, scale, fast=True).shape == (0, 16)
    x = torch.randn(1, 32)
    assert relative(fp8_linear(x, w, scale, fast=True), reference(x, w, scale)) < 2.0**-8


# ---- products


def fp8_layer(width=64, out=96, bias=False, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight.mul_(torch.logspace(-1, 1, out, dtype=dtype)[:, None])
    return layer, Fp8Linear(layer, CPU)


def test_products_are_those_of_rounded_operands() -> None:
    """Against fp64 over the same rounded operands only the sum in fp32 and the result in bf16 are left."""
    layer, fp8 = fp8_layer()
    x, dy = torch.randn(50, 64), torch.randn(50, 96)
    w, scale, wt, scale_t = fp8.weights
    for got, source, weight, s in (
        (fp8_forward(x, w, scale, None), x, w, scale),
        (fp8_backward(dy, wt, scale_t), dy, wt, scale_t),
    ):
        right = reference(source, weight, s)
        assert relative(got, right) < 2.0**-8
        plain = source.double() @ (layer.weight.double().t() if weight is w else layer.weight.double())
        assert 2.0**-8 < relative(got, plain) < ROUNDING  # and rounding is all that is lost against the true weights
        assert relative(reference(source, weight, s.roll(1)), right) > ROUNDING  # controls: scales of others,
        assert relative(torch.zeros_like(got), right) > ROUNDING
        shifted = got.clone()
        shifted[:, -16:] *= 1.05  # a block that is off
        assert relative(shifted, right) > 2.0**-8
    swapped = reference(dy, wt, scale[:64])  # control: the scales of W for Wᵀ
    assert relative(swapped, reference(dy, wt, scale_t)) > ROUNDING


def test_both_copies_have_the_same_numbers() -> None:
    """Powers of two: the backward's weights are the forward's, but where one of them has become 0 or nearly."""
    layer, fp8 = fp8_layer(128, 96)
    w, scale, wt, scale_t = fp8.weights
    own, other = dequantised_rows(w.view(FP8), scale), dequantised_rows(wt.view(FP8), scale_t).t()
    floor = 2.0**-6 * torch.maximum(scale[:, None], scale_t[None])
    assert torch.equal(own[own.abs() >= floor], other[own.abs() >= floor])
    assert float((own.abs() >= floor).float().mean()) > 0.9
    ratio = layer.weight.abs().amax(1) / 448  # control: scales that are no powers of two
    q = (layer.weight / ratio[:, None]).to(FP8)
    assert not torch.equal(dequantised_rows(q, ratio)[own.abs() >= floor], other[own.abs() >= floor])
    assert torch.equal(dequantised(fp8).double(), own)


def test_bias_shapes_dtypes_and_autocast() -> None:
    layer, fp8 = fp8_layer(bias=True)
    x = torch.randn(2, 3, 64)
    flat = fp8(x.view(6, 64))
    assert torch.equal(fp8(x), flat.view(2, 3, 96)) and fp8(x).dtype == torch.float32
    assert relative(flat - layer.bias, reference(x.view(6, 64), fp8.w, fp8.scale)) < 2.0**-8
    with torch.autocast("cpu", torch.bfloat16):
        assert fp8(x).dtype == torch.bfloat16
    assert fp8(x.bfloat16()).dtype == torch.bfloat16
    assert "weight" not in fp8.state_dict() and fp8.weight is None
    moved = copy.deepcopy(fp8).to(torch.bfloat16)  # casting the module leaves the bytes alone, and the scales' values
    assert moved.w.dtype == torch.uint8 and torch.equal(moved.scale.float(), fp8.scale)


@pytest.mark.parametrize(("width", "out"), [(72, 96), (64, 40)])
def test_widths_that_the_hardware_lacks(width, out) -> None:
    layer = nn.Linear(width, out).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"base_weights='fp8': q_proj is {out} x {width}, .* multiples of 16"):
        Fp8Linear(layer, CPU, "q_proj")
    root = nn.ModuleDict({"first": nn.Linear(32, 32), "last": layer}).requires_grad_(False)
    with pytest.raises(ValueError, match="base_weights='fp8': last is"):
        quantize_frozen(root, "fp8", CPU)
    assert type(root["first"]) is nn.Linear  # nothing is replaced by half
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(torch.randn(4, width), *quantise_rows(layer.weight), fast=True)
    with pytest.raises(ValueError, match="do not fit"):
        fp8_linear(torch.randn(4, 32), *quantise_rows(torch.randn(16, 48)), fast=True)


def test_opcheck_and_one_graph() -> None:
    x, (w, scale) = torch.randn(6, 32), quantise_rows(torch.randn(16, 32))
    torch.library.opcheck(_quantise_rows.op, (x,))
    torch.library.opcheck(fp8_product.op, (*quantise_rows(x), w, scale, True))
    ours, _ = lora_over_fp8(width=32, out=48)
    compiled = torch.compile(lambda x: ours(x), backend="aot_eager", fullgraph=True)
    found = []
    for layer in (ours, compiled):
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.sum().backward()
        found.append((y, x.grad))
    torch.testing.assert_close(found[1], found[0])


# ---- LoRA


def lora_over_fp8(width=64, out=96, dropout=0.0, bias=False, dtype=torch.float32):
    """Our layer over fp8, and the same one with a base of fp8's own numbers in fp64."""
    ours = layer_of(width, out, bias=bias, dropout=dropout, dtype=dtype)
    exact = copy.deepcopy(ours).double()
    quantize_frozen(ours, "fp8", CPU)
    assert type(ours.base_layer) is Fp8Linear
    exact.base_layer.weight.data = dequantised(ours.base_layer).double()
    fuse_lora([ours])
    return ours, exact


def gradients(layer, x, direction):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(direction)
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_is_the_rounded_base_and_exact_adapters(bias, dropout) -> None:
    ours, exact = lora_over_fp8(bias=bias, dropout=dropout)
    assert ours._plain_adapter(torch.randn(2, 64)) == "student"
    x, dy = torch.randn(50, 64), torch.randn(50, 96)
    torch.manual_seed(2)
    got = gradients(ours, x, dy)
    torch.manual_seed(2)
    right = gradients(exact, x.double(), dy.double())
    for name in ("y", "x"):
        assert relative(got[name], right[name]) < ROUNDING
    for name in right.keys() - {"y", "x"}:  # they see x and dy as they are
        assert relative(got[name], right[name]) < 1e-5
    # the base's share by itself: the products of rounded operands, as in the reference
    weights = ours.base_layer.weights
    scale = ours.scaling["student"]
    a, b = (part["student"].weight.double() for part in (ours.lora_A, ours.lora_B))
    if not dropout:
        y = reference(x, weights.w, weights.scale) + scale * (x.double() @ a.t() @ b.t())
        y = y if not bias else y + ours.base_layer.bias
        assert relative(got["y"], y) < 2.0**-8
        dx = reference(dy, weights.wt, weights.scale_t) + scale * (dy.double() @ b @ a)
        assert relative(got["x"], dx) < 2.0**-8
        assert relative(dx - scale * (dy.double() @ b @ a), dx) > 2.0**-8  # control: without the adapter's share


def test_lora_is_pefts_over_the_same_base() -> None:
    """peft's own forward calls the base layer; both must be one function, with autocast too."""
    ours, _ = lora_over_fp8()
    theirs = copy.deepcopy(ours)
    theirs._plain_adapter = lambda x: None
    x, dy = torch.randn(50, 64), torch.randn(50, 96)
    right = gradients(theirs, x, dy)
    assert all(relative(value, right[name]) < 1e-5 for name, value in gradients(ours, x, dy).items())
    with torch.autocast("cpu", torch.bfloat16):
        got, right = (layer(x) for layer in (ours, theirs))
    assert got.dtype == right.dtype == torch.bfloat16
    assert relative(got.double(), right.double()) < 2.0**-7
    ours.scaling["student"] *= 1.05  # control
    assert relative(ours(x), theirs(x)) > 1e-3


def test_teacher_and_student_are_one_function() -> None:
    """With B = 0 the student's rows are the teacher's, bit for bit."""
    ours, _ = lora_over_fp8(bias=True)
    nn.init.zeros_(ours.lora_B["student"].weight)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(50, 64)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            student = ours(x)
            ours._disable_adapters = True
            teacher = ours(x)
            ours._disable_adapters = False
            assert student.dtype == dtype and torch.equal(student, teacher)
    ours.lora_B["student"].weight.data[0, 0] = 1.0  # control
    assert not torch.equal(ours(x), teacher.float())


# ---- models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("fp8")
    return build_encoder_folder(where / "encoder"), build_llm_folder(where / "llm", hidden_size=64)


def test_a_model_over_fp8(folders, tmp_path) -> None:
    student = _student(*folders)
    batch = _batch(student)
    plain = _gradient(student, batch)
    reference_model = copy.deepcopy(student)
    apply_switches(student, optim(base_weights="fp8"), CPU)
    bases = {n: m for n, m in student.llm.layers_root.named_modules() if n.endswith(".base_layer")}
    assert len(bases) == 14 and {type(layer) for layer in bases.values()} == {Fp8Linear}
    assert all(type(layer) is LoraLinear for layer in student.llm._tuned)
    held = dict(reference_model.llm.layers_root.named_modules())
    for name, layer in bases.items():
        held[name].weight.data = dequantised(layer)
    got, same_weights = _gradient(student, batch), _gradient(reference_model, batch)

    def distance(mine, right) -> float:
        mine, right = (torch.cat([value.flatten() for value in one.values()]) for one in (mine, right))
        return relative(mine, right)

    assert 0.005 < distance(got, same_weights) < 0.15  # x and dy are rounded, in 14 products
    assert 0.005 < distance(got, plain) < 0.2
    assert distance({n: 1.3 * v for n, v in got.items()}, same_weights) > 0.2  # control
    recompute_layers(student.llm)
    again = _gradient(student, batch)
    assert all(torch.equal(again[name], got[name]) for name in got)
    # the weights stay out of what is saved, and what is saved is read over dense ones
    student.save_pretrained(tmp_path / "model")
    loaded = MTLLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    own = student.state_dict()
    assert all(torch.equal(own[n], p) for n, p in loaded.state_dict().items() if ".lora_" in n or "projection" in n)
    quantize_frozen(loaded.llm.layers_root, "fp8", CPU)
    assert torch.equal(loaded.eval().states(batch.mt), student.eval().states(batch.mt))
    with pytest.raises(ValueError, match="base weights are quantised"):
        merge(student)
    with pytest.raises(ValueError, match="base weights are quantised"):
        student.llm.merge_adapter()


def test_teacher_states_are_the_students_without_adapters(folders) -> None:
    student = _student(*folders)
    batch = _batch(student)
    dense = student.teacher_states(batch.llm)
    quantize_frozen(student.llm.layers_root, "fp8", CPU)
    teacher = student.teacher_states(batch.llm)
    assert 1e-3 < relative(teacher, dense) < 0.1
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            nn.init.zeros_(parameter)
    assert torch.equal(student.llm(batch.llm), teacher)


def test_kept_memory_and_ddp_leave_the_weights_out(folders) -> None:
    step = Stage(_student(*folders), DistillationLoss(WEIGHTS))
    dense, _ = kept_bytes_per_token(step.student.llm)
    apply_switches(step.student, optim(base_weights="fp8"), CPU, step)
    fp8, _ = kept_bytes_per_token(step.student.llm)
    assert fp8 == pytest.approx(dense, rel=0.02)  # the weights are no activations
    left_out = set(step._ddp_params_and_buffers_to_ignore)
    names = {n for n, _ in step.named_buffers() if n.rsplit(".", 1)[-1] in ("w", "wt", "scale", "scale_t")}
    assert names == left_out and len(names) == 4 * 14
    assert all(p.dtype == torch.float32 for p in step.parameters())


def test_refused_before_weights_are_read(folders, tmp_path, monkeypatch) -> None:
    odd = build_llm_folder(tmp_path / "odd", hidden_size=64, intermediate_size=104)
    fp8, dense = optim(base_weights="fp8"), optim()
    check_layers(fp8, "llm", folders[1], None)
    check_layers(dense, "llm", odd, None)
    from mtllm_fast.models import LoraSettings

    check_layers(fp8, "llm", folders[1], LoraSettings(r=5))  # ranks are the adapters' own: any
    check_layers(dense, "encoder", folders[0], LoraSettings())
    with pytest.raises(ValueError, match=r"base_weights='fp8': layers\.0\.mlp\.gate_proj is 104 x 64"):
        check_layers(fp8, "llm", odd, None)
    for role, name in (("llm", folders[1]), ("encoder", folders[0])):
        for targets in ("conv.*", ("conv",), ()):
            with pytest.raises(ValueError, match=r"lora\.target_modules"):
                check_layers(dense, role, name, LoraSettings(target_modules=targets))
        with pytest.raises(ValueError, match=r"lora\.r=0"):
            check_layers(dense, role, name, LoraSettings(r=0))
    from mtllm_fast.training import AdaptConfig, adapt

    monkeypatch.setattr("mtllm_fast.models.loading.load_pretrained", None)  # nothing can be read
    config = AdaptConfig(*folders, output=str(tmp_path / "run"), lora=LoraSettings(target_modules="conv"), train=dense)
    with pytest.raises(ValueError, match=r"lora\.target_modules='conv': matches no linear layer"):
        adapt(config, [TextRow(LINES[0])])
    assert not (tmp_path / "run").exists()


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
)
@pytest.mark.parametrize("shape", [(1, 64, 96), (300, 64, 96), (257, 4096, 1024), (64, 20480, 512)])
def test_the_hardware_gives_the_emulations_numbers(shape) -> None:
    count, width, out = shape
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=False).requires_grad_(False)
    fp8 = Fp8Linear(layer, "cuda")
    own = Fp8Linear(layer, CPU)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(fp8.weights, own.weights))
    x = (torch.randn(count, width) * torch.logspace(-3, 3, count)[:, None]).bfloat16()
    q, scale = quantise_rows(x.cuda())
    assert torch.equal(q.cpu(), reference_rows(x)[0].view(torch.uint8))
    assert torch.equal(scale.cpu(), reference_rows(x)[1])
    for fast in (False, True):
        right = reference(x, own.w, own.scale)
        got = fp8_linear(x.cuda(), fp8.w, fp8.scale, fast=fast).cpu()
        # sums of 14 bits lose up to that for each number that is added
        assert relative(got.double(), right) < (2.0**-6 if fast else 2.0**-8)
    dy = torch.randn(count, out).bfloat16()
    got = fp8_backward(dy.cuda(), fp8.wt, fp8.scale_t).cpu()
    assert relative(got.double(), reference(dy, own.wt, own.scale_t)) < 2.0**-8
    x[0, 0] = torch.nan
    assert fp8_linear(x.cuda(), fp8.w, fp8.scale, fast=True)[0].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
)
def test_a_step_on_a_gpu_is_the_emulations(folders) -> None:
    student = _student(*folders)
    quantize_frozen(student.llm.layers_root, "fp8", CPU)
    batch = _batch(student)
    right = _gradient(student, batch)
    got = _gradient(student.to("cuda"), batch.to("cuda"))
    assert got.keys() == right.keys()
    mine, theirs = (torch.cat([v.cpu().flatten() for v in one.values()]) for one in (got, right))
    assert relative(mine, theirs) < 0.05
