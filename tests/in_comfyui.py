"""The nodes in ComfyUI's own code, at full size with random weights: ``python tests/in_comfyui.py COMFYUI [sd15|sd21|sdxl] [erase]``.

A text encoder with random weights is loaded by ComfyUI's own loader; each exported file goes onto it by the node *Load erasure*; what ComfyUI's
encoder then gives is compared with what transformers' gives of the erased encoder. With ``erase``, *Erase concept* runs in its place.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMFYUI = Path(sys.argv[1]).resolve()
ROW = next((name for name in sys.argv[2:] if name != "erase"), "sd15")
ROOT = Path(__file__).resolve().parents[1]
arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
sys.path[:0] = [str(COMFYUI), str(ROOT), str(ROOT / "tests")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from test_api import Small  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast  # noqa: E402

import sd_erase  # noqa: E402
from sd_erase import bases, formats  # noqa: E402
from sd_erase.api.models import Encoders  # noqa: E402

PROMPTS = ("a bicycle next to a dog", "")
NAMES = {"sd15": ("text_encoder",), "sd21": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}[ROW]


def random_encoders() -> Encoders:
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    for name in NAMES:
        config = CLIPTextConfig.from_pretrained(bases.CONFIGURATIONS / ROW / name)
        made[name] = (CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel)(config).eval()
        tokenizer = CLIPTokenizerFast.from_pretrained(bases.POCKET_FOLDER / "tokenizer")
        tokenizer.pad_token = "<|endoftext|>" if (ROW, name) in (("sd15", "text_encoder"), ("sdxl", "text_encoder")) else "!"
        made[name.replace("text_encoder", "tokenizer")] = tokenizer
    return Encoders(**made)


def expected(encoders: Encoders, prompt: str) -> Any:
    """What the denoiser of this base reads, in float32."""
    parts = []
    for name in NAMES:
        tokenizer, model = getattr(encoders, name.replace("text_encoder", "tokenizer")), getattr(encoders, name)
        ids = tokenizer([prompt], padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        parts.append(output.hidden_states[-2] if ROW == "sdxl" else output.last_hidden_state)
    return torch.cat(parts, -1)


def given(clip: Any, prompt: str) -> Any:
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(prompt))


def apart(one: Any, other: Any) -> float:
    return float((one - other).norm() / other.norm())


def load_erasures(module: Any, original: Encoders, clip: Any, folder: Path) -> None:
    changed = sd_erase.erase(original, "bicycle", method=f"{Small.__module__}:Small", progress=False)
    moved = apart(expected(changed.model, PROMPTS[0]), expected(original, PROMPTS[0]))
    assert moved > 0.01, moved
    for kind in ("text_encoders", "loras"):
        (folder / kind).mkdir()
        folder_paths.add_model_folder_path(kind, str(folder / kind))
    for form in ("comfyui", "lora", "lora-diff"):
        place = "text_encoders" if form == "comfyui" else "loras"
        changed.save(folder / place, form, rank=1 if form == "lora" else 0)
    node = module.NODE_CLASS_MAPPINGS["SdEraseLoad"]
    choices = node.INPUT_TYPES()["required"]["file"][0]
    groups = {
        "comfyui": [name for name in choices if name.startswith("text_encoders/")],
        **{name: [name] for name in choices if name.startswith("loras/")},
    }
    assert len(groups) == 3, choices
    for title, names in groups.items():
        for strength in (1.0, 0.5):
            started, new, about = time.perf_counter(), clip, ""
            with torch.inference_mode():
                for name in names:
                    new, about = node().load(new, name, strength)["result"]
            seconds = time.perf_counter() - started
            differences = [apart(given(new, prompt), expected(changed.model, prompt)) for prompt in PROMPTS]
            print(
                f"Load erasure {title} at {strength:g}: {seconds:.1f} s, differences {differences[0]:.1e} {differences[1]:.1e} (moved {moved:.1e})"
            )
            assert max(differences) < 5e-3 if strength == 1.0 else differences[0] > 0.2 * moved
            assert "WARNING" not in about, about
    assert apart(given(clip, PROMPTS[0]), expected(original, PROMPTS[0])) < 5e-3  # the connected one is as it was


def erase_concept(module: Any, original: Encoders, clip: Any) -> None:
    started = time.perf_counter()
    with torch.inference_mode():
        new, about = module.NODE_CLASS_MAPPINGS["SdEraseConcept"]().erase(clip, "bicycle", "kite", "object", "", 1.0, 0)["result"]
    seconds = time.perf_counter() - started
    wanted = expected(original, "a kite next to a dog")
    print(f"Erase concept: {seconds:.1f} s; to the anchor's caption {apart(given(new, PROMPTS[0]), wanted):.2f}, before {apart(given(clip, PROMPTS[0]), wanted):.2f}; "
          f"another caption moved {apart(given(new, 'a dog on the grass'), given(clip, 'a dog on the grass')):.3f}\n{about}")  # fmt: skip
    assert apart(given(new, PROMPTS[0]), wanted) < apart(given(clip, PROMPTS[0]), wanted)


def main() -> None:
    spec = importlib.util.spec_from_file_location(
        "sd_erase_nodes",
        ROOT / "integrations/comfyui/__init__.py",
        submodule_search_locations=[str(ROOT / "integrations/comfyui")],
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sd_erase_nodes"] = module
    spec.loader.exec_module(module)
    original = random_encoders()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        folder = Path(temporary)
        for name in NAMES:
            state = formats.prefixed(getattr(original, name).half().state_dict())
            formats.save_tensors(folder / f"{name}.safetensors", state, {"format": "pt"})
            getattr(original, name).float()
        kind = comfy.sd.CLIPType.STABLE_DIFFUSION
        started = time.perf_counter()
        clip = comfy.sd.load_clip([str(folder / f"{name}.safetensors") for name in NAMES], clip_type=kind)
        print(
            f"{ROW}: loaded by ComfyUI in {time.perf_counter() - started:.1f} s; as loaded {apart(given(clip, PROMPTS[0]), expected(original, PROMPTS[0])):.1e}"
        )
        if "erase" in arguments:
            erase_concept(module, original, clip)
        else:
            load_erasures(module, original, clip, folder)


if __name__ == "__main__":
    main()
