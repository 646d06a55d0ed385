"""docs/data_layouts.md does what it says: its files are written, its sessions run."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from rerank_fast.data import ListStream, load_lists
from rerank_fast.data.layouts import id_tables, judgements
from rerank_fast.data.layouts.choice import FIELDS, LAYOUTS

TEXT = (Path(__file__).parents[3] / "docs" / "data_layouts.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
FILES = re.compile(r"^```\w+ title=\"(\S+)\"\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SESSIONS = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_every_layout_is_there_in_its_order():
    names = [layout.NAME for layout in (*LAYOUTS, id_tables, judgements)]
    assert list(SECTIONS) == [*names, "What may hold rows"]
    assert all(f"`{field}`" in TEXT.partition("\n## ")[0] for field in FIELDS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for file, content in FILES.findall(SECTIONS[name]):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(content, encoding="utf-8")
    session = "\n".join(SESSIONS.findall(SECTIONS[name]))
    known = {"load_lists": load_lists, "ListStream": ListStream}
    examples = doctest.DocTestParser().get_doctest(session, known, name, None, 0)
    said: list[str] = []
    result = doctest.DocTestRunner().run(examples, out=said.append)
    assert result.attempted > 0
    assert not result.failed, "".join(said)
