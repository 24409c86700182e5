"""Which files a path stands for, every format compressed or not, and what is said of what gives no document."""

import bz2
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.grids import covering, few

from engine.data import read_index
from engine.data.files import find
from engine.data.prepare import cached, prepare
from engine.data.request import Request
from engine.data.text import Passed, documents
from optimizers.contract import UsageError
from tools.prepare import main

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")
from pyarrow import feather, ipc, parquet  # noqa: E402

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXTS = ['one\r\ntwo, "three"', "naïve 東京 🙂", "x" * 200_000]


def _csv(texts: list[str]) -> bytes:
    cells = ('"' + text.replace('"', '""') + '"' for text in texts)
    return ("id,text\r\n" + "".join(f"{k},{cell}\r\n" for k, cell in enumerate(cells))).encode()


def _parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), sink, row_group_size=2)
    return bytes(sink.getvalue())


def _arrow(texts: list[str], stream: bool) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.table({"text": texts})
    with (ipc.new_stream if stream else ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _objects(texts: list[str]) -> list[dict[str, object]]:
    return [{"id": k, "text": text} for k, text in enumerate(texts)]


FORMATS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "lines": (".jsonl", lambda texts: "\n".join(map(json.dumps, _objects(texts))).encode()),
    "ndjson": (".ndjson", lambda texts: "\r\n".join(map(json.dumps, _objects(texts))).encode()),
    "a list of objects": (".json", lambda texts: json.dumps(_objects(texts), indent=1).encode()),
    "a list of texts": (".json", lambda texts: json.dumps(texts, ensure_ascii=False).encode()),
    "data": (".json", lambda texts: json.dumps({"version": 1, "data": _objects(texts)}).encode()),
    "a column": (".json", lambda texts: json.dumps({"id": [1], "text": texts}).encode()),
    "lines as json": (".json", lambda texts: b"\xef\xbb\xbf" + "\n".join(map(json.dumps, _objects(texts))).encode()),
    "csv": (".csv", _csv),
    "csv with a mark": (".csv", lambda texts: b"\xef\xbb\xbf" + _csv(texts)),
    "parquet": (".parquet", _parquet),
    "arrow file": (".arrow", lambda texts: _arrow(texts, False)),
    "arrow stream": (".arrow", lambda texts: _arrow(texts, True)),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_compressed_or_not(tmp_path: Path, name: str, packer: str) -> None:
    suffix, write = FORMATS[name]
    path = tmp_path / f"A{suffix.upper()}{packer}"
    path.write_bytes(PACKERS[packer](write(TEXTS)))
    assert list(documents(path)) == TEXTS
    assert find([tmp_path]).files == [path] == find([path]).files


def test_tabs_are_not_quoted_and_fields_have_names(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nit\'s "so" \\so\t1\n"quoted\t0\n')
    assert list(documents(tmp_path / "a.tsv", "sentence")) == ['it\'s "so" \\so', '"quoted']
    for write, suffix in ((_parquet, ".parquet"), (_csv, ".csv")):
        (tmp_path / f"a{suffix}").write_bytes(write(["a", "b"]))
        with pytest.raises(UsageError, match=r"a\.\w+: got the columns \['id', 'text'\]; expected one named 'body'"):
            list(documents(tmp_path / f"a{suffix}", "body"))
    (tmp_path / "a.jsonl").write_text('{"body": "a", "text": 3}')
    assert list(documents(tmp_path / "a.jsonl", "body")) == ["a"]


def test_several_frames_and_members_are_one_file(tmp_path: Path) -> None:
    for suffix, pack in PACKERS.items():
        (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"one ") + pack(b"") + pack(b"two" * 100_000))
        assert list(documents(tmp_path / f"a.txt{suffix}")) == ["one " + "two" * 100_000]


