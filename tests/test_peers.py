"""The published comparators: their closed forms against independent checks, and real steps on the pocket model."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_erase import bases, catalog, chain, denoiser, formats, preflight
from sd_erase.clip import load_towers
from sd_erase.components import load_pipeline
from sd_erase.concepts import read_concepts
from sd_erase.config import ExportConfig, RunConfig, TrainConfig, dump
from sd_erase.erasure import merge, stage
from sd_erase.erasure.method import Batch
from sd_erase.erasure.names import Way
from sd_erase.erasure.peers import advunlearn, denoising, keys_values, tea
from sd_erase.erasure.peers.hirm import direction, last_attention
from sd_erase.erasure.peers.speed import change
from sd_erase.erasure.peers.uce import edited
from sd_erase.errors import UserError
from sd_erase.pairs import read_pairs
from sd_erase.pipeline import erased_pipeline, load_erased
from sd_erase.progress import NoProgress
from sd_erase.rundir import RunDir, read_jsonl

PEERS = ("esd", "uce", "speed", "hirm", "advunlearn", "tea")
STEPS = {"esd": 6, "hirm": 8, "advunlearn": 4, "tea": 12}
RATES = {"esd": 1e-3, "hirm": 2e-3, "advunlearn": 1e-3, "tea": 1e-3}


@pytest.fixture(scope="module")
def original() -> Any:
    """The pocket model's towers, whose weights no test changes."""
    return load_towers(bases.resolve("pocket"), torch.device("cpu"), need_images=False)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long is done a little of."""
    monkeypatch.setattr(denoising, "DRAWN", 3)
    monkeypatch.setattr(advunlearn, "WARM_UP", 1)
    monkeypatch.setattr(advunlearn, "ATTACK_STEPS", 2)
    monkeypatch.setattr("sd_erase.erasure.trainer.VALIDATION_BATCHES", 2)


def trained(harvested: tuple[RunConfig, RunDir], folder: Path, objective: str, **changes: Any) -> tuple[RunConfig, RunDir]:
    """A run of its own on the harvested pairs, trained."""
    config, first = harvested
    settings = {"steps": STEPS.get(objective, 0), "learning_rate": RATES.get(objective, 0.0), **changes}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, objective=objective, **settings))
    run = RunDir(folder / objective)
    if not run.path.exists():
        with run.writing({run.config.name: dump(config)}):
            for name in ("pairs", "concepts"):
                path: Path = getattr(first, name)
                (run.path / path.name).write_bytes(path.read_bytes())
        links = chain.Chain(run, config)
        run.complete("harvest", "h", {"from": {}, "made": links.makes("harvest")})
    stage.train(config, run)
    return config, run


def validated(run: RunDir) -> list[dict[str, float]]:
    return [row["terms"] for row in read_jsonl(run.metrics) if row["split"] == "validation"]


# --- closed forms -----------------------------------------------------------------------------------------------------------


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_uces_matrix_is_where_its_objectives_gradient_is_nought() -> None:
    matrix, old, new, kept = rows(5, 8, 0), rows(3, 8, 1), rows(3, 8, 2), rows(20, 8, 3)
    found = edited(matrix, old, new, kept, 0.5).requires_grad_(True)
    error = (old @ found.T - new @ matrix.T).square().sum() + (kept @ (found - matrix).T).square().sum()
    (error + 0.5 * (found - matrix).square().sum()).backward()
    assert found.grad is not None and found.grad.abs().max() < 1e-10
    alone = edited(matrix, old, new, kept[:0], 1e-9)
    assert torch.allclose(old @ alone.T, new @ matrix.T, atol=1e-6)  # with nothing to keep, the anchor's keys


def test_speeds_change_keeps_what_is_retained_and_moves_the_rest_to_the_anchor() -> None:
    width = 12
    matrix, basis = rows(6, width, 0), torch.linalg.qr(rows(width, width, 9))[0]
    kept, exact = 3 * rows(200, 6, 1) @ basis[:6], rows(1, 2, 2) @ basis[6:8]  # six directions are taken, one more is exact
    old = 4 * (rows(2, 3, 3) @ basis[9:] + 0.2 * rows(2, 6, 4) @ basis[:6])
    new = 4 * rows(2, 3, 5) @ basis[9:]
    found = change(matrix, old, new, kept, exact, torch.Generator().manual_seed(0))
    assert (exact @ found.T).abs().max() < 1e-8
    assert (kept @ found.T).norm() < 0.1 * (kept @ matrix.T).norm()
    before, after = ((old @ weight.T - new @ matrix.T).norm() for weight in (matrix, matrix + found))
    assert after < 0.6 * before


def test_a_caption_is_aligned_from_the_concepts_last_token_on(harvested: tuple[RunConfig, RunDir], original: Any) -> None:
    from sd_erase.erasure.sd import redirect

    item = redirect("a photo of a bicycle here", [(13, 20)], "thing")
    old, new = keys_values.aligned(original, [item])
    states = keys_values.states_of(original, [item.caption, item.target])
    assert torch.equal(old, states[0, 5:]) and torch.equal(new, states[1, 5:])


# --- trainings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["uce", "speed"])
def test_keys_and_values_go_to_the_anchors_and_others_stay(
    harvested: tuple[RunConfig, RunDir], objective: str, original: Any
) -> None:
    method = catalog.resolve(catalog.METHODS, objective, "Objective")()
    weights = method.prepare(original, read_concepts(harvested[1]), {"bicycle": "thing"}, False)
    pairs = [pair for pair in read_pairs(harvested[1]) if pair.split == "train"]
    forget, retain = ([pair for pair in pairs if pair.set == name][:12] for name in ("forget", "retain"))

    def measured() -> dict[str, float]:
        batch = Batch(forget, retain, None, None, None, None, random.Random(0), "validation")
        with torch.no_grad():
            return {name: float(term) for name, term in method.losses(original, batch).items()}

    before = measured()
    method.solve(original, forget, retain, 0, NoProgress())
    after = measured()
    assert before["keep"] == 0 and after["edit"] < 0.6 * before["edit"] and after["keep"] < 0.25 * before["edit"]
    assert len(weights) == len(method.of_denoiser) > 0
    assert (objective == "speed") == all(name.endswith("to_v.weight") for name in method.of_denoiser)


def test_esd_moves_the_cross_attention_and_nothing_else(
    harvested: tuple[RunConfig, RunDir], tmp_path: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = trained(harvested, tmp_path, "esd")
    first, *_, last = validated(run)
    assert last["erase"] < 0.95 * first["erase"]
    saved = formats.read_tensors(run.encoder / "text_encoder" / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in formats.prefixed(original.frozen_text.state_dict()).items())

    pipeline = load_pipeline(bases.resolve("pocket"))
    before = {name: each.clone() for name, each in pipeline.unet.state_dict().items()}
    erased = load_erased(pipeline, run.path)
    assert erased.unet is not pipeline.unet
    changed = {name for name, each in erased.unet.state_dict().items() if not torch.equal(each, before[name])}
    assert changed == denoiser.cross_attention(pipeline.unet).keys() == formats.read_tensors(run.denoiser).keys()
    assert all(torch.equal(each, before[name]) for name, each in pipeline.unet.state_dict().items())
    shared = dict(pipeline.unet.named_parameters())
    assert all((each is shared[name]) == (name not in changed) for name, each in erased.unet.named_parameters())
    assert chain.Chain(run, config).link("train").state == chain.OK
    assert not run.clip.exists()  # CLIP's towers are the original's
    assert not (run.cache / "image_embeddings.safetensors").exists()  # which none of them reads
    recorded = json.loads(run.manifest("train").read_text())["from"]["base"]
    assert any("unet" in name for name in recorded)
    monkeypatch.setattr(chain.digests, "of_base", lambda *given, **asked: {**recorded, "unet/model.safetensors": "another"})
    assert chain.Chain(run, config).link("train").state == chain.BROKEN  # another denoiser under the same text encoder


def test_hirm_misdirects_by_the_first_layer_alone(harvested: tuple[RunConfig, RunDir], tmp_path: Path, original: Any) -> None:
    _, run = trained(harvested, tmp_path, "hirm")
    first, *_, last = validated(run)
    assert last["misdirection"] < 0.8 * first["misdirection"]
    saved, before = (
        formats.read_tensors(run.encoder / "text_encoder" / "model.safetensors"),
        formats.prefixed(original.frozen_text.state_dict()),
    )
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert changed and all(".encoder.layers.0." in name and "norm" not in name for name in changed)
    assert not run.denoiser.exists()


def test_hirm_reads_what_the_last_attention_adds(original: Any) -> None:
    ids = original.tokens(["a bicycle"])
    with torch.no_grad():
        found = last_attention(original.text, ids)
        states = original.text(input_ids=ids, output_hidden_states=True).hidden_states
        block = (original.text.text_model if hasattr(original.text, "text_model") else original.text).encoder.layers[-1]
        behind = states[-2] + found
        assert torch.allclose(behind + block.mlp(block.layer_norm2(behind)), states[-1], atol=1e-4)
    assert direction(original.text.config).norm() == pytest.approx(20.0)


def test_tea_makes_the_concept_the_anchor(harvested: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    _, run = trained(harvested, tmp_path, "tea")
    towers = load_towers(bases.resolve("pocket"), torch.device("cpu"), need_images=False)
    saved = formats.read_tensors(run.encoder / "text_encoder" / "model.safetensors")
    plain = {key: saved[key if key in saved else f"text_model.{key}"] for key in towers.text.state_dict()}
    towers.text.load_state_dict(plain)
    (concept,) = read_concepts(run)
    (name,) = Way(towers, concept, "thing").measured(["bicycle"], "card", towers.text)
    assert name.along < 0.8
    assert validated(run)[-1]["preserve"] < 0.1


def test_advunlearn_erases_under_attack(harvested: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    _, run = trained(harvested, tmp_path, "advunlearn")
    _, second, *_, last = validated(run)  # the first was before the attacks began
    assert last["erase"] < second["erase"]


def test_the_attack_brings_the_prediction_nearer_to_the_concepts(
    harvested: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch, original: Any
) -> None:
    monkeypatch.setattr(advunlearn, "ATTACK_STEPS", 6)
    monkeypatch.setattr(advunlearn, "ATTACK_RATE", 0.3)
    method = advunlearn.AdvUnlearn()
    method.prepare(original, read_concepts(harvested[1]), {"bicycle": "thing"}, False)
    empty, states = denoising.read_states(original.text, original, ["", "a bicycle"]).detach().chunk(2)
    latents, step = method.denoiser.partly_drawn(method.denoiser.unet, states, empty, random.Random(0))
    goal = denoising.predicted(method.denoiser.unet, latents, step, states)

    def error(token: torch.Tensor) -> float:
        with torch.no_grad():
            read = method._read(original, "a thing", token)
            return float((denoising.predicted(method.denoiser.unet, latents, step, read) - goal).square().mean())

    rng = random.Random(1)
    start = method.table[[random.Random(1).choice(method.words)]]
    assert error(method._attacked(original, "a thing", latents, step, states, rng)) < error(start)


def test_what_tea_keeps_beside_the_weights_comes_back(harvested: tuple[RunConfig, RunDir], original: Any) -> None:
    """The discriminator and its optimizer's moments: two steps are the same as one, saved, and one."""

    def prepared() -> tea.TEA:
        method = tea.TEA()
        method.prepare(original, read_concepts(harvested[1]), {"bicycle": "thing"}, False)
        return method

    width, whole, cut = original.text.config.hidden_size, prepared(), prepared()
    concept, anchor = rows(4, width, 0).float(), rows(4, width, 1).float()
    whole._learn(concept, anchor)
    cut.load_state({name: each.clone() for name, each in whole.state().items()})
    for method in (whole, cut):
        method._learn(concept, anchor)
    one, other = whole.state(), cut.state()
    assert one.keys() == other.keys() and any(name.startswith(tea.ADAM) for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["tea", "esd", "advunlearn"])
