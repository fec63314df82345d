"""What a run may start from, and what its losses may be divided by."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mtllm_fast import MTLLM, Engine, TextRow
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import LoraSettings
from mtllm_fast.models.adapter_sum import add_to_adapter, sum_settings
from mtllm_fast.training import AdaptConfig, DistillConfig, FinetuneConfig, adapt, distill, finetune
from mtllm_fast.training.teacher_variance import TEXTS, VARIANCE_FILE
from tests.models.weights import stir
from tests.tiny import LINES
from tests.training.short_runs import entries, lost_in, optim, same_weights, weights

ROWS = [TextRow(f"{line} {i}") for i, line in enumerate(LINES * 3)]
TASK = [TextRow(line + " " + ("good", "bad")[i % 2], label=i % 2) for i, line in enumerate(LINES * 3)]


_optim = partial(optim, max_steps=4, save_steps=2)


def _adapt(encoder: str, llm: str, output: Path, *, resume: bool = False, train=None, **changes) -> dict:
    config = AdaptConfig(
        encoder=encoder, llm=llm, output=str(output), resume=resume, train=_optim(**(train or {})),
        loss=DistillationWeights(pooled_mse=1.0, paired_mse=0.5, kl=0.1), **changes,
    )  # fmt: skip
    return adapt(config, ROWS)


@pytest.fixture(scope="module")
def unadapted(tmp_path_factory, encoder_folder, llm_folder) -> str:
    """A stack without stage 1: the fitted projection, 0 steps."""
    output = tmp_path_factory.mktemp("unadapted") / "run"
    metrics = _adapt(encoder_folder, llm_folder, output, init="ridge", init_rows=18, train={"max_steps": 0})
    assert metrics["init"]["kind"] == "ridge" and "train_loss" not in metrics
    return str(output)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, llm_folder) -> str:
    output = str(tmp_path_factory.mktemp("teacher") / "run")
    lora = LoraSettings(r=4, alpha=12)
    finetune(FinetuneConfig(llm=llm_folder, output=output, lora=lora, train=_optim(lr=5e-3)), TASK, ["good", "bad"])
    return output


# ---- losses over their variance
def test_losses_over_the_variance_of_the_teacher(encoder_folder, llm_folder, tmp_path) -> None:
    """The same run but for the scale of two terms; the variance is that of all states of the teacher at once."""
    _adapt(encoder_folder, llm_folder, tmp_path / "plain", train={"max_steps": 1})
    metrics = _adapt(encoder_folder, llm_folder, tmp_path / "scaled", train={"max_steps": 1}, over_variance=True)
    student = MTLLM.stack(encoder_folder, llm_folder)
    batch = collate(ROWS, student.tokenizer)
    states = student.teacher_states(batch.llm).double()
    bounds = batch.llm.cu_seqlens.tolist()
    pooled = torch.stack([states[a:b].mean(0) for a, b in pairwise(bounds)])
    right = {"pooled_mse": pooled, "paired_mse": states[batch.llm_rows]}
    variance = metrics["teacher_variance"]
    assert variance == json.loads((tmp_path / "scaled" / VARIANCE_FILE).read_text())
    assert len(ROWS) < TEXTS
    plain, scaled = entries(tmp_path / "plain")[0], entries(tmp_path / "scaled")[0]
    for name, rows in right.items():
        assert variance[name] == pytest.approx(float(rows.var(0, correction=0).mean()), rel=1e-4)
        assert scaled[name] == pytest.approx(plain[name] / variance[name], rel=1e-5)
        assert scaled[name] != pytest.approx(plain[name], rel=0.1), "the control"
    assert scaled["kl"] == pytest.approx(plain["kl"], rel=1e-6)
    assert scaled["loss"] == pytest.approx(
        scaled["pooled_mse"] + 0.5 * scaled["paired_mse"] + 0.1 * scaled["kl"], rel=1e-5
    )


def test_a_resumed_run_keeps_its_variance(encoder_folder, llm_folder, tmp_path, monkeypatch) -> None:
    """Bit for bit the run that was never stopped, although the variance would now be measured otherwise."""
    _adapt(encoder_folder, llm_folder, tmp_path / "whole", over_variance=True)
    with lost_in(4):
        _adapt(encoder_folder, llm_folder, tmp_path / "run", over_variance=True)
    measure = "mtllm_fast.training.run.measure_variance"
    monkeypatch.setattr(measure, lambda *args, **kwargs: {"pooled_mse": 5.0, "paired_mse": 5.0})
    _adapt(encoder_folder, llm_folder, tmp_path / "run", over_variance=True, resume=True)
    _adapt(encoder_folder, llm_folder, tmp_path / "other", over_variance=True)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert not same_weights(tmp_path / "other", tmp_path / "whole"), "the control: another variance"


def test_states_without_variance_are_refused(encoder_folder, llm_folder, tmp_path) -> None:
    config = AdaptConfig(
        encoder=encoder_folder, llm=llm_folder, output=str(tmp_path / "run"), over_variance=True, train=_optim()
    )
    with pytest.raises(ValueError, match="over_variance: the teacher's states for pooled_mse do not differ"):
        adapt(config, [TextRow("one text")])
    assert not list((tmp_path / "run").glob("*")), "no file is left, so the same command can be given again"


# ---- a stack without stage 1, and the teacher's adapter as the start of stage 3
def test_zero_steps_save_the_fitted_stack(unadapted, encoder_folder, llm_folder) -> None:
    from mtllm_fast.training.projection_fit import fit_projection

    student = MTLLM.stack(encoder_folder, llm_folder)
    fit_projection(student, ROWS, "ridge", 18)
    saved = weights(Path(unadapted))
    assert torch.equal(saved["projection.layers.weight"], student.projection.layers.weight)
    assert not any(value.any() for name, value in saved.items() if ".lora_B." in name)


@pytest.mark.parametrize("cached", [False, True])
def test_stage_3_starts_from_the_teachers_adapter(unadapted, teacher, tmp_path, cached, matches) -> None:
    config = DistillConfig(
        model=unadapted, teacher=teacher, output=str(tmp_path / "run"), init_from="teacher", train=_optim(max_steps=0),
        teacher_cache=str(tmp_path / "cache") if cached else "",
    )  # fmt: skip
    metrics = distill(config, TASK, TASK[:6])
    model = MTLLM.from_pretrained(tmp_path / "run")
    assert model.config.adapters["student"] == LoraSettings(r=20, alpha=40)
    # stage 1 did nothing yet, so reading its own tokens the LLM is the teacher
    plain, right = MTLLM.from_pretrained(unadapted), MTLLM.from_pretrained(teacher)
    batch = collate(TASK, right.tokenizer, sides=("llm",), align=False)
    with torch.no_grad():
        bare = plain.llm(batch.llm)
        matches(model.llm(batch.llm) - bare, right.llm(batch.llm) - bare, 1e-3)
    logits = torch.from_numpy(Engine(model).classify(TASK[:6]))
    gold = torch.tensor([row.label for row in TASK[:6]])
    assert metrics["best_eval_accuracy"] == pytest.approx(float((logits.argmax(-1) == gold).float().mean()))


def test_stage_3_from_the_teachers_adapter_trains_and_resumes(unadapted, teacher, tmp_path) -> None:
    def run(output: str, resume: bool = False) -> None:
        config = DistillConfig(
            model=unadapted, teacher=teacher, output=str(tmp_path / output), init_from="teacher", over_variance=True,
            loss=DistillationWeights(head_kl=1.0), train=_optim(), resume=resume,
        )  # fmt: skip
        distill(config, TASK)

    run("whole")
    with lost_in(4):
        run("run")
    run("run", resume=True)
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("mine", "other", "summed"),
    [
        (LoraSettings(4, 8), LoraSettings(2, 4), LoraSettings(6, 12)),
        (LoraSettings(4, 8), LoraSettings(2, 5), LoraSettings(6, 12)),
        (LoraSettings(4, 6), LoraSettings(1, 1), LoraSettings(5, 5)),  # 7.5 is no alpha
        (
            LoraSettings(4, 8, target_modules=("q_proj", "k_proj")),
            LoraSettings(2, 4, target_modules=("v_proj", "q_proj")),
            LoraSettings(6, 12, target_modules=("k_proj", "q_proj", "v_proj")),
        ),
        (
            LoraSettings(4, 8, target_modules=("q_proj",)),
            LoraSettings(2, 4),
            LoraSettings(6, 12, target_modules="all-linear"),
        ),
    ],
)
def test_the_sum_of_two_adapters(llm_folder, mine, other, summed, matches) -> None:
    """Every layer's weights change by what the two adapters change them by, worked out apart."""
    models = []
    for seed, settings in enumerate((mine, other)):
        torch.manual_seed(seed)
        models.append(stir(MTLLM.stack(llm=llm_folder, reader="llm", lora=settings), 1.0))

    def change(model: MTLLM) -> dict[str, torch.Tensor]:
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
        settings = model.config.adapters["student"]
        return {
            name: layer.lora_B["student"].weight.double() @ layer.lora_A["student"].weight.double()
            * (settings.alpha / settings.r)
            for name, layer in layers.items()
        }  # fmt: skip

    apart = [change(model) for model in models]
    add_to_adapter(models[0], other, models[1].state_dict())
    assert models[0].config.adapters["student"] == summed == sum_settings(mine, other)
    together = change(models[0])
    assert set(together) == set(apart[0]) | set(apart[1])
    for name, got in together.items():
        parts = [part[name] for part in apart if name in part]
        matches(got, torch.stack(parts).sum(0), 1e-6)
        layer = models[0].get_submodule(name)
        assert layer.lora_A["student"].weight.abs().sum(1).min() > 0, "a rank that no gradient would reach"
    batch = collate(TASK, models[0].tokenizer, sides=("llm",), align=False)
    models[0].train()(batch.llm).pooled.sum().backward()
    assert all(p.grad is not None for n, p in models[0].named_parameters() if ".lora_" in n)


def test_starts_that_do_not_fit_are_refused(unadapted, teacher, llm_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="target_modules"):
        sum_settings(LoraSettings(target_modules=".*q_proj"), LoraSettings(target_modules=("q_proj",)))
    with pytest.raises(ValueError, match="init_from='both': expected one of adapted, teacher"):
        DistillConfig(init_from="both")
    with pytest.raises(ValueError, match="max_steps=0"):
        finetune(FinetuneConfig(llm=llm_folder, output=str(tmp_path / "run"), train=_optim(max_steps=0)), TASK, ["a"])
    assert not (tmp_path / "run").exists()
