import csv
import gzip
import json
import pickle
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mtllm_fast.data import TextRow, read_rows

TEXTS = ["plain", 'with "quotes"', "tab\there", "comma, here", "two\nlines", "dos\r\nline", "mac\rline"]
TEXTS += ["U+2028 \u2028 U+001D \x1d", " spaces ", "猫\ufeff"]
LABELS = ["negative", "positive"]


def records():
    return [
        {"text": text, "second": f"pair {i}", "label": LABELS[i % 2], "lang": "fra_Latn", "name": f"n{i}"}
        for i, text in enumerate(TEXTS)
    ]


def write(path, rows):
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind, gz):
    path = write(tmp_path / f"rows.{kind}{gz}", records())
    stream = read_rows(
        path, pair_column="second", label_column="label", labels=LABELS, language_column="lang", id_column="name"
    )
    expected = [TextRow(text, "fra_Latn", f"pair {i}", i % 2, f"n{i}") for i, text in enumerate(TEXTS)]
    assert list(stream) == expected
    assert list(stream) == expected  # again
    assert (stream.counts.rows, stream.counts.empty, stream.counts.failed) == (len(TEXTS), 0, 0)
    assert list(pickle.loads(pickle.dumps(stream))) == expected
    assert list(read_rows(path, limit=2)) == [TextRow(text) for text in TEXTS[:2]]


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_plain_text_is_split_at_line_feeds_alone(tmp_path, gz):
    path = tmp_path / f"corpus.txt{gz}"
    data = "\ufeffone\u2028still one\r\n\n \t\ntwo\x1dstill two\nlast".encode()
    path.write_bytes(gzip.compress(data) if gz else data)
    stream = read_rows(path, language="deu_Latn")
    texts = ["one\u2028still one", "two\x1dstill two", "last"]
    assert list(stream) == [TextRow(text, "deu_Latn") for text in texts]
    assert (stream.counts.rows, stream.counts.empty) == (3, 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1), min_size=1),
    kind=st.sampled_from(["csv", "tsv", "jsonl"]),
)
def test_any_text_survives(tmp_path, rows, kind):
    path = write(tmp_path / f"any.{kind}", [{"text": text, "id": i} for i, text in enumerate(rows)])
    kept = [text for text in rows if text.strip()]
    stream = read_rows(path)
    if kept:
        assert [row.text for row in stream] == kept
        assert stream.counts.empty == len(rows) - len(kept)
    else:
        with pytest.raises(ValueError, match="holds no usable row"):
            list(stream)


def test_bom_and_windows_lines_in_csv(tmp_path):
    path = tmp_path / "windows.csv"
    path.write_bytes('\ufefftext,label\r\n"a ""b"", c",0\r\n\r\nd,1\r\n'.encode())
    assert list(read_rows(path, label_column="label")) == [TextRow('a "b", c', label=0), TextRow("d", label=1)]


def test_bad_rows_are_counted_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = b'{"text": "good", "label": 1}\n'
    lines = [good, b"{broken\n", b"[1]\n", b'{"label": 1}\n', b'{"text": 3, "label": 1}\n', b'{"text": "\xff"}\n']
    lines += [b'{"text": "\\ud800", "label": 1}\n', b'{"text": "", "label": 1}\n', b'{"text": null, "label": 1}\n']
    lines += [b'{"text": "x", "label": null}\n', b'{"text": "x", "label": -1}\n', b"[" * 100_000 + b"\n", b"\n", good]
    path.write_bytes(b"".join(lines))
    stream = read_rows(path, label_column="label")
    assert list(stream) == [TextRow("good", label=1)] * 2
    counts = stream.counts
    assert (counts.rows, counts.empty, counts.failed) == (2, 2, 9)
    assert counts.reasons == {
        "invalid JSON": 2,
        "not a JSON object": 1,
        "no 'text'": 1,
        "'text' is int, not text": 1,
        "invalid UTF-8": 1,
        "invalid Unicode (lone surrogate)": 1,
        "no label": 2,
    }
    assert counts.first["invalid JSON"] == f"{path}:2"


