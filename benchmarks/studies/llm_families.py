"""Every causal-LM family of transformers that builds from a small config: are its packed rows its own?

    python -m benchmarks.studies.llm_families [--output benchmarks/results/cpu/llm_families]

A family is "equal" where the gate of mtllm_fast/models/gate.py accepts it, and "refused" with the gate's reason. Every
accepted one is compared here by other means than the gate's: other lengths, other weights, its whole depth,
transformers alone on one sequence at a time. What differs there is listed as "DIFFERENT", and the command then fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.models import PackedLLM
from mtllm_fast.reporting.table import Table

OUTPUT = Path("benchmarks/results/cpu/llm_families")
LENGTHS = (1, 2, 23, 7, 40)
TOLERANCE = 1e-5
LARGEST = 150_000_000
# fields of the configs, under the names that one family or another gives them; each is set only where it is there
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "emb_dim": 64, "embedding_size": 64,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "encoder_layers": 2, "decoder_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "v_head_dim": 16,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 32,
    "intermediate_size": 64, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "n_inner": 64,
    "ffn_hidden_size": 64, "ff_dim": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 128, "n_positions": 128,
    "max_sequence_length": 128, "max_seq_len": 128, "sliding_window": 8, "attention_chunk_size": 8, "state_size": 8,
    "mamba_d_state": 8, "ssm_state_size": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_mamba_heads": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "lru_width": 64,
    "attention_window_size": 8, "rotary_dim": 8, "query_pre_attn_scalar": 16, "pad_token_id": 1, "bos_token_id": 2,
    "eos_token_id": 2, "attention_dropout": 0.0, "attn_layer_period": 2,
    "attn_layer_offset": 1, "head_size": 16, "attention_hidden_size": 64, "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
}  # fmt: skip


# fields left at their defaults, one attempt after the other
LEAVE: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("layer_types",),
    ("layer_types", "head_dim"),
    ("n_inner", "num_key_value_heads"),
    ("num_hidden_layers", "layer_types"),
    ("num_attention_heads", "num_key_value_heads", "head_dim", "layer_types", "num_hidden_layers"),
)
# what a family needs beside that, to build and to show each of its kinds of layers
OWN: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "kimi_linear": {"num_experts_per_token": 2, "num_experts": 4},
    "bailing_hybrid": {"head_dim": 16, "qk_rope_head_dim": 8, "num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "dots1": {"n_routed_experts": 4, "moe_intermediate_size": 32, "num_key_value_heads": 2},
    "reformer": {"is_decoder": True},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
}


def small_config(model_type: str) -> Any:
    """A config of the family with small sizes. Whatever goes wrong is raised."""
    config_class = CONFIG_MAPPING[model_type]
    problems = []
    for leave in LEAVE:
        try:
            config = _filled(config_class, leave, OWN.get(model_type, {}))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            if model.num_parameters() > LARGEST:
                raise ValueError(f"{model.num_parameters() / 1e6:.0f}M parameters")
            return _filled(config_class, leave, OWN.get(model_type, {}))
        except Exception as error:
            problems.append(error)
    raise problems[0]


def _filled(config_class: Any, leave: tuple[str, ...], own: dict[str, Any]) -> Any:
    default = config_class()
    fields = {}
    for name, value in SMALL.items():
        if name in leave or name in config_class.attribute_map or not hasattr(default, name):
            continue
        if getattr(default, name) is None and name != "head_dim":
            continue
        fields[name] = value
    if "kv_lora_rank" in fields:  # latent attention has as many key heads as query heads
        fields["num_key_value_heads"] = SMALL["num_attention_heads"]
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1 and "layer_types" not in leave:
        fields["layer_types"] = (kinds * 4)[: SMALL["num_hidden_layers"]]
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if isinstance(getattr(default, name, None), transformers.PreTrainedConfig) and part is not None:
            fields[name] = _filled(type(getattr(default, name)), leave, {}).to_dict()
    return config_class(**{**fields, **own})


def made(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of `config` with weights away from their small initialisation."""
    torch.manual_seed(7)
    config = copy.deepcopy(config)  # transformers keeps it, and wrapping the model changes it
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


