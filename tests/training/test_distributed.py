"""One process, two with DDP, two with FSDP2, and resumed from one to another: the same run (the long version is
benchmarks/studies/parallel.py)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.studies.parallel import distance, interrupted
from mtllm_fast import MTLLM
from mtllm_fast.models.sharded import spread_like, whole, whole_state
from mtllm_fast.models.shrink import shrink
from mtllm_fast.training import engines
from mtllm_fast.training.distributed import CONFIGS, ParallelTrainer, pack_seed
from mtllm_fast.training.engines import choose_engine
from mtllm_fast.training.processes import packs_per_process
from tests.training.distributed_runs import STEPS, run_adapt, run_compress, run_finetune, settings


@pytest.fixture(scope="module")
def runs(forked, tmp_path_factory, encoder_folder: str, llm_folder: str) -> Path:
    """One process here, all runs of two processes in one launch."""
    folder = tmp_path_factory.mktemp("runs")
    run_adapt(encoder_folder, llm_folder, folder / "one", gradient_accumulation=2)
    run_finetune(llm_folder, folder / "teacher", gradient_accumulation=2)
    shrink(encoder_folder, folder / "small", layers=1)
    run_compress(encoder_folder, folder / "small", folder / "compress", gradient_accumulation=2)
    interrupted(folder / "one", 2, folder / "one-fsdp2")
    code = "import runpy; runpy.run_module('tests.training.distributed_runs', run_name='__main__')"
    out, _ = forked.group(encoder_folder, llm_folder, folder, code=code)
    assert "gradient_accumulation is 1 instead of 2: a step keeps its 2 packs" in out
    interrupted(folder / "fsdp2", 4, folder / "fsdp2-one")
    run_adapt(encoder_folder, llm_folder, folder / "fsdp2-one", resume=True, checkpointing="full")
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "one-fsdp2", "fsdp2-one"])
def test_the_same_run(runs: Path, name: str) -> None:
    found = distance(runs / name, runs / "one")
    assert found.steps == STEPS
    assert found.same, found


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_same_run_beside_a_whole_encoder_that_teaches(runs: Path, engine: str) -> None:
    found = distance(runs / f"compress-{engine}", runs / "compress")
    assert found.steps == STEPS and found.same, found


def test_control_packs_weighted_alike_are_another_run(runs: Path) -> None:
    found = distance(runs / "pack-means", runs / "one")
    assert found.far, found


def test_checkpoints_of_both_engines_hold_the_same_files(runs: Path) -> None:
    names = [
        {path.name for path in (runs / run / "checkpoint-2").iterdir() if not path.name.startswith("rng_state")}
        for run in ("one", "ddp", "fsdp2")
    ]
    assert names[0] == names[1] == names[2]
    states = [
        torch.load(runs / run / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"] for run in ("one", "fsdp2")
    ]
    assert states[0].keys() == states[1].keys()
    for index, entry in states[0].items():
        torch.testing.assert_close(states[1][index]["exp_avg_sq"], entry["exp_avg_sq"], rtol=1e-4, atol=1e-12)


def test_spread_base_weights_are_saved_whole(runs: Path) -> None:
    """The folder of an FSDP2 run with its base models needs nothing else."""
    mine, theirs = (load_file(runs / run / "llm" / "model.safetensors") for run in ("fsdp2", "one"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert MTLLM.from_pretrained(runs / "fsdp2").llm is not None


def test_validation_and_best_checkpoint_of_spread_weights(runs: Path) -> None:
    scores = [
        [entry for entry in json.loads((runs / run / "metrics.json").read_text())["log"] if "eval_loss" in entry]
        for run in ("teacher", "teacher-fsdp2")
    ]
    assert len(scores[0]) == len(scores[1]) == 2
    for mine, theirs in zip(*scores):
        assert mine["eval_accuracy"] == theirs["eval_accuracy"]
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
    assert scores[0][0]["eval_loss"] != pytest.approx(scores[0][1]["eval_loss"], abs=1e-3)
    mine, theirs = (load_file(runs / run / "model.safetensors") for run in ("teacher", "teacher-fsdp2"))
    for name, tensor in theirs.items():
        assert float((mine[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


def test_the_rows_of_a_bad_pack_are_named_whatever_process_had_it(runs: Path) -> None:
    notes = [json.loads(line) for line in (runs / "bad-pack" / "log.jsonl").read_text().splitlines()]
    (note,) = [entry for entry in notes if "skipped" in entry]
    assert (note["step"], note["skipped"]) == (2, "the loss is not finite")
    assert note["rows"] == json.loads((runs / "bad.json").read_text())


def test_packs_per_process(monkeypatch, caplog) -> None:
    for now, expected in ((1, 6), (2, 3), (3, 2), (6, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(now))
        assert packs_per_process(3, 3, 2) == expected  # as started, 3 on each of 2
        assert packs_per_process(expected, 3, 2) == expected  # said outright
    assert "6 packs" in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match="4 processes cannot share the 6 packs of a step evenly; possible are 1, 2, 3, 6"
    ):
        packs_per_process(3, 3, 2)
    with pytest.raises(ValueError, match="makes steps of 8 packs, but the run was started with steps of 6"):
        packs_per_process(2, 3, 2)


def test_resuming_with_other_steps_is_refused(runs: Path, encoder_folder: str, llm_folder: str) -> None:
    with pytest.raises(ValueError, match="steps of 3 packs, but the run was started with steps of 2"):
        run_adapt(encoder_folder, llm_folder, runs / "one", resume=True, gradient_accumulation=3)


def test_checkpoints_of_deepspeed_are_its_own(tmp_path) -> None:
    plain, deepspeed = (SimpleNamespace(is_deepspeed_enabled=on) for on in (False, True))
    with pytest.raises(ValueError, match="was made with DeepSpeed, and this run is without"):
        ParallelTrainer.check_engine_of(plain, tmp_path)
    ParallelTrainer.check_engine_of(deepspeed, tmp_path)
    (tmp_path / "optimizer.pt").touch()
    ParallelTrainer.check_engine_of(plain, tmp_path)
    with pytest.raises(ValueError, match="was made without DeepSpeed, and this run is with"):
        ParallelTrainer.check_engine_of(deepspeed, tmp_path)


ENDING = """
import atexit, os, sys, threading, time
from torch import distributed
from mtllm_fast.training.processes import ends_process

