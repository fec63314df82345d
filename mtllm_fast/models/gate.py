"""Whether packed rows of a decoder are its own rows, found out by running it.

Only attention is told where packed sequences end. A decoder that mixes rows in another way (a recurrence, a
convolution, a token shift), that finds its positions or its mask by itself, or that attends in a way the packed call
does not pass on (chunks, sinks, a position bias) would give other numbers in silence. So a twin of it, made from its
config with random weights, in float32, on the CPU, with the first layers that show every kind of layer and short
windows, reads three tiny sequences packed, and each alone as transformers runs it by itself.

The verdict is kept for the config: a second model of it costs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.pack import PackedBatch
from .attention import NAME, AttentionPlan, run_packed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCE = 1e-5  # of a row's largest element: Llama 3 8B's rounding is 1.4e-6 of it, Gemma 4's 4.7e-6
_ROUNDING = 10.0  # times what the twin's own rows move by for half a float32 unit of its weights, where that is more
_LENGTHS = (9, 6, 1)
_WINDOW = 3
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
_NARROW = {  # fields that make a twin large and say nothing of how rows mix
    "vocab_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "max_position_embeddings": 512,
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_SMALL, _LARGEST = 2_000_000, 1_500_000_000  # parameters: built as it is, and no twin at all


@dataclass(frozen=True)
class Verdict:
    """refusal: why packed rows would be others, None where they are equal. exclusive: see `AttentionPlan`."""

    refusal: str | None = None
    exclusive: bool = False


_verdicts: dict[tuple[type, str, bool], Verdict] = {}


def judge(decoder: type[PreTrainedModel], config: PreTrainedConfig, causal: bool) -> Verdict:
    """The verdict on decoders of class `decoder` with the text `config`; the random state stays as it is."""
    key = (decoder, config.to_json_string(), causal)
    if key not in _verdicts:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            _verdicts[key] = _judged(decoder, config, causal)
    return _verdicts[key]


def require(model: PreTrainedModel, causal: bool) -> Verdict:
    """The verdict on `model`, a causal LM. Raises ValueError where it is a refusal."""
    config, decoder = model.config.get_text_config(decoder=True), model.get_decoder()
    if decoder is model or not hasattr(decoder, "get_input_embeddings"):
        raise ValueError(f"llm: {type(model).__name__} gives no decoder without its LM head (get_decoder)")
    verdict = judge(type(decoder), config, causal)
    if verdict.refusal is not None:
        asked = "causal" if causal else "bidirectional"
        raise ValueError(f"llm: {type(model).__name__} cannot be read on packed {asked} rows: {verdict.refusal}")
    return verdict


def _judged(decoder: type[PreTrainedModel], config: PreTrainedConfig, causal: bool) -> Verdict:
    twin, error = _twin(decoder, config)
    if twin is None:
        return Verdict(f"no twin of it could be built from its config to check that ({error})")
    generator = torch.Generator().manual_seed(1)
    table = twin.get_input_embeddings()
    ids = [torch.randint(3, min(table.num_embeddings, 64), (n,), generator=generator) for n in _LENGTHS]
    try:
        own, looks_ahead = _own_rows(twin, ids)
    except Exception as problem:
        return Verdict(f"transformers itself does not run it on plain tokens ({_line(problem)})")
    if looks_ahead and config.model_type in _masked_models():
        return Verdict(f"{config.model_type!r} is a masked language model, no causal one")
    if causal and looks_ahead:
        return Verdict("its own attention looks both ways; stack it with causal=False")
    if not causal and not looks_ahead:
        own, looks_ahead = _own_rows_both_ways(twin, ids) or (own, False)
    packed = PackedBatch.from_sequences([one.tolist() for one in ids])
    try:
        twin.set_attn_implementation(NAME)
        choices = [False] if causal else [False, True]
        for exclusive in choices:
            rows = run_packed(twin, AttentionPlan(packed, causal, exclusive=exclusive))
            if not causal and not looks_ahead:  # transformers cannot say what is right: only that packs do not matter
                alone = [PackedBatch.from_sequences([one.tolist()]) for one in ids]
                own = torch.cat([run_packed(twin, AttentionPlan(one, causal)) for one in alone])
                if not _moved(own[: _LENGTHS[0]], run_packed(twin, AttentionPlan(_changed(alone[0]), causal))):
                    return Verdict("it stays causal")
            if _apart(rows, own) <= TOLERANCE or _apart(rows, own) <= _ROUNDING * _rounding(twin, ids):
                break
        else:
            return Verdict(
                "only attention knows where packed sequences end, and this model's rows depend on other things: they "
                f"differ from those of each text alone by {_apart(rows, own):.2g} of the largest element"
            )
        embedded = run_packed(twin, AttentionPlan(packed, causal, exclusive=exclusive), table(packed.input_ids))
    except Exception as problem:
        return Verdict(f"its layers do not take the packed attention call ({_line(problem)})")
    if not _apart(embedded, rows) <= TOLERANCE:
        return Verdict("it reads token ids beside the input embeddings, which a stack cannot give")
    return Verdict(exclusive=exclusive)


def _rounding(twin: PreTrainedModel, ids: list[Tensor]) -> float:
    """How far the rows that transformers gives move when every weight moves by half a float32 unit; at most 1e-5."""
    before, _ = _own_rows(twin, ids)
    generator, kept = torch.Generator().manual_seed(2), [parameter.clone() for parameter in twin.parameters()]
    for parameter in twin.parameters():
        parameter.mul_(1 + 6e-8 * torch.randn(parameter.shape, generator=generator))
    after, _ = _own_rows(twin, ids)
    for parameter, value in zip(twin.parameters(), kept, strict=True):
        parameter.copy_(value)
    twin.set_attn_implementation(NAME)
    return min(_apart(after, before), TOLERANCE)


def _own_rows_both_ways(twin: PreTrainedModel, ids: list[Tensor]) -> tuple[Tensor, bool] | None:
    """`_own_rows` by transformers' switch, None where the family has none."""
    twin.config.is_causal = False
    try:
        own, looks_ahead = _own_rows(twin, ids)
    except Exception:  # the family's own code needs the causal mask
        return None
    finally:
        twin.config.is_causal = True
    return (own, True) if looks_ahead else None


