"""Pages of docs/ as things to do: their blocks of code, and their changes made to a copy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)(?: title=\"(\S+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, *kinds: str) -> list[str]:
    """The page's blocks of these languages, in their order, without those that are whole files."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [code for kind, title, code in _BLOCK.findall(text) if kind in kinds and not title]


def follow(page: str, work: Path) -> Path:
    """A copy of the package in which the page's files are written and its changes made.

    Raises:
        ValueError: a change's old lines do not stand in the file exactly once.
    """
    shutil.copytree(
        ROOT / "rerank_fast", work / "rerank_fast", ignore=shutil.ignore_patterns("__pycache__")
    )
    for kind, title, code in _BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8")):
        if kind == "diff":
            file = work / title
            text = file.read_text(encoding="utf-8")
            for hunk in re.split(r"^ \.\.\.\n", code, flags=re.MULTILINE):
                lines = hunk.splitlines(keepends=True)
                old = "".join(line[1:] for line in lines if line[0] in " -")
                new = "".join(line[1:] for line in lines if line[0] in " +")
                if text.count(old) != 1:
                    raise ValueError(f"{page}: {title} has {text.count(old)} times\n{old}")
                text = text.replace(old, new)
            file.write_text(text, encoding="utf-8")
        elif title:
            (work / title).write_text(code, encoding="utf-8")
    return work
