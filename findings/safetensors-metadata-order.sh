#!/bin/sh
# safetensors 0.8.0 writes `__metadata__` in another order at every call: equal tensors with equal metadata make files of different bytes.
# Who knows a file by the hash of its bytes (a cache, a manifest, a list of models) sees a new one each time it is saved. The bytes
# behind the header stay the same, so a hash of those alone does not change.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import json

import numpy
import safetensors
from safetensors.numpy import load, save

tensors = {"weight": numpy.arange(4, dtype=numpy.float32)}
about = {"format": "pt", "modelspec.title": "an encoder", "modelspec.date": "2026-11-27", "base": "sd15", "concept": "bicycle"}
files = [save(tensors, about) for _ in range(20)]
headers = [json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")]) for file in files]
print("safetensors", safetensors.__version__)
print("calls of save() with the same tensors and metadata:", len(files))
print("different files:", len({hashlib.sha256(file).hexdigest() for file in files}))
print("orders of the metadata:", len({tuple(header["__metadata__"]) for header in headers}))
assert all(header["__metadata__"] == about for header in headers)
bodies = {hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest() for file in files}
print("different bytes behind the header:", len(bodies))
assert len(bodies) == 1
assert all((load(file)["weight"] == tensors["weight"]).all() for file in files)
assert len({hashlib.sha256(file).hexdigest() for file in files}) > 1, "equal input makes equal files now"
one = {hashlib.sha256(save(tensors, {"format": "pt"})).hexdigest() for _ in range(20)}
print("different files with a single key of metadata:", len(one))
assert len(one) == 1
PYTHON
