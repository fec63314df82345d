"""The ladder on tiny models: every rung that runs here is correct, wrong ones get no speed, the GPU's climb goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.cases.lora import SharedLora
from benchmarks.cases.steps import exact, make
from benchmarks.common import Record
from benchmarks.studies import ladder
from benchmarks.studies.ladder import ALONE, CLIMBS, SIZES, climb, run_cpu
from benchmarks.studies.ladder_rungs import Rung, forward_backward, gate, missing, prepare, reference
from mtllm_fast.models.frozen import Fp8Linear, quantize_frozen

TINY = SIZES["quick"]["tiny"]
# compiling and the quantised rungs have tests of their own
QUICK = [r for r in ALONE if not r.switches.get("compile") and r.base in ("auto", "bf16") and "optim" not in r.switches]
RECORD = Record("ladder", {"B": 1}, "bf16", "NVIDIA H200", "plain", "pass", time_ms=1.0)


def tiny(**changes):
    return make(**{**TINY, **changes}, dtype=torch.float32, device="cpu")


def test_rungs_are_correct_and_measured(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(ladder, "apart", lambda method, function, *args: function(*args))
    records = run_cpu("tiny", QUICK, 1, lambda line: None, TINY)
    assert [r.variant for r in records] == [r.name for r in QUICK]
    assert all(r.gate == "pass" and r.time_ms and r.static_mib and r.peak_incremental_mib is not None for r in records)
    by_name = {r.variant: r for r in records}
    assert by_name["bf16 weights"].static_mib < 0.75 * by_name["plain"].static_mib
    ladder.print_table(records, QUICK)
    assert "checkpointing, half" in capsys.readouterr().out


def test_a_rung_with_other_weights_or_another_loss_is_wrong() -> None:
    """The gate can fail, at the widest tolerance too."""
    want = exact(tiny())
    for rung, problem in ((QUICK[0], tiny(kl=0.8)), (Rung("bf16", switches={"bf16": True}), tiny(lengths="web text"))):
        verdict, errors = gate(rung, prepare(rung, problem, "cpu").problem, want)
        assert verdict == "fail", errors
    scaled = tiny()
    with torch.no_grad():
        for name, parameter in scaled.model.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(1.4)
    assert gate(replace(QUICK[0], switches={"base_weights": "fp8"}), scaled, want)[0] == "fail"


def test_fp8_is_held_against_its_own_weights() -> None:
    """The emulation on the CPU passes by its own weights; those of another scale do not."""
    plain, mine = tiny(), tiny()
    rung = Rung("fp8", packed=True, fused=True, switches={"base_weights": "fp8"})
    quantize_frozen(mine.model.llm.layers_root, "fp8", "cpu")
    want = reference(rung, plain, mine)
    verdict, errors = gate(rung, mine, want)
    assert verdict == "pass" and 0.005 < errors["adapters"] < 0.06
    assert gate(rung, mine, exact(plain))[1]["adapters"] > errors["adapters"]
    for layer in mine.model.llm.layers_root.modules():
        if isinstance(layer, Fp8Linear):
            layer.scale_t.mul_(1.1)
    assert gate(rung, mine, want)[0] == "fail"


def test_joint_pass_takes_every_base_layer_once(monkeypatch) -> None:
    problem, calls = tiny(), []
    apply = SharedLora.apply
    monkeypatch.setattr(SharedLora, "apply", lambda x, *rest: (calls.append(x.shape[-2]), apply(x, *rest))[1])
    rung = next(r for r in ALONE if r.joint)
    forward_backward(rung, prepare(rung, problem, "cpu").problem)
    both = problem.batch.mt.num_tokens + problem.batch.llm.num_tokens
    assert calls == [both] * 7 * len(problem.model.llm.layers_root.layers)


def test_climbing_goes_past_what_cannot_run(tmp_path) -> None:
    """As on a GPU, on the CPU: Liger and fp8 say why they are left out, the other rungs are climbed and written down."""
    path = tmp_path / "ladder.json"
    rungs = [r for r in CLIMBS[0] if not r.switches.get("compile") or r.name == "fp8"] + list(CLIMBS[1][1:3])
    records, plain = climb(rungs, {**TINY, "lengths": "NLI"}, "cpu", 1, [], None, path)
    assert set(plain) == {"loss", "adapters", "projection"}
    by_name = {r.variant: r for r in records}
    assert by_name["Liger layers"].notes and by_name["fp8"].notes
    climbed = [by_name[r.name] for r in rungs if r.name not in ("Liger layers", "fp8")]
    assert len(climbed) == 6
    assert all(r.gate == "pass" and r.time_ms and max(r.gate_detail.values()) < 0.05 for r in climbed)
    assert [row["variant"] for row in json.loads(path.read_text())] == [r.variant for r in records]


def test_every_rung_of_the_gpu_has_settings_that_exist() -> None:
    for rung in (r for rungs in CLIMBS for r in rungs):
        assert missing(rung, "cpu") is None or rung.switches.get("liger") or "needs" in str(missing(rung, "cpu"))
    names = [r.name for rungs in (ALONE, *CLIMBS) for r in rungs]
    assert all(r.below in names for rungs in (ALONE, *CLIMBS) for r in rungs)


def test_unknown_rungs_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        ladder.main(["--device", "cpu", "--rungs", "padlocked"])
    assert "'padlocked'" in capsys.readouterr().err


def test_rungs_are_chosen_on_a_gpu_too(monkeypatch, tmp_path, capsys) -> None:
    """--rungs of the climb, with plain, on every size; one that only the CPU has is refused, and the other way round."""
    asked = []

    def climbed(method, function, rungs, options, device, repeats, before, plain, path, size):
        asked.append((size, [rung.name for rung in rungs]))
        return [replace(RECORD, variant=rung.name, size=size) for rung in rungs], plain

    monkeypatch.setattr(ladder, "apart", climbed)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = ["--device", "cuda", "--json", str(tmp_path / "l.json")]
    assert ladder.main([*arguments, "--rungs", "fused loss", "compile", "all for memory"]) == 0
    sizes = list(SIZES["cuda"])
    assert asked == [
        (size, names) for size in sizes for names in (["plain", "fused loss", "compile"], ["all for memory"])
    ]
    assert all(f"ladder, {size} " in capsys.readouterr().out for size in sizes[:1])
    asked.clear()
    assert ladder.main([*arguments, "--rungs", "packed", "--quick"]) == 0
    assert asked == [("tiny", ["plain", "packed"])]
    for device, rung in (("cuda", "int8 weights"), ("cpu", "Liger layers")):
        with pytest.raises(SystemExit):
            ladder.main(["--device", device, "--rungs", rung])
        assert repr(rung) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ladder.main(["--device", "cpu", "--climb"])
    assert "--quick" in capsys.readouterr().err


def test_a_size_of_the_gpu_has_the_tokens_of_a_real_step() -> None:
    """The first size of the ladder and of the training steps: 8 to 11 thousand tokens."""
    from benchmarks.lengths import DISTRIBUTIONS
    from benchmarks.registry import get

    for size in (next(iter(SIZES["cuda"].values())), get("adaptation_step").sizes["cuda"][0]):
        assert 24 <= size["count"] <= 32
        assert 8000 <= sum(min(512, n) for n in DISTRIBUTIONS[size["lengths"]](size["count"])) <= 11000
