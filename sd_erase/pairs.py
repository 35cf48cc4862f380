"""Captions and concepts into forget and retain pairs: deterministic, streamed, with a reason for each.

The captions are read twice. The first pass finds the captions that name a concept and their images; the second collects
what may be retained, from all other images. Samples are the captions with the smallest seeded hashes of their stratum, so
memory is bounded, a repeated caption is seen as such, and the order of the file does not matter.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import functools
import hashlib
import heapq
import itertools
import json
import os
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import bases, catalog, chain, concepts, digests, folders, prompts, resources
from sd_erase.captions import Caption, Tally, choose_dataset, digest, held_out, open_dataset, synthetic
from sd_erase.concepts import TOKEN, Concept, Match, Matcher
from sd_erase.config import to_dict
from sd_erase.errors import UserError
from sd_erase.progress import NoProgress
from sd_erase.rundir import HERE, RunDir, fingerprint, read_jsonl, write_jsonl_atomic

if TYPE_CHECKING:
    from sd_erase.config import RunConfig
    from sd_erase.progress import Progress

SPARED_SHARE = 0.2  # of the retain set, as far as there are such captions: far above how often they occur
NEIGHBOUR_SHARE = 0.3
SAMPLE_SIZE = 5  # pairs of each set in the manifest, to look at before training
MAX_PIXELS = 100_000_000  # a larger image is not decoded
_SPARE_ROOM = 1.25  # candidates kept for one wanted, so that missing images can be replaced
_SPLITS = {
    "train": "train",
    "restval": "train",
    "val": "validation",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
}
_HELD_OUT = {"test"}
_PROGRESS_EVERY = 1000
Stream = Callable[..., Iterator[Caption]]  # the data set from its beginning; a set of keys has their images taken out of archives


@dataclass(frozen=True)
class Pair:
    """One caption with its image, to forget or to retain; ``spans`` are the characters of the concepts' words."""

    key: str
    image: str | None
    caption: str
    set: str
    split: str
    concept: str | None
    spans: tuple[tuple[int, int], ...]
    reason: str


@dataclass(frozen=True)
class _Candidate:
    caption: Caption
    concept: str | None
    spans: tuple[tuple[int, int], ...]
    reason: str


class _Sample:
    """The candidates with the smallest hashes: texts that differ first, repeated texts of other images as a reserve.

    Args:
        room: how many are kept; 0 keeps all.
    """

    def __init__(self, room: int, salt: str):
        self.room = room
        self.salt = salt.encode()[:16]
        self._texts: list[tuple[int, int]] = []  # heap of (-hash, order); the largest hash leaves first
        self._of_text: dict[int, _Candidate] = {}
        self._repeats: dict[int, _Candidate] = {}
        self._repeat_heap: list[int] = []
        self.duplicates = 0

    def _hash(self, text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=self.salt).digest(), "big")

    def offer(self, candidate: _Candidate, text: str) -> None:
        """Keep `candidate` if its hash is among the smallest; `text` is its caption, normalised."""
        number = self._hash(text)
        full = self.room and len(self._of_text) >= self.room
        if number in self._of_text:
            held = self._of_text[number].caption
            if held.image_key == candidate.caption.image_key:
                self.duplicates += 1
            else:
                self._offer_repeat(candidate, text)
            return
        if full and number >= -self._texts[0][0]:
            return
        self._of_text[number] = candidate
        heapq.heappush(self._texts, (-number, 0))
        if full:
            del self._of_text[-heapq.heappop(self._texts)[0]]

    def _offer_repeat(self, candidate: _Candidate, text: str) -> None:
        number = self._hash(f"{text}\0{candidate.caption.image_key}")
        if number in self._repeats:
            self.duplicates += 1
            return
        full = self.room and len(self._repeats) >= self.room
        if full and number >= -self._repeat_heap[0]:
            return
        self._repeats[number] = candidate
        heapq.heappush(self._repeat_heap, -number)
        if full:
            del self._repeats[-heapq.heappop(self._repeat_heap)]

    def __len__(self) -> int:
        return len(self._of_text) + len(self._repeats)

    def ordered(self) -> list[_Candidate]:
        """All that is kept: the differing texts by hash, then the repeated ones."""
        return [table[number] for table in (self._of_text, self._repeats) for number in sorted(table)]


