"""`mtllm evaluate --suite`: reading the file, resuming, recomputing what changed, surviving kills."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mtllm_fast.evaluation.suite_file import read_suite, run_suite
from mtllm_fast.models import MTLLM
from mtllm_fast.models.heads import HeadConfig

LANGUAGES = ("eng_Latn", "fra_Latn", "swh_Latn", "deu_Latn", "hin_Deva", "xxx_Latn")


@pytest.fixture(scope="module")
def world(tmp_path_factory, encoder_folder, llm_folder):
    """Model folders for two seeds, an encoder without a head, a teacher, data with ids, and translations."""
    root = tmp_path_factory.mktemp("suite")
    head = HeadConfig(labels=("a", "b", "c"))
    for seed in (1, 2):
        torch.manual_seed(seed)
        MTLLM.stack(encoder_folder, llm_folder, head=head).save_pretrained(root / f"mini/stack-{seed}")
    MTLLM.stack(encoder_folder, llm_folder).save_pretrained(root / "adapted")
    MTLLM.stack(None, llm_folder, reader="llm", head=head).save_pretrained(root / "mini/teacher")
    words = ("river", "bread", "light")
    for language in LANGUAGES:
        (root / "data" / language).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            lines = [f"{split}{i}\t{language} {words[i % 3]} {i}\t{'abc'[i % 3]}" for i in range(20)]
            (root / "data" / language / f"{split}.tsv").write_text("id\ttext\tlabel\n" + "\n".join(lines) + "\n")
            if split == "test" and language in LANGUAGES[1:4]:
                (root / "mt").mkdir(exist_ok=True)
                (root / f"mt/{language}_test.jsonl").write_text(
                    "".join(
                        json.dumps(
                            {"id": f"test{i}", "language": language, "translation": f"English {words[i % 3]} {i}"}
                        )
                        + "\n"
                        for i in range(20)
                    )
                )
    write_suite(root)
    return root


def write_suite(root, name="suite.yaml", **changes):
    content = f"""
output: {changes.get("output", root / "out")}
seeds: [1, 2]
models:
  stack: {root}/{{task}}/stack-{{seed}}
  adapted: {root}/adapted
tasks:
  - {{task: folder, name: mini, data: {root}/data}}
translate_test:
  teacher: {root}/{{task}}/teacher
  translations: {root}/mt
