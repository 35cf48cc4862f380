"""Caption files of every form: told by what they hold, whatever reader is named, and nothing of them lost in silence."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sd_erase import bases, catalog
from sd_erase.captions import Caption, Tally, digest, open_dataset
from sd_erase.captions.caption import MAX_CAPTION, Keys
from sd_erase.captions.files import MAX_TEXT
from sd_erase.errors import UserError

JPEG = b"\xff\xd8\xff\xe0 not really a picture"
FILE_READERS = ("flickr30k", "flickr8k", "coco", "cc12m", "folder", "jsonl")


def write(path: Path, content: str | bytes | Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(spec: str, path: Path, folder: Path | None = None, wanted: Sequence[str] | None = None) -> tuple[list[Caption], Tally]:
    tally = Tally()
    captions = open_dataset(
        f"{spec}:{path}",
        bases.ROWS["sd15"],
        folder or path.parent / "taken",
        None if wanted is None else set(wanted),
        tally=tally,
    )
    return list(captions), tally


def refusal(spec: str, path: Path) -> str:
    with pytest.raises(UserError) as error:
        read(spec, path)
    assert "\n" not in str(error.value)
    return str(error.value)


def pairs(captions: Sequence[Caption]) -> list[tuple[str, str]]:
    return [(caption.key, caption.text) for caption in captions]


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# --- one form, whatever reader is named ------------------------------------------------------------------------------

KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "1.jpg",
            "split": "restval",
            "sentences": [{"tokens": ["a"], "raw": "A dog."}, {"raw": "A cat."}],
        },
        {"filepath": "val2014", "filename": "2.jpg", "split": "test", "sentences": [{"raw": "A bus."}]},
    ],
    "dataset": "coco",
}
LAVIS = [
    {"image": "val2014/1.jpg", "caption": "A dog.", "image_id": "coco_1"},
    {"image": "val2014/1.jpg", "caption": ["A cat.", "A bus."], "image_id": "coco_1"},
]
KOHYA = {"/data/train/1": {"caption": "A dog.", "tags": "cat, bus"}, "/data/train/2.png": {"tags": "bed"}}
FORMS: dict[str, tuple[str, Any, list[str]]] = {
    "karpathy": ("dataset_coco.json", KARPATHY, ["A dog.", "A cat.", "A bus."]),
    "lavis": ("coco_karpathy_train.json", LAVIS, ["A dog.", "A cat.", "A bus."]),
    "kohya": ("meta_cap.json", KOHYA, ["A dog.", "cat, bus", "bed"]),
    "json lines": ("a.json", '{"text": "A dog."}\n{"text": "A cat."}\n', ["A dog.", "A cat."]),
    "tokens": ("a.token", "1.jpg#0\tA dog.\n1.jpg#r1\tA cat.\n", ["A dog.", "A cat."]),
    "pipes": ("results.csv", "image_name| comment_number| comment\n1.jpg| 0| A dog.\n", ["A dog."]),
    "caption first": ("a.tsv", "A dog.\thttp://x/1.jpg\n", ["A dog."]),
    "url first": ("a.tsv", "http://x/1.jpg\tA dog.\n", ["A dog."]),
    "header": ("a.tsv", "caption\turl\nA dog.\thttp://x/1.jpg\n", ["A dog."]),
    "header, url first": ("a.csv", "URL,extra,TEXT\nhttp://x/1.jpg,3,A dog.\n", ["A dog."]),
    "metadata": ("metadata.csv", "file_name;text\n1.jpg;A dog.\n", ["A dog."]),
}


@pytest.mark.parametrize("reader", FILE_READERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_by_the_rules_of_its_form_whatever_reader_is_named(reader: str, form: str, tmp_path: Path) -> None:
    name, content, texts = FORMS[form]
    captions, _ = read(reader, write(tmp_path / name, content))
    assert [caption.text for caption in captions] == texts
    assert len({caption.key for caption in captions}) == len(captions)


@pytest.mark.parametrize(
    ("reader", "form"),
    [("coco", "karpathy"), ("coco", "lavis"), ("jsonl", "kohya"), ("flickr8k", "header, url first"), ("cc12m", "header")],
)
def test_a_folder_with_such_a_file_is_read_too(reader: str, form: str, tmp_path: Path) -> None:
    name, content, texts = FORMS[form]
    write(tmp_path / name, content)
    assert [caption.text for caption in read(reader, tmp_path)[0]] == texts


def test_splits_and_images_of_karpathys_and_lavis_lists(tmp_path: Path) -> None:
    write(tmp_path / "images" / "val2014" / "1.jpg", JPEG)
    captions, _ = read("coco", write(tmp_path / "dataset_coco.json", KARPATHY))
    assert [caption.split for caption in captions] == ["train", "train", "test"]
    assert captions[0] == Caption("1.jpg#0", str(tmp_path / "images" / "val2014" / "1.jpg"), "A dog.", "train")
    captions, tally = read("coco", write(tmp_path / "annotations" / "coco_karpathy_train.json", LAVIS))
    assert {caption.image for caption in captions} == {str(tmp_path / "images" / "val2014" / "1.jpg")} and tally.notes == []
    assert {caption.image_key for caption in captions} == {"val2014/1.jpg"}
    flat = {"images": [{"filename": "3.jpg", "sentences": [{"raw": "A bed."}]}]}
    write(tmp_path / "flickr30k-images" / "3.jpg", JPEG)
    captions, _ = read("flickr30k", write(tmp_path / "dataset_flickr30k.json", flat))
    assert captions[0].image == str(tmp_path / "flickr30k-images" / "3.jpg")


def test_images_that_lie_nowhere_near_are_said_to_be_text_alone(tmp_path: Path) -> None:
    captions, tally = read("coco", write(tmp_path / "list.json", LAVIS))
    assert {caption.image for caption in captions} == {None}
    assert "read as text alone" in tally.sentences("x")[0] and "val2014/1.jpg" in tally.sentences("x")[0]


def test_kohyas_paths_are_found_by_their_ends(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "b/2.jpg", ".hidden/3.png", "4.png", "4.jpg"):
        write(tmp_path / name, JPEG)
    meta = {
        "/data/train/b/1": {"caption": "A dog."}, "1": {"caption": "A cat."}, "C:\\train\\2": {"caption": "A bus.", "tags": "bus, road"},
        "3": {"tags": "x"}, "4.jpg": {"caption": "A car."}, str(tmp_path / "a" / "1.png"): {"caption": "A bed."}, "5": {"train_resolution": [1]},
    }  # fmt: skip
    captions, tally = read("jsonl", write(tmp_path / "meta_cap.json", meta))
    assert [(caption.text, caption.image and os.path.relpath(caption.image, tmp_path)) for caption in captions] == [
        ("A dog.", "b/1.png"), ("A cat.", None), ("A bus.", "b/2.jpg"), ("bus, road", "b/2.jpg"), ("x", None), ("A car.", "4.jpg"),
        ("A bed.", "a/1.png"),
    ]  # fmt: skip
    assert tally.counts == {"rows without a caption": 1} and sum(tally.kept.values()) == 2


def test_a_byte_order_mark_in_json_changes_nothing(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(LAVIS).encode()
    assert len(read("coco", write(tmp_path / "list.json", content))[0]) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a\nb": 1, "\x1b[2J": 2}, "no caption file (an object with a\\nb, \\x1b[2J)"),
        ([{"a\nb": 1}], "entry 0, which has a\\nb"),
        ([{"caption\n": 1}], "caption\\n must be text"),
        ({"x\ny": {"caption": 1}}, "image x\\ny: caption must be text"),
        ({"images": [], "annotations": [{"id": "\n", "image_id": "a\nb", "caption": "x"}]}, "caption of image 'a\\nb'"),
        ({"style": {"van gogh": 1}, "object": 3}, "no caption file (an object with style, object)"),
        ([{"id": 1, "conversations": []}], "rows without a caption (1, at entry 0, which has id, conversations)"),
        ([3], "entry 0: no caption"),
        ([{"caption": 5}], "must be text or a list of texts, not int"),
        ([{"caption": "x", "image": 5}], "the image must be a path"),
        ({"a": {"caption": 5}}, "caption must be text"),
        ("[", "no complete JSON file"),
        ('{"images": [', "no complete JSON file"),
    ],
)
def test_json_that_is_no_caption_file_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    assert message in refusal("coco", write(tmp_path / "a.json", content))


def test_a_folder_of_another_data_set_names_the_reader_that_fits(tmp_path: Path) -> None:
    write(tmp_path / "captions.csv", "image,caption\n1.jpg,A dog.\n")
    assert f"--dataset flickr8k:{tmp_path}" in refusal("flickr30k", tmp_path)


def test_of_several_files_of_a_name_the_others_are_said(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, '{"text": "A dog."}\n')
    assert "is read a.jsonl, not b.jsonl" in read("jsonl", tmp_path)[1].notes[0]


# --- nothing is dropped in silence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("null", [None, float("nan")])
def test_a_null_caption_is_counted_named_and_skipped(null: Any, tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "text": f"a dog {number}"} for number in range(4)]
    rows[2]["text"] = null
    captions, tally = read("jsonl", write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows))))
    assert [caption.text for caption in captions] == ["a dog 0", "a dog 1", "a dog 3"]
    assert tally.sentences("jsonl:x") == ["Of jsonl:x were skipped: null captions (1, at line 3)."]


def test_a_null_caption_gives_way_to_another_name_for_it(tmp_path: Path) -> None:
    captions, tally = read("jsonl", write(tmp_path / "a.jsonl", '{"caption": null, "text": "a dog"}\n'))
    assert [caption.text for caption in captions] == ["a dog"] and not tally.counts


def test_rows_without_a_caption_and_nulls_in_a_list_are_counted(tmp_path: Path) -> None:
    rows = ['{"image": "1.jpg"}', '{"captions": ["a dog", null, ""]}', "", '{"text": "http://x/1.jpg"}']
    captions, tally = read("jsonl", write(tmp_path / "a.jsonl", "\n".join(rows)))
    assert pairs(captions) == [("000000002#2.0", "a dog")]
    assert tally.counts == {
        "rows without a caption": 1, "null captions": 1, "empty captions": 1, "blank lines": 1, "captions that are an address": 1,
    }  # fmt: skip
    (sentence,) = tally.sentences("x")
    assert "rows without a caption (1, at line 1, which has image)" in sentence and "blank lines" not in sentence


def test_a_file_without_one_caption_says_what_it_holds_instead(tmp_path: Path) -> None:
    assert "rows without a caption (2, the first at line 1, which has image, label)" in refusal(
        "jsonl", write(tmp_path / "a.jsonl", 2 * '{"image": "1.jpg", "label": 3}\n')
    )


def test_a_key_that_stands_twice_in_one_object_is_said(tmp_path: Path) -> None:
    captions, tally = read("jsonl", write(tmp_path / "a.jsonl", '{"text": "a dog", "text": "a bicycle"}\n'))
    assert [caption.text for caption in captions] == ["a bicycle"]
    assert "objects that name a key twice, of which the last is read (1, at line 1)" in tally.sentences("x")[0]


def test_two_names_for_captions_in_one_row_are_said(tmp_path: Path) -> None:
    captions, tally = read("jsonl", write(tmp_path / "a.jsonl", '{"text": "a", "caption": "b"}\n'))
    assert captions[0].text == "b" and "has captions in caption and text: caption is read" in tally.notes[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.token", "1.jpg#0\tA dog.\n1.jpg#0\tA cat.\n1.jpg#0\tA bus.\n"),
        (
            "results.csv",
            "image_name| comment_number| comment\n" + "".join(f"1.jpg| 0| A {what}.\n" for what in ("dog", "cat", "bus")),
        ),
        ("a.json", {"images": 3 * [{"filename": "1.jpg", "sentences": [{"raw": "A dog."}]}]}),
        (
            "captions_a.json",
            {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": 3 * [{"id": 7, "image_id": 1, "caption": "A dog."}]},
        ),
    ],
)
def test_captions_that_share_a_key_are_kept_under_keys_of_their_own(name: str, content: Any, tmp_path: Path) -> None:
    captions, tally = read("coco", write(tmp_path / name, content))
    assert len({caption.key for caption in captions}) == 3 and {caption.image_key for caption in captions} == {"1.jpg"}
    assert tally.kept == {"captions under a key that another one has": 2} and "were kept" in tally.sentences("x")[-1]


def test_a_million_captions_of_one_key_are_quick() -> None:
    keys, started = Keys(Tally()), time.perf_counter()
    assert len({keys.own("1.jpg#0") for _ in range(200_000)}) == 200_000
    assert time.perf_counter() - started < 10


def test_captions_that_are_too_long_are_counted_and_lines_of_a_megabyte_refused(tmp_path: Path) -> None:
    long = "x" * (MAX_CAPTION + 1)
    captions, tally = read(
        "jsonl", write(tmp_path / "a.jsonl", f'{{"text": "a dog"}}\n{{"text": "{long}"}}\n{{"text": "{long[1:]}"}}\n')
    )
    assert [len(caption.text) for caption in captions] == [5, MAX_CAPTION]
    assert tally.counts == {"captions of more than 10,000 characters": 1}
    started = time.perf_counter()
    for name, line in (
        ("a.jsonl", '{"text": "a dog"}\n{"text": "%s"}\n'), ("a.token", "1.jpg#0\tA dog.\n1.jpg#1\t%s\n"), ("a.tsv", "A dog.\thttp://x\n%s\thttp://x\n"),
        ("a.csv", "image,caption\n1.jpg,%s\n"), ("captions.txt", "image,caption\n1.jpg,a dog\n2.jpg,%s\n"),
    ):  # fmt: skip
        assert "line" in refusal("jsonl", write(tmp_path / name, line % ("word " * (MAX_TEXT // 5) + "x" * 10)))
    assert time.perf_counter() - started < 10


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_may_name_its_columns_in_any_order_and_say_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "1.jpg", JPEG)
    content = 'split;Caption;nr;Image\ntrain;"a dog; a cat";1;1.jpg\ntest;a "big" bus;2;2.jpg\n;a bed;3;\n'
    captions, tally = read("flickr8k", write(tmp_path / "mine.csv", content))
    assert [(caption.key, caption.text, caption.split) for caption in captions] == [
        ("1.jpg#0", "a dog; a cat", "train"), ("2.jpg#0", 'a "big" bus', "test"),
    ]  # fmt: skip
    assert captions[1].image == str(tmp_path / "2.jpg") and tally.counts == {"rows without an image's name": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a dog, a cat,1.jpg\n", "line 2: 3 cells, the header names 2"),
        ('"a dog,1.jpg\na cat,2.jpg\n', "line 2: a quotation mark is not closed"),
        ('"a dog,1.jpg\n"a cat",2.jpg\n', "line 2: a quotation mark"),
        ("a dog\n\n,2.jpg\n" + 200_000 * "x" + ",3.jpg\n", "line 5: no CSV"),
    ],
)
def test_a_row_that_is_not_as_the_header_says_is_refused_with_its_line(rows: str, message: str, tmp_path: Path) -> None:
    assert message in refusal("flickr8k", write(tmp_path / "a.csv", "caption,image\n" + rows))


def test_quotes_of_a_tab_separated_file_swallow_no_row(tmp_path: Path) -> None:
    content = 'caption\turl\n"a dog\thttp://x/1.jpg\n"a cat\thttp://x/2.jpg\n'
    assert "line 2: a quotation mark" in refusal("cc12m", write(tmp_path / "a.tsv", content))
    raw = (
        '"a dog\thttp://x/1.jpg\n"a cat\thttp://x/2.jpg\n'  # the published files have no header, and quotes mean nothing in them
    )
    assert [caption.text for caption in read("cc12m", write(tmp_path / "b.tsv", raw))[0]] == ['"a dog', '"a cat']


def test_neither_a_header_nor_an_address_becomes_a_caption(tmp_path: Path) -> None:
    rows = [f"a dog {number}\thttp://x/{number}.jpg" for number in range(300)]
    rows[5] = "http://x/5.jpg\thttp://x/5.jpg"
    rows[7] = "http://x/7.jpg\ta dog"
    captions, tally = read("cc12m", write(tmp_path / "a.tsv", "\n".join(["foo\tbar", *rows])))
    assert len(captions) == 298 and not any("http" in caption.text or caption.text == "foo" for caption in captions)
    assert tally.counts == {"lines that are not `caption<TAB>url` or `url<TAB>caption`": 2, "captions that are an address": 1}


def test_hub_folders_with_metadata_are_read_with_their_splits(tmp_path: Path) -> None:
    for split, text in (("train", "a dog"), ("test", "a cat")):
        write(tmp_path / split / "sub" / "1.png", JPEG)
        write(tmp_path / split / "sub" / "1.txt", "not this")
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows([("file_name", "text"), ("sub/1.png", f"{text},\nwhite"), ("sub/2.png", "")])
        write(tmp_path / split / "metadata.csv", stream.getvalue())
    write(tmp_path / "more" / "metadata.jsonl", '{"file_name": "3.png", "text": "a bus"}\n{"file_name": "4.png", "text": null}\n')
    write(tmp_path / "loose" / "5.png", JPEG)
    write(tmp_path / "loose" / "5.caption", "a bed")
    captions, tally = read("folder", tmp_path)
    assert [(caption.key, caption.text, caption.split) for caption in captions] == [
        ("loose/5.png#0", "a bed", None), ("more/3.png#1", "a bus", None), ("test/sub/1.png#0", "a cat, white", "test"),
        ("train/sub/1.png#0", "a dog, white", "train"),
    ]  # fmt: skip
    assert captions[2].image == str(tmp_path / "test" / "sub" / "1.png")
    assert tally.counts["caption files beside images that a metadata file describes"] == 2
    assert tally.counts["null captions"] == 1 and tally.counts["empty captions"] == 2


def test_metadata_parquet_is_read_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "1.png", JPEG)
    parquet(tmp_path / "metadata.parquet", {"file_name": ["1.png"], "text": ["a dog"]})
    captions, _ = read("folder", tmp_path)
    assert captions == [Caption("1.png#0", str(tmp_path / "1.png"), "a dog", None)]


# --- a folder of images ----------------------------------------------------------------------------------------------


def test_both_kinds_of_caption_files_are_read_in_all_folders(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.PNG", "sub/deep/c.webp", "lonely.gif", ".hidden/d.jpg", "._a.jpg"):
        write(tmp_path / name, JPEG)
    write(tmp_path / "a.txt", "a dog\n")
    write(tmp_path / "a.caption", "\na cat\n")
    write(tmp_path / "b.TXT", "a bus")
    write(tmp_path / "sub" / "deep" / "c.caption", "a bed")
    write(tmp_path / ".hidden" / "d.txt", "no")
    write(tmp_path / "._a.txt", b"\x00\x05\x16\x07\xff")
    write(tmp_path / "other.caption", "a car")
    captions, tally = read("folder", tmp_path)
    assert pairs(captions) == [("a.jpg#0", "a dog"), ("a.jpg#2", "a cat"), ("b.PNG#0", "a bus"), ("sub/deep/c.webp#0", "a bed")]
    (sentence,) = tally.sentences("folder:x")
    assert "images without a caption file (1, at ./lonely.gif)" in sentence
    assert "text files without an image of their name (1, at ./other.caption)" in sentence
    assert tally.counts["hidden folders"] == 1 and tally.counts["hidden files"] == 2


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "1.jpg", JPEG)
    write(tmp_path / "elsewhere" / "1.txt", "a dog")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    captions, tally = read("folder", root)
    assert pairs(captions) == [("a/1.jpg#0", "a dog")] and tally.counts["folders that are links to another one"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.jpg", JPEG)
    (tmp_path / "a").chmod(0)
    assert "cannot be read" in refusal("folder", tmp_path)


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", FILE_READERS)
def test_laions_and_img2datasets_parquet_are_read(reader: str, tmp_path: Path) -> None:
    laion = parquet(
        tmp_path / "laion.parquet", {"URL": ["http://x/1.jpg", "http://x/2.jpg"], "TEXT": ["a dog", None], "WIDTH": [1, 2]}
    )
    captions, tally = read(reader, laion)
    assert pairs(captions) == [("laion-000000.jpg#0", "a dog")] and tally.counts == {"null captions": 1}
    img2dataset = parquet(
        tmp_path / "b.parquet", {"url": ["http://x/1.jpg"], "caption": ["a cat"], "key": ["000000000"], "sha256": [b"x"]}
    )
    assert [caption.text for caption in read(reader, img2dataset)[0]] == ["a cat"]


def test_shards_are_read_once_and_not_again_from_the_parquet_beside_them(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    tar(
        tmp_path / "00000.tar",
        {"000.jpg": JPEG, "000.txt": b"a dog", "000.json": b"{}", "001.jpg": JPEG, "001.json": b'{"caption": null}'},
    )
    parquet(tmp_path / "00000.parquet", {"url": ["http://x"], "caption": ["a dog"], "key": ["000"]})
    captions, tally = read("cc12m", tmp_path)
    assert pairs(captions) == [("00000/000.jpg#0", "a dog")] and tally.counts == {"samples without a caption": 1}
    (tmp_path / "00000.tar").unlink()
    assert [caption.text for caption in read("cc12m", tmp_path)[0]] == ["a dog"]


def test_a_shard_that_ends_without_its_mark_is_said_and_one_that_ends_amid_a_file_refused(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shard = tar(tmp_path / "0.tar", {f"{number}.txt": b"a dog" for number in range(3)})
    whole = shard.read_bytes()
    assert read("cc12m", shard)[1].notes == []
    captions, tally = read("cc12m", write(shard, whole[: 2 * 1024]))
    assert len(captions) == 2 and "may be cut short" in tally.notes[0]
    assert "no complete tar archive" in refusal("cc12m", write(shard, whole[: 2 * 1024 - 300]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1], "path": ["1.jpg"]}, "no caption column (it has label, path)"),
        ({"caption": [1], "path": ["1.jpg"]}, "no caption column (its caption is int64; it has caption, path)"),
        ({"text": [b"a dog"]}, "its text is binary"),
        ({"caption": [[1]]}, "its caption is list"),
    ],
)
def test_parquet_without_captions_lists_its_columns(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal("flickr30k", parquet(tmp_path / "a.parquet", columns))


def test_offsets_of_a_damaged_arrow_file_are_not_followed(tmp_path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"caption": ["a dog", "a cat", "a bus"]})
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    whole = bytearray(stream.getvalue())
    offsets = bytes.fromhex("00000000050000000a0000000f000000")
    place = whole.index(offsets)
    whole[place + 4 : place + 8] = (1 << 30).to_bytes(4, "little")
    assert "no complete arrow file" in refusal("flickr30k", write(tmp_path / "a.arrow", bytes(whole)))


def test_parquet_with_paths_of_images_finds_them(tmp_path: Path) -> None:
    write(tmp_path / "images" / "1.jpg", JPEG)
    rows = {"image": ["1.jpg", "1.jpg", None], "caption": ["a dog", "a cat", "a bus"]}
    captions, _ = read("flickr30k", parquet(tmp_path / "a.parquet", rows))
    assert [caption.image for caption in captions] == 2 * [str(tmp_path / "images" / "1.jpg")] + [None]
    assert [caption.image_key for caption in captions] == ["1.jpg", "1.jpg", "a-000002.jpg"]


def test_a_list_as_text_is_one_only_where_it_holds_texts(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"caption": ["['a dog', 'a cat']", "[1, 2]", "[a bus]"]})
    assert [caption.text for caption in read("flickr30k", file)[0]] == ["a dog", "a cat", "[1, 2]", "[a bus]"]


# --- what there is not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [name for name in catalog.READERS if name not in ("synthetic", "pocket", "pocket-art")])
def test_a_mistyped_or_impossible_path_is_one_sentence(reader: str, tmp_path: Path) -> None:
    write(tmp_path / "cats" / "1.jpg", JPEG)
    assert f"does not exist (did you mean {tmp_path}/cats?)" in refusal(reader, tmp_path / "catz")
    os.mkfifo(tmp_path / "pipe")
    assert "is no file and no folder" in refusal(reader, tmp_path / "pipe")
    for path in ("x" * 5000, "a\0b"):
        assert "does not exist" in refusal(reader, Path(path))


def test_a_path_without_a_reader_is_told_the_readers(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "{}")
    with pytest.raises(UserError, match="names no reader: pass --dataset READER:.* with one of flickr30k"):
        open_dataset(str(tmp_path / "a.jsonl"), bases.ROWS["sd15"], tmp_path)


# --- what the pairs depend on ----------------------------------------------------------------------------------------


def test_an_edit_below_a_folder_changes_what_the_pairs_depend_on_and_a_copy_does_not(tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "set"
    for name in ("a.jpg", "sub/b.jpg", "sub/notes.md"):
        write(root / name, JPEG)
    write(root / "a.txt", "a dog")
    write(root / "sub" / "b.caption", "a cat")
    first = digest(f"folder:{root}")
    assert [name for name, _ in first] == ["a.txt", "a.jpg", "sub/b.caption", "sub/b.jpg"]
    stamp = (root / "sub" / "b.caption").stat()
    write(root / "sub" / "b.caption", "a cow")
    os.utime(root / "sub" / "b.caption", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the same size and time
    assert digest(f"folder:{root}") != first
    write(root / "sub" / "b.caption", "a cat")
    write(root / "sub" / "notes.md", "other notes")
    assert digest(f"folder:{root}") == first
    shutil.copytree(root, tmp_path / "copy")
    assert digest(f"folder:{tmp_path / 'copy'}") == first
    (root / "sub" / "b.jpg").rename(root / "sub" / "b.png")
    assert digest(f"folder:{root}") != first


@pytest.mark.parametrize("form", FORMS)
def test_the_content_of_the_file_that_is_read_counts(form: str, tmp_path: Path) -> None:
    name, content, _ = FORMS[form]
    file = write(tmp_path / name, content)
    first = digest(f"jsonl:{file}")
    os.utime(file, ns=(1, 1))
    assert digest(f"jsonl:{file}") == first and first[0][0] == name
    write(file, file.read_text(encoding="utf-8").replace("dog", "cow"))
    assert digest(f"jsonl:{file}") != first


def test_of_a_huge_archive_samples_and_its_time_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_erase.captions.WHOLE", 1000)
    file = write(tmp_path / "a.jsonl", bytes(200_000))
    first = digest(f"jsonl:{file}")
    assert digest(f"jsonl:{file}") == first
    write(file, bytes(199_999) + b"x")
    assert digest(f"jsonl:{file}") != first
    os.utime(write(file, bytes(200_000)), ns=(1, 1))
    assert digest(f"jsonl:{file}") != first


def test_what_is_made_has_no_files() -> None:
    assert digest("synthetic") == digest("pocket") == digest("pocket:/nowhere") == digest("flickr30k") == []
