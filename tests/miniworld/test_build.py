"""The tokenizers read every script, a build of a few steps loads, and the shipped models do what the report says."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from mtllm_fast.data import StackTokenizer, TextRow
from mtllm_fast.miniworld.build import BuildConfig, build, train_llm_tokenizer, train_mt_tokenizer
from mtllm_fast.miniworld.demo import ASSETS
from mtllm_fast.miniworld.languages import ENGLISH
from mtllm_fast.miniworld.world import World

TINY = BuildConfig(
    mt_width=32, mt_encoder_layers=1, mt_decoder_layers=1, mt_vocabulary=900, mt_steps=3, mt_batch=8,
    llm_width=32, llm_layers=1, llm_documents=300, llm_steps=3, llm_batch=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0, high=200, low=60)


@pytest.fixture(scope="module")
def built(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of seed 0."""
    folder = tmp_path_factory.mktemp("built")
    build(world, folder, config=TINY)
    return folder


def test_the_tokenizers_cover_every_text(world: World) -> None:
    mt = train_mt_tokenizer(world, 900)
    llm = train_llm_tokenizer(world, 600, list(world.documents(200)))
    both = StackTokenizer(mt, llm)
    assert set(both.languages) == {ENGLISH, *world.languages}
    for code in (ENGLISH, *world.languages):
        for row in world.task("test", 9):
            text = world.render(code, row.premise)
            assert mt.unk_token_id not in both.mt_side([TextRow(text, code)]).ids[0]
            assert mt.decode(mt(text, add_special_tokens=False)["input_ids"]) == text
            assert llm.decode(llm(text, add_special_tokens=False)["input_ids"]).strip() == text
    assert mt.unk_token_id not in both.mt_side([TextRow("水 😀", ENGLISH)]).ids[0]


def test_lines_begin_alike_alone_and_in_pairs(world: World) -> None:
    llm = train_llm_tokenizer(world, 600, list(world.documents(200)))
    together = llm("the fox waits\nthe crow waits", add_special_tokens=False)["input_ids"]
    apart = (llm(text, add_special_tokens=False)["input_ids"] for text in ("the fox waits", "\n", "the crow waits"))
    assert together == list(chain.from_iterable(apart))


def test_a_short_build_loads(built: Path) -> None:
    from mtllm_fast.inference import Engine
    from mtllm_fast.models import MTLLM

    model = MTLLM.stack(str(built / "mt"), str(built / "llm"))
    states = Engine(model).encode(["the fox waits"] * 2, [ENGLISH, "xba_Cyrl"])
    assert states.shape == (2, 32)


def test_a_build_is_a_function_of_its_seed(world: World, built: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, seed in (("again", 0), ("other", 1)):
        build(world, tmp_path / name, seed=seed, config=TINY)
    for part in ("mt", "llm"):
        folders = (built, tmp_path / "again", tmp_path / "other")
        a, b, c = (load_file(folder / part / "model.safetensors") for folder in folders)
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not all(torch.equal(a[key], c[key]) for key in a)


def test_the_shipped_weights_are_small_and_half_precision() -> None:
    files = [ASSETS / part / "model.safetensors" for part in ("mt", "llm")]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


def test_the_shipped_encoder_passes_the_gate_and_translates(tmp_path: Path) -> None:
    from benchmarks.miniworld.gate import GATE, neutrality
    from mtllm_fast.evaluation import Translator
    from mtllm_fast.miniworld.demo import base_models

    world = World()
    mt, _ = base_models(world, tmp_path, seed=0, from_scratch=False)
    found = neutrality(world, mt, train=1500, test=100)
    high = [code for code, language in world.languages.items() if language.resources == "high"]
    assert all(found[code] >= GATE for code in high), found
    translator = Translator.from_pretrained(mt)
    rows = world.task("validation", 30)
    for code in high[:3]:
        texts = translator.translate([world.render(code, row.premise) for row in rows], [code] * len(rows))
        right = sum(set(row.premise.subjects) <= set(text.split()) for text, row in zip(texts, rows, strict=True))
        assert right >= 0.8 * len(rows), (code, texts)