def test_an_interrupted_training_ends_as_one_that_was_not(
    harvested: tuple[RunConfig, RunDir], tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    _, whole = trained(harvested, tmp_path / "whole", objective, steps=4)
    kind = catalog.resolve(catalog.METHODS, objective, "Objective")
    computed, calls = kind.losses, []

    def until(self: Any, towers: Any, batch: Any) -> Any:
        calls.append(batch.split)
        if calls.count("train") == 4:
            raise KeyboardInterrupt
        return computed(self, towers, batch)

    monkeypatch.setattr(kind, "losses", until)
    with pytest.raises(KeyboardInterrupt):
        trained(harvested, tmp_path / "cut", objective, steps=4)
    monkeypatch.setattr(kind, "losses", computed)
    _, cut = trained(harvested, tmp_path / "cut", objective, steps=4)
    file = RunDir.denoiser if objective == "esd" else property(lambda run: run.encoder / "text_encoder" / "model.safetensors")
    one, other = (formats.read_tensors(file.fget(run)) for run in (whole, cut))  # type: ignore[misc]
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert json.loads(cut.manifest("train").read_text())["best_step"] == 4  # the last is kept


# --- what a run with a denoiser of its own is refused ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edited_run(harvested: tuple[RunConfig, RunDir], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    return trained(harvested, tmp_path_factory.mktemp("edited"), "uce")


@pytest.mark.parametrize("to", catalog.EXPORTS)
def test_an_export_says_that_the_denoiser_is_what_changed(edited_run: tuple[RunConfig, RunDir], to: str) -> None:
    config, run = edited_run
    config = dataclasses.replace(config, export=ExportConfig(to=to, pipeline=to == "diffusers"))
    with pytest.raises(UserError, match="changes the denoiser, not the text encoder"):
        catalog.resolve(catalog.EXPORTS, to, "Export format")(config, run, NoProgress())
    assert not run.export.exists()


def test_such_a_run_holds_the_keys_and_values(edited_run: tuple[RunConfig, RunDir]) -> None:
    tensors = formats.read_tensors(edited_run[1].denoiser)
    assert tensors and all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in tensors)


