"""An exported folder opens elsewhere: with transformers 4's tokenizer, for other users, in half precision, without our paths."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from erased import erased_run
from test_export_formats import export

from sd_erase import bases
from sd_erase.export.job import Job, file_name
from sd_erase.export.portable import complete_tokenizer, forget_origins, make_portable
from sd_erase.rundir import RunDir

LINE = "a bicycle, a cat's 2 dogs &amp; Café naïve ☕ <|endoftext|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> bases.Base:
    """The pocket model in a folder of the user's own, whose path nobody else should read."""
    folder = tmp_path_factory.mktemp("home") / "secret-user" / "pocket"
    shutil.copytree(bases.POCKET_FOLDER, folder)
    return bases.resolve(str(folder))


def exported(base: bases.Base, tmp_path: Path, **options: Any) -> Path:
    settings, run = erased_run(tmp_path, base, base.source)
    return Path(export(settings, run, "diffusers", **options)["folder"])


@pytest.fixture(scope="module")
def pipeline_folder(base: bases.Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = os.umask(0o027)
    try:
        return exported(base, tmp_path_factory.mktemp("pipeline"), pipeline=True)
    finally:
        os.umask(before)


def test_the_tokenizer_has_the_files_of_transformers_4(pipeline_folder: Path, tmp_path: Path) -> None:
    """CLIPTokenizer of transformers 4.57, which the index names, reads vocab.json and merges.txt alone."""
    from transformers import CLIPTokenizer

    own = bases.POCKET_FOLDER / "tokenizer"
    folder = pipeline_folder / "tokenizer"
    assert json.loads((folder / "vocab.json").read_text()) == json.loads((own / "vocab.json").read_text())
    assert (folder / "merges.txt").read_text().split("\n")[1:-1] == (own / "merges.txt").read_text().split("\n")[1:-1]
    assert json.loads((folder / "special_tokens_map.json").read_text()) == json.loads(
        (own / "special_tokens_map.json").read_text()
    )
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path)(LINE).input_ids == CLIPTokenizer.from_pretrained(own)(LINE).input_ids


def test_added_tokens_are_kept_and_files_that_are_there_stay(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bases.POCKET_FOLDER / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("mine")
    complete_tokenizer(tmp_path)
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<my-cat>": 49408}
    assert "<my-cat>" not in json.loads((tmp_path / "vocab.json").read_text())
    assert (tmp_path / "merges.txt").read_text() == "mine"


def test_no_file_names_a_path_of_its_makers_disk(pipeline_folder: Path, base: bases.Base) -> None:
    for path in pipeline_folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"secret-user" not in content and str(pipeline_folder).encode() not in content, path
    found = json.loads((pipeline_folder / "unet" / "config.json").read_text())
    assert found["cross_attention_dim"] == 128 and "_name_or_path" not in found


def test_origins_go_and_all_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    kept = {"pad_token": {"content": "!", "special": True}, "sizes": [1, {"name": "x"}], "errors": "replace", "text": "a/b"}
    lost = {
        "_name_or_path": "me/model", "name_or_path": "models/mine", "special_tokens_map_file": "x", "is_local": True,
        "other": "/home/me/x", "home": "~/x", "disk": "C:\\Users\\me", "link": "file:///home/me",
    }  # fmt: skip
    path.write_text(json.dumps({**kept, **lost, "inner": {"_name_or_path": "x", "also": 1}}))
    forget_origins(path)
    assert json.loads(path.read_text()) == {**kept, "inner": {"also": 1}}


def test_every_file_is_readable_by_the_umasks_rule(pipeline_folder: Path) -> None:
    modes = {path.is_dir(): set() for path in (pipeline_folder, pipeline_folder / "README.md")}
    for path in (pipeline_folder, *pipeline_folder.rglob("*")):
        modes[path.is_dir()].add(path.stat().st_mode & 0o777)
    assert modes == {True: {0o750}, False: {0o640}}


def test_a_runs_own_encoder_is_readable_too(tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    from sd_erase.clip import save_text_encoder

    text = CLIPTextModel.from_pretrained(bases.POCKET_FOLDER / "text_encoder")
    before = os.umask(0o022)
    try:
        save_text_encoder(text, tmp_path, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("pipeline", [True, False])
def test_the_printed_snippet_runs_in_half_precision(
    pipeline_folder: Path, base: bases.Base, tmp_path: Path, pipeline: bool
) -> None:
    """As printed: parts of unlike types raise when they meet, and each library has another default."""
    folder = pipeline_folder if pipeline else exported(base, tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(snippet.replace("THIS_FOLDER", str(folder)).replace("BASE_MODEL", base.source), names)
    pipe = names["pipe"]
    assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {torch.float16}
    image = pipe("a bicycle", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_models_folder_without_a_tokenizer_is_made_portable(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    make_portable(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Teddy Bear", "teddy_bear"),
        ("a/b", "a_b"),
        ("../../etc", "etc"),
        (".hidden", "hidden"),
        ("-rf", "rf"),
        ('x:*?"<>|\n\ty', "x_y"),
        ("vélo 自転車", "vélo_自転車"),
        ("???", "x"),
        ("é" * 99, "é" * 30),
    ],
)
def test_names_of_files_are_safe(text: str, name: str) -> None:
    assert file_name(text, 60) == name


def test_a_run_of_many_concepts_has_a_short_name(base: bases.Base, tmp_path: Path) -> None:
    import dataclasses

    settings, run = erased_run(tmp_path, base, base.source)
    for concepts, stem in (
        (("bicycle",), "bicycle-pocket"),
        (("a/b", "C D"), "a_b-c_d-pocket"),
        (tuple(f"concept number {number}" for number in range(30)), r"concept_number_0-concept_number_1-concept_number_2-and_27_more-pocket"),
    ):  # fmt: skip
        assert Job.of(dataclasses.replace(settings, concepts=concepts), RunDir(run.path)).stem == stem
