"""The form of what a run's JSON files hold, where a stage relies on it: a run may be edited, or come from a stranger.

A form is a type, `number`, a tuple of forms of which one fits, ``[form]`` (a list of such), ``{str: form}`` (a mapping of names to such) or
``{"name": form}`` (a mapping in which these names, where they are there, hold such; those behind `Needed` must be there).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MOST_NUMBER = 1e15  # of what is shown: a greater one is no count and no duration
MOST_TEXT = 20_000  # characters of a text that a page or a sentence shows


class Needed(str):
    """The name of what a mapping must hold."""


def number(value: object) -> bool:
    """Whether `value` is a count, a share or a duration: finite and not negative."""
    return isinstance(value, (int, float)) and type(value) is not bool and 0 <= value < MOST_NUMBER  # NaN is neither


def signed(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and type(value) is not bool and -MOST_NUMBER < value < MOST_NUMBER


def count(value: object) -> bool:
    """Whether `value` is a whole number from 0."""
    return type(value) is int and 0 <= value < 2**53


def measured(value: object) -> bool:
    """Whether `value` is a number, NaN of a training that diverged included."""
    return type(value) is float or signed(value)


def text(value: object) -> bool:
    """Whether `value` is a text that can be shown."""
    return type(value) is str and len(value) <= MOST_TEXT


def role(value: object) -> bool:
    """Whether `value` is what a row of an evaluation is about."""
    return value in ("target", "target_named", "others", "object")


def box(value: object) -> bool:
    """Whether `value` is left, top, right and bottom in pixels."""
    return isinstance(value, list) and len(value) == 4 and all(map(signed, value))


def file_name(value: object) -> bool:
    """Whether `value` may be the path of a file inside a run."""
    return type(value) is str and 0 < len(value) <= 255


def family(value: object) -> bool:
    """Whether `value` is a layout of a base model's files."""
    return value in ("sd1", "sd2", "sdxl", "clip", "blip")


def nothing(value: object) -> bool:
    """Whether `value` is an empty mapping: of images without an erased side there is no p-value."""
    return value == {} and isinstance(value, dict)


def anything(value: object) -> bool:
    """Whatever it is."""
    return True


Form = Any  # a form refers to itself in more ways than a type can say


def fits(value: object, form: Form) -> bool:
    """Whether `value` has the form."""
    return not misfit(value, form)


def misfit(value: object, form: Form, where: str = "it") -> str:
    """The place in `value` that does not have the form, as "rows[3].name"; "" where all has."""
    if isinstance(form, tuple):
        found = [misfit(value, each, where) for each in form]
        return "" if not all(found) else max(found, key=len)
    if isinstance(form, list):
        if not isinstance(value, list):
            return where
        return next((bad for place, each in enumerate(value) if (bad := misfit(each, form[0], f"{where}[{place}]"))), "")
    if isinstance(form, Mapping):
        return _misfit_of_mapping(value, form, where)
    if form is None:
        return "" if value is None else where
    if isinstance(form, type):
        return "" if type(value) is form else where
    is_one: Callable[[object], bool] = form
    return "" if is_one(value) else where


def _misfit_of_mapping(value: object, form: Mapping[Any, Form], where: str) -> str:
    if not isinstance(value, dict):
        return where
    if str in form:
        pairs = ((name, each, form[str]) for name, each in value.items())
    else:
        if lacking := next((name for name in form if isinstance(name, Needed) and name not in value), None):
            return f"{where}.{lacking}"
        pairs = ((name, value[name], each) for name, each in form.items() if name in value)
    return next((bad for name, each, own in pairs if (bad := misfit(each, own, f"{where}.{name[:40]}"))), "")


# --- manifests --------------------------------------------------------------------------------------------------------------

CONTENTS = ({str: text}, None)
LINKS: dict[Any, Form] = {
    "stage": text, "inputs": text, "completed": text, "warnings": [text], "from": {str: CONTENTS}, "made": {str: CONTENTS},
    "seconds": number, "peak_memory_mb": (number, None), "merged": [text],
}  # fmt: skip
ENCODER: dict[Any, Form] = {Needed("name"): text, Needed("tokenizer"): text, Needed("layers"): [int], "pooled": bool}
CARD: dict[Any, Form] = {
    **{Needed(name): text for name in ("name", "title", "source", "clip_partner", "detector", "licence")},
    **{Needed(name): count for name in ("resolution", "steps", "batch_size")},
    **{name: text for name in ("configuration", "prediction", "lacks", "about", "named", "world")},
    **{name: bool for name in ("prediction_is_sure", "zero_snr", "pocket")},
    Needed("family"): family, Needed("encoders"): [ENCODER], Needed("guidance"): number, "anchors": [text], "notes": [text], "learning_rate_scale": number,
}  # fmt: skip
STEP: dict[Any, Form] = {"best_step": (count, None), "best_validation": ({str: signed}, None), "trained_numbers": count}
EXPORTED: dict[Any, Form] = {
    **{Needed(name): text for name in ("path", "sha256", "encoder", "dtype")},
    Needed("bytes"): count, Needed("difference"): (number, None), Needed("tensors"): count, "swapped": count, "changed": count, "rank": count,
    "residual": number,
}  # fmt: skip
PROGRAM: dict[Any, Form] = {Needed("programs"): text, Needed("advice"): text, Needed("works"): bool}
MANIFESTS: dict[str, dict[Any, Form]] = {
    "harvest": {"counts": {str: {str: (count, {str: count})}}, "concepts": [text], "images": count},
    "train": {
        "objective": text, "towers": text, "anchor": ({str: (text, None)}, text, None), "steps": count, "encoders": {str: STEP},
        "weights": {str: signed}, "lora_rank": count, "card": CARD, "interference": anything, **STEP,
    },
    "generate": {"images": count, "prompts": count, "steps": count, "guidance": signed, "height": count, "width": count, "seed": count},
    "report": {},
    "evaluate": {},
    "attack": {},
}  # fmt: skip


