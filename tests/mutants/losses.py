"""Faults in the losses and heads."""

from __future__ import annotations

from .planted import Mutant, planted

LOSSES = ("tests/losses/test_distillation.py",)

MUTANTS: list[Mutant] = [
    *planted(
        "losses", "mtllm_fast/losses/lm_head_kl.py", LOSSES,
        ("\"softcap\": head.softcap,", "\"softcap\": None,"),
        ("\"head_bias\": None if head.bias is None else head.bias.detach(),", "\"head_bias\": None,"),
        ("\"temperature\": self.temperature,", "\"temperature\": 1.0,"),
        ("unit = \"pairs\"", "unit = \"rows\""),
    ),
    *planted(
        "losses", "mtllm_fast/losses/pooled_mse.py", LOSSES,
        ("return LossTerm(term.sum / per_text, term.count / per_text)", "return LossTerm(term.sum * per_text, term.count * per_text)"),
        ("return LossTerm(term.sum / per_text, term.count / per_text)", "return LossTerm(term.sum, term.count / per_text)"),
        ("per_text = given.student.spans.shape[1]", "per_text = given.student.spans.shape[0]"),
    ),
    *planted(
        "losses", "mtllm_fast/losses/paired_mse.py", LOSSES,
        ("\"paired\": True", "\"paired\": False"),
    ),
    *planted(
        "losses", "mtllm_fast/losses/fused.py", LOSSES,
        ("arguments: Arguments = {\"pooled\": False}", "arguments: Arguments = {\"pooled\": False, \"paired\": \"mse\"}"),
        ("\"rows_s\": given.student.pair_rows", "\"rows_s\": required(given.teacher).pair_rows"),
    ),
    *planted(
        "losses", "mtllm_fast/losses/objective.py", LOSSES,
        ("terms[name] = LossTerm(terms[name].sum / self.variance[name], terms[name].count)", "terms[name] = LossTerm(terms[name].sum / self.variance[name], terms[name].count / self.variance[name])"),
        ("terms[name] = LossTerm(terms[name].sum / self.variance[name], terms[name].count)", "pass"),
        ("torch.stack([self.term_weights[name] * value for name, value in values.items()])", "torch.stack([value for name, value in values.items()])"),
        ("term.sum * (factor / max(counts[name], 1e-9))", "term.sum * (factor / max(float(term.count), 1e-9))"),
        ("term.count(batch) * batch.weight", "term.count(batch)"),
    ),
    *planted(
        "losses", "mtllm_fast/losses/term.py", LOSSES,
        ("segment_mean(self.states, self.packed) if self.spans is None else span_mean(self.states, self.spans)", "segment_mean(self.states, self.packed)"),
        ("(batch.mt_spans, batch.mt_rows) if mt else (batch.llm_spans, batch.llm_rows)", "(batch.mt_spans, batch.mt_rows)"),
    ),
    *planted(
        "losses", "mtllm_fast/losses/distillation.py", LOSSES,
        ("if name.endswith(\"temperature\") and not value > 0:", "if name.endswith(\"temperature\") and not value >= 0:"),
    ),
    *planted(
        "losses", "mtllm_fast/losses/head_kl.py", LOSSES,
        ("total = kl(student, teacher, self.temperature, weights)", "total = kl(teacher, student, self.temperature, weights)"),
        ("total = kl(student, teacher, self.temperature, weights)", "total = kl(student, teacher, 1.0, weights)"),
        ("return total * temperature**2", "return total * temperature"),
        ("log_p = F.log_softmax(teacher_logits.float() / temperature, -1)", "log_p = F.log_softmax(teacher_logits.float(), -1)"),
        ("return LossTerm(total, total.new_tensor(rows_weighed(given.batch)))", "return LossTerm(total, total.new_tensor(2 * rows_weighed(given.batch)))"),
    ),
    *planted(
        "losses", "mtllm_fast/models/heads.py", LOSSES,
        ("return logits.squeeze(-1) if self.config.kind == \"choice\" else logits", "return logits"),
        ("return hidden_mse.segment_mean(states, spans=spans)", "return hidden_mse.segment_mean(states, spans=spans).flip(-2)"),
    ),
]  # fmt: skip
