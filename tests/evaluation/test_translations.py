"""Existing translations joined to the rows of a task."""

import json

import pytest

from mtllm_fast.data import TextRow
from mtllm_fast.evaluation.tasks import TASKS, FolderTask, Table
from mtllm_fast.evaluation.translations import has_translations, join_translations

PAIRS = FolderTask(
    "pairs",
    ("no", "yes"),
    (Table("premise", "hypothesis", id="id"), Table("premise", "hypothesis")),
    mt_codes={"gn": "grn_Latn"},
)
ROWS = [TextRow(f"t{i}", "grn_Latn", f"h{i}", i % 2, str(100 + i)) for i in range(4)]


def put(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def record(row, field, **more):
    text = row.text if field == "text" else row.text_pair
    return {
        "id": row.id,
        "language": "gn",
        "split": "test",
        "field": field,
        "source": text,
        "translation": text.upper(),
        **more,
    }


def everything():
    return [record(row, field) for row in ROWS for field in ("text", "text_pair")]


def join(path, rows=ROWS, task=PAIRS, **more):
    return join_translations(path, task, rows, language="gn", **more)


def test_fields_join_by_id_in_the_order_of_the_rows(tmp_path):
    others = [record(ROWS[0], "text", language="quy"), record(ROWS[1], "text", split="dev")]
    path = put(tmp_path / "x.jsonl", *others, *reversed(everything()))
    joined = join(path)
    assert joined.counts() == {"joined": 4, "missing": 0, "unused": 0, "duplicates": 0} and joined.by == "id"
    assert joined.indices == [0, 1, 2, 3]
    assert joined.rows == [TextRow(f"T{i}", "eng_Latn", f"H{i}", i % 2, str(100 + i)) for i in range(4)]
    assert join(path, target="deu_Latn").rows[0].language == "deu_Latn"
    assert join(tmp_path).rows == joined.rows  # a folder of such files
    assert has_translations(path, PAIRS, "gn") and not has_translations(path, PAIRS, "shp")
    assert not has_translations(path, PAIRS, "gn", "train")
    with pytest.raises(ValueError, match=r"x\.jsonl holds none of 'shp', 'test'"):
        join_translations(path, PAIRS, ROWS, language="shp")


def test_what_does_not_join_is_counted(tmp_path):
    kept = everything()[:-1]  # the last row has no second text
    kept[2]["source"] = "changed since"
    repeated = record(ROWS[0], "text", translation="another")
    path = put(tmp_path / "x.jsonl", *kept, repeated, record(TextRow("z", id="7"), "text"))
    joined = join(path)
    assert joined.counts() == {"joined": 2, "missing": 2, "unused": 1, "duplicates": 1}
    assert joined.indices == [0, 2] and joined.missing == ("101", "103") and joined.unused == ("7",)
    assert joined.rows[0].text == "T0"
    with pytest.raises(ValueError, match=r"none in .*x\.jsonl belongs to a row \(ids 9, \.\.\.\)"):
        join(path, [TextRow("a", id="9")])


def test_a_plain_file_with_ids_only(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('id,translation\n100,"a, b"\n101,c\n', encoding="utf-8")
    rows = [TextRow("x", id="101"), TextRow("y", id="100"), TextRow("z", id="5")]
    joined = join(path, rows)
    assert [row.text for row in joined.rows] == ["c", "a, b"] and joined.missing == ("5",)


def test_rows_with_and_without_ids(tmp_path):
    translated = [{"premise": f"p{i}", "hypothesis": f"q{i}", "label": ("no", "yes")[i % 2]} for i in range(4)]
    path = put(tmp_path / "a/gn/test.jsonl", *translated)
    joined = join(tmp_path / "a")
    assert (joined.by, len(joined.rows), joined.rows[3]) == ("row", 4, TextRow("p3", "eng_Latn", "q3", 1, "103"))
    put(path, *translated[:3])
    with pytest.raises(ValueError, match="no ids and 3 rows: cannot be joined to 4 rows"):
        join(tmp_path / "a")
    put(path, *translated[1:], translated[0])
    with pytest.raises(ValueError, match=r"has the label 1 for row '100', the task has 0: it translates other rows"):
        join(tmp_path / "a")
    named = [{"id": 100 + i, **translated[i]} for i in (3, 1, 2)]
    put(tmp_path / "b/gn_validation.jsonl", *named, {"id": 9, **translated[0]}, named[0])
    joined = join(tmp_path / "b", split="dev")
    assert joined.by == "id" and [row.text for row in joined.rows] == ["p1", "p2", "p3"]
    assert joined.missing == ("100",) and joined.unused == ("9",) and joined.duplicates == 1
    put(
        tmp_path / "c.jsonl",
        *({"language": "gn", "split": "test"} | row for row in named),
        {"language": "x", **named[0]},
    )
    assert len(join(tmp_path / "c.jsonl").rows) == 3


def test_files_that_do_not_say_their_language(tmp_path):
    """Of several files, those named after another language are left alone, and a nameless one is refused."""
    records = [{"id": row.id, "translation": "other"} for row in ROWS]
    rows = [TextRow(f"t{i}", "grn_Latn", id=row.id) for i, row in enumerate(ROWS)]
    put(tmp_path / "quy_test.jsonl", *records)
    with pytest.raises(ValueError, match="holds none of 'gn', 'test'"):
        join(tmp_path, rows)
    assert not has_translations(tmp_path, PAIRS, "gn")
    put(tmp_path / "quechua.jsonl", *records)
    with pytest.raises(ValueError, match=r"quechua\.jsonl stands beside others and does not say its language"):
        join(tmp_path, rows)
    put(tmp_path / "quechua.jsonl", *({"language": "quy", **one} for one in records))
    put(tmp_path / "guarani.jsonl", *({"language": "gn", **one, "translation": "mine"} for one in records))
    assert {row.text for row in join(tmp_path, rows).rows} == {"mine"}
    put(tmp_path / "one/all.jsonl", *records)  # alone, it can only be for the one that is asked for
    assert len(join(tmp_path / "one", rows).rows) == 4


def test_choices(tmp_path):
    rows = [TextRow("P? Q?", "quy_Latn", None, 1, "0", ("a", "b"))]
    texts = {"text": "p", "choice1": "c", "choice2": "d"}
    records = [{"id": "0", "field": field, "translation": text} for field, text in texts.items()]
    path = put(tmp_path / "x.jsonl", *records)
    joined = join_translations(path, TASKS["xcopa"], rows, language="qu")
    assert joined.rows == [TextRow("p", "eng_Latn", None, 1, "0", ("c", "d"))]
    put(path, *records[:2])
    with pytest.raises(ValueError, match="none in"):
        join_translations(path, TASKS["xcopa"], rows, language="qu")


def test_faults_are_named(tmp_path):
    put(tmp_path / "a.jsonl", {"id": 1, "english": "x"})
    put(tmp_path / "b.jsonl", {"id": None, "translation": "x"})
    put(tmp_path / "two/gn/test.jsonl", {"id": 1, "translation": "x"})
    put(tmp_path / "two/gn/test.json", {"id": 1, "translation": "x"})
    (tmp_path / "empty").mkdir()
    for path, match in (
        ("a.jsonl", r"has the columns id, english, expected id\+translation or those of the task 'pairs'"),
        ("b.jsonl", "a record without id or translation"),
        ("two", "could both be meant"),
        ("absent", r"translations='.*absent': no such file or folder"),
        ("empty", "holds none of 'gn', 'test'"),
    ):
        with pytest.raises(ValueError, match=match):
            join(tmp_path / path)
    with pytest.raises(ValueError, match="no such file"):
        has_translations(tmp_path / "absent", PAIRS, "gn")
