"""A ranking task from the documentation that every install has: which documentation does a summary
line open?

Query: the summary of a function or class. Right document: its name and the rest of its docstring.
Wrong ones: what BM25 finds for the summary among the other documents of the same split. Sources are
parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import logging
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rerank_fast.data.held_out import normalized

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "numpy", "transformers")
# Code that readers of documentation don't call, or near-copies by the hundred
# (transformers/models).
_LEFT_OUT = frozenset(
    (
        *(
            "test",
            "tests",
            "testing",
            "testing_utils",
            "lib2to3",
            "idlelib",
            "turtledemo",
            "ensurepip",
        ),
        *("site-packages", "dist-packages", "models", "cli", "exporters"),
    )
)
# Other private modules are left out too; these document public names.
_PRIVATE_BUT_DOCUMENTED = re.compile(r"torch\._(\w+_docs|tensor)\b|numpy\._core\.|numpy\.lib\._")
_HELD_OUT_SHARE = 0.2
_MIN_SUMMARY_WORDS = 4
_MAX_SUMMARY_WORDS = 40
_MIN_DOCUMENT_WORDS = 8
# batch_norm and BatchNorm are two words each, JSONDecoder is JSON Decoder.
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z0-9]+")


@dataclass(frozen=True)
class DocumentedName:
    """A function or class and its documentation, the summary apart from the rest."""

    module: str  # dotted, e.g. "torch.nn.functional"
    name: str
    summary: str
    rest: str

    @property
    def document(self) -> str:
        """The name in words, as BM25 needs them, then the rest: "Batch Sampler iter: Yields
        ...".
        """
        return f"{' '.join(_NAME_WORD.findall(self.name))}: {self.rest}"

    @property
    def group(self) -> str:
        """What is kept together in one split: the package and its first submodule."""
        return ".".join(self.module.split(".")[:2])


def build_docstring_lists(
    *,
    num_negatives: int = 9,
    num_random: int = 0,
    max_lists: int | None = None,
    max_words: int = 150,
    seed: int = 12,
) -> tuple[Dataset, Dataset]:
    """Ranking lists from the docstrings of the standard library, torch, numpy and transformers.

    Whole modules are held out (a fifth of them), and a list's documents come from its own split
    alone. Each list holds one right document (label 1) and the BM25-best wrong ones (label 0), in
    BM25's order; a right document that BM25 ranks below all of those stands last. Training lists
    can have random wrong ones after these: they teach what a match is, before the BM25-best ones
    can teach what is a better match.

    Args:
        num_negatives: BM25's wrong documents a list; fewer where the split has no more.
        num_random: random wrong documents a training list; fewer where the split has no more.
        max_lists: most lists of each split, a random choice; None takes all. Lists come in random
            order.
        max_words: of a document, for BM25 as for the model; the default is about 256 tokens.
        seed: of that order, of the random documents and of the split.

    Returns:
        (train, held out), each with the columns query, docs and labels.

    Raises:
        ValueError: a number is too low, bm25s is missing, or no documentation was found.
    """
    for name, value, least in (
        ("num_negatives", num_negatives, 1),
        ("num_random", num_random, 0),
        ("max_lists", max_lists, 1),
        ("max_words", max_words, _MIN_DOCUMENT_WORDS),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if importlib.util.find_spec("bm25s") is None:
        raise ValueError(
            "the docstring task takes its negatives from bm25s: pip install 'rerank-fast[demo]'"
        )
    names = documented_names(max_words=max_words)
    held_out = [is_held_out(name.group, seed=seed) for name in names]
    splits = []
    for wanted in (False, True):
        split = [name for name, held in zip(names, held_out, strict=True) if held is wanted]
        if len(split) < 2:
            raise ValueError(
                f"expected the docstrings of several modules in {', '.join(_roots())}, got "
                f"{len(names)}"
            )
        splits.append(
            _lists(
                split,
                num_negatives=num_negatives,
                num_random=0 if wanted else num_random,
                max_lists=max_lists,
                seed=seed,
            )
        )
    return splits[0], splits[1]


def is_held_out(group: str, *, seed: int = 12) -> bool:
    """Whether a group of modules is in the held-out split: a hash, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


def documented_names(*, max_words: int = 150) -> list[DocumentedName]:
    """Every usable docstring once, sorted by module.

    Texts that occur twice, in whatever case, spacing or Unicode form, are left out altogether.

    Args:
        max_words: of the rest of a docstring, the first ones.
    """
    found = [name for prefix, root in _roots().items() for name in _in_directory(root, prefix)]
    found = [replace(name, rest=" ".join(name.rest.split()[:max_words])) for name in found]
    found.sort(key=lambda name: (name.module, name.name))
    # A repeated summary has several right answers, a repeated rest is right under several
    # summaries.
    keys = [(normalized(name.summary), normalized(name.rest)) for name in found]
    summaries = Counter(summary for summary, _ in keys)
    rests = Counter(rest for _, rest in keys)
    return [
        name
        for name, (summary, rest) in zip(found, keys, strict=True)
        if summaries[summary] == 1 and rests[rest] == 1
    ]