def test_bad_csv_rows_are_counted(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(
        b'text,label\ngood,1\ntoo,many,fields\nfew\n"quoted" then not,1\nno utf \xff,1\ngood,1\n"open,1\nend,1\n'
    )
    stream = read_rows(path, label_column="label")
    assert [row.text for row in stream] == ["good", "good"]
    assert stream.counts.failed == 5
    assert stream.counts.reasons["wrong number of fields"] == 2
    assert stream.counts.reasons["invalid UTF-8"] == 1
    assert stream.counts.first["bad csv (unexpected end of data)"] == f"{path}:8"


def test_files_without_quoting_or_header(tmp_path):
    path = tmp_path / "raw.tsv"
    path.write_text('"a" b\tc "d\n"e\tf\n', encoding="utf-8")
    stream = read_rows(path, columns=["p", "h"], quoting=False, text_column="p", pair_column="h")
    assert list(stream) == [TextRow('"a" b', text_pair='c "d'), TextRow('"e', text_pair="f")]


def test_a_line_too_long_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("mtllm_fast.data.formats.MAX_ROW_BYTES", 16)
    path = tmp_path / "long.txt"
    path.write_text("a\n" + "b" * 50 + "\n" + "c" * 14 + "\n" + "d" * 40, encoding="utf-8")
    stream = read_rows(path)
    assert [row.text for row in stream] == ["a", "c" * 14]
    assert stream.counts.failed == 2


def test_a_csv_field_longer_than_pythons_default(tmp_path):
    path = write(tmp_path / "long.csv", [{"text": "x" * 200_000}, {"text": "y"}])
    assert [len(row.text) for row in read_rows(path)] == [200_000, 1]


def test_folders_and_globs_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.csv", "sub/c.parquet", "sub/d.tsv.gz", ".hidden/e.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "0.txt").write_text("0.txt\n")
    folder = [row.text for row in read_rows(tmp_path)]
    assert folder == ["0.txt", "a.csv", "b.jsonl", "sub/c.parquet", "sub/d.tsv.gz"]
    assert [row.text for row in read_rows(tmp_path / "*.[cj]s*")] == ["a.csv", "b.jsonl"]
    assert [row.text for row in read_rows(f"{tmp_path}/**/*.parquet")] == ["sub/c.parquet"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak_mib(rows):
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"text": f"{i} " + "x" * 1000}) + "\n" for i in range(rows))
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == rows
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        return peak

    assert peak_mib(5000) < peak_mib(500) + 0.2  # the longer file alone has 5 MiB


def test_labels(tmp_path):
    path = write(tmp_path / "labels.csv", [{"text": "a", "label": "positive"}, {"text": "b", "label": "neutral"}])
    with pytest.raises(
        ValueError, match=r"'neutral' at .*labels\.csv:3 is no label, it must be one of negative, positive"
    ):
        list(read_rows(path, label_column="label", labels=LABELS))
    with pytest.raises(ValueError, match=r"'positive' at .*must be an integer >= 0; name the classes with labels"):
        list(read_rows(path, label_column="label"))
    numbers = write(tmp_path / "numbers.parquet", [{"text": "a", "label": 1}, {"text": "b", "label": 2}])
    assert [row.label for row in read_rows(numbers, label_column="label")] == [1, 2]
    with pytest.raises(ValueError, match=r"2 at .* one of negative, positive"):
        list(read_rows(numbers, label_column="label", labels=LABELS))
    floats = write(tmp_path / "floats.jsonl", [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.5}])
    with pytest.raises(ValueError, match=r"0\.5 at .*jsonl:2"):
        list(read_rows(floats, label_column="label"))
    with pytest.raises(ValueError, match="no label_column"):
        read_rows(path, labels=LABELS)
    with pytest.raises(ValueError, match="distinct"):
        read_rows(path, label_column="label", labels=["a", "a"])
    with pytest.raises(TypeError, match="sequence of names"):
        read_rows(path, label_column="label", labels="ab")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_a_missing_column_is_said_at_once(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}", [{"text": "a", "label": 1}])
    with pytest.raises(
        ValueError, match=rf"text_column 'sentence' is not a column of .*rows\.{kind}, which has: text, label"
    ):
        read_rows(path, text_column="sentence")
    with pytest.raises(ValueError, match="pair_column 'other' is not a column of"):
        read_rows(path, pair_column="other")


