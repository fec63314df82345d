"""Faults in training: the step, the loss over counts, the schedule, what is logged, who teaches, fitted projections."""

from __future__ import annotations

from .planted import Mutant, planted

HAND = "tests/training/test_by_hand.py"
STEP = (f"{HAND}::test_the_trainer_takes_the_steps_that_a_hand_written_loop_takes",)
SKIPPED = (*STEP, f"{HAND}::test_the_means_leave_out_a_skipped_step")
TEACHER = (
    f"{HAND}::test_the_task_teacher_teaches_without_its_dropout",
    "tests/training/test_distill_labels.py::test_mapped_by_name",
    "tests/training/test_distill_labels.py::test_three_labels_in_another_order",
)
TIES = (f"{HAND}::test_the_loss_settles_ties_alone",)
LOADER = ("tests/training/test_epoch_loader.py",)
RECORD = (
    "tests/training/test_record.py::test_a_resumed_run_reports_what_the_whole_one_does",
    "tests/training/test_record.py::test_epochs_are_passes",
    "tests/training/test_record.py::test_the_length_of_a_stream_is_known_after_one_pass",
)
UNLOGGED = ("tests/training/test_record.py::test_the_report_of_a_run_killed_before_its_metrics",)
PLACE = ("tests/training/test_record.py::test_a_checkpoint_says_where_its_last_batch_lies",)
OWN = (f"{HAND}::test_the_step_compares_the_students_own_states_with_the_teachers",)
FIT = ("tests/training/test_projection_fit.py",)
VARIANCE = ("tests/training/test_start_and_scale.py::test_losses_over_the_variance_of_the_teacher",)

