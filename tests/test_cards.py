"""What a card, a name and a spared entry become, to the letter; and each refusal as the sentence that a person reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from sd_erase.catalog import KINDS
from sd_erase.concepts import (
    Concept,
    Matcher,
    all_cards,
    cards,
    common_nouns,
    concept_named,
    excluded_words,
    inflections,
    is_plural,
    load_concepts,
    packaged_card,
    read_concepts,
    selection,
    spoken_form,
)
from sd_erase.concepts.near import meant
from sd_erase.concepts.phrases import MAX_ENTRIES, entries_of, phrase_of
from sd_erase.concepts.selection import MAX_FILE, names_in, read_concept_file
from sd_erase.concepts.spared import CHOICES, check_entry, compile_spared, counted_part
from sd_erase.concepts.text import fold, keys, plain
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.rundir import RunDir

FIELDS = "name, kind, words, synonyms, spared, anchor, neighbours, labels, templates"
CONTEXT = "write `word + {other|words} unless {these}`"
ONCE = "must hold {} once: write `a photo of a {}`, and several as a list: [..., ...]."
CUT = 27 * "y" + "..." + 28 * "y"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Concept]]:
    """Writes a concept file into the working directory and reads it."""
    monkeypatch.chdir(tmp_path)

    def loaded(text: str, name: str = "card.yaml", **settings: object) -> list[Concept]:
        Path(name).write_text(text, encoding="utf-8")
        return load_concepts(RunConfig(concept_file=name, **settings))  # type: ignore[arg-type]

    return loaded


def told(function: Callable[..., object], *values: object, **settings: object) -> str:
    """What the refusal says."""
    with pytest.raises(UserError) as error:
        function(*values, **settings)
    return str(error.value)


# --- cards --------------------------------------------------------------------------------------------------------------------


def test_a_card_is_kept_to_the_letter(load: Callable[..., list[Concept]]) -> None:
    """Every key as written, in the one spelling in which it is kept; what is a word already is no synonym."""
    text = """\
        name: Zorp_Machine
        words: [Zorp, Zorps]
        synonyms: [ZORP, glimmer]
        spared: ['Zorp  Phone', 'zorp , {RED|blue} + {ball} unless {cave}']
        anchor: Grey_Thing
        neighbours: [Teapot, old kettle]
        labels: [Cell_Phone, cell phone, Dog]
        templates: ['a  photo, of   {}', 'the {}', '{}']
        """
    (card,) = load("\n".join(line.strip() for line in text.splitlines()))
    assert card == Concept(
        name="zorp machine",
        kind="object",
        words=("zorp", "zorps"),
        synonyms=("glimmer", "glimmers"),
        spared=("zorp phone", "zorp , {red|blue} + {ball} unless {cave}"),
        anchor="Grey Thing",
        neighbours=("teapot", "old kettle"),
        labels=("cell phone", "dog"),
        templates=("a photo, of {}", "the {}", "{}"),
    )
    assert card.phrases == ("zorp", "zorps", "glimmer", "glimmers")


def test_what_a_card_leaves_out_is_that_of_its_kind(load: Callable[..., list[Concept]]) -> None:
    made = {kind: load(f"{{name: Zorp, kind: {kind}}}")[0] for kind in KINDS}
    assert {kind: card.anchor for kind, card in made.items()} == {
        "object": None,
        "style": "an artist",
        "person": "a person",
        "nudity": "dressed",
    }
    assert {kind: card.templates for kind, card in made.items()} == cards.TEMPLATES
    assert {kind: card.kind for kind, card in made.items()} == {kind: kind for kind in KINDS}
    assert made["object"].words == ("zorp", "zorps") and made["style"].words == made["person"].words == ("zorp",)
    assert made["nudity"].synonyms[:3] == ("nudity", "nude", "nudes") and made["style"].synonyms == ()
    assert made["object"].neighbours == () and made["person"].neighbours[0] == "a man" and len(made["style"].neighbours) == 12
    (monet,) = load("{name: Monet, kind: style}")
    assert len(monet.neighbours) == 11 and "claude monet" not in monet.neighbours  # the erased is none to retain
    assert load("{name: Monet, kind: style, neighbours: [Rembrandt]}")[0].neighbours == ("rembrandt",)
    assert load("{name: Monet, kind: style, neighbours: []}")[0].neighbours == ()
    assert [load(f"{{name: zorp, kind: style, anchor: {anchor}}}")[0].anchor for anchor in ("null", "''")] == [None, ""]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 3", f" must be a mapping of a card's keys ({FIELDS}), not 3: write `name: ...`; a list of names is a .txt file."),
        ("name: x\nwrods: [y]", f": key 'wrods' is unknown (did you mean 'words'?); choose one of: {FIELDS}."),
        ("name: [a]", ": name must be text, not ['a']: write it in quotes."),
        ("name: null", ": name must be text, not None: write it in quotes."),
        ("name: x\nkind: 3", ": kind must be text, not 3: write it in quotes."),
        ("name: x\nanchor: [1]", ": anchor must be text, not [1]: write it in quotes."),
        ("name: x\nkind: objct", ": kind 'objct' is unknown (did you mean 'object'?); choose one of: object, style, person, nudity."),
        ("kind: object", " has no name: add `name: ...`."),
        ("name: a, b", ": name 'a, b' is one phrase, but ',' stands in it: give each a card of its own: a, b."),
        ("name: zorp*", ": name 'zorp*' is one phrase, but '*' stands in it: write the phrase without it."),
        ("name: x\nsynonyms: [true]", ': synonyms must be a list of words, not [True] (quote words such as "true").'),
        ("name: x\nsynonyms: ['b, c']",
         ": synonyms: entry 'b, c' is one phrase, but ',' stands in it: write each as an entry of its own, synonyms: [b, c]."),
        ("name: x\nneighbours: [a;b]",
         ": neighbours: entry 'a;b' is one phrase, but ';' stands in it: write each as an entry of its own, neighbours: [a, b]."),
        ("name: x\nanchor: a|b", ": anchor 'a|b' is one phrase, but '|' stands in it: an anchor is one phrase: choose one of a, b."),
        ("name: x\nlabels: [z, " + "y" * 201 + "]", f": labels: '{CUT}' is no label of a detector: write 200 characters at most."),
        ("name: x\ntemplates: ['a {} {b}']", f": template 'a {{}} {{b}}' {ONCE}"),
        ("name: x\ntemplates: ['{} of {}']", f": template '{{}} of {{}}' {ONCE}"),
        ("name: x\ntemplates: ['a {} of }']", f": template 'a {{}} of }}' {ONCE}"),
        ("name: x\ntemplates: ['" + "y" * 199 + "{}']", f": template '{CUT[:-2]}{{}}' has 201 characters: write 200 at most."),
        ("name: x\nspared: [x phone|x tv]",
         ": spared phrase 'x phone|x tv' has a choice without braces: write `{a|b} word`, or each as an entry of its own: [a word, b word]."),
        ("name: x\nspared: ['x', xs, xes, '{x}']",
         " spares the words of 'x' themselves ('x', 'xs', 'xes'), so that no caption would name it: spare longer phrases."),
        ("name: x\nneighbours: [y, xes]",
         ": neighbour 'xes' is to be retained, but it names 'x', which is to be erased: remove it."),
        ("- {name: a}\n- name: x\n  synonyms: >\n    bike\n    cycle\n",
         ": synonyms in line 3 is one text over several lines, which would be one phrase: write a dash before each entry "
         "(`- bike`), or `[bike, cycle]`."),
        ("- {name: x}\n- {name: X}", " names 'x' twice: write one card with all its words."),
    ],
)  # fmt: skip
def test_a_card_is_refused_in_this_sentence(load: Callable[..., list[Concept]], text: str, says: str) -> None:
    assert told(load, text) == f"Concept file card.yaml{says}"


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("{a", f"an unmatched brace: {CONTEXT}"),
        ("x}", f"an unmatched brace: {CONTEXT}"),
        ("x + y + z", f"a misplaced + or unless: {CONTEXT}"),
        ("x + unless y", f"a misplaced + or unless: {CONTEXT}"),
        ("* " * 40 + "x", "41 words: write 40 at most"),
        ("x, y", "a list in one text: write each as an entry of its own: [a word, b word] (a comma that captions have stands alone: `red , x`)"),
        ("x a*", "a * inside a word: it stands for one whole word, as in `apple *`"),
        ("*a x", "a * inside a word: it stands for one whole word, as in `apple *`"),
        ("{a|} x", "an empty choice: write `{a|b}`"),
        ("x + -", f"a part without a word: {CONTEXT}"),
        ("x unless *", f"a part without a word: {CONTEXT}"),
        ("* + y", f"a part without a word: {CONTEXT}"),
    ],
)  # fmt: skip
def test_a_spared_entry_is_refused_for_this_fault(entry: str, fault: str) -> None:
    shown = entry if len(entry) < 60 else f"{entry[:27]}...{entry[-28:]}"
    assert told(check_entry, entry, "Entry") == f"Entry {shown!r} has {fault}."


def test_a_spared_entry_of_the_greatest_length_is_kept_and_a_longer_one_refused() -> None:
    assert check_entry("* " * 39 + "x", "Entry").count(" ") == 39
    choices = "{" + "|".join("y" * 9 for _ in range(999)) + "|123} y"
    longest = choices + "y" * (10_000 - len(choices))
    assert len(longest) == 10_000 and check_entry(longest, "Entry") == longest
    cut = f"{longest[:27]}...{(longest + 'y')[-28:]}"
    assert told(check_entry, longest + "y", "Entry") == f"Entry {cut!r} has 10,001 characters: write 10,000 at most."
    says = "Entry '{a} {colours} x' names a choice {colours} that does not exist: did you mean {colour}? Write that."
    assert told(check_entry, "{a} {colours} x", "Entry") == says
    assert check_entry("{colourings} {a} x", "Entry") == "{colourings} {a} x"  # a choice of one, too far from any


# --- files, and names that are asked for --------------------------------------------------------------------------------------


def test_a_file_of_names_is_refused_in_these_sentences(load: Callable[..., list[Concept]]) -> None:
    several = "is one phrase, but '|' stands in it"
    says = f"Concept file names.txt: synonyms: entry 'b|c' {several}: write each as an entry of its own, synonyms: [b, c]."
    assert told(load, "zorp, b|c\n", "names.txt") == told(load, "dog, b|c\n", "names.txt") == says
    Path("names.txt").write_bytes(b"caf\xe9\n")
    config = RunConfig(concept_file="names.txt")
    assert told(load_concepts, config) == "Concept file names.txt is not UTF-8 text: save it as UTF-8."
    missing = "Concept file no.yaml does not exist: pass a YAML file with `name:` and `synonyms:`, or a list of names as .txt."
    assert told(load_concepts, RunConfig(concept_file="no.yaml")) == missing
    Path("names.txt").write_text("\n".join(f"zorp{number}" for number in range(MAX_ENTRIES + 1)))
    many = "Concept file names.txt has 5,001 concepts: write 5,000 at most."
    assert told(load_concepts, config) == many


def test_a_word_of_a_card_in_a_list_is_asked_about_in_this_sentence(load: Callable[..., list[Concept]]) -> None:
    start = "Concept file names.txt: concept"
    assert told(load, "panda\n", "names.txt").startswith(
        f"{start} 'panda' is one of several words on the card 'bear': write bear there to"
    )
    says = f"{start} 'bycicle' is near 'bicycle', which has a card: did you mean bicycle? Write bicycle there, or --exact to erase what you wrote."
    assert told(load, "bycicle\n", "names.txt") == says
    card = "{name: zorp, words: [zorp], synonyms: [glimmer]}"
    own = "Concept 'glimmer' is one of several words on the card 'zorp': pass --concept zorp to erase all that the card names, or --exact to erase this word alone."
    assert told(load, card, concepts=("glimmer",)) == own
    assert [concept.name for concept in load(card, concepts=("glimmer",), exact=True)] == ["glimmer"]
    assert told(load, "name: [x").startswith("Concept file card.yaml is not YAML")


def test_a_concept_file_may_have_its_greatest_size_and_no_byte_more(load: Callable[..., list[Concept]]) -> None:
    text = "zorp\n#" + "y" * (MAX_FILE - 6)
    assert [concept.name for concept in load(text, "names.txt")] == ["zorp"]
    says = "Concept file names.txt has 1,048,577 bytes: a card or list of names has 1,048,576 at most; split it."
    assert told(load, text + "y", "names.txt") == says


def test_lines_of_a_file_that_name_nothing_are_left_out(load: Callable[..., list[Concept]]) -> None:
    text = "\ufeff  # artists  \n \n#zorps\n  Glimmer # 5\u00e9 \n"
    (concept,) = load(text, "NAMES.TXT", kind="person")
    assert (concept.name, concept.words) == ("glimmer # 5\u00e9", ("glimmer # 5\u00e9",))
    (dog, zorp) = load("dog, Glimmer\nzorp, glimmer, dog\n", "names.csv")
    assert dog.synonyms[-2:] == ("glimmer", "glimmers") and dog.synonyms[:2] == ("puppy", "puppies") and dog.labels == ("dog",)
    assert zorp.phrases == ("zorp", "zorps", "glimmer", "glimmers", "dog", "dogs")
    (own,) = read_concept_file(Path("NAMES.TXT"), "style").values()
    assert own.kind == "style"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "No concept to erase: pass --concept bicycle, or --concept-file with a card."),
        ({"concepts": ("a|b",)}, "Concept 'a|b' is one phrase, but '|' stands in it: pass each with a --concept of its own: a, b."),
        ({"concepts": ("zorp*",)}, "Concept 'zorp*' is one phrase, but '*' stands in it: write the phrase without it."),
        ({"concepts": ("!",)}, "Concept '!' holds no word: write a word or phrase such as bicycle."),
        ({"concepts": ("bycicle",)},
         "Concept 'bycicle' is near 'bicycle', which has a card: did you mean bicycle? Pass --concept bicycle, or --exact to erase "
         "what you wrote."),
        ({"concepts": ("tedy bear",)},
         "Concept 'tedy bear' is near 'teddy bear', which has a card: did you mean teddy bear? Pass --concept 'teddy bear', or "
         "--exact to erase what you wrote."),
        ({"concepts": ("panda",)},
         "Concept 'panda' is one of several words on the card 'bear': pass --concept bear to erase all that the card names, or --exact "
         "to erase this word alone, for which no detector's label is known then."),
        ({"concepts": ("guys",)},
         "Concept 'guys' is one of several words on the cards 'man' and 'person': pass --concept man or pass --concept person to erase all "
         "that the card names, or --exact to erase this word alone, for which no detector's label is known then."),
        ({"concepts": ("a dog",)},
         "Concept 'a dog' is near 'dog', which has a card: did you mean dog? Pass --concept dog, or --exact to erase what you wrote."),
        ({"concepts": ("dog", "cat"), "anchor": "cat"},
         "Anchor 'cat' of concept 'dog' names 'cat', which is to be erased: pass --anchor with a word that names neither, such as object."),
        ({"concepts": ("dog",), "anchor": "a|b"},
         "Anchor 'a|b' is one phrase, but '|' stands in it: an anchor is one phrase: choose one of a, b."),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_refused_in_this_sentence(settings: dict[str, tuple[str, ...]], says: str) -> None:
    assert told(load_concepts, RunConfig(**settings)) == says  # type: ignore[arg-type]


def test_a_name_for_a_concept_is_refused_in_this_sentence() -> None:
    several = "is one phrase, but '|' stands in it: pass each with"
    kinds = "is unknown (did you mean 'object'?); choose one of: object, style, person, nudity."
    assert told(concept_named, "zorp", "objct") == f"Concept kind 'objct' {kinds}"
    assert told(concept_named, "x|y") == f"Concept 'x|y' {several} a --concept of its own: x, y."
    assert told(excluded_words, ["x|y"]) == f"Excluded word 'x|y' {several} an --exclude of its own: x, y."
    assert told(excluded_words, ["zorp", "!"]) == "Excluded word '!' holds no word: write a word or phrase such as bicycle."
    assert excluded_words(["dog; Zorp", "cat"]) == Concept(
        "excluded", words=("dog", "dogs", "zorp", "zorps", "cat", "cats")
    )  # as the page of a harvest names it
    assert (
        told(phrase_of, "a|b", "It") == "It 'a|b' is one phrase, but '|' stands in it: write each as an entry of its own: [a, b]."
    )
    assert names_in("'dog', \u201cRed_Cat\u201d;") == ["dog", "red cat"] and names_in("dog's") == ["dog's"]
    assert told(names_in, "y" * 1_000_001) == f"Concept '{CUT}' has 1,000,001 characters: pass a name such as bicycle."


def test_the_greatest_number_of_concepts_and_entries_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"zorp {number}" for number in range(MAX_ENTRIES)]
    monkeypatch.setattr(selection, "MAX_ENTRIES", 3)
    assert len(load_concepts(RunConfig(concepts=tuple(names[:3]), kind="style", exact=True))) == 3
    says = "4 concepts are named: erase 3 at once at most."
    assert told(load_concepts, RunConfig(concepts=tuple(names[:4]), kind="style")) == says
    assert len(entries_of(list(names), "It")) == 5_000
    assert told(entries_of, [*names, "x"], "It") == "It has 5,001 entries: write 5,000 at most."
    assert entries_of("a, b;c\nd", "It") == ["a", "b", "c", "d"] and entries_of(None, "It") == []
    assert phrase_of("y" * 200, "It") == "y" * 200
    assert told(phrase_of, "y" * 201, "It") == f"It '{CUT}' has 201 characters: write a phrase of 200 at most."


def test_settings_change_what_they_name_and_nothing_else() -> None:
    dog = all_cards()["dog"]
    assert load_concepts(RunConfig(concepts=("dogs",))) == [dog]
    (person,) = load_concepts(RunConfig(concepts=("dog",), kind="person", anchor=""))
    assert (person.kind, person.anchor, person.templates) == ("person", "", cards.TEMPLATES["person"])
    assert person.synonyms == dog.synonyms and person.labels == dog.labels
    gogh = all_cards()["van gogh"]
    assert load_concepts(RunConfig(concepts=("van gogh",))) == [gogh] and gogh.kind == "style"
    (painter,) = load_concepts(RunConfig(concepts=("Zorp Glimmer",), kind="style"))
    assert (painter.kind, painter.words, painter.anchor) == ("style", ("zorp glimmer",), "an artist")


def test_an_anchor_that_is_erased_too_is_left_to_clip_only_where_nobody_asked_for_it(load: Callable[..., list[Concept]]) -> None:
    own = "- {name: zorp, anchor: glimmer}\n- {name: glimmer, anchor: ''}\n"
    says = "Anchor 'glimmer' of concept 'zorp' names 'glimmer', which is to be erased: pass --anchor with a word that names neither, such as object."
    assert told(load, own) == says  # the user's own card asked for it
    assert [concept.anchor for concept in load("name: glimmer\n", concepts=("clock", "glimmer"))] == ["object", None]
    assert [concept.anchor for concept in load("name: object\n", concepts=("clock", "object"))] == [None, None]
    itself = "Anchor 'zorps' of concept 'zorp' names 'zorp', which is to be erased"
    assert told(load, "{name: zorp, anchor: zorps}").startswith(itself)


def test_concepts_of_a_damaged_run_are_refused_in_this_sentence(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert told(read_concepts, run) == f"Run {tmp_path} has no concepts.json: run `sd-erase harvest --run {tmp_path}` first."
    run.concepts.write_text("[3]")
    says = f"File {run.concepts} is damaged (it[0] is missing or is not what stands there): delete it and run `sd-erase harvest` again."
    assert told(read_concepts, run) == says


def test_a_name_is_a_slip_only_where_its_words_do_not_exist() -> None:
    assert [meant(name, "object") for name in ("bush", "mouse", "bycicle", "aple", "dg", "zorp")] == [
        None,
        None,
        "bicycle",
        "apple",
        None,
        None,
    ]
    zorp = Concept("zorp", words=("zorp",))
    assert meant("zorpp", "object", [zorp]) == "zorp" and meant("zorp", "object", [zorp]) is None
    assert meant("a hotdog", "object") == "hotdog" and meant("the zorp", "object", [zorp]) == "zorp"
    assert packaged_card("cell  Phone") == packaged_card("cellphones") == all_cards()["cell phone"]


# --- singular and plural ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("dogs", True), ("dog", False), ("zorps", True), ("zorp", False), ("bus", False), ("sheep", False), ("a dressed men", False),
        ("catch mice", True), ("red glass", False), ("red lens", False), ("hippopotamus", False), ("ZORPS", False),
    ],
)  # fmt: skip
def test_a_plural_is_known_by_the_stored_inflections_or_its_last_letter(phrase: str, expected: bool) -> None:
    assert is_plural(phrase) is expected


def test_inflections_come_in_this_order() -> None:
    assert inflections("Dogs") == ("dogs", "dog")
    assert inflections("index") == ("index", "indexes", "indices")
    assert inflections("indices") == ("indices", "index", "indexes")
    assert inflections("zorp cacti") == ("zorp cacti", "zorp cactus", "zorp cactuses")
    assert inflections("passers-by") == ("passers-by", "passer-by")
    assert inflections("alibi") == ("alibi", "alibis")
    assert inflections("zorpi") == ("zorpi", "zorpis")  # not every i is an older plural's
    assert inflections("shorts") == ("shorts",)
    assert inflections("fox's") == ("fox's",)


def test_the_stored_inflections_are_made_of_the_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m sd_erase.concepts``: names, synonyms and neighbours, and what has a plural in a spared entry."""
    monkeypatch.setattr(cards, "CARDS_FOLDER", tmp_path)
    monkeypatch.setattr(cards, "NUMBERS_FILE", tmp_path / "inflections.json")
    monkeypatch.setattr(cards, "_NEIGHBOURS", {"person": ("a man",), "style": ("monet",)})
    spared = "['{red|blue} sponge', 'bat {woman|man}', 'club + {ball} unless {cave}', 'off the bat', 'red , x']"
    text = f"name: Fruit  Bat\nsynonyms: [Flying Fox]\nneighbours: [mouse]\nspared: {spared}\n"
    (tmp_path / "bat.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "etude.yaml").write_text("name: \u00e9tude\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("name: other\n", encoding="utf-8")
    expected = {
        "a man": ["a man", "a men"],
        "club": ["club", "clubs"],
        "flying fox": ["flying fox", "flying foxes"],
        "fruit bat": ["fruit bat", "fruit bats"],
        "monet": ["monet", "monets"],
        "mouse": ["mouse", "mice"],
        "off the bat": ["off the bat", "off the bats"],
        "sponge": ["sponge", "sponges"],
        "x": ["x", "xes"],
        "\u00e9tude": ["\u00e9tude", "\u00e9tudes"],
    }
    assert cards.write_numbers() == expected
    written = (tmp_path / "inflections.json").read_bytes().decode("utf-8")
    assert list(json.loads(written).items()) == list(expected.items())
    lines = written.splitlines()  # one form a line, that a change of one card is a change of its lines
    assert lines[:4] == ["{", '"a man": [', '"a man",', '"a men"'] and '"\u00e9tudes"' in lines and written.endswith("]\n}\n")


def test_the_nouns_of_the_cards_hold_each_once() -> None:
    nouns = common_nouns()
    assert len(nouns) == len(set(nouns)) and {"bicycle", "teddy bear", "owl", "dog"} <= set(nouns)
    assert set(nouns) == {card.name for card in all_cards().values()}.union(*(card.neighbours for card in all_cards().values()))


# --- spared entries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "forms"),
    [
        ("apple phone", {"apple phone"}),
        ("{big|small} apple phone", {"big apple phone", "small apple phone"}),
        ("apple *", {"apple dog", "apple cat"}),
        ("* apple *", {"dog apple dog", "dog apple cat", "cat apple dog", "cat apple cat"}),
        ("{colour} apple", {f"{colour} apple" for colour in CHOICES["colour"].split("|")}),
        ("apple of {their} eye", {""}),  # somebody's: no noun of its own
        ("the apple", {""}),
        ("an apple tree", {""}),
        ("apple is", {""}),
        ("up for apple", {""}),
        ("apple + {ball}", {""}),
        ("red , apple", {""}),
        ("apple unless {ball}", {""}),
        ("salt & apple", {""}),
        ("out of the apple tree", {""}),
        ("a day apple", {""}),
        ("apple on plate", {"apple on plate"}),  # a function word inside is none at the end
    ],
)
def test_what_a_spared_entry_is_called_in_a_sentence(entry: str, forms: set[str]) -> None:
    rng = Random(0)
    assert {spoken_form(entry, ["dog", "cat"], rng) for _ in range(300)} == forms


