"""predict() of other engines in int8, from the same weights: OpenVINO with nncf, ONNX Runtime.

Both are of the extra bench-int8; a benchmark is skipped where one is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from rerank_fast import CrossEncoder

BATCH = 32  # sentence-transformers' default
Pairs = list[tuple[str, str]]
Predict = Callable[[Pairs], np.ndarray]


def _batches(model: CrossEncoder, pairs: Pairs) -> list[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """As sentence-transformers batches: longest text first, padded to the longest pair of the
    batch.
    """
    order = np.argsort([-len(query) - len(document) for query, document in pairs], kind="stable")
    chunks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [(chunk, model.preprocess([pairs[n] for n in chunk])) for chunk in chunks]


def _scorer(model: CrossEncoder, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Callable:
    """predict() of another engine: tokenisation, padded batches, scores in the pairs' order."""

    def predict(pairs: Pairs) -> np.ndarray:
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


def _exported(model: CrossEncoder, directory: str, pairs: Pairs, scratch: Path) -> Path:
    """An ONNX file of the model in the directory, made once."""
    file = scratch / "model.onnx"
    if not file.is_file():
        _to_onnx(directory, _batches(model, pairs[:BATCH])[0][1], file)
    return file


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


def openvino_int8(model: CrossEncoder, directory: str, pairs: Pairs, scratch: Path) -> Callable:
    """nncf's post-training quantisation of a transformer, calibrated on the first 300 of the
    pairs.
    """
    openvino, nncf = pytest.importorskip("openvino"), pytest.importorskip("nncf")
    exported = openvino.convert_model(str(_exported(model, directory, pairs, scratch)))
    batches = _batches(model, pairs[:300])
    samples = [{name: inputs[name].numpy() for name in NAMES} for _, inputs in batches]
    quantized = nncf.quantize(
        exported, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER
    )
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(quantized, "CPU", options)
    return _scorer(model, lambda inputs: compiled({name: inputs[name] for name in NAMES})[0])


def onnx_runtime_int8(model: CrossEncoder, directory: str, pairs: Pairs, scratch: Path) -> Callable:
    """Dynamic quantisation, a scale for each output of the weights."""
    runtime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    exported = _exported(model, directory, pairs, scratch)
    files = str(exported), str(scratch / "int8.onnx")
    quantization.quantize_dynamic(
        *files, per_channel=True, weight_type=quantization.QuantType.QInt8
    )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(files[1], options, providers=["CPUExecutionProvider"])
    return _scorer(
        model, lambda inputs: session.run(None, {name: inputs[name] for name in NAMES})[0]
    )


INT8 = {"OpenVINO int8": openvino_int8, "ONNX Runtime int8": onnx_runtime_int8}
