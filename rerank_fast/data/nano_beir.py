"""NanoBEIR from the hub or from a local directory: corpus, queries, judgements and a BM25 ranking
of each set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rerank_fast.data.hub import load_hub_dataset, read_columns
from rerank_fast.model.texts import check_text

DATASETS = {
    "climatefever": "ClimateFEVER",
    "dbpedia": "DBPedia",
    "fever": "FEVER",
    "fiqa2018": "FiQA2018",
    "hotpotqa": "HotpotQA",
    "msmarco": "MSMARCO",
    "nfcorpus": "NFCorpus",
    "nq": "NQ",
    "quoraretrieval": "QuoraRetrieval",
    "scidocs": "SCIDOCS",
    "arguana": "ArguAna",
    "scifact": "SciFact",
    "touche2020": "Touche2020",
}
_COLUMNS = {
    "corpus": ("_id", "text"),
    "queries": ("_id", "text"),
    "qrels": ("query-id", "corpus-id"),
    "bm25": ("query-id", "corpus-ids"),
}


@dataclass(frozen=True)
class NanoQuery:
    """One query: its text, its relevant documents and its BM25 ranking, as {document id: text}."""

    query_id: str
    query: str
    positive: Mapping[str, str]
    documents: Mapping[str, str]


def split_name(dataset_name: str) -> str:
    """msmarco -> NanoMSMARCO, in any letter case.

    Raises:
        ValueError: no such set; lists those that there are.
    """
    name = DATASETS.get(dataset_name.lower())
    if name is None:
        raise ValueError(f"{dataset_name!r} is no NanoBEIR set; there are {', '.join(DATASETS)}")
    return f"Nano{name}"


def load_nano_beir(dataset_name: str, dataset_id: str, *, rerank_k: int) -> list[NanoQuery]:
    """The queries of one NanoBEIR set with the first rerank_k documents of their BM25 ranking.

    Args:
        dataset_name: short name of the set.
        dataset_id: of a hub dataset with the subsets corpus (_id, text), queries (_id, text), qrels
            (query-id, corpus-id) and bm25 (query-id, corpus-ids), each with a split NanoX for each
            set; or a local directory with those as files: SUBSET/NanoX.parquet,
            SUBSET/NanoX-*.parquet (what downloading the hub dataset gives) or SUBSET/NanoX.jsonl.

    Raises:
        ValueError: the set or a file of it is missing, lacks a column or names a document that is
            not there.
    """
    split = split_name(dataset_name)
    columns = {
        subset: _read(dataset_id, subset, split, names) for subset, names in _COLUMNS.items()
    }
    texts = {
        subset: dict(_pairs(columns[subset], "_id", "text")) for subset in ("corpus", "queries")
    }
    relevant: dict[str, dict[str, None]] = {}
    for query_id, ids in _pairs(columns["qrels"], "query-id", "corpus-id"):
        relevant.setdefault(query_id, {}).update(
            dict.fromkeys(ids if isinstance(ids, list) else [ids])
        )
    where = f"{dataset_id}, {split}"
    queries = []
    for query_id, ranking in _pairs(columns["bm25"], "query-id", "corpus-ids"):
        if query_id not in relevant or query_id not in texts["queries"]:
            missing = "queries" if query_id not in texts["queries"] else "qrels"
            raise ValueError(
                f"{where}: bm25 ranks for the query {query_id!r}, which {missing} does not have"
            )
        place = f"{where}, query {query_id!r}"
        queries.append(
            NanoQuery(
                query_id,
                check_text(texts["queries"][query_id], place),
                _texts(relevant[query_id], texts["corpus"], f"{place} in qrels"),
                _texts(ranking[:rerank_k], texts["corpus"], f"{place} in bm25"),
            )
        )
    if not queries:
        raise ValueError(f"{where}: bm25 holds no query")
    return queries


def _texts(ids: Iterable[str], corpus: Mapping[str, str], place: str) -> dict[str, str]:
    try:
        return {key: check_text(corpus[key], f"{place}, document {key!r}") for key in ids}
    except KeyError as error:
        raise ValueError(f"{place}: the corpus has no document {error}") from error


def _pairs(
    columns: Mapping[str, Sequence[Any]], first: str, second: str
) -> Iterable[tuple[Any, Any]]:
    return zip(columns[first], columns[second], strict=True)


def _read(dataset_id: str, subset: str, split: str, names: Sequence[str]) -> dict[str, list[Any]]:
    directory = Path(dataset_id)
    if not directory.is_dir():
        dataset = load_hub_dataset(dataset_id, subset, split, layout=f"{subset}/{split}.parquet")
        return read_columns(
            dataset.with_format("arrow")[:], names, f"{dataset_id}, {subset}, {split}"
        )
    files = [
        *directory.glob(f"{subset}/{split}.parquet"),
        *sorted(directory.glob(f"{subset}/{split}-*.parquet")),
    ]
    files = files or list(directory.glob(f"{subset}/{split}.jsonl"))
    if not files:
        there = sorted({file.stem.split("-")[0] for file in directory.glob(f"{subset}/Nano*")})
        raise ValueError(
            f"{directory} has no {subset}/{split}.parquet, {subset}/{split}-*.parquet or "
            f"{subset}/{split}.jsonl; in {subset}/ there are {there or 'no sets'}"
        )
    return read_columns(files, names, f"{directory}, {subset}, {split}")