class _Numbers:
    """A set of image numbers in 8 bytes each, so that millions of them fit; `freeze` before the first look-up."""

    def __init__(self) -> None:
        self._numbers = array("Q")

    def add(self, number: int) -> None:
        if not self._numbers or self._numbers[-1] != number:  # the captions of an image often stand together
            self._numbers.append(number)

    def freeze(self) -> None:
        import numpy

        self._numbers = array("Q", numpy.unique(numpy.frombuffer(self._numbers, dtype=numpy.uint64)).tobytes())

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, number: int) -> bool:
        place = bisect.bisect_left(self._numbers, number)
        return place < len(self._numbers) and self._numbers[place] == number


class _Images:
    """Tells whether an image opens; remembers those that do not."""

    def __init__(self) -> None:
        self.checked = 0
        self.bad: dict[str, dict[str, str]] = {}
        self._good: set[str] = set()

    def usable(self, caption: Caption) -> bool:
        if caption.image is None or caption.image in self._good:
            return True
        if caption.image in self.bad:
            return False
        self.checked += 1
        fault = image_fault(caption.image)
        if fault is None:
            self._good.add(caption.image)
            return True
        self.bad[caption.image] = {"key": caption.key, "image": caption.image, "fault": fault}
        return False


def image_fault(path: str) -> str | None:
    """Why the image at `path` cannot be used, or None: it is missing, no image, truncated, or larger than `MAX_PIXELS`."""
    from PIL import Image

    if not os.path.isfile(path):
        return "missing"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # the size is tested below, before anything is decoded
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    return f"too large: {image.width} x {image.height} pixels"
                image.draft("RGB", (64, 64))  # JPEG is decoded small, which still reads the file to its end
                image.load()
    except Image.DecompressionBombError:
        return "too large"
    except Exception as error:  # decoders raise nearly anything on damaged files
        return f"corrupt: {' '.join(str(error).split())[:120] or type(error).__name__}"
    return None


class _Nouns:
    """The stratum of a caption: the first card whose word it holds, people last, so that they do not hide the objects."""

    _people = frozenset({"person", "man", "woman"})

    def __init__(self) -> None:
        self._first: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for card in concepts.all_cards().values():
            for phrase in card.phrases:
                words = tuple(TOKEN.findall(phrase))
                self._first.setdefault(words[0], []).append((words, card.name))
        for entries in self._first.values():
            entries.sort(key=lambda entry: (-len(entry[0]), entry[1] in self._people, entry))

    def of(self, tokens: list[str]) -> str:
        people = ""
        for position, token in enumerate(tokens):
            for words, name in self._first.get(token, ()):
                if len(words) == 1 or tuple(tokens[position : position + len(words)]) == words:
                    if name not in self._people:
                        return name
                    people = people or "person"
                    break
        return people or "other"


def _stream(
    config: RunConfig,
    dataset: str,
    base: bases.Base,
    run: RunDir,
    selected: list[Concept],
    wanted: Collection[str] | None = None,
    tally: Tally | None = None,
) -> Iterator[Caption]:
    """The data set's captions without those that name what is excluded."""
    captions = open_dataset(
        dataset, base, run.data, wanted, concepts=selected, seed=config.seed, tally=tally, device=config.device
    )
    if not config.harvest.exclude:
        return captions
    excluded = concepts.excluded_words(config.harvest.exclude)
    return (caption for caption in captions if not excluded.find(caption.text))


def _needs_images(config: RunConfig) -> bool:
    """Whether the training that is asked for uses images: drawing them costs hours on a CPU."""
    return config.train.towers == "both" or catalog.resolve(catalog.METHODS, config.train.objective, "Objective").needs_images


def _inputs(config: RunConfig, base: bases.Base, selected: list[Concept], draws: bool) -> str:
    """What the pairs depend on."""
    files = digest(config.harvest.dataset)
    drawn = ["drawn"] if draws else []
    return fingerprint(
        to_dict(config.harvest), [concept.to_dict() for concept in selected], config.seed, base.source, files, *drawn
    )