def test_a_merge_leaves_such_a_run_out(edited_run: tuple[RunConfig, RunDir]) -> None:
    with pytest.raises(UserError, match="leave it out"):
        merge.merged_config([edited_run[1], edited_run[1]])


def test_an_audit_reads_the_denoiser_of_a_run(edited_run: tuple[RunConfig, RunDir]) -> None:
    from sd_erase.auditing.subject import load_pair, read_subject

    config, run = edited_run
    subject = read_subject(run.path, config, False)
    original, erased = load_pair(subject, torch.device("cpu"))
    assert subject.kind == "run" and erased.unet is not original.unet


def test_another_training_leaves_no_denoiser_behind(edited_run: tuple[RunConfig, RunDir], harvested: Any, tmp_path: Path) -> None:
    shutil.copytree(edited_run[1].path, tmp_path / "token")
    _, run = trained(harvested, tmp_path, "token")
    assert not run.denoiser.exists()
    original = load_pipeline(bases.resolve("pocket"))
    assert erased_pipeline(original, run).unet is original.unet


def test_tensors_of_another_denoiser_are_refused(edited_run: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    unet, tensors = load_pipeline(bases.resolve("pocket")).unet, formats.read_tensors(edited_run[1].denoiser)
    name, whole = next(iter(tensors.items()))
    for found in ({name: whole[:4].clone()}, {f"x.{name}": whole}, {name: torch.full_like(whole, float("nan"))}):
        formats.save_tensors(tmp_path / "unet.safetensors", found, {"format": "pt"})
        with pytest.raises(UserError):
            denoiser.changed(unet, tmp_path / "unet.safetensors")


@pytest.mark.parametrize("objective", PEERS)
def test_what_no_comparator_can_do_is_said_before_the_work(objective: str, original: Any) -> None:
    config = RunConfig(concepts=("bicycle",), device="cpu", train=TrainConfig(objective=objective, steps=2, lora_rank=4))
    with pytest.raises(UserError, match="says itself which weights change"):
        preflight.check(config, ("train",))
    with pytest.raises(UserError, match="--towers text"):
        catalog.resolve(catalog.METHODS, objective, "Objective")().prepare(original, [], {}, True)
    if objective in ("hirm", "tea"):  # which read no denoiser
        return
    base = bases.ROWS["sdxl"]
    with pytest.raises(UserError, match="has two"):
        preflight.check(dataclasses.replace(config, train=TrainConfig(objective=objective)), ("train",), base=base)


def test_a_papers_rate_holds_for_the_models_that_it_is_about() -> None:
    config = TrainConfig(objective="esd")
    method = catalog.resolve(catalog.METHODS, "esd", "Objective")()
    assert stage._resolved(config, method, bases.ROWS["sd15"]).learning_rate == 1e-5
    assert stage._resolved(config, method, bases.ROWS["pocket"]).learning_rate == method.default_learning_rate