@pytest.mark.parametrize(
    ("phrase", "parts"),
    [
        ("apple phone", ("", "apple phone")),
        ("{red|blue} bat", ("{red|blue} ", "bat")),
        ("red , bat", ("red , ", "bat")),
        ("bat {woman}", ("bat {woman}", "")),
        ("bat *", ("bat *", "")),
        ("{bat}", ("{bat}", "")),
    ],
)
def test_the_part_of_a_spared_phrase_that_has_a_plural(phrase: str, parts: tuple[str, str]) -> None:
    assert counted_part(phrase) == parts


@pytest.mark.parametrize(
    ("entry", "needed"),
    [
        ("apple phone", [{"apple"}, {"phone", "phones"}]),
        ("{red|dark blue} apple", [{"red", "dark", "blue"}, {"apple", "apples"}]),
        ("apple *", [{"apple"}]),  # any word is none to look for
        ("apple + {ball|team}", [{"apple", "apples"}, {"ball", "team"}]),
        ("apple unless {ball}", [{"apple", "apples"}]),
    ],
)
def test_the_words_that_a_caption_must_hold_for_a_spared_entry(entry: str, needed: list[set[str]]) -> None:
    compiled = compile_spared(entry)
    assert len(compiled.needed) == len(needed)
    assert all(set(words) <= most and words for words, most in zip(compiled.needed, needed, strict=True))
    assert compiled.open is entry.endswith("*")
    assert (compiled.context is not None, compiled.unless is not None) == ("+" in entry, "unless" in entry)
    assert compiled.source == entry