def _own_rows(twin: PreTrainedModel, ids: list[Tensor]) -> tuple[Tensor, bool]:
    """States (T, D) as transformers gives them, each sequence alone; whether a row sees a later one."""
    twin.set_attn_implementation("eager")

    def run(one: Tensor) -> Tensor:
        return twin(input_ids=one[None], use_cache=False).last_hidden_state[0]

    states = [run(one) for one in ids]
    other = ids[0].clone()
    other[-1] = 3 if other[-1] != 3 else 4
    return torch.cat(states), _moved(states[0], run(other))


def _moved(before: Tensor, after: Tensor) -> bool:
    """Whether a row but the last is another."""
    return _apart(after[:-1], before[:-1]) > TOLERANCE


def _changed(one: PackedBatch) -> PackedBatch:
    ids = one.input_ids.tolist()
    return PackedBatch.from_sequences([[*ids[:-1], 3 if ids[-1] != 3 else 4]])


def _apart(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation of a row, in its largest element; NaN where there is one."""
    if actual.shape != expected.shape:
        return float("inf")
    return float(((actual - expected).abs().amax(-1) / expected.abs().amax(-1).clamp(min=1e-6)).max())


def _line(problem: Exception) -> str:
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0][:160]}" if text else type(problem).__name__


def _masked_models() -> Mapping[str, str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _twin(decoder: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[Any, str]:
    """A small decoder of the same kind with weights that matter, or None and why there is none."""
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    shown, size = _layers_that_show_all(decoder, config, layers)
    narrow = size > _SMALL
    attempts = [(shown, narrow), (shown, False), (layers, False)] if narrow else [(layers, False)]
    problem = "it has too many parameters"
    for count, narrowed in dict.fromkeys(attempts):
        small = _changed_config(config, layers, count, narrowed)
        try:
            with torch.device("meta"):
                if sum(p.numel() for p in decoder(copy.deepcopy(small)).parameters()) > _LARGEST:
                    continue
            twin = decoder(small).float().eval()
        except Exception as error:
            problem = _line(error)
            continue
        return _with_weights_that_matter(twin), ""
    return None, problem


def _changed_config(config: PreTrainedConfig, layers: int, count: int, narrow: bool) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    for name, value in list(vars(small).items()):
        if count < layers and isinstance(value, list | tuple | str) and len(value) == layers:
            setattr(small, name, value[:count])
    if count < layers:
        small.num_hidden_layers = count
    for name in _WINDOWS:
        value = getattr(small, name, None)
        if isinstance(value, int) and value > _WINDOW:
            setattr(small, name, _WINDOW)
    for name, most in _NARROW.items() if narrow else ():
        value = getattr(small, name, None)
        if isinstance(value, int) and value > most:
            setattr(small, name, most)
    for name in _TOKENS if narrow else ():
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    return small


def _layers_that_show_all(decoder: type[PreTrainedModel], config: PreTrainedConfig, layers: int) -> tuple[int, int]:
    """How many of the first layers show every kind of layer, and how many parameters the decoder has."""
    try:
        with torch.device("meta"):
            whole = decoder(copy.deepcopy(config))
    except Exception:  # not every constructor works there; the attempts say what is wrong
        return layers, _SMALL + 1
    size = sum(p.numel() for p in whole.parameters())
    stack = next((m for m in whole.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None)
    if stack is None:
        return layers, size
    kinds = [_kind(layer) for layer in stack]
    return max(kinds.index(kind) for kind in set(kinds)) + 1, size


def _kind(layer: nn.Module) -> tuple[Hashable, ...]:
    """What a layer is: its modules, their switches and windows, but not their sizes or place."""

    def told(name: str, value: object) -> bool:
        return name != "training" and (name in _WINDOWS or value is None or isinstance(value, bool | str))

    return tuple(
        (name, type(module), tuple((k, v) for k, v in vars(module).items() if k[0] != "_" and told(k, v)))
        for name, module in layer.named_modules()
    )


def _with_weights_that_matter(twin: PreTrainedModel) -> PreTrainedModel:
    """Products that keep the scale of their input: a small initialisation would hide what the rows depend on."""
    for parameter in twin.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        elif not parameter.any():
            parameter.normal_(0, 0.1)
    return twin
