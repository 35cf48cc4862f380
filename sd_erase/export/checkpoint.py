"""The user's full checkpoint with the erased encoder in place of its own, for A1111, Forge and ComfyUI's checkpoint loader.

The file is streamed: every other tensor keeps its very bytes, the encoder's keep their names, order, shapes and types.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd_erase import components, digests, formats
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export import compare
from sd_erase.export.encoders import position_id_problems
from sd_erase.export.job import CODES, TOLERANCE, Erased, Job, sha256
from sd_erase.export.modelspec import modelspec
from sd_erase.formats import Header, Place
from sd_erase.progress import Progress
from sd_erase.rundir import RunDir

BLOCK = 16 << 20  # bytes
TYPES = {code: name for name, code in CODES.items()}
# per stored type, the relative change that rounding alone can make of a whole tensor
ROUNDING = {"F32": 1e-6, "F16": 2e-3, "BF16": 1e-2}


def export(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Write a copy of the checkpoint whose encoder's tensors are the erased ones, read it back, and only then give it its name.

    Returns:
        The manifest: "files" with one mapping (as `text_encoder.export`'s, and "changed", the number of tensors that differ),
        "checkpoint" and "warnings".

    Raises:
        UserError: no checkpoint, one of another base, a damaged one, or a target that cannot be written.
    """
    job = Job.of(config, run, progress)
    source = _source(job)
    header = formats.read_header(source)
    places = _places(job, header)
    target = job.target(f"{source.stem[:60]}-without-{job.concept_name}.safetensors")
    if target.exists() and target.samefile(source):
        raise UserError(f"Output {target} is the checkpoint itself, which stays as it is: pass another file with --output.")
    content = digests.of_files(source.parent, [source], job.progress)

    def make() -> dict[str, Any]:
        mappings = {erased: _mapping(header, erased, place) for erased, place in places.items()}
        if not config.export.force:
            _check_same_encoder(job, header, mappings)
        warnings = [text for place in places.values() for text in position_id_problems(header, place.prefix)]
        warnings += [text for erased in places for text in components.added_tokens(erased.tokens)]
        file = _write(job, header, places, mappings, target)
        return {"files": [file], "checkpoint": source.name, "warnings": warnings}

    return job.once([str(source), content, str(target)], make, [target])


def _source(job: Job) -> Path:
    """The checkpoint to copy: --checkpoint, or the base where that is one."""
    given = job.config.export.checkpoint or (job.base.source if job.base.source.endswith(".safetensors") else "")
    if not given:
        raise UserError(
            f"Base {job.base.name} is no one-file checkpoint: pass yours with --checkpoint, for example "
            "--checkpoint v1-5-pruned-emaonly.safetensors."
        )
    return Path(given).expanduser()


def _places(job: Job, header: Header) -> dict[Erased, Place]:
    """Where the checkpoint keeps each erased encoder."""
    family = formats.checkpoint_family(header.tensors)
    if family != job.base.family:
        titles = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
        what = titles.get(family or "", "no checkpoint with a text encoder of Stable Diffusion")
        raise UserError(
            f"Checkpoint {header.path} is {what}, but the encoder was erased from {job.base.name} ({titles[job.base.family]}): "
            "pass a checkpoint of that kind."
        )
    by_name = {place.encoder: place for place in formats.PLACES[family]}
    return {erased: by_name[erased.name] for erased in job.encoders}


def _mapping(header: Header, erased: Erased, place: Place) -> dict[str, tuple[str, ...]]:
    """The checkpoint's tensors that are swapped -> the erased encoder's names."""
    own = [name for name in header.tensors if name.startswith(place.prefix)]
    mapping = formats.stored_names(erased.keys, own, place.prefix, place.open_clip)
    missing = [name for name in mapping if name not in header.tensors]
    if missing:
        raise UserError(
            f"Checkpoint {header.path} lacks {len(missing)} tensors of its text encoder, first {missing[0]}: "
            "pass a complete one (A1111 would fill them with zeros)."
        )
    extra = formats.count_layers(own) - erased.layers
    if extra not in ((0, 1) if place.open_clip else (0,)):  # SD 2.x keeps a last block that is not read
        raise UserError(
            f"Checkpoint {header.path} has {formats.count_layers(own)} layers in its text encoder, the erased one has "
            f"{erased.layers}: pass a checkpoint of the same base."
        )
    own_header = formats.read_header(erased.folder / "model.safetensors")
    for name, keys in mapping.items():
        first, *rest = own_header.shape(keys[0])
        expected = (len(keys) * first, *rest)
        if name.endswith("text_projection"):
            expected = expected[::-1]
        if header.shape(name) != expected:
            raise UserError(
                f"Tensor {name} of checkpoint {header.path} has the shape {header.shape(name)}, the erased encoder's {expected}: "
                "pass a checkpoint of the same base."
            )
        if header.tensors[name]["dtype"] not in TYPES:
            raise UserError(
                f"Checkpoint {header.path} keeps its text encoder as {header.tensors[name]['dtype']}, which cannot hold the change: "
                "pass one in F32, F16 or BF16."
            )
    return mapping


def _check_same_encoder(job: Job, header: Header, mappings: dict[Erased, dict[str, tuple[str, ...]]]) -> None:
    """A fine-tune's own encoder must not be overwritten by another model's without a word."""
    if header.path.resolve() == Path(job.base.source).expanduser().resolve():
        return
    for erased, mapping in mappings.items():
        original = components.text_encoder_state(job.base, erased.encoder)
        with job.progress(f"comparing {erased.name}", len(mapping)) as task:
            for name, keys in mapping.items():
                found = formats.read_tensors(header.path, [name])[name].float()
                expected = formats.joined(name, [original[key].float() for key in keys])
                apart = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
                if not apart <= ROUNDING[header.tensors[name]["dtype"]]:
                    raise UserError(
                        f"Checkpoint {header.path} has a text encoder of its own ({name} differs from {job.base.name}'s by "
                        f"{100 * apart:.2g} %): train on it with --base {header.path}, or pass --force to replace it by "
                        f"{job.base.name}'s."
                    )
                task.advance()