class AtTeardown:
    def __del__(self, write=os.write):
        write(1, b"teardown\\n")

kept = AtTeardown()
atexit.register(print, "exit handler", end=" ")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread", end=" "))).start()
if sys.argv[1]:
    distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
sys.excepthook = lambda *error: None
try:
    with ends_process():
        print("block", end=" ")
        exec(sys.argv[2])
finally:
    print("joined" if distributed.is_initialized() else "alone", end=" ")
"""


@pytest.mark.parametrize(
    ("group", "ending", "code", "said"),
    [
        (True, "pass", 0, "block thread exit handler"),
        (True, "raise SystemExit(0)", 0, "block thread exit handler"),
        (True, "raise SystemExit(3)", 3, "block joined thread exit handler teardown"),
        (True, "raise ValueError('no')", 1, "block joined thread exit handler teardown"),
        (False, "pass", 0, "block alone thread exit handler teardown"),
    ],
)
def test_a_process_of_a_group_ends_without_teardown(forked, tmp_path, group, ending, code, said) -> None:
    """Only where all is well: after an error the others may wait in the group, and leaving could wait for them."""
    store = str(tmp_path / "store") if group else ""
    forked.start(store, ending, code=ENDING)
    found, out = forked.wait()
    assert (found, out.split()) == (code, said.split())


def test_the_dropout_of_a_pack() -> None:
    seeds = {pack_seed(seed, step, place) for seed in range(3) for step in range(20) for place in range(8)}
    assert len(seeds) == 3 * 20 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_nothing_is_done_to_whole_tensors() -> None:
    linear = torch.nn.Linear(2, 3)
    linear.tied = linear.weight
    state = whole_state(linear)
    assert state["weight"].data_ptr() == state["tied"].data_ptr() == linear.weight.data_ptr()
    assert torch.equal(whole(linear.weight), linear.weight)
    assert spread_like(linear.weight, linear.bias) is linear.weight


def _launched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what `accelerate launch` sets for 4 processes with a shipped configuration."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path = str(CONFIGS / f"{name}.yaml")
    words = ["--config_file", path, "--num_processes", "4", "-m", "mtllm_fast.cli", "adapt"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (arguments.num_processes, arguments.module, arguments.training_script) == (4, True, "mtllm_fast.cli")
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = list(load_config_from_file(path).deepspeed_config)
        made = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        made = prepare_multi_gpu_env(arguments)
    for key, value in made.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("WORLD_SIZE", "4")


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_shipped_configurations(name: str, monkeypatch) -> None:
    """accelerate reads them, knows every field, and what it then sets chooses the engine they are named after."""
    engine = name.split("_")[0]
    _launched(name, monkeypatch)
    monkeypatch.setattr(engines, "find_spec", lambda package: object())
    assert choose_engine(settings()) == engine
    assert choose_engine(settings(parallel=engine)) == engine
    if engine != "ddp":
        with pytest.raises(ValueError, match=f"accelerate was launched with a configuration for {engine}"):
            choose_engine(settings(parallel="ddp"))
    text = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert f"--config_file {name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()
    assert text["mixed_precision"] == "no"  # or it would differ from --bf16


def test_engines_that_cannot_be_had(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_engine(settings()) == "ddp"
    monkeypatch.setattr(engines, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"pip install 'mtllm-fast\[deepspeed\]'"):
        choose_engine(settings(parallel="deepspeed"))
    for unknown in ({"optim": "adamw_8bit"}, {"offload_optimizer": True}):
        with pytest.raises(ValueError, match=r"with FSDP2: expected one of adamw_torch"):
            choose_engine(settings(parallel="fsdp2", **unknown))
    with monkeypatch.context() as older:
        older.setattr(engines, "version", lambda package: "1.13.0")
        with pytest.raises(ValueError, match=r"needs accelerate 1.14 or newer, this is 1.13.0"):
            choose_engine(settings(parallel="fsdp2"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        choose_engine(settings())
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        choose_engine(settings())
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match="fsdp_offload_params: false"):
        choose_engine(settings())
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ValueError, match="--checkpointing full"):
        choose_engine(settings())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert choose_engine(settings(parallel="fsdp2")) == "one"