def _plan(config: RunConfig) -> tuple[RunConfig, bases.Base, list[Concept], bool]:
    """The settings with the data set that "auto" stands for, the base, the concepts, and whether images are drawn."""
    if config.harvest.exclude:
        concepts.excluded_words(config.harvest.exclude)  # refused before anything is read
    base = bases.resolve(config.base)
    selected = concepts.load_concepts(config)
    dataset = choose_dataset(config.harvest.dataset, base, selected)
    config = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, dataset=dataset))
    return config, base, selected, dataset == "synthetic" and _needs_images(config)


def is_harvested(config: RunConfig, run: RunDir) -> bool:
    """Whether the run's pairs are those of these settings, cards and captions as they are now."""
    return run.pairs.is_file() and run.is_complete("harvest", _inputs(*_plan(config)))


def harvest(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Write ``run.concepts`` and ``run.pairs`` and return the manifest: counts, reasons, a sample, statistics.

    ``max_forget`` holds for each concept, ``max_retain`` for the whole. A caption that names several of the concepts is one pair,
    under one of them, with the spans of all. An image with any caption that names a concept retains nothing.

    Raises:
        UserError: bad concepts or data; a concept that no caption names; too many missing images.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    config, base, selected, draws = _plan(config)
    dataset = config.harvest.dataset
    inputs = _inputs(config, base, selected, draws)
    if merged := (run.read_manifest("harvest") or {}).get("merged"):
        raise UserError(
            f"Run {run} was merged from {' and '.join(merged)}, which a training would undo: train in a run of its own, or merge again."
        )
    links = chain.Chain(run, config, progress)
    link = links.link("harvest")
    if run.is_complete("harvest", inputs) and link.state != chain.BROKEN and run.pairs.is_file() and run.concepts.is_file():
        return run.read_manifest("harvest") or {}
    kept = _keep_changed(run) if link.state == chain.BROKEN else []
    run.reopen("harvest")
    stream = functools.partial(_stream, config, dataset, base, run, selected)
    statistics: Counter[str] = Counter()
    named: Counter[str] = Counter({concept.name: 0 for concept in selected})
    tally = Tally()
    with progress("reading captions", None) as task:
        forget, forgotten_images, splits = _first_pass(
            config, functools.partial(stream, tally=tally), selected, statistics, named, task
        )
        missing_concepts = [concept for concept in selected if not named[concept.name]]
        if missing_concepts:
            raise _no_match(
                missing_concepts[0], stream(), {"pocket": "the pocket world", "pocket-art": "the art world"}.get(dataset, dataset)
            )
        retain = _second_pass(config, stream, selected, forgotten_images, splits, statistics, task)
    own_splits = len(splits) > 1
    images = _Images()
    _take_out(stream, run, [*forget.values(), *retain.values()])
    with progress("checking images", None) as task:
        chosen = {"forget": _choose_forget(config, selected, forget, images), "retain": _choose_retain(config, retain, images)}
        task.advance(images.checked)
    _report_missing(config, run, images)
    if not chosen["forget"]:
        raise UserError(
            f"No caption of {config.harvest.dataset} that names a concept has a usable image: restore those that {run.missing} lists."
        )
    if not chosen["retain"]:
        raise UserError(
            f"Every image of {config.harvest.dataset} has a caption that names {_list(selected)}, so nothing is left to retain: "
            "erase less at once, or pass a larger data set."
        )
    pairs = _with_splits(config, chosen, splits if own_splits else {})
    for concept in selected:
        if not any(pair.concept == concept.name for pair in pairs):
            raise UserError(
                f"All captions that name {concept.name!r} name another concept too, or have no usable image: erase it alone."
            )
    if draws:
        drawn = synthetic.draw(
            [(pair.key, pair.caption) for pair in pairs], run.data, base, config.seed, resources.device(config.device), progress
        )
        pairs = [dataclasses.replace(pair, image=drawn[pair.key]) for pair in pairs]
    write_pairs(run, pairs)
    concepts.write_concepts(run, selected)
    statistics["duplicates"] = sum(sample.duplicates for sample in (*forget.values(), *retain.values()))
    result = {
        "dataset": config.harvest.dataset,
        "concepts": [concept.name for concept in selected],
        "counts": _counts(pairs),
        "images": sum(pair.image is not None for pair in pairs),
        "captions_naming": dict(named),
        "reasons": _reasons(pairs),
        "missing": {
            "checked": images.checked,
            "missing": sum(row["fault"] == "missing" for row in images.bad.values()),
            "corrupt": sum(row["fault"] != "missing" for row in images.bad.values()),
            "file": "missing.jsonl" if images.bad else None,
        },
        "splits": "the data set's own" if own_splits else f"by image, {config.harvest.train_share:.0%} train",
        "statistics": {**statistics, "images_forgotten": len(forgotten_images), "mean_words": _mean_words(pairs)},
        "sample": {name: _sample_of(run, pairs, name, config.seed) for name in ("forget", "retain")},
        "skipped": dict(tally.counts),
        "warnings": tally.sentences(dataset),
        "seconds": round(time.monotonic() - started, 2),
        "from": links.reads("harvest"),
        "made": links.makes("harvest"),
    }
    manifest = run.complete("harvest", inputs, result)
    return {**manifest, "warnings": kept} if kept else manifest


def _keep_changed(run: RunDir) -> list[str]:
    """Put aside what somebody changed in the pairs or concepts by hand: harvesting again must not lose it. Says where it is."""
    said = []
    recorded = (run.read_manifest("harvest") or {}).get("made", {})
    for name, path in (("pairs", run.pairs), ("concepts", run.concepts)):
        if path.is_file() and digests.of_file(path) != recorded.get(name, {}).get(path.name):
            aside = path.with_name(f"{path.stem}-changed{path.suffix}")
            number = 2
            while aside.exists():
                aside, number = path.with_name(f"{path.stem}-changed-{number}{path.suffix}"), number + 1
            path.replace(aside)
            said.append(
                f"{path.name} was changed after the harvest: it is kept as {aside.name}, and the captions are harvested again."
            )
    return said


def _list(selected: Iterable[Concept]) -> str:
    return ", ".join(concept.name for concept in selected)


def _room(limit: int) -> int:
    return int(limit * _SPARE_ROOM) + 16 if limit else 0


def _image_number(caption: Caption) -> int:
    """The image's identity in 8 bytes."""
    return int.from_bytes(hashlib.blake2b(caption.image_key.encode(), digest_size=8).digest(), "big")


def _first_pass(
    config: RunConfig,
    stream: Stream,
    selected: list[Concept],
    statistics: Counter[str],
    named: Counter[str],
    task: Any,
) -> tuple[dict[tuple[str, str], _Sample], _Numbers, dict[str, int]]:
    """Samples of the captions to forget by (concept, split), the images that they show, and the data set's splits."""
    matcher = Matcher(selected)
    samples: dict[tuple[str, str], _Sample] = {}
    images = _Numbers()
    splits: Counter[str] = Counter()
    room = _room(config.harvest.max_forget)
    for number, caption in enumerate(stream(), 1):
        statistics["captions"] += 1
        if number % _PROGRESS_EVERY == 0:
            task.advance(_PROGRESS_EVERY)
        if caption.split in _HELD_OUT:
            statistics["held_out"] += 1
        split = _SPLITS.get(caption.split or "", "")
        tokens = TOKEN.findall(caption.text.lower())
        if not tokens:
            statistics["empty"] += 1
            continue
        uses = [(concept, matches) for concept, matches, _ in matcher.scan(caption.text) if matches]
        if caption.split not in _HELD_OUT and split:
            splits[split] += 1
        if not uses:
            continue
        images.add(_image_number(caption))
        if caption.split in _HELD_OUT:
            continue
        spans = _union(match for _, matches in uses for match in matches)
        text = " ".join(tokens)
        for concept, matches in uses:
            named[concept.name] += 1
            if (concept.name, split) not in samples:
                samples[concept.name, split] = _Sample(room, f"{config.seed} f {concept.name}")
            samples[concept.name, split].offer(_Candidate(caption, concept.name, spans, matches[0].reason), text)
    images.freeze()
    return samples, images, dict(splits)


def _union(matches: Iterable[Match]) -> tuple[tuple[int, int], ...]:
    """The matches' spans in order, overlapping ones joined."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted((match.start, match.end) for match in matches):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return tuple(spans)


def _second_pass(
    config: RunConfig, stream: Stream, selected: list[Concept], forgotten_images: _Numbers, splits: dict[str, int],
    statistics: Counter[str], task: Any
) -> dict[tuple[str, str, str], _Sample]:  # fmt: skip
    """Samples of what may be retained by (kind, stratum, split); the kinds are "spared", "neighbour" and "object"."""
    matcher = Matcher(selected)
    own = {concept.name for concept in selected}
    neighbours = [
        concepts.concept_named(name) for name in dict.fromkeys(name for concept in selected for name in concept.neighbours)
    ]
    neighbour_matcher = Matcher(concept for concept in neighbours if concept.name not in own)
    nouns = _Nouns()
    samples: dict[tuple[str, str, str], _Sample] = {}
    room = _room(config.harvest.max_retain)
    for number, caption in enumerate(stream(), 1):
        if number % _PROGRESS_EVERY == 0:
            task.advance(_PROGRESS_EVERY)
        if caption.split in _HELD_OUT:
            continue
        tokens = TOKEN.findall(caption.text.lower())
        if not tokens:
            continue
        if _image_number(caption) in forgotten_images:
            statistics["captions_of_forgotten_images"] += 1
            continue
        spared = next((uses for _, _, uses in matcher.scan(caption.text) if uses), None)
        if spared:
            kind, stratum, reason = "spared", spared[0].text.lower(), spared[0].reason
            # strata are bounded: "orange shirt", "orange hat" and a thousand more share the places that are left
            if ("spared", stratum, "") not in samples and sum(key[0] == "spared" for key in samples) >= 64:
                stratum = ""
        else:
            near = next((concept for concept, matches, _ in neighbour_matcher.scan(caption.text) if matches), None)
            if near is not None:
                kind, stratum, reason = "neighbour", near.name, f"neighbour: {near.name}"
            else:
                kind, stratum = "object", nouns.of(tokens)
                reason = "no concept" if stratum == "other" else f"names: {stratum}"
        statistics[f"retainable_{kind}"] += 1
        split = _SPLITS.get(caption.split or "", "") if len(splits) > 1 else ""
        key = (kind, stratum, split)
        if key not in samples:
            samples[key] = _Sample(room, f"{config.seed} r")
        samples[key].offer(_Candidate(caption, None, (), reason), " ".join(tokens))
    return samples


def _take_out(stream: Stream, run: RunDir, samples: Iterable[_Sample]) -> None:
    """Have the reader write the candidates' images where they lie inside an archive."""
    inside = str(run.data.absolute()) + os.sep
    wanted = {
        candidate.caption.key
        for sample in samples
        for candidate in sample.ordered()
        if candidate.caption.image and candidate.caption.image.startswith(inside) and not os.path.exists(candidate.caption.image)
    }
    if wanted:
        for _ in stream(wanted):
            pass


def _fill(quota: int | None, samples: list[list[_Candidate]], images: _Images, taken: set[str]) -> list[_Candidate]:
    """Up to `quota` candidates, one from each sample in turn, so that small strata are not drowned; None takes all."""
    iterators = [iter(sample) for sample in samples]
    chosen: list[_Candidate] = []
    while iterators and (quota is None or len(chosen) < quota):
        alive = []
        for iterator in iterators:
            if quota is not None and len(chosen) >= quota:
                break
            candidate = next((one for one in iterator if one.caption.key not in taken and images.usable(one.caption)), None)
            if candidate is not None:
                taken.add(candidate.caption.key)
                chosen.append(candidate)
                alive.append(iterator)
        iterators = alive
    return chosen


def _by_split(
    config: RunConfig, limit: int | None, samples: dict[str, list[list[_Candidate]]], images: _Images, taken: set[str]
) -> list[_Candidate]:
    """Up to `limit` candidates (None: all): with own splits, `train_share` of them from train, as far as both have enough."""
    if set(samples) <= {""} or limit is None:
        return _fill(limit, [sample for split in sorted(samples) for sample in samples[split]], images, taken)
    held_out = min(limit, max(1, limit - round(limit * config.harvest.train_share)))
    validation = _fill(held_out, samples.get("validation", []), images, taken)
    return _fill(limit - len(validation), samples.get("train", []) + samples.get("", []), images, taken) + validation


def _choose_forget(
    config: RunConfig, selected: list[Concept], samples: dict[tuple[str, str], _Sample], images: _Images
) -> list[_Candidate]:
    sizes = {
        concept.name: sum(len(sample) for (name, _), sample in samples.items() if name == concept.name) for concept in selected
    }
    taken: set[str] = set()
    chosen: list[_Candidate] = []
    own_splits = len({split for _, split in samples if split}) > 1
    # the rarest concept first: a caption that names two goes to the one that needs it
    for concept in sorted(selected, key=lambda concept: (sizes[concept.name], concept.name)):
        of_split: dict[str, list[list[_Candidate]]] = {}
        for (name, split), sample in sorted(samples.items(), key=lambda item: item[0]):
            if name == concept.name:
                of_split.setdefault(split if own_splits else "", []).append(sample.ordered())
        chosen += _by_split(config, config.harvest.max_forget or None, of_split, images, taken)
    return chosen


def _choose_retain(config: RunConfig, samples: dict[tuple[str, str, str], _Sample], images: _Images) -> list[_Candidate]:
    limit = config.harvest.max_retain
    taken: set[str] = set()

    def of_kind(kind: str) -> dict[str, list[list[_Candidate]]]:
        found: dict[str, list[list[_Candidate]]] = {}
        for (one, _, split), sample in sorted(samples.items(), key=lambda item: item[0]):
            if one == kind:
                found.setdefault(split, []).append(sample.ordered())
        return found

    if not limit:
        kinds = ("spared", "neighbour", "object")
        return [one for kind in kinds for one in _by_split(config, None, of_kind(kind), images, taken)]
    chosen = _by_split(config, round(limit * SPARED_SHARE), of_kind("spared"), images, taken)
    chosen += _by_split(config, round(limit * NEIGHBOUR_SHARE), of_kind("neighbour"), images, taken)
    for kind in ("object", "neighbour", "spared"):  # what one kind lacks, the next one fills
        if len(chosen) < limit:
            chosen += _by_split(config, limit - len(chosen), of_kind(kind), images, taken)
    return chosen


def _report_missing(config: RunConfig, run: RunDir, images: _Images) -> None:
    side_file = run.missing
    side_file.unlink(missing_ok=True)
    if not images.bad:
        return
    write_jsonl_atomic(side_file, (images.bad[image] for image in sorted(images.bad)))
    share = len(images.bad) / images.checked
    if share > config.harvest.max_missing_share:
        first = images.bad[min(images.bad)]
        raise UserError(
            f"{len(images.bad)} of {images.checked} images of {config.harvest.dataset} are missing or corrupt (such as {first['image']}: "
            f"{first['fault']}), more than harvest.max_missing_share {config.harvest.max_missing_share:.0%}: restore those that {side_file} lists, or pass a larger --max-missing-share."
        )


def _with_splits(config: RunConfig, chosen: dict[str, list[_Candidate]], own_splits: dict[str, int]) -> list[Pair]:
    """The pairs in their final order; without own splits, `train_share` of each concept's images train."""
    pairs: list[Pair] = []
    split_of: dict[str, str] = {}

    def rank(image: str) -> bytes:
        return hashlib.blake2b(image.encode(), digest_size=8, key=f"{config.seed} s".encode()).digest()

    for name, candidates in chosen.items():
        groups: dict[str, list[_Candidate]] = {}
        for candidate in candidates:
            groups.setdefault(candidate.concept or "", []).append(candidate)
        for group in groups.values():
            if own_splits and {_SPLITS.get(one.caption.split or "") for one in group} >= {"train", "validation"}:
                split_of.update(
                    {one.caption.image_key: _SPLITS[one.caption.split or ""] for one in group if one.caption.split in _SPLITS}
                )
            images = sorted({one.caption.image_key for one in group}, key=rank)
            train = min(max(1, round(len(images) * config.harvest.train_share)), max(1, len(images) - 1))
            train -= sum(split_of.get(image) == "train" for image in images)
            for image in images:
                if image not in split_of:
                    split_of[image] = "train" if train > 0 else "validation"
                    train -= 1
        pairs += [
            Pair(
                one.caption.key,
                one.caption.image,
                one.caption.text,
                name,
                split_of[one.caption.image_key],
                one.concept,
                one.spans,
                one.reason,
            )
            for one in candidates
        ]
    return pairs


def _counts(pairs: list[Pair]) -> dict[str, Any]:
    counts: dict[str, Any] = {name: {"train": 0, "validation": 0} for name in ("forget", "retain")}
    by_concept: dict[str, Counter[str]] = {}
    for pair in pairs:
        counts[pair.set][pair.split] += 1
        if pair.concept:
            by_concept.setdefault(pair.concept, Counter())[pair.split] += 1
    return {**counts, "by_concept": {name: dict(splits) for name, splits in sorted(by_concept.items())}}


def _reasons(pairs: list[Pair]) -> dict[str, dict[str, int]]:
    """How often each reason chose a pair, by set, the commonest 40 first."""
    found: dict[str, Counter[str]] = {"forget": Counter(), "retain": Counter()}
    for pair in pairs:
        found[pair.set][pair.reason.lower()] += 1
    return {name: dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:40]) for name, counter in found.items()}