def test_of_two_choices_the_longer_is_read_first() -> None:
    (match,) = compile_spared("apple {tree|tree house}").pattern.finditer("an apple tree house")
    assert match.group() == "apple tree house"


# --- where they are found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "words"),
    [
        ("bicycle", {"bicycle"}),
        ("a red bicycle", {"bicycle"}),  # the longest, which is the rarest
        ("Hot Dog", {"hot"}),
        ("t v", {"t", "tv"}),  # initials may be written as one
        ("o'keeffe art", {"keeffe", "okeeffe"}),
        ("747", {"747"}),
        ("\u81ea\u884c\u8f66", set()),  # no spaces between words: any piece of a caption may hold it
        ("caf\u00e9", {"cafe"}),
        ("!", set()),
    ],
)
def test_the_words_by_which_a_caption_is_looked_up(phrase: str, words: set[str]) -> None:
    assert keys(phrase) == words


def test_a_concept_is_looked_up_by_words_wherever_that_can_be_told() -> None:
    assert Concept("x", words=("hot dog", "glass")).triggers == {"hot", "hotdog", "glass"}
    assert Concept("x", words=("dog", "\u81ea\u884c\u8f66")).triggers == frozenset()
    assert all(card.triggers for card in all_cards().values())


def test_a_spared_use_is_one_in_a_script_without_spaces() -> None:
    bicycle = Concept("x", words=("\u81ea\u884c\u8f66",), spared=("\u81ea\u884c\u8f66\u5e97", "\u81ea\u884c\u8f66 + {\u5e97}"))
    caption = "\u4e00\u5bb6\u81ea\u884c\u8f66\u5e97"  # a bicycle shop
    matches, spared = bicycle.scan(caption)
    assert matches == [] and [(use.start, use.end) for use in spared] == [(2, 6)]
    ((concept, found, uses),) = Matcher([bicycle]).scan(caption)
    assert (concept, found, uses) == (bicycle, matches, spared)
    assert [use.text for use in bicycle.find("\u81ea\u884c\u8f66")] == ["\u81ea\u884c\u8f66"]


