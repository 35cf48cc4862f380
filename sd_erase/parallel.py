"""Several processes that do one command together, each a share of it: who this one is, and what they tell each other.

Started by ``--processes N``, ``accelerate launch``, ``torchrun`` or anything else that sets their environment variables. Of one process
everything here is the identity. Only the main process writes to a run, holds its lock and prints results; the others read the run's
files, which must lie where all see them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sd_erase.errors import UserError, shortened

T = TypeVar("T")
OURS = "SD_ERASE_LAUNCHED"  # set in the processes that ``--processes`` starts: where their group meets
ENDED = 3  # exit code of a process of `OURS` whose partner ended: that one, or the launcher, says why
TO_MEET = datetime.timedelta(minutes=10)  # for the processes to find each other
TO_WAIT = datetime.timedelta(days=2)  # for what the main process does alone; a partner's end is noticed before


class Lost(UserError):
    """Another process of the command has ended, so this one cannot go on."""


class _Group:
    """The processes of this command once they have met."""

    store: Any = None
    size = 1
    rank = 0


_group = _Group()


def size() -> int:
    """How many processes do this command together."""
    return _group.size


def rank() -> int:
    """Which of them this is, from 0."""
    return _group.rank


def is_main() -> bool:
    """Whether this process writes and prints."""
    return _group.rank == 0


def local() -> tuple[int, int]:
    """Which of the processes on this machine this is, and how many they are."""
    if _group.size == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", _group.rank)), int(os.environ.get("LOCAL_WORLD_SIZE", _group.size))


def is_ours() -> bool:
    """Whether ``--processes`` started this process."""
    return OURS in os.environ


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Meet the other processes that the environment names, and part from them in the end.

    Raises:
        UserError: they did not all come.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2 or _group.size > 1:
        yield
        return
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    number = int(os.environ["RANK"])
    url = f"file://{os.environ[OURS]}" if is_ours() else "env://"
    try:
        store, _, _ = next(rendezvous(url, number, count, timeout=TO_MEET))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TO_WAIT)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"Process {number} of {count} did not meet the others ({one_sentence(error)}): see that all are started, and that "
            "MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE are right."
        ) from error
    store.set_timeout(datetime.timedelta(seconds=5))
    _group.store, _group.size, _group.rank = PrefixStore("sd-erase", store), count, number
    try:
        yield
        barrier()
    except BaseException as error:
        if not isinstance(error, Lost):
            with contextlib.suppress(RuntimeError):
                _group.store.set("said", "soon")  # before the others notice that this one is gone
        if backend == "gloo":  # a card's group would wait for the others
            distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()
    _group.store, _group.size, _group.rank = None, 1, 0


def one_sentence(error: BaseException) -> str:
    """The first line of a library's message, short."""
    return str(error).strip().split("\n")[0][:200].rstrip(".")


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """What the processes tell each other fails with `Lost` where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"Another of the {_group.size} processes that work on this has ended ({one_sentence(error)}): its own message says why; "
            "run the same command again to go on."
        ) from error


def barrier() -> None:
    """Wait for all."""
    gathered(None)


def gathered(value: T) -> list[T]:
    """Every process's `value`, by rank; to be called by all."""
    if _group.size == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * _group.size
    with talking():
        distributed.all_gather_object(found, value)
    return found


def agreed(choose: Callable[[], T]) -> T:
    """What the main process chooses, in all of them; to be called by all.

    Raises:
        Lost: the main process failed at it, and says so itself.
    """
    if _group.size == 1:
        return choose()
    from torch import distributed

    box: list[Any] = [False, None]
    try:
        if is_main():
            box = [True, choose()]
    finally:
        with talking():
            distributed.broadcast_object_list(box, src=0)
    if not box[0]:
        raise Lost("The main process has ended: its own message says why.")
    return box[1]


def share(items: Sequence[T], block: int = 1) -> list[T]:
    """The items that are this process's to do: of blocks of `block`, every `size`-th."""
    blocks = range(_group.rank * block, len(items), _group.size * block)
    return [item for start in blocks for item in items[start : start + block]]


def in_order(shares: Sequence[Sequence[T]], block: int = 1) -> list[T]:
    """The inverse of `share`: what each process made of its items, as the items stood."""
    if len(shares) == 1:
        return list(shares[0])
    rounds = range(0, max(map(len, shares)), block)
    return [item for start in rounds for own in shares for item in own[start : start + block]]


def first_to_say(sentence: str) -> bool:
    """Whether no other process has said this yet: several stumble over the same thing."""
    if _group.store is None:
        return True
    try:
        return bool(_group.store.add(f"said {sentence}", 1) == 1)
    except RuntimeError:  # the process that kept the store is gone
        return True


def is_explained() -> bool:
    """Whether some process has said why it ends."""
    try:
        return _group.store is not None and bool(_group.store.check(["said"]))
    except RuntimeError:
        return False


def refuse_differences(settings: Mapping[str, Any]) -> None:
    """Refuse processes that were told different things.

    Args:
        settings: what this one was told, as text by name.

    Raises:
        UserError: in all of them.
    """
    told = gathered((platform.node(), {name: str(value) for name, value in settings.items()}))
    for number, (host, other) in enumerate(told):
        for name in sorted({*told[0][1], *other}):
            first, own = told[0][1].get(name, "nothing"), other.get(name, "nothing")
            if own != first:
                raise UserError(
                    f"Process {number} (on {host}) has {shortened(own)} for {name} and process 0 {shortened(first)}: start all of them "
                    "with the same command, the same settings and the same version of sd-erase."
                )


def check_devices(kind: str) -> None:
    """Refuse more processes on this machine than it has devices of `kind`: cards, or of "cpu" cores.

    Raises:
        UserError: there are more.
    """
    if _group.size > 1:
        refuse_too_many(local()[1], kind)


def refuse_too_many(processes: int, kind: str) -> None:
    """As `check_devices`, of processes that are to be started."""
    if kind == "cuda":
        import torch

        most, what = torch.cuda.device_count(), "graphics card"
    else:
        most, what = (cores(), "core") if kind == "cpu" else (1, f"{kind} device")
    if processes > most:
        have = f"{most} {what}{'' if most == 1 else 's'}"
        remedy = f"--processes {most}" if most else "--device cpu"
        raise UserError(f"{processes} processes are asked for and this machine has {have} for them: pass {remedy}.")


def cores() -> int:
    """The processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The block in the main process, then in the others, which find what it wrote."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
