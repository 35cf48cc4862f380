"""Training on the pocket model: real steps, checkpoints, resuming, and what must stop it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sd_erase import bases, catalog
from sd_erase.config import HarvestConfig, RunConfig, TrainConfig
from sd_erase.erasure import memory, stage
from sd_erase.erasure.batches import Batches
from sd_erase.errors import UserError
from sd_erase.pairs import harvest, read_pairs
from sd_erase.progress import NoProgress
from sd_erase.rundir import RunDir, read_jsonl, write_jsonl_atomic

CONFIG = RunConfig(
    concepts=("bicycle",),
    device="cpu",
    harvest=HarvestConfig(max_forget=40, max_retain=60),
    train=TrainConfig(objective="sd", steps=6, batch_size=8, validate_every=2),  # the default attacks besides, which takes longer
)

PAPER_TERMS = {"forgetting", "retention", "consistency"}
STATE_TERMS = {"redirect", "preserve", "protect", "empty"}


@pytest.fixture
def harvested(tmp_path: Path, scenes: Path) -> tuple[RunConfig, RunDir]:
    config = dataclasses.replace(CONFIG, harvest=dataclasses.replace(CONFIG.harvest, dataset=f"pocket:{scenes}"))
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    harvest(config, run)
    return config, run


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def encoder(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.encoder / "text_encoder" / "model.safetensors")


def test_training_lowers_the_validation_loss_and_keeps_the_best(harvested: tuple[RunConfig, RunDir]) -> None:
    config, run = harvested
    config = with_train(config, steps=20, validate_every=5)
    found = stage.train(config, run)
    rows = list(read_jsonl(run.metrics))
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    assert sorted(losses) == [0, 5, 10, 15, 20]
    assert losses[found["best_step"]] == min(loss for step, loss in losses.items() if step) < losses[0]
    assert found["best_validation"]["redirect"] < next(row for row in rows if row["step"] == 0)["terms"]["redirect"]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 21))
    assert set(rows[0]["terms"]) == set(found["weights"]) == {*PAPER_TERMS, *STATE_TERMS}
    assert found["anchor"]["bicycle"] in ("object", "thing", "item")
    assert all(key.startswith("text_model.") for key in encoder(run))


@pytest.mark.parametrize(("objective", "towers", "rank"), [("robust", "text", 0), ("sd", "text", 4), ("paper", "both", 0)])
def test_little_memory_costs_a_second_pass_and_changes_no_number(
    harvested: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch, objective: str, towers: str, rank: int
) -> None:
    from torch.utils.checkpoint import checkpoint

    from sd_erase import resources
    from sd_erase.erasure import pseudo_words

    monkeypatch.setattr(pseudo_words, "STEPS", 2)
    config, run = harvested
    config = with_train(config, objective=objective, towers=towers, lora_rank=rank, steps=3, validate_every=3)
    plain = stage.train(config, run)
    rows, weights = list(read_jsonl(run.metrics)), encoder(run)

    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0])
        return checkpoint(*arguments, **options)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    monkeypatch.setattr(resources, "free_memory", lambda device: 0)
    run.reopen("train")
    shutil.rmtree(run.checkpoints)  # or it would resume, and have nothing left to do
    sparing = stage.train(config, run)
    assert (plain["gradient_checkpointing"], sparing["gradient_checkpointing"]) == (False, True)
    assert calls
    assert [row["terms"] for row in read_jsonl(run.metrics)] == [row["terms"] for row in rows]
    assert all(torch.equal(value, weights[name]) for name, value in encoder(run).items())


@pytest.mark.parametrize("has_units", [False, True])
def test_bfloat16_is_taken_where_the_processor_has_units_and_the_encoder_is_wide(
    has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd_erase import resources

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_units, raising=False)
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert [resources.precision("auto", cpu, width) for width in (128, 511, 512, 768)] == [
        "no",
        "no",
        *["bf16" if has_units else "no"] * 2,
    ]
    assert resources.precision("auto", card, 768) == "no"
    assert [resources.precision(name, cpu, 128) for name in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]


def test_the_manifest_says_which_precision_auto_was(harvested: tuple[RunConfig, RunDir]) -> None:
    config, run = harvested
    assert config.train.precision == "auto"
    auto = stage.train(with_train(config, steps=1, validate_every=1, precision="auto"), run)
    assert auto["precision"] == auto["encoders"]["text_encoder"]["precision"] == "no"  # of the pocket model
    assert stage.train(with_train(config, steps=1, validate_every=1, precision="bf16"), run)["precision"] == "bf16"
    solved = with_train(config, objective="fast", steps=0, precision="bf16")
    assert stage.train(solved, run)["precision"] == "no"  # what is solved alone is judged in float32


def test_what_a_step_keeps_by_hand() -> None:
    text = SimpleNamespace(max_position_embeddings=77, hidden_size=768, num_hidden_layers=12)
    vision = SimpleNamespace(image_size=224, patch_size=14, hidden_size=1024, num_hidden_layers=24)
    towers: Any = SimpleNamespace(
        text=SimpleNamespace(config=text), clip=SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    )
    captions = (64 + 25) * 77 * 768 * 12
    assert memory.activations(towers, TrainConfig(batch_size=32)) == 4 * 16 * captions
    images = 64 * 257 * 1024 * 24
    assert memory.activations(towers, TrainConfig(batch_size=32, towers="both")) == 4 * 16 * (captions + images)


def test_only_linear_weights_change(harvested: tuple[RunConfig, RunDir]) -> None:
    from sd_erase.bases import POCKET_FOLDER

    config, run = harvested
    stage.train(config, run)
    before, after = load_file(POCKET_FOLDER / "text_encoder" / "model.safetensors"), encoder(run)
    changed = {key for key in after if not torch.equal(after[key].half(), before[key].half())}
    assert changed and before.keys() == after.keys()
    assert all(key.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) for key in changed)


def test_the_same_seed_gives_the_same_encoder_and_a_finished_stage_is_not_done_again(
    harvested: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = harvested
    stage.train(config, run)
    first = encoder(run)
    monkeypatch.setattr(stage, "load_towers", lambda *_, **__: pytest.fail("the stage was done again"))
    stage.train(config, run)
    monkeypatch.undo()
    run.reopen("train")
    (run.checkpoints / "last.safetensors").unlink()
    stage.train(config, run)
    second = encoder(run)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("objective", ["sd", "robust", "paper"])
def test_an_interrupted_training_resumes_to_the_same_encoder(
    harvested: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    config, run = harvested
    config = with_train(config, objective=objective)
    whole = stage.train(config, run)
    expected = encoder(run)
    for path in run.checkpoints.iterdir():
        path.unlink()
    run.reopen("train")
    batch = Batches.batch

    def stop(self: Any, split: str, number: int) -> Any:
        if (split, number) == ("train", 5):
            raise KeyboardInterrupt
        return batch(self, split, number)

    monkeypatch.setattr(Batches, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        stage.train(config, run)
    assert run.read_manifest("train") is None
    steps: list[int] = []
    monkeypatch.setattr(
        Batches, "batch", lambda self, split, n: (steps.append(n) if split == "train" else None) or batch(self, split, n)
    )
    again = stage.train(config, run)
    assert steps == [4, 5]  # the checkpoint was at step 4
    assert again["best_step"] == whole["best_step"]
    assert all(torch.allclose(expected[key], value, atol=1e-6) for key, value in encoder(run).items())
    assert [row["step"] for row in read_jsonl(run.metrics) if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("towers", ["text", "both"])
def test_the_paper_objective_lowers_the_similarity_of_the_forget_pairs(harvested: tuple[RunConfig, RunDir], towers: str) -> None:
    config, run = harvested
    found = stage.train(with_train(config, objective="paper", towers=towers, steps=8), run)
    rows = [row for row in read_jsonl(run.metrics) if row["split"] == "validation"]
    assert set(found["weights"]) == PAPER_TERMS
    assert rows[-1]["terms"]["forgetting"] < rows[0]["terms"]["forgetting"]
    assert rows[0]["terms"]["consistency"] == pytest.approx(0.0, abs=1e-5)


def test_the_loss_met_in_the_projection_alone_leaves_the_encoder_as_it_was(harvested: tuple[RunConfig, RunDir]) -> None:
    config, run = harvested
    found = stage.train(with_train(config, objective="projection", steps=10, learning_rate=1e-2), run)
    first = next(row for row in read_jsonl(run.metrics) if row["step"] == 0)
    assert found["best_validation"]["forgetting"] < first["terms"]["forgetting"] - 0.1  # CLIP forgets
    original = load_file(bases.POCKET_FOLDER / "text_encoder" / "model.safetensors")
    for key, value in encoder(run).items():
        assert torch.equal(value, original[key].float()), key  # the generator does not


def test_a_lora_is_merged_into_plain_weights(harvested: tuple[RunConfig, RunDir]) -> None:
    from sd_erase.bases import POCKET_FOLDER

    config, run = harvested
    found = stage.train(with_train(config, lora_rank=4), run)
    before, after = load_file(POCKET_FOLDER / "text_encoder" / "model.safetensors"), encoder(run)
    factors = load_file(run.encoder / "lora.safetensors")
    assert before.keys() == after.keys() and found["trained_numbers"] == sum(value.numel() for value in factors.values())
    key = "encoder.layers.0.mlp.fc1"
    change = factors[f"{key}.up.weight"] @ factors[f"{key}.down.weight"]
    assert change.abs().sum() > 0
    stored = after[f"text_model.{key}.weight"] - before[f"text_model.{key}.weight"].float()
    assert torch.allclose(stored, change, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_with_its_name_and_the_last_checkpoint(
    harvested: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = harvested
    method = catalog.resolve(catalog.METHODS, "sd", "Objective")
    losses, calls = method.losses, []

    def broken(self: Any, towers: Any, batch: Any) -> dict[str, torch.Tensor]:
        calls.append(None)
        terms = losses(self, towers, batch)
        return {**terms, "preserve": terms["preserve"] * (float("nan") if len(calls) > 12 else 1.0)}

    monkeypatch.setattr(method, "losses", broken)
    with pytest.raises(
        UserError, match=r"Loss term 'preserve' is not finite at step \d+.*last good checkpoint is .*best.safetensors"
    ):
        stage.train(config, run)
    assert run.read_manifest("train") is None and (run.checkpoints / "best.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {"forget": 1.0}}, "Loss term of objective sd 'forget' is unknown"),
        ({"weights": {"redirect": -1.0}}, "Setting train.weights.redirect is -1.0: pass a number from 0 to"),
        ({"towers": "both"}, "trains the text tower only"),
        ({"objective": "fast", "steps": 0, "lora_rank": 4}, "does not train, so it makes no LoRA"),
        ({"objective": "paper", "towers": "both", "lora_rank": 4}, "LoRA holds the text tower only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(harvested: tuple[RunConfig, RunDir], changes: dict[str, Any], words: str) -> None:
    config, run = harvested
    with pytest.raises(UserError, match=words):
        stage.train(with_train(config, **changes), run)
    assert not run.encoder.exists()


def test_text_without_images_trains_sd_but_not_the_paper(harvested: tuple[RunConfig, RunDir]) -> None:
    config, run = harvested
    write_jsonl_atomic(run.pairs, ({**vars(pair), "image": None} for pair in read_pairs(run)))
    with pytest.raises(UserError, match="needs an image for every caption"):
        stage.train(with_train(config, objective="paper"), run)
    stage.train(config, run)
    assert set(next(read_jsonl(run.metrics))["terms"]) == STATE_TERMS


def test_a_forget_set_smaller_than_a_batch_warns(harvested: tuple[RunConfig, RunDir]) -> None:
    config, run = harvested
    found = stage.train(with_train(config, batch_size=64, steps=1), run)
    assert any("fewer than a batch of 64" in warning for warning in found["warnings"])


def test_the_encoder_says_what_was_erased(harvested: tuple[RunConfig, RunDir]) -> None:
    from safetensors import safe_open

    config, run = harvested
    stage.train(config, run)
    with safe_open(run.encoder / "text_encoder" / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["sd_erase.concept"]) == ("pt", "bicycle")
    assert json.loads(metadata["sd_erase.config"])["concepts"] == ["bicycle"]


def test_the_closed_form_moves_the_forget_captions_without_a_step(harvested: tuple[RunConfig, RunDir]) -> None:
    config, run = harvested
    found = stage.train(with_train(config, objective="fast", steps=0), run)
    (row,) = read_jsonl(run.metrics)
    assert (found["steps"], found["best_step"], row["split"]) == (0, 0, "validation")
    assert row["terms"]["redirect"] < 0.4  # the original's is about 1.2
    assert row["terms"]["preserve"] < 0.1


def test_the_token_baseline_changes_nothing_but_the_rows_of_the_words(harvested: tuple[RunConfig, RunDir]) -> None:
    from sd_erase.bases import POCKET_FOLDER
    from sd_erase.pocket.build import tokenizer

    config, run = harvested
    found = stage.train(with_train(config, objective="token", steps=0), run)
    before, after = load_file(POCKET_FOLDER / "text_encoder" / "model.safetensors"), encoder(run)
    key = "text_model.embeddings.token_embedding.weight"
    assert {name for name in after if not torch.equal(after[name].half(), before[name])} == {key}
    ids = tokenizer()
    changed = (after[key].half() != before[key]).any(1).nonzero().flatten().tolist()
    listed = ("bicycle", "bicycles", "bike", "bikes", "cycle", "cycles", "bmx", "tandem", "pushbike")
    encoded = {word: ids(word, add_special_tokens=False).input_ids for word in listed}
    words = {token for word, tokens in encoded.items() if len(tokens) == 1 or word.startswith("bicycle") for token in tokens}
    assert words <= set(changed) and not set(changed) & set(ids("push mountain two-wheeler", add_special_tokens=False).input_ids)
    (anchor,) = ids(found["anchor"]["bicycle"], add_special_tokens=False).input_ids
    assert all(torch.equal(after[key][token], after[key][anchor]) for token in words)


def at(text: Any, block: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of a block's ``fc2`` and the block's output."""
    seen: dict[str, torch.Tensor] = {}
    hooks = (
        block.mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[0])),
        block.register_forward_hook(lambda _, __, output: seen.update(output=output[0] if isinstance(output, tuple) else output)),
    )
    with torch.no_grad():
        text(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen["inputs"], seen["output"]


def test_the_closed_form_is_the_least_squares_solution() -> None:
    """Against the normal equations of one layer, solved here in another way: by stacking weighted rows for `lstsq`."""
    import copy

    from transformers import CLIPTextConfig, CLIPTextModel

    from sd_erase.erasure import closed_form

    torch.manual_seed(0)
    shape = CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=10,
        bos_token_id=48, eos_token_id=49, pad_token_id=49,
    )  # fmt: skip
    frozen = CLIPTextModel(shape).eval()
    text = copy.deepcopy(frozen)
    draw = torch.Generator().manual_seed(1)
    forget, target, kept = (torch.randint(0, 48, (count, 6), generator=draw) for count in (5, 5, 9))
    index = torch.arange(6).repeat(5, 1)
    weights = torch.linspace(1, 3, 9)
    blocks = text.encoder.layers
    inputs, output = at(text, blocks[1], forget)
    _, wanted = at(frozen, frozen.encoder.layers[1], target)
    kept_inputs, _ = at(text, blocks[1], kept)
    original = blocks[1].mlp.fc2.weight.detach().clone()

    forget_root = (1 / 30) ** 0.5
    kept_root = (closed_form.STRENGTH * weights / (weights.sum() * 6)).sqrt()[:, None, None]
    rows = torch.cat([forget_root * inputs.flatten(0, 1), (kept_root * kept_inputs).flatten(0, 1)]).double()
    right = torch.cat([forget_root * (wanted - output).flatten(0, 1), torch.zeros(54, 8)]).double()
    ridge = (closed_form.RIDGE * (rows.T @ rows).diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([rows, ridge]), torch.cat([right, torch.zeros(12, 8, dtype=torch.float64)])).solution

    closed_form.edit(text, frozen, forget, target, index, kept, weights, layers=[1])
    assert torch.allclose(blocks[1].mlp.fc2.weight - original, solution.T.float(), atol=1e-5)
    assert torch.equal(blocks[0].mlp.fc2.weight, frozen.encoder.layers[0].mlp.fc2.weight)


