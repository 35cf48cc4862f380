"""Which prompts a run is asked: the configured lists, else those that ship, else ones that are made for its concepts.

Reads ``concepts.json`` and ``pairs.jsonl``. Writes ``prompts.txt`` where prompts are made.
"""

from __future__ import annotations

from sd_erase import bases, resources
from sd_erase.captions import held_out
from sd_erase.concepts import load_concepts, read_concepts
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.pairs import read_pairs
from sd_erase.prompts import read_prompts
from sd_erase.rundir import RunDir, write_text_atomic

MADE_PROMPTS, MADE_STRANGERS = 50, 10  # that name a concept which no list ships for, and that name none


def prompt_files(config: RunConfig, run: RunDir) -> tuple[tuple[str, ...], list[str]]:
    """The configured prompt files, or each concept's bundled list, or one that is made for it in the run; and what was made.

    Raises:
        UserError: no sentence could be made that names a concept.
    """
    if config.generate.prompts:
        return config.generate.prompts, []
    concepts = read_concepts(run) if run.concepts.is_file() else load_concepts(config)
    bundled = resources.names("prompts")
    lists = [
        concept.name
        for concept in concepts
        if concept.name in bundled and held_out.listed([prompt.text for prompt in read_prompts(concept.name)], [concept])
    ]
    left = [concept for concept in concepts if concept.name not in lists]
    if not left:
        return tuple(lists), []
    base = bases.resolve(config.base)
    used = {held_out.text_key(pair.caption) for pair in read_pairs(run)} if run.pairs.is_file() else set()
    named = held_out.naming(left, base, MADE_PROMPTS * len(left), used)
    silent = [concept.name for concept in left if not any(concept.find(text) for text in named)]
    if silent:
        raise UserError(
            f"No prompt could be made that names {', '.join(silent)}: pass --prompts with a file of one prompt a line."
        )
    strange = held_out.strangers(concepts, base, MADE_STRANGERS, used)
    names = ", ".join(concept.name for concept in left)
    head = (
        f"# Made for {names} from the words of their cards: {len(named)} prompts that name them, then {len(strange)} that do not."
    )
    text = "\n".join([head, *named, *strange, ""])
    if not run.prompts.is_file() or run.prompts.read_text(encoding="utf-8") != text:
        write_text_atomic(run.prompts, text)
    note = (
        f"No list of prompts ships for {names}, so {len(named)} were made that name them and {len(strange)} that do not, none of them a "
        f"caption of the pairs: {run.prompts} (--prompts FILE for your own)."
    )
    return (*lists, str(run.prompts)), [note]
