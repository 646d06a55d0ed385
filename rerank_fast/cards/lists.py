"""What a model card shows of ranking lists: sizes, statistics of the columns, three samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset

from rerank_fast.data.fingerprint import fingerprint
from rerank_fast.data.lists import ListStream
from rerank_fast.model.card import html_code, markdown_table

_FIRST = 1000  # lists that the statistics are of
_SAMPLES = 3
_TEXT = 200  # characters of a text in a sample
_DOCS = 4  # documents of a sample


@dataclass(frozen=True)
class Described:
    """Lists as a card shows them; made before the run, so that it need not keep the texts."""

    size: int | None  # None where the lists are a stream
    counted: int  # lists that the statistics are of
    statistics: list[tuple[str, str, str]]  # column, type, what it holds; all Markdown
    samples: list[Mapping[str, Any]]  # query, docs, labels
    fingerprint: str  # of all of them; of a stream, of those counted

    def to_markdown(self, what: str) -> str:
        size = "a stream" if self.size is None else f"{self.size:,} {what} lists"
        scope = "all of them" if self.counted == self.size else f"the first {self.counted:,}"
        lines = [
            f"* Size: {size}",
            "* Columns: `query`, `docs` and `labels`",
            f"* Statistics of {scope}:",
            "",
            markdown_table(("Column", "Type", "Holds"), self.statistics, align=":---"),
            "",
            "* Samples:",
            "",
            self._samples(),
        ]
        return "\n".join(lines)

    def _samples(self) -> str:
        """An HTML table on a line each: in HTML no text is Markdown, and escaped it is no HTML
        either.
        """
        rows = []
        for sample in self.samples:
            shown = zip(sample["labels"][:_DOCS], sample["docs"][:_DOCS], strict=True)
            docs = [f"<strong>{label:g}</strong> {html_code(doc, _TEXT)}" for label, doc in shown]
            more = len(sample["docs"]) - _DOCS
            if more > 0:
                docs.append(f"and {more} more")
            rows.append(
                f"<tr><td>{html_code(sample['query'], _TEXT)}</td><td>{'<br>'.join(docs)}</td></tr>"
            )
        head = "<tr><th>query</th><th>docs, each after its label</th></tr>"
        return "\n".join(["<table>", head, *rows, "</table>"])


def describe_lists(rows: Dataset | ListStream | Sequence[Mapping[str, Any]]) -> Described:
    """Describe lists with the columns query, docs and labels: of a stream, what its first 1,000
    hold.
    """
    size = None if isinstance(rows, ListStream) else len(rows)
    first = list(islice(iter(rows), _FIRST))
    queries = [len(row["query"]) for row in first]
    docs = [len(doc) for row in first for doc in row["docs"]]
    counts = [len(row["docs"]) for row in first]
    labels = Counter(float(label) for row in first for label in row["labels"])
    statistics = [
        ("query", "string", _spread(queries, "characters")),
        (
            "docs",
            "list of strings",
            f"{_spread(counts, 'documents')}<br>{_spread(docs, 'characters each')}",
        ),
        ("labels", "list of floats", _shares(labels)),
    ]
    samples = [_short(row) for row in first[:_SAMPLES]]
    return Described(
        size, len(first), statistics, samples, fingerprint(first if size is None else rows)
    )


def _spread(values: Sequence[int], unit: str) -> str:
    if not values:
        return "nothing"
    return f"min {min(values):,}, mean {np.mean(values):,.1f}, max {max(values):,} {unit}"


def _shares(labels: Counter[float]) -> str:
    total = max(sum(labels.values()), 1)
    if len(labels) > 6:
        mean = sum(label * count for label, count in labels.items()) / total
        return f"min {min(labels):g}, mean {mean:.4g}, max {max(labels):g}"
    return ", ".join(f"{label:g}: {count / total:.1%}" for label, count in sorted(labels.items()))


def _short(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A sample without what its table would cut anyway; how many documents there are is kept."""
    docs = [doc[: 4 * _TEXT] if i < _DOCS else "" for i, doc in enumerate(row["docs"])]
    return {
        "query": row["query"][: 4 * _TEXT],
        "docs": docs,
        "labels": [float(label) for label in row["labels"]],
    }
