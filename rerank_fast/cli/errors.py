"""What went wrong, as one line in the words of who typed the command."""

from __future__ import annotations

import re
from collections.abc import Mapping

_USERS = (ValueError, OSError, ImportError, MemoryError, FloatingPointError)  # OSError: a full disk
# Neither part of a path nor quoted.
_WHOLE = r"""(?<![\w./\\'"-])(?:{names})(?![\w./\\'"-])"""
# Where errors name their argument: "seed must be ...", "freeze_layers and freeze must ...".
_FIRST = r"^(?:{names})(?=[ :=])|(?<= and )(?:{names})(?= must )"


def is_users(error: Exception) -> bool:
    """Whether an error says what input, files, packages or the machine lack; others are bugs.

    torch has an error of its own for a GPU's memory, and is not imported to be asked.
    """
    return isinstance(error, _USERS) or type(error).__name__ == "OutOfMemoryError"


def one_line(error: Exception) -> str:
    """The error's message without line breaks; its kind where it has none."""
    return re.sub(r"\s*\n\s*", " ", str(error).strip()) or type(error).__name__


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message about Python's arguments as one about flags.

    A name with an underscore is a flag wherever it stands, a plain word (seed, output) where an
    error names its argument. Of both spellings, as in overwrite=True (--overwrite), the flag stays.

    Args:
        message: of an error.
        flags: what is typed for each argument's name: {"seed": "--seed"}.
    """
    if "--set" in message:  # said by who reads the command line
        return message
    message = re.sub(r"\w+(?:=[^\s(]+)? \((--[^)]+)\)", r"\1", message)
    for pattern, several in ((_WHOLE, True), (_FIRST, False)):
        names = "|".join(re.escape(name) for name in flags if ("_" in name) is several)
        if names:
            message = re.sub(pattern.format(names=names), lambda name: flags[name[0]], message)
    return message
