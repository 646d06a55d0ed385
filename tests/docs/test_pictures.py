"""docs/pictures/: the scripts draw what is committed, and each picture stands in a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rerank_fast.demo import encoder_directory
from tests.docs.guides import ROOT

pytest.importorskip("matplotlib")
PICTURES = ROOT / "docs" / "pictures"


def texts(file: Path) -> list[str]:
    """The words in a drawing, which are its figures and labels."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text(encoding="utf-8"))


def test_one_command_draws_what_is_there(tmp_path: Path):
    command = [sys.executable, str(PICTURES / "make.py"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {file.name for file in PICTURES.glob("*.svg")}
    for name in drawn:
        assert texts(tmp_path / name) == texts(PICTURES / name), f"{name}: draw it anew"
        assert (PICTURES / name).stat().st_size < 100_000
    wrong = subprocess.run([*command, "peir"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "there is no picture peir: pair, packed" in wrong.stderr


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PICTURES))


def test_the_tokens_are_a_tokenizers(scripts: None):
    import pair
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder_directory())
    except ValueError as error:
        pytest.skip(str(error))
    assert tokenizer(pair.QUERY, pair.DOCUMENT).tokens() == pair.TOKENS


def test_figures_say_where_they_are_from():
    for file in PICTURES.glob("*.json"):
        figures = json.loads(file.read_text(encoding="utf-8"))
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", figures["date"])
        assert all(figures[name] for name in ("processor", "threads", "versions", "command"))
        pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
        (page,) = [text for text in pages if f"pictures/{file.stem}.svg" in text]
        # Beside the picture, too.
        after = page.partition(f"pictures/{file.stem}.svg")[2][:600]
        assert figures["date"] in after
        assert figures["command"] in " ".join(after.split())


def test_memory_reads_what_the_benchmark_prints(scripts: None):
    import memory

    table = (
        "mode                                     lists  docs  peak MiB  seconds  pairs/s\n"
        "cached, 512 tokens                           1     8       117     1.00      8.0\n"
        "direct, 512 tokens                           1   512      3707    11.00     46.5\n"
        "direct, 512 tokens                           1  1024 does not fit in the 20 GiB free\n"
    )
    assert memory.read(table) == {"direct": [[512, 3707]], "cached": [[8, 117]]}
    assert (ROOT / f"{memory.BENCHMARK[1].replace('.', '/')}.py").is_file()
