"""A step of stage 1 on an H200, rung by rung: what the traced bytes and the FLOPs allow, beside the audit's estimate.

python -m benchmarks.studies.plan_rungs [--json FILE]

NLLB-600M and Llama-3-8B, 355 tokens a document on each side, pooled loss. A token pair takes its products at the rate
of a large one (790 TFLOP/s, the LLM's frozen products at twice that in fp8) and, apart from them, the elementwise bytes
of student and teacher that `traffic` has traced (`results/cpu/traffic.json`) at the rate of a copy (4.3
TB/s). The teacher moves what the student's forward does without its adapter's operators. Not in it: launches, the
optimizer, the encoder's elementwise operators, casts to fp8, products too thin for the rate, as LoRA's: so these are
ceilings, and `share` is how much of them the audit (design/KERNELS.md §9) expects. Nothing here has run on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtllm_fast.planning.presets import ALIASES, MODELS
from mtllm_fast.reporting.table import Table

from ..common import parser_of

TRAFFIC = Path(__file__).parents[1] / "results" / "cpu" / "traffic.json"
GEMM, COPY = 790e12, 4.3e12  # FLOP/s in bf16 and bytes/s, read plus written, seen on an H200
TOKENS = 355  # of a document, on each side
RANK = 16

# rung, row of the traffic table, fp8, documents/s of the audit on an H200
RUNGS = (
    ("peft's layers, dropout .05", "peft's layers, dropout 0.05", False, 25),
    ("peft's layers, no dropout", "peft's layers, dropout 0.0", False, None),
    ("LoRA as one op, dropout .05", "LoRA as one op, dropout 0.05", False, 30),
    ("LoRA as one op, no dropout", "LoRA as one op, dropout 0.0", False, None),
    ("+ Liger's layers, dropout .05", "with Liger's layers, dropout 0.05", False, 35),
    ("+ compiled instead, dropout .05", "compiled by Inductor, dropout 0.05", False, 35),
    ("+ compiled, no dropout", "compiled by Inductor, dropout 0.0", False, None),
    ("+ compiled, dropout .05, static fp8 base", "compiled by Inductor, dropout 0.05", True, 47),
)


def flops() -> tuple[float, float]:
    """(FLOPs of a token pair in the LLM's frozen linear layers, in all else): teacher and student forward, dX."""
    llm, encoder = MODELS[ALIASES["Llama-3-8B"]], MODELS[ALIASES["NLLB-600M"]]
    width, mlp, layers = llm["hidden_size"], llm["intermediate_size"], llm["num_hidden_layers"]
    kv = width * llm["num_key_value_heads"] // llm["num_attention_heads"]
    shapes = [(width, width)] * 2 + [(width, kv)] * 2 + [(width, mlp)] * 2 + [(mlp, width)]
    frozen = layers * sum(a * b for a, b in shapes)
    lora = layers * RANK * sum(a + b for a, b in shapes)
    inner, outer = encoder["d_model"], encoder["encoder_ffn_dim"]
    own = encoder["encoder_layers"] * (4 * inner**2 + 2 * inner * outer)
    scores = 4 * TOKENS * width * layers  # forward; backward takes two and a half times that
    return 6.0 * frozen, 2.0 * own + 6.0 * lora + 4.5 * scores


def estimates(traffic: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a rung: microseconds of a token pair in products and apart from them, documents/s, the audit's."""
    frozen, rest = flops()
    layers = MODELS[ALIASES["Llama-3-8B"]]["num_hidden_layers"]
    found = []
    for rung, row, fp8, audit in RUNGS:
        products = (frozen / (2 if fp8 else 1) + rest) / GEMM
        moved = sum(traffic[row][part]["elementwise"] for part in ("forward", "backward"))
        moved += teacher(traffic, row)
        elementwise = layers * moved * 1e3 / COPY
        rate = 1 / (TOKENS * (products + elementwise))
        found.append(
            {
                "rung": rung,
                "kb_per_token_and_layer": moved,
                "products_us": round(1e6 * products, 1),
                "elementwise_us": round(1e6 * elementwise, 1),
                "documents_per_s": round(rate, 1),
                "audit": audit,
                "share": round(audit / rate, 2) if audit else None,
            }
        )
    return found


def teacher(traffic: dict[str, Any], row: str) -> int:
    """Elementwise kilobytes of the teacher's forward: the student's without dropout and without its adapter's share."""
    layers = row.split(",")[0].replace("peft's layers", "LoRA as one op")  # switched off, peft's layers are plain ones
    forward = traffic[f"{layers}, dropout 0.0"]["forward"]
    return int(forward["elementwise"] - forward["largest"]["addmm_"])


def main() -> None:
    parser = parser_of("benchmarks.studies.plan_rungs", __doc__)
    options = parser.parse_args()
    found = estimates(json.loads(TRAFFIC.read_text(encoding="utf-8")))
    header = ["rung, H200", "KB per token and layer", "us: products", "elementwise", "documents/s at most", "audit"]
    rows = [["-" if value is None else str(value) for value in one.values()] for one in found]
    print("\n".join(Table([*header, "share"], rows).markdown()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
