"""Layers of two adapters swapped: the LLM that has them against one whose weights were changed by hand, layer by layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtllm_fast import MTLLM, Engine, TextRow, cli
from mtllm_fast.data.collate import collate
from mtllm_fast.losses import DistillationWeights
from mtllm_fast.models import HeadConfig, LoraSettings
from mtllm_fast.training import DistillConfig, distill
from mtllm_fast.training.layer_swap import INNER, MEAN, OUTER, layer_shares, swap_layers
from tests.conftest import relative_error
from tests.models.weights import stir
from tests.tiny import LINES, build_llm_folder
from tests.training.short_runs import optim, refused

LAYERS = 6
MINE, THEIRS = LoraSettings(r=4, alpha=8), LoraSettings(r=3, alpha=12)  # scales 2 and 4, so that fp64 sums are exact
LABELS = ("neg", "pos")
SHARES = layer_shares(LAYERS, 2, 1, 1)


def make(root: Path, name: str, settings: LoraSettings, seed: int, **what) -> str:
    """A saved model whose adapter changes what it computes."""
    torch.manual_seed(seed)
    stir(MTLLM.stack(lora=settings, dtype=torch.float32, **what)).save_pretrained(root / name)
    return str(root / name)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    return build_llm_folder(tmp_path_factory.mktemp("deep") / "llm", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def root(tmp_path_factory, encoder_folder, llm) -> Path:
    """`adapted` and `teacher`, and what does not fit them."""
    root = tmp_path_factory.mktemp("swap")
    head = HeadConfig(labels=LABELS)
    make(root, "adapted", MINE, 1, encoder=encoder_folder, llm=llm)
    make(root, "teacher", THEIRS, 2, llm=llm, reader="llm", head=head)
    make(root, "causal", THEIRS, 2, llm=llm, reader="llm", head=head, causal=True)
    make(root, "headless", THEIRS, 2, llm=llm, reader="llm")
    make(root, "queries", LoraSettings(target_modules=("q_proj",)), 2, llm=llm, reader="llm", head=head)
    other = build_llm_folder(root / "other-llm", num_hidden_layers=LAYERS, rope_theta=5000.0)
    make(root, "other", THEIRS, 2, llm=other, reader="llm", head=head)
    return root


def by_hand(root: Path, llm: str, shares: list[tuple[float, float]]) -> MTLLM:
    """The bare LLM in fp64 with W + w1 s1 B1 A1 + w2 s2 B2 A2 in each layer."""
    model = MTLLM.stack(llm=llm, reader="llm", dtype=torch.float64)
    weights = model.llm.model.state_dict()
    changed = 0
    for folder, settings, which in (("adapted", MINE, 0), ("teacher", THEIRS, 1)):
        state = load_file(root / folder / "model.safetensors")
        for name, lora_b in state.items():
            if ".lora_B." not in name:
                continue
            lora_a = state[name.replace(".lora_B.", ".lora_A.")]
            share = shares[int(name.split(".layers.")[1].split(".")[0])][which]
            target = name.removeprefix("llm.model.").replace(".lora_B.student.", ".")
            weights[target] += share * settings.alpha / settings.r * (lora_b.double() @ lora_a.double())
            changed += 1
    assert changed == 2 * 7 * LAYERS
    return model.eval()


def states(model: MTLLM) -> torch.Tensor:
    model = model.double().eval()
    batch = collate([TextRow(line) for line in LINES[:4]], model.tokenizer, sides=("llm",), align=False)
    with torch.no_grad():
        return model.llm(batch.llm)


def test_the_swapped_llm_is_the_one_made_by_hand(root, llm) -> None:
    swapped = swap_layers(str(root / "adapted"), str(root / "teacher"), 2, 1, 1)
    assert swapped.config.adapters["student"] == LoraSettings(r=7, alpha=14)
    got, right = states(swapped), states(by_hand(root, llm, SHARES))
    assert relative_error(got, right) < 1e-12
    # controls: the wrong way round; a border that is off by one; the mean as a sum; one of the two alone
    for shares in (
        [(b, a) for a, b in SHARES],
        layer_shares(LAYERS, 1, 1, 1),
        layer_shares(LAYERS, 2, 1, 0),
        [(1.0, 1.0) if share == MEAN else share for share in SHARES],
        [OUTER] * LAYERS,
        [INNER] * LAYERS,
    ):
        assert relative_error(states(by_hand(root, llm, shares)), right) > 1e-3


def test_ends_of_the_scale(root, llm) -> None:
    """All layers of one of them: what each says by itself."""
    adapted, teacher = str(root / "adapted"), str(root / "teacher")
    alone = swap_layers(adapted, teacher, 0, 0, 0), swap_layers(adapted, teacher, LAYERS, 0, 0)
    for swapped, own in zip(alone, (teacher, adapted)):
        assert relative_error(states(swapped), states(MTLLM.from_pretrained(own))) < 1e-12


def test_scales_that_are_not_whole(root, llm, tmp_path) -> None:
    """Within fp32 where alpha / r is not kept by a whole alpha."""
    path = tmp_path / "adapted"
    shutil.copytree(root / "adapted", path)
    config = json.loads((path / "config.json").read_text())
    config["adapters"]["student"]["alpha"] = 3  # 0.75 * 7 is no whole number
    (path / "config.json").write_text(json.dumps(config))
    swapped = swap_layers(str(path), str(root / "teacher"), 2, 1, 1)
    assert swapped.config.adapters["student"] == LoraSettings(r=7, alpha=7)
    shares = [(a * 3 / 8, b) for a, b in SHARES]
    assert relative_error(states(swapped), states(by_hand(root, llm, shares))) < 1e-6
    assert relative_error(states(swapped), states(by_hand(root, llm, SHARES))) > 1e-3


@pytest.mark.parametrize(
    ("count", "bottom", "top", "mean"), [(32, 5, 2, 2), (30, 5, 2, 2), (16, 2, 1, 2), (6, 1, 1, 2), (4, 1, 1, 2)]
)
def test_shares_by_default(count: int, bottom: int, top: int, mean: int) -> None:
    shares = layer_shares(count)
    inner = count - bottom - top - mean
    assert shares == [OUTER] * bottom + [MEAN] + [INNER] * inner + [MEAN] + [OUTER] * top


def test_by_the_command_and_onwards(root, llm, tmp_path, capsys) -> None:
    """The folder is an ordinary one: it classifies, is merged, and is where stage 3 goes on from."""
    line = ["convert", "--model", str(root / "adapted"), "--teacher", str(root / "teacher"), "--to", "swapped"]
    cli.main([*line, "--output", str(tmp_path / "swapped")])
    assert "(to swapped)" in capsys.readouterr().out
    model = MTLLM.from_pretrained(tmp_path / "swapped")
    assert model.config.labels == list(LABELS) and model.config.reader == "stack"
    right = load_file(root / "teacher" / "model.safetensors")["head.linear.weight"]
    assert torch.equal(model.head.linear.weight, right)
    assert relative_error(states(model), states(by_hand(root, llm, layer_shares(LAYERS)))) < 1e-12
    labelled = [TextRow(text, "eng_Latn", label=i % 2) for i, text in enumerate(LINES)]
    logits = Engine(MTLLM.from_pretrained(tmp_path / "swapped")).classify(labelled)
    assert logits.shape == (len(LINES), 2)

    cli.main(["convert", "--model", str(tmp_path / "swapped"), "--to", "merged", "--output", str(tmp_path / "merged")])
    merged = Engine(MTLLM.from_pretrained(tmp_path / "merged")).classify(labelled)
    assert relative_error(torch.from_numpy(merged), torch.from_numpy(logits)) < 1e-4

    config = DistillConfig(
        str(tmp_path / "swapped"), str(root / "teacher"), str(tmp_path / "run"),
        loss=DistillationWeights(head_kl=1.0), train=optim(max_steps=1),
    )  # fmt: skip
    distill(config, labelled)
    trained = MTLLM.from_pretrained(tmp_path / "run")
    assert trained.config.adapters["student"] == LoraSettings(r=7, alpha=14)
    before, after = (dict(m.named_parameters()) for m in (MTLLM.from_pretrained(tmp_path / "swapped"), trained))
    moved = [name for name in before if ".lora_B." in name and not torch.equal(before[name], after[name])]
    assert len(moved) == 7 * LAYERS, "no rank is out of reach of a gradient"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--teacher {root}/other", "sits on the LLM"),
        ("--teacher {root}/causal", "causal=True"),
        ("--teacher {root}/headless", "not a task teacher"),
        ("--teacher {root}/adapted", "not a task teacher"),
        ("--teacher {root}/queries", "adapts target_modules=('q_proj',)"),
        ("--teacher {root}/teacher --model {root}/teacher", "not an adapted stack"),
        ("--teacher {root}/teacher --bottom 3 --top 2", "bottom=3, top=2, between=1 (on either side): the LLM has 6 layers, not 7"),
        ("--teacher {root}/teacher --top -1", "top=-1: must be >= 0"),
        ("", "--teacher is missing"),
        ("--teacher {root}/teacher --to merged", "goes with --to swapped alone"),
        ("--bottom 0 --to merged", "--bottom 0: goes with --to swapped alone"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_weights_are_read(
    root, tmp_path, monkeypatch, capsys, more: str, said: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(MTLLM, "from_pretrained", never)
    monkeypatch.setattr("mtllm_fast.training.layer_swap.read_safetensors", never)
    line = f"convert --model {root}/adapted --to swapped --output {tmp_path}/out " + more.format(root=root)
    message = refused(capsys, line.split()).strip()
    assert said in message and message.count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["less", "more"])
def test_weights_that_do_not_fit_are_refused(root, tmp_path, broken: str) -> None:
    """A teacher without one of its layers would leave that layer as it was before stage 2."""
    shutil.copytree(root / "teacher", tmp_path / "teacher")
    state = load_file(tmp_path / "teacher" / "model.safetensors")
    name = next(name for name in state if ".layers.3." in name)
    state[f"{name}.more"] = state[name].clone()
    if broken == "less":
        del state[f"{name}.more"], state[name]
    save_file(state, tmp_path / "teacher" / "model.safetensors")
    with pytest.raises(ValueError, match="its weights do not fit the student's LLM"):
        swap_layers(str(root / "adapted"), str(tmp_path / "teacher"))


def test_an_llm_inside_of_the_model(root, llm, tmp_path) -> None:
    """Base models stored with the model are compared as those that are named."""
    MTLLM.from_pretrained(root / "adapted").save_pretrained(tmp_path / "whole", include_base=True)
    swapped = swap_layers(str(tmp_path / "whole"), str(root / "teacher"), 2, 1, 1)
    assert relative_error(states(swapped), states(by_hand(root, llm, SHARES))) < 1e-12
    with pytest.raises(ValueError, match="sits on the LLM"):
        swap_layers(str(tmp_path / "whole"), str(root / "other"))