def of_manifest(stage: str, value: object) -> bool:
    """Whether `value` is what a stage leaves when it is done."""
    own = {Needed("files"): [EXPORTED], "programs": [PROGRAM]} if stage.startswith("export-") else MANIFESTS.get(stage, {})
    return fits(value, LINKS | own) and (not isinstance(value, dict) or value.get("stage", stage) == stage)


# --- figures and what they are counted from -----------------------------------------------------------------------------------

SHARE: dict[Any, Form] = {
    Needed("count"): count, Needed("n"): count, Needed("rate"): (number, None), Needed("low"): number, Needed("high"): number,
}  # fmt: skip
ROW: dict[Any, Form] = {
    Needed("name"): text, Needed("role"): role, Needed("images"): count, Needed("original"): SHARE, Needed("erased"): (SHARE, None),
    Needed("change"): (signed, None), Needed("p_value"): (number, None), "kept": (number, None),
}  # fmt: skip
SURPLUS: dict[Any, Form] = {
    Needed("doubled"): SHARE, Needed("unnamed"): SHARE, Needed("unnamed_labels"): {str: count},
    Needed("named_others_asked"): number, Needed("named_others_mean_count"): number,
}  # fmt: skip
PER_PROMPT: dict[Any, Form] = {
    Needed("prompt"): str, Needed("images"): count, Needed("targets"): {str: {str: count}}, Needed("others"): {str: {str: count}},
}  # fmt: skip
CALIBRATION: dict[Any, Form] = {
    Needed("threshold"): signed, Needed("missed"): SHARE, Needed("false_alarms"): SHARE, Needed("error"): number, Needed("blind"): bool,
}  # fmt: skip
JUDGE: dict[Any, Form] = {
    Needed("name"): text, Needed("weights"): text, Needed("weights_sha256"): text, Needed("image_size"): count, Needed("confidence"): number,
    "calibration": {str: CALIBRATION}, "anchors": {str: str},
}  # fmt: skip
DETECTOR: dict[Any, Form] = {**JUDGE, "judges": [JUDGE]}
OPINION: dict[Any, Form] = {
    Needed("judge"): text, Needed("rows"): [ROW], Needed("apart"): {str: {str: {Needed("first"): count, Needed("second"): count, Needed("of"): count}}},
}  # fmt: skip
MEASURES: dict[Any, Form] = {Needed(name): {Needed("original"): SHARE, "erased": (SHARE, None)} for name in ("UA", "IRA", "CRA")}
SURPLUS_P: dict[Any, Form] = {Needed("doubled"): number, Needed("unnamed"): number}

EVALUATION: dict[Any, Form] = {
    Needed("concepts"): [text], Needed("prompts"): count, Needed("images"): count, Needed("rows"): [ROW],
    Needed("surplus"): {Needed("original"): SURPLUS, "erased": SURPLUS}, "surplus_p": (nothing, SURPLUS_P), "naming": {str: count}, "left_out": count,
    "flat": {str: count}, "identical": {str: count}, Needed("per_prompt"): [PER_PROMPT], Needed("warnings"): [text], Needed("detector"): DETECTOR,
    "labels": {str: [text]}, "opinions": [OPINION], "unlearncanvas": {str: MEASURES},
}  # fmt: skip
DRAWN: dict[Any, Form] = {
    Needed("prompt_index"): count, Needed("prompt"): str, Needed("seed"): count, "sha256": {str: text},
    "original": (file_name, None), "erased": (file_name, None),
}  # fmt: skip
DETECTED: dict[Any, Form] = {
    Needed("image"): text, Needed("detections"): [{Needed("label"): text, Needed("score"): number, Needed("box"): box}],
}  # fmt: skip
METRIC: dict[Any, Form] = {
    Needed("step"): count,
    Needed("split"): text,
    "loss": (measured, None),
    "terms": {str: (measured, None)},
}
ANCHORS: dict[Any, Form] = {str: text}
BROUGHT_BACK: dict[Any, Form] = {
    Needed(arm): {Needed("images"): SHARE, Needed("prompts"): SHARE} for arm in ("none", "random", "search")
}
ATTACK: dict[Any, Form] = {
    Needed("concepts"): text, Needed("anchors"): ANCHORS, Needed("erased"): BROUGHT_BACK, Needed("control"): BROUGHT_BACK,
    **{Needed(name): count for name in ("prompts", "images_per_prompt", "tokens", "steps", "candidates")},
    Needed("seconds"): number, Needed("detector"): {Needed("name"): text}, Needed("warnings"): [text],
    "unnamed": {Needed("images"): count, Needed("original"): count},
}  # fmt: skip
CONCEPT: dict[Any, Form] = {
    Needed("name"): text, "kind": text, "anchor": (text, None),
    **{name: [text] for name in ("words", "synonyms", "spared", "neighbours", "labels", "templates")},
}  # fmt: skip
RECORD: dict[Any, Form] = {
    "status": text, "stages": {str: {"status": text, "seconds": number, "peak_memory_mb": (number, None)}}, "versions": ({str: (text, None)}, None),
    "hardware": ({str: (text, signed, None)}, None), "git": ({Needed("commit"): text, Needed("changed"): bool}, None),
}  # fmt: skip