def apart(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def difference(config: Any, causal: bool, dtype: torch.dtype) -> tuple[float, float]:
    """Largest deviation of an accepted model's packed rows from transformers' own, over the largest element.

    Where transformers has no bidirectional form of the family, the rows of a pack are compared with the packed rows of
    each text alone. The second number says what rounding does: how far transformers' own rows move when every weight
    moves by half a float32 unit.
    """
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]
    bare = made(config, dtype)
    text = bare.config.get_text_config(decoder=True)
    decoder = bare.get_decoder()

    def own() -> list[Tensor]:
        return [decoder(input_ids=one[None], use_cache=False).last_hidden_state[0] for one in ids]

    expected = own()
    if not causal and _looks_back(decoder, ids[2]):
        text.is_causal = False
        try:
            expected, still = own(), _looks_back(decoder, ids[2])
        except AttributeError:  # MPT's own code needs the causal mask
            still = True
        text.is_causal = True
        if still:  # transformers has no form of it that looks both ways
            llm = PackedLLM(made(config, dtype), causal=False)
            expected = [llm(PackedBatch.from_sequences([one.tolist()])) for one in ids]
    rows = PackedLLM(made(config, dtype), causal=causal)(PackedBatch.from_sequences([one.tolist() for one in ids]))
    apart_by = apart(rows, torch.cat(expected))
    text.is_causal = True
    before = torch.cat(own())
    for parameter in bare.parameters():
        parameter.mul_(1 + 6e-8 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return apart_by, apart(torch.cat(own()), before)


def _looks_back(decoder: Any, ids: Tensor) -> bool:
    other = ids.clone()
    other[-1] = 91
    before, after = (decoder(input_ids=x[None], use_cache=False).last_hidden_state[0, :-1] for x in (ids, other))
    return apart(after, before) < 1e-6


def judged(model_type: str) -> list[dict[str, Any]]:
    """One row for causal and one for bidirectional reading."""
    try:
        config = small_config(model_type)
        made(config)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return [{"family": model_type, "verdict": "not built", "why": f"{type(error).__name__}: {reason[:140]}"}]
    rows = []
    for causal in (True, False):
        row: dict[str, Any] = {"family": model_type, "reading": "causal" if causal else "bidirectional"}
        try:
            PackedLLM(made(config), causal=causal)
        except ValueError as error:
            row.update(verdict="refused", why=str(error).removeprefix("llm: "))
        else:
            try:
                apart_by, rounding = difference(config, causal, torch.float64)
            except RuntimeError:  # torch's grouped products, for experts, have no float64
                apart_by, rounding = difference(config, causal, torch.float32)
            equal = apart_by <= max(TOLERANCE, 10 * rounding)
            row.update(verdict="equal" if equal else "DIFFERENT", difference=apart_by, rounding=rounding, why="")
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = ["family", "reading", "verdict", "largest difference", "rounding", "why"]
    cells = []
    for row in rows:
        numbers = (f"{row[name]:.1e}" if name in row else "" for name in ("difference", "rounding"))
        cells.append([row["family"], row.get("reading", ""), row["verdict"], *numbers, row["why"]])
    return "\n".join(Table(header, cells, left=len(header)).markdown())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--families", help="comma-separated model types; all by default")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    names = arguments.families.split(",") if arguments.families else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = []
    for name in names:
        rows += judged(name)
        for row in (row for row in rows[-2:] if row["family"] == name):
            shown = ("family", "reading", "verdict", "difference", "rounding", "why")
            print(*(row.get(key, "") for key in shown), flush=True)
    counts = Counter(row["verdict"] for row in rows)
    head = (
        "Packed rows of every causal-LM family of transformers that builds from a small config, compared with "
        f"transformers alone, float64 on the CPU (norms and rotations are float32 in most families, "
        f"mixtures of experts all; torch {torch.__version__}, transformers {transformers.__version__}; "
        "`python -m benchmarks.studies.llm_families`). "
        + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        + f"; none may be DIFFERENT (more than {TOLERANCE:g} of the largest element, and than ten times what the "
        "family's own rows move by when every weight moves by half a float32 unit)."
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text(f"{head}\n\n{table(rows)}\n")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    arguments.output.with_suffix(".json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    print(dict(counts))
    if counts["DIFFERENT"]:
        raise SystemExit(
            "accepted and different: " + ", ".join(r["family"] for r in rows if r["verdict"] == "DIFFERENT")
        )


if __name__ == "__main__":
    main()
