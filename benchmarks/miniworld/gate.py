"""Is the world's MT encoder language-neutral? The one-minute gate before anything is stacked on it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from mtllm_fast.miniworld.languages import ENGLISH
from mtllm_fast.miniworld.world import INTRANSITIVE, World

GATE = 0.8


def neutrality(world: World, encoder: str | Path, *, train: int = 3000, test: int = 300) -> dict[str, float]:
    """Accuracy, 0 to 1 and by language, of naming the subject noun from the encoder's mean state.

    The linear probe is fitted on `train` English clauses alone; `test` others are read in every language. An encoder
    with foreign accuracies below GATE puts languages in different places of its space, and no stack on it can transfer.

    Args:
        encoder: folder of the MT model.
    """
    from mtllm_fast.evaluation.metrics import accuracy
    from mtllm_fast.evaluation.probe import fit_probe
    from mtllm_fast.inference import Engine
    from mtllm_fast.models import MTLLM

    engine = Engine(MTLLM.stack(str(encoder), reader="encoder"))
    rng = random.Random(f"{world.seed}/probe")
    nouns = {noun: index for index, noun in enumerate(world.nouns)}
    clauses = [
        replace(world.clause(rng), subjects=(rng.choice(world.nouns),), object=None, verb=rng.choice(INTRANSITIVE))
        for _ in range(train + 2 * test)
    ]
    gold = [nouns[clause.subjects[0]] for clause in clauses]
    fit, dev = slice(0, train), slice(train, train + test)
    states = engine.encode([world.render(ENGLISH, clause) for clause in clauses], ENGLISH)
    probe = fit_probe(
        states[fit], gold[fit], states[dev], gold[dev], len(nouns), penalties=(1e-3, 1e-4), max_iterations=60
    )
    found = {}
    for code in (ENGLISH, *world.languages):
        texts = [world.render(code, clause) for clause in clauses[train + test :]]
        found[code] = accuracy(probe.logits(engine.encode(texts, code)).argmax(1), gold[train + test :])
    return found
