"""What every export does: find the run's erased encoders, write beside the target, load back, compare, and only then rename."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase import __version__, bases, chain, components, digests, fingerprints, formats
from sd_erase.bases import Base, TextEncoder
from sd_erase.clients import Client, clients, line
from sd_erase.config import RunConfig
from sd_erase.errors import UserError, unknown_choice
from sd_erase.evaluation import SIDES, stored
from sd_erase.export.integrity import check as integrity_of
from sd_erase.folders import lasting, staging, umask_mode
from sd_erase.progress import NoProgress, Progress
from sd_erase.rundir import RunDir, fingerprint

SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
# safetensors' names of the types
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# largest relative difference of hidden states that rounding to a type explains, with room to spare
TOLERANCE = {"float32": 0.0, "float16": 0.02, "bfloat16": 0.15}
SPARE_BYTES = 1 << 20


def file_name(text: str, limit: int) -> str:
    """`text` as part of a file's name on every system: letters, digits, ``.``, ``_`` and ``-``, at most `limit` bytes."""
    name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", text).lower()).strip("._-")
    return name.encode()[:limit].decode(errors="ignore").strip("._-") or "x"


@dataclass(frozen=True)
class Erased:
    """One erased text encoder of a run."""

    encoder: TextEncoder
    folder: Path  # config.json, model.safetensors
    keys: tuple[str, ...]  # the encoder's tensors: position_ids and other buffers stay out
    layers: int
    width: int

    @property
    def name(self) -> str:
        return self.encoder.name

    @property
    def tokens(self) -> int:
        """The rows of its token embedding."""
        return formats.read_header(self.folder / "model.safetensors").shape(f"{formats.PREFIX}embeddings.token_embedding.weight")[
            0
        ]

    def tensor(self, key: str) -> Any:
        """One tensor. Each is mapped by itself: a mapping of the whole file would stay in memory as long as one of them does."""
        return formats.read_tensors(self.folder / "model.safetensors", [key])[key]

    def state(self) -> dict[str, Any]:
        """The tensors, mapped into memory rather than read."""
        return formats.read_tensors(self.folder / "model.safetensors", self.keys)