def test_zstandard_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that has its interface, since it comes with Python 3.14."""
    module = SimpleNamespace(ZstdDecompressor=lambda: zstandard.ZstdDecompressor().decompressobj())
    monkeypatch.setitem(sys.modules, "compression.zstd", module)
    whole = PACKERS[".zst"](b"one " * 9) + PACKERS[".zst"](b"two " * 100_000)
    (tmp_path / "a.txt.zst").write_bytes(whole)
    assert list(documents(tmp_path / "a.txt.zst")) == ["one " * 9 + "two " * 100_000]
    (tmp_path / "a.txt.zst").write_bytes(whole[:-3])
    with pytest.raises(UsageError, match="a.txt.zst: damaged or cut short"):
        list(documents(tmp_path / "a.txt.zst"))


@pytest.mark.parametrize(
    ("name", "packer", "keep"),
    covering(
        ["lines", "a list of texts", "csv", "parquet", "arrow stream"], [name for name in PACKERS if name], [0.5, 0.99]
    ),
)
def test_a_stream_that_is_cut_short(tmp_path: Path, packer: str, name: str, keep: float) -> None:
    suffix, write = FORMATS[name]
    content = PACKERS[packer](write([os.urandom(200).hex() for _ in range(500)]))
    path = tmp_path / f"a{suffix}{packer}"
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UsageError, match=r"a\.\w+\.\w+: .*(damaged|cut short)"):
        list(documents(path))


@pytest.mark.parametrize("packer", [".gz", ".xz", ".bz2", ".zst"])
def test_a_later_stream_that_is_damaged_at_its_beginning(tmp_path: Path, packer: str) -> None:
    """Files of parallel compressors are many streams: none may be taken for what follows the last one."""
    one, two = (PACKERS[packer](f"{os.urandom(200).hex()}\n".encode() * 99) for _ in range(2))
    path = tmp_path / f"a.txt{packer}"
    path.write_bytes(one + two + one)
    assert len("".join(documents(path)).splitlines()) == 297
    for tail in (b"\x01" + two[1:], two[:3], b"something else", two + b"x"):
        path.write_bytes(one + tail)
        with pytest.raises(UsageError, match=r"a\.txt\.\w+: .*(damaged|cut short)"):
            list(documents(path))


def test_padding_between_streams_is_none_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one ") + bytes(8) + lzma.compress(b"two" * 100_000) + bytes(4))
    assert list(documents(path)) == ["one " + "two" * 100_000]


@pytest.mark.parametrize("name", ["parquet", "arrow file", "arrow stream"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"ARROW1", b"\xff" * 100, None])
def test_columns_that_are_damaged(tmp_path: Path, name: str, content: bytes | None) -> None:
    suffix, write = FORMATS[name]
    path = tmp_path / f"a{suffix}"
    whole = write(["some text " * 50] * 300)
    path.write_bytes(content if content is not None else whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a\.\w+: .*(damaged|empty)") as error:
        list(documents(path))
    assert "\n" not in str(error.value)


# Rows that give no document


def not_utf8() -> bytes:
    strings = pyarrow.array([b"fine", b"bad \xff", b"fine too"]).cast(pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(3, *strings.buffers()[1:])
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": column}), sink)
    return bytes(sink.getvalue())


def _cells(values: list[object]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": values}), sink)
    return bytes(sink.getvalue())


MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "parquet not UTF-8": ("a.parquet", not_utf8(), "row 2: not UTF-8"),
    "parquet null": ("a.parquet", _cells(["a", None]), "row 2: got None; expected a string in column 'text'"),
    "parquet number": ("a.parquet", _cells([1, 2]), "row 1: got 1; expected a string"),
    "parquet list": ("a.parquet", _cells([["a"], ["b"]]), "row 1: got .'a'."),
    "parquet bytes": ("a.parquet", _cells([b"a", b"\xc3"]), "row 2: not UTF-8"),
    "number": ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "line 2: got '3'; expected .*'text' is a string"),
    "null": ("a.jsonl", b'{"text": "a"}\n{"text": null}', "line 2: got 'None'; expected"),
    "list": ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}', "line 2: got .*expected"),
    "no object": ("a.jsonl", b'{"text": "a"}\n"b"', "line 2: got 'b'; expected an object"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\r\n\r\n{"text": \'b\'}', "line 3: not JSON"),
    "deep": ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000, "line 2: not JSON .*nested too deep"),
    "huge number": ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"9" * 5000 + b"}", "line 2: not JSON"),
    "half a pair": ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "line 2: half a surrogate pair at character 0"),
    "latin-1": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9t\xe9"}', "line 2: not UTF-8"),
    "NUL": ("a.jsonl", b'{"text": "a"}\n{"text": "\0"}', "line 2: holds a NUL byte"),
    "json number": ("a.json", b'[{"text": "a"}, {"text": 3}]', "row 2: got '3'"),
    "json null": ("a.json", b'["a", null]', "row 2: got 'None'; expected an object"),
    "json half a pair": ("a.json", b'["a", "\\udfff"]', "row 2: half a surrogate pair"),
    "json lines": ("a.json", b'{"text": "a"}\n{"text": 3}', "line 2: got '3'"),
    "csv short": ("a.csv", b'id,text\n1,a\n2\n', "line 3: got 1 fields, expected 2"),
    "csv long": ("a.csv", b'id,text\n1,"a\nb"\n2,a,b\n', "line 4: got 3 fields, expected 2"),
    "csv not UTF-8": ("a.csv", b'id,text\n1,a\n2,\xe9\n', "line 3: not UTF-8"),
    "tsv long": ("a.tsv", b'id\ttext\n1\ta\n2\ta\tb\n', "line 3: got 3 fields"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_named(tmp_path: Path, name: str) -> None:
    file, content, message = MALFORMED[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{file}, {message}") as error:
        list(documents(tmp_path / file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", few(MALFORMED, "parquet null", "parquet list", "no JSON", "json null", "csv short"))
def test_a_malformed_row_is_refused_or_left_out_and_counted(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, content, _ = MALFORMED[name]
    (tmp_path / file).write_bytes(content)
    (tmp_path / "good.txt").write_text("good text\n" * 50)
    arguments = [str(tmp_path / "out"), "--data", str(tmp_path / file), str(tmp_path / "good.txt")]
    assert main(arguments) == 2 and capsys.readouterr().err.count("\n") == 1
    if name in ("parquet number", "parquet list"):
        return  # without any document the file is refused, whatever may be left out
    assert main([*arguments, "--allow-malformed", "0.01"]) == 2
    assert "1 are malformed" in (said := capsys.readouterr().err) and "allowed are 1.00%" in said
    assert main([*arguments, "--allow-malformed", "0.5"]) == 0
    assert f"1 are malformed and left out (the first: {file}, " in capsys.readouterr().out.replace("\n", " ")
    assert main([*arguments, "--allow-malformed", "0.5"]) == 0
    assert "1 are malformed and left out" in capsys.readouterr().out.replace("\n", " ")
    assert main(arguments) == 2 and "allowed are 0.00%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text".encode("utf-16"), "a.txt, line 1: not UTF-8 but UTF-16"),
        ("a.txt", "text".encode("utf-16-le"), "a.txt, line 1: holds a NUL byte, so it is UTF-16 or no text"),
        ("a.txt", b"one\ntwo\0", "a.txt, line 2: holds a NUL byte"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl, line 1: not UTF-8 but UTF-16"),
        ("a.csv", "text\na".encode("utf-16"), "a.csv, line 1: not UTF-8 but UTF-16"),
        ("a.json", "[]".encode("utf-16-be"), "a.json, line 1: holds a NUL byte"),
        ("a.json", b"", "a.json: empty"),
        ("a.json", b"[]", "a.json: empty"),
        ("a.json", b"3", "a.json: got '3'; expected a list"),
        ("a.json", b'{"a": 1}', r"a.json, row 1: got the fields \['a'\]; expected .*'text'.* --field"),
        ("a.json", b'[{"text": "a"}', "a.json: not JSON"),
        ("a.json", b"[" * 200_000, "a.json: not JSON that can be read .nested too deep"),
        ("a.csv", b"", "a.csv: empty"),
        ("a.csv", b"id,text\n", "a.csv: empty"),
        ("a.csv", b"text,text\na,b\n", r"a.csv: got the columns \['text', 'text'\]"),
        ("a.csv", b"text;id\na;b\n", r"a.csv: got the columns \['text;id'\]"),
        ("a.csv", b'id,text\n1,"a\n2,b\n', "a.csv, line 2: .*a quote that is never closed"),
        ("a.csv", b'id,text\n1,"a"b\n', "a.csv, line 2: .*a quote"),
        ("a.jsonl", b'{"b": "a"}\n{"c": 1}', r"a.jsonl, line 1: got the fields \['b'\]; expected .*'text'"),
    ],
)
def test_a_file_that_is_not_understood(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        list(documents(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_quote_that_swallows_rows_is_seen(tmp_path: Path) -> None:
    """It ends at the next quote, and the row is the wrong length."""
    (tmp_path / "a.csv").write_text('id,text\n1,"a\n2,b\n3,"c"\n')
    with pytest.raises(UsageError, match=r"a.csv, line 2: "):
        list(documents(tmp_path / "a.csv"))


def test_a_field_of_many_megabytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 3_000_000}\n")
    assert [len(text) for text in documents(tmp_path / "a.csv")] == [3_000_000]


def test_rows_without_the_field_and_empty_ones_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "some text"}, {"title": "a"}, {"text": ""}, {"text": "more text"}, {"title": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    passed = Passed()
    assert list(documents(tmp_path / "a.jsonl", passed=passed)) == ["some text", "more text"]
    assert (passed.rows, passed.without, passed.empty) == (5, 2, 1)
    for _ in range(2):
        assert main([str(tmp_path / "out"), "--data", str(tmp_path / "a.jsonl")]) == 0
        said = capsys.readouterr().out.replace("\n", " ")
        assert "of 5 rows 2 have no field 'text' (the first: a.jsonl, line 2); 1 are empty" in said


def test_null_characters_that_are_spelled_out_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}')
    assert list(documents(tmp_path / "a.jsonl")) == ["a\0b"]


# Which files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}')


def test_paths_are_files_folders_and_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "b/z.txt", "b/a.jsonl.xz", "b/c/m.json", "b/.hidden/h.txt", "b/notes.doc", "[1].txt", "s.PY")

    def names(*paths: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in find([tmp_path / path for path in paths]).files]

    assert names("b") == ["b/a.jsonl.xz", "b/c/m.json", "b/z.txt"]
    assert names("s.PY", "b/c", "[1].txt") == ["s.PY", "b/c/m.json", "[1].txt"]
    assert names("b/*.txt") == ["b/z.txt"] and names("b/**/*.json") == ["b/c/m.json"]
    assert names("b/*") == ["b/a.jsonl.xz", "b/c/m.json", "b/z.txt"] == names("b/**")
    for path, message in (
        ("nothing", "nothing: no such file or folder"),
        ("b/*.jsonl", "matches no file"),
        ("b/*.doc", r"matches no file .*passed over 1 of a kind that is not read \(.doc\)"),
        ("b/.hidden/../c/../notes.doc", r"notes.doc: not a kind of file that can be read; expected .txt"),
    ):
        with pytest.raises(UsageError, match=message):
            names(path)
    with pytest.raises(UsageError, match=r"z.txt: named twice"):
        names("b", "b/z.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty: nothing to read in this folder"):
        names("empty")


def test_whatever_a_folder_passes_over_is_said_in_one_line(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.txt", "b.pdf", "c.pdf", "d.tar.gz", "e.gz", "noend", ".hidden.txt", ".git/x.txt", "README.md",
        "dataset_info.json", "deep/state.json", "deep/f.txt",
    )  # fmt: skip
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    found = find([tmp_path])
    assert [file.name for file in found.files] == ["a.txt", "f.txt"]
    (line,) = found.skipped
    assert line.startswith(f"{tmp_path}: passed over ") and "\n" not in line
    for part in (
        "2 of a kind that is not read (.pdf)",
        "1 of a kind that is not read (.tar.gz)",
        "1 of a kind that is not read (.gz)",
        "1 of a kind that is not read (no suffix)",
        "2 hidden",
        "3 that describe data or a model",
        "1 link to nothing (gone.txt)",
        "1 neither file nor folder",
    ):
        assert part in line
    assert find([tmp_path / "README.md"]).files == [tmp_path / "README.md"]
    with pytest.raises(UsageError, match="gone.txt: a link to nothing"):
        find([tmp_path / "gone.txt"])
    with pytest.raises(UsageError, match="pipe.txt: neither a file nor a folder"):
        find([tmp_path / "pipe.txt"])


def test_many_kinds_stay_one_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", *(f"b.k{k}" for k in range(50)))
    (line,) = find([tmp_path]).skipped
    assert line.endswith(", and 38 more kinds")


def test_linked_folders_are_read_once_and_loops_are_said(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/same.txt").symlink_to(tmp_path / "data/a.txt")
    (tmp_path / "elsewhere/deep/back").symlink_to(tmp_path / "elsewhere")
    found = find([tmp_path / "data"])
    assert [file.relative_to(tmp_path / "data").as_posix() for file in found.files] == [
        "a.txt", "linked/b.txt", "linked/deep/c.txt",
    ]  # fmt: skip
    (line,) = found.skipped
    assert "1 link back to a folder that it is in (up)" in line and "(back)" in line
    assert "1 file that is there already, through a link" in line


def test_the_output_and_runs_in_the_data_are_not_data(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.txt", "runs/r/metrics.jsonl", "runs/r/config.json", "runs/s/step-00000010/trainer.json")
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    request = Request((str(tmp_path),))
    made = [prepare(tmp_path / name, request) for name in ("first", "second")]
    assert read_index(made[0])["request"] == read_index(made[1])["request"]
    assert [line.split()[0] for line in read_index(made[1])["request"]["data"]] == ["a.txt", "b.txt"]
    assert prepare(made[0], request) == made[0]
    (line,) = find([tmp_path], made[0]).skipped
    assert (
        "1 folder that is being written" in line
        and "1 folder of prepared tokens" in line
        and "2 folder of a run" in line
    )
    with pytest.raises(UsageError, match="first: folder of prepared tokens, not text; give a prepared folder alone"):
        find([made[0], tmp_path / "a.txt"])


def test_what_is_missing_to_read_is_said_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.txt.zst", "b.parquet", "c.arrow.gz")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    for name, lack in (("a.txt.zst", "zstandard"), ("b.parquet", "pyarrow"), ("c.arrow.gz", "pyarrow")):
        with pytest.raises(
            UsageError, match=rf"{name}: .* needs .*{lack}, which is missing: pip install 'leanstep\[data\]'"
        ):
            find([tmp_path / name])
        with pytest.raises(UsageError, match=f"{lack}, which is missing"):
            list(documents(tmp_path / name))


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "data")
    os.mkdir(folder)
    for suffix, write in FORMATS.values():
        with open(folder + b"/\xff" + suffix.encode(), "wb") as file:
            file.write(write(TEXTS))
    found = find([tmp_path / "data"])
    assert [text for file in found.files for text in documents(file)] == TEXTS * len(found.files)
    assert read_index(prepare(tmp_path / "out", Request((str(tmp_path / "data"),))))["characters"] > 0


# What the cache goes by


def test_whatever_changes_tokens_is_another_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {k}", "body": f"body {k}"}) for k in range(50)))
    request = Request((str(path),))
    first = cached(tmp_path / "cache", request)
    assert cached(tmp_path / "cache", Request((str(path),), field="body")) != first
    before = path.stat()
    path.write_text(path.read_text().replace("text 7", "TEXT 7"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert cached(tmp_path / "cache", request) != first


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 50)

    def change(when: str) -> Callable[[str, int, int], None]:
        def report(what: str, done: int, total: int) -> None:
            if what.startswith(when):
                path.write_text(path.read_text() + "other text\n" * 50)

        return report

    with pytest.raises(UsageError, match="the data changed while it was read; start again"):
        prepare(tmp_path / "out", Request((str(path),)), change("reading"))
    with pytest.raises(UsageError, match=r"a.txt: changed while it was read; delete .*other and start again"):
        prepare(tmp_path / "other", Request((str(path),)), change("held out"))


def test_modules_without_a_word(tmp_path: Path) -> None:
    """Empty Python modules are no mistake, but a corpus of nothing else is."""
    (tmp_path / "a.py").touch()
    with pytest.raises(UsageError, match="no document with text"):
        prepare(tmp_path / "out", Request((str(tmp_path / "a.py"),)))


def test_feather_is_not_mistaken_for_text(tmp_path: Path) -> None:
    feather.write_feather(pyarrow.table({"text": ["a"]}), tmp_path / "a.feather")
    with pytest.raises(UsageError, match="a.feather: not a kind of file that can be read"):
        find([tmp_path / "a.feather"])
