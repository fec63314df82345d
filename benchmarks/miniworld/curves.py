"""Accuracy of the stack and of translate-test as a condition of the texts is varied: longer, misspelt, ambiguous."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtllm_fast.miniworld.languages import ENGLISH

from .ambiguity import AmbiguousWorld, learn_two_senses
from .cells import Cells, Translations, kind_rows
from .topics import plain_texts, say, topic_task, unlabelled_topics

if TYPE_CHECKING:
    from mtllm_fast.data import TextRow


Scored = dict[str, dict[str, Any]]


def _train(
    cells: Cells, train: Any, dev: Any, plain: Any, unlabelled: Any, *, teacher_steps: int, per_step: int | None = None
) -> tuple[str, str]:
    """Folders of a task teacher and of a stack adapted on `plain` and distilled on `unlabelled` texts."""
    config = cells.config
    taught = {"kind": "teacher", "rows": train, "steps": teacher_steps, "llm": cells.llm}
    teacher = cells.model("teacher", partial(cells.finetune, dev=dev, per_step=per_step, **taught))
    adapted = cells.model("adapted", partial(cells.adapt, texts=plain, steps=config.adapt_steps, per_step=per_step))
    distilled = {"model": adapted, "teacher": teacher, "texts": unlabelled, "kl": 1.0, "steps": config.distill_steps}
    return teacher, cells.model("full_kl", partial(cells.distill, dev=dev, per_step=per_step, **distilled))


def _by_language(
    cells: Cells, stack: str, teacher: str, translate: Translations, rows: Callable[[str], list[TextRow]]
) -> dict[str, Any]:
    """Accuracy of the stack, and of the teacher on translations, on the `rows` of each language."""
    found = {}
    for code in cells.world.languages:
        spoken = rows(code)
        own, translated = cells.accuracy(stack, spoken), cells.accuracy(teacher, translate(spoken))
        found[code] = {"mt_llm": own, "translate_test": translated}
    return {"languages": found}


def length(cells: Cells, root: Path) -> Scored:
    """Accuracy by number of clauses, on texts longer than any that the MT model was trained on."""
    from mtllm_fast.data import TextRow

    world, config, lengths = cells.world, cells.config, cells.config.lengths
    per_step = max(1, config.rows // 2)

    def rows(code: str, split: str, count: int, clauses: Sequence[int]) -> list[TextRow]:
        return [TextRow(say(world, code, text), code, label=k) for text, k in topic_task(world, split, count, clauses)]

    train, dev = (
        rows(ENGLISH, split, count, lengths)
        for split, count in (("train", config.train_rows), ("validation", config.dev_rows))
    )
    plain = [TextRow(text, ENGLISH) for text in plain_texts(world, config.texts // 2, lengths)]
    unlabelled = [TextRow(text, ENGLISH) for text in unlabelled_topics(world, config.unlabelled, lengths)]
    steps = config.teacher_steps * 4 // 3
    teacher, stack = _train(cells, train, dev, plain, unlabelled, teacher_steps=steps, per_step=per_step)
    translate = Translations(root / "length" / "translations.json", cells.mt, 1)
    clausewise = Translations(root / "length" / "translated_clauses.json", cells.mt, 1)

    def by_clause(code: str, clauses: int) -> list[TextRow]:
        texts = topic_task(world, "test", config.curve_rows, (clauses,))
        parts = clausewise([TextRow(world.render(code, clause), code) for text, _ in texts for clause in text])
        joined = (" ".join(row.text for row in parts[i * clauses : (i + 1) * clauses]) for i in range(len(texts)))
        return [TextRow(text, ENGLISH, label=k) for text, (_, k) in zip(joined, texts, strict=True)]

    def score(clauses: int) -> dict[str, Any]:
        english = rows(ENGLISH, "test", config.curve_rows, (clauses,))
        of_english = {"teacher_english": teacher, "mt_llm_english": stack}
        found: dict[str, Any] = {name: cells.accuracy(model, english) for name, model in of_english.items()}
        foreign = partial(rows, split="test", count=config.curve_rows, clauses=(clauses,))
        found |= _by_language(cells, stack, teacher, translate, foreign)
        for code, scores in found["languages"].items():
            scores["translate_clauses"] = cells.accuracy(teacher, by_clause(code, clauses))
        return found

    return {str(n): cells.scores(f"length-{n}", partial(score, n)) for n in lengths}


def with_typos(text: str, share: float, rng: random.Random) -> str:
    """Letters are spoilt at the rate `share`: dropped, replaced by one of the text, or followed by one, all alike."""
    letters = [letter for letter in text if letter != " "]
    spoilt = []
    for letter in text:
        if letter == " " or rng.random() >= share:
            spoilt.append(letter)
            continue
        spoilt.append(rng.choice(("", rng.choice(letters), letter + rng.choice(letters))))
    return "".join(spoilt)


def typos(cells: Cells, root: Path, folders: dict[str, str]) -> Scored:
    """Accuracy of the matrix's models (`folders`) by share of letters changed in the foreign text."""
    translate = Translations(root / "typos" / "translations.json", cells.mt, cells.config.num_beams)

    def misspelt(code: str, share: float) -> list[TextRow]:
        rng = random.Random(f"typos {code} {share}")
        rows = kind_rows(cells.world, code, "test", cells.config.curve_rows)
        rows = [replace(row, text=with_typos(row.text, share, rng)) for row in rows]
        return [row if row.text.strip() else replace(row, text="?") for row in rows]

    def score(share: float) -> dict[str, Any]:
        models = folders["full_kl"], folders["teacher"]
        return _by_language(cells, *models, translate, partial(misspelt, share=share))

    return {str(share): cells.scores(f"typos-{share}", partial(score, share)) for share in cells.config.typos}


