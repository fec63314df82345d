"""The layout of the published NLLB-LLM2Vec models: reading one into an MTLLM, writing an MTLLM into it.

    config.json         model_type "nllb-llm2vec", with nllb_config (m2m_100) and llm2vec_config (the LLM)
    model.safetensors   nllb_encoder.*, up_proj.weight, up_proj.bias, llm2vec.*; or shards with an index
    tokenizer files     of NLLB; there are none of the LLM

`llm2vec.*` is a bidirectional decoder without LM head. LoRA is merged into it, or stands beside its layers under peft's
names, there or in adapter_model.safetensors, with adapter_config.json.
The model is `fdschmidt93/NLLB-LLM2Vec-Meta-Llama-31-8B-Instruct-mntp-unsup-simcse`, of arXiv 2406.12739.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.tokenise import StackTokenizer
from .adapters import LoraSettings
from .encoder import PackedEncoder
from .encoders import MODEL_TYPES, family_of
from .llm import PackedLLM
from .loading import read_safetensors
from .mtllm import MTLLM, MTLLMConfig
from .projection import ProjectionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_TYPE = "nllb-llm2vec"
ADAPTER = "student"

# their first name -> ours
_PARTS = {"nllb_encoder": "encoder", "up_proj": "projection", "llm2vec": "llm"}
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
# adapter settings that change what the weights mean
_UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


def load_nllb_llm2vec(
    folder: str | Path, *, tokenizer: StackTokenizer | None = None, dtype: torch.dtype | None = None
) -> MTLLM:
    """Read a folder in the NLLB-LLM2Vec layout.

    The layout has no LM head. The LLM gets its input embeddings as one: do not use it for KL losses or generation.

    Args:
        folder: a local copy of the model, safetensors only; its remote code is not run.
        tokenizer: None reads the folder's NLLB tokenizer.
        dtype: of encoder and LLM; None keeps what is stored.

    Raises:
        ValueError: the folder is of another kind or incomplete. Every weight that is missing, unexpected or of the
            wrong shape is named.
    """
    path = Path(folder)
    encoder_config, llm_config = read_configs(path)
    tokenizer = tokenizer or read_tokenizer(path, encoder_config)
    raw = read_state(path)
    state = {our_name(name): tensor for name, tensor in raw.items()}
    adapters = adapter_settings(path, state)
    check_state(path, state, expected_shapes(encoder_config, llm_config, adapters), {our_name(n): n for n in raw})

    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    def part(prefix: str, lora: bool = False) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix) and (".lora_" in n) == lora}

    llm_config.tie_word_embeddings = True
    llm_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(llm_config)]
    encoder = (
        family_of(encoder_config)
        .encoder_class(encoder_config)
        .from_pretrained(
            None,
            config=encoder_config,
            state_dict=part("encoder."),
            dtype=dtype or state["encoder.embed_tokens.weight"].dtype,
        )
    )
    llm = llm_class.from_pretrained(
        None,
        config=llm_config,
        state_dict={f"{llm_class.base_model_prefix}.{name}": tensor for name, tensor in part("llm.").items()},
        dtype=dtype or state["llm.embed_tokens.weight"].dtype,
    )
    config = MTLLMConfig(reader="stack", causal=False, adapters={ADAPTER: adapters} if adapters else {})
    model = MTLLM(config, PackedEncoder(encoder), PackedLLM(llm), tokenizer)
    stack = model.require_stack()
    stack.projection.layers.load_state_dict(part("projection."))
    if adapters:
        lora = part("llm.", lora=True)
        named = {re.sub(r"\.lora_([AB])\.", rf".lora_\1.{ADAPTER}.", name): tensor for name, tensor in lora.items()}
        stack.llm.decoder.load_state_dict(named, strict=False)  # names and shapes were checked above
    return model.eval()


def save_nllb_llm2vec(model: MTLLM, folder: str | Path, *, max_shard_size: str | int = "5GB") -> None:
    """Write `model` in the NLLB-LLM2Vec layout, its LoRA weights merged.

    Raises:
        ValueError: the layout has no place for something that the model has.
    """
    from huggingface_hub import save_torch_state_dict

    check_exportable(model)
    stack = model.require_stack()
    adapter = next(iter(model.config.adapters), None)
    parts = {
        "nllb_encoder": stack.encoder.model.state_dict(),
        "up_proj": stack.projection.layers.state_dict(),
        "llm2vec": merged_decoder(stack.llm, adapter),
    }
    state = {
        f"{part}.{name}": tensor.detach().to("cpu").contiguous()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, path, max_shard_size=max_shard_size)
    if model.tokenizer is not None:
        model.tokenizer.mt.save_pretrained(str(path))
    config = {
        "architectures": ["NLLBLLM2Vec"],
        "model_type": MODEL_TYPE,
        "nllb_config": stack.encoder.model.config.to_dict(),
        "llm2vec_config": stack.llm.decoder.config.to_dict(),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_exportable(model: MTLLM) -> None:
    """Raise ValueError with everything about `model` that the layout cannot hold."""
    config = model.config
    problems = []
    if config.reader != "stack":
        problems.append(f"reader={config.reader!r} (needs 'stack')")
    elif model.projection is not None and config.projection != ProjectionConfig():
        problems.append(
            f"projection {config.projection.kind!r}, bias={config.projection.bias}, "
            f"fuse_layers={config.projection.fuse_layers}, boundary={config.projection.boundary} (needs linear with "
            "bias, of the last layer, and no boundary)"
        )
    if model.encoder is not None and "m2m_100" not in model.encoder.family.model_types:
        problems.append(f"a {model.encoder.model.config.model_type} encoder (needs NLLB or M2M-100)")
    if config.causal:
        problems.append("causal=True (needs a bidirectional LLM)")
    if config.head is not None:
        problems.append("a task head (export the model without one)")
    if config.encoder_adapter is not None:
        problems.append("a LoRA in the encoder (merge it first: `mtllm convert --to merged`)")
    if problems:
        raise ValueError(f"model: the {MODEL_TYPE} layout has no place for {'; '.join(problems)}")


def merged_decoder(llm: PackedLLM, adapter: str | None) -> dict[str, Tensor]:
    """The decoder's weights with `adapter` merged into them, under the names that they have without adapters."""
    state = llm.decoder.state_dict()
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, layer in llm.decoder.named_modules():
        if adapter in getattr(layer, "lora_A", ()) and adapter not in layer.merged_adapters:
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)
    return merged


