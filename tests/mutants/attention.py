"""Faults in packed attention: the contract, the CPU backends, the arguments that the packages get."""

from __future__ import annotations

from .planted import Mutant, planted

ATTENTION = "tests/models/test_attention.py"
CONTRACT = (
    f"{ATTENTION}::test_the_contract_by_behaviour",
    f"{ATTENTION}::test_sdpa",
    f"{ATTENTION}::test_windows_about_as_long_as_a_sequence",
    f"{ATTENTION}::test_exclusive_windows_count_the_row_itself_both_ways",
    f"{ATTENTION}::test_empty_and_wrong_inputs",
    f"{ATTENTION}::test_autocast_decides_the_dtype",
    f"{ATTENTION}::test_another_scale",
)
FLEX = (
    "tests/models/test_attention_packages.py::test_flex_mask",
    "tests/models/test_attention_packages.py::test_flex_mask_at_windows_that_end_with_a_block",
    f"{ATTENTION}::test_flex_forward",
    f"{ATTENTION}::test_layers_of_one_plan_keep_their_own_caps_and_windows",
    f"{ATTENTION}::test_windows_about_as_long_as_a_sequence",
    f"{ATTENTION}::test_a_named_backend_is_never_replaced",
)
SDPA = (
    f"{ATTENTION}::test_sdpa",
    f"{ATTENTION}::test_what_is_not_finite_stays_in_its_sequence",
    f"{ATTENTION}::test_layers_of_one_plan_keep_their_own_caps_and_windows",
    f"{ATTENTION}::test_dropout_of_sdpa",
    f"{ATTENTION}::test_buckets_leave_ordered_rows_where_they_are",
    f"{ATTENTION}::test_sdpa_on_any_lengths",
    f"{ATTENTION}::test_sdpa_in_other_dtypes",
)
PACKAGES = ("tests/models/test_attention_packages.py",)

