"""Rerankers of modules beside sentence-transformers: Ettin-17m and 32m in shape and head, with
random weights.

ModernBERT, Pooling, Dense, LayerNorm, Dense. The vocabulary is MiniLM's, whose tokenizer is at
hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from torch import nn
from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

from benchmarks.steps.test_predict import compare_predict, make_pairs
from benchmarks.steps.training import make_peer_step, make_step
from benchmarks.workload import marco_like_lists
from rerank_fast.demo import encoder_directory

# Width, layers, heads, width of the feed-forward.
SHAPES = {"ettin-17m": (256, 7, 4, 384), "ettin-32m": (384, 10, 6, 576)}


def make_ettin(name: str, directory: Path, *, max_length: int = 256) -> str:
    width, layers, heads, intermediate = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory(), model_max_length=max_length)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    ModernBertModel(config).save_pretrained(directory / "encoder")
    tokenizer.save_pretrained(directory / "encoder")
    head = [
        Pooling(width, "cls"),
        Dense(width, width, activation_function=nn.GELU()),
        LayerNorm(width),
        Dense(width, 1, activation_function=nn.Identity(), module_output_name="scores"),
    ]
    transformer = Transformer(str(directory / "encoder"))
    peer = PeerCrossEncoder(modules=[transformer, *head], activation_fn=nn.Identity(), device="cpu")
    peer.save_pretrained(str(directory / "model"))
    return str(directory / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_step(compare: Callable, tmp_path: Path, name: str) -> None:
    model, lists = make_ettin(name, tmp_path), marco_like_lists(16)
    ours = make_step(lists, str(tmp_path / "out"), model=model)
    peer = make_peer_step(lists, model=model)
    compare(f"step {name}, {ours.describe}", ours.run, peer.run, rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_predict(interleaved: Callable, note: Callable, tmp_path: Path, name: str) -> None:
    directory = make_ettin(name, tmp_path)
    compare_predict(interleaved, note, name, directory, make_pairs(400), rounds=3)
