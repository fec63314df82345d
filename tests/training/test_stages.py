"""The three stages on tiny models: they learn, and they refuse what does not fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from mtllm_fast import MTLLM, Engine, TextRow
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.training import AdaptConfig, DistillConfig, FinetuneConfig, adapt, distill, finetune
from tests.tiny import LINES
from tests.training.short_runs import entries, logged, optim, weights

TASK = [TextRow(line + " " + ("good", "bad")[i % 2], label=i % 2) for i, line in enumerate(LINES * 4)]
LABELS = ["good", "bad"]


_optim = partial(optim, log_steps=5)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, encoder_folder, llm_folder) -> str:
    output = str(tmp_path_factory.mktemp("adapt") / "run")
    loss = DistillationWeights(pooled_mse=1.0, paired_mse=1.0, kl=0.5, temperature=2.0)
    config = AdaptConfig(
        encoder=encoder_folder, llm=llm_folder, output=output, loss=loss, train=_optim(max_steps=40, warmup=0.1)
    )
    metrics = adapt(config, [TextRow(line) for line in LINES])
    assert metrics["data"]["rows"] > 0
    return output


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, llm_folder) -> str:
    output = str(tmp_path_factory.mktemp("teacher") / "run")
    config = FinetuneConfig(llm=llm_folder, output=output, train=_optim(max_steps=-1, epochs=12, lr=5e-3))
    finetune(config, TASK, LABELS, TASK[:12])
    return output


def test_adapt_learns(adapted: str) -> None:
    first, *_, last = logged(Path(adapted)).values()
    assert last["loss"] < 0.7 * first["loss"]
    assert all(last[term] < first[term] for term in ("pooled_mse", "paired_mse", "kl"))


def test_task_teacher_learns_and_keeps_its_best_checkpoint(teacher: str) -> None:
    gold = torch.tensor([row.label for row in TASK])
    logits = torch.from_numpy(Engine(MTLLM.from_pretrained(teacher)).classify(TASK))
    accuracy = float((logits.argmax(-1) == gold).float().mean())
    seen = [entry["eval_accuracy"] for entry in entries(Path(teacher)) if "eval_accuracy" in entry]
    assert len(seen) == 12
    assert accuracy > 0.8
    valid = float((logits[:12].argmax(-1) == gold[:12]).float().mean())
    assert valid == pytest.approx(max(seen))


def test_distill_approaches_the_teacher(adapted, teacher, tmp_path) -> None:
    output, train = tmp_path / "run", _optim(max_steps=40, lr=5e-3)
    distill(
        DistillConfig(adapted, teacher, str(output), loss=DistillationWeights(head_kl=1.0), train=train),
        TASK,
        TASK[:12],
    )
    first, *_, last = logged(output).values()
    assert last["loss"] < 0.7 * first["loss"]
    mine, theirs, before = (weights(Path(folder)) for folder in (output, teacher, adapted))
    assert torch.equal(mine["head.linear.weight"], theirs["head.linear.weight"])  # copied and frozen
    assert torch.equal(mine["projection.layers.weight"], before["projection.layers.weight"])  # frozen in this stage
    assert not any(".teacher." in name for name in mine)
    assert Engine(MTLLM.from_pretrained(output)).classify(TASK[:3]).shape == (3, 2)


@pytest.mark.parametrize("source", ["encoder", "model"])
def test_baselines_train(adapted, encoder_folder, tmp_path, source) -> None:
    named = {"encoder": encoder_folder} if source == "encoder" else {"model": adapted}
    gold = torch.tensor([row.label for row in TASK])

    def loss_after(steps: int, lr: float) -> float:
        output = tmp_path / f"{steps}"
        finetune(FinetuneConfig(output=str(output), train=_optim(max_steps=steps, lr=lr), **named), TASK, LABELS)
        logits = torch.from_numpy(Engine(MTLLM.from_pretrained(output)).classify(TASK))
        return float(torch.nn.functional.cross_entropy(logits, gold))

    untrained = loss_after(1, 1e-12)
    assert loss_after(40, 5e-3) < 0.85 * untrained
    model = MTLLM.from_pretrained(tmp_path / "40")
    assert model.config.reader == ("encoder" if source == "encoder" else "stack")
    assert model.config.labels == LABELS


def test_output_of_another_run_is_refused(adapted, encoder_folder, llm_folder, tmp_path) -> None:
    rows = [TextRow(line) for line in LINES]
    config = AdaptConfig(encoder=encoder_folder, llm=llm_folder, output=adapted, train=_optim(max_steps=2))
    with pytest.raises(ValueError, match="holds another run"):
        adapt(config, rows)
    with pytest.raises(ValueError, match=r"--resume: .*was started with"):
        adapt(AdaptConfig(**{**vars(config), "resume": True}), rows)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        adapt(AdaptConfig(**{**vars(config), "output": str(tmp_path / "file")}), rows)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        adapt(AdaptConfig(**{**vars(config), "output": str(tmp_path / "full")}), rows)


def test_nothing_is_written_when_the_text_is_wrong(encoder_folder, llm_folder, tmp_path) -> None:
    output = tmp_path / "run"
    config = AdaptConfig(encoder=encoder_folder, llm=llm_folder, output=str(output), train=_optim(max_steps=2))
    with pytest.raises(ValueError, match="eng_Latn"):
        adapt(config, [TextRow("hello", "eng_Lat")])
    with pytest.raises(ValueError, match="no usable row"):
        adapt(config, [])
    assert not output.exists()


def test_teachers_that_do_not_fit(adapted, teacher, encoder_folder, llm_folder, tmp_path) -> None:
    config = {"output": str(tmp_path / "run"), "train": _optim(max_steps=2)}
    with pytest.raises(ValueError, match="not a task teacher"):
        distill(DistillConfig(model=adapted, teacher=adapted, **config), TASK)
    with pytest.raises(ValueError, match="not an adapted stack"):
        distill(DistillConfig(model=teacher, teacher=teacher, **config), TASK)
    causal = str(tmp_path / "causal")
    finetune(FinetuneConfig(llm=llm_folder, causal=True, output=causal, train=_optim(max_steps=1)), TASK, LABELS)
    with pytest.raises(ValueError, match="causal"):
        distill(DistillConfig(model=adapted, teacher=causal, **config), TASK)
    with pytest.raises(ValueError, match="exactly one"):
        finetune(FinetuneConfig(llm=llm_folder, encoder=encoder_folder, **config), TASK, LABELS)
    with pytest.raises(ValueError, match="labels"):
        finetune(FinetuneConfig(llm=llm_folder, **config), [TextRow("no label")], LABELS)
