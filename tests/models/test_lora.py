"""LoRA as one op against peft's own layer: values, gradients, what falls back to peft, and what stays peft's."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from mtllm_fast.models.lora import LoraLinear, fuse_lora


def layer_of(width=24, out=40, rank=4, bias=True, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    base = nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    layer = PeftLinear(base, "student", config=config, r=rank, lora_alpha=2 * rank, lora_dropout=dropout).to(dtype)
    nn.init.normal_(layer.lora_B["student"].weight, std=0.3)
    return layer


def both(**options):
    theirs = layer_of(**options)
    ours = copy.deepcopy(theirs)
    fuse_lora([ours])
    assert type(ours) is LoraLinear
    return ours, theirs


def run(layer, x, direction):
    x = x.clone().requires_grad_()
    for weight in layer.parameters():
        weight.grad = None
    y = layer(x)
    y.backward(direction)
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: weight.grad for name, weight in layer.named_parameters() if weight.requires_grad}


def error(got, right):
    assert got.keys() == right.keys() and len(got) == 4
    return {name: float((got[name].double() - right[name]).norm() / right[name].norm()) for name in got}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 1, 3)])
def test_equals_peft(bias, shape) -> None:
    ours, theirs = both(bias=bias)
    x, direction = torch.randn(*shape, 24, dtype=torch.float64), torch.randn(*shape, 40, dtype=torch.float64)
    right = run(theirs, x, direction)
    assert max(error(run(ours, x, direction), right).values()) < 1e-10
    ours.scaling["student"] *= 1 + 1e-6  # the tolerance would show a scale that is off by a millionth
    assert max(error(run(ours, x, direction), right).values()) > 1e-8


def test_strided_rows() -> None:
    ours, theirs = both()
    x, direction = torch.randn(9, 3, 24, dtype=torch.float64)[:, 1], torch.randn(9, 40, dtype=torch.float64)
    assert max(error(run(ours, x, direction), run(theirs, x, direction)).values()) < 1e-10


def test_dropout_draws_the_same_numbers() -> None:
    ours, theirs = both(dropout=0.4)
    x, direction = torch.randn(50, 24, dtype=torch.float64), torch.randn(50, 40, dtype=torch.float64)
    torch.manual_seed(3)
    right = run(theirs, x, direction)
    torch.manual_seed(3)
    assert max(error(run(ours, x, direction), right).values()) < 1e-10
    torch.manual_seed(4)
    assert max(error(run(ours, x, direction), right).values()) > 1e-2
    ours.eval(), theirs.eval()
    assert max(error(run(ours, x, direction), run(theirs, x, direction)).values()) < 1e-10


def test_autocast_is_as_near_as_peft() -> None:
    """bf16 autocast over fp32 weights: against fp64, no error is more than a tenth above peft's own."""
    exact = layer_of(width=256, out=192)
    ours, theirs = both(width=256, out=192, dtype=torch.float32)
    for layer in (ours, theirs):
        layer.load_state_dict(exact.state_dict())
    x, direction = torch.randn(512, 256), torch.randn(512, 192)
    right = run(exact, x.double(), direction.double())
    errors = []
    for layer in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16

        def cast(x, layer=layer):
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x)

        shell = nn.Module()
        shell.forward, shell.layer = cast, layer
        found = run(shell, x, direction.bfloat16())
        errors.append(error({name.removeprefix("layer."): value for name, value in found.items()}, right))
    mine, its = errors
    for name in its:
        assert mine[name] <= 1.1 * its[name], (name, mine, its)
        assert its[name] > 1e-4  # bf16 was really used


def test_autocast_leaves_float64() -> None:
    """As torch does; a layer in float64 that reads float32 is peft's, which says what does not fit."""
    ours, theirs = both()
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.float64
        assert relative(ours(x), theirs(x)) < 1e-12
        assert ours._plain_adapter(x.float()) is None


def test_the_dropout_layer_says_whether_it_drops() -> None:
    ours, theirs = both(dropout=0.4)
    x = torch.randn(5, 24, dtype=torch.float64)
    for layer in (ours, theirs):
        layer.lora_dropout["student"].eval()  # alone, the layer around it still trains
    assert ours.training
    assert relative(ours(x), theirs(x)) < 1e-12
    ours.lora_dropout["student"].train()
    assert relative(ours(x), theirs(x)) > 1e-3


def relative(got, right) -> float:
    return float((got - right).detach().norm() / right.detach().norm())


def test_second_derivatives_and_torch_func() -> None:
    ours, _ = both()
    a, b = ours.lora_A["student"].weight, ours.lora_B["student"].weight
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)

    def of(x, a, b):
        return torch.func.functional_call(ours, {"lora_A.student.weight": a, "lora_B.student.weight": b}, (x,))

    assert torch.autograd.gradcheck(of, (x, a, b))
    assert torch.autograd.gradgradcheck(of, (x, a, b))
    gradient = torch.func.grad(lambda x: of(x, a, b).square().sum())(x.detach())
    of(x, a, b).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_what_is_more_than_plain_is_pefts() -> None:
    """Each of these would be wrong, or skip what a user asked for, in the fused forward."""
    x, direction = torch.randn(6, 24, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    ours, theirs = both()
    assert ours._plain_adapter(x) == "student"
    seen = []
    handle = ours.base_layer.register_forward_hook(lambda *_: seen.append(1))
    ours(x)
    handle.remove()
    assert seen == [1]
    for layer in (ours, theirs):
        layer._disable_adapters = True
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x), ours.base_layer(x))
    for layer in (ours, theirs):
        layer._disable_adapters = False
        layer.merge()
    assert torch.equal(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer.unmerge()
        layer.update_layer("other", r=2, lora_alpha=8, config=LoraConfig(r=2, lora_alpha=8))
        layer.to(torch.float64)
        nn.init.constant_(layer.lora_B["other"].weight, 0.1)
        layer.lora_A["other"].weight.data.fill_(0.2)
        layer.set_adapter(["student", "other"])
    assert ours._plain_adapter(x) is None
    assert torch.equal(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer.set_adapter(["student"])
        layer.base_layer.weight.requires_grad_()
    assert ours._plain_adapter(x) is None
    ours(x).backward(direction)
    assert ours.base_layer.weight.grad is not None
    mixed, theirs = both(dtype=torch.float32)
    for layer in (mixed, theirs):
        layer.base_layer.to(torch.bfloat16)
    assert torch.equal(mixed(x.bfloat16()), theirs(x.bfloat16()))
    dora = PeftLinear(
        nn.Linear(24, 40), "student", config=LoraConfig(use_dora=True, r=4), r=4, lora_alpha=4, use_dora=True
    )
    fuse_lora([dora])
    assert dora._plain_adapter(x) is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_into_one_graph(dropout) -> None:
    ours, _ = both(dropout=dropout, dtype=torch.float32)
    compiled = torch.compile(lambda x: ours(x), backend="aot_eager", fullgraph=True)
    found = []
    for layer in (ours, compiled):
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(0)
        y = layer(x)
        y.sum().backward()
        found.append((y, x.grad))
    torch.testing.assert_close(found[1], found[0])


def test_models_have_it(llm_folder) -> None:
    from mtllm_fast.models import MTLLM
    from mtllm_fast.models.adapters import LoraSettings

    model = MTLLM.stack(None, llm_folder, reader="llm", lora=LoraSettings(r=4))
    tuned = model.llm._tuned
    assert tuned and all(type(layer) is LoraLinear for layer in tuned)
    assert all(isinstance(layer, PeftLinear) for layer in tuned)