def _mean_words(pairs: list[Pair]) -> float:
    return round(sum(len(TOKEN.findall(pair.caption)) for pair in pairs) / len(pairs), 1)


def _sample_of(run: RunDir, pairs: list[Pair], name: str, seed: int) -> list[dict[str, Any]]:
    import random

    group = [pair for pair in pairs if pair.set == name]
    chosen = random.Random(f"{seed} {name}").sample(group, min(SAMPLE_SIZE, len(group)))
    return [
        {"caption": pair.caption, "image": _place(run, pair.image), "concept": pair.concept, "reason": pair.reason}
        for pair in chosen
    ]


def _no_match(concept: Concept, captions: Iterable[Caption], dataset: str) -> UserError:
    """The error for a concept that no caption names, with the nearest words that the data set does have."""
    vocabulary: Counter[str] = Counter()
    for caption in captions:
        if caption.split in _HELD_OUT:
            continue
        vocabulary.update(token for token in TOKEN.findall(caption.text.lower()) if len(token) > 2)
    # of a very long list, the common words
    words = [word for word, _ in vocabulary.most_common(50_000)]
    near: list[str] = []
    for part in TOKEN.findall(concept.name):
        near += [word for word in difflib.get_close_matches(part, words, n=4, cutoff=0.6) if word not in near]
    hint = f"the nearest words it has are {', '.join(near)}" if near else "it has no word like it"
    only_spared = concept.spared and any(word in vocabulary for word in concept.words)
    spared = f" apart from senses that its card spares ({', '.join(concept.spared[:2])} ...)" if only_spared else ""
    return UserError(
        f"Concept {concept.name!r} is named by no caption of {dataset}{spared}; {hint}: pass one of them, a concept file with synonyms, or "
        "--data synthetic."
    )


