"""Where the probes draw: the original and the audited model side by side, from the same noise, with what was drawn kept on disk.

Every image is stored under ``images/PROBE/ARM/`` with a stamp of all that it depends on, so that an interrupted audit goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import digests
from sd_erase.attacks.stage import references
from sd_erase.auditing.probe import NotTried
from sd_erase.auditing.subject import Subject
from sd_erase.clip import Towers, load_towers, pooled_phrases
from sd_erase.detection import Detection, Detector
from sd_erase.drawing import Job, Settings, is_drawn, save_png
from sd_erase.erasure import names
from sd_erase.erasure.pseudo_words import embedding, vocabulary
from sd_erase.erasure.sd import redirect
from sd_erase.errors import UserError
from sd_erase.evaluation import Picture, detect_files
from sd_erase.images import draw, files_of
from sd_erase.progress import NoProgress, Progress
from sd_erase.prompts import Prompt
from sd_erase.rundir import fingerprint

if TYPE_CHECKING:
    import torch

# how far on the way from the anchor's state to the concept's a word has to stand to be read as the concept
READ = 0.5


@dataclass(frozen=True)
class Share:
    """How much of each probe is done.

    Attributes:
        images: of each arm of a question asked in words.
        few: of each arm where the conditions vary (samplers, positions), and of each class.
        searched: prompts that a search attacks.
        effort: what a search's own steps are multiplied by.
    """

    images: int
    few: int
    searched: int
    effort: float


SHARES = {"quick": Share(16, 8, 4, 0.25), "default": Share(24, 12, 6, 1.0), "full": Share(96, 48, 24, 2.0)}


@dataclass(frozen=True)
class Images:
    """What was drawn: of each image its file, what was found in it, and whether it is of a single colour."""

    prompts: Sequence[str]
    paths: Sequence[Path]
    found: Sequence[Sequence[Detection]]
    pictures: Sequence[Picture]

    def shows(self, labels: frozenset[str]) -> list[bool]:
        """Whether each image shows any of `labels`; those of a single colour, where numbers overflowed, are left out."""
        kept = zip(self.found, self.pictures, strict=True)
        return [any(each.label in labels for each in one) for one, picture in kept if not picture.flat]


@dataclass(frozen=True)
class Batch:
    """Images to draw at once: prompts, the noise of each [batch, channels, height, width], a generator each, and their numbers."""

    prompts: list[str]
    noise: torch.Tensor
    generators: list[torch.Generator]
    numbers: list[int]


Make = Callable[[Batch], list[Any]]  # PIL images


@dataclass
class Bench:
    """What every probe works with."""

    subject: Subject
    original: Any  # pipelines
    erased: Any
    detector: Detector
    labels: frozenset[str]  # the concept's, of those that the detector knows
    settings: Settings
    share: Share
    folder: Path
    prompts: list[str]  # that name the concept, and no other thing that was erased with it
    progress: Progress
    place: str = ""  # of the probe at work among all, for the progress
    kept: dict[str, Images] = dataclasses.field(default_factory=dict)

    # --- words --------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def towers(self) -> Towers:
        """The base's first text encoder, frozen, with the CLIP partner where one is at hand."""
        return load_towers(self.subject.base, self.original.device, need_images=False)

    def sentences(self, count: int) -> list[str]:
        """`count` prompts that name the concept, spread over the list and repeated where it is shorter."""
        every = self.prompts[:: max(1, len(self.prompts) // count)]
        return [every[number % len(every)] for number in range(count)]

    def worded(self, words: Sequence[str], count: int) -> list[str]:
        """The prompts with `words`, in turn, in the place of the concept's own; an article that no longer fits is changed."""
        return [self.with_word(text, words[number % len(words)]) for number, text in enumerate(self.sentences(count))]

    def with_word(self, text: str, word: str) -> str:
        """`text` with `word` in the place of the concept's words ("" removes them)."""
        spans = [(match.start, match.end) for match in self.subject.concept.find(text)]
        return redirect(text, spans, word).target

    def anchored(self, texts: Sequence[str]) -> list[str]:
        """The prompts with the anchor in the concept's place."""
        return [self.with_word(text, self.subject.anchor) for text in texts]

    @functools.cached_property
    def tokens(self) -> list[int]:
        """The tokens that a search may use: whole words of the vocabulary that the base tells apart, without the card's own words."""
        tokenizer, table = self.original.tokenizer, embedding(self.original.text_encoder).weight
        return [token for token in vocabulary(tokenizer, table) if not any(self.subject.concept.scan(tokenizer.decode([token])))]

    @functools.cached_property
    def vocabulary(self) -> list[str]:
        """Words for the floor: of `tokens` those that the base does not read as the concept."""
        words = [word for token in self.tokens if not self.subject.alike(word := self.original.tokenizer.decode([token]).strip())]
        sample = random.Random("audit vocabulary").sample(words, min(len(words), 2000))
        return [word for word, share in zip(sample, self.along(sample), strict=True) if share < READ]

    def random_words(self, count: int, salt: str = "") -> list[str]:
        """`count` random words of the vocabulary: the floor."""
        return random.Random(f"{self.settings.seed} {salt}").choices(self.vocabulary, k=count)

    def along(self, words: Sequence[str]) -> list[float]:
        """How far each word stands on the way from the anchor to the concept, as the original encoder reads it at end-of-text.

        0 is the anchor, 1 the concept's first word.
        """
        if not words:
            return []
        start, end = pooled_phrases(self.towers, [self.subject.anchor or "thing", self.subject.concept.words[0]])
        way = end - start
        return ((pooled_phrases(self.towers, list(words)) - start) @ way / way.square().sum()).tolist()

    def names(self) -> list[str]:
        """Names that the base itself reads as the concept, beyond the card's: whole words, then words of two tokens."""
        found = names.find(self.towers, self.subject.concept, self.subject.anchor, progress=self.progress)
        return [*found.of("vocabulary"), *found.of("parts")]

    # --- images -------------------------------------------------------------------------------------------------------------

    def pipeline(self, side: str) -> Any:
        """The pipeline of "original" or "erased"."""
        return {"original": self.original, "erased": self.erased}[side]

    def stamp(self, side: str) -> str:
        """A fingerprint of one side's weights."""
        base = fingerprint(digests.of_base(self.subject.base) or self.subject.base.source, str(self.original.device))
        return base if side == "original" else fingerprint(base, self.subject.stamp)

    def drawn(self, name: str, side: str, prompts: Sequence[str], **changes: Any) -> Images:
        """Images of `prompts`, one each, under the bench's settings with `changes`; the same number has the same noise everywhere."""
        settings = dataclasses.replace(self.settings, images_per_prompt=1, **changes)
        wanted = [Prompt(text, self.settings.seed + number) for number, text in enumerate(prompts)]
        folder = self.folder / "images" / name / side
        pipeline = self.pipeline(side)
        draw(pipeline, wanted, folder, settings, stamp=self.stamp(side), progress=self.named(f"{name}, {side}"))
        return self._read(prompts, files_of(wanted, folder, settings))

    def made(self, name: str, arm: str, side: str, prompts: Sequence[str], make: Make, inputs: object, **changes: Any) -> Images:
        """Images that `make` makes of `prompts`: what no prompt alone draws.

        Args:
            name: the probe and variant.
            arm: the folder beside the other arms.
            side: whose weights decide, for the stamp.
            make: a batch into PIL images.
            inputs: JSON-able, all else that the images depend on.
        """
        settings = dataclasses.replace(self.settings, images_per_prompt=1, **changes)
        jobs = [Job(number, text, settings.seed + number) for number, text in enumerate(prompts)]
        folder = self.folder / "images" / name / arm
        code = digests.of_sources("auditing")
        stamps = {
            job: fingerprint(self.stamp(side), dataclasses.asdict(settings), job.prompt, job.seed, inputs, code) for job in jobs
        }
        folder.mkdir(parents=True, exist_ok=True)
        missing = [job for job in jobs if not is_drawn(folder / job.file_name, stamps[job])]
        with self.named(f"{name}, {arm}")(arm, len(jobs)) as task:
            task.advance(len(jobs) - len(missing))
            for start in range(0, len(missing), settings.batch_size):
                some = missing[start : start + settings.batch_size]
                for job, image in zip(some, make(self._batch(some, settings)), strict=True):
                    save_png(image, folder / job.file_name, {"prompt": job.prompt, "seed": str(job.seed), "inputs": stamps[job]})
                task.advance(len(some))
        return self._read(prompts, [folder / job.file_name for job in jobs])

    def _batch(self, jobs: Sequence[Job], settings: Settings) -> Batch:
        import torch

        pipeline = self.original
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
        factor = pipeline.vae_scale_factor
        shape = (1, pipeline.unet.config.in_channels, settings.height // factor, settings.width // factor)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        return Batch([job.prompt for job in jobs], noise.to(pipeline.device), generators, [job.prompt_index for job in jobs])

    def _read(self, prompts: Sequence[str], paths: Sequence[Path]) -> Images:
        found, pictures = detect_files(self.detector, paths, "detections", NoProgress())
        return Images(list(prompts), list(paths), found, pictures)

    def named(self, text: str) -> Progress:
        """The bench's progress under one description, whatever the drawing calls its bar."""
        return lambda _, total=None: self.progress(f"{self.place}{text}", total)

    # --- arms that many probes share ------------------------------------------------------------------------------------------

    def shared(self, arm: str, count: int, **changes: Any) -> list[bool]:
        """Whether the concept is in the images of an arm that depends on no probe, drawn once.

        Args:
            arm: "control" (the original, the anchor's caption), "floor" (the audited model, random words for the concept's),
                "original" or "erased" (the prompts as they are).
        """
        return self.arm(arm, count, **changes).shows(self.labels)

    def arm(self, arm: str, count: int, **changes: Any) -> Images:
        """The images of `shared`."""
        key = fingerprint(arm, count, changes)
        if key not in self.kept:
            texts = self.sentences(count)
            if arm == "control":
                texts = self.anchored(texts)
            elif arm == "floor":
                words = self.random_words(count, "floor")
                texts = [self.with_word(text, word) for text, word in zip(texts, words, strict=True)]
            side = "original" if arm in ("control", "original") else "erased"
            folder = "-".join([f"shared-{arm}", *(f"{name}-{value}" for name, value in changes.items())])
            self.kept[key] = self.drawn(folder, side, texts, **changes)
        return self.kept[key]

    @functools.cached_property
    def shown(self) -> dict[str, torch.Tensor]:
        """Prompt -> latents [1, channels, height, width] of an image of the original's that shows the concept: what an attacker holds.

        Raises:
            NotTried: the original shows it for no prompt.
        """
        texts = self.sentences(self.share.searched)
        try:
            return references(
                self.original, list(dict.fromkeys(texts)), self.folder / "images" / "references", self.settings, self.detector,
                self.labels, stamp=self.stamp("original"), progress=self.named("references"),
            )  # fmt: skip
        except UserError as error:
            raise NotTried("no image of the original's shows it, which the search needs") from error

    def one_encoder(self) -> None:
        """Raises `NotTried` where the base reads two text encoders, for which the searches are not written."""
        if len(self.subject.base.encoders) > 1:
            raise NotTried(f"base {self.subject.base.name} reads two text encoders, and the search is written for one")

    def flat(self) -> int:
        """How many images of the shared arms are of a single colour."""
        return sum(picture.flat for images in self.kept.values() for picture in images.pictures)
