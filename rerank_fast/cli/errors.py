"""What went wrong, as one line in the words of who typed the command."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

_USERS = (ValueError, OSError, ImportError, MemoryError, FloatingPointError)  # OSError: a full disk
# Neither part of a path nor quoted.
_WHOLE = r"""(?<![\w./\\'"-])(?:{names})(?![\w./\\'"-])"""
# Where errors name their argument: "seed must be ...", "freeze_layers and freeze must ...".
_FIRST = r"^(?:{names})(?=[ :=])|(?<= and )(?:{names})(?= must )"


def is_users(error: Exception) -> bool:
    """Whether an error says what input, files, packages or the machine lack; others are bugs.

    A GPU's own are RuntimeErrors like any other, and known by their messages.
    """
    return isinstance(error, _USERS) or bool(_of_the_machine(error))


def one_line(error: Exception) -> str:
    """The error's message without line breaks; its kind where it has none."""
    said = (not isinstance(error, _USERS) and _of_the_machine(error)) or str(error).strip()
    return re.sub(r"\s*\n\s*", " ", said) or type(error).__name__


def _of_the_machine(error: Exception) -> str:
    """What a GPU lacks, in one line; empty for other errors. torch is not imported to be asked."""
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return ""
    from rerank_fast.model.devices import fault
    from rerank_fast.model.scoring import is_out_of_memory

    if is_out_of_memory(error):
        first = str(error).strip().partition("\n")[0]
        return f"memory does not suffice: expected a smaller model, batch or max_length ({first})"
    return fault(error)


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
