"""MTLLM: text -> MT encoder -> projection -> LLM, with its two single-sided readers as ablations.

`reader` says who reads the text:
    "stack"    MT encoder -> projection -> LLM with adapters   (the method)
    "llm"      LLM with adapters on its own tokens             (the task teacher, and reading a language directly)
    "encoder"  MT encoder alone                                (the baseline without an LLM)

Source of the method: arXiv 2406.12739.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..data.pack import PackedBatch
from ..data.tokenise import StackTokenizer
from .adapters import LoraSettings
from .attention import check_backend
from .checkpointing import recompute_layers
from .config import ENCODER_ADAPTER, READERS, MTLLMConfig, Reader, TrainEncoder
from .encoder import PackedEncoder
from .fusion import FusionSettings, check_fusion
from .generate import generate
from .heads import HeadConfig, TaskHead, segment_mean, span_mean
from .hub import check_push, push
from .llm import PackedLLM
from .loading import base_tokenizer
from .modes import evaluating
from .projection import Projection, ProjectionConfig
from .readers import EncoderReader, LLMReader, Side, StackReader, TextReader
from .storage import load, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from ..data.batch import Batch

Part = TypeVar("Part")


class MTLLMOutput(NamedTuple):
    last_hidden_state: Tensor  # (T, D) packed or (B, L, D) padded, as the input was
    pooled: Tensor  # (B, D) float32
    logits: Tensor | None  # (B, C) float32


class MTLLM(nn.Module):
    """The stack. Build one with `MTLLM.stack`, load one with `MTLLM.from_pretrained`.

    Attributes:
        encoder, llm: the base models on packed rows (None where `reader` does not need them).
        projection: E -> D, None unless `reader` is "stack".
        head: task head or None.
        tokenizer: the two tokenizers, language per row.
        changed: names of frozen base weights that are not the base models' own: they are saved with the model.
        shift: (E,) added to every encoder state that is read on, None for none; see `Engine.encoder_mean`. It is of
            the language that is read, so it is not saved.
    """

    def __init__(
        self,
        config: MTLLMConfig,
        encoder: PackedEncoder | None,
        llm: PackedLLM | None,
        tokenizer: StackTokenizer | None = None,
    ) -> None:
        super().__init__()
        if config.reader not in READERS:
            raise ValueError(f"reader={config.reader!r}: expected one of {', '.join(READERS)}")
        if encoder is None and config.reader != "llm":
            raise ValueError(f"encoder is missing: reader={config.reader!r} reads through it")
        if llm is None and config.reader != "encoder":
            raise ValueError(f"llm is missing: reader={config.reader!r} reads through it")
        self.config = config
        self.encoder, self.llm, self.tokenizer = encoder, llm, tokenizer
        if encoder is not None and tokenizer is not None:
            encoder.take_tokenizer(tokenizer)
        self.changed: set[str] = set()
        self.shift: Tensor | None = None
        self.projection: Projection | None = None
        if config.reader == "stack" and encoder is not None and llm is not None:
            device = next(encoder.parameters()).device
            self.projection = Projection(
                encoder.hidden_size, llm.hidden_size, config.projection, len(encoder.layers)
            ).to(device)
        self.head: TaskHead | None = None
        if config.head:
            self.set_head(config.head)
        if config.fusion:
            self.set_fusion(config.fusion)
        for base in self.bases.values():
            base.requires_grad_(False)
        for name, settings in config.adapters.items():
            self.backbone.add_adapter(settings, name)
        if config.adapters:
            self.backbone.train_adapter(next(iter(config.adapters)))
        if config.encoder_adapter is not None:
            if config.reader != "stack":
                raise ValueError(f"encoder_adapter: is of a stack's encoder; reader={config.reader!r} has `adapters`")
            base = self._required(encoder, "encoder")
            base.add_adapter(config.encoder_adapter, ENCODER_ADAPTER)
            base.requires_grad_(False)  # see `train_encoder`

    @classmethod
    def stack(
        cls,
        encoder: str | PackedEncoder | PreTrainedModel | None = None,
        llm: str | PackedLLM | PreTrainedModel | None = None,
        *,
        reader: Reader = "stack",
        tokenizer: StackTokenizer | None = None,
        causal: bool = False,
        projection: ProjectionConfig | None = None,
        lora: LoraSettings | None = None,
        head: HeadConfig | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        attention: str | None = None,
    ) -> MTLLM:
        """Stack `encoder` (folder, hub name or module) into `llm` (likewise).

        The projection starts at the scale of the LLM's own embeddings; `lora` adds the student's adapters.
        The tokenizers come from the same two places unless `tokenizer` is given; models made in memory need it.
        `attention` names the packed-attention backend of both; by default it is chosen by the call.

        Raises:
            ValueError: a name is not a model, or a model of a family that is not supported.
        """
        if isinstance(encoder, str):
            encoder = PackedEncoder.from_pretrained(encoder, dtype, trust_remote_code=trust_remote_code)
        elif encoder is not None and not isinstance(encoder, PackedEncoder):
            encoder = PackedEncoder(encoder)
        if isinstance(llm, str):
            llm = PackedLLM.from_pretrained(llm, causal, dtype, trust_remote_code=trust_remote_code)
        elif llm is not None and not isinstance(llm, PackedLLM):
            llm = PackedLLM(llm, causal)
        config = MTLLMConfig(
            reader=reader,
            encoder=encoder.name if encoder else None,
            llm=llm.name if llm else None,
            causal=llm.causal if llm else causal,
            projection=projection or ProjectionConfig(),
            adapters={"student": lora} if lora else {},
            head=head,
        )
        if tokenizer is None:
            tokenizer = base_tokenizer(config)
        model = cls(config, encoder, llm, tokenizer)
        if attention is not None:
            model.attention = attention
        model._scale_projection()
        return model

    @torch.no_grad()
    def _scale_projection(self) -> None:
        stack = self.reader
        if not isinstance(stack, StackReader):
            return
        # states of random tokens: only their scale matters, and it is set by the encoder's final norm
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, stack.encoder.vocab_size, (8, 16), generator=generator)
        device = next(stack.encoder.parameters()).device
        with evaluating(stack.encoder):
            states = stack.encoder(PackedBatch.from_sequences(ids.tolist()).to(device))
        stack.projection.scale_output(states, stack.llm.embedding_std())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        attention: str | None = None,
        encoder: str | None = None,
        llm: str | None = None,
        encoder_dtype: torch.dtype | None = None,
    ) -> MTLLM:
        """Load a folder written by `save_pretrained`, or the same layout on the hub.

        `encoder` and `llm` say where the base models are now, if not where they were when the model was saved; they are
        to be the same models.

        `dtype` is that of the base models' weights, `encoder_dtype` of the encoder's where it is to be another. Without
        them it is the one that they are stored in, which for an encoder that was trained is that of its trained
        weights.

        `attention` names the packed-attention backend; it belongs to the machine and is not saved with the model.

        Raises:
            ValueError: the folder is no MTLLM model, its files are damaged, or a base model cannot be found.
        """
        check_backend(attention)
        model = load(
            cls,
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            encoder_name=encoder or None,
            llm_name=llm or None,
            encoder_dtype=encoder_dtype,
        )
        model.attention = attention
        return model

    def save_pretrained(self, folder: str | Path, *, include_base: bool | None = None) -> None:
        """Write config, tokenizers and weights (safetensors, sharded) to `folder`.

        Args:
            include_base: also write the base models' weights, so that the folder needs nothing else. By default only
                where a base model was made in memory and has no name to be found by.
        """
        save(self, Path(folder), include_base=include_base)

    @property
    def attention(self) -> str | None:
        """Packed-attention backend of the encoder and the LLM (`mtllm doctor` lists them), None to choose by the call.

        Setting it raises ValueError for an unknown name; a call that the named backend cannot serve raises ValueError.
        """
        return self.backbone.attention

    @attention.setter
    def attention(self, name: str | None) -> None:
        for base in self.bases.values():
            base.attention = name

    @property
    def reader(self) -> TextReader:
        """Who reads the text, with the parts that it has."""
        if self.config.reader == "llm":
            return LLMReader(self.require_llm())
        encoder = self._required(self.encoder, "encoder")
        if self.config.reader == "encoder":
            return EncoderReader(encoder, self.shift, self.config.fusion)
        return StackReader(encoder, self._required(self.projection, "projection"), self.require_llm(), self.shift)

    def require_stack(self) -> StackReader:
        """The reader, where it is the stack of both. Raises ValueError where it is not."""
        reader = self.reader
        if not isinstance(reader, StackReader):
            raise ValueError(f"model: reader={self.config.reader!r} is no stack of an encoder and an LLM")
        return reader

    def require_llm(self) -> PackedLLM:
        """`llm`. Raises ValueError where there is none."""
        return self._required(self.llm, "llm")

    def require_tokenizer(self) -> StackTokenizer:
        """`tokenizer`. Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("model: has no tokenizer; load it with MTLLM.from_pretrained or stack it from folders")
        return self.tokenizer

    def _required(self, part: Part | None, name: str) -> Part:
        if part is None:
            raise ValueError(f"model: reader={self.config.reader!r} has no {name}")
        return part

    @property
    def bases(self) -> dict[str, PackedEncoder | PackedLLM]:
        """The base models by role, "encoder" and "llm", those that there are."""
        parts = (("encoder", self.encoder), ("llm", self.llm))
        return {role: part for role, part in parts if part is not None}

    @property
    def side(self) -> Side:
        """Which tokens the model reads."""
        return self.reader.side

    @property
    def backbone(self) -> PackedEncoder | PackedLLM:
        """The base model whose states are pooled and which carries the adapters."""
        return self.reader.backbone

    @property
    def hidden_size(self) -> int:
        return self.backbone.hidden_size

    def train(self, mode: bool = True) -> MTLLM:
        """As in torch, but a frozen encoder stays in eval mode: its dropout would only add noise."""
        super().train(mode)
        if self.encoder is not None and not any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def train_encoder(self, how: TrainEncoder, lora: LoraSettings | None = None) -> None:
        """Say what is trained of a stack's encoder. It is in training mode then, with its own dropout.

        Args:
            how: "no": nothing, as after loading; "lora": its LoRA, in float32 (LUSIFER, arXiv 2501.00874); "all": all
                of its weights (LangBridge, arXiv 2401.10695).
            lora: settings of the LoRA that is added where the encoder has none; None for the default ones.

        Raises:
            ValueError: the model is no stack; with "all", the encoder has a LoRA, or weights of less than 32 bits, in
                which small updates would be lost.
        """
        if how == "no":
            if self.encoder is not None and self.config.reader == "stack":
                self.encoder.requires_grad_(False)
            return
        encoder = self.require_stack().encoder
        if how == "lora":
            if self.config.encoder_adapter is None:
                self.config.encoder_adapter = lora or LoraSettings()
                encoder.add_adapter(self.config.encoder_adapter, ENCODER_ADAPTER)
            encoder.train_adapter(ENCODER_ADAPTER)
            return
        if how != "all":
            raise ValueError(f"train_encoder={how!r}: expected one of {', '.join(get_args(TrainEncoder))}")
        if self.config.encoder_adapter is not None:
            raise ValueError("train_encoder='all': the encoder has a LoRA; merge it before")
        narrow = {parameter.dtype for parameter in encoder.parameters() if parameter.dtype.itemsize < 4}
        if narrow:
            raise ValueError(f"train_encoder='all': the encoder's weights are {narrow.pop()}; load them in float32")
        encoder.requires_grad_(True)

    def set_head(self, config: HeadConfig) -> None:
        """Give the model a new task head (replacing the one it has)."""
        self.config.head = config
        weight = next(self.backbone.parameters())
        self.head = TaskHead(self.hidden_size, config).to(weight.device)

    def set_fusion(self, settings: FusionSettings) -> None:
        """Let these layers of the encoder read a text and its translation end to end; 0 of them end that.

        Rows are then read with their `teacher_text` (and `teacher_pair`), as English, where they have one.

        Raises:
            ValueError: the model is no encoder alone, or its encoder cannot do it in these layers.
        """
        if self.config.reader != "encoder" or self.encoder is None:
            raise ValueError(
                f"fusion.layers={settings.layers}: is for an encoder alone, not for reader={self.config.reader!r}"
            )
        check_fusion(settings, self.encoder.model.config, self.encoder.name)
        self.config.fusion = settings if settings.layers else None
        if self.tokenizer is not None:
            self.tokenizer.partners = self.config.fusion is not None

    @contextmanager
    def teacher(self, adapter: str | None = None) -> Iterator[None]:
        """Run the LLM inside the block as the teacher: adapter `adapter` (None: none) and no dropout."""
        llm = self.require_llm()
        self.adopt_adapters()
        with evaluating(llm), llm.adapter(adapter):
            yield

    def adopt_adapters(self) -> None:
        """Take over the LoRA that `peft.get_peft_model(model.llm.model, ...)` put into the backbone; the teacher and
        `save_pretrained` call this.

        Raises:
            ValueError: adapters that are no plain LoRA, or lie in another part of the model.
        """
        if hasattr(self, "peft_config"):
            raise ValueError("model: peft was given the whole stack; give it the backbone, e.g. model.llm.model")
        for role, part in self.bases.items():
            found = part.adopt_adapters()
            if found and part is not self.backbone:
                raise ValueError(f"{role}: peft put {', '.join(found)} into it; only the backbone's adapters are saved")
            self.config.adapters |= found

    def states(self, batch: PackedBatch) -> Tensor:
        """Last hidden states (T, D) of the packed rows of `side`."""
        if not batch.num_tokens:  # transformers' layers cannot be called on nothing
            return torch.zeros(0, self.hidden_size, dtype=self.dtype, device=batch.device)
        return self.reader.states(batch)

    def encoder_states(self, batch: PackedBatch) -> Tensor:
        """States (T, E) of the packed MT tokens that are read on: before the encoder's final norm in a stack.

        Raises:
            ValueError: the model reads through no encoder.
        """
        reader = self.reader
        if isinstance(reader, LLMReader):
            raise ValueError("model: reader='llm' reads through no encoder")
        return reader.encoder_states(batch)

    def projected(self, batch: PackedBatch) -> Tensor:
        """What the LLM of a stack reads in place of embeddings, (T, D): the projected encoder states of `batch`."""
        return self.require_stack().projected(batch)

    @torch.no_grad()
    def teacher_states(self, batch: PackedBatch, adapter: str | None = None) -> Tensor:
        """Last hidden states (T_llm, D) of the LLM on its own packed tokens, no gradient, no dropout.

        Args:
            adapter: None for the bare LLM (stage 1), "teacher" for the task teacher's adapter (stage 3).
        """
        with self.teacher(adapter):
            return self.require_llm()(batch)

    def pool(self, states: Tensor, batch: PackedBatch, spans: Tensor | None = None) -> Tensor:
        """Mean states: (B, D) per text, or (B, C, D) per choice span; float32."""
        return segment_mean(states, batch) if spans is None else span_mean(states, spans)

    def logits(self, batch: Batch) -> Tensor:
        """Task-head logits (B, C), float32, of a collated batch.

        Raises:
            ValueError: the model has no head.
        """
        if self.head is None:
            raise ValueError("the model has no task head: train one with `mtllm finetune` or `mtllm distill`")
        side = self.side
        packed, spans = batch.side(side), batch.mt_spans if side == "mt" else batch.llm_spans
        choice = self.head.config.kind == "choice"
        return self.head(self.pool(self.states(packed), packed, spans if choice else None))

    def forward(self, input_ids: Tensor | PackedBatch, attention_mask: Tensor | None = None) -> MTLLMOutput:
        """Packed (`PackedBatch`) or padded (`input_ids`, `attention_mask` (B, L)) tokens of `side`.

        A padded call is packed, run, and padded again with zeros; both give the same numbers.
        """
        if isinstance(input_ids, PackedBatch):
            packed, mask = input_ids, None
        else:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            packed = PackedBatch.from_padded(input_ids, mask)
        states = self.states(packed)
        pooled = self.pool(states, packed)
        logits = None
        if self.head is not None and self.head.config.kind == "classification":
            logits = self.head(pooled)
        if mask is not None:
            keep = mask.bool()
            padded = states.new_zeros((*keep.shape, states.shape[-1]))
            states = padded.masked_scatter(keep[..., None], states)
        return MTLLMOutput(states, pooled, logits)

    def generate(self, texts: Sequence[str], languages: str | Sequence[str] | None = None, **options: Any) -> list[str]:
        """What the LLM writes after reading `texts` through the encoder; options of `models.generate.generate_ids`."""
        return generate(self, texts, languages, **options)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model whose states are pooled; adapters, projection and head may have another."""
        return self.backbone.model.dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many parameters there are, as in transformers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def print_trainable_parameters(self) -> None:
        """Print the counts in peft's words."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, object] | None = None) -> None:
        """Let every layer that is trained through run again in backward: the backbone's, and those of an encoder with
        trained weights. Results are the same.

        Raises:
            ValueError: any of transformers' options but use_reentrant=False, which is how it is done.
        """
        for name, value in (gradient_checkpointing_kwargs or {}).items():
            if (name, value) != ("use_reentrant", False):
                raise ValueError(
                    f"gradient_checkpointing_kwargs: {name}={value!r}; only use_reentrant=False is supported"
                )
        for part in self.bases.values():
            if part is self.backbone or any(p.requires_grad for p in part.parameters()):
                recompute_layers(part)

    def push_to_hub(self, name: str, *, private: bool = True) -> str:
        """Save the model with its base models and upload it to the repository `name`; returns its address.

        Raises:
            ValueError: no hub name, or nobody logged in. OSError: the hub refuses or cannot be reached.
        """
        check_push(name)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_base=True)
            return push(folder, name, private=private)

    def describe(self) -> dict[str, str | int]:
        """Parameter counts: all and trainable."""
        return {
            "reader": self.config.reader,
            "parameters": self.num_parameters(),
            "trainable": self.num_parameters(only_trainable=True),
        }
