"""What the calls of `sd_erase.api` return: typed, and shown as a table where a notebook asks for HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sd_erase.api import html
from sd_erase.config import override
from sd_erase.errors import UserError, unknown_choice
from sd_erase.progress import Progress

if TYPE_CHECKING:
    from sd_erase.api.scratch import Scratch

Model = TypeVar("Model")


@dataclass(frozen=True)
class Erasure(Generic[Model]):
    """A model without a concept, and what is known of how it was made.

    Attributes:
        model: of the class of the model that was passed.
        concepts: what was erased.
        anchors: concept -> what stands in its place, "" for nothing.
        method: the objective.
        base: what the model is called.
        steps: of the training; 0 where it was solved in closed form.
        best_step: whose weights these are.
        before, after: loss terms on captions that were not trained on, before the first step (empty where nothing was measured then) and
            of `model`.
        names: concept -> words that the model itself read as the concept and no card lists, which were erased with it.
        seconds: of the training.
        warnings: a sentence each.
    """

    model: Model = field(repr=False)
    concepts: tuple[str, ...]
    anchors: Mapping[str, str]
    method: str
    base: str
    steps: int
    best_step: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    names: Mapping[str, str]
    seconds: float
    warnings: tuple[str, ...]
    _scratch: Scratch = field(repr=False, compare=False)

    def save(
        self,
        path: str | Path,
        form: str = "comfyui",
        *,
        dtype: str = "float16",
        checkpoint: str | Path = "",
        rank: int = 0,
        pipeline: bool = False,
        force: bool = False,
        progress: bool | Progress = False,
    ) -> Path:
        """Write the erased encoder for a program; it is loaded back and compared before it gets its name.

        Args:
            path: a folder, or the ``.safetensors`` file of a form that writes one.
            form: "comfyui", "forge", "lora", "lora-diff", "diffusers" or "a1111" (`sd_erase.catalog.EXPORTS`).
            dtype: "float16", "float32" or "bfloat16".
            checkpoint: of "a1111": the one-file checkpoint whose encoder is exchanged.
            rank: of "lora"; 0 is 64.
            pipeline: of "diffusers": the complete pipeline beside the encoders.
            force: replace a file that sd-erase did not write.
            progress: bars on stderr, or a progress of your own.

        Returns:
            The file, or the folder where there are several.

        Raises:
            UserError: an unknown form, or a target that cannot be written.

        Example:
            >>> file = erased.save(folder / "bicycle.safetensors", "comfyui")
            >>> file.name, file.stat().st_size > 10**7
            ('bicycle.safetensors', True)
        """
        from sd_erase.api.scratch import shown
        from sd_erase.catalog import EXPORTS
        from sd_erase.preflight import check
        from sd_erase.stages import output_of

        if form not in EXPORTS:
            raise unknown_choice("Form", form, EXPORTS)
        asked = {"to": form, "output": str(Path(path).expanduser().absolute()), "dtype": dtype, "checkpoint": str(checkpoint), "rank": rank,
                 "pipeline": pipeline, "force": force}  # fmt: skip
        scratch = self._scratch
        config = override(scratch.config, {f"export.{name}": value for name, value in asked.items()})
        names = {f"export.{name}": name for name in ("checkpoint", "rank", "pipeline") if asked[name]}
        check(config, ("export",), names)
        if form == "a1111" and not checkpoint:
            raise UserError(
                "Form 'a1111' exchanges the encoder of a checkpoint, and a model in memory is none: pass checkpoint=."
            )
        if pipeline:
            scratch.complete()
        result = scratch.do("export", shown(progress), config)
        return output_of("export", scratch.run, result)

    def _repr_html_(self) -> str:
        lines = [(name, self.anchors.get(name, "") or "nothing", self.names.get(name, "")) for name in self.concepts]
        terms = [
            (name, f"{self.before[name]:.3g}" if name in self.before else "–", f"{value:.3g}")
            for name, value in self.after.items()
        ]
        return html.block(
            f"{self.base} without {', '.join(self.concepts)} ({self.method}, {self.steps} steps, {self.seconds:.0f} s)",
            html.table(("erased", "in its place", "erased with it"), lines),
            html.table(("loss term", "before", "after"), terms),
            warnings=self.warnings,
        )


@dataclass(frozen=True)
class Rate:
    """A share with its Wilson 95 % interval; `rate` is None where `n` is 0."""

    count: int
    n: int
    rate: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Rate | None:
        """Of a mapping as `metrics.rates.share` makes it."""
        return None if values is None else cls(**{name: values[name] for name in ("count", "n", "rate", "low", "high")})

    def __str__(self) -> str:
        return "–" if self.rate is None else f"{self.rate:.1%} [{100 * self.low:.0f}–{100 * self.high:.0f}] of {self.n}"


@dataclass(frozen=True)
class Row:
    """How often one thing was found in the images of both models.

    Attributes:
        role: "target" (an erased concept), "target_named" (over the images whose prompt names it), "others" (all other named objects
            together) or "object" (one of them).
        p_value: McNemar's, exact: that both rates are equal.
    """

    name: str
    role: str
    original: Rate | None
    erased: Rate | None
    p_value: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a detector finds in the images of the original and of the erased model, drawn from the same noise.

    Attributes:
        concepts: what was erased.
        prompts, images: how many, of each model.
        rows: erased concepts first.
        warnings: what stands against believing the figures, first.
        detector: the card's name.
        contact: a PNG with the first image of the first prompts, the original's above the erased model's.
        folder: where the images lie, if they were to be kept.
    """

    concepts: tuple[str, ...]
    prompts: int
    images: int
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    detector: str
    seconds: float
    contact: bytes = field(repr=False)
    folder: Path | None = None

    def _repr_html_(self) -> str:
        cells = [(row.name, row.original or "–", row.erased or "–") for row in self.rows]
        return html.block(
            f"{', '.join(self.concepts)}: {self.images} images of each model, {self.prompts} prompts, detector {self.detector}",
            html.table(("found", "original", "erased"), cells),
            html.picture(self.contact, "the original's images above the erased model's"),
            warnings=self.warnings,
        )


@dataclass(frozen=True)
class Audit:
    """A report card: whether a concept is really gone.

    Attributes:
        answer: "gone", "returns", "open" or "untold".
        verdict: one sentence made of the figures.
        concept: whose return was looked for.
        card: the whole card, as Markdown.
        figures: all of it, as ``audit.json`` holds it.
        warnings: a sentence each.
        folder: where the images lie, if they were to be kept.
    """

    answer: str
    verdict: str
    concept: str
    card: str = field(repr=False)
    figures: Mapping[str, Any] = field(repr=False)
    warnings: tuple[str, ...]
    folder: Path | None = None

    def _repr_html_(self) -> str:
        attempts = [
            (probe["asks"] + (f": {row['variant']}" if row["variant"] else ""), *(Rate.of(row[side]) or "–" for side in ("erased", "control")))
            for probe in self.figures["probes"]
            if probe["group"] != "collateral"
            for row in probe["rows"]
            if row["works"]
        ]  # fmt: skip
        return html.block(
            self.verdict, html.table(("attempt", f"{self.concept} found", "control"), attempts), warnings=self.warnings
        )
