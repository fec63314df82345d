"""Published stacks of other systems as MTLLM models: MindMerger's mapping, LangBridge's whole checkpoint.

MindMerger (arXiv 2405.17386) saves its mapping alone, by `torch.save`, beside base models that it leaves as they are:

    {"model_state_dict": {mlp.linear1.{weight,bias}, mlp.linear2.{weight,bias}, end_boundary (1, 1, D)}}

LangBridge (arXiv 2401.10695) saves everything in Hugging Face's form: config.json (enc, lm, alignments), and

    lb.enc.*, lb.lm.*, lb.lm_head.weight, lb.alignment.enc_eos (D,), lb.alignment.linear.{weight,bias}, or
    lb.alignment.ffn.{0,2}.{weight,bias} of its feed-forward with GELU

Both read `[BOS] text boundary prompt`, which is what `models.inputs` composes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .loading import read_safetensors
from .mtllm import MTLLM
from .projection import ProjectionConfig

# LangBridge's alignments: what they are here, and the names of their weights
_ALIGNMENTS = {
    "linear": (ProjectionConfig(boundary=True), {"linear": "layers"}),
    "ffn": (
        ProjectionConfig(kind="mlp", activation="gelu", boundary=True),
        {"ffn.0": "layers.0", "ffn.2": "layers.2"},
    ),
}
# and why there is no place for another
_NO_PLACE = {"latent": "a perceiver, which gives a fixed number of states for every text"}


def load_mindmerger(file: str | Path, encoder: str, llm: str, *, dtype: torch.dtype | None = None) -> MTLLM:
    """MindMerger's mapping between the base models that it was trained for.

    Args:
        file: its pytorch_model.bin, read as tensors alone (no code in it is run).
        encoder, llm: folders or hub names of the base models.

    Raises:
        ValueError: the file is of another kind, or does not fit the base models.
    """
    path, where = Path(file), f"model={str(file)!r}"
    if not path.is_file():
        raise ValueError(f"{where}: no such file; MindMerger saves its mapping as pytorch_model.bin")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{where}: cannot be read as tensors: {str(error).splitlines()[0]}") from None
    state = state.get("model_state_dict") if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{where}: holds no 'model_state_dict'; expected what MindMerger's training saves")
    projection = ProjectionConfig(kind="mlp", boundary=True)
    model = MTLLM.stack(encoder, llm, causal=True, projection=projection, dtype=dtype)
    renamed = {
        "mlp.linear1.weight": "layers.0.weight",
        "mlp.linear1.bias": "layers.0.bias",
        "mlp.linear2.weight": "layers.2.weight",
        "mlp.linear2.bias": "layers.2.bias",
        "end_boundary": "boundary",
    }
    _fill(model.require_stack().projection, _named(state, renamed), where, renamed)
    return model.eval()


def load_langbridge(
    folder: str | Path, *, encoder: str | None = None, llm: str | None = None, dtype: torch.dtype | None = None
) -> MTLLM:
    """A LangBridge checkpoint, with the encoder's and the LLM's weights that it brings.

    Args:
        folder: a local copy, safetensors only; its remote code is not run.
        encoder, llm: where the base models' configs and tokenizers are, if not where config.json says.

    Raises:
        ValueError: another kind of folder, an alignment that has no place here, or weights that do not fit.
    """
    path, where = Path(folder), f"model={str(folder)!r}"
    if not (path / "config.json").is_file():
        raise ValueError(f"{where}: holds no config.json; expected a local LangBridge model")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if not {"enc", "lm", "alignments"} <= config.keys():
        raise ValueError(f"{where}: its config.json names no enc, lm and alignments, so it is no LangBridge model")
    if config["alignments"] not in _ALIGNMENTS:
        lacks, known = _NO_PLACE.get(config["alignments"], "unknown"), " and ".join(map(repr, _ALIGNMENTS))
        raise ValueError(f"{where}: alignments={config['alignments']!r} is {lacks}; only {known} can be read")
    state = read_safetensors(path, "model")
    projection, layers = _ALIGNMENTS[config["alignments"]]
    model = MTLLM.stack(encoder or config["enc"], llm or config["lm"], causal=True, projection=projection, dtype=dtype)
    stack = model.require_stack()
    vocabulary = state.get("lb.lm.embed_tokens.weight")
    if vocabulary is not None and vocabulary.shape[0] != stack.llm.vocab_size:  # tokens were added
        stack.llm.model.resize_token_embeddings(vocabulary.shape[0], mean_resizing=False)
    names = {f"{theirs}.{part}": f"{own}.{part}" for theirs, own in layers.items() for part in ("weight", "bias")}
    names["enc_eos"] = "boundary"
    renamed = {f"lb.alignment.{theirs}": ours for theirs, ours in names.items()}
    _fill(stack.projection, _named(state, renamed), where, renamed)
    shared = {"lb.enc.shared.weight": "embed_tokens.weight"}
    _fill(stack.encoder.model, _under(state, "lb.enc.encoder.") | _named(state, shared), where)
    _fill(stack.llm.decoder, _under(state, "lb.lm."), where)
    head = stack.llm.model.get_output_embeddings()
    _fill(head, _under(state, "lb.lm_head."), where)
    stack.encoder.name = stack.llm.name = model.config.encoder = model.config.llm = None  # they are its own by now
    return model.eval()


def _named(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {ours: state[theirs] for theirs, ours in names.items() if theirs in state}


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@torch.no_grad()
def _fill(part: nn.Module, state: Mapping[str, Tensor], where: str, names: Mapping[str, str] | None = None) -> None:
    """Copy the weights into `part`. Raises ValueError for one that is missing, too many or of another shape."""
    own = dict(part.named_parameters())
    theirs = {ours: name for name, ours in (names or {}).items()}
    state = {name: tensor.flatten() if own.get(name, tensor).ndim == 1 else tensor for name, tensor in state.items()}
    missing = [theirs.get(name, name) for name in own if name not in state]
    unknown = [name for name in state if name not in own and not name.endswith("inv_freq")]
    wrong = [
        f"{theirs.get(name, name)} is {tuple(state[name].shape)} instead of {tuple(p.shape)}"
        for name, p in own.items()
        if name in state and state[name].shape != p.shape
    ]
    problems = (("missing", missing), ("unexpected", unknown), ("of the wrong shape", wrong))
    if found := [f"{len(items)} {what}: {', '.join(items[:8])}" for what, items in problems if items]:
        raise ValueError(f"{where}: its weights do not fit the base models. {'. '.join(found)}")
    for name, parameter in own.items():
        parameter.copy_(state[name])