@pytest.mark.parametrize(
    ("words", "caption", "expected"),
    [
        (("dr. seuss",), "Dr Seuss, dr. seuss", ["Dr Seuss", "dr. seuss"]),
        (("sammy davis jr",), "Sammy Davis Jr. sings", ["Sammy Davis Jr"]),  # the stop is the sentence's
        (("sammy davis jr.",), "Sammy Davis Jr. sings, sammy davis jr", ["Sammy Davis Jr.", "sammy davis jr"]),
        (("t.v.",), "a T.V., a tv, a T. V.", ["T.V.", "tv", "T. V."]),
        (("bi\u200bke",), "a bike", ["bike"]),
        (("zorp",), "azorp zorpa zorpz zorp", ["zorp"]),
        (("b2 bomber",), "a B2 bomber, a b22 bomber", ["B2 bomber"]),
        (("2 b",), "12 b, 2 b", ["2 b"]),
        (("boeing 747",), "a boeing 7475, a boeing 747", ["boeing 747"]),
        (("hot dog",), "hotdog, hot-dogs, hot_dog, ahotdog", ["hotdog", "hot_dog"]),
        (("a b c",), "abc, a b c", ["a b c"]),  # only two words are written as one
        (("zorp (toy)",), r"zorp \(toy\), zorp (toy)", [r"zorp \(toy\)", "zorp (toy)"]),
        (("\u81ea\u884c\u8f66 bike",), "\u81ea\u884c\u8f66 bikes, \u81ea\u884c\u8f66 bike", ["\u81ea\u884c\u8f66 bike"]),
        (("bike \u81ea",), "abike \u81ea, bike \u81ea\u884c", ["bike \u81ea"]),
        (("\uc790\uc804\uac70",), "\uc0c8\uc790\uc804\uac70 \uc790\uc804\uac70\ub97c", ["\uc790\uc804\uac70"]),  # no end of another word
        (("\u00e5ngstr\u00f6m",), "Angstrom, \u00c5NGSTR\u00d6M, a\u030angstr\u00f6m", ["Angstrom", "\u00c5NGSTR\u00d6M", "a\u030angstr\u00f6m"]),
        (("\uc790 bike \uac70",), "\uc790 bike \uac70\ub97c", ["\uc790 bike \uac70"]),
        (("zorp",), "\u017borp, zo\u0301rp", ["\u017borp", "zo\u0301rp"]),
        (("zo\u00eb",), "Zoe\u0308, zoe", ["Zoe\u0308", "zoe"]),
        (("dog",), "dog\u200bdog", ["dog", "dog"]),
    ],
)  # fmt: skip
def test_a_phrase_is_found_with_these_characters(words: tuple[str, ...], caption: str, expected: list[str]) -> None:
    assert [match.text for match in Concept("x", words=words).find(caption)] == expected


