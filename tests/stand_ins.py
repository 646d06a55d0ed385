"""Small local copies in exactly the schemas and file names of the hub's data sets."""

from __future__ import annotations

import random
from pathlib import Path

from datasets import Dataset, Features, List, Value

_WORDS = ["weather", "sea", "rain", "wind", "sun", "panda", "bear", "fish"]
_WORDS += ["bamboo", "paris", "france", "capital", "city", "museum", "berlin", "people"]
_MS_MARCO = Features(
    {
        "answers": List(Value("string")),
        "passages": {
            "is_selected": List(Value("int32")),
            "passage_text": List(Value("string")),
            "url": List(Value("string")),
        },
        "query": Value("string"),
        "query_id": Value("int32"),
        "query_type": Value("string"),
        "wellFormedAnswers": List(Value("string")),
    }
)


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randrange(4, 14)))


def make_nano_beir(
    directory: Path, *, sets: tuple[str, ...] = ("MSMARCO", "NFCorpus", "NQ"), seed: int = 0
) -> Path:
    """Subsets corpus, queries, qrels and bm25 of each set; BM25 misses some relevant documents, for
    one query all.

    The README is the hub's way to name subsets and splits: `load_dataset` reads the directory as it
    would the hub.
    """
    draw = random.Random(seed)
    for name in sets:
        texts = list(dict.fromkeys(_text(draw) for _ in range(60)))
        corpus = [{"_id": f"doc{i}", "text": text} for i, text in enumerate(texts)]
        queries = [
            {"_id": f"q{i}", "text": f"what is the {_text(draw)}"}
            for i in range(draw.randrange(8, 12))
        ]
        qrels, bm25 = [], []
        for i, query in enumerate(queries):
            ids = [row["_id"] for row in corpus]
            draw.shuffle(ids)
            ranking, rest = ids[:25], ids[25:]
            relevant = draw.sample(ranking, draw.randrange(1, 4)) if i else []
            relevant += draw.sample(rest, draw.randrange(2) if i else 2)
            qrels += [{"query-id": query["_id"], "corpus-id": key} for key in relevant]
            bm25.append({"query-id": query["_id"], "corpus-ids": ranking})
        for subset, rows in {
            "corpus": corpus,
            "queries": queries,
            "qrels": qrels,
            "bm25": bm25,
        }.items():
            (directory / subset).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows).to_parquet(
                directory / subset / f"Nano{name}-00000-of-00001.parquet"
            )
    card = ["---", "configs:"]
    for subset in ("corpus", "queries", "qrels", "bm25"):
        card += [f"- config_name: {subset}", "  data_files:"]
        for name in sets:
            card += [f"  - split: Nano{name}", f"    path: {subset}/Nano{name}-*"]
    (directory / "README.md").write_text("\n".join([*card, "---", ""]))
    return directory


def make_ms_marco(directory: Path, *, count: int = 40, seed: int = 0) -> Path:
    """v1.1's training split; every fifth query has no selected passage."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        texts = [_text(draw) for _ in range(draw.randrange(3, 8))]
        selected = [0] * len(texts)
        if i % 5:
            chosen = draw.randrange(len(texts))
            selected[chosen], texts[chosen] = 1, f"panda {texts[chosen]}"
        rows.append(
            {
                "answers": ["panda"],
                "passages": {
                    "is_selected": selected,
                    "passage_text": texts,
                    "url": [f"http://example.org/{i}/{j}" for j in range(len(texts))],
                },
                "query": f"what is the panda {_text(draw)}",
                "query_id": i,
                "query_type": "description",
                "wellFormedAnswers": [],
            }
        )
    (directory / "v1.1").mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=_MS_MARCO).to_parquet(
        directory / "v1.1" / "train-00000-of-00001.parquet"
    )
    return directory
