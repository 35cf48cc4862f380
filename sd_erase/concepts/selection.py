"""The concepts that a run is to erase."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase.concepts.cards import KINDS, TEMPLATES, concept_named, from_card, normal_name, read_yaml
from sd_erase.concepts.inflection import numbers
from sd_erase.concepts.matching import Concept, names
from sd_erase.concepts.spared import Spared
from sd_erase.concepts.text import LEFT, RIGHT, literal
from sd_erase.errors import UserError, unknown_choice

if TYPE_CHECKING:
    from sd_erase.config import RunConfig
    from sd_erase.rundir import RunDir


def load_concepts(config: RunConfig) -> list[Concept]:
    """The concepts that `config` names: from its concept file, the cards that ship, or their names alone.

    `config.anchor` (unless None) and `config.kind` (unless "object", the default) override each card's.

    Raises:
        UserError: no concept; a malformed file; a concept all of whose words another one spares; an anchor that
            names what is to be erased.
    """
    if config.kind not in KINDS:
        raise unknown_choice("Setting kind", config.kind, KINDS)
    own: dict[str, Concept] = {}
    if config.concept_file:
        path = Path(config.concept_file).expanduser()
        if not path.is_file():
            raise UserError(f"Concept file {path} does not exist: pass a YAML file with `name:` and `synonyms:`.")
        values = read_yaml(path)
        for card in values if isinstance(values, list) else [values]:
            concept = from_card(card, f"Concept file {path}")
            own[concept.name] = concept
    asked = list(dict.fromkeys(normal_name(name) for name in config.concepts)) or list(own)
    if not asked:
        raise UserError("No concept to erase: pass --concept bicycle, or --concept-file with a card.")
    concepts: dict[str, Concept] = {}
    for name in asked:
        concept = own[name] if name in own else concept_named(name, config.kind)
        changes: dict[str, Any] = {}
        if config.kind != "object" and concept.kind != config.kind:
            changes |= {"kind": config.kind, "templates": TEMPLATES[config.kind]}
        if config.anchor is not None:
            changes["anchor"] = config.anchor
        concepts[concept.name] = dataclasses.replace(concept, **changes)
    selected = list(concepts.values())
    _check_spared(selected)
    for position, concept in enumerate(selected):
        if not concept.anchor:
            continue
        named = next((other for other in selected if names(other, concept.anchor)), None)
        if named is None:
            continue
        if config.anchor is None and named is not concept and concept.name not in own:
            selected[position] = dataclasses.replace(concept, anchor=None)  # the card could not know what else is erased
            continue
        raise UserError(
            f"Anchor {concept.anchor!r} of concept {concept.name!r} names {named.name!r}, which is to be erased: "
            "pass --anchor with a word that names neither, such as object."
        )
    return selected


def _check_spared(concepts: list[Concept]) -> None:
    for concept in concepts:
        for other in concepts:
            if other is concept:
                continue
            covering = [entry for entry in other.spared_entries if entry.context is None and entry.unless is None]
            if all(any(_inside(phrase, entry) for entry in covering) for phrase in concept.phrases):
                entry = next(entry for entry in covering if _inside(concept.phrases[0], entry))
                raise UserError(
                    f"Concept {concept.name!r} is what concept {other.name!r} spares ({entry.source!r}): erase only one of the two, "
                    f"or pass --concept-file with a card of {other.name!r} that does not spare it."
                )


def _inside(phrase: str, entry: Spared) -> bool:
    """Whether `phrase` is a spared use, or a run of whole words of the spared phrase."""
    if entry.pattern.fullmatch(phrase):
        return True
    return any(
        re.search(LEFT + literal(phrase) + RIGHT, form) is not None
        for form in (entry.source, numbers(entry.source)[1])
        if not re.search(r"[{*,]", form)
    )


def write_concepts(run: RunDir, concepts: list[Concept]) -> None:
    """Write ``run.concepts``."""
    from sd_erase.rundir import write_json_atomic

    write_json_atomic(run.concepts, [concept.to_dict() for concept in concepts])


def read_concepts(run: RunDir) -> list[Concept]:
    """The resolved concepts of a harvested run."""
    if not run.concepts.is_file():
        raise UserError(f"Run {run} has no {run.concepts.name}: run `sd-erase harvest` first.")
    return [Concept.from_dict(values) for values in json.loads(run.concepts.read_text(encoding="utf-8"))]