@dataclass(frozen=True)
class Job:
    """A run on its way into the files of another program."""

    config: RunConfig
    run: RunDir
    base: Base
    encoders: tuple[Erased, ...]
    trained: dict[str, Any]  # the manifest "train"
    progress: Progress
    links: chain.Chain

    @classmethod
    def of(cls, config: RunConfig, run: RunDir, progress: Progress | None = None) -> Job:
        """The job of a trained run.

        Raises:
            UserError: the run has no erased encoder, or one that is damaged or is not what its training wrote, its base has no
                denoiser, or the run changes that instead.
        """
        if config.export.dtype not in SHORT:
            raise unknown_choice("Export type", config.export.dtype, SHORT)
        trained = run.require("train", "train")
        base = bases.resolve(config.base)
        if base.family in bases.IMAGE_TEXT:
            raise UserError(
                f"Base {base.name} is no image generator, so there is nothing to load its encoder into: what was trained lies in {run}; to draw with it, train one of a Stable Diffusion model with --base."
            )
        links = chain.Chain(run, config, progress)
        links.require("train")
        if run.denoiser.is_file():
            raise UserError(
                f"Run {run} changes the denoiser, not the text encoder (objective {trained.get('objective')}, a published comparator), and "
                "no export holds that: draw with the run itself (generate, attack, audit, compare, load_erased), or train --objective robust."
            )
        encoders = tuple(_find(run, encoder) for encoder in base.encoders)
        return cls(config, run, base, encoders, trained, progress or NoProgress(), links)

    @property
    def concept(self) -> str:
        return ", ".join(self.config.concepts) or Path(self.config.concept_file).stem

    @property
    def date(self) -> str:
        """When the training ended, in ISO 8601 to the second; "" where no manifest says so."""
        stated = self.run.completed("train")
        return datetime.datetime.fromisoformat(stated).isoformat(timespec="seconds") if stated else ""

    @property
    def stem(self) -> str:
        """How the job's files begin."""
        return f"{self.concept_name}-{file_name(self.base.name, 60)}"

    @property
    def concept_name(self) -> str:
        """The concepts as part of a file's name; of many, the first ones and how many more."""
        concepts = [file_name(concept, 60) for concept in self.config.concepts or [Path(self.config.concept_file).stem]]
        kept = len(concepts)
        while kept > 1 and len("-".join(concepts[:kept]).encode()) > 60:
            kept -= 1
        more = [f"and_{len(concepts) - kept}_more"] if kept < len(concepts) else []
        return "-".join([*concepts[:kept], *more])

    @property
    def objective(self) -> str:
        return str(self.trained.get("objective", self.config.train.objective))

    @property
    def clients(self) -> tuple[Client, ...]:
        """The programs that take the export, and those that do not."""
        return clients(self.config.export.to, self.base.family, self.base.embedded)

    def provenance(self) -> dict[str, str]:
        """Metadata that says where a file comes from; a shared file tells nothing of its maker's disk."""
        return {
            "sd_erase.version": __version__,
            "sd_erase.concept": self.concept,
            "sd_erase.anchor": json.dumps(self.trained.get("anchor"), ensure_ascii=False),
            "sd_erase.objective": self.objective,
            "sd_erase.base": self.base.name,
            "sd_erase.run": self.run.name,
            **self.figures,
            **self.base_prints,
            "sd_erase.programs": "; ".join(line(*client) for client in self.clients),
        }

    @functools.cached_property
    def figures(self) -> dict[str, str]:
        """``sd_erase.figures``, where the run was evaluated and nothing it was evaluated from has changed: JSON, thing -> images that show
        it and images in all, of the original and of the erased model."""
        if self.links.fault("evaluate") is not None:
            return {}
        rows = [row for row in stored(self.run)["rows"] if row["role"] in ("target", "target_named", "others") and row["erased"]]
        told = {row["name"]: {side: [row[side]["count"], row[side]["n"]] for side in SIDES} for row in rows}
        return {"sd_erase.figures": json.dumps(told, ensure_ascii=False)}

    @functools.cached_property
    def base_prints(self) -> dict[str, str]:
        """``sd_erase.base_print``: JSON, encoder -> `fingerprints.written` of the base's own; nothing where its weights are not at hand."""
        try:
            prints = {
                each.name: fingerprints.written(components.text_encoder_state(self.base, each.encoder)) for each in self.encoders
            }
        except UserError:
            return {}
        return {"sd_erase.base_print": json.dumps(prints)}

    def target(self, name: str) -> Path:
        """The one file to write: --output where it names a file, else `name` in a folder."""
        output = self.folder()
        return output if output.suffix == ".safetensors" and not output.is_dir() else output / name

    def folder(self) -> Path:
        """--output, or the run's export folder."""
        output = Path(self.config.export.output).expanduser() if self.config.export.output else self.run.export
        if output.exists() and not output.is_dir() and output.suffix != ".safetensors":
            raise UserError(f"Output {output} is neither a folder nor a .safetensors file: pass one of these with --output.")
        return output

    def check_target(self, target: Path) -> None:
        """Whether the file `target` may be written.

        Raises:
            UserError: it is a folder, or a file of somebody else's and --force is not given; or it is, in any case, a file of the
                run's stages or of the base.
        """
        if target.is_dir():
            raise UserError(f"Output {target} is a folder of that name: pass another file with --output.")
        self.check_place(target)
        if target.exists() and not (self.config.export.force or self._wrote(target)):
            raise UserError(
                f"Output {target} exists and was not written by sd-erase, or was changed since: remove it, pass another file with "
                "--output, or pass --force to replace it."
            )

    def check_place(self, target: Path) -> None:
        """Refuse the places of what the export is made from."""
        if _is_inside(target, self.run.export):
            return
        source = Path(self.base.source).expanduser()
        if self.run.owns(target):
            raise UserError(
                f"Output {target} is one of the files of run {self.run}, which stay as they are: pass another --output."
            )
        if source.exists() and _is_inside(target, source):
            raise UserError(f"Output {target} is the base's, which stays as it is: pass another place with --output.")

    def _wrote(self, path: Path) -> bool:
        """Whether an exported file is there; outside the run only one whose numbers are as they were written."""
        try:
            header = formats.read_header(path)
        except UserError:
            return False
        if "sd_erase.version" not in header.metadata:
            return False
        return _is_inside(path, self.run.export) or integrity_of(header).state == "matches"

    @contextlib.contextmanager
    def written(self, target: Path, size: int) -> Iterator[Path]:
        """A temporary file beside `target` to write and compare; it takes the target's name when the block ends well."""
        self.check_target(target)
        check_space(target.parent, size)
        with contextlib.ExitStack() as stack:
            try:
                place = stack.enter_context(staging(target.parent))
            except OSError as error:
                raise _unwritable(target, error) from error
            yield place / target.name
            (place / target.name).chmod(umask_mode())
            os.replace(place / target.name, target)

    def once(self, inputs: list[Any], make: Callable[[], dict[str, Any]], targets: Sequence[Path] = ()) -> dict[str, Any]:
        """What `make` returns, as the export's manifest; not made again while its inputs and its files are the same.

        Args:
            targets: files that are checked before `make` does any work.
        """
        stage = f"export-{self.config.export.to}"
        settings = dataclasses.asdict(self.config.export)
        encoder = self.links.now("encoder")
        digest = fingerprint(
            encoder,
            [self.trained.get("inputs"), list(self.config.concepts), self.base.name, settings, __version__, inputs, self.figures],
        )
        done = self.run.read_manifest(stage)
        if done and done.get("inputs") == digest and all(_is_intact(file) for file in done["files"]):
            return done
        for target in targets:
            self.check_target(target)
        self.run.reopen(stage)
        programs = [client._asdict() for client in self.clients]
        return self.run.complete(stage, digest, {**make(), "programs": programs, "from": {"encoder": encoder}})