def test_why_a_use_is_one() -> None:
    hot_dog = Concept(
        "hot dog", words=("hot dog",), synonyms=("frank",), spared=("hot dog stand", "frank + {sinatra}", "frank *")
    )
    assert [match.reason for match in hot_dog.find("hot_dog, a Hot-Dog and a frank")] == [
        "word: hot dog",
        "word: hot-dog",
        "synonym: frank",
    ]
    matches, spared = hot_dog.scan("Frank of the Sinatras, a hot_dog_stand, frank Sinatra")
    assert matches == []
    assert [(use.text, use.reason) for use in spared] == [
        ("Frank", "spared sense: frank + sinatra"),
        ("hot_dog_stand", "spared sense: hot dog stand"),
        ("frank", "spared sense: frank + sinatra"),
    ]


def test_a_spared_phrase_with_an_open_end_yields_to_the_concepts_own() -> None:
    orange = Concept("x", words=("orange", "orange juice"), spared=("orange *", "orange juice stand"))
    assert [match.text for match in orange.find("orange juice, orange shirt")] == ["orange juice"]
    assert [use.text for use in orange.scan("orange juice, orange shirt")[1]] == ["orange shirt"]
    assert orange.find("an orange juice stand") == []


def test_a_matcher_names_its_concepts_in_their_order() -> None:
    cat, dog, silent = (
        Concept("cat", words=("cat",)),
        Concept("dog", words=("dog",), spared=("dog house",)),
        Concept("x", words=("zorp",)),
    )
    found = [
        (concept.name, len(matches), len(spared))
        for concept, matches, spared in Matcher([cat, silent, dog]).scan("dog house, dog, cat")
    ]
    assert found == [("cat", 1, 0), ("dog", 1, 1)]


