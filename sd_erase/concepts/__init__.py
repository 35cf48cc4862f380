"""Concepts: the words that name one, the senses of those words to spare, its anchor, neighbours and detector labels.

Between the words of a phrase stand spaces, hyphens or underscores, in cards and in captions; case, accents and the width of letters
do not count (`concepts.text`). A card (``cards/*.yaml``, or the user's ``concept_file``) has these keys, all but ``name`` optional;
a list may be one text with commas or semicolons, but of spared uses and templates, in which a comma is a comma:

* ``name``, ``kind`` ("object", "style", "person", "nudity"), ``words`` (instead of the inflections of the name),
  ``synonyms``, ``anchor``, ``neighbours``, ``labels`` (of the detector), ``templates`` (prompts with one ``{}``);
* ``spared``: uses of the words that mean something else. ``apple phone`` is a phrase (its plural is added, a space also
  matches a hyphen); ``{a|b}`` is a choice; ``{colour}``, ``{their}`` and ``{somebody}`` are named choices; ``*`` is any one word that
  is not a function word; a ``,`` is a comma; ``bat + {baseball|batter}`` is the word "bat" in a caption that also names one of the
  right side; ``bat + {somebody} unless {cave|wing}`` is the same in a caption that names none of the last.

A spared use excludes every match that lies inside it, unless the match is a longer phrase of the concept's own.
"""

from __future__ import annotations

from sd_erase.concepts.cards import CARDS_FOLDER, TEMPLATES, all_cards, common_nouns, concept_named, packaged_card
from sd_erase.concepts.inflection import NUMBERS_FILE, inflections, is_plural
from sd_erase.concepts.matching import Concept, Match, Matcher
from sd_erase.concepts.selection import excluded_words, load_concepts, read_concepts, write_concepts
from sd_erase.concepts.spared import spoken_form
from sd_erase.concepts.text import TOKEN, label_form

__all__ = [
    "CARDS_FOLDER", "NUMBERS_FILE", "TEMPLATES", "TOKEN", "Concept", "Match", "Matcher", "all_cards", "common_nouns", "concept_named",
    "excluded_words", "inflections", "is_plural", "label_form", "load_concepts", "packaged_card", "read_concepts", "spoken_form", "write_concepts",
]  # fmt: skip
