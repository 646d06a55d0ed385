"""Texts to tokens beside transformers and sentence-transformers, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from tokenizers import pre_tokenizers
from transformers import (
    BertTokenizerLegacy,
    ByT5Tokenizer,
    DebertaV2Tokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from rerank_fast import CrossEncoder
from rerank_fast.model.tokens import tokenization
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.model.tokens.templates import QWEN3_RERANKER_TEMPLATE
from rerank_fast.model.tokens.tokenization import PairTokenizer
from tests.model_factory import make_tiny_bert, make_tiny_qwen3, make_tokenizer

MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("r", "a"), ("ra", "in")]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _merged(*symbols: str) -> dict[str, int]:
    """Ids of the symbols and of what the merges make of them."""
    pieces = dict.fromkeys(chain(symbols, (a + b for a, b in MERGES)))
    return {piece: number for number, piece in enumerate(pieces)}


def _scored(*symbols: str) -> list[tuple[str, float]]:
    """Pieces of a unigram model."""
    return [
        (piece, -float(number % 7)) for number, piece in enumerate(_merged(*symbols, "▁", *LETTERS))
    ]


def _slow_bert(directory: Path) -> BertTokenizerLegacy:
    vocabulary = make_tokenizer().get_vocab()
    file = directory / "vocab.txt"
    file.write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    return BertTokenizerLegacy(str(file))


def _without_template(directory: Path) -> Any:
    tokenizer = make_tokenizer()
    state = tokenizer.backend_tokenizer.to_str()
    start, end = state.index('"post_processor":'), state.index('"decoder":')
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(
        f'{state[:start]}"post_processor":null,{state[end:]}'
    )
    return tokenizer


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
KINDS: dict[str, Callable[[Path], Any]] = {
    "bert": lambda _: make_tokenizer(),
    "roberta": lambda _: RobertaTokenizer(
        _merged("<pad>", "<unk>", "<s>", "</s>", "<mask>", *BYTES), MERGES
    ),
    "xlm-roberta": lambda _: XLMRobertaTokenizer(
        _scored("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    ),
    "deberta-v2": lambda _: DebertaV2Tokenizer(
        _scored("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    ),
    "llama": lambda _: LlamaTokenizer(_merged("<unk>", "<s>", "</s>", "▁", *LETTERS), MERGES),
    "qwen": lambda _: Qwen2Tokenizer(_merged("<|endoftext|>", *BYTES), MERGES),
    "no template": _without_template,
    "slow bert": _slow_bert,
    "slow byt5": lambda _: ByT5Tokenizer(),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """Two of one kind: one to use, one to compare with."""
    directory = tmp_path_factory.mktemp("tokenizers")
    return KINDS[request.param](directory), KINDS[request.param](directory)


TEXTS = st.lists(
    st.sampled_from(
        ["the", "rain", "in", "panda", " ", "\n", "É", "😀", "[SEP]", "</s>", "12.5", "eats,", "▁a"]
    ),
    max_size=24,
).map(" ".join)


def _assert_same(found: TokenizedPairs, expected: Any) -> None:
    assert (found.token_type_ids is None) is ("token_type_ids" not in expected)
    for values, name in ((found.input_ids, "input_ids"), (found.token_type_ids, "token_type_ids")):
        if values is not None:
            rows = [row.tolist() for row in np.split(values, found.offsets[1:-1])]
            # Two empty texts without special tokens: there is one to read a score from.
            assert all(rows)
            theirs = expected[name]
            assert [row if other else [] for row, other in zip(rows, theirs, strict=True)] == theirs


@settings(max_examples=60, deadline=None)
@given(
    queries=st.lists(TEXTS, min_size=1, max_size=3),
    documents=st.lists(TEXTS, min_size=1, max_size=3),
    max_length=st.integers(4, 40),
    side=st.sampled_from(["right", "left"]),
    prompt=st.sampled_from([None, "", "what is ", "query:"]),
    characters=st.sampled_from([1, 30, 1 << 20]),
)
def test_pairs_equal_transformers(
    tokenizers: tuple[Any, Any],
    queries: list[str],
    documents: list[str],
    max_length: int,
    side: str,
    prompt: str | None,
    characters: int,
):
    ours, theirs = tokenizers
    ours.truncation_side = theirs.truncation_side = side
    pairs = [(query, document) for query in queries for document in documents]
    prompted = [(prompt or "") + query for query, _ in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "CHARACTERS", characters)
        found, truncated = PairTokenizer(ours)(pairs, max_length, prompt)
    documents = documents * len(queries)
    sides = [theirs(side, add_special_tokens=False)["input_ids"] for side in (prompted, documents)]
    room = max_length - theirs.num_special_tokens_to_add(pair=True)
    _assert_same(
        found,
        theirs(prompted, documents, truncation="longest_first", max_length=max_length),
    )
    lengths = [[len(ids) for ids in side] for side in sides]
    assert truncated == sum(left + right > room for left, right in zip(*lengths, strict=True))


def test_every_length_of_both_texts_is_cut_as_transformers_cuts_it(tokenizers: tuple[Any, Any]):
    ours, theirs = tokenizers
    ours.truncation_side = theirs.truncation_side = "right"
    pairs = [("a " * query, "a " * document) for query in range(9) for document in range(9)]
    for max_length in range(4, 16):
        found, _ = PairTokenizer(ours)(pairs, max_length)
        queries, documents = zip(*pairs, strict=True)
        expected = theirs(
            list(queries), list(documents), truncation="longest_first", max_length=max_length
        )
        _assert_same(found, expected)


def test_special_tokens_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"max_length to be at least 3, .*, got 2"):
        PairTokenizer(make_tokenizer())([("rain", "sea")], 2)


def test_what_a_tokenizer_was_told_before_does_not_matter():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    found, truncated = PairTokenizer(tokenizer)([("rain", "the sea and the wind")], 64)
    assert (len(found.input_ids), truncated) == (9, 0)
    tokenizer.split_special_tokens = True
    texts = [("rain [SEP]", "the [MASK]")]
    found, _ = PairTokenizer(tokenizer)(texts, 64)
    _assert_same(found, tokenizer([texts[0][0]], [texts[0][1]]))


@pytest.mark.parametrize(("queries", "words"), [(1, (2_000, 20_000)), (8, (500, 2_000))])
def test_a_pair_of_long_texts_takes_the_time_of_its_texts(queries: int, words: tuple[int, int]):
    """Truncated by the tokenizer, the first takes 40 times as long and 2 GiB."""
    query, document = ("the rain in paris " * (count // 4) for count in words)
    tokenizer = make_tokenizer()
    started = time.process_time()
    tokenizer([query] * queries, add_special_tokens=False)
    tokenizer([document] * queries, add_special_tokens=False)
    texts = time.process_time() - started
    started = time.process_time()
    pairs = [(query + str(n), document + str(n)) for n in range(queries)]
    found, truncated = PairTokenizer(tokenizer)(pairs, 64)
    assert time.process_time() - started < 4 * texts + 0.1
    assert (found.lengths.tolist(), truncated) == ([64] * queries, queries)


def test_a_text_of_several_pairs_is_tokenised_once(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    calls = tokenization._calls

    def recorded(texts: Any) -> Any:
        seen.extend(texts)
        return calls(seen)

    monkeypatch.setattr(tokenization, "_calls", recorded)
    pairs = [("rain", "sea"), ("rain", "wind"), ("sun", "sea")]
    PairTokenizer(make_tokenizer())(pairs, 64, "what is ")
    assert sorted(seen) == ["sea", "what is rain", "what is sun", "wind"]


def test_threads_may_tokenise_with_one_model(tmp_path: Path):
    model = CrossEncoder(make_tiny_bert(tmp_path), device="cpu")
    pairs = [(f"rain {n}", "the sea and the wind " * (n % 40)) for n in range(64)]
    expected = model.tokenize(pairs)
    alone = CrossEncoder(tmp_path, device="cpu")  # its first calls come from all threads at once
    alone.tokenizer.backend_tokenizer.enable_truncation(6)
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(alone.tokenize, [pairs] * 32):
            assert np.array_equal(found.input_ids, expected.input_ids)
            assert np.array_equal(found.offsets, expected.offsets)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt", [None, "is it about a panda"])
def test_long_prompts_equal_sentence_transformers(tmp_path: Path, side: str, prompt: str | None):
    make_tiny_qwen3(tmp_path, chat_template=QWEN3_RERANKER_TEMPLATE)
    peer, model = (
        PeerCrossEncoder(str(tmp_path), device="cpu"),
        CrossEncoder(tmp_path, device="cpu"),
    )
    peer.tokenizer.truncation_side = model.tokenizer.truncation_side = side
    pairs = [
        ("rain", "the sea " * 300),
        ("the wind " * 200, "panda"),
        ("rain", ""),
        ("rain " * 199, "sun " * 150),
    ]
    found, truncated = model.tokenize_counting(pairs, prompt=prompt)
    features = peer.preprocess(pairs, prompt=prompt)
    expected = TokenizedPairs.from_padded(features)
    assert truncated == 3
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert np.array_equal(found.offsets, expected.offsets)
