"""Prompts and seeds into images, by the original and by the erased model from the same noise.

Reads: the run's erased encoder. Writes ``images/{original,erased}/0007-seed42.png``, ``images/index.jsonl`` (one row an
image pair, paths relative to ``images/``, with each file's ``sha256``) and ``images/contact.png``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd_erase import bases, chain, digests, parallel, resources
from sd_erase.asked import prompt_files
from sd_erase.catalog import SCHEDULERS
from sd_erase.config import RunConfig
from sd_erase.drawing import Batches, Job, Settings, arrange, is_drawn, precision, save_png
from sd_erase.progress import NoProgress, Progress
from sd_erase.prompts import Prompt, read_prompt_files
from sd_erase.rundir import RunDir, fingerprint, write_jsonl_atomic

CONTACT_PROMPTS = 8
XFORMERS, SDPA = "xformers", "PyTorch SDPA"


def overlong_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """One sentence for each prompt that does not fit the text encoder, with the words that it will not see."""
    warnings = []
    for number, prompt in enumerate(prompts, start=1):
        ids = tokenizer(prompt.text, truncation=False, verbose=False).input_ids
        length = tokenizer.model_max_length
        if len(ids) > length:
            cut = tokenizer.decode(ids[length - 1 : -1]).strip()
            warnings.append(f"Prompt {number} has {len(ids)} tokens, the text encoder reads {length}: cut off were {cut!r}.")
    return warnings


def _jobs(prompts: Sequence[Prompt], settings: Settings) -> list[Job]:
    return [
        Job(index, prompt.text, (settings.seed if prompt.seed is None else prompt.seed) + number)
        for index, prompt in enumerate(prompts)
        for number in range(settings.images_per_prompt)
    ]


def generate_pairs(
    original_pipeline: Any,
    erased_pipeline: Any | None,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: Settings,
    *,
    stamps: dict[str, str] | None = None,
    about: dict[str, dict[str, str]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw `prompts` with both pipelines from the same noise, and write the PNGs, the index and the contact sheet.

    An image's noise is drawn on the CPU from a generator of its own, so that it depends neither on the batch nor on the
    device. On a CPU its pixels depend on its prompt and seed alone; on a card they depend on the batch too (measured: all within
    61 dB), which the counts name. An image whose file carries the same stamp (of everything that it depends on) is not drawn again.

    Args:
        original_pipeline: a Stable Diffusion pipeline.
        erased_pipeline: the same with the erased encoder, or None for the original's images alone.
        prompts: what to draw.
        folder: where ``original/``, ``erased/``, ``index.jsonl`` and ``contact.png`` are written.
        settings: how to draw.
        stamps: "original" and "erased": fingerprints of the weights; without one, images are always drawn.
        about: "original" and "erased": further text for the PNGs ("encoder", "base").
        progress: told of each image.

    Returns:
        Counts (``images``, ``drawn``, ``reused``), ``batch_size`` (the smallest that memory forced), ``layout`` (of the
        weights in memory), ``scheduler`` and ``warnings``.

    Raises:
        UserError: a single image does not fit into memory.
    """
    progress = progress or NoProgress()
    stamps, about = stamps or {}, about or {}
    jobs = _jobs(prompts, settings)
    roles = {"original": original_pipeline} | ({} if erased_pipeline is None else {"erased": erased_pipeline})
    drawn, batches = 0, Batches(settings.batch_size)
    for role, pipeline in roles.items():
        with _scheduler(pipeline, settings.scheduler) as scheduler_name:
            text = {"encoder": role, "scheduler": scheduler_name, **about.get(role, {})}
            with progress(f"{role} images", len(jobs)) as task:
                drawn += _draw_missing(pipeline, jobs, folder / role, settings, stamps.get(role, ""), text, batches, task.advance)
    if not parallel.is_main():
        return {}
    rows = [
        {
            "prompt_index": job.prompt_index,
            "prompt": job.prompt,
            "seed": job.seed,
            **{role: f"{role}/{job.file_name}" if role in roles else None for role in ("original", "erased")},
            "sha256": {role: digests.of_file(folder / role / job.file_name) for role in roles},
        }
        for job in jobs
    ]
    write_jsonl_atomic(folder / "index.jsonl", rows)
    contact_sheet(rows, folder, folder / "contact.png")
    return {
        "images": len(jobs) * len(roles),
        "drawn": drawn,
        "reused": len(jobs) * len(roles) - drawn,
        "batch_size": batches.size,
        "layout": arrange(original_pipeline),
        "scheduler": scheduler_name,
        "warnings": overlong_prompts(original_pipeline.tokenizer, prompts),
    }


def draw(
    pipeline: Any,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: Settings,
    *,
    stamp: str = "",
    progress: Progress | None = None,
) -> list[Path]:
    """Draw `prompts` with one pipeline into `folder`, as `generate_pairs` does; returns the PNGs, prompt by prompt.

    Args:
        stamp: a fingerprint of the weights; without one, images are always drawn.
    """
    jobs = _jobs(prompts, settings)
    with _scheduler(pipeline, settings.scheduler) as name, (progress or NoProgress())(folder.name, len(jobs)) as task:
        _draw_missing(pipeline, jobs, folder, settings, stamp, {"scheduler": name}, Batches(settings.batch_size), task.advance)
    return files_of(prompts, folder, settings)