MUTANTS: list[Mutant] = [
    *planted(
        "attention", "mtllm_fast/models/attention/contract.py", CONTRACT,
        ("return seen if window is None else seen & (distance < window)", "return seen if window is None else seen & (distance <= window)"),
        ("return distance.abs() <= window if window is not None else", "return distance.abs() < window if window is not None else"),
        ("seen = distance >= 0", "seen = distance > 0"),
        ("return (None if self.window is None else self.window - 1), 0", "return self.window, 0"),
        ("return (None if self.window is None else self.window - 1), 0", "return (None if self.window is None else self.window - 1), None"),
        ("return self.window, self.window", "return self.window, 0"),
        ("k_s, v_s = k_s.repeat_interleave(groups, 1), v_s.repeat_interleave(groups, 1)", "k_s, v_s = k_s.repeat(1, groups, 1), v_s.repeat(1, groups, 1)"),
        ("if key not in self._made:", "if not self._made:"),
        ("return tuple(length for length in self.batch.lengths if length)", "return self.batch.lengths"),
    ),
    *planted(
        "attention", "mtllm_fast/models/attention/choice.py", CONTRACT,
        ("if window is not None and plan.exclusive and not plan.causal:", "if window is not None and plan.exclusive:"),
        ("if window is not None and plan.exclusive and not plan.causal:", "if False:"),
        ("if window is not None and window >= plan.batch.max_seqlen:", "if window is not None and window >= plan.batch.max_seqlen - 1:"),
        ("scale=q.shape[2] ** -0.5 if scale is None else scale,", "scale=q.shape[1] ** -0.5 if scale is None else scale,"),
        ("scale=q.shape[2] ** -0.5 if scale is None else scale,", "scale=q.shape[2] ** -0.5,"),
        ("if q.shape[1] % k.shape[1]:", "if q.shape[1] < k.shape[1]:"),
        ("        softcap=softcap,\n", "        softcap=None,\n"),
        ("if window is not None and window < 1:", "if window is not None and window < 0:"),
    ),
    *planted(
        "attention", "mtllm_fast/models/attention/sdpa.py", SDPA,
        ("window = call.window if call.window is not None and call.window < length else None", "window = call.window if call.window is not None and call.window < length - 1 else None"),
        ("if valid is None or call.causal:", "if valid is None or not call.causal:"),
        ("mask = visible(steps[:, None] - steps, call.causal, window)", "mask = visible(steps - steps[:, None], call.causal, window)"),
        ("return (mask & valid[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=mask.device)", "return mask & valid[:, None, None, :]",
         "torch's CPU attention gives 0 in a row that sees nothing, with finite gradients; other backends need not"),
        ("rows.append((starts[members, None] + torch.where(inside, steps, 0)).flatten())", "rows.append((starts[members, None] + steps).clamp(max=int(all_lengths.sum()) - 1).flatten())"),
        ("while last < len(sorted_lengths) and sorted_lengths[last] >= floor:", "while last < len(sorted_lengths) and sorted_lengths[last] > floor + 4:"),
        ("slots[row_of_slot[real]] = real.nonzero().squeeze(1)", "slots[row_of_slot[real]] = torch.arange(int(real.sum()))"),
        ("if bool(real.all()) and bool((row_of_slot.diff() == 1).all()):", "if bool(real.all()):"),
        ("k, v = k.repeat_interleave(call.groups, 1), v.repeat_interleave(call.groups, 1)", "k, v = k.repeat(1, call.groups, 1, 1), v.repeat(1, call.groups, 1, 1)"),
        ("scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * (call.scale / softcap))", "scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * call.scale)"),
        ("scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * (call.scale / softcap))", "scores = (q @ k.transpose(-1, -2)) * call.scale"),
        ("is_causal = call.causal and mask is None", "is_causal = False"),
        ("weights = F.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), call.dropout, call.dropout > 0)", "weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)"),
        ("q, k, v, mask, call.dropout, is_causal=is_causal, scale=call.scale, enable_gqa=grouped", "q, k, v, mask, 0.0, is_causal=is_causal, scale=call.scale, enable_gqa=grouped"),
        ("shapes = [(len(list(run)), length) for length, run in groupby(lengths)]", "shapes = [(len(list(run)), length) for length, run in groupby(sorted(lengths))]"),
    ),
    *planted(
        "attention", "mtllm_fast/models/attention/flex.py", FLEX,
        ("cap = plan.cached((\"flex cap\", call.softcap), lambda: make_cap(bound))", "cap = plan.cached(\"flex cap\", lambda: make_cap(bound))"),
        ("mask = plan.cached((\"flex\", call.window), lambda: make_block_mask(plan, call.window))", "mask = plan.cached(\"flex\", lambda: make_block_mask(plan, call.window))"),
        ("reach = window - 1 if causal else window", "reach = window"),
        ("every &= (apart + 1) * BLOCK - 1 <= reach", "every &= apart * BLOCK <= reach"),
        ("some &= np.maximum((apart - 1) * BLOCK + 1, 0) <= reach", "some &= apart * BLOCK <= reach"),
        ("every &= index[:, None] > index", "every &= index[:, None] >= index"),
        ("some &= index[:, None] >= index", "some &= index[:, None] > index"),
        ("return (sequence[i] == sequence[j]) & visible(i - j, causal, limit)", "return visible(i - j, causal, limit)"),
        ("return (sequence[i] == sequence[j]) & visible(i - j, causal, limit)", "return (sequence[i] == sequence[j]) & visible(j - i, causal, limit)"),
        ("return softcap * torch.tanh(score / softcap)", "return torch.tanh(score / softcap)"),
    ),
    *planted(
        "attention", "mtllm_fast/models/attention/varlen.py", PACKAGES,
        ("window_size=(-1 if left is None else left, -1 if right is None else right),", "window_size=(-1 if left is None else left, 0),"),
        ("k, v = (x.repeat_interleave(call.groups, dim=1) for x in (k, v))", "k, v = (x.repeat(1, call.groups, 1) for x in (k, v))"),
        ("grouped[\"enable_gqa\"] = True", "pass"),
        ("scale=call.scale,", "scale=None,"),
        ("if call.softcap is not None:", "if False:"),
    ),
    *planted(
        "attention", "mtllm_fast/models/attention/xformers.py", PACKAGES,
        ("return blocks.make_causal() if window is None else blocks.make_local_attention(window)", "return blocks.make_causal() if window is None else blocks.make_local_attention(window + 1)"),
        ("bias = plan.cached((\"xformers\", call.window), lambda: make_bias(plan, call.window))", "bias = plan.cached((\"xformers\", call.window), lambda: make_bias(plan, None))"),
        ("k, v = k.repeat_interleave(call.groups, 1), v.repeat_interleave(call.groups, 1)", "k, v = k.repeat(1, call.groups, 1), v.repeat(1, call.groups, 1)"),
    ),
]  # fmt: skip
