"""Faults in the data path: alignment, packing, batches, tokenisation, the stream."""

from __future__ import annotations

from .planted import Mutant, planted

ALIGN = ("tests/data/test_align.py", "tests/data/test_collate.py")
PACK = ("tests/data/test_pack.py",)
BALANCE = ("tests/data/test_balance.py",)
COLLATE = ("tests/data/test_collate.py", "tests/data/test_stream.py::test_every_row_once_and_within_the_budget")
STREAM = (
    "tests/data/test_stream.py::test_every_row_once_and_within_the_budget",
    "tests/data/test_stream.py::test_packs_are_not_sorted_by_length",
    "tests/data/test_stream.py::test_order_depends_on_seed_and_epoch",
    "tests/data/test_stream.py::test_ranks_share_the_batches",
    "tests/data/test_stream.py::test_packs_and_rows_have_an_order_of_their_own_in_every_epoch",
    "tests/data/test_stream.py::test_any_row_of_the_buffer_leaves_next",
    "tests/data/test_stream.py::test_rows_that_were_cut_add_up_over_windows",
    "tests/data/test_stream.py::test_max_rows",
    "tests/data/test_stream.py::test_counts",
    "tests/data/test_balance.py",
    "tests/training/test_epoch_loader.py",
)
TOKENISE = ("tests/data/test_tokenise.py",)
CHARACTERS = ("tests/data/test_characters.py", "tests/data/test_align.py")
LONG = ("tests/data/test_long_text.py",)
SPLIT = ("tests/training/test_survival.py::test_halves_of_a_batch",)