def _lines_hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_prompts_file(config: RunConfig, run: RunDir, path: Path, force: bool) -> None:
    """Whether `write_prompts` may write to `path`: a new file, one that it wrote and nobody changed, or any other with `force`.

    Raises:
        UserError: somebody else's file without `force`; one of the run's or of the data set's, or what is no file, in any case.
    """
    if not prompts.is_text(path):
        raise UserError(f"{path}: prompts are written as text, one a line, and would not be read back: name a .txt file.")
    if run.owns(path):
        raise UserError(f"{path} is one of the files of run {run}, which stay as they are: name another file.")
    source = config.harvest.dataset.partition(":")[2]
    protected = {Path(source): f"the data set {config.harvest.dataset}"} if source else {}
    protected |= {Path(config.concept_file): "the concept's card"} if config.concept_file else {}
    folders.check_new_file(path, force, _is_ours(path), protected)


def _is_ours(path: Path) -> bool:
    """Whether `write_prompts` wrote a file, by the hash of its lines that its first line states."""
    try:
        head, *lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    return head.startswith("# ") and head.endswith(f"; lines {_lines_hash(lines)})")


def write_prompts(config: RunConfig, run: RunDir, path: Path, count: int, progress: Progress | None = None) -> dict[str, Any]:
    """Write `count` captions that name the run's concepts and that no pair contains, one a line, for `generate`.

    None is of an image that a pair shows. The data set's own test split goes first, where it has one; among several concepts the
    places are shared. Where too few are left, others are made (see `captions.held_out`).

    Returns:
        ``{"prompts": how many, "made": how many of these, "prompts_file": path, "warnings": [...]}``.

    Raises:
        UserError: the run is not harvested, or no caption is left and none can be made.
    """
    progress = progress or NoProgress()
    run.require("harvest", "harvest")
    pairs, selected = read_pairs(run), concepts.read_concepts(run)
    used_images = {pair.key.rpartition("#")[0] or pair.key for pair in pairs}
    used_texts = {" ".join(TOKEN.findall(pair.caption.lower())) for pair in pairs}
    base = bases.resolve(config.base)
    dataset = choose_dataset(config.harvest.dataset, base, selected)
    samples = {(concept.name, own): _Sample(count, f"{config.seed} p {concept.name}") for concept in selected for own in (0, 1)}
    matcher = Matcher(selected)
    with progress("reading captions", None) as task:
        for number, caption in enumerate(_stream(config, dataset, base, run, selected), 1):
            if number % _PROGRESS_EVERY == 0:
                task.advance(_PROGRESS_EVERY)
            tokens = TOKEN.findall(caption.text.lower())
            text = " ".join(tokens)
            if (
                caption.image_key in used_images or text in used_texts or caption.text.startswith("#")
            ):  # a comment in a prompts file
                continue
            for concept, matches, _ in matcher.scan(caption.text):
                if matches:
                    own = 0 if caption.split in _HELD_OUT else 1
                    samples[concept.name, own].offer(_Candidate(caption, concept.name, (), ""), text)
    groups = [
        [" ".join(one.caption.text.split()) for own in (0, 1) for one in samples[concept.name, own].ordered()]
        for concept in selected
    ]
    lines = list(dict.fromkeys(line for row in itertools.zip_longest(*groups) for line in row if line))[:count]
    seen = used_texts | {held_out.text_key(line) for line in lines}
    made = held_out.naming(selected, base, count - len(lines), seen) if len(lines) < count else []
    if not lines and not made:
        raise UserError(f"No caption that names {_list(selected)} could be found or made: write prompts of your own, one a line.")
    origin = f"{len(lines)} held-out captions of {dataset}" + (f" and {len(made)} made from the card's words" if made else "")
    lines += made
    head = f"# {_list(selected)}: {origin}, in none of the pairs (seed {config.seed}; lines {_lines_hash(lines)})"
    with folders.publishing(path.expanduser()) as temporary:
        temporary.write_text("\n".join([head, *lines, ""]), encoding="utf-8")
    warnings = []
    if made:
        warnings.append(
            f"{len(made)} of the {len(lines)} prompts were made from the words of the card: {dataset} has no more captions that no pair "
            "contains (a lower --max-forget leaves more)."
        )
    if len(lines) < count:
        warnings.append(f"Only {len(lines)} of {count} prompts could be found or made: a card with more words gives more.")
    return {"prompts": len(lines), "made": len(made), "prompts_file": str(path), "warnings": warnings}


def write_pairs(run: RunDir, pairs: Iterable[Pair]) -> None:
    """Write ``run.pairs``; images in the run's own folder by their place there, so that a run may be moved and copied."""
    rows = ({**vars(pair), "image": _place(run, pair.image), "spans": [list(span) for span in pair.spans]} for pair in pairs)
    write_jsonl_atomic(run.pairs, rows)


def _place(run: RunDir, image: str | None) -> str | None:
    """How the path of an image is stored; `RunDir.image` reads it."""
    inside = str(run.path.absolute()) + os.sep
    return HERE + image[len(inside) :].replace(os.sep, "/") if image and image.startswith(inside) else image


def read_pairs(run: RunDir) -> list[Pair]:
    """The pairs of a harvested run, in their stored order.

    Raises:
        UserError: the run has none, or a line is damaged.
    """
    if not run.pairs.is_file():
        raise UserError(f"Run {run} has no pairs: run {run.command('harvest')} first.")
    try:
        return [
            Pair(**{**row, "image": run.image(row["image"]), "spans": tuple((start, end) for start, end in row["spans"])})
            for row in read_jsonl(run.pairs)
        ]
    except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{run.pairs} is damaged ({error}): run {run.command('harvest')} again.") from error
