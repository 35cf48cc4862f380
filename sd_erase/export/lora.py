"""The erasure as a LoRA in kohya's naming, for ComfyUI, A1111, Forge and diffusers, and its exact form ``.diff``.

A LoRA holds changes of the linear layers' weights only. One alpha stands for the whole file and equals the rank: diffusers
mis-scales files with mixed ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd_erase import components, formats
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export import compare
from sd_erase.export.job import SHORT, Erased, Job, save, sha256
from sd_erase.export.modelspec import kohya_version, modelspec
from sd_erase.formats import linear_modules, lora_name
from sd_erase.lora import add_lora
from sd_erase.progress import Progress
from sd_erase.rundir import RunDir

MAX_LOSS = 0.1  # share of the weights' change that an extracted LoRA may lose, in the Frobenius norm
DEFAULT_RANK = 64
# how far the numbers of a LoRA, rounded to its type, may put the hidden states from those of the numbers before rounding
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.05}


def export(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Write the LoRA that was trained, or one extracted from the change of all weights (truncated SVD; Eckart and Young 1936).

    Returns:
        The manifest: "files" with one mapping (as `text_encoder.export`'s, and "rank" and "residual", the share of the
        weights' change that is lost).

    Raises:
        UserError: more than linear weights changed, or the rank loses more than `MAX_LOSS` and --force is not given.
    """
    job = Job.of(config, run, progress)
    rank = config.export.rank or int(job.trained.get("lora_rank") or 0) or DEFAULT_RANK
    trained = all(run.lora(erased.name).is_file() for erased in job.encoders)
    exact = trained and rank == job.trained.get("lora_rank")

    def make() -> dict[str, Any]:
        originals = {erased: _original(job, erased, ("weight",)) for erased in job.encoders}
        tensors: dict[str, Callable[[], Any]] = {}
        losses: dict[int, float] = {}
        if exact:
            for erased in job.encoders:
                tensors |= _trained(run.lora(erased.name), erased, _place(job, erased))
            losses[rank] = 0.0
        else:
            tensors, losses = _extracted(job, originals, rank)
        loss = losses[rank]
        if loss > MAX_LOSS and not config.export.force:
            enough = min((count for count, share in losses.items() if share <= MAX_LOSS), default=max(losses))
            raise UserError(
                f"A LoRA of rank {rank} loses {100 * loss:.0f} % of the change of the weights (limit {100 * MAX_LOSS:.0f} %): "
                f"pass --rank {enough}, --to lora-diff for the exact change, or --force; or train with --lora-rank."
            )
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(rank),
            "sd_erase.residual": f"{loss:.6g}",
        }
        return {"files": [_write(job, originals, tensors, "lora", metadata, {"rank": rank, "residual": loss})]}

    return job.once([rank], make, [_target(job, "lora")])