MUTANTS: list[Mutant] = [
    *planted(
        "trainer", "mtllm_fast/training/trainer.py", STEP,
        ("inputs.weight * self.args.world_size)", "inputs.weight / 2)"),
        ("self.model_accepts_loss_kwargs = True", "self.model_accepts_loss_kwargs = False", "transformers asks loss_is_scaled_for_ga since 5.19; versions before it ask this"),
        ("self._term_sums[name] = self._term_sums.get(name, 0.0) + value.detach()", "self._term_sums[name] = value.detach()"),
        ("means = {name: total / max(good, 1) for name, total in record.sums.items()}", "means = {name: total for name, total in record.sums.items()}"),
        ("logs[\"loss\"] = sum(self.step_module.weights[name] * mean for name, mean in means.items())", "logs[\"loss\"] = sum(mean for name, mean in means.items())"),
        ("record.loss, record.steps = record.loss + logs[\"loss\"] * good, record.steps + good", "record.loss, record.steps = record.loss + logs[\"loss\"], record.steps + 1"),
        ("record.sums, record.since = {}, step", "record.sums, record.since = {}, 0"),
    ),
    *planted(
        "trainer", "mtllm_fast/losses/objective.py", STEP,
        ("torch.stack([self.term_weights[name] * value for name, value in values.items()])", "torch.stack([value for name, value in values.items()])"),
        ("term.sum * (factor / max(counts[name], 1e-9))", "term.sum * (factor / max(float(term.count), 1e-9))"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/arguments.py", STEP,
        ("warmup_steps=round(optim.warmup * steps),", "warmup_steps=0,"),
        ("warmup_steps=round(optim.warmup * steps),", "warmup_steps=round(optim.warmup * steps) + 1,"),
        ("lr_scheduler_type=\"linear\",", "lr_scheduler_type=\"constant_with_warmup\","),
        ("lr_scheduler_type=\"linear\",", "lr_scheduler_type=\"cosine\","),
        ("max_grad_norm=optim.clip,", "max_grad_norm=0.0,"),
        ("weight_decay=optim.weight_decay,", "weight_decay=0.0,"),
        ("gradient_accumulation_steps=optim.gradient_accumulation,", "gradient_accumulation_steps=1,"),
        ("learning_rate=optim.lr,", "learning_rate=optim.lr / 2,"),
        ("logging_steps=optim.log_steps,", "logging_steps=1,"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/trainer.py", SKIPPED[1:],
        ("self._term_sums, self.bad_since_log = {}, 0", "self._term_sums = {}"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/trainer.py", TIES,
        ("scores[\"selection\"] = scores[\"accuracy\"] - 1e-4 * scores[\"loss\"] / (1 + scores[\"loss\"])", "scores[\"selection\"] = scores[\"accuracy\"] + 1e-4 * scores[\"loss\"] / (1 + scores[\"loss\"])"),
        ("scores[\"selection\"] = scores[\"accuracy\"] - 1e-4 * scores[\"loss\"] / (1 + scores[\"loss\"])", "scores[\"selection\"] = scores[\"accuracy\"]"),
        ("scores[\"selection\"] = scores[\"accuracy\"] - 1e-4 * scores[\"loss\"] / (1 + scores[\"loss\"])", "scores[\"selection\"] = scores[\"accuracy\"] - 0.1 * scores[\"loss\"] / (1 + scores[\"loss\"])"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/epochs.py", LOADER,
        ("return sum(self.dataset.size(packs) for packs in self.epoch_packs)", "return sum(self.epoch_packs)"),
        ("stream = self.dataset.read_before(batch - self._batches_of_epochs())", "stream = self.dataset.read_before(batch)"),
        ("skip, epoch = max(self.start - self._batches_of_epochs(), 0), len(self.epoch_packs)", "skip, epoch = self.start, len(self.epoch_packs)"),
        ("skip, epoch, self.after = max(skip - size, 0), epoch + 1, None", "skip, epoch, self.after = 0, epoch + 1, None"),
        ("skip, epoch, self.after = max(skip - size, 0), epoch + 1, None", "skip, epoch, self.after = max(skip - size, 0), epoch, None"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/trainer.py", RECORD,
        ("self.packs.accumulation = self.args.gradient_accumulation_steps", "self.packs.accumulation = 1"),
        ("self.bad_since_log = self.record.bad", "self.bad_since_log = 1"),
        ("kept[RECORD] = self.record.state()", "kept[RECORD] = RunRecord().state()"),
        ("self.start_batch = steps * self.args.gradient_accumulation_steps", "self.start_batch = steps"),
        ("self.record.add(int(totals[-1]), len(self.loader.epoch_packs))", "self.record.add(len(batches), len(self.loader.epoch_packs))"),
        ("return self.flops(inputs) if inputs.weight else 0.0", "return 0.0"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/record.py", RECORD,
        ("self.rows_per_epoch, self.epoch_rows, self.epochs = self.epoch_rows, 0, epochs", "self.epoch_rows, self.epochs = 0, epochs"),
        ("return self.epochs + min(self.epoch_rows / self.rows_per_epoch, 1.0)", "return float(self.epochs)"),
        ("return cls(**found) if found else cls(since=steps)", "return cls(since=steps)"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/survival.py", SKIPPED[1:],
        ("        self._term_sums = self._sums_before\n", "        pass\n"),
        ("        self.bad_since_log += 1\n", "        pass\n"),
        ("model.zero_grad(set_to_none=True)\n        return norm", "return norm"),
        ("self._done, self._sums_before = [], dict(self._term_sums)", "self._done, self._sums_before = [], {}"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/task_teacher.py", TEACHER,
        ("    return replace(row, label=order[row.label])\n\n\nclass TaughtLabels", "    return row\n\n\nclass TaughtLabels"),
        ("return range(len(head.labels)) if labels is None else [head.labels.index(name) for name in labels]", "return range(len(head.labels)) if labels is None else [list(labels).index(name) for name in head.labels]"),
        ("own.add_adapter(config.adapters[\"student\"], TEACHER)", "own.add_adapter(student.config.adapters[\"student\"], TEACHER)"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/stage.py", TEACHER,
        ("return batch, self.student.teacher_states(batch.llm, self.adapter)", "return batch, self.student.teacher_states(batch.llm)"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/stage.py", OWN,
        ("return batch, self.student.states(batch.side(side))", "return batch, self.student.states(batch.side(side)) * 1.01"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/projection_fit.py", FIT,
        ("fit, check = slice(0, len(tokens) - held), slice(len(tokens) - held, None)", "fit, check = slice(0, len(tokens) - held), slice(0, held)"),
        ("unexplained.append(float(total_h - 2 * (weight * cross_h).sum() + (weight * (gram_h @ weight)).sum()))", "unexplained.append(float(total_h - (weight * cross_h).sum() + (weight * (gram_h @ weight)).sum()))"),
        ("best = min(range(len(PENALTIES)), key=unexplained.__getitem__)", "best = max(range(len(PENALTIES)), key=unexplained.__getitem__)"),
        ("best = min(range(len(PENALTIES)), key=unexplained.__getitem__)", "best = 0"),
        ("weight = cross / (values + PENALTIES[best] * values.mean())[:, None]", "weight = cross / (values + PENALTIES[best])[:, None]"),
        ("weight = basis @ weight * (total / spread).sqrt() if spread > 0 else basis @ weight", "weight = basis @ weight"),
        ("projection.bias.copy_(means[1] - means[0] @ weight)", "projection.bias.copy_(means[1])"),
        ("return (x, y) if bias else (torch.zeros_like(x), torch.zeros_like(y))", "return x, y"),
        ("return values.clamp_min(0), basis, basis.T @ cross, total", "return values.clamp_min(0), basis, cross, total"),
        ("share = 1 / frequency.float()[target]", "share = torch.ones_like(frequency.float()[target])"),
        ("directions = F.normalize(table - centre, dim=-1)", "directions = F.normalize(table, dim=-1)"),
        ("scale = (table - centre).norm(dim=-1).mean() / projected.norm(dim=-1).mean()", "scale = table.norm(dim=-1).mean() / projected.norm(dim=-1).mean()"),
        ("scale = (table - centre).norm(dim=-1).mean() / projected.norm(dim=-1).mean()", "scale = torch.ones(())"),
        ("projection.bias.copy_(scale * bias + centre)", "projection.bias.copy_(scale * bias)"),
        (").sum() + penalty / 2 * weight.square().sum()", ").sum()"),
        ("states.append((read if norm is None else norm(read))[batch.mt_rows].float())", "states.append(read[batch.mt_rows].float())"),
        ("tokens.append(batch.side(\"llm\").input_ids[batch.llm_rows])", "tokens.append(batch.side(\"llm\").input_ids[batch.llm_rows - 1])"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/teacher_variance.py", VARIANCE,
        ("return 0.0 if self.mean is None else self.squares / (self.count * len(self.mean))", "return 0.0 if self.mean is None else self.squares / self.count"),
        ("self.squares += squares + float(shift.square().sum()) * self.count * count / total", "self.squares += squares"),
        ("self.mean, self.count = self.mean + shift * (count / total), total", "self.mean, self.count = self.mean + shift, total"),
    ),
    *planted(
        "trainer", "mtllm_fast/losses/paired_mse.py", VARIANCE,
        ("return teacher.states[required(teacher.pair_rows)]", "return teacher.states"),
    ),
    *planted(
        "trainer", "mtllm_fast/models/encoder.py", ("tests/models/test_encoder_families.py::test_the_last_position_is_read_and_the_one_behind_it_refused",),
        ("if limit is not None and batch.max_seqlen > limit:", "if limit is not None and batch.max_seqlen >= limit:"),
        ("if limit is not None and batch.max_seqlen > limit:", "if limit is not None and batch.max_seqlen > limit + 1:"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/trainer.py", PLACE,
        ("batch = self.state.global_step * self.args.gradient_accumulation_steps", "batch = self.state.global_step"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/record.py", SKIPPED[1:],
        ("return step - self.since - self.bad", "return step - self.since"),
    ),
    *planted(
        "trainer", "mtllm_fast/training/record.py", UNLOGGED,
        ("\"train_loss\": (self.loss + rest) / max(self.steps + self.good_steps(steps), 1),", "\"train_loss\": self.loss / max(self.steps, 1),"),
    ),
]  # fmt: skip