def files_of(prompts: Sequence[Prompt], folder: Path, settings: Settings) -> list[Path]:
    """The PNGs that `draw` makes of these prompts, prompt by prompt."""
    return [folder / job.file_name for job in _jobs(prompts, settings)]


def _draw_missing(
    pipeline: Any,
    jobs: Sequence[Job],
    folder: Path,
    settings: Settings,
    stamp: str,
    text: dict[str, str],
    batches: Batches,
    advance: Callable[[int], None],
) -> int:
    """Draw the jobs whose PNGs are missing or of another stamp; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    look = dataclasses.asdict(settings)
    for name in ("seed", "images_per_prompt", "batch_size"):  # no pixel depends on these beyond the image's own seed
        del look[name]
    stamp_of = {job: fingerprint(stamp, look, job.prompt, job.seed) if stamp else "" for job in jobs}
    missing = parallel.agreed(lambda: [job for job in jobs if not is_drawn(folder / job.file_name, stamp_of[job])])
    if settings.clip_skip:
        _enable_clip_skip(pipeline.text_encoder)
    text = text | {
        "negative_prompt": settings.negative_prompt,
        "steps": str(settings.steps),
        "guidance": str(settings.guidance),
        "clip_skip": str(settings.clip_skip),
    }
    advance(len(jobs) - len(missing))
    mine = parallel.share(missing, min(batches.size, -(-len(missing) // parallel.size()) or 1))

    def save(job: Job, image: Any) -> None:
        own = {"prompt": job.prompt, "seed": str(job.seed), "inputs": stamp_of[job]}
        save_png(image, folder / job.file_name, {key: value for key, value in (text | own).items() if value})

    batches.write(pipeline, mine, settings, save, advance)
    parallel.barrier()
    advance(len(missing) - len(mine))
    return len(missing)


@contextmanager
def _scheduler(pipeline: Any, name: str) -> Iterator[str]:
    """Give the pipeline the named scheduler for a while; yields its class's name."""
    own, class_name = pipeline.scheduler, SCHEDULERS[name]
    if class_name is not None:
        import diffusers

        pipeline.scheduler = getattr(diffusers, class_name).from_config(own.config)
    try:
        yield type(pipeline.scheduler).__name__
    finally:
        pipeline.scheduler = own


def _enable_clip_skip(text_encoder: Any) -> None:
    """Let diffusers find the final norm: for clip-skip it reads ``text_model``, which transformers 5.6 flattened away.

    The name is set beside the module's registry, so that neither its modules nor its state dict change.
    """
    if not hasattr(text_encoder, "text_model"):
        text_encoder.__dict__["text_model"] = text_encoder


def contact_sheet(rows: Sequence[dict[str, Any]], folder: Path, path: Path, prompts: int = CONTACT_PROMPTS) -> None:
    """Write a sheet with the first image of the first `prompts` prompts: the original's above the erased model's.

    Args:
        rows: the index's rows; their paths are relative to `folder`.
        folder: the run's ``images/``.
        path: the PNG to write.
        prompts: how many columns at most.
    """
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["prompt_index"], row)
    columns = list(first.values())[:prompts]
    roles = [role for role in ("original", "erased") if all(row[role] for row in columns)]
    sheet([row["prompt"] for row in columns], {role: [folder / row[role] for row in columns] for role in roles}, path)


def sheet(captions: Sequence[str], rows: dict[str, Sequence[Path]], path: Path) -> None:
    """Write a PNG with a grid of images: `captions` above the columns, the names of `rows` at the left."""
    from PIL import Image, ImageDraw, ImageFont

    side, gap, margin, lines = 192, 10, 16, 4
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    label_width = max(76, 16 + round(max(font.getlength(name) for name in rows)))
    caption_height = lines * 16 + 6
    width = margin * 2 + label_width + len(captions) * (side + gap) - gap
    canvas = Image.new("RGB", (width, margin * 2 + caption_height + len(rows) * (side + gap) - gap), "white")
    pen = ImageDraw.Draw(canvas)
    for column, text in enumerate(captions):
        left = margin + label_width + column * (side + gap)
        caption = _wrap(text, lambda text: pen.textlength(text, font=small), side, lines)
        pen.multiline_text((left, margin + caption_height - 6), caption, fill="#333333", font=small, spacing=4, anchor="ld")
        for number, files in enumerate(rows.values()):
            with Image.open(files[column]) as image:
                picture = image.convert("RGB")
            scale = side / max(picture.size)
            # few pixels are enlarged sharply: a smoothed 64-pixel image is a blur
            method = Image.Resampling.NEAREST if scale > 1.5 else Image.Resampling.LANCZOS
            picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), method)
            top = margin + caption_height + number * (side + gap)
            canvas.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    for number, name in enumerate(rows):
        middle = margin + caption_height + number * (side + gap) + side // 2
        pen.text((margin, middle), name, fill="#111111", font=font, anchor="lm")
    save_png(canvas, path, {"Software": "sd-erase"})


