"""predict() beside sentence-transformers: the same weights, the same texts, MiniLM-L6.

Pairs have MS MARCO-like lengths; RERANK_FAST_BENCH_PAIRS sets their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from torch import nn

from benchmarks.steps.engines import BATCH, Pairs
from benchmarks.workload import marco_like_lists
from rerank_fast import CrossEncoder
from rerank_fast.demo import encoder_directory
from rerank_fast.model.precision.hardware import is_fast

NUM_PAIRS = int(os.environ.get("RERANK_FAST_BENCH_PAIRS", "200"))
HAS_BF16 = is_fast(torch.bfloat16, torch.device("cpu"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MiniLM with one fixed head for all; a random one of the usual size gives all but equal
    scores.
    """
    path = tmp_path_factory.mktemp("model")
    model = CrossEncoder(encoder_directory(), max_length=256, activation_fn=nn.Identity())
    torch.manual_seed(0)
    model.model.classifier.weight.data.normal_(0, 0.2)
    model.save_pretrained(path)
    return str(path)


def make_pairs(number: int = NUM_PAIRS) -> Pairs:
    lists = marco_like_lists(number // 3 + 1, seed=1)
    return [(row["query"], document) for row in lists for document in row["docs"]][:number]


def pairs_of_equal_length(words: int) -> Pairs:
    """No padding to save."""
    pairs = make_pairs()
    return [(query, " ".join((document.split() * words)[:words])) for query, document in pairs]


def describe(model: CrossEncoder, pairs: Pairs) -> str:
    lengths = model.tokenize(pairs).lengths
    return f"{len(pairs)} pairs of {lengths.min()}-{lengths.mean():.0f}-{lengths.max()} tokens"


def our_predict(directory: str, dtype: str, pairs: Pairs) -> Callable[[], np.ndarray]:
    model = CrossEncoder(directory, device="cpu", dtype=dtype)
    return lambda: model.predict(pairs)


def peer_predict(directory: str, dtype: str, pairs: Pairs) -> Callable[[], np.ndarray]:
    model = PeerCrossEncoder(directory, device="cpu", model_kwargs={"dtype": dtype})
    return lambda: model.predict(pairs, batch_size=BATCH)


def compare_predict(
    interleaved: Callable, note: Callable, name: str, directory: str, pairs: Pairs, *, rounds: int
) -> None:
    """A family in fp32 on both sides, and in bf16 where the processor has it, once both score a
    tenth of the pairs alike.
    """
    model, few = CrossEncoder(directory, device="cpu"), pairs[::10]
    expected = peer_predict(directory, "float32", few)()
    np.testing.assert_allclose(model.predict(few), expected, rtol=1e-4, atol=1e-4)
    dtypes = {"fp32": "float32"} | ({"bf16": "bfloat16"} if HAS_BF16 else {})
    calls = {}
    for short, dtype in dtypes.items():
        calls[short] = our_predict(directory, dtype, pairs)
        calls[f"peer {short}"] = peer_predict(directory, dtype, pairs)
    medians = interleaved(calls, rounds=rounds)
    for short in dtypes:
        case = f"predict {name} {short}, {describe(model, pairs)}"
        note(case, medians[short], medians[f"peer {short}"])


def test_predict(interleaved, note, directory: str) -> None:
    """fp32 on both sides, int8, and where the processor has it bf16, which is what auto takes."""
    pairs, few = make_pairs(), make_pairs()[:50]
    calls = {
        "fp32": our_predict(directory, "float32", pairs),
        "int8": our_predict(directory, "int8", pairs),
        "peer fp32": peer_predict(directory, "float32", pairs),
    }
    if HAS_BF16:
        calls["auto"] = our_predict(directory, "auto", pairs)
        calls["peer bf16"] = peer_predict(directory, "bfloat16", pairs)
    expected = peer_predict(directory, "float32", few)()
    got = our_predict(directory, "float32", few)()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    medians = interleaved(calls, rounds=3)
    texts = describe(CrossEncoder(directory, device="cpu"), pairs)
    for peer in ("peer fp32", "peer bf16"):
        for ours in ("fp32", "auto"):
            if {ours, peer} <= medians.keys() and (ours, peer) != ("fp32", "peer bf16"):
                note(f"predict {ours}, {peer}, {texts}", medians[ours], medians[peer])
    note(f"predict int8, peer its own fp32, {texts}", medians["int8"], medians["fp32"])


@pytest.mark.slow
@pytest.mark.parametrize("words", [19, 189], ids=["30 tokens", "200 tokens"])
def test_other_lengths(compare, directory: str, words: int) -> None:
    pairs = pairs_of_equal_length(words)
    case = f"predict fp32, {describe(CrossEncoder(directory, device='cpu'), pairs)}"
    ours = our_predict(directory, "float32", pairs)
    compare(case, ours, peer_predict(directory, "float32", pairs), rounds=3)
