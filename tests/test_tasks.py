"""CLIP's own tasks against torchmetrics, scikit-learn, and loops that are plain enough to be checked by eye."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from torch.nn.functional import normalize
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.retrieval import retrieval_hit_rate

from sd_erase import bases
from sd_erase.clip import Towers, load_towers
from sd_erase.errors import UserError
from sd_erase.metrics import tasks


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def towers() -> Towers:
    return load_towers(bases.resolve("pocket"), "cpu", need_images=True)


def test_the_templates_are_clips_own() -> None:
    forms = tasks.templates("cifar100")
    assert len(forms) == 18 and forms[0] == "a photo of a {}." and forms[-1] == "a photo of the big {}."
    assert "a black and white photo of the {}." in forms
    assert all(form.count("{}") == 1 for forms in tasks.TEMPLATES.values() for form in forms)
    with pytest.raises(UserError, match="^Prompt templates 'imagenett' is unknown .did you mean 'imagenet'.*cifar100"):
        tasks.templates("imagenett")


def test_a_class_embedding_is_the_normalised_mean_over_its_templates() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8]])
    found = tasks.class_embeddings(texts, 2)
    assert torch.allclose(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))
    wide = embeddings(6, 5)  # two templates of three classes in five dimensions
    means = [(wide[2 * number] + wide[2 * number + 1]) / 2 for number in range(3)]
    assert torch.allclose(tasks.class_embeddings(wide, 2), torch.stack([mean / mean.norm() for mean in means]))


def test_prediction_agrees_with_torchmetrics_and_scikit_learn() -> None:
    images, classes = embeddings(200, 8), embeddings(7, 8, seed=1)
    labels = torch.arange(200) % 7
    hits = tasks.zero_shot_prediction(images, classes, labels)
    scores = images @ classes.T
    assert hits.mean().item() == pytest.approx(multiclass_accuracy(scores, labels, 7, average="micro").item())
    assert hits.mean().item() == pytest.approx(top_k_accuracy_score(labels, scores.numpy(), k=1, labels=range(7)))


def test_text_retrieval_takes_the_nearest_single_prompt() -> None:
    # class 0 has one prompt next to the image and one far off: the mean loses, the single text wins
    images = torch.tensor([[1.0, 0.0]])
    texts = normalize(torch.tensor([[1.0, 0.1], [-1.0, 1.0], [1.0, 0.5], [1.0, 0.5]]), dim=-1)
    text_labels, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0])
    assert tasks.zero_shot_text_retrieval(images, texts, text_labels, labels).tolist() == [1.0]
    assert tasks.zero_shot_prediction(images, tasks.class_embeddings(texts, 2), labels).tolist() == [0.0]
    several = torch.cat([images, texts[2:3], -images])  # each image for itself
    assert tasks.zero_shot_text_retrieval(several, texts, text_labels, torch.tensor([0, 0, 0])).tolist() == [1.0, 0.0, 1.0]


def test_embeddings_are_the_towers_own_in_the_order_of_the_inputs(
    towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "BATCH", 2)
    pictures = [Image.effect_noise((64, 64), 20.0 * number).convert("RGB") for number in range(1, 6)]
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    captions = ["a dog", "a cat beside a bus", "a pizza", "an apple and an orange on the grass", "a horse"]
    pixels = towers.image_processor(images=pictures, return_tensors="pt").pixel_values
    tokens = towers.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        images = normalize(towers.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        texts = normalize(towers.clip.get_text_features(input_ids=tokens).pooler_output, dim=-1)
    assert torch.allclose(tasks.embed_images(towers, paths), images, atol=1e-5)
    assert torch.allclose(tasks.embed_texts(towers, captions), texts, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_agrees_with_torchmetrics_on_five_captions_an_image(k: int) -> None:
    images, noise = embeddings(30, 6), embeddings(150, 6, seed=2)
    texts = normalize(images.repeat_interleave(5, 0) + noise, dim=-1)
    image_keys, text_keys = torch.arange(30), torch.arange(30).repeat_interleave(5)
    by_text = tasks.recall_at(tasks.first_ranks(texts, images, text_keys, image_keys), k)
    by_image = tasks.recall_at(tasks.first_ranks(images, texts, image_keys, text_keys), k)
    for hits, queries, gallery, keys, gallery_keys in (
        (by_text, texts, images, text_keys, image_keys),
        (by_image, images, texts, image_keys, text_keys),
    ):
        expected = [
            retrieval_hit_rate(similarity, gallery_keys == key, top_k=k).item()
            for similarity, key in zip(queries @ gallery.T, keys, strict=True)
        ]
        assert hits.tolist() == expected
        assert 0 < hits.mean() < 1 or k == 10


def test_an_encoder_that_maps_everything_to_one_point_finds_nothing_but_by_chance() -> None:
    same = torch.ones(20, 3) / 3**0.5
    keys = torch.arange(20)
    ranks = tasks.first_ranks(same, same, keys, keys)
    assert ranks.tolist() == list(range(20))  # the gallery's order, which tells nothing


def test_a_pool_is_searched_by_its_own_queries_only() -> None:
    images, texts = embeddings(50, 5), embeddings(50, 5, seed=3)
    hits = tasks.pool_retrieval(images, texts, torch.arange(50), 16, torch.Generator().manual_seed(4))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4)).tolist()
    expected = [0.0] * 50
    for start in (0, 16, 32, 48):
        own = order[start : start + 16]
        pool = own + order[: 16 - len(own)]
        for query in own:
            best = max(pool, key=lambda candidate: float(images[query] @ texts[candidate]))
            expected[query] = float(best == query)
    assert hits.tolist() == expected


def test_pairs_of_one_caption_are_each_others_partner() -> None:
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    same = tasks.numbered(["a dog", "a dog", "a cat"])
    assert same.tolist() == [0, 0, 1]
    hits = tasks.pool_retrieval(images, texts, same, 3, torch.Generator().manual_seed(0))
    assert hits.tolist() == [1.0, 1.0, 1.0]


def test_the_last_pool_is_filled_up_to_the_size_of_the_others_and_no_further() -> None:
    """Of five pairs in pools of two, the fifth is searched beside the first of the order alone."""
    order = torch.randperm(5, generator=torch.Generator().manual_seed(7)).tolist()
    queries = torch.eye(5)
    for nearer, hit in ((order[0], 0.0), (order[1], 1.0), (order[2], 1.0), (order[3], 1.0)):
        texts = torch.eye(5)
        texts[nearer, order[4]] = 2  # another pair's text is nearer to the last query than its own
        hits = tasks.pool_retrieval(queries, texts, torch.arange(5), 2, torch.Generator().manual_seed(7))
        assert hits[order[4]] == hit
        assert hits[order[:4]].tolist() == [1.0] * 4  # whose pools are full without it


def test_a_retrieval_reads_the_row_of_each_query() -> None:
    """More queries than candidates, and the other way round: what is taken is a place in the gallery."""
    images, texts = torch.eye(3)[[0, 1, 2, 0, 1]], torch.eye(3)
    labels = torch.tensor([0, 1, 2, 2, 1])
    assert tasks.zero_shot_prediction(images, texts, labels).tolist() == [1, 1, 1, 0, 1]
    assert tasks.zero_shot_text_retrieval(images, texts, torch.arange(3), labels).tolist() == [1, 1, 1, 0, 1]
    ranks = tasks.first_ranks(texts, images, torch.tensor([9, 1, 2]), torch.tensor([0, 1, 2, 9, 9]))
    assert ranks.tolist() == [1, 0, 0]  # the first image of the key 9 stands behind the other that is as near
    assert tasks.recall_at(ranks, 1).tolist() == [0, 1, 1] and tasks.recall_at(ranks, 2).tolist() == [1, 1, 1]
