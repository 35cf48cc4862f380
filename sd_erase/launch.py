"""``--processes N``: the same command in N processes on this machine, in the manner of torchrun.

torchrun itself takes the exit codes of the processes that it stopped for those that failed, prints a table of tracebacks over the one
sentence that matters, and has to be found by the shell; what it sets for its processes is set here too, so that they cannot tell.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_erase import parallel
from sd_erase.errors import OVER, UserError

GRACE = 15.0  # seconds for the others to notice by themselves that one has ended, and then to end when they are told to
FAILED = 2


def launch(processes: int, arguments: Sequence[str], device: str) -> int:
    """Run ``sd-erase ARGUMENTS`` in `processes` processes and wait for them; returns the exit code.

    Args:
        device: what the settings name, as far as is known here.

    Raises:
        UserError: this machine has fewer devices, or one of the processes ended without a word of its own.
    """
    parallel.refuse_too_many(processes, _kind(device, processes))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="sd-erase-") as folder:
        started = [
            context.Process(target=_work, args=(list(arguments), environment(number, processes, Path(folder) / "meeting")))
            for number in range(processes)
        ]
        for process in started:
            process.start()
        try:
            _wait(started)
        except KeyboardInterrupt:  # which the processes got too, or get now
            _stop(started)
            raise
        codes = [int(process.exitcode or 0) for process in started]
    return explain(codes)


def environment(number: int, processes: int, meeting: Path) -> dict[str, str]:
    """What tells a process which of them it is, by torchrun's names.

    Args:
        meeting: a file, which they make, by which they find each other.
    """
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        parallel.OURS: str(meeting),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, parallel.cores() // processes)),
    }


def explain(codes: Sequence[int]) -> int:
    """The exit code of the command whose processes ended with `codes`.

    Raises:
        UserError: one ended without saying why; the sentence says which and how.
    """
    if not any(codes):
        return 0
    spoken = [code for code in codes if code not in (0, parallel.ENDED, -signal.SIGTERM)]
    for said in (FAILED, OVER):
        if said in spoken:
            return said
    if spoken and all(code > 128 for code in spoken):  # interrupted, which was said
        return spoken[0]
    code = next(iter(spoken), next(filter(None, codes)))
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    memory = " (often the system's way to free memory)" if code == -getattr(signal, "SIGKILL", 0) else ""
    raise UserError(
        f"Process {list(codes).index(code)} of {len(codes)} {how}{memory}, and the others were stopped: run the same command again to go "
        "on where they were, with as many processes or with fewer."
    )


def _kind(device: str, processes: int) -> str:
    """The kind of device that `processes` processes want; torch, which takes seconds, is asked only where it matters."""
    if device.partition(":")[0] in ("cpu", "mps"):
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda"


def _wait(started: Sequence[Any]) -> None:
    """Until all have ended; when one failed, the others have `GRACE` seconds to notice."""
    # asked once a round: a process that ends between two askings would leave nothing to wait for, which waits for ever
    while running := [process for process in started if process.is_alive()]:
        multiprocessing.connection.wait([process.sentinel for process in running])
        if any(process.exitcode for process in started if not process.is_alive()):
            _end_within(started, GRACE)
            _stop(started)
            return


def _end_within(started: Sequence[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, end - time.monotonic()))


def _stop(started: Sequence[Any]) -> None:
    """End those that still run, by force where they do not listen."""
    for process in started:
        if process.is_alive():
            process.terminate()
    _end_within(started, GRACE)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()


def _work(arguments: list[str], variables: Mapping[str, str]) -> None:
    """One of the processes."""
    os.environ.update(variables)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()  # nobody would wait for it any more
    sys.argv = ["sd-erase", *arguments]
    runpy.run_module("sd_erase", run_name="__main__")
