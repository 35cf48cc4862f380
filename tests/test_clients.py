"""Which file is for which program: the export says it, and so do the file, the page and the docs."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from test_export_formats import export, made, run_of

from sd_erase import bases, catalog
from sd_erase.chain import Chain
from sd_erase.cli import main
from sd_erase.clients import clients, line
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export.metadata import inspect_file
from sd_erase.formats import read_encoders, read_header
from sd_erase.rundir import RunDir

FAMILIES = ("sd1", "sd2", "sdxl")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("xl")
        return run_of(made("sdxl", folder, patch)[1], folder)


def words(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", catalog.EXPORTS)
def test_every_export_says_which_programs_take_it(to: str, family: str) -> None:
    found = clients(to, family)
    assert found and all(client.advice and not client.advice.endswith(".") for client in found)
    if (to, family) != ("forge", "sd2"):  # which is refused
        assert any(client.works for client in found)


def test_what_a_program_reads_wrongly_is_said_where_the_file_is_made() -> None:
    def texts(to: str, family: str) -> str:
        return " ".join(line(*client) for client in clients(to, family))

    assert "Not for kohya's sd-scripts, OpenVINO GenAI: ignored without a word" in texts("lora-diff", "sd1")
    assert "Not for diffusers: refused" in texts("lora-diff", "sdxl")
    assert "Not for Forge: reads the second file's text_projection the wrong way round" in texts("comfyui", "sdxl")
    assert "Not for Forge: text encoders of SD 2.x are ignored" in texts("comfyui", "sd2")
    assert "vit-l" in texts("comfyui", "sd1") and "InvokeAI: import it and set its weight to 1" in texts("lora", "sd1")


def test_the_pocket_models_encoder_is_for_no_other_program() -> None:
    assert [line(*client) for client in clients("lora", "sd1", pocket=True)] == [
        "Not for other programs: the pocket model is for learning and testing: its encoder fits no checkpoint of theirs"
    ]


def test_forges_file_of_sdxl_has_a_checkpoints_names(xl: tuple[RunConfig, RunDir]) -> None:
    """Under Hugging Face's names Forge takes text_projection the wrong way round; under a checkpoint's both encoders are right."""
    settings, run = xl
    (file,) = export(settings, run, "forge", dtype="float32")["files"]
    tensors = safetensors.torch.load_file(file["path"])
    state = safetensors.torch.load_file(run.encoder / "text_encoder_2" / "model.safetensors")
    second = "conditioner.embedders.1.model."
    assert torch.equal(tensors[f"{second}text_projection"], state["text_projection.weight"].T)
    assert not torch.equal(state["text_projection.weight"], state["text_projection.weight"].T)
    prefix = "text_model.encoder.layers.0.self_attn."
    joined = torch.cat([state[f"{prefix}{letter}_proj.weight"] for letter in "qkv"])
    assert torch.equal(tensors[f"{second}transformer.resblocks.0.attn.in_proj_weight"], joined)
    first = safetensors.torch.load_file(run.encoder / "text_encoder" / "model.safetensors")
    assert all(torch.equal(tensors[f"conditioner.embedders.0.transformer.{key}"], value) for key, value in first.items())
    assert set(read_encoders(Path(file["path"]))) == {"text_encoder", "text_encoder_2"} and file["difference"] == 0
    assert (inspect_file(Path(file["path"]))["problems"], inspect_file(Path(file["path"]))["hash"]) == ([], "matches")


def test_forges_file_of_sd1_is_comfyuis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run = run_of(made("sd15", tmp_path, monkeypatch)[1], tmp_path)
    (file,) = export(settings, run, "forge")["files"]
    assert set(safetensors.torch.load_file(file["path"])) == set(
        safetensors.torch.load_file(run.encoder / "text_encoder" / "model.safetensors")
    )


def test_forge_is_refused_for_sd2_with_what_to_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run = run_of(made("sd21", tmp_path, monkeypatch)[1], tmp_path)
    with pytest.raises(
        UserError, match=r"Forge ignores text encoders' files of Stable Diffusion 2.x .* --to a1111 .* or --to lora"
    ):
        export(settings, run, "forge")
    assert not run.export.exists()


def test_sdnext_knows_the_files_by_their_names(xl: tuple[RunConfig, RunDir]) -> None:
    """It loads a file as CLIP-L where the name has "vit-l", as CLIP-G where it has "vit-g", and else keeps the original."""
    from sd_erase.export.text_encoder import vision_name

    assert [vision_name(width) for width in (768, 1024, 1280, 128)] == ["vit-l", "vit-h", "vit-g", ""]
    settings, run = xl  # narrow: of no known width
    names = [Path(file["path"]).name for file in export(settings, run, "comfyui")["files"]]
    assert names == ["bicycle-my-model-text_encoder-fp16.safetensors", "bicycle-my-model-text_encoder_2-fp16.safetensors"]


@pytest.mark.parametrize(("to", "said"), [("lora-diff", "Not for diffusers: refused"), ("comfyui", "Not for Forge: reads")])
def test_the_command_and_the_file_say_it(
    xl: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch, to: str, said: str
) -> None:
    monkeypatch.setattr(bases, "CONFIGURATIONS", xl[1].path.parent.parent / "configs")  # the narrow ones, as when it was made
    result = CliRunner().invoke(main, ["export", "--run", str(xl[1].path), "--to", to])
    assert result.exit_code == 0, result.output
    assert said in result.stdout
    (file, *_) = xl[1].read_manifest(f"export-{to}")["files"]
    assert said in read_header(Path(file["path"])).metadata["sd_erase.programs"]


def test_the_page_says_it(evaluated: RunDir, settings: RunConfig) -> None:
    from sd_erase.report import build_report

    def page() -> str:
        return words((build_report(settings, evaluated), evaluated.report / "report.html")[1].read_text())

    assert "Not for other programs: the pocket model" in page()
    exported = {"encoder": Chain(evaluated, settings).now("encoder")}  # of the encoder that lies in the run
    manifest: dict[str, Any] = {
        "files": [],
        "from": exported,
        "programs": [client._asdict() for client in clients("lora-diff", "sd1")],
    }
    evaluated.complete("export-lora-diff", "x", manifest)
    assert "Not for diffusers: refused: take --to lora" in page()


def test_the_docs_name_every_export_and_program() -> None:
    text = (ROOT / "docs" / "clients.md").read_text()
    for to in catalog.EXPORTS:
        assert f"`--to {to}`" in text
    for program in ("ComfyUI", "Forge", "A1111", "SD.Next", "InvokeAI", "OpenVINO GenAI", "sd-scripts", "diffusers"):
        assert program in text
    assert "docs/clients.md" in (ROOT / "README.md").read_text()


def test_the_pocket_base_is_told_apart() -> None:
    assert [name for name, row in bases.ROWS.items() if row.pocket] == ["pocket"]
