"""Readers of captions: the layouts that people have on disk, and one clear sentence for files that are damaged or unsafe."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import pickle
import re
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from sd_erase import bases, catalog
from sd_erase.captions import Caption, open_dataset
from sd_erase.captions.arrow import splits_of_names
from sd_erase.captions.files import MAX_ROW, MAX_TEXT, find_file, image_inside, take_out
from sd_erase.errors import UserError

REAL = Path(__file__).parents[2] / "shared" / "data"
JPEG = b"\xff\xd8\xff\xe0 not really a picture"
OUTSIDE = (
    "../evil.jpg",
    "/etc/passwd",
    "a/../../evil.jpg",
    "..\\evil.jpg",
    "C:\\evil.jpg",
    "c:evil.jpg",
    "\\\\host\\evil.jpg",
    "a\0.jpg",
)


def read(spec: str, path: Path, folder: Path | None = None, wanted: Iterable[str] | None = None) -> list[Caption]:
    """All captions of `path` by reader `spec`."""
    chosen = None if wanted is None else set(wanted)
    return list(open_dataset(f"{spec}:{path}", bases.ROWS["sd15"], folder or path.parent / "taken", chosen))


def refusal(spec: str, path: Path, folder: Path | None = None, wanted: Iterable[str] | None = None) -> str:
    """What the `UserError` says: one line that names the file."""
    with pytest.raises(UserError) as error:
        read(spec, path, folder, wanted)
    message = str(error.value)
    assert "\n" not in message
    return message


def write(path: Path, content: str | bytes | Any) -> Path:
    """`content` as a file: text, bytes, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def pairs(captions: Iterable[Caption]) -> list[tuple[str, str]]:
    return [(caption.key, caption.text) for caption in captions]


# --- what all readers share ------------------------------------------------------------------------------------------


def test_a_caption_knows_its_image_by_its_key() -> None:
    assert Caption("a#b.jpg#3", None, "x", None).image_key == "a#b.jpg"
    assert Caption("plain", None, "x", None).image_key == "plain"


@pytest.mark.parametrize("name", OUTSIDE + ("", ".", "./"))
def test_an_image_never_lies_outside_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="outside its folder"):
        image_inside(tmp_path, name, tmp_path / "captions.json")


def test_names_with_folders_and_odd_letters_are_allowed(tmp_path: Path) -> None:
    for name in ("a/b.jpg", "..a.jpg", "caf\u00e9 1.jpg", "a#1.jpg", "1000.jpg.jpg"):
        assert image_inside(tmp_path, name, tmp_path) == str(tmp_path / name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flickr3k:x", "did you mean 'flickr30k'"),
        ("coco", "names no path"),
        ("coco:", "names no path"),
        ("flickr30k:/no/such/place", "does not exist"),
        ("synthetic:x", "without a path"),
    ],
)
def test_a_bad_data_set_is_told_before_anything_is_read(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(spec, bases.ROWS["sd15"], tmp_path)


def test_an_archives_image_is_written_once_and_a_failure_is_no_traceback(tmp_path: Path) -> None:
    target = take_out(tmp_path, "a/1.jpg", None, tmp_path)
    assert not Path(target).exists()
    assert take_out(tmp_path, "a/1.jpg", b"one", tmp_path) == target
    take_out(tmp_path, "a/1.jpg", b"two", tmp_path)
    assert Path(target).read_bytes() == b"one"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["1.jpg"]
    for name in ("a/1.jpg/2.jpg", 300 * "x" + ".jpg"):  # a file where a folder should be; longer than a name may be
        with pytest.raises(UserError, match="cannot be written"):
            take_out(tmp_path, name, b"three", tmp_path)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (
            ["train-00000-of-00005.parquet", "validation-0.parquet", "test.parquet", "data-0.parquet"],
            ["train", "val", "test", None],
        ),
        (["train/0000.parquet", "test/0000.parquet"], ["train", "test"]),
        (["train/data-00000-of-00001.arrow", "validation/data-00000-of-00001.arrow"], ["train", "val"]),
        (["test-00000-of-00009.parquet", "test-00001-of-00009.parquet"], [None, None]),  # the hub's whole Flickr30K
    ],
)
def test_a_shards_name_tells_its_split(names: list[str], splits: list[str | None]) -> None:
    paths = [Path(name) for name in names]
    assert list(splits_of_names(paths).values()) == splits


