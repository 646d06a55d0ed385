"""Raw scores of a cross-encoder in ONNX, to distil from."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset


class Teacher:
    """A cross-encoder in ONNX, a pair at a time: int8 scores depend on a batch's other pairs."""

    def __init__(self, directory: Path, max_length: int) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        for name in ("model.onnx", "tokenizer.json"):
            if not (directory / name).is_file():
                raise SystemExit(f"--teacher must be a directory with {name}, got {directory}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(directory / "model.onnx"), options)
        self.inputs = [one.name for one in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length, strategy="longest_first")

    def score(self, query: str, document: str) -> float:
        """The raw score of one pair."""
        encoded = self.tokenizer.encode(query, document)
        arrays = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        feed = {name: np.array([arrays[name]], dtype=np.int64) for name in self.inputs}
        return float(np.asarray(self.session.run(None, feed)[0]).reshape(-1)[0])


def teacher_scores(lists: Dataset, directory: Path, max_length: int, cache: Path) -> np.ndarray:
    """(N,) fp32 raw scores of all pairs, from the cache if the teacher scored the same ones."""
    pairs = [(row["query"], doc) for row in lists for doc in row["docs"]]
    digest = hashlib.sha256((directory / "model.onnx").read_bytes())
    digest.update(json.dumps([max_length, pairs]).encode())
    file = cache / f"teacher-{digest.hexdigest()[:16]}.npy"
    if file.is_file():
        return np.load(file, allow_pickle=False)
    teacher, started = Teacher(directory, max_length), time.perf_counter()
    scores = np.array([teacher.score(*pair) for pair in pairs], dtype=np.float32)
    print(f"teacher: {len(pairs)} pairs in {time.perf_counter() - started:.0f} s", flush=True)
    np.save(file, scores, allow_pickle=False)
    return scores
