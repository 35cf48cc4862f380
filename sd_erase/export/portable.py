"""What a folder of `from_pretrained` needs so that other people, programs and versions open it as it is.

transformers 5 saves a tokenizer as ``tokenizer.json`` alone, which the slow tokenizer of transformers 4, named in the pipeline's
index, does not read; the libraries write the folder that a model came from into its configuration; safetensors' files are private.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from sd_erase.rundir import umask_mode

# where a model or a tokenizer was loaded from, and the loader's own switches
ORIGINS = {"_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file"} | {
    "is_local", "local_files_only"
}  # fmt: skip
PATH = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|file:")
VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json"}
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def make_portable(folder: Path) -> None:
    """Complete the tokenizers of a pipeline's or a model's folder, forget where it came from, and let others read it."""
    for tokenizer in sorted({path.parent for path in folder.rglob("tokenizer.json")}):
        complete_tokenizer(tokenizer)
    for path in folder.rglob("*.json"):
        if path.name not in VOCABULARIES:
            forget_origins(path)
    for path in (folder, *folder.rglob("*")):
        os.chmod(path, umask_mode(folder=path.is_dir()))


def complete_tokenizer(folder: Path) -> None:
    """Write the files of CLIP's tokenizer that transformers 4 reads, where only ``tokenizer.json`` is there."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    if not (folder / "vocab.json").is_file():
        _write(folder / "vocab.json", vocabulary)
    if not (folder / "merges.txt").is_file():
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    added = {token["content"]: token["id"] for token in content["added_tokens"] if token["content"] not in vocabulary}
    if added and not (folder / "added_tokens.json").is_file():
        _write(folder / "added_tokens.json", added)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if not (folder / "special_tokens_map.json").is_file():
        _write(folder / "special_tokens_map.json", {name: config[name] for name in SPECIAL if config.get(name) is not None})


def forget_origins(path: Path) -> None:
    """Take out of a configuration what names a folder or a file of the machine that wrote it."""
    value = json.loads(path.read_text(encoding="utf-8"))
    kept = _without_origins(value)
    if kept != value:
        _write(path, kept)


def _without_origins(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_origins(item) for key, item in value.items() if key not in ORIGINS and not _is_path(item)}
    return [_without_origins(item) for item in value] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and PATH.match(value) is not None


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
