"""Words as people write them: tags, lists, slips of the pen, plurals, and letters of all scripts."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from sd_erase import concepts
from sd_erase.bases import resolve
from sd_erase.captions import open_dataset
from sd_erase.cli import main
from sd_erase.concepts import Concept, Matcher, all_cards, concept_named, inflections, label_form, load_concepts, packaged_card
from sd_erase.concepts.near import cards_listing, meant, slips
from sd_erase.concepts.phrases import MAX_ENTRIES, MAX_PHRASE
from sd_erase.concepts.spared import choices_of, parts_of, pieces
from sd_erase.config import HarvestConfig, RunConfig
from sd_erase.errors import UserError
from sd_erase.pairs import harvest, read_pairs
from sd_erase.rundir import RunDir


def texts(concept: Concept, caption: str) -> list[str]:
    matches = concept.find(caption)
    assert all(caption[match.start : match.end] == match.text for match in matches)
    assert [match for found in Matcher([concept]).scan(caption) for match in found[1]] == matches  # the quick test loses none
    return [match.text for match in matches]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., list[Concept]]:
    """Writes a concept file and reads it."""

    def loaded(text: str, name: str = "card.yaml", **settings: object) -> list[Concept]:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return load_concepts(RunConfig(concept_file=str(path), **settings))  # type: ignore[arg-type]

    return loaded


# --- tags ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "caption", "expected"),
    [
        ("bicycle", "red_bicycle, dog, park", ["bicycle"]),
        ("bicycle", "riding_bicycle, 1girl", ["bicycle"]),
        ("bicycle", "_bicycle_", ["bicycle"]),
        ("bicycle", "(red_bicycle:1.2), [bike]", ["bicycle", "bike"]),
        ("hot dog", "hot_dog, hot-dog, hot dog, hot _dog", ["hot_dog", "hot-dog", "hot dog", "hot _dog"]),
        ("bicycle", "mountain_bike", ["mountain_bike"]),
        ("woman", "1girl, 2women, 3d", ["women"]),
        ("bicycle", "2bicycles, bicycle2", ["bicycles", "bicycle"]),
        ("truck", "an 18_wheeler, 118 wheelers", ["18_wheeler"]),  # a number goes on to its end
    ],
)
def test_tags_name_what_a_sentence_names(name: str, caption: str, expected: list[str]) -> None:
    assert texts(concept_named(name), caption) == expected


@pytest.mark.parametrize("caption", ["apple_phone, table", "an_apple_laptop", "apple-\u200bphone"])
def test_a_spared_sense_is_one_in_tags_too(caption: str) -> None:
    matches, spared = concept_named("apple").scan(caption)
    assert not matches and len(spared) == 1
    assert caption[spared[0].start : spared[0].end] == spared[0].text


@pytest.mark.parametrize("name", ["hatsune_miku", "hatsune miku", "Hatsune-Miku"])
@pytest.mark.parametrize(
    "caption", ["hatsune_miku, 1girl", "Hatsune Miku on stage", "a hatsune-miku figure", "solo,hatsune_miku"]
)
def test_a_card_with_underscores_finds_every_form(write: Callable[..., list[Concept]], name: str, caption: str) -> None:
    (miku,) = write(f'name: "{name}"\nkind: person\nwords: [{name}]\n')
    assert (miku.name, miku.words) == ("hatsune miku", ("hatsune-miku" if "-" in name else "hatsune miku",))
    assert len(texts(miku, caption)) == 1


@pytest.mark.parametrize(
    "caption", [r"hatsune_miku_\(vocaloid\)", "hatsune miku (vocaloid)", r"solo, hatsune_miku_\(vocaloid\), smile"]
)
@pytest.mark.parametrize("name", [r"hatsune_miku_\(vocaloid\)", "hatsune_miku_(vocaloid)"])
def test_escaped_brackets_are_brackets(name: str, caption: str) -> None:
    (found,) = texts(concept_named(name, "person"), caption)
    assert found.rstrip("\\)").endswith("vocaloid")


def test_captions_of_tags_are_forgotten_and_never_retained(tmp_path: Path) -> None:
    rows = [f"{word}, {other}, park, {number}" for number, (word, other) in enumerate(
        [("red_bicycle", "dog"), ("riding_bicycle", "1girl"), ("bicycle", "cat"), ("old_bike", "car"), ("blue_bicycles", "bird")] * 4
        + [("red_ball", "dog"), ("running", "1girl"), ("car", "cat"), ("hotdog", "bicyclist")] * 4
    )]  # fmt: skip
    path = tmp_path / "tags.jsonl"
    path.write_text("".join(json.dumps({"key": str(number), "caption": row}) + "\n" for number, row in enumerate(rows)))
    run = RunDir(tmp_path / "run")
    harvest(RunConfig(concepts=("bicycle",), harvest=HarvestConfig(dataset=f"jsonl:{path}")), run)
    found = {name: [pair for pair in read_pairs(run) if pair.set == name] for name in ("forget", "retain")}
    assert sorted(pair.caption for pair in found["forget"]) == sorted(
        row for row in rows if re.search("bike|bicycles?(?!\\w)", row)
    )
    assert len(found["retain"]) == 16
    for pair in found["forget"]:
        assert [pair.caption[start:end] for start, end in pair.spans] == re.findall("bike|bicycles?", pair.caption)


@pytest.mark.realdata
def test_the_booru_captions_that_people_have(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "shared" / "cases" / "captions" / "booru_us.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    bicycle = concept_named("bicycle")
    for caption in open_dataset(f"jsonl:{path}", resolve("pocket"), tmp_path):
        assert bool(bicycle.find(caption.text)) == ("bicycle" in caption.text)


# --- letters ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "caption", "expected"),
    [
        ("bicycle", "the bicycle\u2019s wheel, bicycles\u2019 bells, bicycle\u02bcs, bicycle`s", ["bicycle", "bicycles", "bicycle", "bicycle"]),
        ("bicycle", "\uff22\uff49\uff43\uff59\uff43\uff4c\uff45", ["\uff22\uff49\uff43\uff59\uff43\uff4c\uff45"]),  # full-width
        ("bicycle", "BISIKLET \u0130stanbul BICYCLE", ["BICYCLE"]),
        ("bisiklet", "B\u0130S\u0130KLET, bisiklet, B\u0131s\u0131klet", ["B\u0130S\u0130KLET", "bisiklet", "B\u0131s\u0131klet"]),
        ("caf\u00e9", "a cafe, a CAFE\u0301, a caf\u00e9", ["cafe", "CAFE\u0301", "caf\u00e9"]),
        ("cafe\u0301", "a caf\u00e9", ["caf\u00e9"]),
        ("salvador dali", "Salvador Dal\u00ed", ["Salvador Dal\u00ed"]),
        ("fire", "a \ufb01re", ["\ufb01re"]),  # a ligature
        ("stra\u00dfe", "DIE STRASSE", ["STRASSE"]),
        ("bicycle", "bi\u00adcycle, bi\u200bcycle, red\u200bbicycle", ["bi\u00adcycle", "bi\u200bcycle", "bicycle"]),
        ("hot dog", "hot\u00a0dog, hot\u2011dog, hot\u3000dog", ["hot\u00a0dog", "hot\u2011dog", "hot\u3000dog"]),
        ("\u0432\u0435\u043b\u043e\u0441\u0438\u043f\u0435\u0434", "\u0412\u0415\u041b\u041e\u0421\u0418\u041f\u0415\u0414!", ["\u0412\u0415\u041b\u041e\u0421\u0418\u041f\u0415\u0414"]),
        ("\u03c0\u03bf\u03b4\u03ae\u03bb\u03b1\u03c4\u03bf", "\u03a0\u039f\u0394\u0397\u039b\u0391\u03a4\u039f", ["\u03a0\u039f\u0394\u0397\u039b\u0391\u03a4\u039f"]),  # Greek capitals
        ("\u81ea\u884c\u8f66", "\u4e00\u8f86\u7ea2\u8272\u81ea\u884c\u8f66\u5728\u516c\u56ed", ["\u81ea\u884c\u8f66"]),  # no spaces between words
        ("\uc790\uc804\uac70", "\ube68\uac04 \uc790\uc804\uac70\ub97c", ["\uc790\uc804\uac70"]),  # a particle is written to it
        ("\u0915\u093e\u0930", "\u0932\u093e\u0932 \u0915\u093e\u0930", ["\u0915\u093e\u0930"]),  # Devanagari: vowels are marks
    ],
)  # fmt: skip
def test_one_word_is_one_word_however_its_letters_are_written(name: str, caption: str, expected: list[str]) -> None:
    for form in ("NFC", "NFD"):
        found = texts(concept_named(unicodedata.normalize(form, name)), unicodedata.normalize(form, caption))
        assert found == [unicodedata.normalize(form, text) for text in expected]


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("\u0915\u093e\u0930", "\u0915\u093e\u0930\u0940\u0917\u0930"),  # it goes on with a vowel sign
        ("\u304b", "\u304c"),  # another syllable, though only a mark is added
        ("\u043c\u043e\u0438", "\u043c\u043e\u0439"),
        ("car", "\u00e7arp, carp\u00e9"),
        ("rose", "ros\u00e9s"),
        ("a. painter", "a painter"),  # an initial is no article
    ],
)
def test_other_letters_are_other_words(name: str, caption: str) -> None:
    for form in ("NFC", "NFD"):
        assert texts(concept_named(name, "person"), unicodedata.normalize(form, caption)) == []


@pytest.mark.parametrize(
    ("name", "captions"),
    [
        ("mcdonald's", ["McDonald\u2019s", "mcdonalds", "MCDONALD'S"]),
        ("j.k. rowling", ["J.K. Rowling", "J. K. Rowling", "JK Rowling"]),
        ("e. hopper", ["E. Hopper", "e hopper"]),
        ("dr seuss", ["Dr. Seuss", "dr seuss", "DR_SEUSS"]),
        ("o'keeffe", ["O\u2019Keeffe", "okeeffe"]),
    ],
)
def test_stops_and_apostrophes_inside_a_name_may_be_missing(name: str, captions: list[str]) -> None:
    for caption in captions:
        assert texts(concept_named(name, "style"), f"in the manner of {caption}, a tree") == [caption]


# --- plurals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("passer-by", "passers-by"), ("passer by", "passers by"), ("runner-up", "runners-up"), ("mother-in-law", "mothers-in-law"),
        ("man-of-war", "men-of-war"), ("t-shirt", "t-shirts"), ("push-up", "push-ups"),
        ("cactus", "cacti"), ("octopus", "octopi"), ("hippopotamus", "hippopotami"), ("thief", "thieves"), ("hoof", "hooves"), ("index", "indices"),
        ("goose", "geese"), ("person", "persons"), ("wolf", "wolves"), ("child", "children"), ("potato", "potatoes"), ("plateau", "plateaux"),
    ],
)  # fmt: skip
def test_a_plural_finds_the_singular_and_the_other_way_round(one: str, many: str) -> None:
    for name in (one, many):
        card = concept_named(name)
        assert texts(card, f"{one}, {many.replace('-', '_')}") == [one, many.replace("-", "_")]


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("shorts", "a short man"),
        ("glasses", "a glass of water"),
        ("goods", "a good day"),
        ("blues", "a blue sky"),
        ("briefs", "a brief look"),
    ],
)
def test_a_plural_whose_singular_is_another_thing_has_none(name: str, caption: str) -> None:
    assert texts(concept_named(name), caption) == []
    assert texts(concept_named(name), f"the {name}") == [name]


@pytest.mark.parametrize("name", ["levi's", "dogs'", "\u81ea\u884c\u8f66", "miku (vocaloid)"])
def test_what_has_no_english_plural_gets_none(name: str) -> None:
    assert inflections(name) == (name,)


# --- names that are asked for -------------------------------------------------------------------------------------------------


def test_no_card_answers_to_a_word_that_it_spares() -> None:
    assert packaged_card("glasses") is None
    asked = set()
    for card in all_cards().values():
        for entry in card.spared:
            phrase = parts_of(entry)[0]
            options = [choices_of(piece)[:40] for piece in pieces(phrase)]
            longest = max(map(len, options))
            asked |= {" ".join(option[number % len(option)] for option in options) for number in range(longest)}
            if not set("{*,") & set(phrase):
                asked |= set(inflections(phrase))
    answers = {name: packaged_card(name) for name in asked if concepts.TOKEN.search(name) and not set("*,&") & set(name)}
    assert len(answers) > 1000
    assert not {
        name: card.name for name, card in answers.items() if card and not any(card.find(word) for word in (name, *card.words))
    }
    assert not {name: card.name for name, card in answers.items() if card and card.scan(name)[1]}


@pytest.mark.parametrize(
    ("name", "card"),
    [("glass", "glass"), ("apples", "apple"), ("hotdog", "hot dog"), ("Cell_Phone", "cell phone"), ("teddybears", "teddy bear"),
     ("\uff22icycle", "bicycle"), ("apple watch", None), ("red apple", None), ("xylophone", None)],
)  # fmt: skip
def test_a_name_opens_the_card_whose_word_it_is(name: str, card: str | None) -> None:
    found = packaged_card(name)
    assert (found and found.name) == card


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (("apple, bicycle",), ["apple", "bicycle"]),
        (("apple; bicycle", "dog"), ["apple", "bicycle", "dog"]),
        (("apple; bicycle; ",), ["apple", "bicycle"]),
        (("apple,apples, Apple",), ["apple"]),
        (("'bicycle'", '"dog"'), ["bicycle", "dog"]),  # what the shell of Windows leaves
        (("\u81ea\u884c\u8f66\u3001\u72d7",), ["\u81ea\u884c\u8f66", "\u72d7"]),
    ],
)
def test_a_list_in_a_concept_is_several(asked: tuple[str, ...], names: list[str]) -> None:
    assert [concept.name for concept in load_concepts(RunConfig(concepts=asked))] == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concepts": ("apple|orange",)}, "'|' stands in it: pass each with a --concept of its own: apple, orange"),
        ({"concepts": ("woman + man",)}, "'+' stands in it: pass each with a --concept of its own: woman, man"),
        ({"concepts": ("{apple}",)}, "'{' stands in it"),
        ({"concepts": ("bike*",)}, "'*' stands in it"),
        ({"concepts": (",;",)}, "holds no word"),
        ({"concepts": ("x" * 10**6,)}, "characters"),
        ({"concepts": ("x" * 10**4,)}, "10,000 characters"),
        ({"concepts": tuple(f"name {number}" for number in range(MAX_ENTRIES + 1))}, "5,001 concepts are named"),
        ({"concepts": ("bicycle",), "anchor": "object, thing"}, "an anchor is one phrase"),
        ({"concepts": ("bicycle",), "anchor": "!"}, "holds no word"),
    ],
)
def test_what_is_no_name_is_refused_at_once(settings: dict[str, object], message: str) -> None:
    started = time.process_time()
    with pytest.raises(UserError) as error:
        load_concepts(RunConfig(**settings))  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("name", "word"),
    [("bycicle", "bicycle"), ("Bicylce", "bicycle"), ("bycicles", "bicycles"), ("elefant", "elephant"), ("umbrela", "umbrella"),
     ("aple", "apple"), ("tedy bear", "teddy bear"), ("van_gohg", "van gogh"), ("ibcycle", "bicycle"), ("a bicycle", "bicycle"),
     ("the apples", "apples"), ("vincent van goh", "van gogh"), ("duffle bag", "suitcase")],
)  # fmt: skip
def test_a_slip_of_the_pen_is_asked_about(name: str, word: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {word}\\?.*--exact"):
        load_concepts(RunConfig(concepts=(name,)))
    (kept,) = load_concepts(RunConfig(concepts=(name,), exact=True))
    assert kept.name == name.lower().replace("_", " ")


@pytest.mark.parametrize(
    ("name", "cards"),
    [("bike", "bicycle"), ("Bikes", "bicycle"), ("sofa", "couch"), ("brocolli", "broccoli"), ("vincent_van_gogh", "'van gogh'"),
     ("a panda", "bear"), ("sofa bed", "bed or pass --concept couch"), ("boy", "person")],
)  # fmt: skip
def test_a_further_word_of_a_card_is_asked_about(name: str, cards: str) -> None:
    """It has no label of its own, so that nothing would be measured; and "panda" is not every bear, so that the card is not taken."""
    with pytest.raises(UserError, match=f"one of several words on the card.*: pass --concept {cards} to erase all .*--exact"):
        load_concepts(RunConfig(concepts=(name,)))
    (kept,) = load_concepts(RunConfig(concepts=(name,), exact=True))
    assert kept.name == name.lower().replace("_", " ") and not kept.labels


def test_what_a_card_spares_or_another_kind_of_card_lists_is_not_asked_about() -> None:
    for name, kind in (("glasses", "object"), ("robin", "person"), ("water cycle", "object"), ("man", "object")):
        assert cards_listing(name, kind) == []
        load_concepts(RunConfig(concepts=(name,), kind=kind))


def test_a_further_word_of_ones_own_card_is_asked_about(write: Callable[..., list[Concept]]) -> None:
    with pytest.raises(UserError, match="--concept 'glim glam'"):
        write("name: glim glam\nsynonyms: [zorp]\nlabels: [zorpy]", concepts=("zorps",))
    with pytest.raises(UserError, match="--concept 'glim glam'"):
        write("name: glim glam\nsynonyms: [zorp]\nlabels: [zorpy]", concepts=("zorpy",))


@pytest.mark.parametrize(
    ("line", "message"), [("bycicle", "did you mean bicycle\\? Write bicycle there"), ("sofa", "write couch there")]
)
def test_a_list_of_names_is_asked_about_too(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(f"elephant\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"names.txt: concept .*{message}.*--exact"):
        load_concepts(RunConfig(concept_file=str(path)))
    assert [concept.name for concept in load_concepts(RunConfig(concept_file=str(path), exact=True))] == ["elephant", line]
    path.write_text(f"{line}, zorp\n", encoding="utf-8")  # with further names it is a card of one's own
    if line == "sofa":
        assert load_concepts(RunConfig(concept_file=str(path)))[0].phrases[:2] == ("sofa", "sofas")


def test_a_word_of_ones_own_card_may_be_misspelt_too(write: Callable[..., list[Concept]]) -> None:
    with pytest.raises(UserError, match="did you mean xylophone"):
        write("name: xylophone", concepts=("xylofone",))
    assert [concept.name for concept in write("name: xylophone", concepts=("xylophones",))] == ["xylophone"]  # of the own card


@pytest.mark.parametrize(
    "name",
    # cards; words near a card's; what a card has beside the concept; names of people, artists, figures and firms
    [
        "cat",
        "car",
        "bus",
        "tie",
        "house",
        "mouse",
        "boot",
        "coat",
        "goat",
        "beer",
        "pear",
        "bread",
        "cap",
        "track",
        "trail",
        "cart",
        "pie",
        "pan",
        "crow",
        "chain",
        "bowling",
        "handbook",
        "bookcase",
        "skater",
        "trainer",
        "motorbike",
        "tricycle",
        "unicycle",
        "scooter",
        "toiletry",
        "surfboarder",
        "bicyclist",
        "monet",
        "dali",
        "bosch",
        "klee",
        "miro",
        "hopper",
        "kahlo",
        "banksy",
        "basquiat",
        "rembrandt",
        "hokusai",
        "picasso",
        "pikachu",
        "naruto",
        "totoro",
        "mario",
        "kirby",
        "zelda",
        "batman",
        "barbie",
        "shrek",
        "adidas",
        "nike",
        "pepsi",
        "tesla",
        "honda",
        "volvo",
        "ferrari",
        "boeing",
        "lego",
        "velo",
        "fahrrad",
        "hund",
        "katze",
        "perro",
        "chien",
        "auto",
        "tisch",
        "stuhl",
        "carla",
        "karl",
        "carol",
        "bush",
        "booth",
        "bowie",
        "crane",
        "dodge",
        "ford",
        "kate",
        "kitty",
        "owen",
        "couch",
        "cohen",
        "cooper",
        "doug",
        "maya",
    ]
    + [
        "salvador dali",
        "greg rutkowski",
        "hatsune miku",
        "tom hanks",
        "taylor swift",
        "mickey mouse",
        "hello kitty",
        "golf ball",
        "maple tree",
    ],
)
def test_a_word_that_exists_is_not_asked_about(name: str) -> None:
    assert meant(name, "object") is None


def test_people_and_styles_are_not_taken_for_objects() -> None:
    assert [
        name
        for name in ("Catt", "Kitt", "Forke", "Lapton", "Pizzo", "Vasey", "Bowes")
        if meant(name, "person") or meant(name, "style")
    ] == []


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abc", "ab", 1),
        ("abc", "abd", 1),
        ("bycicle", "bicycle", 2),
        ("abc", "cba", 2),
    ],
)
def test_slips_are_counted(one: str, other: str, count: int) -> None:
    assert slips(one, other) == slips(other, one) == count


def test_a_misspelt_name_is_asked_about_before_anything_is_made(tmp_path: Path) -> None:
    with CliRunner().isolated_filesystem(tmp_path) as folder:
        result = CliRunner().invoke(main, ["train", "--concept", "bycicle"])
        assert result.exit_code == 2 and "did you mean bicycle?" in result.output
        assert list(Path(folder).iterdir()) == []


# --- cards --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "synonyms",
    ["bike, cycle, velo", "bike; cycle;velo", "[bike, cycle, velo]", "|\n  bike\n  cycle\n  velo\n", "\n- bike\n- cycle\n- velo"],
)
def test_one_text_with_separators_is_several_synonyms(write: Callable[..., list[Concept]], synonyms: str) -> None:
    (card,) = write(f"name: bicycle\nsynonyms: {synonyms}\n")
    assert card.synonyms[::2] == ("bike", "cycle", "velo")
    assert texts(card, "a bike, a cycle and a velo") == ["bike", "cycle", "velo"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a, b", "name 'a, b' is one phrase, but ',' stands in it: give each a card of its own: a, b"),
        ("name: x\nsynonyms: ['bike, cycle']", "write each as an entry of its own, synonyms: [bike, cycle]"),
        ("name: x\nsynonyms: [bike|cycle]", "write each as an entry of its own, synonyms: [bike, cycle]"),
        ("name: x\nwords: ['{a|b} bike']", "'{' stands in it"),
        ("name: x\nwords: [bike*]", "'*' stands in it"),
        ("name: x\nneighbours: [a;b]", "write each as an entry of its own, neighbours: [a, b]"),
        ("name: x\nanchor: a|b", "an anchor is one phrase: choose one of a, b"),
        ("name: x\nspared: [x phone|x laptop]", "a choice without braces"),
        ("name: x\nspared: x phone, x laptop", "a list in one text: write each as an entry of its own"),
        ("name: x\nspared: ['x phone; x laptop']", "a list in one text"),
        ("name: x\nspared: ['x pho*']", "a * inside a word"),
        ("name: x\nspared: ['{a|} x']", "an empty choice"),
        ("name: x\nspared: ['{a|{b}} x']", "an unmatched brace"),
        ("name: x\nspared: ['{colours} x']", "did you mean {colour}?"),
        ("name: x\nspared: ['{somebdy} x']", "did you mean {somebody}?"),
        ("name: x\nspared: ['x UNLESS']", "misplaced + or unless"),
        ("name: x\nspared: ['" + "* " * 50 + "x']", "51 words"),
        ("name: x\nspared: [x, xs]", "spares the words of 'x' themselves"),
        ("name: x\nneighbours: [y, xes]", "neighbour 'xes' is to be retained, but it names 'x'"),
        ("name: x\ntemplates: a {}; b {}", "must hold {} once"),
        ("name: 747", "write it in quotes"),
        ("name: x\nsynonyms:\n  bike\n  cycle\n", "write a dash before each entry"),
        ("name: x\nsynonyms: >\n  bike\n  cycle\n", "write a dash before each entry"),
        ("- {name: x}\n- {name: X}", "names 'x' twice"),
        ("A. Painter\nB. Actor,actor\n", "a list of names is a .txt file"),
        ("name: x\nsynonyms: [" + "y" * 10**6 + "]", "more than 1 MB"),
        ("name: x\nsynonyms: [" + ", ".join(f"y{number}" for number in range(10**4)) + "]", "5,000 at most"),
        ("name: x\nsynonyms: [" + "y, " * 10**5 + "]", "100000 values"),
        ("name: " + "y" * 10**5, "100,000 characters"),
        ("name: x\nspared: ['" + "y" * 10**5 + "']", "10,000 at most"),
        ("name: x\ntemplates: ['" + "y" * 10**5 + "{}']", "200 at most"),
        ("name: x\nlabels: [" + "y" * 10**5 + "]", "200 characters at most"),
        (f"name: x\n{'y' * 10**3}: z", "is unknown"),
        ("name: x\nkind: [" + "y, " * 10**4 + "]", "must be text"),
    ],
)  # fmt: skip
def test_what_a_card_cannot_mean_is_one_short_sentence_at_once(
    write: Callable[..., list[Concept]], text: str, message: str
) -> None:
    started = time.process_time()
    with pytest.raises(UserError) as error:
        write(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert time.process_time() - started < 3


def test_a_color_is_a_colour(write: Callable[..., list[Concept]]) -> None:
    (card,) = write("name: x\nspared: ['{color} x']\n")
    assert texts(card, "a red x and an old x") == ["x"]


def test_a_file_of_names_is_a_concept_a_line(write: Callable[..., list[Concept]]) -> None:
    text = "\ufeff# artists\nA. Painter\nB. Actor,actor\n\nC_Designer, graphic designer; designer\nbicycle, velo\n"
    found = write(text, "artists.txt", kind="person")
    assert [(concept.name, concept.phrases, concept.kind) for concept in found[:3]] == [
        ("a. painter", ("a. painter",), "person"),
        ("b. actor", ("b. actor", "actor"), "person"),
        ("c designer", ("c designer", "graphic designer", "designer"), "person"),
    ]
    assert texts(found[0], "a painter by A. Painter") == ["A. Painter"]
    (own, *_) = write("bicycle, velo\n", "names.txt")
    assert own.labels == ("bicycle",) and {"bike", "velo"} <= set(own.synonyms)  # the card that ships, and one word more
    (named,) = write("- dog\n", "names.yaml")
    assert named == all_cards()["dog"]
    (card,) = write("name: x\nsynonyms: [y]\n", "card.txt")
    assert card.phrases == ("x", "xes", "y", "ies") or card.synonyms[0] == "y"


def test_the_kind_that_the_settings_name_is_that_of_a_card_without(write: Callable[..., list[Concept]]) -> None:
    (card,) = write("name: Claude Monet\n", kind="style")
    assert (card.kind, card.phrases, card.anchor) == ("style", ("claude monet",), "an artist")


def test_excluded_words_are_phrases_too() -> None:
    excluded = concepts.excluded_words(("bike, velo", "two_wheeler"))
    assert texts(excluded, "bikes, a velo and a two-wheeler") == ["bikes", "velo", "two-wheeler"]
    for wrong in ("", "!!", "a|b", "x" * (MAX_PHRASE + 1)):
        with pytest.raises(UserError, match="Excluded word"):
            concepts.excluded_words((wrong,))


# --- labels -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["cell phone", "Cell Phone", "CELL_PHONE", " cell-phone ", "\uff23ell phone"])
def test_labels_are_compared_without_case_and_underscores(write: Callable[..., list[Concept]], label: str) -> None:
    from sd_erase.detection import Card, our_labels

    (card,) = write(f"name: phone\nlabels: ['{label}']\n")
    assert card.labels == ("cell phone",) == Concept.from_dict({"name": "phone", "labels": [label]}).labels
    detector = Card("d", "onnx", "w", 64, 0.3, 0.5, "MIT")
    assert our_labels([label, "Dog"], detector) == {"cell phone", "dog"}
    assert label_form(label) == "cell phone"


def test_a_labels_comma_is_its_own_in_a_list_and_separates_in_a_text(write: Callable[..., list[Concept]]) -> None:
    assert write("name: x\nlabels: ['tench, Tinca tinca']\n")[0].labels == ("tench, tinca tinca",)
    assert write("name: x\nlabels: Dog, cell_phone\n")[0].labels == ("dog", "cell phone")


# --- time ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption",
    ["bike " * 40_000, "a" * 200_000, "hot" + " " * 200_000 + "dog", "\\" * 200_000 + "(", "hot_" * 50_000, "\u00e9" * 100_000 + "bike",
     "an orange " * 20_000, "e\u0301\u200b" * 60_000, "'" * 200_000, "j." * 100_000],
    ids=lambda caption: repr(caption[:8]),
)  # fmt: skip
def test_long_captions_take_seconds(caption: str) -> None:
    cards = [concept_named(name) for name in ("bicycle", "orange", "hot dog", "tv", "bat")]
    cards.append(concept_named(r"miku_\(vocaloid\)", "person"))
    started = time.process_time()
    for card in cards:
        card.scan(caption)
    assert time.process_time() - started < 8
