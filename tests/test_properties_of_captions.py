"""Whatever stands in a caption file, its captions are read exactly or it is refused in one sentence: generated inputs.

Few by default; ``SD_ERASE_EXAMPLES=100000 pytest tests/test_properties_of_captions.py`` tries as many of each.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="needs sd-erase[dev]")
from hypothesis import example, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sd_erase import bases  # noqa: E402
from sd_erase.captions import Caption, Tally, open_dataset  # noqa: E402
from sd_erase.captions.caption import _ADDRESS  # noqa: E402
from sd_erase.errors import UserError  # noqa: E402

Write = Callable[[str, bytes], Path]
ODD = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\ufeff,;\t|\"'#\\-[]{}<> a"  # what some splitter or parser stumbles over
NAMES = {
    "tokens": "a.token", "pipes": "results.csv", "table": "captions.csv", "tsv": "a.tsv", "metadata": "metadata.csv", "json": "a.json",
    "jsonl": "a.jsonl", "parquet": "a.parquet", "arrow": "a.arrow", "tar": "a.tar", "gz": "a.jsonl.gz", "text": "a.txt",
}  # fmt: skip


def words(line_ends: str = "", without: str = "") -> st.SearchStrategy[str]:
    """Texts of all of Unicode but half characters, or of odd characters alone."""
    every = st.characters(codec="utf-8", exclude_characters=without + ("" if line_ends else "\r\n"))
    odd = [letter for letter in ODD + line_ends if letter not in without]
    return st.text(every, min_size=1, max_size=16) | st.text(st.sampled_from(odd), min_size=1, max_size=12)


# not what could lead out of a folder, and no "#", which ends an image's name in a key
image_names = st.text(st.sampled_from("abcdefé自 -_.1"), min_size=1, max_size=8).map(lambda name: f"x{name}.jpg")


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    folder = tmp_path_factory.mktemp("captions")

    def file(name: str, content: bytes) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return file


def read(path: Path, spec: str = "jsonl", wanted: Sequence[str] | None = None) -> tuple[list[Caption], Tally]:
    tally = Tally()
    chosen = None if wanted is None else set(wanted)
    captions = open_dataset(f"{spec}:{path}", bases.ROWS["sd15"], path.parent / "taken", chosen, tally=tally)
    return list(captions), tally


def read_or_refused(path: Path, spec: str = "jsonl") -> list[Caption] | None:
    """The captions, or None where one sentence says why there are none."""
    try:
        captions, tally = read(path, spec)
    except UserError as error:
        assert str(path.name) in str(error) or str(path.parent) in str(error)
        assert "\n" not in str(error)
        return None
    assert captions and all(caption.text.strip() and caption.key and caption.image_key for caption in captions)
    assert len({caption.key for caption in captions}) == len(captions)
    assert all(Path(caption.image).is_relative_to(path.parent) for caption in captions if caption.image)
    json.dumps([vars(caption) for caption in captions], ensure_ascii=False).encode()
    tally.sentences("x")
    return captions


def kept(text: str) -> bool:
    """Whether a text is a caption at all."""
    return bool(text.strip()) and not _ADDRESS.fullmatch(text.strip())


def check(path: Path, expected: Sequence[str], spec: str = "jsonl") -> list[Caption]:
    """The captions, whose texts must be the `expected` ones that are captions; a file without any is refused."""
    texts = [text.strip() for text in expected if kept(text)]
    if not texts:
        assert read_or_refused(path, spec) is None
        return []
    captions, tally = read(path, spec)
    assert [caption.text for caption in captions] == texts
    assert len(captions) + sum(tally.counts.values()) >= len(expected)
    assert len({caption.key for caption in captions}) == len(captions)
    return captions


# --- any file --------------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(sorted(NAMES.values())), content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(write: Write, name: str, content: bytes) -> None:
    read_or_refused(write(name, content))


HEADS = {
    "a.token": "1.jpg#0\tA dog.\n", "results.csv": "image_name| comment_number| comment\n", "captions.csv": "image,caption\n",
    "a.tsv": "http://x/1.jpg\tA dog.\n", "b.tsv": "caption\turl\n", "metadata.csv": "file_name;text\n", "a.jsonl": '{"text": "A dog."}\n',
    "a.json": "", "a.txt": "",
}  # fmt: skip
PIECES = (
    "1.jpg", "../1.jpg", "/etc/passwd", "C:\\1.jpg", "#0", "#r1", "\t", "\n", "\r\n", "\r", "|", "| 0| ", ",", ";", '"', '""', "a dog", "http://x/1.jpg",
    "{", "}", "[", "]", ":", "null", "NaN", "true", "1e999", "-1", '"caption"', '"text"', '"image"', '"images"', '"annotations"', '"sentences"',
    '"raw"', '"id"', '"image_id"', '"file_name"', '"filename"', '"tags"', '"\\ud800"', '"\\u0000"', " ", "\ufeff", "\u2028", "9" * 5000,
    '{"id": 1, "file_name": "1.jpg"}', '{"image": "1.jpg", "caption": "a dog"}', '{"images": [', '"annotations": [', "]}",
)  # fmt: skip


@given(
    name=st.sampled_from(sorted(HEADS)),
    pieces=st.lists(st.sampled_from(PIECES) | words("\r\n"), max_size=24),
    headed=st.booleans(),
)
def test_files_that_are_nearly_right_are_read_or_refused(write: Write, name: str, pieces: list[str], headed: bool) -> None:
    read_or_refused(write(name, ((HEADS[name] if headed else "") + "".join(pieces)).encode()))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(("1.jpg", "train", "a dog", "../1.jpg")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("raw"), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "caption",
    "captions",
    "text",
    "image",
    "file_name",
    "filename",
    "filepath",
    "id",
    "image_id",
    "sentences",
    "split",
    "key",
    "tags",
    "raw",
)
json_rows = st.lists(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5) | json_values, max_size=4)


@given(
    rows=json_rows, more=json_rows, shape=st.sampled_from(("list", "lines", "coco", "karpathy", "kohya")),
    name=st.sampled_from(("a.json", "a.jsonl")),
)  # fmt: skip
def test_json_of_wrong_values_is_read_or_refused(write: Write, rows: list[Any], more: list[Any], shape: str, name: str) -> None:
    documents: dict[str, Any] = {
        "list": rows, "coco": {"images": rows, "annotations": more}, "karpathy": {"images": [{"sentences": more, "filename": "1.jpg"}, *rows]},
        "kohya": {f"x/{number}": row for number, row in enumerate(rows)},
    }  # fmt: skip
    text = "\n".join(map(json.dumps, rows)) if shape == "lines" else json.dumps(documents[shape])
    read_or_refused(write(name, text.encode()))


def parquet_bytes(columns: dict[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def arrow_bytes(columns: dict[str, Any]) -> bytes:
    import pyarrow

    table, stream = pyarrow.table(columns), io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def cifar_bytes() -> bytes:
    import numpy

    return pickle.dumps({b"fine_labels": [0, 1], b"data": numpy.zeros((2, 3072), dtype="uint8")}, 2)


COLUMNS = {"caption": [["a dog", "a cat"], None], "filename": ["1.jpg", "2.jpg"], "split": ["train", "test"]}
VALID: dict[str, Callable[[], bytes]] = {
    "a.parquet": lambda: parquet_bytes(COLUMNS),
    "b.parquet": lambda: parquet_bytes({"TEXT": ["a dog", "a cat"], "URL": ["http://x", "http://y"]}),
    "a.arrow": lambda: arrow_bytes(COLUMNS),
    "a.tar": lambda: tar_bytes({"0.jpg": b"x", "0.txt": b"a dog", "1.json": b'{"caption": "a cat"}', "d/2.txt": b"a bus"}),
    "a.jsonl.gz": lambda: gzip.compress(b'{"text": "a dog"}\n{"text": "a cat"}\n'),
    "train": cifar_bytes,
}
changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


@pytest.fixture(scope="module")
def valid() -> dict[str, bytes]:
    pytest.importorskip("webdataset")
    return {name: make() for name, make in VALID.items()}


@given(name=st.sampled_from(sorted(VALID)), changes=changes, cut=st.just(1.0) | st.floats(0, 1))
def test_changed_and_cut_archives_are_read_or_refused(
    write: Write, valid: dict[str, bytes], name: str, changes: list[tuple[float, int]], cut: float
) -> None:
    content = bytearray(valid[name])
    for place, value in changes:
        content[int(place * len(content))] = value
    path = write(name, bytes(content[: int(cut * len(content))]))
    if name == "train":
        write("meta", pickle.dumps({b"fine_label_names": [b"apple", b"bear"]}, 2))
    read_or_refused(path, "cifar100" if name == "train" else "jsonl")


# --- what is right comes back exactly --------------------------------------------------------------------------------


@given(rows=st.lists(st.tuples(image_names, words()), min_size=1, max_size=5), gzipped=st.booleans())
def test_all_lines_of_a_token_file_come_back(write: Write, rows: list[tuple[str, str]], gzipped: bool) -> None:
    text = "first.jpg#0\ta dog\n" + "".join(f"{name}#{number}\t{text}\n" for number, (name, text) in enumerate(rows))
    path = write("a.token.gz" if gzipped else "a.token", gzip.compress(text.encode()) if gzipped else text.encode())
    captions = check(path, ["a dog", *(text for _, text in rows)])
    assert [caption.image_key for caption in captions] == ["first.jpg", *(name for name, text in rows if kept(text))]


@given(texts=st.lists(words(), min_size=1, max_size=5))
def test_all_rows_of_the_mirrors_csv_come_back(write: Write, texts: list[str]) -> None:
    text = "image_name| comment_number| comment\n" + "".join(f"1.jpg| {number}| {text}\n" for number, text in enumerate(texts))
    check(write("results.csv", text.encode()), texts)


@given(
    rows=st.lists(st.tuples(image_names, words("\r\n")), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(("\n", "\r\n")),
    names=st.sampled_from((("image", "caption"), ("file_name", "text"), ("URL", "TEXT"))),
    columns=st.permutations((0, 1, 2)),
    metadata=st.booleans(),
)
def test_all_rows_that_csv_writes_come_back(
    write: Write,
    rows: list[tuple[str, str]],
    delimiter: str,
    end: str,
    names: tuple[str, str],
    columns: Sequence[int],
    metadata: bool,
) -> None:
    if delimiter == "\t":  # a cell with a tab and a line end is taken for a quotation mark that was left open
        rows = [(name, text.replace("\t", " ")) for name, text in rows]
    # five lines of one cell are taken for that, too
    rows = [(name, text if len(text.splitlines()) < 5 else " ".join(text.split())) for name, text in rows]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    for line in [(*names, "nr"), *((name, text, "3") for name, text in rows)]:
        writer.writerow([line[column] for column in columns])
    path = write("metadata.csv" if metadata else "captions.csv", stream.getvalue().encode())
    captions = check(path, [" ".join(text.split()) for _, text in rows])
    if names[0] != "URL" and captions:
        assert [caption.image_key for caption in captions] == [name for name, text in rows if kept(" ".join(text.split()))]


@given(texts=st.lists(words(without="\t"), min_size=1, max_size=5), url_first=st.booleans(), more=st.booleans())
@example(texts=["we are #1", "#2"], url_first=False, more=False)  # looks like a token file's name and number
@example(texts=["0", "0#0"], url_first=True, more=True)
def test_all_rows_of_conceptual_captions_come_back(write: Write, texts: list[str], url_first: bool, more: bool) -> None:
    texts = [text for text in texts if kept(text) and "://" not in text and not text.strip().startswith("//")]
    rows = [("a photo", "http://x/first.jpg"), *((text, f"https://x/{number}.jpg") for number, text in enumerate(texts))]
    lines = ["\t".join((url, text) if url_first else (text, url)) + ("\t0.5" if more else "") for text, url in rows]
    check(write("a.tsv", ("\n".join(lines) + "\n").encode()), ["a photo", *texts])


json_captions = st.lists(
    st.tuples(image_names, words("\r\n") | st.none(), st.sampled_from((None, "train", "test"))), min_size=1, max_size=5
)


@given(rows=json_captions, ascii_only=st.booleans(), listed=st.booleans())
def test_all_rows_that_json_writes_come_back(write: Write, rows: list[Any], ascii_only: bool, listed: bool) -> None:
    values = [{"image": name, "caption": text, "split": split} for name, text, split in rows]
    lines = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    path = write("a.json" if listed else "a.jsonl", (f"[{','.join(lines)}]" if listed else "\n".join(lines)).encode())
    captions = check(path, [text or "" for _, text, _ in rows])
    if captions:
        assert [(caption.image_key, caption.split) for caption in captions] == [
            (name, split) for name, text, split in rows if text and kept(text)
        ]


@given(rows=json_captions, shape=st.sampled_from(("coco", "karpathy", "kohya")))
def test_all_captions_of_json_documents_come_back(write: Write, rows: list[Any], shape: str) -> None:
    documents: dict[str, Any] = {
        "coco": {
            "info": {"year": 2017},
            "images": [{"id": number, "file_name": name} for number, (name, _, _) in enumerate(rows)],
            "annotations": [{"id": 7, "image_id": number, "caption": text} for number, (_, text, _) in enumerate(rows)],
        },
        "karpathy": {
            "images": [
                {"filename": name, "split": split, "sentences": [{"raw": text}, {"raw": None}]} for name, text, split in rows
            ]
        },
        "kohya": {f"/data/{number}/{name}": {"caption": text, "tags": ""} for number, (name, text, _) in enumerate(rows)},
    }
    check(write(f"captions_{shape}.json", json.dumps(documents[shape]).encode()), [text or "" for _, text, _ in rows])


@given(
    rows=st.lists(st.tuples(image_names | st.none(), st.lists(words("\r\n") | st.none(), max_size=3) | st.none()), min_size=1, max_size=5),
    flat=st.booleans(), kind=st.sampled_from(("parquet", "arrow")),
)  # fmt: skip
def test_all_rows_that_pyarrow_writes_come_back(write: Write, rows: list[Any], flat: bool, kind: str) -> None:
    import pyarrow

    cells = [None if not texts else texts[0] for _, texts in rows] if flat else [texts for _, texts in rows]
    # a text such as "['a']" stands for a list in the hub's csv-born copies
    cells = [cell.replace("[", "(") if isinstance(cell, str) else cell for cell in cells]
    type_of = pyarrow.string() if flat else pyarrow.list_(pyarrow.string())
    columns = {"filename": pyarrow.array([name for name, _ in rows], pyarrow.string()), "caption": pyarrow.array(cells, type_of)}
    content = parquet_bytes(columns) if kind == "parquet" else arrow_bytes(columns)
    check(write(f"a.{kind}", content), [text or "" for cell in cells for text in ([cell] if flat else cell or [])])


@given(samples=st.lists(st.tuples(st.sampled_from("abc/_"), words("\r\n"), st.booleans()), max_size=5))
def test_all_samples_of_a_shard_come_back(write: Write, samples: list[tuple[str, str, bool]]) -> None:
    pytest.importorskip("webdataset")
    files = {"000.jpg": b"x", "000.txt": b"a dog"}
    for number, (folder, text, as_json) in enumerate(samples):
        name = f"d{folder}x/{number}"
        files[f"{name}.jpg"] = b"x"
        files[f"{name}.{'json' if as_json else 'txt'}"] = json.dumps({"caption": text}).encode() if as_json else text.encode()
    captions = check(write("a.tar", tar_bytes(files)), ["a dog", *(text for _, text, _ in samples)])
    assert len(captions) == 1 + sum(kept(text) for _, text, _ in samples)


@given(
    images=st.lists(
        st.tuples(st.sampled_from(("", "a/", "a/b/")), st.sampled_from((".txt", ".caption", ".TXT")), st.lists(words(), max_size=3)),
        max_size=4,
    ),
    end=st.sampled_from(("\n", "\r\n")),
)  # fmt: skip
def test_all_captions_beside_images_come_back(write: Write, images: list[tuple[str, str, list[str]]], end: str) -> None:
    root = write("marker", b"").parent / "folder"
    shutil.rmtree(root, ignore_errors=True)
    expected = {}
    for number, (folder, suffix, texts) in enumerate([("", ".txt", ["a dog"]), *images]):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{number}.jpg").write_bytes(b"x")
        (root / folder / f"{number}{suffix}").write_bytes(end.join(texts).encode())
        for line, text in enumerate(texts):
            text = text.removeprefix("\ufeff") if line == 0 else text
            if kept(text):
                expected[f"{folder}{number}.jpg#{line}"] = text.strip()
    captions, _ = read(root, "folder")
    assert {caption.key: caption.text for caption in captions} == expected