def export_diff(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Write the exact change of every linear layer (``.diff``, and ``.diff_b`` where a bias changed); diffusers refuses it.

    Returns:
        The manifest, as `text_encoder.export`'s with one file.

    Raises:
        UserError: more than linear layers changed.
    """
    job = Job.of(config, run, progress)

    def make() -> dict[str, Any]:
        originals = {erased: _original(job, erased, ("weight", "bias")) for erased in job.encoders}
        tensors: dict[str, Callable[[], Any]] = {}
        for erased, original in originals.items():
            place = _place(job, erased)

            def change(key: str, erased: Erased = erased, original: dict[str, Any] = original) -> Any:
                return erased.tensor(key).float() - original[key].float()

            for module in linear_modules(erased.layers):
                name = lora_name(module, place)
                tensors[f"{name}.diff"] = functools.partial(change, f"{module}.weight")
                if change(f"{module}.bias").any():  # alone it makes A1111 reject the file, so it never comes without .diff
                    tensors[f"{name}.diff_b"] = functools.partial(change, f"{module}.bias")
        return {"files": [_write(job, originals, tensors, "lora-diff", {}, {})]}

    return job.once([], make, [_target(job, "lora-diff")])


def _place(job: Job, erased: Erased) -> formats.Place:
    return next(place for place in formats.PLACES[job.base.family] if place.encoder == erased.name)


def _original(job: Job, erased: Erased, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The base's own encoder, from which only linear layers may differ.

    Args:
        kinds: "weight" and, where they can be carried, "bias".

    Raises:
        UserError: other tensors changed too, or the base is another one.
    """
    import torch

    original = components.text_encoder_state(job.base, erased.encoder)
    unlike = [key for key in erased.keys if key not in original or original[key].shape != erased.tensor(key).shape]
    if unlike:
        raise UserError(f"Base {job.base.name} does not fit the run's {erased.name} ({unlike[0]}): pass the run's --base.")
    carried = {f"{module}.{kind}" for module in linear_modules(erased.layers) for kind in kinds}
    lost = [
        key for key in erased.keys if key not in carried and not torch.equal(original[key].float(), erased.tensor(key).float())
    ]
    if lost:
        linear = "weights and biases" if "bias" in kinds else "weights"
        raise UserError(
            f"A {job.config.export.to} file cannot hold the change of {len(lost)} tensors, first {lost[0]} (objective "
            f"{job.objective} changes more than linear {linear}): pass --to comfyui, a1111 or diffusers."
        )
    return original


def _trained(path: Path, erased: Erased, place: formats.Place) -> dict[str, Callable[[], Any]]:
    """The factors of a LoRA training, as they are."""
    names = set(formats.read_header(path).tensors)
    tensors: dict[str, Callable[[], Any]] = {}
    for module in linear_modules(erased.layers):
        source = module if f"{module}.up.weight" in names else module.removeprefix(formats.PREFIX)  # transformers 5.6
        factors = formats.read_tensors(path, [f"{source}.up.weight", f"{source}.down.weight"])
        rank = factors[f"{source}.down.weight"].shape[0]
        name = lora_name(module, place)
        tensors |= _module(name, factors[f"{source}.up.weight"], factors[f"{source}.down.weight"], rank)
    return tensors


def _module(name: str, up: Any, down: Any, rank: int) -> dict[str, Callable[[], Any]]:
    """One layer's tensors, in the order by which InvokeAI tells a LoRA of SDXL: alpha, up, down."""
    import torch

    return {
        f"{name}.alpha": lambda: torch.tensor(float(rank)),
        f"{name}.lora_up.weight": lambda: up,
        f"{name}.lora_down.weight": lambda: down,
    }


def _extracted(
    job: Job, originals: dict[Erased, dict[str, Any]], rank: int
) -> tuple[dict[str, Callable[[], Any]], dict[int, float]]:
    """Factors of the largest `rank` singular values of each layer's change, and what each rank would lose.

    The singular vectors are the eigenvectors of the change's Gram matrix, which is many times faster than an SVD; float64
    keeps them accurate.
    """
    import torch

    tensors: dict[str, Callable[[], Any]] = {}
    total, lost = 0.0, torch.zeros(1, dtype=torch.float64)
    with job.progress("singular values", sum(len(linear_modules(erased.layers)) for erased in originals)) as task:
        for erased, original in originals.items():
            for module in linear_modules(erased.layers):
                change = (erased.tensor(f"{module}.weight").float() - original[f"{module}.weight"].float()).double()  # [out, in]
                wide = change.shape[1] > change.shape[0]
                squares, vectors = torch.linalg.eigh(change @ change.T if wide else change.T @ change)
                squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
                kept = min(rank, len(squares))
                roots = squares[:kept].pow(0.25)  # half of each singular value on either side: nothing underflows in fp16
                basis = vectors[:, :kept]
                scaled = torch.where(roots > 0, 1 / roots, 0)
                if wide:
                    up, down = basis * roots, (basis * scaled).T @ change
                else:
                    up, down = change @ basis * scaled, (basis * roots).T
                # a layer with fewer singular values than the rank gets zeros: the rank is one for the whole file
                up = torch.nn.functional.pad(up, (0, rank - kept)).float()
                down = torch.nn.functional.pad(down, (0, 0, 0, rank - kept)).float()
                tensors |= _module(lora_name(module, _place(job, erased)), up, down, rank)
                tail = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])  # what each rank from 0 on loses
                longest = max(len(tail), len(lost))
                lost = torch.nn.functional.pad(lost, (0, longest - len(lost))) + torch.nn.functional.pad(
                    tail, (0, longest - len(tail))
                )
                total += float(change.square().sum())
                task.advance()
    if not total:
        raise UserError(
            f"Run {job.run} changed no weight, so there is nothing to extract: run {job.run.command('train')} with more --steps."
        )
    losses = {count: float((share / total).clamp_min(0).sqrt()) for count, share in enumerate(lost) if count}
    return tensors, {**losses, rank: losses.get(rank, 0.0)}


def _target(job: Job, kind: str) -> Path:
    return job.target(f"{job.stem}-{kind}-{SHORT[job.config.export.dtype]}.safetensors")


def _typed(make: Callable[[], Any], dtype: Any) -> Any:
    return make().to(dtype).contiguous()


def _write(
    job: Job,
    originals: dict[Erased, dict[str, Any]],
    tensors: dict[str, Callable[[], Any]],
    kind: str,
    metadata: dict[str, str],
    entry: dict[str, Any],
) -> dict[str, Any]:
    """Write one file for all encoders, add it to the originals as a program would, and compare."""
    import torch

    dtype = getattr(torch, job.config.export.dtype)
    target = _target(job, kind)
    typed = {name: functools.partial(_typed, make, dtype) for name, make in tensors.items()}
    size = sum(make().numel() for make in tensors.values()) * dtype.itemsize
    if not all(make().isfinite().all() for make in typed.values()):
        raise UserError(f"The change of the weights does not fit {job.config.export.dtype}: pass --dtype float32.")
    sd2 = job.base.family == "sd2"
    metadata = {
        "format": "pt",
        **modelspec(
            f"{job.concept} erased from {job.base.name}",
            f"{'LoRA' if kind == 'lora' else 'Exact change (.diff)'} of the CLIP text encoder with which sd-erase erases {job.concept} (objective {job.objective}).",
            job.base,
            "lora",
            job.date,
        ),
        "ss_base_model_version": kohya_version(job.base),
        "ss_v2": str(sd2),
        "ss_output_name": target.stem,
        **metadata,
        **job.provenance(),
    }
    with job.written(target, size) as temporary:
        digest = save(temporary, typed, job.config.export.dtype, metadata)

        def found(erased: Erased) -> dict[str, Any]:
            names = {each.name: original for each, original in originals.items()}
            state = add_lora(names, temporary)[erased.name]
            return {key: state[key] for key in erased.keys}

        difference = max(compare.compare(erased, functools.partial(found, erased)) for erased in job.encoders)
        # an extracted LoRA differs by what its rank loses, which was judged before
        if not difference <= TOLERANCE[job.config.export.dtype] and not entry.get("residual"):
            raise UserError(f"The encoder changes by {difference:.2g} as {job.config.export.dtype}: pass --dtype float32.")
    return {
        "path": str(target),
        "encoder": " + ".join(erased.name for erased in job.encoders),
        "tensors": len(tensors),
        "bytes": target.stat().st_size,
        "dtype": job.config.export.dtype,
        "sha256": sha256(target),
        "data_sha256": digest,
        "difference": difference,
        **entry,
    }
