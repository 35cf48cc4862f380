"""The erased encoders as a folder for ``from_pretrained``, alone or in a complete pipeline, with a model card."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from sd_erase import __version__, components
from sd_erase.concepts import read_concepts
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.evaluation import stored
from sd_erase.export import compare
from sd_erase.export.job import SHORT, Erased, Job, check_space, sha256
from sd_erase.export.portable import make_portable
from sd_erase.export.text_encoder import write_encoder
from sd_erase.folders import DESKTOP, MARK, entries, mark, mark_of, staging
from sd_erase.formats import prefixed
from sd_erase.hub import loading
from sd_erase.metrics.tables import render_markdown
from sd_erase.progress import Progress
from sd_erase.rundir import RunDir


def export(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Write the folder, load each encoder with transformers' own ``from_pretrained``, compare, and only then give it its name.

    Returns:
        The manifest: "files", one mapping an encoder (as `text_encoder.export`'s), "folder" and "warnings".

    Raises:
        UserError: the target holds something else, or cannot be written.
    """
    job = Job.of(config, run, progress)
    target = _target(job)

    def make() -> dict[str, Any]:
        _check_target(job, target)
        with staging(target.parent) as place:
            folder = place / "new"
            if config.export.pipeline:
                _write_pipeline(job, folder)
            files = []
            for erased in job.encoders:
                files.append(write_encoder(job, erased, folder / erased.name / "model.safetensors"))
                _write_configuration(job, erased, folder / erased.name / "config.json")
            (folder / "README.md").write_text(model_card(job), encoding="utf-8")
            make_portable(folder)
            for erased, entry in zip(job.encoders, files, strict=True):
                entry["difference"] = max(entry["difference"], _check_loaded(job, erased, folder))
                entry["path"] = str(target / erased.name / "model.safetensors")
            mark(folder, "export", {"files": _listing(folder)})
            _replace(target, folder, place / "old")  # which is removed with the temporary folder
        fault = job.links.fault("evaluate")
        warnings = [f"The model card shows no figures: {job.links.sentence(fault, 'evaluate')}"] if fault is not None else []
        return {"files": files, "folder": str(target), "warnings": warnings}

    return job.once([str(target), _measured(job)], make)


def _target(job: Job) -> Path:
    """--output itself, or a folder of a telling name among the run's exports."""
    kind = "pipeline" if job.config.export.pipeline else "diffusers"
    output = Path(job.config.export.output).expanduser() if job.config.export.output else None
    target = output or job.run.export / f"{job.stem}-{kind}-{SHORT[job.config.export.dtype]}"
    if target.suffix == ".safetensors":
        raise UserError(f"Output {target} names a file, but --to diffusers writes a folder: pass one with --output.")
    return target


def _replace(target: Path, folder: Path, old: Path) -> None:
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
        raise UserError(f"Output {target} is being written by another process: run the same command again.") from error


def _listing(folder: Path) -> dict[str, str]:
    """Every file in `folder` but its mark, with its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in {*DESKTOP, MARK})
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _check_target(job: Job, target: Path) -> None:
    """Whether the folder may be written: a new or an empty one, or an export that nobody changed, or any export with --force.

    Raises:
        UserError: it may not, or its parent cannot be written.
    """
    job.check_place(target)
    check_space(target.parent, 0)
    if not target.exists() or (target.is_dir() and not entries(target)):
        return
    known = (mark_of(target) or {}) if target.is_dir() else {}
    if known.get("kind") != "export":
        raise UserError(
            f"Output {target} exists and is not an export of sd-erase, so it stays as it is: pass a new or an empty folder with --output."
        )
    if job.config.export.force:
        return
    found = _listing(target)
    changed = sorted(name for name in found.keys() | known["files"].keys() if found.get(name) != known["files"].get(name))
    if changed:
        raise UserError(
            f"Output {target} was changed since sd-erase wrote it (such as {changed[0]}): move that away, pass another folder with "
            "--output, or pass --force to replace the whole folder."
        )


def _write_pipeline(job: Job, folder: Path) -> None:
    """All parts of the base beside the erased encoders, which replace its own afterwards."""
    import torch

    with job.progress("writing the pipeline") as task:
        pipeline = components.load_pipeline(job.base, getattr(torch, job.config.export.dtype), draws=False)
        size = sum(
            parameter.numel() * parameter.element_size()
            for part in pipeline.components.values()
            if isinstance(part, torch.nn.Module)
            for parameter in part.parameters()
        )
        check_space(folder.parent, size)
        pipeline.save_pretrained(folder, safe_serialization=True)
        task.advance()
    for erased in job.encoders:  # transformers 5.6 and later write names without text_model.
        shutil.rmtree(folder / erased.name)


def _write_configuration(job: Job, erased: Erased, path: Path) -> None:
    """The encoder's configuration, which states the type of the exported numbers: transformers 5 loads in that type."""
    settings = json.loads((erased.folder / "config.json").read_text(encoding="utf-8"))
    settings.pop("dtype", None)  # the successor of torch_dtype, which both versions read
    path.write_text(json.dumps({**settings, "torch_dtype": job.config.export.dtype}, indent=2) + "\n", encoding="utf-8")


