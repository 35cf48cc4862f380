"""Every path and manifest name of a run, once.

A stage's manifest is written last and atomically: its presence means that the stage is complete. It carries a
fingerprint of the stage's inputs, so a finished stage is not done again unless those changed.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd_erase import folders, forms, jsonfile
from sd_erase.errors import UserError, shortened
from sd_erase.folders import publishing as publishing
from sd_erase.folders import replacing as replacing
from sd_erase.folders import umask_mode as umask_mode


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path`, in a folder of ours, through a temporary file and a rename: no half-written file is ever seen."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)


def write_json_atomic(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file; a damaged one raises `UserError`."""
    return jsonfile.read(path)


def write_jsonl_atomic(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, atomically."""
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path, finite: bool = True) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, in order; a damaged one raises `UserError`.

    Args:
        finite: whether NaN is damage; a training that diverged writes it into its metrics.
    """
    return jsonfile.read_lines(path, finite)


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
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


KIND = "run"
DEPTH = 4  # folders that a comparison's or a bench's runs lie below it, at most
SHARED = ("comparison", "bench")
HERE = "./"  # how the path of an image of the pairs in the run's own folder begins; all others are absolute
# what the stages keep in a run's folder
OWN = re.compile(
    r"config\.yaml|run\.json|concepts\.json|(pairs|missing)\.jsonl|metrics(-\w+)?\.jsonl|clip\.safetensors|probes(\.json)?|data|cache"
    r"|checkpoints|encoder|images|detections|attacks|report|export|manifests|measures|\.sd-erase.*"
)


def _free(root: Path, stem: str) -> Path:
    """The first of `root/stem-0001` and so on that does not exist."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: pass a folder with --output-root.")
    for number in range(1, 10_000):
        path = root / f"{stem}-{number:04d}"
        if not path.exists():
            return path
    raise UserError(f"{root} already holds 9999 runs named {stem}: pass --run with a folder of your own.")


class RunDir:
    """The folder of one erasure: where each stage puts its files and finds the earlier stages'."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._stem = ""  # of a run that is to be made with the next free number
        # the stages that were completed through this object, so that one that had nothing to do is known
        self.done: list[str] = []

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.absolute().name or self.path.resolve().name  # "." has none

    # one property a file, in the order of the stages
    config = property(lambda self: self.path / "config.yaml")
    run = property(lambda self: self.path / "run.json")
    concepts = property(lambda self: self.path / "concepts.json")
    pairs = property(lambda self: self.path / "pairs.jsonl")
    missing = property(lambda self: self.path / "missing.jsonl")  # images that the harvest could not use
    data = property(lambda self: self.path / "data")
    cache = property(lambda self: self.path / "cache")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")
    encoder = property(lambda self: self.path / "encoder")
    denoiser = property(
        lambda self: self.encoder / "unet.safetensors"
    )  # what a comparator changed of the denoiser: see `denoiser`
    clip = property(lambda self: self.path / "clip.safetensors")  # both towers, where more than the text encoder was trained
    prompts = property(lambda self: self.path / "prompts.txt")  # made for concepts that no list ships for
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

    def image(self, stored: str | None) -> str | None:
        """The path of an image of the pairs.

        One that is not there is looked for in ``data``, as of a moved run of a version that wrote whole paths, and in the folder of a
        comparison or bench that was moved with its data.
        """
        if stored is None:
            return None
        if stored.startswith(HERE):
            return str(self.path.absolute() / stored[len(HERE) :])
        if not os.path.exists(stored):
            _, data, inside = stored.replace(os.sep, "/").rpartition(f"/{self.data.name}/")
            if data and (self.data / inside).is_file():
                return str(self.data.absolute() / inside)
            parts = Path(stored).parts
            tails = (self._home.joinpath(*parts[start:]) for start in range(1, len(parts))) if self._home else ()
            return next((str(path) for path in tails if path.is_file()), stored)
        return stored

    @functools.cached_property
    def _home(self) -> Path | None:
        """The folder of the comparison or bench whose run this is, which holds the data of all of them and may be moved as a whole."""
        parents = self.path.absolute().parents[:DEPTH]
        return next((each for each in parents if (folders.mark_of(each) or {}).get("kind") in SHARED), None)

    def manifest(self, stage: str) -> Path:
        """Where the manifest of `stage` lies ("harvest", "train", "generate", "evaluate", "report", "export-comfyui")."""
        return self.path / "manifests" / f"{stage}.json"

    def drawn(self) -> Iterator[dict[str, Any]]:
        """The rows of ``images/index.jsonl``, in order.

        Raises:
            UserError: the file is damaged, or names an image that does not lie in the run: a run from a stranger would otherwise
                put any picture of its reader's on the page.
        """
        path, home = self.images / "index.jsonl", self.images.resolve()
        for number, row in enumerate(jsonfile.read_lines(path), 1):
            jsonfile.check(row, forms.DRAWN, path, f"line {number}")
            for role in ("original", "erased"):
                name = row.get(role)
                if name is not None and not (isinstance(name, str) and (self.images / name).resolve().is_relative_to(home)):
                    raise jsonfile.damaged(path, f"{shortened(name)} lies outside of the run's images")
            yield row

    def read_manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a complete stage, or None; one that is damaged or no manifest's form says nothing, so its stage is to be done again."""
        try:
            manifest = read_json(self.manifest(stage))
        except (FileNotFoundError, UserError):
            return None
        return manifest if isinstance(manifest, dict) and forms.of_manifest(stage, manifest) else None

    def completed(self, stage: str) -> str:
        """When `stage` was completed, in ISO 8601 UTC, as its manifest says (an older version's: as run.json says); "" if unknown."""
        stated = (self.read_manifest(stage) or {}).get("completed")
        if stated is None and self.run.is_file():
            record = read_json(self.run)
            stated = record.get("updated") if isinstance(record, dict) else None
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
        self.done.append(stage)
        return manifest

    def command(self, name: str) -> str:
        """How a sentence names a command on this run, which need not be the latest."""
        return f"`sd-erase {name} --run {shlex.quote(str(self.path))}`"

    def require(self, stage: str, command: str) -> dict[str, Any]:
        """The manifest of an earlier stage; a `UserError` naming the command to run where it is missing."""
        manifest = self.read_manifest(stage)
        if manifest is None:
            raise UserError(f"Run {self.path} has no finished {stage} stage: run {self.command(command)} first.")
        return manifest

    def anchors(self, concepts: Iterable[str]) -> dict[str, str]:
        """What the training put in each concept's place.

        Raises:
            UserError: the run is not trained, or its manifest does not say it of one of `concepts`.
        """
        anchors = self.require("train", "train").get("anchor")
        if not isinstance(anchors, dict) or not forms.fits(anchors, forms.ANCHORS) or not set(concepts) <= anchors.keys():
            raise UserError(
                f"Run {self.path} does not say what stands in the place of {', '.join(concepts)}: run {self.command('train')} again."
            )
        return dict(anchors)

    def is_ours(self) -> bool:
        """Whether the folder is a run: it carries our mark, or it is one of a version that left none."""
        mark = folders.mark_of(self.path)
        if mark is not None:
            return mark.get("kind") == KIND
        if not self.config.is_file():
            return False
        try:
            return "stages" in read_json(self.run)
        except (OSError, ValueError, TypeError):
            return folders.entries(self.path) == [self.config.name]  # the settings of a run that is to be

    def check_ours(self) -> None:
        """Refuse a folder that holds something else; a missing or an empty one may become a run.

        Raises:
            UserError: it is a file, a folder of another kind, or holds what sd-erase did not make.
        """
        if not self.path.exists() or self.is_ours():
            return
        if not self.path.is_dir():
            raise UserError(f"Run {self.path} is a file: pass a folder with --run.")
        mark, others = folders.mark_of(self.path), folders.entries(self.path)
        if mark is not None:
            raise UserError(f"Folder {self.path} is another command's ({mark.get('kind')}), no run: pass another one with --run.")
        if others:
            raise UserError(
                f"Folder {self.path} is no run and holds other files (such as {others[0]}): pass a new or an empty one with --run."
            )

    @contextlib.contextmanager
    def writing(self, files: Mapping[str, str] | None = None, about: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Be the one process that writes to the run; leftovers of killed ones are removed.

        Args:
            files: name -> text of what a new run begins with; it has its name only when they are there.
            about: what the mark of a new run says beside its kind.

        Raises:
            UserError: see `check_ours`; or another process works on the run, or it may not be written.
        """
        hold = self._open(files or {}, about)
        try:
            yield
        finally:
            hold.release()

    def _open(self, files: Mapping[str, str], about: Mapping[str, Any] | None) -> folders.Hold:
        while self._stem or not self.path.exists():
            try:
                hold = folders.create(self.path, KIND, files, about)
                self._stem = ""
                return hold
            except FileExistsError:  # made by another process in the meantime
                if self._stem and self._begins_with(files):
                    raise self._busy() from None
                if self._stem:
                    self.path = _free(self.path.parent, self._stem)
        self.check_ours()
        try:
            hold = folders.Hold.take(self.path)
        except folders.Busy:
            raise self._busy() from None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise UserError(
                f"Run {self.path} may not be written ({error.strerror}): copy it to a folder of your own and pass that with --run."
            ) from error
        if folders.mark_of(self.path) is None:
            folders.mark(self.path, KIND, about)
        for name, text in files.items():
            if not (self.path / name).exists():
                write_text_atomic(self.path / name, text)
        return hold

    def _begins_with(self, files: Mapping[str, str]) -> bool:
        """Whether another process has just made this run of the same `files`."""
        try:
            same = all((self.path / name).read_text(encoding="utf-8") == text for name, text in files.items())
        except (OSError, UnicodeDecodeError):
            return False
        return same and bool(files) and folders.is_locked(self.path) is True

    def _busy(self) -> folders.Busy:
        return folders.Busy(
            f"Run {self.path} is being worked on by another sd-erase process{self._worker()}: wait until that has ended, or pass "
            "another folder with --run."
        )

    def _worker(self) -> str:
        """Who works on the run, as its record tells."""
        try:
            record = read_json(self.run)
            running = [name for name, stage in record["stages"].items() if stage["status"] == "running"]
            return f" (pid {record['pid']} on {record['host']}{', ' + running[-1] if running else ''})"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return ""

    def owns(self, path: Path) -> bool:
        """Whether `path` is, or would be, one of the files that the stages keep here; what else lies in the folder is the user's."""
        try:
            first, *_ = path.expanduser().resolve().relative_to(self.path.resolve()).parts
        except ValueError:  # outside, or the folder itself
            return path.expanduser().resolve() == self.path.resolve()
        return bool(OWN.fullmatch(first))

    def discard(self, folder_too: bool) -> None:
        """Remove what a run begins with, and nothing else; the folder itself only where it is empty then."""
        for name in ("config.yaml", "run.json", "concepts.json", "pairs.jsonl", "missing.jsonl", folders.LOCK, folders.MARK):
            (self.path / name).unlink(missing_ok=True)
        for inner in (self.data, self.cache, self.path / "manifests"):
            if not inner.is_symlink():
                shutil.rmtree(inner, ignore_errors=True)
        if folder_too:
            with contextlib.suppress(OSError):  # somebody put something there
                self.path.rmdir()

    @classmethod
    def next(cls, root: str | Path, concept: str, base: str) -> RunDir:
        """The run `root/concept-base-0001` with the next free number, which is made when it is first written to."""
        stem = "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") or "x" for part in (concept, base))[:60]
        run = cls(_free(Path(root), stem))
        run._stem = stem
        return run

    @classmethod
    def create(cls, root: str | Path, concept: str, base: str) -> RunDir:
        """As `next`, made at once."""
        run = cls.next(root, concept, base)
        with run.writing():
            return run

    @classmethod
    def latest(cls, root: str | Path, stage: str) -> RunDir:
        """The run under `root` whose `stage` was completed last, by what the manifests say: copies of runs have other files' times."""
        runs = [cls(path.parent.parent) for path in sorted(Path(root).glob(f"*/manifests/{stage}.json"))]
        finished = [run for run in runs if run.read_manifest(stage) is not None]
        if not finished:
            raise UserError(f"No run with a finished {stage} stage under {root}: pass --run, or run `sd-erase {stage}` first.")
        return max(finished, key=lambda run: run.completed(stage))
