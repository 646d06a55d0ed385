"""predict() beside sentence-transformers, OpenVINO and ONNX Runtime: the same weights, the same
texts, MiniLM-L6.

Pairs have MS MARCO-like lengths; RERANK_FAST_BENCH_PAIRS sets their number (1,000 is the published
setting). The int8 peers need the extra bench-int8 and are skipped, with the name of what is
missing, without it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from torch import nn
from transformers import AutoModelForSequenceClassification

from benchmarks.workload import encoder, marco_like_lists
from rerank_fast import CrossEncoder

NUM_PAIRS = int(os.environ.get("RERANK_FAST_BENCH_PAIRS", "1000"))
ROUNDS = int(os.environ.get("RERANK_FAST_BENCH_ROUNDS", "3"))
BATCH = 32  # sentence-transformers' default


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MiniLM with one fixed head for all; a random one of the usual size gives all but equal
    scores.
    """
    path = tmp_path_factory.mktemp("model")
    model = CrossEncoder(encoder(), max_length=256, activation_fn=nn.Identity())
    torch.manual_seed(0)
    model.model.classifier.weight.data.normal_(0, 0.2)
    model.save_pretrained(path)
    return str(path)


def make_pairs(number: int = NUM_PAIRS) -> list[tuple[str, str]]:
    lists = marco_like_lists(number // 3 + 1, seed=1)
    return [(row["query"], document) for row in lists for document in row["docs"]][:number]


def pairs_of_equal_length(words: int, number: int = NUM_PAIRS) -> list[tuple[str, str]]:
    """No padding to save."""
    pairs = make_pairs(number)
    return [(query, " ".join((document.split() * words)[:words])) for query, document in pairs]


def describe(model: CrossEncoder, pairs: list[tuple[str, str]]) -> str:
    lengths = model.tokenize(pairs).lengths
    return f"{len(pairs)} pairs of {lengths.min()}-{lengths.mean():.0f}-{lengths.max()} tokens"


TEXTS = {
    "marco": make_pairs,
    "30 tokens": lambda: pairs_of_equal_length(19),
    "200 tokens": lambda: pairs_of_equal_length(189, NUM_PAIRS // 3 + 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize(
    ("ours", "peers"), [("float32", "float32"), ("auto", "float32"), ("auto", "bfloat16")]
)
def test_predict(compare: Callable, directory: str, ours: str, peers: str, texts: str) -> None:
    pairs = TEXTS[texts]()
    model = CrossEncoder(directory, device="cpu", dtype=ours)
    peer = PeerCrossEncoder(directory, device="cpu", model_kwargs={"dtype": peers})
    if ours == peers:
        few = pairs[:50]
        np.testing.assert_allclose(model.predict(few), peer.predict(few), rtol=1e-4, atol=1e-4)
    compare(
        f"predict {ours} beside {peers}, {describe(model, pairs)}",
        lambda: model.predict(pairs),
        lambda: peer.predict(pairs, batch_size=BATCH),
        rounds=ROUNDS,
    )


def _batches(
    model: CrossEncoder, pairs: list[tuple[str, str]]
) -> list[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """As sentence-transformers batches: longest text first, padded to the longest pair of the
    batch.
    """
    order = np.argsort([-len(query) - len(document) for query, document in pairs], kind="stable")
    chunks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [(chunk, model.preprocess([pairs[n] for n in chunk])) for chunk in chunks]


def _scorer(model: CrossEncoder, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Callable:
    """predict() of another engine: tokenisation, padded batches, scores in the pairs' order."""

    def predict(pairs: list[tuple[str, str]]) -> np.ndarray:
        scores = np.empty(len(pairs), np.float32)
        for chunk, inputs in _batches(model, pairs):
            scores[chunk] = run({name: value.numpy() for name, value in inputs.items()}).reshape(-1)
        return scores

    return predict


class _Positional(nn.Module):
    """A model whose inputs have an order, for the exporters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
        }
        return self.model(**inputs).logits


NAMES = ("input_ids", "attention_mask", "token_type_ids")


def _to_onnx(directory: str, example: dict[str, torch.Tensor], file: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, attn_implementation="eager"
    ).eval()
    batch, length = (
        torch.export.Dim("batch", min=2, max=4096),
        torch.export.Dim("length", min=2, max=512),
    )
    torch.onnx.export(
        _Positional(model),
        tuple(example[name] for name in NAMES),
        str(file),
        input_names=list(NAMES),
        output_names=["logits"],
        dynamic_shapes=[{0: batch, 1: length}] * 3,
        dynamo=True,
        external_data=False,
    )


def openvino_int8(
    model: CrossEncoder, directory: str, pairs: list[tuple[str, str]], scratch: Path
) -> Callable:
    """nncf's post-training quantisation of a transformer, calibrated on the first 300 of the
    pairs.
    """
    openvino, nncf = pytest.importorskip("openvino"), pytest.importorskip("nncf")
    batches = _batches(model, pairs[:300])
    _to_onnx(directory, batches[0][1], scratch / "model.onnx")
    exported = openvino.convert_model(str(scratch / "model.onnx"))
    samples = [{name: inputs[name].numpy() for name in NAMES} for _, inputs in batches]
    quantized = nncf.quantize(
        exported, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER
    )
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(quantized, "CPU", options)
    return _scorer(model, lambda inputs: compiled({name: inputs[name] for name in NAMES})[0])


def onnx_runtime_int8(
    model: CrossEncoder, directory: str, pairs: list[tuple[str, str]], scratch: Path
) -> Callable:
    """Dynamic quantisation, a scale for each output of the weights."""
    runtime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    _to_onnx(directory, _batches(model, pairs[:BATCH])[0][1], scratch / "model.onnx")
    files = str(scratch / "model.onnx"), str(scratch / "int8.onnx")
    quantization.quantize_dynamic(
        *files, per_channel=True, weight_type=quantization.QuantType.QInt8
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(files[1], options, providers=["CPUExecutionProvider"])
    return _scorer(
        model, lambda inputs: session.run(None, {name: inputs[name] for name in NAMES})[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("make_peer", [openvino_int8, onnx_runtime_int8])
def test_int8(compare: Callable, directory: str, tmp_path: Path, make_peer: Callable) -> None:
    pairs = make_pairs()
    model = CrossEncoder(directory, device="cpu", dtype="int8")
    peer = make_peer(CrossEncoder(directory, device="cpu"), directory, pairs, tmp_path)
    exact = CrossEncoder(directory, device="cpu").predict(pairs[:100])
    errors = [
        float(np.abs(scores - exact).mean() / exact.std())
        for scores in (model.predict(pairs[:100]), peer(pairs[:100]))
    ]
    case = f"predict int8 beside {make_peer.__name__}, {describe(model, pairs)}"
    compare(case, lambda: model.predict(pairs), lambda: peer(pairs), rounds=ROUNDS)
    print(
        f"{case}: mean error of a score {errors[0]:.3f} and {errors[1]:.3f} of the scores' spread"
    )


def test_int8_beside_fp32(compare: Callable, directory: str) -> None:
    pairs = make_pairs(min(NUM_PAIRS, 200))
    exact, model = (
        CrossEncoder(directory, device="cpu", dtype=dtype) for dtype in ("float32", "int8")
    )
    case = f"predict int8 beside its own float32, {describe(model, pairs)}"
    compare(case, lambda: model.predict(pairs), lambda: exact.predict(pairs), rounds=ROUNDS)


def test_tokenisation_is_a_small_part(directory: str) -> None:
    """What a step of scoring waits for: printed, not asserted, since it depends on the tokenizer's
    threads.
    """
    pairs, model = (
        make_pairs(min(NUM_PAIRS, 200)),
        CrossEncoder(directory, device="cpu", dtype="auto"),
    )
    model.predict(pairs)
    started = time.perf_counter()
    model.tokenize(pairs)
    tokenised = time.perf_counter() - started
    model.predict(pairs)
    print(
        f"tokenisation {tokenised:.3f} s, predict {time.perf_counter() - started - tokenised:.3f} s"
    )