def _check_loaded(job: Job, erased: Erased, folder: Path) -> float:
    """The largest relative difference of the hidden states of what transformers loads from the erased encoder's."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def found() -> dict[str, Any]:
        kind = CLIPTextModelWithProjection if erased.encoder.pooled else CLIPTextModel
        with loading(str(folder)):
            model, report = kind.from_pretrained(folder, subfolder=erased.name, output_loading_info=True, use_safetensors=True)
        if report["missing_keys"] or report["unexpected_keys"]:
            raise RuntimeError(f"transformers does not load {folder / erased.name}: {report}")
        return prefixed(model.state_dict())

    return compare.check(erased, found, job.config.export.dtype)


def _measured(job: Job) -> str:
    """The evaluation's tables where they belong to this very encoder, or a sentence that says why there are none."""
    if (fault := job.links.fault("evaluate")) is not None:
        mend = job.links.mend(fault.stage, "evaluate", named=False)
        return f"No figures of this encoder are known ({fault.reason}): {mend}, then export again."
    tables, _, _ = render_markdown(stored(job.run)).partition("## Each prompt")
    return tables.replace("# ", "## ").strip()


def _is_plain(phrase: str) -> bool:
    """Whether a spared use is a phrase rather than a pattern of `concepts`."""
    return not set(phrase) & set("{}|+")


def model_card(job: Job) -> str:
    """The README of an exported folder: what was erased, how, what was measured, how to use it, its limits and licence."""
    concepts = read_concepts(job.run)
    anchors = stated if isinstance(stated := job.trained.get("anchor"), dict) else {}
    erased = [
        f"- **{concept.name}**: {', '.join(concept.phrases)}; in its place "
        + (f'"{anchors.get(concept.name)}"' if anchors.get(concept.name) else "nothing")
        + (f"; spared: {spared}" if (spared := ", ".join(filter(_is_plain, concept.spared))) else "")
        for concept in concepts
    ]
    hub = job.base.source if job.base.source.count("/") == 1 and not Path(job.base.source).exists() else ""
    names = [encoder.name for encoder in job.base.encoders]
    kind = components.pipeline_class(job.base)
    classes = {
        encoder.name: "CLIPTextModelWithProjection" if encoder.pooled else "CLIPTextModel" for encoder in job.base.encoders
    }
    # the type is stated for every part: by default diffusers loads in float32, transformers 5 in the type of the file
    load = "torch_dtype=dtype"
    use = ["import torch", f"from diffusers import {kind}"]
    if job.config.export.pipeline:
        use += ["", f"dtype = torch.{job.config.export.dtype}", f'pipe = {kind}.from_pretrained("THIS_FOLDER", {load})']
    else:
        use += [
            f"from transformers import {', '.join(sorted(set(classes.values())))}",
            "",
            f"dtype = torch.{job.config.export.dtype}",
            f"pipe = {kind}.{'from_single_file' if job.base.source.endswith('.safetensors') else 'from_pretrained'}(",
            f'    "{hub or "BASE_MODEL"}",',
            *(f'    {name}={classes[name]}.from_pretrained("THIS_FOLDER", subfolder="{name}", {load}),' for name in names),
            f"    {load},",
            ")",
        ]
    measured = _measured(job)
    # the front matter that the hub reads
    front = ["---", "license: other", f"license_name: {job.base.licence}", "library_name: diffusers"]
    if hub:
        front.append(f"base_model: {hub}")
    front += ["tags: [concept-erasure, machine-unlearning, stable-diffusion]", "---", ""]
    return "\n".join(
        [
            *front,
            f"# {job.base.title if job.base.source != job.base.title else job.base.name} without {job.concept}",
            "",
            f"The text encoder{'s' * (len(names) > 1)} of {job.base.name}, from which sd-erase {__version__} erased:",
            "",
            *erased,
            "",
            "## How",
            "",
            f"Objective `{job.objective}`, {job.trained.get('steps', '?')} steps, seed {job.config.seed}, ended {job.date}, run "
            f"`{job.run.name}`"
            + (f", LoRA of rank {job.trained['lora_rank']}." if job.trained.get("lora_rank") else ".")
            + " The denoiser and the autoencoder are unchanged.",
            "",
            "## Measured",
            "",
            measured,
            "",
            "## Use",
            "",
            "```python",
            *use,
            "```",
            "",
            "## Limits",
            "",
            "- The denoiser still knows the concept: another text encoder, or a trained embedding (textual inversion), brings it "
            "back. This protects what is published or hosted, not a file in the hands of somebody who wants to undo it.",
            "- Words and paraphrases that were neither listed nor tried may still lead to the concept.",
            "- What was not measured above is not known.",
            "",
            "## Licence",
            "",
            f"The base model's licence governs this derivative too: {job.base.licence}.",
            "",
        ]
    )
