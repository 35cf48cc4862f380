"""How a stage tells how far it is: a callable that opens a task, silent by default, a bar on stderr for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from sd_erase.terminal import one_line


class Task(Protocol):
    """A piece of work that is under way."""

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""


class Progress(Protocol):
    """Opens a task: ``with progress("training", 120) as task: task.advance()``."""

    def __call__(self, description: str, total: int | None = None) -> AbstractContextManager[Task]: ...


class NoProgress:
    """Says nothing."""

    @contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Task]:
        yield self

    def advance(self, steps: int = 1) -> None:
        """Nothing to show."""


class RichProgress:
    """A bar a task on stderr, so that stdout stays for results.

    Args:
        console: a `rich.console.Console`; None writes to stderr.
    """

    def __init__(self, console: Any = None):
        from sd_erase import terminal

        self.console = console or terminal.console(stderr=True)

    @contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Task]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<24}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )  # fmt: skip
        with Progress(*columns, console=self.console) as bars:
            yield _RichTask(bars, bars.add_task(one_line(description), total=total))


class _RichTask:
    def __init__(self, bars: Any, task: Any):
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)
