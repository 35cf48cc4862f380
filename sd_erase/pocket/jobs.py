"""Steps of a build in processes of their own, as many side by side as asked, each as soon as what it reads is there."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from sd_erase.errors import UserError


def run_jobs(
    steps: Sequence[str], after: Mapping[str, Sequence[str]], jobs: int, command: Callable[[str], list[str]], pause: float = 0.5
) -> None:
    """Run every step once those that it comes after are done; of several that could, the first of `steps`.

    Args:
        steps: what is to be run; a step that is not among them counts as done.
        after: of each step, those that come before it.
        jobs: processes at a time.
        command: of a step.
        pause: seconds between two looks at the processes.

    Raises:
        UserError: a step failed. The others that run are ended; each goes on from its checkpoint when the command is given again.
    """
    waiting, running = list(steps), dict[str, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code:
                    raise UserError(
                        f"Step {name} of the build ended with exit code {code} (see build.log): give the same command again to go on from its checkpoint."
                    )
            blocked = {*waiting, *running}
            for name in [name for name in waiting if not blocked & set(after[name])][: max(0, jobs - len(running))]:
                waiting.remove(name)
                running[name] = subprocess.Popen(command(name))
            if running:
                time.sleep(pause)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
