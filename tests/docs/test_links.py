"""What pages point at is there: files, headings, pictures, and the files and commands they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rerank_fast.cli.commands import make_parser
from tests.docs.guides import ROOT

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
# Of this repository's rooms; what a user has, or a run writes, is not.
_OWN = re.compile(r"^(?:rerank_fast|csrc|tests|benchmarks|docs|\.ci)/[\w./*-]*$")
# What a guide adds.
_ADDED = re.compile(r"/(?:margin|ernie|candidates|numpy_ndcg)\.py$")


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As MkDocs makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", one.replace("`", "")).strip().lower() for one in headings)
    return {re.sub(r"[\s-]+", "-", one) for one in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path):
    for name in re.findall(r"`([^`\s]+)`", prose(page)):
        if _OWN.match(name) and not _ADDED.search(name):
            assert any(ROOT.glob(name.rstrip("/"))), name


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("rerank-fast ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_typed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("{model: bert, train: train.jsonl}")
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        words = words[: words.index(">")] if ">" in words else words
        if {"--help", "--version", "--completion", "--print_config"} & set(words):
            continue
        make_parser().parse_args(words)  # exits where a flag or a value is not one


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in menu, page.name