def _find(run: RunDir, encoder: TextEncoder) -> Erased:
    folder = run.encoder / encoder.name
    for name in ("model.safetensors", "config.json"):
        if not (folder / name).is_file():
            raise UserError(f"Run {run} has no {encoder.name}/{name}: run {run.command('train')} again.")
    try:
        header = formats.read_header(folder / "model.safetensors")
        names = set(header.tensors)
    except UserError as error:
        raise UserError(f"{str(error).partition(':')[0]}: run {run.command('train')} again.") from error
    layers = formats.count_layers(name for name in names if name.startswith(formats.PREFIX))
    keys = formats.text_encoder_keys(layers, projection=encoder.pooled)
    if layers == 0 or not keys <= names:
        raise UserError(
            f"Encoder {folder} does not hold the tensors of a CLIP text encoder (first missing: "
            f"{min(keys - names, default='its layers')}): run {run.command('train')} again."
        )
    width, *_ = header.shape(f"{formats.PREFIX}final_layer_norm.weight")
    return Erased(encoder, folder, tuple(sorted(keys)), layers, width)


def _is_intact(file: dict[str, Any]) -> bool:
    path = Path(file["path"])
    return path.is_file() and path.stat().st_size == file["bytes"] and sha256(path) == file["sha256"]


def sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    return digests.of_file(path)


def _is_inside(path: Path, place: Path) -> bool:
    """Whether `path` is `place` or lies in it."""
    path, place = path.expanduser().resolve(), place.resolve()
    return path == place or place in path.parents


def check_space(folder: Path, size: int) -> None:
    """Make `folder`; raises `UserError` where that cannot be done or `size` bytes do not fit."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _unwritable(folder, error) from error
    if free < size + SPARE_BYTES:
        raise UserError(
            f"no space left on {lasting(folder)} ({size / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free): "
            "free some, or pass another folder with --output."
        )


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(f"Output {target} cannot be written ({error.strerror}): pass another folder with --output.")


def rounded(key: str, tensor: Any, dtype: str) -> Any:
    """`tensor` as `dtype`, contiguous.

    Raises:
        UserError: a number does not fit the type.
    """
    import torch

    result = tensor.to(getattr(torch, dtype)).contiguous()
    if not result.isfinite().all():
        raise UserError(f"Tensor {key} does not fit {dtype} or is not finite: pass --dtype float32.")
    return result


def save(path: Path, tensors: Mapping[str, Callable[[], Any]], dtype: str, metadata: Mapping[str, str]) -> str:
    """Write tensors of one type one at a time, and compare what the disk gives back.

    Args:
        tensors: name -> what makes the tensor, already of its type; called twice.

    Returns:
        SHA-256 of the numbers.

    Raises:
        RuntimeError: the file does not hold what was written.
    """
    import torch

    entries = {}
    for name, make in tensors.items():
        tensor = make()
        entries[name] = {"dtype": CODES[dtype], "shape": tensor.shape, "size": tensor.numel() * tensor.element_size()}
    digest = formats.write_tensors(path, entries, metadata, lambda name: [formats.raw_bytes(tensors[name]())])
    found = formats.read_tensors(path)
    if set(found) != set(tensors) or not all(torch.equal(found[name], tensors[name]()) for name in tensors):
        raise RuntimeError(f"{path} does not hold the tensors that were written: the disk or its driver is at fault.")
    return digest
