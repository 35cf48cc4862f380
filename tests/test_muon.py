"""The stacked Muon against torch's own."""

import copy

import pytest
import torch

from sd_erase.erasure import muon

SHAPES = [(32, 32), (64, 32), (32, 64), (32, 32), (64, 32), (48, 32)]


def matrices(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize(("most", "wide"), [(1, 0), (2**26, 0), (2**26, 512)])
def test_steps_are_those_of_torch_to_rounding(monkeypatch: pytest.MonkeyPatch, most: int, wide: int) -> None:
    monkeypatch.setattr(muon, "MOST", most)
    monkeypatch.setattr(muon, "WIDE", wide)
    if wide:  # small matrices stay in float32; torch's do then too
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    ours, theirs = matrices(0), matrices(0)
    before = [matrix.detach().clone() for matrix in ours]
    own = muon.StackedMuon(ours, lr=1e-2, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for matrix, same, gradient in zip(ours, theirs, matrices(step + 1), strict=True):
            matrix.grad = gradient.detach()
            same.grad = gradient.detach().clone()
        ours[2].grad = theirs[2].grad = None if step < 2 else ours[2].grad  # a matrix without a gradient stays
        own.step()
        other.step()
        if step == 1:
            torch.testing.assert_close(ours[2].detach(), before[2], rtol=0, atol=0)
    for matrix, same, start in zip(ours, theirs, before, strict=True):
        moved = (same - start).norm()
        assert moved > 0 and (matrix - same).norm() < (1e-4 if wide else 0.01) * moved
        torch.testing.assert_close(own.state[matrix]["momentum_buffer"], other.state[same]["momentum_buffer"])


def test_its_state_is_torchs() -> None:
    """A checkpoint of either serves the other."""
    ours, theirs = matrices(0), matrices(0)
    own = muon.StackedMuon(ours, lr=1e-2, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for matrix in ours:
        matrix.grad = torch.ones_like(matrix)
    own.step()
    other.load_state_dict(copy.deepcopy(own.state_dict()))
    assert [set(state) for state in other.state.values()] == [{"momentum_buffer"}] * len(SHAPES)
    assert own.param_groups[0].keys() == other.param_groups[0].keys()


def test_orthogonalised_matrices_have_singular_values_about_one() -> None:
    stack = torch.stack([matrix.detach() for matrix in matrices(3) if matrix.shape == (64, 32)])
    found = muon.orthogonalised(stack, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.5 and singular.max() < 1.3
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    apart = (found - left @ right).flatten(1).norm(dim=1) / (left @ right).flatten(1).norm(dim=1)
    assert apart.max() < 0.35
    assert not found.isnan().any() and torch.isfinite(muon.orthogonalised(0 * stack, (3.4445, -4.775, 2.0315), 5, 1e-7)).all()


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="2D"):
        muon.StackedMuon([torch.nn.Parameter(torch.zeros(3))], lr=1e-2, weight_decay=0)