def test_a_folded_text_knows_the_characters_behind_it() -> None:
    (text,) = fold("CAFE\u0301 \ufb01re")
    assert text.text == "cafe fire" and text.span(0, 4) == (0, 5) and text.span(5, 9) == (6, 9)
    assert text.cuts(0, 6) and text.cuts(6, 9) and not text.cuts(0, 4) and not text.cuts(5, 9)
    assert text.pieces == {"cafe", "fire"}
    assert [reading.text for reading in fold("hot\u200bdog")] == ["hotdog", "hot dog"]
    (plain_text,) = fold("A B2")
    assert (plain_text.text, plain_text.span(2, 4), plain_text.pieces) == ("a b2", (2, 4), {"a", "b", "2"})


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("  a_b  c ", "a b c"),
        ("\u2018x\u2019 \u2014 y", "'x' - y"),
        (r"zorp_\(toy\)", "zorp (toy)"),
        (r"a\\[b\]", "a[b]"),
        ("bi\u00adke", "bike"),
        ("\u0304x", "x"),
        ("x \u0304y", "x y"),
        ("e\u0301", "\u00e9"),
        ("\uff22\uff49\uff4b\uff45", "Bike"),
        (r"a\b", r"a\b"),
    ],
)
def test_a_phrase_is_kept_in_one_spelling(written: str, kept: str) -> None:
    assert plain(written) == kept