def _roots() -> dict[str, Path]:
    """Module prefix -> source directory; the standard library's modules have no prefix."""
    roots = {"": Path(sysconfig.get_paths()["stdlib"])}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)  # top-level names are found without being imported
        if spec is not None and spec.submodule_search_locations:
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def _in_directory(root: Path, prefix: str) -> Iterator[DocumentedName]:
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if not _LEFT_OUT.isdisjoint(parts) or any(
            "-" in part or part.startswith("test_") for part in parts
        ):
            continue
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        module = ".".join(([prefix] if prefix else []) + list(parts))
        if any(part.startswith("_") for part in parts) and not _PRIVATE_BUT_DOCUMENTED.match(
            module
        ):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            if '"""' not in source and "'''" not in source:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError, RecursionError) as error:
            logger.debug("left out %s: %s", file, error)
            continue
        for name, docstring in _docstrings(tree):
            parted = part_docstring(docstring)
            if parted is not None:
                yield DocumentedName(module, name, *parted)


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of public functions and classes, and of add_docstr calls (torch's
    built-ins).
    """
    scopes: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    while scopes:
        scope, body = scopes.pop()
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("_"):
                    continue
                name = f"{scope}.{node.name}" if scope else node.name
                docstring = ast.get_docstring(node)
                if docstring:
                    yield name, docstring
                if isinstance(node, ast.ClassDef):
                    scopes.append((name, node.body))
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                builtin = _added_docstring(node.value)
                if builtin is not None:
                    yield builtin


def _added_docstring(call: ast.Call) -> tuple[str, str] | None:
    """(name, docstring) of `add_docstr(torch.abs, "...")` and `add_docstr_all("abs", "...")`."""
    function = call.func
    if not isinstance(function, ast.Name) or not function.id.lstrip("_").startswith("add_docstr"):
        return None
    if len(call.args) < 2:
        return None
    target, text = call.args[:2]
    # The text may be followed by .format(...) of the shared argument descriptions.
    if (
        isinstance(text, ast.Call)
        and isinstance(text.func, ast.Attribute)
        and text.func.attr == "format"
    ):
        text = text.func.value
    if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
        return None
    name = str(target.value) if isinstance(target, ast.Constant) else ast.unparse(target)
    return name, re.sub(r"\{\w+\}", "", text.value).replace("{{", "{").replace("}}", "}")


_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*\)?(\s*->.*)?$|->|^\.\. |^[:>@]|^[\w.]+\(")
_SECTION = re.compile(
    r"^(args|arguments|parameters|params|returns?|yields?|raises|examples?|usage|notes?|see also|"
    r"references|attributes|keyword arguments|shape)\s*:*$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[A-Z`:*])")


def part_docstring(docstring: str) -> tuple[str, str] | None:
    """(summary, rest) of a docstring on one line each, or None where either says too little to be
    ranked.

    The summary is the first sentence of the first paragraph that is not a signature (`abs(input) ->
    Tensor`) or a directive.
    """
    paragraphs = [
        paragraph for paragraph in re.split(r"\n\s*\n", docstring.strip()) if paragraph.strip()
    ]
    # A signature alone on the first line is dropped; one that is all there is makes no summary.
    if paragraphs and _SIGNATURE.search(paragraphs[0].strip()):
        paragraphs = paragraphs[1:]
    if not paragraphs:
        return None
    first = " ".join(paragraphs[0].split())
    if _SIGNATURE.search(first) or _SECTION.match(paragraphs[0].strip().splitlines()[0]):
        return None
    sentences = _SENTENCE_END.split(first, maxsplit=1)
    summary, rest = sentences[0], " ".join([*sentences[1:], *paragraphs[1:]])
    words, document = summary.split(), rest.split()
    if (
        not _MIN_SUMMARY_WORDS <= len(words) <= _MAX_SUMMARY_WORDS
        or len(document) < _MIN_DOCUMENT_WORDS
    ):
        return None
    if summary.endswith(":") or ">>>" in summary:
        return None  # it introduces what follows, or is code
    if summary.lower() in " ".join(document).lower():
        return None  # the answer would quote the question
    return summary, " ".join(document)


def _lists(
    names: list[DocumentedName],
    *,
    num_negatives: int,
    num_random: int,
    max_lists: int | None,
    seed: int,
) -> Dataset:
    import bm25s
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf

    documents = [name.document for name in names]
    draw = np.random.default_rng(seed)
    # Shuffled, so that the first lists of a split are a sample of all its modules.
    chosen = draw.permutation(len(names))[:max_lists]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets its own logger to DEBUG
    retriever = bm25s.BM25()
    retriever.index(
        bm25s.tokenize(documents, stopwords="en", show_progress=False), show_progress=False
    )
    queries = bm25s.tokenize(
        [names[i].summary for i in chosen], stopwords="en", show_progress=False
    )
    # One more than the negatives: the right document is usually among them.
    found, _ = retriever.retrieve(
        queries, k=min(num_negatives + 1, len(names)), show_progress=False
    )
    rows: dict[str, list] = {"query": [], "docs": [], "labels": []}
    for right, ranking in zip(chosen.tolist(), found.tolist(), strict=True):
        # BM25's order; a right document that is not in its list stands last.
        order = ranking if right in ranking else [*ranking[:num_negatives], right]
        drawn = draw.choice(len(names), min(len(order) + num_random, len(names)), replace=False)
        order = [*order, *[i for i in drawn.tolist() if i not in order][:num_random]]
        rows["query"].append(names[right].summary)
        rows["docs"].append([documents[i] for i in order])
        rows["labels"].append([float(i == right) for i in order])
    features = Features(
        {
            "query": Value("string"),
            "docs": ListOf(Value("string")),
            "labels": ListOf(Value("float32")),
        }
    )
    return Dataset.from_dict(rows, features=features)
