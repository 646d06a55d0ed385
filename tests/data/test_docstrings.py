from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rerank_fast.data import docstrings
from rerank_fast.data.docstrings import (
    DocumentedName,
    build_docstring_lists,
    is_held_out,
    part_docstring,
)

_TOPICS = (
    "bread",
    "cheese",
    "river",
    "engine",
    "violin",
    "desert",
    "planet",
    "harbour",
    "candle",
    "forest",
    "glacier",
    "parrot",
)


def _write_package(root: Path) -> None:
    """Twelve modules with four documented functions each, on a dozen topics."""
    for number, topic in enumerate(_TOPICS):
        functions = "\n".join(
            f"def function_{i}():\n"
            f'    """Return the {topic} of kind {i}{number}.\n\n'
            f"    Every {topic} known as {i}{number} is looked up in the table of all of them and "
            "given back.\n"
            f'    """\n'
            for i in range(4)
        )
        (root / f"module_{number}.py").write_text(functions)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    _write_package(tmp_path)
    monkeypatch.setattr(docstrings, "_roots", lambda: {"package": tmp_path})
    return tmp_path


def test_parts_a_docstring_into_its_first_sentence_and_the_rest():
    text = """Join two or more pathname components. An absolute one discards

    what came before. An empty last part gives a path that ends with a separator.
    """
    assert part_docstring(text) == (
        "Join two or more pathname components.",
        "An absolute one discards what came before. An empty last part gives a path that ends with "
        "a separator.",
    )


def test_a_signature_is_not_the_summary():
    rest = "Values are taken one by one and each of them is made positive here."
    parted = part_docstring(
        f"abs(input) -> Tensor\n\nComputes the absolute value of each element.\n\n{rest}"
    )
    assert parted == ("Computes the absolute value of each element.", rest)
    assert part_docstring(f"abs(input, *, out=None) -> Tensor\n\n{rest[:20]}") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Too short.\n\nBut this paragraph has more than enough words in it to stand as a document.",
        "A summary of enough words.\n\nToo short a rest.",
        "A summary of enough words.",
        "Instance attributes that it has are:\n\none of the first kind, two of the second kind, "
        "three of the third",
        "A summary of enough words.\n\nNote: a summary of enough words. It is quoted here, which "
        "gives it away.",
    ],
)
def test_leaves_out_what_says_too_little_or_too_much(text: str):
    assert part_docstring(text) is None


def test_documents_are_cut_and_those_that_are_then_equal_are_left_out(package: Path):
    names = docstrings.documented_names()
    assert max(len(name.rest.split()) for name in names) == 18
    cut = docstrings.documented_names(max_words=8)
    assert {len(name.rest.split()) for name in cut} == {8}
    function = (
        'def f():\n    """Return what number {} says.\n\n    ' + "the same words " * 4 + '{}"""\n'
    )
    (package / "same.py").write_text(function.format(0, 0) + function.format(1, 1))
    assert len(docstrings.documented_names()) == len(names) + 2
    assert docstrings.documented_names(max_words=8) == cut


def test_a_summary_in_another_spelling_is_no_second_query(package: Path):
    names = docstrings.documented_names()
    summary = "RETURN the \uff42\uff32\uff25\uff21\uff24 of kind 00."
    rest = "A rest that nothing else here has, long enough."
    function = f'def f():\n    """{summary}\n\n    {rest}\n    """\n'
    (package / "same.py").write_text(function, encoding="utf-8")
    left = [one for one in names if one.summary != "Return the bread of kind 00."]
    assert docstrings.documented_names() == left
    assert len(left) == len(names) - 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("JSONDecoder.raw_decode", "JSON Decoder raw decode"),
        ("BatchNorm2d", "Batch Norm2d"),
        ("isfile", "isfile"),
        ("torch.LSTM", "torch LSTM"),
        ("GPT2Model", "GPT2 Model"),
    ],
)
def test_a_document_begins_with_its_name_in_words(name: str, words: str):
    assert DocumentedName("m", name, "a summary", "the rest").document == f"{words}: the rest"


