"""A smaller encoder learns the states of the whole one that `mtllm shrink` made it of, on unlabelled text.

Teacher: the whole encoder. Student: the smaller one of L layers, each f-th of the teacher's; all its weights are
trained, in float32 and without dropout. Texts are tokenised once, by the student's tokenizer: every token of it is one
of the teacher's, which reads the same pieces by its own numbers.

State i of the student is to be state i f of the teacher, for i = 0 to L, where state 0 is what the first layer reads:

    loss = mean over tokens, states and dimensions of (student_i - teacher_if)^2

States are compared before the encoder's final norm, as a stack reads them on; that norm stays the teacher's.

This is the loss of the method's own code, which compares state 0 too, and takes a mean of every state by itself, over
padding where there is some. Left out is its other term, of the same weight: the MSE of attention maps, which packed
attention never holds. It also masks 15 % of the tokens that both read, which is not done here.

The first phase of BiStil. Source: arXiv 2306.01709.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.read import TextRow
from ..data.tokenise import StackTokenizer
from ..losses import Objective
from ..models import MTLLM, MTLLMConfig, PackedEncoder
from ..models.encoder import check_encoder, fit_tokenizer
from ..models.encoders import family_of
from ..models.frozen import KINDS
from ..models.loading import base_tokenizer, load_config
from ..models.modes import without_dropout
from .automatic import on_gpu
from .inputs import check_language
from .record import Metrics
from .run import TASK_ROWS, Data, StageKind, run
from .stage import Stage
from .stage_config import CompressConfig

WIDEST = 16384  # what the kernels compare, in values of a token: kernels.hidden_mse_launch.MAX_WIDTH


def every_token(batch: Batch) -> Batch:
    """The batch with each token of the student's paired with the same one of the teacher's."""
    rows = torch.arange(batch.side("mt").num_tokens, device=batch.side("mt").device)
    return replace(batch, mt_rows=rows, llm_rows=rows)


class WholeEncoder(nn.Module):
    """The teacher, frozen and in evaluation mode.

    Args:
        ids: (V,) int64, its own number of each token of the student's.
        factor: of its states, each so many'th is one of the student's.
    """

    ids: Tensor
    needs_tokens = False

    def __init__(self, encoder: PackedEncoder, ids: Tensor, factor: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.factor = factor
        self.register_buffer("ids", ids, persistent=False)

    def train(self, mode: bool = True) -> WholeEncoder:
        return super().train(False)

    @torch.no_grad()
    def teach(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with the teacher's side, and those of its states (T, (L + 1) E) that the student is to have."""
        own = batch.side("mt")
        packed = replace(own, input_ids=self.ids[own.input_ids])
        states = self.encoder.layer_states(packed)[:: self.factor]
        return every_token(replace(batch, llm=packed)), torch.cat(states, -1)


