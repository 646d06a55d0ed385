"""DeBERTa-v3-base in shape, with random weights, beside sentence-transformers.

12 layers of width 768, 12 heads, 256 position buckets. The vocabulary is MiniLM's, whose tokenizer
is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DebertaV2Config, DebertaV2ForSequenceClassification

from benchmarks.steps.test_predict import compare_predict, make_pairs
from benchmarks.steps.training import make_peer_step, make_step
from benchmarks.workload import marco_like_lists
from rerank_fast.demo import encoder_directory


def make_deberta(directory: Path, *, max_length: int = 256) -> str:
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory(), model_max_length=max_length)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=512,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    DebertaV2ForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.slow
def test_step(compare: Callable, tmp_path: Path) -> None:
    model, lists = make_deberta(tmp_path / "model"), marco_like_lists(6)
    ours = make_step(lists, str(tmp_path / "out"), model=model)
    peer = make_peer_step(lists, model=model)
    compare(f"step deberta-v3-base, {ours.describe}", ours.run, peer.run, rounds=2)


@pytest.mark.slow
def test_predict(interleaved: Callable, note: Callable, tmp_path: Path) -> None:
    directory = make_deberta(tmp_path / "model")
    compare_predict(interleaved, note, "deberta-v3-base", directory, make_pairs(100), rounds=2)
