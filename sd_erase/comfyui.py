"""What ComfyUI's nodes do (``integrations/comfyui``), on nothing of ComfyUI but three methods of its CLIP object.

A change is given as patches, the difference to the weights as they were before any patch, so that LoRAs before and after it stay and a
strength between 0 and 1 is part of the way. The connected object is cloned, never changed, and no file is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sd_erase import bases, components, fingerprints, formats
from sd_erase.api.erasing import erase as erase_model
from sd_erase.api.models import Encoders
from sd_erase.errors import UserError
from sd_erase.lora import add_lora, is_lora
from sd_erase.progress import Progress

# ComfyUI's names of CLIP's text encoders -> the pipeline's component, and the configuration folder by what stands beside it
PARTS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
PADDED_BY_NULL = ("clip_h", "clip_g")  # the encoders whose padding is token 0, "!"
OTHERS = ("t5xxl", "llama", "qwen")  # text encoders that an erasure of CLIP does not reach
STATES = dict[str, dict[str, Any]]  # component -> tensors by prefixed names


class Clip(Protocol):
    """What is asked of ComfyUI's ``comfy.sd.CLIP``."""

    def clone(self) -> Any:
        """A second one, of the same weights, whose patches are its own."""

    def add_patches(self, patches: dict[str, Any], strength_patch: float = ..., strength_model: float = ...) -> list[str]:
        """Add changes by name; returns the names that it knows."""

    def get_key_patches(self) -> dict[str, Any]:
        """Name -> the weight as it was before any patch, with a function that makes it one, and the patches."""


@dataclass(frozen=True)
class Statement:
    """What a file says of itself."""

    concept: str
    anchors: Mapping[str, str]
    base: str
    objective: str
    figures: Mapping[str, Mapping[str, tuple[int, int]]]  # thing -> side -> images that show it, images
    prints: Mapping[str, str]  # component -> `fingerprints.written` of the base's

    @classmethod
    def of(cls, path: Path) -> Statement:
        """Of a file's header.

        Raises:
            UserError: there is no such file, or sd-erase did not write it.
        """
        stated = formats.read_header(path).metadata
        if "sd_erase.version" not in stated:
            raise UserError(
                f"File {path.name} does not say what was erased: it is no export of sd-erase, or another program dropped its header."
            )
        return cls(
            stated.get("sd_erase.concept", ""), _mapping(stated, "anchor"), stated.get("sd_erase.base", ""), stated.get("sd_erase.objective", ""),
            _mapping(stated, "figures"), _mapping(stated, "base_print"),
        )  # fmt: skip

    def lines(self) -> list[str]:
        """For reading."""
        places = {name: place or "nothing" for name, place in self.anchors.items()}
        lines = [
            f"erased: {self.concept}"
            + (f" (in its place: {', '.join(f'{n} → {p}' for n, p in places.items())})" if places else "")
        ]
        lines.append(f"from: {self.base}, objective {self.objective}")
        for name, sides in self.figures.items():
            shown = ", ".join(f"{side} {count} of {n} images" for side, (count, n) in sides.items())
            lines.append(f"measured: {name}: {shown}")
        return lines if self.figures else [*lines, "measured: the file states no figures"]

    def warnings(self, states: STATES) -> list[str]:
        """What speaks against using the file with these encoders."""
        found = []
        for component, text in self.prints.items():
            if component in states:
                try:
                    apart = fingerprints.difference(text, states[component])
                except ValueError:
                    return [
                        f"The file's mark of its base ({component}) is damaged, so nothing tells whether the connected model is it."
                    ]
                if apart > fingerprints.SAME:
                    found.append(
                        f"The connected {component} is not the {self.base} that the file was made from (its weights differ by {100 * apart:.2g} %): "
                        "the erasure may not hold, or spoil the images."
                    )
        if not self.prints:
            found.append(
                "The file does not say which weights it was made from, so nothing tells whether the connected model has them."
            )
        return found


def is_ours(path: Path) -> bool:
    """Whether a file is one of sd-erase's, for a list of choices."""
    try:
        return "sd_erase.version" in formats.read_header(path).metadata
    except (UserError, OSError):
        return False