@pytest.mark.parametrize(
    "name", ["e.txt", "e.jsonl", "e.csv", "e.tsv", "e.parquet", "e.txt.gz", "e.csv.gz", "e.parquet.gz"]
)
def test_empty_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    with pytest.raises(ValueError, match=rf"{name} is empty"):
        read_rows(path)


def test_damaged_files(tmp_path):
    lines = b"".join(b"line %d\n" % (i * 7919 % 10007) for i in range(20_000))
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(gzip.compress(lines)[:-20])
    with pytest.raises(ValueError, match=r"cut\.txt\.gz is cut or damaged"):
        list(read_rows(cut))
    (tmp_path / "no.txt.gz").write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match=r"no\.txt\.gz is cut or damaged"):
        read_rows(tmp_path / "no.txt.gz")
    path = write(tmp_path / "rows.parquet", [{"text": "a"}])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"rows\.parquet is not a readable parquet file"):
        read_rows(path)
    (tmp_path / "wide.csv").write_text("text\nhello\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.csv is UTF-16, convert it to UTF-8"):
        read_rows(tmp_path / "wide.csv")


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data.json").write_text("{}")
    for source in ("missing.txt", "./missing", str(tmp_path / "missing"), "data/misspelt", "bare"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_rows(source)
    with pytest.raises(FileNotFoundError, match="matches no file"):
        read_rows("*.csv")
    with pytest.raises(ValueError, match=r"folder without a supported file: \.txt, \.jsonl"):
        read_rows("data")
    with pytest.raises(ValueError, match=r"data\.json' is not in a supported format: \.txt"):
        read_rows("data.json")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_rows("data.json", limit=0)
    path = tmp_path / "blank.txt"
    path.write_bytes(b"\n\xff\n\n")
    with pytest.raises(
        ValueError, match=r"no usable row: 2 empty; 1 failed: invalid UTF-8 \(first at .*blank\.txt:2\)"
    ):
        list(read_rows(path))
    path.write_text("fine\n")
    with pytest.raises(ValueError, match=r"label_column 'y': .*blank\.txt is plain text"):
        read_rows(path, label_column="y")


class FakeHub:
    """Stands for `datasets.load_dataset`: no network in tests."""

    def __init__(self, rows, features=None):
        self.rows, self.features, self.calls = rows, features, []
        self.column_names = list(rows[0])

    def __call__(self, name, config, **options):
        self.calls.append((name, config, options))
        return self

    def __iter__(self):
        return iter(self.rows)


def test_hub_datasets(monkeypatch):
    import datasets

    features = datasets.Features({"s": datasets.Value("string"), "y": datasets.ClassLabel(names=LABELS)})
    hub = FakeHub([{"s": "a", "y": 1}, {"s": None, "y": 0}, {"s": "b", "y": -1}], features)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    stream = read_rows("org/name:config", text_column="s", label_column="y", split="validation")
    assert list(stream) == [TextRow("a", label=1)]
    assert (stream.counts.empty, stream.counts.reasons) == (1, {"no label": 1})
    assert set(map(str, hub.calls)) == {str(("org/name", "config", {"split": "validation", "streaming": True}))}
    with pytest.raises(ValueError, match="text_column 'text' is not a column of org/name, which has: s, y"):
        read_rows("org/name")


def test_hub_errors_are_one_line(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("cannot reach it\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"source 'org/name': no such file .*cannot be opened: cannot reach it$"):
        read_rows("org/name")