def _write(
    job: Job, header: Header, places: dict[Erased, Place], mappings: dict[Erased, dict[str, tuple[str, ...]]], target: Path
) -> dict[str, Any]:
    owner = {name: (erased, keys) for erased, mapping in mappings.items() for name, keys in mapping.items()}
    entries = {
        name: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "size": entry["data_offsets"][1] - entry["data_offsets"][0],
        }
        for name, entry in header.tensors.items()
    }
    size = sum(entry["size"] for entry in entries.values())

    def swapped(name: str) -> Any:
        import torch

        erased, keys = owner[name]
        dtype = TYPES[header.tensors[name]["dtype"]]
        tensor = formats.joined(name, [erased.tensor(key) for key in keys]).to(getattr(torch, dtype))
        if not tensor.isfinite().all():
            raise UserError(f"Tensor {name} does not fit {dtype}, the type of {header.path}: pass a checkpoint in float32.")
        return tensor

    metadata = {
        **header.metadata,
        "format": "pt",
        **modelspec(
            f"{header.metadata.get('modelspec.title', header.path.stem)} without {job.concept}",
            f"Checkpoint from whose text encoder sd-erase erased {job.concept} (objective {job.objective}).",
            job.base,
            "",
            job.date,
        ),
        **job.provenance(),
    }
    if stated := header.metadata.get("modelspec.architecture"):  # by whoever made the checkpoint
        metadata["modelspec.architecture"] = stated
    for stale in ("sshs_model_hash", "sshs_legacy_hash"):  # of the original's bytes
        metadata.pop(stale, None)
    with job.written(target, size) as temporary:
        with job.progress("writing (MB)", size // 10**6) as task, header.path.open("rb") as stream:
            done = 0

            def chunks(name: str) -> Iterator[Any]:
                nonlocal done
                for chunk in [formats.raw_bytes(swapped(name))] if name in owner else _stored(stream, header, name):
                    yield chunk
                    before, done = done, done + len(chunk)
                    task.advance(done // 10**6 - before // 10**6)

            digest = formats.write_tensors(temporary, entries, metadata, chunks)
        changed = _read_back(job, header, temporary, owner, swapped, size)
        difference = 0.0
        back = formats.read_header(temporary)
        for erased, place in places.items():

            def found(erased: Erased = erased, place: Place = place) -> dict[str, Any]:
                state = formats.read_encoder(back, place.prefix, place.open_clip, erased.encoder.pooled)
                return {key: state[key] for key in erased.keys}

            apart = compare.compare(erased, found)
            dtype = next(TYPES[entries[name]["dtype"]] for name in mappings[erased])
            if not apart <= TOLERANCE[dtype]:
                raise UserError(f"The encoder changes by {apart:.2g} in {dtype}: pass a checkpoint in float32 with --checkpoint.")
            difference = max(difference, apart)
    return {
        "path": str(target),
        "encoder": " + ".join(erased.name for erased in mappings),
        "tensors": len(entries),
        "swapped": len(owner),
        "changed": changed,
        "bytes": target.stat().st_size,
        "dtype": ", ".join(sorted({TYPES[entries[name]["dtype"]] for name in owner})),
        "sha256": sha256(target),
        "data_sha256": digest,
        "difference": difference,
    }


def _stored(stream: Any, header: Header, name: str) -> Iterator[bytes]:
    """The bytes of a tensor of the checkpoint."""
    start, end = header.tensors[name]["data_offsets"]
    stream.seek(header.start + start)
    while start < end:
        block = stream.read(min(BLOCK, end - start))
        if not block:
            raise UserError(f"Checkpoint {header.path} became shorter while it was read: nothing was written; try again.")
        start += len(block)
        yield block


def _read_back(job: Job, header: Header, path: Path, owner: dict[str, Any], swapped: Any, size: int) -> int:
    """Compare the new file with the checkpoint and the encoder, byte by byte; the number of tensors that differ.

    Raises:
        RuntimeError: a tensor is not what was written.
    """
    back, changed, done = formats.read_header(path), 0, 0
    fields = [(name, entry["dtype"], entry["shape"]) for name, entry in header.tensors.items()]
    if [(name, entry["dtype"], entry["shape"]) for name, entry in back.tensors.items()] != fields:
        raise RuntimeError(f"{path} does not hold the tensors of {header.path}.")
    with job.progress("reading back (MB)", size // 10**6) as task, header.path.open("rb") as old, path.open("rb") as new:
        for name in header.tensors:
            original, found = _stored(old, header, name), _stored(new, back, name)
            is_same = all(first == second for first, second in zip(original, found, strict=True))
            if name in owner:
                expected = [formats.raw_bytes(swapped(name))]
                if b"".join(_stored(new, back, name)) != b"".join(expected):
                    raise RuntimeError(f"Tensor {name} of {path} is not the erased encoder's: the disk is at fault.")
            elif not is_same:
                raise RuntimeError(f"Tensor {name} of {path} is not the checkpoint's: the disk is at fault.")
            changed += not is_same
            before, done = done, done + back.tensors[name]["data_offsets"][1] - back.tensors[name]["data_offsets"][0]
            task.advance(done // 10**6 - before // 10**6)
    return changed