def read_configs(path: Path) -> tuple[Any, Any]:
    """The configs of encoder and LLM. Raises ValueError where the folder does not have them."""
    from transformers import CONFIG_MAPPING

    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"folder={str(path)!r}: holds no config.json; expected a local {MODEL_TYPE} model")
    data = json.loads(file.read_text(encoding="utf-8"))
    if data.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"folder={str(path)!r}: its config.json is of a {data.get('model_type')!r} model, expected {MODEL_TYPE!r}"
        )
    parts = {name: value for name, value in data.items() if isinstance(value, dict) and "model_type" in value}
    encoders = [value for value in parts.values() if value["model_type"] in MODEL_TYPES]
    llms = [value for value in parts.values() if value["model_type"] not in MODEL_TYPES]
    if len(encoders) != 1 or len(llms) != 1 or llms[0]["model_type"] not in CONFIG_MAPPING:
        found = ", ".join(f"{name} ({value['model_type']})" for name, value in parts.items()) or "none"
        raise ValueError(
            f"folder={str(path)!r}: config.json needs the config of an encoder ({', '.join(MODEL_TYPES)}) and of an "
            f"LLM (nllb_config, llm2vec_config); found: {found}"
        )
    encoder, llm = (CONFIG_MAPPING[value["model_type"]].from_dict(value) for value in (encoders[0], llms[0]))
    return encoder, llm


def read_state(path: Path) -> dict[str, Tensor]:
    """All weights of the folder under their own names, separate adapter included."""
    state = read_safetensors(path, "model")
    if (path / "adapter_model.safetensors").is_file():
        state.update(read_safetensors(path, "adapter_model"))
    return state