def load(clip: Clip, path: Path, strength: float = 1.0) -> tuple[Any, str]:
    """A CLIP with the erasure of a file: text encoder, checkpoint, LoRA or ``.diff``.

    Args:
        strength: 1 is the erased encoder, 0 the original.

    Returns:
        The new CLIP, and what to show: what was erased, from what, the figures, warnings.

    Raises:
        UserError: the file is not sd-erase's, is damaged, or is of another architecture.
    """
    path = Path(path)
    stated, states = Statement.of(path), originals(clip)
    if is_lora(formats.read_header(path).tensors):
        erased = add_lora(states, path)
    else:
        erased = formats.read_encoders(path)
        if "" in erased:
            erased = {next(iter(states)): erased.pop("")}
    unknown = next((name for name in erased if name not in states), None)
    if unknown is not None:
        raise UserError(
            f"File {path.name} holds a {unknown}, and the connected CLIP has {', '.join(states)}: connect one of {stated.base}."
        )
    changed = patched(clip, {name: _changes(states[name], new, path, stated) for name, new in erased.items()}, strength)
    return changed, _told([*stated.lines(), f"strength: {strength:g}"], [*stated.warnings(states), *_beside(clip)])


def erase(
    clip: Clip,
    concept: str,
    anchor: str = "",
    kind: str = "object",
    keep: str = "",
    strength: float = 1.0,
    seed: int = 0,
    progress: bool | Progress = False,
) -> tuple[Any, str]:
    """A CLIP without a concept, by the closed form (objective `fast`) on the weights of the connected one.

    Args:
        concept: a name, or several with commas.
        anchor: what stands in its place; "" is the card's or CLIP's choice.
        kind: "object", "style", "person" or "nudity".
        keep: words that must stay, with commas.

    Returns:
        The new CLIP, and what to show.

    Raises:
        UserError: a bad name, or a CLIP without an encoder of Stable Diffusion.
    """
    import torch

    with torch.inference_mode(False):  # ComfyUI's nodes run in that mode, whose tensors cannot be edited
        states = {name: {key: value.detach().clone() for key, value in state.items()} for name, state in originals(clip).items()}
        found = erase_model(
            _as_encoders(clip, states),
            concept,
            kind=kind,
            anchor=anchor.strip() or None,
            method="fast",
            keep=[word.strip() for word in keep.split(",") if word.strip()],
            seed=seed,
            progress=progress,
        )
        changes = {}
        for name in states:
            new = formats.prefixed({key: value.cpu() for key, value in getattr(found.model, name).state_dict().items()})
            changes[name] = _changes(states[name], new, Path("erased"), None)
    places = ", ".join(f"{name} → {place or 'nothing'}" for name, place in found.anchors.items())
    lines = [f"erased: {', '.join(found.concepts)} (in its place: {places})"]
    lines += [f"erased with it: {words}" for words in found.names.values() if words]
    lines += [f"closed form, {found.seconds:.0f} s, strength {strength:g}; not measured: evaluate it before you rely on it"]
    return patched(clip, changes, strength), _told(lines, [*found.warnings, *_beside(clip)])


def originals(clip: Clip) -> STATES:
    """The connected text encoders' weights as they were before any patch, by component.

    Raises:
        UserError: there is none of Stable Diffusion, or it is quantised.
    """
    found: STATES = {}
    stored = clip.get_key_patches()
    for name, component in PARTS.items():
        prefix = f"{name}.transformer."
        state = {key.removeprefix(prefix): _weight(value) for key, value in stored.items() if key.startswith(prefix)}
        keys = formats.text_encoder_keys(formats.count_layers(state), projection=component == "text_encoder_2")
        state = {key: value for key, value in state.items() if key in keys}  # ComfyUI gives CLIP-L a projection, too
        if not state:
            continue
        odd = next((key for key, value in state.items() if not value.is_floating_point() or value.itemsize < 2), None)
        if odd is not None:
            raise UserError(f"The connected {name} is quantised ({odd} is {state[odd].dtype}): load it in fp16 or fp32.")
        found[component] = state
    if not found:
        raise UserError("The connected CLIP has no CLIP text encoder of Stable Diffusion 1.x, 2.x or XL: connect one that has.")
    return found


