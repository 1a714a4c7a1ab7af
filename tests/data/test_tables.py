"""Rows of CSV, TSV and JSONL files: what others read, and what is refused."""

import csv
import io
import re

import pytest

from vlp_jax.data.sources.tables import rows
from vlp_jax.errors import UserError

NO_QUOTES = {"quoting": csv.QUOTE_NONE}


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [dict(row) for _, row in rows(path)]


def refused(path, content):
    with pytest.raises(UserError) as caught:
        read(path, content)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "dialect"),
    [
        (
            "a.csv",
            'path,caption\na.jpg, "red, on a mat"\nb.jpg, "cat"\n',
            {"skipinitialspace": True},
        ),
        ("a.csv", 'path,caption\na.jpg,"two ""marks"" and\na line"\n', {}),
        ("a.csv", "path,caption\ra.jpg,x\rb.jpg,y\r", {}),
        ("a.csv", "\ufeffpath,caption\r\na.jpg,x\r\n", {}),
        ("a.csv", 'filepath\ttitle\na.jpg\t"a, ""b"""\n', {"delimiter": "\t"}),
        ("a.csv", "Pfad;Text\na.jpg;x, y\n", {"delimiter": ";"}),
        ("a.csv", 'a| b| c\nx.jpg| 0| "Cold" beer\ny.jpg| 1| it\n', {"delimiter": "|"}),
        ("a.tsv", 'path\tcaption\na.jpg\t" live\nb.jpg\t5 "\n', {"delimiter": "\t", **NO_QUOTES}),
        ("a.tsv", 'path\tcaption\na.jpg\t"x" said ""y""\n', {"delimiter": "\t", **NO_QUOTES}),
        ("a.TSV", 'path,caption\na.jpg,"x, y"\n', {}),
    ],
)
def test_rows_are_those_that_python_reads_in_this_dialect(tmp_path, name, content, dialect):
    judge = list(csv.DictReader(io.StringIO(content.lstrip("\ufeff"), newline=""), **dialect))
    judge = [{column.strip(): cell for column, cell in row.items()} for row in judge]
    assert judge and read(tmp_path / name, content) == judge


def test_a_tsv_that_a_program_quoted_is_told_of_once(tmp_path, caplog):
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t").writerows([("path", "caption"), *[("a.jpg", 'a "b"')] * 3])
    assert read(tmp_path / "a.tsv", stream.getvalue())[0]["caption"] == '"a ""b"""'
    assert len(caplog.records) == 1 and "line 2 holds a cell like" in caplog.text
    assert read(tmp_path / "a.csv", stream.getvalue())[0]["caption"] == 'a "b"'
    plain = 'path\tcaption\na.jpg\t"hello" said "the sign"\nb.jpg\t"all of it"\n'
    assert read(tmp_path / "b.tsv", plain) and len(caplog.records) == 1


def test_blank_rows_are_left_out_and_lines_counted(tmp_path):
    (tmp_path / "a.csv").write_text("\n \npath,caption\n\na.jpg,x\n   \n , \nb.jpg,y\n\n")
    found = list(rows(tmp_path / "a.csv"))
    assert [row["path"] for _, row in found] == ["a.jpg", "b.jpg"]
    assert [where.rpartition(" ")[2] for where, _ in found] == ["5", "8"]


def test_the_line_that_excel_writes_names_the_delimiter(tmp_path):
    assert read(tmp_path / "a.csv", "sep=;\r\npath;caption\r\na.jpg;x\r\n") == [
        {"path": "a.jpg", "caption": "x"}
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "path,caption\na.jpg,red, on a mat\n",
            "line 2: .*3 cells and the header 2.*comm",
        ),
        ("a.csv", "path,caption\na.jpg,x,\n", "line 2: .*3 cells"),
        ("a.csv", "path,caption\na.jpg,x\n\nb.jpg\n", "line 4: .*1 cells.*line breaks"),
        ("a.tsv", "path\tcaption\na.jpg\tx\ty\n", "line 2: .*a .tsv must hold no tabs"),
        ("a.csv", "path;caption\na.jpg;x;y\n", "line 2: .*separated by semicolons"),
        ("a.csv", 'path,caption\na.jpg,x\nb.jpg,"y\nc.jpg,z\n', "line 3: .*up to line 4.*write"),
        (
            "a.csv",
            'path,caption\na.jpg," live\nb.jpg,5"\nc.jpg,x\n',
            "line 2: .*takes in.*'b.jpg,5'",
        ),
        ("a.csv", 'path,caption\na.jpg,"say \\"hi\\" now"\n', 'line 2: malformed.*write ""'),
        ("a.csv", "path,caption,caption\na.jpg,x,y\n", "'caption' twice"),
        ("a.csv", b"path,caption\na.jpg,x\0y\n", "line 2, holds a zero byte"),
        ("a.csv", "a|b;c\nx\n", "semicolons or vertical bars"),
        ("a.csv", b"path,caption\n\na.jpg,\xe4\n", "line 3, is not UTF-8"),
        ("a.csv", "path,caption\na.jpg,x\n".encode("utf-16"), "is UTF-16"),
        ("a.csv", "path,caption\na.jpg,x\n".encode("utf-16-le"), "UTF-16 or damaged"),
        ("a.jsonl", '{"path": "a"}\n{"path": "b", "path": "c"}\n', "line 2: .*'path' occurs twice"),
        ("a.jsonl", '{"a": {"b": 1, "b": 2}}\n', "line 1: .*'b' occurs twice"),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path, name, content, message):
    assert re.search(message, refused(tmp_path / name, content))