def test_reads_public_names_and_added_docstrings_without_running_the_code():
    tree = ast.parse('''
raise SystemExit("was run")
class Public:
    """of a class"""
    def method(self):
        """of a method"""
        def inner():
            """of an inner function"""
    def _private(self):
        """of a private method"""
add_docstr(torch.abs, r"""abs docs {input}""".format(**common))
add_docstr_all("all", """all docs""")
add_docstr(torch.made, "up " + made)
''')
    assert sorted(docstrings._docstrings(tree)) == [
        ("Public", "of a class"),
        ("Public.method", "of a method"),
        ("all", "all docs"),
        ("torch.abs", "abs docs "),
    ]


def test_repeated_texts_and_unreadable_files_are_left_out(package: Path):
    (package / "copy.py").write_text((package / "module_0.py").read_text())
    (package / "broken.py").write_text('def half(:\n    """')
    (package / "latin.py").write_bytes(b'"""\xff"""')
    (package / "tests").mkdir()
    (package / "tests" / "hidden.py").write_text(
        (package / "module_1.py").read_text().replace("bread", "x")
    )
    modules = {name.module for name in docstrings.documented_names()}
    assert modules == {f"package.module_{number}" for number in range(1, len(_TOPICS))}


def test_lists_have_one_right_document_in_bm25_order_and_no_split_sees_the_other(package: Path):
    train, held_out = build_docstring_lists(num_negatives=3, seed=0)
    names = docstrings.documented_names()
    group_of = {name.document: name.group for name in names}
    right_of = {name.summary: name.document for name in names}
    for lists, held in ((train, False), (held_out, True)):
        assert lists.column_names == ["query", "docs", "labels"]
        for row in lists:
            assert len(row["docs"]) == len(row["labels"]) == 4 == len(set(row["docs"]))
            assert sum(row["labels"]) == 1
            assert row["docs"][row["labels"].index(1)] == right_of[row["query"]]
            assert {is_held_out(group_of[document], seed=0) for document in row["docs"]} == {held}
    assert len(train) + len(held_out) == len(names) == 48
    # Topic and kind both match: BM25 puts the right one first.
    assert all(row["labels"][0] == 1 for row in train)


def test_random_documents_follow_in_training_lists_alone(package: Path):
    plain = build_docstring_lists(num_negatives=3, seed=0)
    train, held_out = build_docstring_lists(num_negatives=3, num_random=5, seed=0)
    assert held_out.to_list() == plain[1].to_list()
    group_of = {name.document: name.group for name in docstrings.documented_names()}
    for row, without in zip(train, plain[0], strict=True):
        assert row["query"] == without["query"]
        assert row["docs"][:4] == without["docs"]
        assert len(row["docs"]) == len(set(row["docs"])) == 9
        assert row["labels"] == without["labels"] + [0.0] * 5
        assert not any(is_held_out(group_of[document], seed=0) for document in row["docs"])


def test_a_right_document_that_bm25_misses_stands_last(package: Path):
    names = [DocumentedName("m", "f", "wholly unrelated query words", "alpha beta gamma")]
    names += [
        DocumentedName("m", f"f{i}", f"summary {i}", f"unrelated query words {i}") for i in range(5)
    ]
    lists = docstrings._lists(names, num_negatives=3, num_random=0, max_lists=None, seed=0)
    row = next(row for row in lists if row["query"].startswith("wholly"))
    assert row["labels"] == [0, 0, 0, 1]


def test_is_repeatable_and_max_lists_takes_a_prefix(package: Path):
    first, again = (build_docstring_lists(num_negatives=2, seed=0)[0] for _ in range(2))
    few = build_docstring_lists(num_negatives=2, max_lists=5, seed=0)[0]
    assert first.to_list() == again.to_list()
    assert few.to_list() == first.to_list()[:5]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("num_negatives", 0, 1), ("num_random", -1, 0), ("max_lists", 0, 1), ("max_words", 7, 8)],
)
def test_numbers_that_are_too_low_are_errors(name: str, value: int, least: int):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
        build_docstring_lists(**{name: value})


def test_without_documentation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docstrings, "_roots", lambda: {"package": tmp_path})
    with pytest.raises(ValueError, match="expected the docstrings of several modules"):
        build_docstring_lists()


def test_every_install_has_thousands(monkeypatch: pytest.MonkeyPatch):
    roots = docstrings._roots()
    assert {"torch", "numpy", "transformers"} <= set(roots)
    monkeypatch.setattr(docstrings, "_roots", lambda: {"numpy": roots["numpy"]})
    names = docstrings.documented_names()
    assert len(names) > 300
    assert not any("->" in name.summary for name in names)
