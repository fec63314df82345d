"""Faults in the losses and heads."""

from __future__ import annotations

from .planted import Mutant, planted

LOSSES = ("tests/losses/test_distillation.py",)

MUTANTS: list[Mutant] = [
    *planted(
        "losses", "mtllm_fast/losses/distillation.py", LOSSES,
        ("softcap=lm_head.softcap if weights.kl and lm_head else None,", "softcap=None,"),
        ("head_bias=lm_head.bias.detach() if weights.kl and lm_head and lm_head.bias is not None else None,", "head_bias=None,"),
        ("terms[\"pooled_mse\"] = LossTerm(*(value / per_text for value in terms[\"pooled_mse\"]))", "terms[\"pooled_mse\"] = LossTerm(*(value * per_text for value in terms[\"pooled_mse\"]))"),
        ("terms[\"pooled_mse\"] = LossTerm(*(value / per_text for value in terms[\"pooled_mse\"]))",
         "terms[\"pooled_mse\"] = LossTerm(terms[\"pooled_mse\"].sum, terms[\"pooled_mse\"].count / per_text)"),
        ("per_text = batch.mt_spans.shape[1]", "per_text = batch.mt_spans.shape[0]"),
        ("terms[name] = LossTerm(terms[name].sum / self.variance[name], terms[name].count)", "terms[name] = LossTerm(terms[name].sum / self.variance[name], terms[name].count / self.variance[name])"),
        ("terms[name] = LossTerm(terms[name].sum / self.variance[name], terms[name].count)", "pass"),
        ("temperature=weights.temperature,", "temperature=1.0,"),
        ("LossTerm(*kl(task_head(pooled[0]), task_head(pooled[1]), weights.temperature))", "LossTerm(*kl(task_head(pooled[1]), task_head(pooled[0]), weights.temperature))"),
        ("LossTerm(*kl(task_head(pooled[0]), task_head(pooled[1]), weights.temperature))", "LossTerm(*kl(task_head(pooled[0]), task_head(pooled[1])))"),
        ("pooled = span_mean(student, batch.mt_spans), span_mean(teacher, batch.llm_spans)", "pooled = span_mean(student, batch.mt_spans), span_mean(teacher, batch.mt_spans)"),
        ("parts = [getattr(self.weights, name) * term.sum / max(counts[name], 1e-9) for name, term in terms.items()]", "parts = [term.sum / max(counts[name], 1e-9) for name, term in terms.items()]"),
        ("parts = [getattr(self.weights, name) * term.sum / max(counts[name], 1e-9) for name, term in terms.items()]", "parts = [getattr(self.weights, name) * term.sum / max(float(term.count), 1e-9) for name, term in terms.items()]"),
        ("texts, pairs = batch.num_rows * batch.weight, batch.num_pairs * batch.weight", "texts, pairs = batch.num_rows, batch.num_pairs"),
        ("sizes = {\"pooled_mse\": texts, \"paired_mse\": pairs, \"kl\": pairs, \"head_kl\": texts}", "sizes = {\"pooled_mse\": texts, \"paired_mse\": pairs, \"kl\": texts, \"head_kl\": texts}"),
        ("if not self.temperature > 0:", "if not self.temperature >= 0:"),
        ("paired=\"mse\" if weights.paired_mse else None,", "paired=\"mse\" if weights.needs_pairs else None,"),
        ("paired=\"mse\" if weights.paired_mse else None,", "paired=\"cosine\" if weights.paired_mse else None,"),
    ),
    *planted(
        "losses", "mtllm_fast/losses/reference.py", LOSSES,
        ("total = F.kl_div(log_q, log_p, reduction=\"sum\", log_target=True) * temperature**2", "total = F.kl_div(log_q, log_p, reduction=\"sum\", log_target=True) * temperature"),
        ("log_p = F.log_softmax(teacher_logits.float() / temperature, -1)", "log_p = F.log_softmax(teacher_logits.float(), -1)"),
        ("return (rows * weight).sum(), weight.sum().to(rows.dtype)", "return (rows * weight).sum(), rows.new_tensor(rows.numel())"),
        ("return total, total.new_tensor(student_logits.shape[0])", "return total, total.new_tensor(student_logits.numel())"),
    ),
    *planted(
        "losses", "mtllm_fast/models/heads.py", LOSSES,
        ("return logits.squeeze(-1) if self.config.kind == \"choice\" else logits", "return logits"),
        ("return hidden_mse.segment_mean(states, spans=spans)", "return hidden_mse.segment_mean(states, spans=spans).flip(-2)"),
    ),
]  # fmt: skip
