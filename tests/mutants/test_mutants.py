"""The lists of planted faults are in step with what they change, and the server tells found from not found."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.mutants.__main__ import Results, Server, copied, table
from tests.mutants.planted import REPO, Mutant, all_mutants

MUTANTS = all_mutants()


def test_there_are_enough_and_none_twice():
    assert len(MUTANTS) >= 200
    assert {"kernels", "triton", "losses", "data", "attention", "trainer", "jobs"} == {one.area for one in MUTANTS}
    assert max(Counter((one.file, one.old, one.new, one.tests) for one in MUTANTS).values()) == 1


@pytest.mark.parametrize("file", sorted({one.file for one in MUTANTS}))
def test_every_old_text_occurs_once(file):
    """A ValueError says what is out of step; the new text is Python, and not the old one written differently."""
    before = ast.dump(ast.parse((REPO / file).read_text(encoding="utf-8")))
    for one in MUTANTS:
        if one.file == file:
            assert ast.dump(ast.parse(one.mutated())) != before, one.new


@pytest.mark.parametrize("name", sorted({test for one in MUTANTS for test in one.tests}))
def test_every_test_is_there(name):
    file, _, function = name.partition("::")
    tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in functions if function else any(one.startswith("test_") for one in functions)


def test_found_survived_and_invalid(tmp_path):
    """A project of one module and three tests: a fault that is found, one that hangs, one that nobody sees."""
    source = tmp_path / "project"
    for folder in ("mtllm_fast", "tests"):
        (source / folder).mkdir(parents=True)
    (source / "mtllm_fast" / "sums.py").write_text(
        "def total(n):\n    s = 0\n    while n > 0:\n        s, n = s + n, n - 1\n    return s\n\n\nUNUSED = 1\n"
    )
    (source / "tests" / "test_sums.py").write_text(
        "from mtllm_fast.sums import total\n\n\ndef test_total():\n    assert total(3) == 6\n\n\n"
        "def test_wrong():\n    assert total(3) == 7\n"
    )
    file, good = "mtllm_fast/sums.py", ("tests/test_sums.py::test_total",)
    changes = {
        "found": ("s + n", "s - n", good),
        "survived": ("UNUSED = 1", "UNUSED = 2", good),
        "invalid": ("s + n", "s - n", ("tests/test_sums.py::test_wrong",)),
    }
    mutants = {name: Mutant("sums", file, *change) for name, change in changes.items()}
    before = (source / file).read_text()
    with copied(source, ("mtllm_fast", "tests"), ()) as copy:
        server = Server(copy, "plain", ())
        found = {name: server.result(one)["state"] for name, one in mutants.items()}
        hanging = server.ask(file=file, text=before.replace("n - 1", "n + 0"), tests=good, limit=2.0)
        server.close()
        assert (copy / file).read_text() == before
    assert found == {name: name for name in mutants}
    assert hanging["code"] == -1
    assert (source / file).read_text() == before, "the user's own files are never changed"

    results = Results.read(tmp_path / "results.json")
    known = [mutants[name] for name in ("found", "survived")]
    for one in known:
        results.add({"key": one.key(source), "state": "found", "note": ""})
    assert set(Results.read(tmp_path / "results.json").known) == set()
    assert len({one.key(source) for one in mutants.values()}) == 3
    (source / "tests" / "test_sums.py").write_text("")
    assert known[0].key(source) not in results.known, "other tests, another result"
    assert "planted" in table(MUTANTS[:3], results)
