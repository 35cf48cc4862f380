"""A batch's rows shared among the processes of a training, as if one process had computed them all.

Every process draws the same batch and computes an encoder's states of its share of the rows; an all-gather joins them, so that each
process has all states and computes the same loss, whatever the loss looks at (contrastive terms, variances over the batch, attacks
that choose). Going back, each takes its own rows' gradient, times the number of processes, and the gradients of the weights are
averaged: that of an encoder's weight is then the sum over all rows, and that of a weight behind the gathering, where every process
computes the same, is as it was (as OpenCLIP's ``local_loss=False`` with ``gather_with_grad``; Chen et al. 2020, arXiv:2002.05709).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import distributed

from sd_erase import parallel

_sharing = False  # whether batches are shared now
_at_work: tuple[int, int] | None = None  # the rows that this process computes now


@contextlib.contextmanager
def sharing(wanted: bool = True) -> Iterator[None]:
    """Share the rows of what `by_rows` computes inside, or (`wanted` False) let every process compute all of them."""
    global _sharing
    before, _sharing = _sharing, wanted and parallel.size() > 1
    try:
        yield
    finally:
        _sharing = before


class _Gathered(torch.autograd.Function):
    """[rows, ...] of each process -> [processes * rows, ...]."""

    @staticmethod
    def forward(_: Any, own: torch.Tensor) -> torch.Tensor:
        whole = own.new_empty((parallel.size() * len(own), *own.shape[1:]))
        with parallel.talking():
            distributed.all_gather(list(whole.chunk(parallel.size())), own.contiguous())
        return whole

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.chunk(parallel.size())[parallel.rank()] * parallel.size()


class _Copied(torch.autograd.Function):
    """What all processes have alike, as the input of a share: the gradient is that of all shares."""

    @staticmethod
    def forward(_: Any, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _mean(gradient.contiguous().clone())


def _mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the processes, in place."""
    with parallel.talking():
        distributed.all_reduce(values)
    return values.div_(parallel.size())


def copied(values: torch.Tensor) -> torch.Tensor:
    """`values`, to be used for some rows of a share: their gradient comes from the processes that have those rows."""
    return _Copied.apply(values) if _at_work is not None else values


def rows_at_work(count: int) -> tuple[int, int]:
    """Which rows of the whole batch, from and to, the `count` rows are that an encoder sees now."""
    return _at_work or (0, count)


def by_rows(compute: Callable[[torch.Tensor], Sequence[torch.Tensor]], batch: torch.Tensor) -> list[torch.Tensor]:
    """What `compute` makes of `batch`, each process of its share of the rows, all of them having the whole.

    Args:
        compute: [rows, ...] -> tensors [rows, ...], a row's from that row alone.
        batch: [rows, ...], the same in every process. A share is never empty: the last row fills it up.
    """
    global _at_work
    if not _sharing:
        return list(compute(batch))
    each = -(-len(batch) // parallel.size())
    start = parallel.rank() * each
    wanted = torch.arange(start, start + each, device=batch.device).clamp(max=len(batch) - 1)
    before, _at_work = _at_work, (start, start + each)
    try:
        found = compute((copied(batch) if batch.requires_grad else batch)[wanted])
    finally:
        _at_work = before
    return [_Gathered.apply(own)[: len(batch)] for own in found]


def average_gradients(trained: Sequence[torch.nn.Parameter]) -> None:
    """Give each parameter the mean of its gradients over the processes; of one process nothing changes."""
    if parallel.size() == 1:
        return
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    with parallel.talking():
        for work in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
    for gradient in gradients:
        gradient.div_(parallel.size())