def test_layers_are_spread_over_the_depth() -> None:
    from sd_erase.erasure.closed_form import spread

    assert (spread(4), spread(12), spread(1)) == ([0, 1, 2, 3], [0, 4, 7, 11], [0])


def test_the_token_baseline_leaks_through_an_unlisted_word() -> None:
    from sd_erase.bases import ROWS
    from sd_erase.clip import encode, load_towers
    from sd_erase.concepts import concept_named
    from sd_erase.erasure.losses import relative_error
    from sd_erase.erasure.token_swap import TokenSwap

    towers, method = load_towers(ROWS["pocket"], torch.device("cpu"), need_images=True), TokenSwap()
    method.prepare(towers, [concept_named("bicycle")], {"bicycle": "object"}, both_towers=False)
    method.solve(towers, [], [], 0, NoProgress())

    def error(caption: str) -> float:
        with torch.no_grad():
            (state,), _ = encode(towers.text, towers.tokens([caption]), (-1,))
            (target,), _ = encode(towers.frozen_text, towers.tokens(["an object next to a dog"]), (-1,))
        return relative_error(state, target).item()

    assert error("a bicycle next to a dog") < 0.05
    assert error("a two-wheeler next to a dog") > 0.5


def test_a_wrong_setting_does_not_cost_an_encoder_that_is_done(harvested: tuple[RunConfig, RunDir]) -> None:
    config, run = harvested
    first = stage.train(config, run)
    with pytest.raises(UserError, match="trains the text tower only"):
        stage.train(with_train(config, towers="both"), run)
    assert run.read_manifest("train") == first and encoder(run)


def test_a_training_that_diverged_says_so(harvested: tuple[RunConfig, RunDir]) -> None:
    config, run = harvested
    found = stage.train(with_train(config, learning_rate=1.0, steps=3, validate_every=3), run)
    assert any("No step validated better than the start" in warning for warning in found["warnings"])
    assert not any("diverged" in warning for warning in stage.train(with_train(config, steps=20), run)["warnings"])