alignment: true
resamples: 200
"""
    (root / name).write_text(changes.get("content", content))
    return str(root / name)


def only_the_stack(suite):
    """One model in two seeds, to load less."""
    suite.models, suite.translate_test = {"stack": suite.models["stack"]}, None
    return suite


def tables(folder):
    """The compared files: everything but cells and times."""
    return {
        path.name: path.read_bytes()
        for path in sorted(Path(folder).iterdir())
        if path.is_file() and "times" not in path.name
    }


def test_suite_end_to_end(world):
    suite = read_suite(world / "suite.yaml")
    suite.output = str(world / "first")
    (scores,), store = run_suite(suite, progress=False)
    stack, adapted, test = scores.models
    assert (scores.task, stack.name, adapted.name, test.name) == ("mini", "stack", "adapted", "translate-test")
    assert (stack.seeds, adapted.seeds, adapted.method, test.method) == (2, 1, "linear probe", "translate-test")
    assert len(stack.seed_means) == 2
    assert stack.languages["fra_Latn"].accuracy_sd is not None
    assert set(test.languages) == {"eng_Latn", "fra_Latn", "swh_Latn", "deu_Latn"}
    assert test.skipped == {"hin_Deva": "no translations", "xxx_Latn": "no translations"}
    assert stack.skipped == {"xxx_Latn": "MT code xxx_Latn unknown to the model"}
    assert scores.shared() == ["deu_Latn", "fra_Latn", "swh_Latn"]
    assert stack.languages["fra_Latn"].gap.p_holm is not None
    assert stack.languages["eng_Latn"].gap.p is None
    assert stack.languages["hin_Deva"].gap is None
    gap = stack.languages["fra_Latn"].accuracy - test.languages["fra_Latn"].accuracy
    assert stack.languages["fra_Latn"].gap.accuracy == pytest.approx(gap)
    assert set(stack.languages["fra_Latn"].alignment) == {"to_english", "from_english", "mexa", "cosine", "cka"}
    assert not test.languages["fra_Latn"].alignment
    assert stack.groups["family"]["Indo-European"].languages == 2
    written = store.written

    again, store = run_suite(suite, progress=False)
    assert again == [scores]
    assert (store.written, store.reused) == (0, written)


def test_another_model_to_compare_against(world, tmp_path):
    """The rows are those that all have; nothing is computed again for it."""
    suite = read_suite(world / "suite.yaml")
    suite.output = str(world / "first")
    (before,), _ = run_suite(suite, progress=False)
    suite.against = "adapted"
    (scores,), store = run_suite(suite, progress=False)
    assert store.written == 0
    stack, adapted, test = scores.models
    assert (before.reference, scores.reference) == ("translate-test", "adapted")
    assert [model.name for model in scores.compared()] == ["stack", "translate-test"]
    for model in (stack, test):
        gap = model.languages["fra_Latn"].gap
        difference = model.languages["fra_Latn"].accuracy - adapted.languages["fra_Latn"].accuracy
        assert gap.accuracy == pytest.approx(difference) and gap.low <= gap.accuracy <= gap.high
    mean = stack.overall("shared").gap
    codes = scores.shared()
    assert mean.accuracy == pytest.approx(sum(stack.languages[code].gap.accuracy for code in codes) / len(codes))
    assert adapted.languages["fra_Latn"].gap is None and adapted.overall("shared").gap is None
    assert stack.languages["fra_Latn"].accuracy == before.models[0].languages["fra_Latn"].accuracy
    other = before.models[0].languages["fra_Latn"].gap
    assert other != stack.languages["fra_Latn"].gap, "the same gap to two models"
    from mtllm_fast.reporting import write_report

    text = write_report([scores], tmp_path)["markdown"].read_text()
    assert "gap to adapted" in text and "points above adapted" in text and "above translate-test" not in text
    page = (tmp_path / "scores.html").read_text()
    assert "The yardstick is <b>adapted</b>" in page and "stack minus adapted" in page
    assert "minus translate-test" not in page and "let a machine translate" not in page
    text = write_report([before], tmp_path / "before")["markdown"].read_text()
    assert "gap to translate-test" in text and "adapted in" not in text
    assert "let a machine translate" in (tmp_path / "before/scores.html").read_text()


def test_what_changed_is_computed_again_and_named(world, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("out*", "first*"))
    suite = only_the_stack(read_suite(write_suite(root)))
    before, _ = run_suite(suite, progress=False)
    file = root / "data/fra_Latn/test.tsv"
    file.write_text(file.read_text().replace("bread", "cheese"))
    after, store = run_suite(suite, progress=False)
    assert store.stale == {"data changed": 2 + 2}  # its cells and alignments of two seeds, and no other language's
    assert after[0].models[0].languages["swh_Latn"] == before[0].models[0].languages["swh_Latn"]
    torch.manual_seed(9)
    MTLLM.stack(str_of(root, "encoder"), str_of(root, "llm"), head=HeadConfig(labels=("a", "b", "c"))).save_pretrained(
        root / "mini/stack-2"
    )
    _, store = run_suite(suite, progress=False)
    assert set(store.stale) == {"model changed"}
    suite.max_tokens = 99
    _, store = run_suite(suite, progress=False)
    assert set(store.stale) == {"settings changed"}


def str_of(root, role):
    return json.loads((root / "adapted/config.json").read_text())[role]


def test_ten_kills_give_the_same_bytes(forked, world):
    """SIGKILL at ten random places, then once to the end: every table equals that of one undisturbed run."""
    whole, killed = world / "out-whole", world / "out-killed"
    code = Path(__file__).with_name("killed_suite.py").read_text(encoding="utf-8")
    report = json.loads(forked.run(world / "suite.yaml", whole, killed, 10, 7, code=code).splitlines()[-1])
    assert report["status"] == 0
    assert len(report["struck"]) == 10
    assert all(one["killed"] for one in report["struck"]), report
    assert len({one["parts"] for one in report["struck"]}) >= 5  # in different places of the work
    assert "finished parts found" in (world / "out-killed.log").read_text()
    expected = tables(whole)
    assert set(expected) >= {"scores.json", "scores.csv", "scores.tex", "scores.md", "scores.html", "scores.png"}
    found = tables(killed)
    assert {name for name in expected if found.get(name) != expected[name]} == set()
    # the comparison can fail: with one language less the tables are others
    changed = read_suite(world / "suite.yaml")
    changed.output, changed.tasks[0].languages = str(killed), list(LANGUAGES[:4])
    from mtllm_fast.reporting import write_report

    write_report(run_suite(changed, progress=False)[0], killed, overwrite=True)
    assert tables(killed)["scores.csv"] != expected["scores.csv"]


def test_disk_full_stops_with_what_is_done_kept(world, tmp_path, monkeypatch):
    import errno

    suite = only_the_stack(read_suite(world / "suite.yaml"))
    suite.output = str(tmp_path / "out")
    written = []

    def full(self, content, write=Path.write_bytes):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(self)
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device; everything finished before is kept"):
        run_suite(suite, progress=False)
    monkeypatch.undo()
    _, store = run_suite(suite, progress=False)
    assert store.reused == 5


def test_a_bad_language_costs_itself_only(world, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("out*", "first*"))
    (root / "data/fra_Latn/test.tsv").write_text("id\ttext\tlabel\n1\tx\tnone-of-these\n")
    (root / "data/swh_Latn/test.tsv").unlink()
    (scores,), _ = run_suite(only_the_stack(read_suite(write_suite(root))), progress=False)
    assert "label 'none-of-these' is not one of" in scores.models[0].skipped["fra_Latn"]
    assert scores.models[0].skipped["swh_Latn"] == "no test split"
    assert set(scores.models[0].languages) == {"deu_Latn", "eng_Latn", "hin_Deva"}
    assert any(line.startswith("swh_Latn left out: no test split") for line in scores.issues)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not YAML"),
        ("modles: {}", "unknown key 'modles'; did you mean 'models'"),
        ("models: {a: b}", "tasks: expected a list"),
        ("models: {a: b}\ntasks: [{tusk: x}]", r"tasks\[0\]: unknown key 'tusk'; did you mean 'task'"),
        ("models: {a: b}\ntasks: [{name: x}]", r"tasks\[0\]: 'task' is missing"),
        ("models: {a: b}\ntasks: [nusax, nusax]", "two have the same name"),
        ("models: {a: 'b-{seed}'}\ntasks: [nusax]", "has {seed}, but 'seeds' is not given"),
        ("models: {a: {sib200: b}}\ntasks: [nusax]", "names sib200, but not 'nusax'"),
        ("models: {a: 5}\ntasks: [nusax]", "expected a folder"),
        ("models: {a: []}\ntasks: [nusax]", "list of seeds is empty"),
        ("models: [a]\ntasks: [nusax]", "models: expected a mapping"),
        ("tasks: [nusax]", "models: none given"),
        ("models: {a: b}\ntasks: [nusax]\ntranslate_test: {techer: x}", "did you mean 'teacher'"),
        (
            "models: {a: b}\nseeds: [1, 2]\ntasks: [nusax]\ntranslate_test: {teacher: t, translations: 'mt-{seed}'}",
            "translate_test: translations: mt-1, mt-2: expected one, which all seeds share",
        ),
        ("models: {a: b}\ntasks: [nusax]\ntranslate_test: {translator: {sib200: x}}", "translator: names sib200"),
        ("models: {a: b, c: d}\ntasks: [nusax]\nagainst: e", "against: 'e' is none of the models; they are a, c"),
        ("models: {a: b}\ntasks: [nusax]\nagainst: translate-test", "against: 'translate-test' is none of the models"),
    ],
)
def test_bad_files(tmp_path, content, match):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ValueError, match=match) as caught:
        read_suite(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


def test_command_line_of_a_suite(world, tmp_path, capsys):
    from mtllm_fast.cli import main

    with pytest.raises(ValueError, match="no such file"):
        read_suite(tmp_path / "none.yaml")
    with pytest.raises(SystemExit):
        main(["evaluate", "--suite", str(world / "suite.yaml"), "--limit", "3"])
    assert "--limit: does not go with --suite" in capsys.readouterr().err
    main(["evaluate", "--suite", str(world / "suite.yaml"), "--output", str(tmp_path / "o"), "--no-progress"])
    out = capsys.readouterr().out
    assert "written:" in out
    assert (tmp_path / "o/scores.html").is_file()
    main(["evaluate", "--suite", str(world / "suite.yaml"), "--output", str(tmp_path / "o"), "--no-progress"])
    assert "finished parts found" in capsys.readouterr().out


def test_models_in_memory_have_no_cells(world, tmp_path):
    from mtllm_fast.evaluation import evaluate

    model = MTLLM.from_pretrained(world / "mini/stack-1")
    with pytest.raises(ValueError, match="cells: 'model' is a MTLLM in memory; give its folder"):
        evaluate(model, "folder", world / "data", cells=tmp_path, progress=False)