def _wrap(text: str, length: Callable[[str], float], width: float, lines: int) -> str:
    """`text` broken at words into at most `lines` lines of `width` pixels, with an ellipsis where it is cut."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if length(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        elif len(wrapped) < lines:
            wrapped.append(word)
        else:
            wrapped[-1] = f"{wrapped[-1]} …"
            break
    return "\n".join(wrapped)


def enable_fast_attention(pipeline: Any) -> str:
    """xformers where a real call of it works on the pipeline's CUDA device, else PyTorch's own; says which."""
    if pipeline.device.type != "cuda":
        return SDPA
    found = working_attention(pipeline.device, pipeline.unet.dtype)
    if found == XFORMERS:
        try:
            pipeline.enable_xformers_memory_efficient_attention()
        except Exception as error:  # whatever a mismatched binary raises, the fallback is right
            return f"{SDPA} (xformers: {type(error).__name__})"
    return found


def working_attention(device: Any, dtype: Any) -> str:
    """The fastest attention that works on a `torch.device`: an installed xformers can still lack kernels for this torch or this card, which
    only a call shows."""
    import torch

    if device.type != "cuda":
        return SDPA
    try:
        from xformers.ops import memory_efficient_attention

        query = torch.zeros(1, 64, 8, 40, device=device, dtype=dtype)
        memory_efficient_attention(query, query, query)
    except Exception as error:  # whatever a mismatched binary raises, the fallback is right
        return f"{SDPA} (xformers: {type(error).__name__})"
    return XFORMERS


def generate(config: RunConfig, run: RunDir, progress: Progress | None = None, *, original_only: bool = False) -> dict[str, Any]:
    """Draw the configured prompts with the original and with the run's erased encoder.

    Args:
        config: the run's configuration; section ``generate``.
        run: where the erased encoder lies and the images go.
        progress: told of each image.
        original_only: draw no erased images (for a run that is not trained).

    Returns:
        The manifest "generate": counts, settings, seconds, attention, warnings.

    Raises:
        UserError: a bad setting, prompts file or base, no trained encoder, or one that is not what its training wrote.
    """
    import torch

    from sd_erase.pipeline import erased_pipeline, load_original

    links = chain.Chain(run, config, progress)
    if not original_only:
        run.require("train", "train")
        links.require("train")
    base = bases.resolve(config.base)
    bases.check_draws(base)
    settings = Settings.of(config, base)
    wanted, made = parallel.agreed(lambda: prompt_files(config, run))
    prompts, files, notes = read_prompt_files(wanted)
    device = resources.device(config.device)
    dtype = precision(base, device)

    names = [row["file"] for row in files]

    def reads(now: chain.Chain) -> dict[str, Any]:
        erased = {} if original_only else {"encoder": now.now("encoder")}
        return {"base": now.now("base"), **erased, "prompts": chain.prompts(names)}

    def inputs(read: dict[str, Any]) -> str:
        weights = (read["base"], read.get("encoder"), device.type, str(dtype))
        return fingerprint(weights, dataclasses.asdict(settings), [dataclasses.astuple(prompt) for prompt in prompts])

    if run.is_complete("generate", inputs(reads(links))) and links.holds("generate"):
        return run.read_manifest("generate") or {}
    started = time.perf_counter()
    original = load_original(base, device, dtype)
    attention = enable_fast_attention(original)
    erased = None if original_only else erased_pipeline(original, run)
    read = reads(chain.Chain(run, config, progress))  # only now does a hub's model surely lie here
    stamps = {"original": fingerprint(read["base"] or base.source, device.type, str(dtype))}
    about = {"original": {"encoder": "original", "base": base.name}}
    if not original_only:
        encoder = fingerprint(read["encoder"])
        stamps["erased"] = fingerprint(stamps["original"], encoder)
        about["erased"] = {"encoder": f"erased: {', '.join(config.concepts)} ({run.name}, {encoder})", "base": base.name}
    if parallel.is_main():
        run.reopen("generate")  # not before the models are there: a wrong base must not cost the images that are done
    result = generate_pairs(original, erased, prompts, run.images, settings, stamps=stamps, about=about, progress=progress)
    if not parallel.is_main():
        return {}
    manifest = run.complete(
        "generate",
        inputs(read),
        {
            **dataclasses.asdict(settings),
            **result,
            "warnings": [*base.notes, *made, *notes, *result["warnings"]],
            **({"model": base.about} if base.about else {}),
            "prompts": len(prompts),
            "prompt_files": files,
            "base": base.name,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "attention": attention,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else None,
            "contact": "images/contact.png",
            "from": read,
            "made": links.makes("generate"),
        },
    )
    chain.retire(run, config)
    return manifest