def our_name(name: str) -> str:
    """Their name of a weight -> `encoder.*`, `projection.*` or `llm.*`; a name of another kind stays as it is."""
    plain = name.replace("base_model.model.", "").replace(".base_layer.", ".")
    first, _, rest = plain.partition(".")
    if first not in _PARTS:
        return name
    lora = _LORA.fullmatch(rest)
    return f"{_PARTS[first]}.{lora['layer']}.lora_{lora['side']}.weight" if lora else f"{_PARTS[first]}.{rest}"


def their_name(name: str) -> str:
    first, _, rest = name.partition(".")
    return next((f"{theirs}.{rest}" for theirs, ours in _PARTS.items() if ours == first), name)


def adapter_settings(path: Path, state: Mapping[str, Tensor]) -> LoraSettings | None:
    """The settings of the LoRA weights among `state`, None without any.

    Raises:
        ValueError: adapter_config.json is missing, so that alpha is unknown, or the adapter is of another kind.
    """
    weights = {name: tensor for name, tensor in state.items() if name.startswith("llm.") and ".lora_A." in name}
    if not weights:
        return None
    file = path / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"folder={str(path)!r}: has LoRA weights but no adapter_config.json, which says their alpha")
    data = json.loads(file.read_text(encoding="utf-8"))
    odd = [f"{name}={data[name]!r}" for name in _UNSUPPORTED if data.get(name)]
    if odd or "lora_alpha" not in data:
        raise ValueError(f"{file}: expected plain LoRA with lora_alpha, got {', '.join(odd) or 'no lora_alpha'}")
    targets = {name.split(".lora_A.")[0].rsplit(".", 1)[-1] for name in weights}
    rank = int(data.get("r") or next(iter(weights.values())).shape[0])
    return LoraSettings(rank, data["lora_alpha"], float(data.get("lora_dropout") or 0.0), tuple(sorted(targets)))


def expected_shapes(encoder_config: Any, llm_config: Any, adapters: LoraSettings | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a model with these configs has."""
    from transformers import AutoModel

    with torch.device("meta"):
        parts = {"encoder": family_of(encoder_config).build(encoder_config), "llm": AutoModel.from_config(llm_config)}
    shapes = {
        f"{part}.{name}": tuple(t.shape) for part, model in parts.items() for name, t in model.state_dict().items()
    }
    width = llm_config.get_text_config().hidden_size
    shapes |= {
        "projection.weight": (width, family_of(encoder_config).width(encoder_config)),
        "projection.bias": (width,),
    }
    if adapters:
        for name, shape in list(shapes.items()):
            layer = name.removesuffix(".weight")
            if name.startswith("llm.") and len(shape) == 2 and layer.rsplit(".", 1)[-1] in adapters.target_modules:
                shapes[f"{layer}.lora_A.weight"] = (adapters.r, shape[1])
                shapes[f"{layer}.lora_B.weight"] = (shape[0], adapters.r)
    return shapes


def check_state(
    path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> None:
    """Raise one ValueError that names every weight that is missing, unexpected or of the wrong shape."""
    missing = sorted(their_name(name) for name in set(shapes) - set(state))
    unexpected = sorted(names[name] for name in set(state) - set(shapes))
    wrong = [
        f"{names[name]} is {tuple(tensor.shape)} instead of {shapes[name]}"
        for name, tensor in sorted(state.items())
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
    found = [f"{len(items)} {what}: {', '.join(items)}" for what, items in problems if items]
    if found:
        raise ValueError(f"folder={str(path)!r}: its weights do not fit its config. {'. '.join(found)}")


def read_tokenizer(path: Path, encoder_config: PreTrainedConfig) -> StackTokenizer:
    """NLLB's tokenizer out of the folder; encoding reads nothing else. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    if not (path / "tokenizer_config.json").is_file():
        raise ValueError(f"folder={str(path)!r}: holds no tokenizer; pass tokenizer=StackTokenizer(...)")
    # the folder's own config is of a kind that transformers does not know
    return StackTokenizer(AutoTokenizer.from_pretrained(str(path), config=encoder_config), None)