MUTANTS: list[Mutant] = [
    *planted(
        "data", "mtllm_fast/data/align.py", ALIGN,
        ("rows = np.flatnonzero(end >= 0)[::-1]", "rows = np.flatnonzero(end >= 0)"),
        ("rows = np.flatnonzero(end >= 0)[::-1]", "rows = np.flatnonzero(end > 0)[::-1]"),
        ("rows = np.flatnonzero(end >= 0)[::-1]", "rows = np.flatnonzero(end >= -1)[::-1]"),
        ("stride = int(max(end_a.max(initial=0), end_b.max(initial=0))) + 1", "stride = int(max(end_a.max(initial=0), end_b.max(initial=0)))"),
        ("stride = int(max(end_a.max(initial=0), end_b.max(initial=0))) + 1", "stride = int(end_a.max(initial=0)) + 1"),
        ("keys, first = np.unique(sequence[rows] * stride + end[rows], return_index=True)", "keys, first = np.unique(end[rows], return_index=True)"),
        ("order = np.argsort(rows_a, kind=\"stable\")", "order = np.argsort(rows_b, kind=\"stable\")"),
    ),
    *planted(
        "data", "mtllm_fast/data/pack.py", PACK,
        ("positions = np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)", "positions = np.arange(total, dtype=np.int64)"),
        ("positions = (mask.cumsum(dim=1) - 1)[mask]", "positions = mask.cumsum(dim=1)[mask]"),
        ("mask = attention_mask.to(device=input_ids.device) != 0", "mask = attention_mask.to(device=input_ids.device) == 1"),
        ("if ids.size and ids.min() < 0:", "if ids.size and ids.max() < 0:"),
        ("ids = self.input_ids.new_full(shape, pad_id)", "ids = self.input_ids.new_full(shape, 0)"),
        ("return self.sequence_ids * length + self.positions", "return self.sequence_ids * self.max_seqlen + self.positions"),
        ("padded = x_TD.new_full((self.num_sequences * self.max_seqlen, *rest), value)", "padded = x_TD.new_full((self.num_sequences * self.max_seqlen, *rest), 0.0)"),
        ("fits = (slack >= 0).all(axis=1)", "fits = (slack > 0).all(axis=1)"),
        ("fits = (slack >= 0).all(axis=1)", "fits = (slack >= 0).any(axis=1)"),
        ("pack = int(open_packs[left.argmin()])", "pack = int(open_packs[0])"),
        ("room_KS[pack] -= cost", "pass"),
        ("room_KS[pack] = max_tokens - cost", "room_KS[pack] = max_tokens"),
        ("full = max_rows is not None and len(packs[pack]) >= max_rows", "full = max_rows is not None and len(packs[pack]) > max_rows"),
        ("if full or (room_KS[pack] < smallest).any():", "if full or (room_KS[pack] <= smallest).any():"),
        ("order = np.lexsort((-cost_NS.sum(axis=1), -cost_NS.max(axis=1)))", "order = np.lexsort((cost_NS.sum(axis=1), cost_NS.max(axis=1)))"),
        ("if (peak := cost_NS.max()) > max_tokens:", "if (peak := cost_NS.max()) > max_tokens + 1:"),
        ("return [sorted(pack) for pack in packs]", "return packs"),
        ("if not np.array_equal(self.cu_seqlens.numpy(), expected):", "if len(self.cu_seqlens) != len(expected):"),
    ),
    *planted(
        "data", "mtllm_fast/data/balance.py", BALANCE,
        ("passes * sum(costs[row][side] * (1 + costs[row][side] / _EVEN) for row in pack)", "passes * sum(costs[row][side] for row in pack)"),
        ("for number in sorted(range(len(costs)), key=lambda number: -costs[number]):", "for number in sorted(range(len(costs)), key=lambda number: costs[number]):"),
        ("heapq.heappush(loads, (load + costs[number], rank))", "heapq.heappush(loads, (load, rank))"),
        ("if len(shares[rank]) < each:", "if len(shares[rank]) <= each:"),
        ("return [sorted(share) for share in shares]", "return shares"),
        ("_PASSES = (2.0, 1.0)", "_PASSES = (1.0, 2.0)"),
    ),
    *planted(
        "data", "mtllm_fast/data/batch.py", COLLATE,
        ("mt_rows, llm_rows = align_rows(*keys[0], *keys[1])", "llm_rows, mt_rows = align_rows(*keys[0], *keys[1])"),
        ("return torch.from_numpy(np.stack([side.spans[i] for i in index]).astype(np.int64) + starts[:, None, None])", "return torch.from_numpy(np.stack([side.spans[i] for i in index]).astype(np.int64))"),
        ("labels=_labels([self.labels[i] for i in index]),", "labels=_labels(self.labels[: len(index)]),"),
        ("ids=tuple(self.ids[i] for i in index),", "ids=tuple(reversed([self.ids[i] for i in index])),"),
        ("if len(given) != len(labels):", "if len(given) > len(labels):"),
        ("return np.concatenate(ends), np.repeat(np.arange(len(ends)), [len(e) for e in ends])", "return np.concatenate(ends), np.repeat(np.zeros(len(ends), dtype=np.int64), [len(e) for e in ends])"),
        ("starts = packed.cu_seqlens.numpy()[:-1].astype(np.int64)", "starts = packed.cu_seqlens.numpy()[1:].astype(np.int64)"),
    ),
    *planted(
        "data", "mtllm_fast/data/collate.py", STREAM,
        ("order = np.random.default_rng([self.seed, self.epoch, index]).permutation(len(packs))", "order = np.arange(len(packs))"),
        ("order = np.random.default_rng([self.seed, self.epoch, index]).permutation(len(packs))", "order = np.random.default_rng([self.seed, index]).permutation(len(packs))"),
        ("stream = _shuffled(self.rows, self.shuffle_buffer, f\"{self.seed}/{self.epoch}\")", "stream = _shuffled(self.rows, self.shuffle_buffer, f\"{self.seed}\")"),
        ("return -(-packs // self.step_size) * self.accumulation", "return packs // self.step_size * self.accumulation"),
        ("return batch // self.accumulation * self.step_size", "return batch * self.world_size"),
        ("skip = self.start_batch % self.accumulation", "skip = 0"),
        ("if turn >= start:", "if turn > start:"),
        ("filler = dataclasses.replace(min(step, key=lambda pack: pack.cost), weight=0.0)", "filler = dataclasses.replace(min(step, key=lambda pack: pack.cost), weight=1.0)"),
        ("yield dataclasses.replace(batch, weight=pack.weight, place=place)", "yield dataclasses.replace(batch, weight=pack.weight)"),
        ("yield dataclasses.replace(batch, weight=pack.weight, place=place)", "yield dataclasses.replace(batch, place=place)"),
        ("for place in shares[self.rank][skip:]:", "for place in shares[0][skip:]:"),
        ("counts.budget += len(window.packs) * self.max_tokens", "counts.budget += self.max_tokens"),
        ("counts.truncated[name] += truncated", "counts.truncated[name] = truncated"),
        ("slot = rng.randrange(size)", "slot = 0"),
        ("    rng.shuffle(buffer)\n", "    pass\n"),
        ("tuple(pack_cost(costs, packs[i]) for i in order),", "tuple(pack_cost(costs, pack) for pack in packs),"),
        ("packs = token_budget_packs(costs, self.max_tokens, self.max_rows)", "packs = token_budget_packs(costs, self.max_tokens)"),
        ("earlier = [state for state in self._starts if state[\"packs\"] <= self._step_start(batch)]", "earlier = list(self._starts)"),
    ),
    *planted(
        "data", "mtllm_fast/data/split.py", SPLIT,
        ("mt_rows, llm_rows = batch.mt_rows[own] - mt_first, batch.llm_rows[own] - llm_first", "mt_rows, llm_rows = batch.mt_rows[own] - mt_first, batch.llm_rows[own] - mt_first"),
        ("own = (batch.mt_rows >= mt_first) & (batch.mt_rows < mt_end)", "own = (batch.mt_rows >= mt_first) & (batch.mt_rows <= mt_end)"),
        ("llm_spans=batch.llm_spans[start:stop] - llm_first if batch.llm_spans is not None else None,", "llm_spans=batch.llm_spans[start:stop] - mt_first if batch.llm_spans is not None else None,"),
        ("side.cu_seqlens[start : stop + 1] - first,", "side.cu_seqlens[start : stop + 1] - side.cu_seqlens[start] + start,"),
        ("if abs(total - 2 * before) < least:", "if abs(total - before) < least:"),
    ),
    *planted(
        "data", "mtllm_fast/data/layout.py", TOKENISE,
        ("ends += [end + base if end > 0 else -1 for end in read[first + k][part]]", "ends += [end if end > 0 else -1 for end in read[first + k][part]]"),
        ("ends += [end + base if end > 0 else -1 for end in read[first + k][part]]", "ends += [end + base if end >= 0 else -1 for end in read[first + k][part]]"),
        ("base += 1  # the \"\\n\" between text and text_pair", "base += 0"),
        ("base += len(segments[first + k])", "base += keep[k]"),
        ("part = slice(lengths[k] - keep[k], None) if row.choices is not None and k == 0 else slice(0, keep[k])", "part = slice(0, keep[k])"),
        ("if row.choices is not None and k > 0 and k % 2 == 0:", "if row.choices is not None and k > 0 and k % 2 == 1:"),
        ("room = max(form.limit - len(prefix) - len(form.suffix), 0)", "room = max(form.limit - len(prefix), 0)"),
        ("room = form.limit - len(prefix) - len(separator) - len(form.suffix)", "room = form.limit - len(prefix) - len(form.suffix)"),
        ("if sum(lengths) > room:", "if sum(lengths) >= room:"),
        ("keep[j] = min(lengths[j], share + (rank < left_over))", "keep[j] = min(lengths[j], share)"),
        ("text = min(lengths[0], max(0, for_choices - sum(choices)))", "text = min(lengths[0], for_choices)"),
    ),
    *planted(
        "data", "mtllm_fast/data/tokenise.py", TOKENISE,
        ("return [bos] if bos is not None and bos in own_specials(self.llm)[0] else []", "return [bos] if bos is not None else []"),
        ("return lay_out(SideFormat(\"mt\", self.mt, self.mt_limit, suffix, suffix), prefixes, rows, ends)", "return lay_out(SideFormat(\"mt\", self.mt, self.mt_limit, suffix, []), prefixes, rows, ends)"),
        ("self.fallback_counts[code] += 1", "self.fallback_counts[code] = 1"),
        ("if _LANGUAGE_CODE.fullmatch(str(token)) and index != tokenizer.unk_token_id", "if _LANGUAGE_CODE.match(str(token)) and index != tokenizer.unk_token_id"),
        ("return min(self.max_mt_tokens, self.mt_positions or self.max_mt_tokens)", "return self.max_mt_tokens"),
        ("prefixes = [[self.language_id(assumed if row.language is None else row.language)] for row in rows]", "prefixes = [[self.language_id(assumed if row.language is None else rows[0].language)] for row in rows]"),
    ),
    *planted(
        "data", "mtllm_fast/data/text_tokens.py", TOKENISE,
        ("backend.encode_special_tokens = True", "backend.encode_special_tokens = False"),
    ),
    *planted(
        "data", "mtllm_fast/data/characters.py", CHARACTERS,
        ("ends = [written.ends[end] if 0 <= end <= last else -1 for end in ends]", "ends = [written.ends[end] if 0 <= end else -1 for end in ends]"),
        ("            if start < reach:  # the token before holds only a part of its last character\n                if ends:\n                    ends[-1] = -1", "            if start < reach:  # the token before holds only a part of its last character\n                pass"),
        ("            elif not _nothing_to_read(text[reach:start]):\n                break", "            elif not _nothing_to_read(text[reach:start]):\n                pass"),
        ("return Written(second.text, [-1 if end < 0 else first.ends[end] for end in second.ends], second.unread)", "return Written(second.text, second.ends, second.unread)"),
        ("found = at + 1, units[place] & _VALUE", "found = found or (at + 1, units[place] & _VALUE)"),
        ("if len(ends) < len(offsets) or not _nothing_to_read(text[reach:]):", "if len(ends) < len(offsets):"),
        ("written = composed(text, self._form) if compose or self.canonical else Written(text)", "written = Written(text)"),
        ("ends.extend(inner.get(k, -1) for k in range(1, len(new)))", "ends.extend(end for k in range(1, len(new)))"),
    ),
    *planted(
        "data", "mtllm_fast/data/long_text.py", LONG,
        ("return len(ids) >= tokens + _UNSETTLED", "return len(ids) >= tokens"),
        ("            return text[: space + 2]", "            return text[:space]"),
        ("space = text.find(\" \", start, 2 * start)", "space = text.find(\" \", 2 * start, 4 * start)"),
        ("return len(pieces) > 1 and not any(\"a\" in piece and \"b\" in piece for piece in pieces)", "return len(pieces) > 1"),
    ),
]  # fmt: skip
