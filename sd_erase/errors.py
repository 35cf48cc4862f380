"""The one exception that a user is meant to read."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable

OVER = 4  # exit code of a command whose figures are over the limit that it was given (3: a process whose partner ended)


class UserError(ValueError):
    """Bad input: one sentence that names the input, what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def shortened(value: object, most: int = 100) -> str:
    """`value` as Python writes it, cut: a file may hold a megabyte where a word belongs."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def no_file(path: object) -> str:
    """Why `path`, where a file is wanted, is none: to follow its name in a sentence."""
    return "is a folder" if os.path.isdir(str(path)) else "does not exist"


def unknown_choice(what: str, value: object, choices: Iterable[object]) -> UserError:
    """A `UserError` that lists the choices, the nearest first when one is near."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value)[:100], names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"{what} {shortened(value)} is unknown{hint}; choose one of: {', '.join(names)}.")


def is_full_disk(error: Exception) -> bool:
    """Whether there was no room for a file, and no setting is at fault; safetensors tells of it by an exception of its own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