def adaptation(cells: Cells, root: Path, folders: dict[str, str]) -> Scored:
    """Accuracy on the matrix's task by steps of stage 1; the matrix's models (`folders`) are its first two points."""
    from mtllm_fast.data import TextRow

    world, config = cells.world, cells.config
    plain = [TextRow(text, ENGLISH) for text in world.adaptation_texts(config.texts)]
    unlabelled = [TextRow(text, ENGLISH) for text in world.unlabelled(config.unlabelled)]
    dev = kind_rows(world, ENGLISH, "validation", config.dev_rows)
    translate = Translations(root / "translations.json", cells.mt, config.num_beams)
    stacks = {0: folders["no_adaptation"], config.adapt_steps: folders["full_kl"]}
    distill = partial(cells.distill, teacher=folders["teacher"], texts=unlabelled, dev=dev, kl=1.0)
    for steps in config.longer_adaptation:
        adapted = cells.model(f"adapted-{steps}", partial(cells.adapt, texts=plain, steps=steps))
        taught = partial(distill, model=adapted, steps=config.distill_steps)
        stacks[steps] = cells.model(f"full_kl-{steps}", taught)

    def rows(code: str) -> list[TextRow]:
        return kind_rows(world, code, "test", config.test_rows)

    def score(steps: int) -> dict[str, Any]:
        return _by_language(cells, stacks[steps], folders["teacher"], translate, rows)

    return {str(steps): cells.scores(f"adaptation-{steps}", partial(score, steps)) for steps in sorted(stacks)}


def ambiguity(cells: Cells, root: Path) -> Scored:
    """Accuracy by share of nouns that are said with a word of two senses, in texts whose other words tell the sense."""
    from mtllm_fast.data import TextRow

    config = cells.config
    world = AmbiguousWorld(seed=cells.world.seed)
    mt = root / "ambiguity" / "mt"
    if not (mt / "done.json").is_file():
        learn_two_senses(world, cells.mt, mt, steps=config.mt_steps)
        (mt / "done.json").write_text("{}\n")
    cells.mt = str(mt)

    def rows(split: str, count: int) -> list[TextRow]:
        return [TextRow(world.say(ENGLISH, text), ENGLISH, label=k) for text, k in world.topic_task(split, count)]

    train, dev = rows("train", config.train_rows), rows("validation", config.dev_rows)
    plain = [TextRow(text, ENGLISH) for text in world.adaptation_texts(config.texts)]
    unlabelled = [TextRow(text, ENGLISH) for text in world.unlabelled_topics(config.unlabelled)]
    teacher, stack = _train(cells, train, dev, plain, unlabelled, teacher_steps=config.teacher_steps)
    translate = Translations(root / "ambiguity" / "translations.json", cells.mt, config.num_beams)
    texts = world.topic_task("test", config.curve_rows)

    def spoken(code: str, count: int) -> list[TextRow]:
        rng, found = random.Random(f"ambiguous {code}"), []
        for text, label in texts:
            nouns = [noun for clause in text for noun in clause.subjects]
            found.append(TextRow(world.say(code, text, rng.sample(nouns, len(nouns))[:count]), code, label=label))
        return found

    def score(count: int) -> dict[str, Any]:
        return _by_language(cells, stack, teacher, translate, partial(spoken, count=count))

    return {f"{k / 3:.2f}": cells.scores(f"ambiguity-{k}", partial(score, k)) for k in range(4)}