class Compression(Stage):
    """A stage whose student and teacher have all their states side by side."""

    def __init__(self, student: MTLLM, teacher: WholeEncoder, rows: Iterable[TextRow], *, over_variance: bool) -> None:
        super().__init__(student, Objective({"paired_mse": 1.0}), rows, teacher=teacher, over_variance=over_variance)

    @property
    def beside(self) -> PackedEncoder:
        assert isinstance(self.teacher, WholeEncoder)
        return self.teacher.encoder

    def counts(self, batch: Batch) -> dict[str, float]:
        return super().counts(every_token(batch))

    def read(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The student's states (T, (L + 1) E), and the batch."""
        encoder = self.student.encoder
        assert encoder is not None
        return batch, torch.cat(encoder.layer_states(batch.side("mt")), -1)


def check(config: CompressConfig, data: Data) -> None:
    for name in ("encoder", "teacher"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing: name a folder or a hub model")
    _ = data.texts  # refuses a token store
    kind = config.train.base_weights
    if kind in KINDS:
        raise ValueError(
            f"base_weights={kind!r}: all weights of the encoder are trained; auto, fp32 and bf16 are the teacher's"
        )
    small = check_encoder(config.encoder, config.trust_remote_code)
    whole = load_config("teacher", config.teacher, config.trust_remote_code)
    if whole.model_type != small.model_type:
        raise ValueError(
            f"teacher={config.teacher!r}: is a {whole.model_type!r} model, encoder={config.encoder!r} a "
            f"{small.model_type!r} one; name the encoder that it was made of"
        )
    family = family_of(small)
    layers, width = family.num_layers(small), family.width(small)
    if family.width(whole) != width:
        raise ValueError(
            f"teacher={config.teacher!r}: its states are {family.width(whole)} wide, those of encoder="
            f"{config.encoder!r} {width}; name the encoder that it was made of"
        )
    if family.num_layers(whole) % layers:
        raise ValueError(
            f"teacher={config.teacher!r}: has {family.num_layers(whole)} layers, no multiple of the {layers} of "
            f"encoder={config.encoder!r}; make that with `mtllm shrink --layers`"
        )
    if on_gpu(config.train) and (layers + 1) * width > WIDEST:
        raise ValueError(
            f"encoder={config.encoder!r}: {layers + 1} states of width {width} are compared side by side, and a GPU "
            f"compares at most {WIDEST:,} values a token; keep fewer layers"
        )


def ids_of_teacher(own: StackTokenizer, whole: StackTokenizer, config: CompressConfig) -> Tensor:
    """(V,) int64, the teacher's number of each token of the student's tokenizer `own`; -1 where a number is no token's.

    Raises:
        ValueError: the teacher's tokenizer lacks a token, or puts other special tokens around a text.
    """
    known, tokens = whole.mt.get_vocab(), own.mt.get_vocab()
    made_of = f"name the encoder that encoder={config.encoder!r} was made of"
    if missing := [token for token in tokens if token not in known]:
        raise ValueError(
            f"teacher={config.teacher!r}: its tokenizer lacks {len(missing):,} of the {len(tokens):,} tokens of the "
            f"encoder, {min(missing)!r} for one; {made_of}"
        )
    ids = torch.full((max(tokens.values()) + 1,), -1)
    ids[torch.tensor(list(tokens.values()))] = torch.tensor([known[token] for token in tokens])
    for code in own.languages or (None,):
        row = [TextRow("", code)]
        if ids[own.mt_side(row).ids[0]].tolist() != whole.mt_side(row).ids[0].tolist():
            raise ValueError(
                f"teacher={config.teacher!r}: its tokenizer puts other special tokens around a text than that of the "
                f"encoder{f' (language {code})' if code else ''}; {made_of}"
            )
    return ids


def build(config: CompressConfig, data: Data, dtype: torch.dtype) -> Stage:
    own, whole = (base_tokenizer(MTLLMConfig("encoder", name)) for name in (config.encoder, config.teacher))
    fit_tokenizer(whole, check_encoder(config.teacher, config.trust_remote_code), config.teacher)
    ids, trust = ids_of_teacher(own, whole, config), config.trust_remote_code
    # `dtype` is that of frozen weights
    encoder = PackedEncoder.from_pretrained(config.encoder, torch.float32, trust_remote_code=trust)
    student = MTLLM.stack(encoder, reader="encoder", tokenizer=own)
    check_language(data.rows, student)
    encoder.requires_grad_(True)
    if encoder.final_norm is not None:
        encoder.final_norm.requires_grad_(False)
    without_dropout(encoder)
    teacher = PackedEncoder.from_pretrained(config.teacher, dtype, trust_remote_code=trust)
    taught = WholeEncoder(teacher, ids, teacher.num_layers // encoder.num_layers)
    return Compression(student, taught, data.texts, over_variance=config.over_variance)


# files of several languages often have one after the other, so the texts are shuffled
COMPRESS = StageKind("compress", CompressConfig, check, build, reads=("teacher",), shuffle=TASK_ROWS)


def compress(config: CompressConfig, rows: Iterable[TextRow], source: Mapping[str, object] | None = None) -> Metrics:
    """Distil the whole encoder on `rows` (re-iterable, e.g. `read_rows(...)`); see `run.run`."""
    return run(COMPRESS, config, Data(rows, source=source))
