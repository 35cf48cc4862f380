"""Every path and manifest name of a run, once.

A stage's manifest is written last and atomically: its presence means that the stage is complete. It carries a
fingerprint of the stage's inputs, so a finished stage is not done again unless those changed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sd_erase.errors import UserError


def umask_mode(*, folder: bool = False) -> int:
    """The permissions that this process's umask gives a new file (or folder).

    Temporary files are private; what takes a lasting name gets these instead, as if it had been opened anew.
    """
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file and a rename, so that no half-written file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, umask_mode())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json_atomic(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl_atomic(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, atomically."""
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, in order."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                yield json.loads(line)


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able values and of files' contents (`Path` values are read)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as stream:
                while block := stream.read(1 << 20):  # an encoder of SDXL has 2.8 GB
                    digest.update(block)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def now() -> str:
    """The time in ISO 8601, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")


class RunDir:
    """The folder of one erasure: where each stage puts its files and finds the earlier stages'."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    # one property a file, in the order of the stages
    config = property(lambda self: self.path / "config.yaml")
    run = property(lambda self: self.path / "run.json")
    concepts = property(lambda self: self.path / "concepts.json")
    pairs = property(lambda self: self.path / "pairs.jsonl")
    data = property(lambda self: self.path / "data")
    cache = property(lambda self: self.path / "cache")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")
    encoder = property(lambda self: self.path / "encoder")
    clip = property(lambda self: self.path / "clip.safetensors")  # both towers, where more than the text encoder was trained
    images = property(lambda self: self.path / "images")
    detections = property(lambda self: self.path / "detections")
    attacks = property(lambda self: self.path / "attacks")
    report = property(lambda self: self.path / "report")
    export = property(lambda self: self.path / "export")

    def training(self, encoder: str) -> tuple[Path, Path]:
        """The checkpoints' folder and the record of one text encoder's training; the first encoder's are the run's own."""
        if encoder == "text_encoder":
            return self.checkpoints, self.metrics
        return self.checkpoints / encoder, self.path / f"metrics-{encoder}.jsonl"

    def lora(self, encoder: str) -> Path:
        """The factors of a LoRA training of one text encoder."""
        return self.encoder / ("lora.safetensors" if encoder == "text_encoder" else f"lora-{encoder}.safetensors")

    def manifest(self, stage: str) -> Path:
        """Where the manifest of `stage` lies ("harvest", "train", "generate", "evaluate", "report", "export-comfyui")."""
        return self.path / "manifests" / f"{stage}.json"

    def read_manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a complete stage, or None; one that is damaged says nothing, so its stage is to be done again."""
        try:
            manifest = read_json(self.manifest(stage))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def completed(self, stage: str) -> str:
        """When `stage` was completed, in ISO 8601 UTC, as its manifest says (an older version's: as run.json says); "" if unknown."""
        stated = (self.read_manifest(stage) or {}).get("completed")
        if stated is None and self.run.is_file():
            stated = read_json(self.run).get("updated")
        return str(stated or "")

    def is_complete(self, stage: str, inputs: str) -> bool:
        """Whether `stage` was finished with inputs of this fingerprint."""
        manifest = self.read_manifest(stage)
        return manifest is not None and manifest.get("inputs") == inputs

    def reopen(self, stage: str) -> None:
        """Drop the manifest of `stage` before the stage's files are touched."""
        self.manifest(stage).unlink(missing_ok=True)

    def complete(self, stage: str, inputs: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest of `stage` (atomically, last) and return it; it says when, because a copied file's time does not."""
        manifest = {"stage": stage, "inputs": inputs, "completed": now(), **result}
        write_json_atomic(self.manifest(stage), manifest)
        return manifest

    def require(self, stage: str, command: str) -> dict[str, Any]:
        """The manifest of an earlier stage; a `UserError` naming the command to run where it is missing."""
        manifest = self.read_manifest(stage)
        if manifest is None:
            raise UserError(f"Run {self.path} has no finished {stage} stage: run `sd-erase {command}` first.")
        return manifest

    @classmethod
    def create(cls, root: str | Path, concept: str, base: str) -> RunDir:
        """A new folder `root/concept-base-0001` with the next free number."""
        stem = "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") or "x" for part in (concept, base))[:60]
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            path = root / f"{stem}-{number:04d}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return cls(path)
        raise UserError(f"{root} already holds 9999 runs named {stem}: pass --run with a folder of your own.")

    @classmethod
    def latest(cls, root: str | Path, stage: str) -> RunDir:
        """The run under `root` whose `stage` was completed last, by what the manifests say: copies of runs have other files' times."""
        runs = [cls(path.parent.parent) for path in sorted(Path(root).glob(f"*/manifests/{stage}.json"))]
        finished = [run for run in runs if run.read_manifest(stage) is not None]
        if not finished:
            raise UserError(f"No run with a finished {stage} stage under {root}: pass --run, or run `sd-erase {stage}` first.")
        return max(finished, key=lambda run: run.completed(stage))