@pytest.mark.parametrize(("spec", "identifier"), [("flickr30k", "lmms-lab/flickr30k"), ("flickr30k:me/mine", "me/mine")])
def test_a_hub_id_is_fetched_and_read_like_a_folder(
    spec: str, identifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def fetch(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match="holds no parquet file"):
        open_dataset(spec, bases.ROWS["sd15"], tmp_path)
    parquet(tmp_path / "cache" / "data" / "test-00000-of-00001.parquet", [{"caption": ["A dog."], "filename": "1.jpg"}])
    assert pairs(open_dataset(spec, bases.ROWS["sd15"], tmp_path)) == [("1.jpg#0", "A dog.")]
    assert set((name, kind) for name, kind, _ in asked) == {(identifier, "dataset")}

    def refuse(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="cannot be fetched from the hub"):
        open_dataset(spec, bases.ROWS["sd15"], tmp_path)


@pytest.mark.parametrize("spec", ["flickr30k", "cc12m", "jsonl"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(spec: str, tmp_path: Path) -> None:
    name, content = READERS_OF_TEXT[spec]
    bomb = gzip.compress(content.encode() + b"x" * 20 * MAX_TEXT)
    assert f"line of {MAX_TEXT:,} characters" in refusal(spec, write(tmp_path / f"{name}.gz", bomb))


def test_a_json_text_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    import tracemalloc

    bomb = b'{"images": [{"filename": "1.jpg", "sentences": [{"raw": "' + b"x" * 60 * MAX_TEXT + b'"}]}]}'
    file = write(tmp_path / "dataset_flickr30k.json", bomb)
    tracemalloc.start()
    assert "is no caption file" in refusal("flickr30k", file)
    assert tracemalloc.get_traced_memory()[1] < 10 * MAX_TEXT
    tracemalloc.stop()


def test_the_first_known_name_in_a_folder_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "{}")
    write(tmp_path / "a.jsonl", "{}")
    assert find_file(tmp_path, ("metadata.jsonl", "*.jsonl"), "file").name == "a.jsonl"
    assert find_file(tmp_path / "b.jsonl", ("nothing",), "file").name == "b.jsonl"


READERS_OF_TEXT = {  # reader -> (file name, a good file)
    "flickr30k": ("results_20130124.token", "1.jpg#0\tA caf\u00e9 .\n1.jpg#1\tA dog .\n"),
    "flickr8k": ("captions.csv", "image,caption\n1.jpg,A caf\u00e9 .\n1.jpg,A dog .\n"),
    "coco": (
        "captions_train2017.json",
        '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 7, "image_id": 1, "caption": "A caf\u00e9 ."}, '
        '{"id": 8, "image_id": 1, "caption": "A dog ."}]}',
    ),
    "cc12m": ("cc12m.tsv", "http://x/1.jpg\tA caf\u00e9 .\nhttp://x/2.jpg\tA dog .\n"),
    "jsonl": ("metadata.jsonl", '{"file_name": "1.jpg", "text": "A caf\u00e9 ."}\n{"file_name": "1.jpg", "text": "A dog ."}\n'),
}


@pytest.mark.parametrize("spec", READERS_OF_TEXT)
def test_a_file_and_its_folder_are_the_same_data_set(spec: str, tmp_path: Path) -> None:
    name, content = READERS_OF_TEXT[spec]
    file = write(tmp_path / name, content)
    captions = read(spec, file)
    assert [caption.text for caption in captions] == ["A caf\u00e9 .", "A dog ."]
    assert read(spec, tmp_path) == captions
    assert len({caption.key for caption in captions}) == 2


@pytest.mark.parametrize("spec", [name for name in READERS_OF_TEXT if name != "coco"])  # JSON forbids a byte order mark
def test_windows_line_ends_and_a_byte_order_mark_change_nothing(spec: str, tmp_path: Path) -> None:
    name, content = READERS_OF_TEXT[spec]
    expected = pairs(read(spec, write(tmp_path / "unix" / name, content)))
    assert pairs(read(spec, write(tmp_path / "dos" / name, codecs.BOM_UTF8 + content.replace("\n", "\r\n").encode()))) == expected


@pytest.mark.parametrize("spec", READERS_OF_TEXT)
def test_an_empty_file_and_an_empty_folder_are_refused(spec: str, tmp_path: Path) -> None:
    file = write(tmp_path / READERS_OF_TEXT[spec][0], "")
    assert str(file) in refusal(spec, file)
    (tmp_path / "empty").mkdir()
    assert "expected" in refusal(spec, tmp_path / "empty")


@pytest.mark.parametrize("spec", READERS_OF_TEXT)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_in_another_encoding_is_refused(spec: str, encoding: str, tmp_path: Path) -> None:
    name, content = READERS_OF_TEXT[spec]
    file = write(tmp_path / name, content.encode(encoding))
    message = refusal(spec, file)
    assert str(file) in message and "save it as UTF-8" in message and "b'lexical" not in message


@pytest.mark.parametrize("spec", READERS_OF_TEXT)
def test_another_kind_of_file_is_refused(spec: str, tmp_path: Path) -> None:
    name = READERS_OF_TEXT[spec][0]
    for content in ("[1, 2]\n", "null\n", 30 * "just some lines of text\n", b"\x00\x01\x02"):
        assert str(tmp_path / name) in refusal(spec, write(tmp_path / name, content))


@pytest.mark.parametrize("spec", ["flickr30k", "cc12m", "jsonl"])
def test_a_gzipped_file_is_read_and_a_truncated_one_is_refused(spec: str, tmp_path: Path) -> None:
    name, content = READERS_OF_TEXT[spec]
    packed = gzip.compress(content.encode())
    file = write(tmp_path / f"{name}.gz", packed)
    assert [caption.text for caption in read(spec, file)] == ["A caf\u00e9 .", "A dog ."]
    for damaged in (packed[:-6], packed[:20], b"no gzip at all", packed[:15] + b"\xff\xff\xff" + packed[18:]):
        assert str(file) in refusal(spec, write(file, damaged))


@pytest.mark.parametrize("spec", [name for name in READERS_OF_TEXT if name != "cc12m"])  # its TSV names addresses, no files
@pytest.mark.parametrize("name", OUTSIDE[:5])
def test_a_data_set_that_names_an_image_outside_its_folder_is_refused(spec: str, name: str, tmp_path: Path) -> None:
    file_name, content = READERS_OF_TEXT[spec]
    for folder in ("flickr30k-images", "images"):
        (tmp_path / folder).mkdir()
    quoted = json.dumps(name)[1:-1] if spec in ("coco", "jsonl") else name
    file = write(tmp_path / file_name, content.replace("1.jpg", quoted))
    assert "outside its folder" in refusal(spec, file)


@pytest.mark.parametrize("spec", READERS_OF_TEXT)
def test_images_are_looked_for_beside_the_file_and_text_alone_has_none(spec: str, tmp_path: Path) -> None:
    name, content = READERS_OF_TEXT[spec]
    file = write(tmp_path / name, content)
    if spec != "jsonl":
        assert [caption.image for caption in read(spec, file)] == [None, None]
    folder = {"flickr30k": "flickr30k-images/1.jpg", "jsonl": "1.jpg"}.get(spec, "images/1.jpg")
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    expected = None if spec == "cc12m" else str(tmp_path / folder)
    assert [caption.image for caption in read(spec, file)] == [expected, expected]


def test_half_a_character_in_json_never_reaches_a_file_of_ours(tmp_path: Path) -> None:
    damaged = {spec: content.replace("A dog", "A \\ud800 dog") for spec, (_, content) in READERS_OF_TEXT.items()}
    assert "not Unicode" in refusal("jsonl", write(tmp_path / "metadata.jsonl", damaged["jsonl"]))
    for caption in read("coco", write(tmp_path / "captions_train2017.json", damaged["coco"])):
        assert caption.text.encode()  # this parser puts another letter in its place


# --- Flickr30K -------------------------------------------------------------------------------------------------------


def test_the_mirrors_csv_is_read_with_its_one_broken_row(tmp_path: Path) -> None:
    content = (
        "image_name| comment_number| comment\n1.jpg| 0| A man , a | and a dog .\n1.jpg| 1| Two dogs .\n2.jpg| 4   A dog runs .\n"
    )
    file = write(tmp_path / "results.csv", content)
    assert pairs(read("flickr30k", file)) == [
        ("1.jpg#0", "A man , a | and a dog ."),
        ("1.jpg#1", "Two dogs ."),
        ("2.jpg#4", "A dog runs ."),
    ]


def test_karpathys_json_is_read_with_its_splits(tmp_path: Path) -> None:
    images = [
        {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A dog."}, {"raw": " "}, {"raw": "A cat. "}]},
        {"filename": "2.jpg", "split": "restval", "sentences": [{"raw": "A bus."}]},
        {"filename": "3.jpg", "split": "test", "sentences": [{"raw": "A car."}]},
        {"filename": "4.jpg", "sentences": [{"raw": "A bed."}]},
    ]
    captions = read("flickr30k", write(tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"}).parent)
    assert pairs(captions) == [
        ("1.jpg#0", "A dog."), ("1.jpg#2", "A cat."), ("2.jpg#0", "A bus."), ("3.jpg#0", "A car."), ("4.jpg#0", "A bed."),
    ]  # fmt: skip
    assert [caption.split for caption in captions] == ["train", "train", "train", "test", None]


@pytest.mark.parametrize(
    "images", [[{"filename": "1.jpg"}], [{"sentences": []}], [3], [{"filename": "1.jpg", "sentences": [{"raw": None}]}], [], "x"]
)
def test_a_json_of_another_form_is_refused(images: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "dataset_flickr30k.json", {"images": images})
    assert str(file) in refusal("flickr30k", file)


@pytest.mark.parametrize("split", [["train"], {"a": 1}, 3, True])
def test_a_split_that_is_no_text_breaks_nothing(split: Any, tmp_path: Path) -> None:
    row = {"filename": "1.jpg", "split": split, "sentences": [{"raw": "A dog."}]}
    (caption,) = read("flickr30k", write(tmp_path / "dataset_flickr30k.json", {"images": [row]}))
    assert caption.split == str(split)


def test_a_truncated_json_is_refused_after_what_was_whole(tmp_path: Path) -> None:
    whole = json.dumps({"images": [{"filename": f"{n}.jpg", "sentences": [{"raw": "A dog."}]} for n in range(9)]})
    file = write(tmp_path / "dataset_flickr30k.json", whole[: len(whole) // 2])
    assert "no complete JSON file" in refusal("flickr30k", file)


def test_a_few_broken_lines_are_skipped_and_many_are_refused(tmp_path: Path) -> None:
    good = [f"{number}.jpg#0\tA dog ." for number in range(300)]
    file = tmp_path / "a.token"
    write(file, "\n".join([*good, "2.jpg#", "", "no tab", "3.jpg#0\t"]))
    assert len(read("flickr30k", file)) == 300
    write(file, "\n".join([*good, *(20 * ["no tab"])]))
    assert "rows that are not" in refusal("flickr30k", file)


def parquet(path: Path, rows: list[dict[str, Any]], metadata: dict[str, str] | None = None) -> Path:
    """A parquet file of `rows`."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return path


FLICKR_ROWS = [
    {
        "image": {"bytes": JPEG + b"1", "path": "1.jpg"},
        "filename": "1.jpg",
        "caption": ["A dog.", "", "A cat."],
        "split": "train",
    },
    {"image": {"bytes": JPEG + b"2", "path": "2.jpg"}, "filename": "2.jpg", "caption": ["A bus."], "split": "val"},
]


def test_parquet_gives_images_only_for_the_wanted_keys(tmp_path: Path) -> None:
    shard = parquet(tmp_path / "data" / "test-00000-of-00001.parquet", FLICKR_ROWS)
    taken = tmp_path / "taken"
    captions = read("flickr30k", tmp_path / "data", taken)
    assert pairs(captions) == [("1.jpg#0", "A dog."), ("1.jpg#2", "A cat."), ("2.jpg#0", "A bus.")]
    assert [caption.split for caption in captions] == ["train", "train", "val"]
    assert captions[0].image == str(taken / "images" / "1.jpg") and not taken.exists()
    assert read("flickr30k", shard, taken, ["1.jpg#2"]) == captions
    assert {path.name: path.read_bytes() for path in taken.rglob("*.jpg")} == {"1.jpg": JPEG + b"1"}


def test_parquet_with_captions_as_text_of_a_list_and_without_names(tmp_path: Path) -> None:
    rows = [
        {"raw": "['A dog.', 'A [cat].']", "img_id": 12},
        {"raw": "[A bus] is here", "img_id": 13},
        {"raw": 99_999 * "[", "img_id": 14},
    ]
    captions = read("flickr30k", parquet(tmp_path / "train.parquet", rows))
    assert pairs(captions)[:3] == [("12.jpg#0", "A dog."), ("12.jpg#1", "A [cat]."), ("13.jpg#1", "[A bus] is here")]
    assert {(caption.image, caption.split) for caption in captions} == {(None, None)}  # the only shard's name tells no split
    unnamed = read(
        "flickr30k", parquet(tmp_path / "b" / "x.parquet", [{"caption": "A dog."}, {"caption": None}, {"caption": "A cat."}])
    )
    assert pairs(unnamed) == [("x-000000.jpg#0", "A dog."), ("x-000002.jpg#0", "A cat.")]


def test_parquet_with_a_row_for_each_caption_keeps_the_captions_of_an_image_apart(tmp_path: Path) -> None:
    rows = [{"caption": text, "filename": name} for name, text in (("1.jpg", "A dog."), ("2.jpg", "A bus."), ("1.jpg", "A cat."))]
    captions = read("flickr30k", parquet(tmp_path / "x.parquet", rows))
    assert len({caption.key for caption in captions}) == 3
    assert [caption.image_key for caption in captions] == ["1.jpg", "2.jpg", "1.jpg"]


def test_a_data_set_that_datasets_saved_to_disk_is_read(tmp_path: Path) -> None:
    import pyarrow

    for split, rows in (("train", FLICKR_ROWS[:1]), ("test", FLICKR_ROWS[1:])):
        path = tmp_path / "saved" / split / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True)
        table = pyarrow.Table.from_pylist([{key: value for key, value in row.items() if key != "split"} for row in rows])
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    taken = tmp_path / "taken"
    captions = read("flickr30k", tmp_path / "saved", taken, ["2.jpg#0"])
    assert [(caption.key, caption.split) for caption in captions] == [
        ("2.jpg#0", "test"),
        ("1.jpg#0", "train"),
        ("1.jpg#2", "train"),
    ]
    assert [file.name for file in taken.rglob("*.jpg")] == ["2.jpg"]
    whole = path.read_bytes()
    for damaged in (b"", b"not arrow" * 99, whole[: len(whole) // 2]):
        assert str(path) in refusal("flickr30k", write(path, damaged))


def test_a_parquet_row_that_unfolds_to_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_erase.captions.arrow.MAX_ROW", 1_000_000)
    shard = parquet(tmp_path / "bomb.parquet", [{"caption": ["x" * 1_000_009], "filename": "1.jpg"}])
    assert shard.stat().st_size < 100_000
    assert "rows of more than" in refusal("flickr30k", shard)


def test_damaged_unsafe_or_other_parquet_is_refused(tmp_path: Path) -> None:
    shard = parquet(tmp_path / "train.parquet", FLICKR_ROWS)
    whole = shard.read_bytes()
    for damaged in (b"", whole[:-20], whole[: len(whole) // 2], b"PAR1" + bytes(100) + b"PAR1"):
        assert str(shard) in refusal("flickr30k", write(shard, damaged))
    broken = bytearray(whole)
    broken[10:80] = bytes(70)  # the pages, not the footer
    assert str(shard) in refusal("flickr30k", write(shard, bytes(broken)), wanted=["1.jpg#0"])
    assert "no caption column" in refusal("flickr30k", parquet(shard, [{"label": 3}]))
    evil = parquet(shard, [{**FLICKR_ROWS[0], "filename": "../../evil.jpg"}])
    assert "outside its folder" in refusal("flickr30k", evil, tmp_path / "taken", ["../../evil.jpg#0"])
    assert not (tmp_path / "evil.jpg").exists()


# --- Flickr8k --------------------------------------------------------------------------------------------------------


def test_commas_and_quotation_marks_belong_to_the_caption(tmp_path: Path) -> None:
    content = 'image,caption\n1.jpg,"A man, a ""dog"" ."\n1.jpg,A man , a dog .\n\n2.jpg,\n2.jpg,"On two\nlines ."\n'
    assert pairs(read("flickr8k", write(tmp_path / "captions.txt", content).parent)) == [
        ("1.jpg#0", 'A man, a "dog" .'),
        ("1.jpg#1", "A man , a dog ."),
        ("2.jpg#1", "On two lines ."),
    ]


def test_the_token_file_is_read_too(tmp_path: Path) -> None:
    assert pairs(read("flickr8k", write(tmp_path / "Flickr8k.token.txt", "1.jpg#0\tA dog .\n").parent)) == [
        ("1.jpg#0", "A dog .")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1.jpg,A dog .\n", "no caption column (its first row names '1.jpg', 'A dog .')"),
        ("image,caption\n1.jpg\n", "line 2: no caption"),
        ("image,caption\n", "holds no caption"),
        ('image,caption\n1.jpg,"A dog .\n' + 50 * "2.jpg,A cat .\n" + '3.jpg,"A bus, red"\n', "line 2: a quotation mark"),
        ('image,caption\n1.jpg,"A dog .\n' + 50 * "2.jpg,A cat .\n", "line 2: a quotation mark"),
        ("image,caption\n1.jpg," + 200_000 * "x", "no CSV"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(content: str, message: str, tmp_path: Path) -> None:
    assert message in refusal("flickr8k", write(tmp_path / "captions.csv", content))


# --- COCO ------------------------------------------------------------------------------------------------------------


def coco(path: Path, images: Any, annotations: Any) -> Path:
    return write(path, {"info": {}, "images": images, "annotations": annotations})


def test_cocos_folders_lie_beside_the_annotations_or_one_up(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "1.jpg"}]
    annotations = [{"id": 7, "image_id": 1, "caption": "A dog."}, {"id": 8, "image_id": 1, "caption": " \n"}]
    file = coco(tmp_path / "annotations" / "captions_val2017.json", images, annotations)
    (tmp_path / "val2017").mkdir()
    expected = [Caption("1.jpg#7", str(tmp_path / "val2017" / "1.jpg"), "A dog.", None)]
    assert read("coco", file) == read("coco", tmp_path) == expected
    text_only = coco(tmp_path / "captions_val2017_text_only.json", images, annotations)
    assert [caption.image for caption in read("coco", text_only)] == [None]


GOOD_IMAGE = {"id": 1, "file_name": "1.jpg"}
GOOD_ANNOTATION = {"id": 7, "image_id": 1, "caption": "A dog."}


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ([{"id": 1}], [], "no COCO file"),
        ([3], [], "no COCO file"),
        ([{"id": 1, "file_name": 5}], [GOOD_ANNOTATION], "no COCO file"),
        ([{"id": [1], "file_name": "1.jpg"}], [], "no COCO file"),
        ([GOOD_IMAGE], [{"id": 7, "image_id": 1, "bbox": []}], "holds no captions"),  # instances_train2017.json
        ([GOOD_IMAGE], [{"id": 7, "image_id": 1, "caption": 5}], "holds no captions"),
        ([GOOD_IMAGE], [{"id": 7, "image_id": {}, "caption": "x"}], "holds no captions"),
        ([GOOD_IMAGE], [{**GOOD_ANNOTATION, "image_id": 2}], "does not list"),
        ([GOOD_IMAGE], [], "holds no caption"),
        ([], [], "holds no caption"),
    ],
)
def test_a_json_that_is_no_coco_file_is_refused(images: Any, annotations: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert message in refusal("coco", coco(tmp_path / "captions_train2017.json", images, annotations))


def test_a_truncated_coco_file_is_refused(tmp_path: Path) -> None:
    file = coco(tmp_path / "captions_train2017.json", [GOOD_IMAGE], 20 * [GOOD_ANNOTATION])
    assert "no complete JSON file" in refusal("coco", write(file, file.read_bytes()[:-40]))


# --- Conceptual Captions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["A dog\thttp://x/1.jpg", "https://x/1.jpg\tA dog", "A dog\thttp://x/1.jpg\t0.9", "//x/1.jpg\tA dog"]
)
def test_both_column_orders_are_told_apart(line: str, tmp_path: Path) -> None:
    file = write(tmp_path / "cc.tsv", f"{line}\n{line}\n")
    assert read("cc12m", file) == [Caption("000000001#0", None, "A dog", None), Caption("000000002#0", None, "A dog", None)]


def test_a_header_is_no_caption_and_many_bad_rows_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "cc.tsv", "caption\turl\nA dog\thttp://x/1.jpg\n")
    assert pairs(read("cc12m", file)) == [("000000002#0", "A dog")]
    assert "no caption column" in refusal("cc12m", write(file, 20 * "A dog, http://x/1.jpg\n"))
    many = 30 * "A dog\thttp://x/1.jpg\n" + 20 * "A dog, http://x/1.jpg\n"
    assert "are not `caption<TAB>url`" in refusal("cc12m", write(file, many))


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


SHARD = {
    "000.jpg": JPEG, "000.txt": b"A dog", "000.json": b'{"caption": "not this"}', "001.jpg": JPEG, "001.json": b'{"caption": "A cat"}',
    "002.jpg": JPEG, "002.txt": b" ", "003.JPG": JPEG, "003.txt": b"A caf\xe9", "004.json": b"{", "005.json": 9999 * b"[",
}  # fmt: skip


def test_shards_give_images_only_for_the_wanted_keys(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    (tmp_path / "cc").mkdir()
    tar(tmp_path / "cc" / "00000.tar", SHARD)
    taken = tmp_path / "taken"
    captions = read("cc12m", tmp_path / "cc", taken)
    expected = [("00000/000.jpg#0", "A dog"), ("00000/001.jpg#0", "A cat"), ("00000/003.jpg#0", "A caf\ufffd")]
    assert pairs(captions) == expected
    assert not taken.exists()
    assert read("cc12m", tmp_path / "cc" / "00000.tar", taken, ["00000/001.jpg#0"]) == captions
    assert [path.relative_to(taken).as_posix() for path in taken.rglob("*.jpg")] == ["images/00000/001.jpg"]


def test_damaged_or_unsafe_shards_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shard = tar(tmp_path / "00000.tar", {**SHARD, "big.jpg": bytes(30_000), "big.txt": b"A bus"})
    whole = shard.read_bytes()
    for damaged in (b"", b"not a tar archive" * 99, whole[:20_000], whole[:700]):
        assert str(shard) in refusal("cc12m", write(shard, damaged))
    twice = io.BytesIO()
    with tarfile.open(fileobj=twice, mode="w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("000.txt"), io.BytesIO())
    assert str(shard) in refusal("cc12m", write(shard, twice.getvalue()))
    for name in ("../../evil", "a/../../../evil"):
        evil = tar(shard, {f"{name}.jpg": JPEG, f"{name}.txt": b"A dog"})
        assert "outside its folder" in refusal("cc12m", evil, tmp_path / "taken", [f"00000/{name}.jpg#0"])
    assert list(tmp_path.rglob("evil*")) == []


def test_a_shard_that_unfolds_to_gigabytes_or_names_other_places_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shard, taken = tmp_path / "00000.tar", tmp_path / "taken"
    for size, name in ((MAX_ROW + 1, "1.jpg"), (MAX_TEXT + 1, "1.txt")):
        member = tarfile.TarInfo(name)
        member.size = size
        write(shard, member.tobuf())  # a header alone: nothing of that size is ever read
        assert f"a file of {size:,} bytes" in refusal("cc12m", shard)
    packed = gzip.compress(tar(shard, SHARD).read_bytes())
    assert "no complete tar archive" in refusal("cc12m", write(shard, packed))
    for name in ("/evil", "/elsewhere/evil"):  # an absolute path lands in the run's folder or nowhere
        absolute = tar(shard, {f"{name}.jpg": JPEG, f"{name}.txt": b"A dog"})
        captions = read("cc12m", absolute, taken, [f"00000/{name}.jpg#0"])
        assert all(Path(caption.image or "").is_relative_to(taken) for caption in captions)
    link = tarfile.TarInfo("2.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(shard, "w") as archive:
        archive.addfile(link)
        text = tarfile.TarInfo("2.txt")
        text.size = 5
        archive.addfile(text, io.BytesIO(b"A dog"))
    assert [caption.image for caption in read("cc12m", shard, taken, ["00000/2.jpg#0"])] == [None]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    assert "'sd-erase[webdataset]'" in refusal("cc12m", tar(tmp_path / "0.tar", SHARD))


# --- CIFAR-100 -------------------------------------------------------------------------------------------------------


def cifar(root: Path, labels: list[int], names: list[str], protocol: int = 2) -> Path:
    """CIFAR-100's folder with one training file, as python 2 wrote it (protocol 2, keys of bytes)."""
    import numpy

    pixels = numpy.arange(len(labels) * 3072, dtype="uint8").reshape(len(labels), 3072)
    write(root / "meta", pickle.dumps({b"fine_label_names": [name.encode() for name in names]}, protocol))
    write(root / "train", pickle.dumps({b"fine_labels": labels, b"data": pixels}, protocol))
    return root


@pytest.mark.parametrize("protocol", [2, 4])
def test_class_names_become_captions_and_images_are_written_when_wanted(protocol: int, tmp_path: Path) -> None:
    from PIL import Image

    root = cifar(tmp_path / "cifar-100-python", [1, 0], ["apple", "aquarium_fish"], protocol)
    taken = tmp_path / "taken"
    captions = read("cifar100", tmp_path, taken)
    assert captions == read("cifar100", root, taken) == read("cifar100", root / "train", taken)
    assert pairs(captions) == [
        ("train-00000.png#0", "a photo of a aquarium fish"),
        ("train-00001.png#0", "a blurry photo of a apple"),
    ]
    assert {caption.split for caption in captions} == {"train"} and not taken.exists()
    read("cifar100", root, taken, ["train-00001.png#0"])
    (image,) = taken.rglob("*.png")
    with Image.open(image) as picture:  # stored as three planes of 32 rows
        assert picture.size == (32, 32)
        assert picture.getpixel((1, 0)) == tuple((3072 + plane * 1024 + 1) % 256 for plane in range(3))


class _Evil:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_before_it_does(protocol: int, tmp_path: Path) -> None:
    root = cifar(tmp_path / "c", [0], ["apple"])
    marker = tmp_path / "ran"
    for function, argument in ((Path.touch, marker), (eval, f"open({str(marker)!r}, 'w')"), (__import__, "os")):
        evil = pickle.dumps({b"fine_label_names": _Evil(function, argument)}, protocol)
        write(root / "meta", evil)
        assert "it asks for" in refusal("cifar100", root)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02}r\xff\xff\xff\x0f.", "numbers values"),  # room for 2**28 remembered values: 2 GB
        (b"\x80\x02)q\x00" + b"".join(b"h%c0h%c\x86q%c" % (n, n, n + 1) for n in range(60)) + b".", "repeats a tuple"),
        (b"\x80\x04)\x94" + b"".join(b"h%c0h%ch%c\x86\x94" % (n, n, n) for n in range(60)) + b".", "uses|repeats a tuple"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "uses BYTEARRAY8|no CIFAR-100 file"),
    ],
)
def test_a_pickle_that_costs_memory_or_time_beyond_its_size_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    root = cifar(tmp_path / "c", [0], ["apple"])
    write(root / "meta", content)
    assert re.search(message, refusal("cifar100", root))


def test_a_pickle_cannot_choose_a_codec(tmp_path: Path) -> None:
    root = cifar(tmp_path / "c", [0], ["apple"])
    write(root / "meta", pickle.dumps({b"fine_label_names": [_Evil(codecs.encode, "apple", "rot13")]}, 2))
    assert [caption.text for caption in read("cifar100", root)] == ["a photo of a apple"]


def test_damaged_cifar_files_are_refused(tmp_path: Path) -> None:
    root = cifar(tmp_path / "c", [0, 0], ["apple"])
    whole = (root / "train").read_bytes()
    for damaged in (
        b"",
        whole[:500],
        b"no pickle",
        pickle.dumps([1]),
        pickle.dumps({b"fine_labels": [0], b"data": [1]}),
        pickle.dumps({}),
    ):
        write(root / "train", damaged)
        assert str(root / "train") in refusal("cifar100", root)
    for labels in ([5, 0], [None, 0], [0]):
        import numpy

        values = {b"fine_labels": labels, b"data": numpy.zeros((2, 3072), dtype="uint8")}
        write(root / "train", pickle.dumps(values, 2))
        assert str(root / "train") in refusal("cifar100", root)
    write(root / "train", whole)
    for names in (b"", pickle.dumps({}), pickle.dumps({b"fine_label_names": 5}), pickle.dumps({b"fine_label_names": [b"\xff"]})):
        write(root / "meta", names)
        assert str(root / "meta") in refusal("cifar100", root)
    (root / "meta").unlink()
    assert "holds no CIFAR-100 file meta" in refusal("cifar100", root)
    (tmp_path / "only").mkdir()
    write(tmp_path / "only" / "meta", pickle.dumps({b"fine_label_names": [b"apple"]}))
    assert "holds no caption" in refusal("cifar100", tmp_path / "only")


HUB = {"huggingface": json.dumps({"info": {"features": {"fine_label": {"names": ["apple", "aquarium_fish"]}}}})}


def test_cifars_parquet_is_read_and_bad_classes_are_refused(tmp_path: Path) -> None:
    rows = [{"img": {"bytes": b"png", "path": None}, "fine_label": 1}, {"img": None, "fine_label": 0}]
    shard = parquet(tmp_path / "train-0.parquet", rows, HUB)
    taken = tmp_path / "taken"
    captions = read("cifar100", shard, taken, ["train-0-00000.png#0", "train-0-00001.png#0"])
    assert pairs(captions) == [
        ("train-0-00000.png#0", "a photo of a aquarium fish"),
        ("train-0-00001.png#0", "a blurry photo of a apple"),
    ]
    assert [path.read_bytes() for path in taken.rglob("*.png")] == [b"png"]  # an image that the file lacks is not invented
    for number in (-1, 2, None):
        assert "is none of its 2" in refusal("cifar100", parquet(shard, [{"fine_label": 0}, {"fine_label": number}], HUB))
    assert "does not name its classes" in refusal("cifar100", parquet(shard, rows))
    assert "no column fine_label" in refusal("cifar100", parquet(shard, [{"label": 1}]))


# --- a folder of images ----------------------------------------------------------------------------------------------


def test_sidecars_are_found_below_and_images_without_one_are_skipped(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "sub/lonely.jpg", "d.jpg", "note.gif"):
        write(tmp_path / name, JPEG)
    write(tmp_path / "b.txt", "A dog.\n\n  A cat. \n")
    write(tmp_path / "a.txt", "A caf\u00e9.")
    write(tmp_path / "sub" / "c.webp.txt", "A bus.")
    write(tmp_path / "d.txt", "\n")
    captions = read("folder", tmp_path)
    assert pairs(captions) == [
        ("a.PNG#0", "A caf\u00e9."),
        ("b.jpg#0", "A dog."),
        ("b.jpg#2", "A cat."),
        ("sub/c.webp#0", "A bus."),
    ]
    assert captions[3].image == str(tmp_path / "sub" / "c.webp")


def test_a_bad_folder_is_refused(tmp_path: Path) -> None:
    assert "is of no form that is read (its first line is 'A dog.')" in refusal("folder", write(tmp_path / "a.txt", "A dog."))
    (tmp_path / "empty").mkdir()
    assert "holds no caption" in refusal("folder", tmp_path / "empty")
    write(tmp_path / "a.jpg", JPEG)
    write(tmp_path / "a.txt", b"caf\xe9")
    assert str(tmp_path / "a.txt") in refusal("folder", tmp_path)


def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    name = b"caf\xe9"  # Linux allows any bytes
    try:
        (tmp_path / (name + b".jpg").decode("utf-8", "surrogateescape")).write_bytes(JPEG)
        (tmp_path / (name + b".txt").decode("utf-8", "surrogateescape")).write_text("A dog.", encoding="utf-8")
    except OSError:
        pytest.skip("this file system allows only Unicode names")
    assert "not Unicode" in refusal("folder", tmp_path)


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def test_json_lines_with_every_spelling_of_their_keys(tmp_path: Path) -> None:
    rows = [
        {"image": "a/1.jpg", "caption": "A dog.", "split": "train"},
        {"file_name": "./a/1.jpg", "captions": ["A cat.", " ", "A bus."]},
        {"key": "mine", "text": "A car."},
        {"prompt": "A bed."},
    ]
    captions = read("jsonl", write(tmp_path / "m.jsonl", "\n\n".join(json.dumps(row) for row in rows)))
    assert pairs(captions) == [
        ("a/1.jpg#1", "A dog."), ("a/1.jpg#3.0", "A cat."), ("a/1.jpg#3.2", "A bus."), ("mine#5", "A car."), ("000000007#7", "A bed."),
    ]  # fmt: skip
    assert [caption.split for caption in captions] == ["train", None, None, None, None]
    assert {caption.image_key for caption in captions[:3]} == {"a/1.jpg"}  # one image, however its path is spelt


def test_lines_about_one_image_share_it_whatever_their_keys(tmp_path: Path) -> None:
    rows = [{"key": str(number), "image": "1.jpg", "caption": f"Dog {number}."} for number in range(2)]
    captions = read("jsonl", write(tmp_path / "m.jsonl", "\n".join(json.dumps(row) for row in rows)))
    assert {caption.image_key for caption in captions} == {"1.jpg"}
    assert len({caption.key for caption in captions}) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"caption": "A dog."', "line 2: no JSON"),
        ('"A dog."', "line 2: no caption"),
        ('{"caption": 5}', "must be text"),
        ('{"caption": ["A dog.", 5]}', "must be text"),
        ('{"caption": "A dog.", "image": 5}', "must be a path"),
        (99_999 * "[", "line 2"),
        (9_999 * "1", "line 2"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line: str, message: str, tmp_path: Path) -> None:
    assert message in refusal("jsonl", write(tmp_path / "m.jsonl", '{"caption": "A cat."}\n' + line))


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("spec", "place", "count", "images"),
    [
        ("flickr30k", "flickr30k", 150_260, False),
        ("flickr8k", "flickr8k", 4_000, True),
        ("coco", "coco/captions_train2017.json", 400, True),
        ("coco", "coco/captions_val2017_text_only.json", 24_000, False),
        ("cc12m", "cc3m", 15_800, False),
    ],
)
def test_real_files_are_read_whole(spec: str, place: str, count: int, images: bool, tmp_path: Path) -> None:
    path = REAL / place
    if not path.exists():
        pytest.skip(f"no real data at {path}")
    captions = read(spec, path, tmp_path)
    assert len(captions) >= count
    assert len({caption.key for caption in captions}) == len(captions)
    assert all(caption.text and (caption.image is not None) == images for caption in captions)
    if images:
        assert all(Path(caption.image or "").is_file() for caption in captions[::50])


def test_every_reader_of_the_catalog_is_tested_here() -> None:
    tested = {
        *READERS_OF_TEXT,
        "cifar100",
        "folder",
        "pocket",
        "pocket-art",
        "synthetic",
    }  # the last three have tests of their own
    assert set(catalog.READERS) == tested