def patched(clip: Clip, changes: Mapping[str, Mapping[str, Any]], strength: float) -> Any:
    """A clone of `clip` with differences of weights added.

    Raises:
        UserError: it does not know one of them.
    """
    names = {component: _comfy_name(clip, component) for component in changes}
    patches = {f"{names[part]}.transformer.{key}": (value,) for part, own in changes.items() for key, value in own.items()}
    new = clip.clone()
    known = set(new.add_patches(patches, strength))
    if lost := sorted(patches.keys() - known):
        raise UserError(
            f"ComfyUI did not take {len(lost)} of {len(patches)} changes, first {lost[0]}: update sd-erase, or load the file with its own nodes."
        )
    return new


def _changes(own: Mapping[str, Any], new: Mapping[str, Any], path: Path, stated: Statement | None) -> dict[str, Any]:
    """What to add to `own` for it to be `new`, in float32 on the CPU: where both are not equal beyond the rounding of their types."""
    import torch

    found = {}
    for key, value in new.items():
        if key not in own:
            if key == "text_projection.weight":  # which CLIP-L's file may have and nothing reads
                continue
            raise UserError(
                f"{path.name} has {key}, and the connected encoder has not: connect a CLIP of {stated.base if stated else 'its kind'}."
            )
        old = own[key].to("cpu", torch.float32)
        if old.shape != value.shape:
            raise UserError(
                f"{path.name} is of another size ({key}: {tuple(value.shape)}, connected: {tuple(old.shape)}): connect a CLIP of "
                f"{stated.base if stated else 'its kind'}."
            )
        value = value.to("cpu", torch.float32)
        if not torch.equal(old, value):
            found[key] = value - old
    return found


def _as_encoders(clip: Clip, states: STATES) -> Encoders:
    """The connected encoders as transformers' models, in float32."""
    from transformers import CLIPTokenizerFast

    if "text_encoder" not in states:
        raise UserError(
            "The connected CLIP is that of SDXL's refiner, whose images begin with the base's: connect the base's CLIP."
        )
    row = "sdxl" if "text_encoder_2" in states else "sd21" if _comfy_name(clip, "text_encoder") == "clip_h" else "sd15"
    made: dict[str, Any] = {}
    for component, state in states.items():
        tensors = {key: value.cpu() for key, value in state.items()}
        made[component] = components.build_text_encoder(
            bases.CONFIGURATIONS / row / component, tensors, component == "text_encoder_2"
        )
        tokenizer = CLIPTokenizerFast.from_pretrained(bases.POCKET_FOLDER / "tokenizer")
        if _comfy_name(clip, component) in PADDED_BY_NULL:
            tokenizer.pad_token = "!"
        made[component.replace("text_encoder", "tokenizer")] = tokenizer
    return Encoders(**made)


def _comfy_name(clip: Clip, component: str) -> str:
    stored = clip.get_key_patches()
    return next(name for name, part in PARTS.items() if part == component and any(key.startswith(f"{name}.") for key in stored))


def _beside(clip: Clip) -> list[str]:
    """A warning where other text encoders still know the concept."""
    names = {key.split(".")[0] for key in clip.get_key_patches()} - {*PARTS}
    other = sorted(name for name in names if name.startswith(OTHERS))
    return [f"The erasure is partial: this model reads {', '.join(other)} too, which is unchanged."] if other else []


def _weight(stored: Any) -> Any:
    """The weight of an entry of `get_key_patches`: a list whose first item is it, or it and a function."""
    first = stored[0] if isinstance(stored, list) else stored
    return first[0] if isinstance(first, tuple) else first


def _mapping(stated: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(stated.get(f"sd_erase.{name}") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _told(lines: list[str], warnings: list[str]) -> str:
    return "\n".join([*lines, *(f"WARNING: {warning}" for warning in warnings)])
