"""Headers of safetensors files from strangers: the format's own rules, and no file that costs more than it is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sd_erase import formats
from sd_erase.errors import UserError
from sd_erase.headers import MAX_HEADER, read_header

FLOATS = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path: Path, header: str | bytes, numbers: bytes = b"") -> Path:
    content = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(content).to_bytes(8, "little") + content + numbers)
    return path


def entry(**changes: Any) -> str:
    return json.dumps({"a": {**FLOATS, **changes}})


BAD: list[tuple[str, str | bytes, bytes, str]] = [
    ("same name twice", f'{{"a":{json.dumps(FLOATS)},"a":{json.dumps(FLOATS)}}}', bytes(4), "'a' twice"),
    ("metadata twice", '{"__metadata__":{"k":"1","k":"2"}}', b"", "'k' twice"),
    ("overlap", json.dumps({"a": {**FLOATS, "shape": [2], "data_offsets": [0, 8]}, "b": {**FLOATS, "data_offsets": [4, 8]}}), bytes(8),
     "overlaps"),
    ("hole", json.dumps({"a": FLOATS, "b": {**FLOATS, "data_offsets": [8, 12]}}), bytes(12), "hole"),
    ("hole before the first", entry(data_offsets=[4, 8]), bytes(8), "hole"),
    ("bytes behind the last", entry(), bytes(5), "belong to none"),
    ("truncated", entry(), bytes(3), "truncated: 1 of 4 bytes"),
    ("huge shape", entry(shape=[2**40, 2**40, 2**40]), bytes(4), "impossible shape"),
    ("huge empty shape", entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), b"", "impossible shape"),
    ("many dimensions", entry(shape=[1] * 100_000), bytes(4), "impossible shape"),
    ("negative dimension", entry(shape=[-1, -1]), bytes(4), "impossible shape"),
    ("truth for a number", entry(shape=[True]), bytes(4), "impossible shape"),
    ("shape of text", entry(shape="1"), bytes(4), "impossible shape"),
    ("offsets backwards", entry(data_offsets=[4, 0]), bytes(4), "impossible data_offsets"),
    ("three offsets", entry(data_offsets=[0, 2, 4]), bytes(4), "impossible data_offsets"),
    ("too few bytes", entry(shape=[2]), bytes(4), "does not need"),
    ("unknown type", entry(dtype="F31"), bytes(4), "unknown type 'F31'"),
    ("type of no text", entry(dtype=["F32"]), bytes(4), "unknown type"),
    ("no offsets", '{"a":{"dtype":"F32","shape":[1]}}', bytes(4), "lacks"),
    ("no mapping", '{"a":[]}', b"", "lacks"),
    ("float", '{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', bytes(4), "whole number"),
    ("NaN", '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4), "whole number"),
    ("long number", '{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', bytes(4), "no file can hold"),
    ("list", "[]", b"", "no JSON object"),
    ("nothing", "", b"", "no JSON"),
    ("metadata of numbers", '{"__metadata__":{"a":1}}', b"", "no mapping of names to texts"),
    ("an empty list for metadata", '{"__metadata__":[]}', b"", "no mapping of names to texts"),
    ("a zero for metadata", '{"__metadata__":0}', b"", "no mapping of names to texts"),
    ("metadata of lists", '{"__metadata__":[]}' .replace("[]", "[1]"), b"", "no mapping of names to texts"),
    ("nested", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", b"", "nested too deeply"),
    ("no UTF-8", b'{"a\xff":{}}', b"", "no UTF-8"),
    ("half a pair", '{"a' + "\\", b"", "no JSON"),
    ("long name", json.dumps({"n" * 2000: FLOATS}), bytes(4), "name of 2000 characters"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "numbers", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_header_that_breaks_the_rules_is_one_sentence(tmp_path: Path, header: str | bytes, numbers: bytes, words: str) -> None:
    with pytest.raises(UserError, match="is no complete safetensors file") as caught:
        read_header(write(tmp_path / "x.safetensors", header, numbers))
    assert words in str(caught.value) and len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"\x05\0\0", "3 bytes"),
        (b"\xff" * 8, "are allowed"),
        ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "are allowed"),
        ((50).to_bytes(8, "little") + b"{}", "ends within its header"),
        (b"PK\x03\x04" + bytes(60), "a zip archive, as torch.save"),
        (b"\x80\x02}q\x00.", "a pickle"),
        (b"GGUF" + bytes(60), "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
    ],
)
def test_what_is_something_else_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_header(tmp_path / "x.safetensors")


def test_headers_of_unusual_lengths_are_not_taken_for_other_files(tmp_path: Path) -> None:
    for length in (ord("<"), 0x80, int.from_bytes(b"PK", "little")):
        path = write(tmp_path / "x.safetensors", json.dumps({"__metadata__": {"a": ""}}).ljust(length))
        assert read_header(path).start == 8 + length


def test_empty_and_scalar_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "last": torch.zeros(3)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: header.shape(name) for name in header.tensors} == {"scalar": (), "empty": (0, 4), "last": (3,)}
    found = formats.read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors) and header.metadata == {"format": "pt"}


def test_types_that_torch_lacks_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}), bytes(1))
    assert read_header(path).shape("a") == (2,)
    with pytest.raises(UserError, match="type F4 .*quantised"):
        formats.read_tensors(path)


LARGE: dict[str, Callable[[], bytes]] = {
    "lists": lambda: b'{"a":[' + b"[]," * 33_000_000 + b"[]]}",
    "tensors": lambda: b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000)) + b"}",
    "one long text": lambda: b'{"__metadata__":{"a":"\xf0\x9f\x98\x80' + b"x" * 99_000_000 + b'"}}',
    "one long number": lambda: b'{"a":{"dtype":"F32","shape":[' + b"9" * 99_000_000 + b"]}}",
}  # fmt: skip
CHILD = """
import resource, sys, time
from pathlib import Path
from sd_erase.headers import read_header
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
start = time.process_time()
try:
    read_header(Path(sys.argv[1]))
except ValueError as error:
    print(error)
print(f"{time.process_time() - start:.1f} s")
sys.exit(time.process_time() - start > 10)
"""


@pytest.mark.parametrize("kind", ["lists", pytest.param("tensors", marks=pytest.mark.slow), "one long text", "one long number"])
def test_the_largest_headers_cost_seconds_and_less_than_a_gigabyte(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "x.safetensors", LARGE[kind]())
    result = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is no complete safetensors file" in result.stdout or kind == "one long text"
