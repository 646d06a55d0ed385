"""What the check runs: the GPU model's own workloads with values on the device, and the same texts
for sentence-transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from benchmarks.tools import gpu_workloads
from benchmarks.tools.gpu_workloads import Observed, Observer, Scoring, Training
from rerank_fast.data.tokenized import TokenizedLists
from rerank_fast.model.tokens.packing import TokenizedPairs

Run = Callable[[Observer], None]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_QUERY_WORDS, _MOST_WORDS = 7, 30000
_SMALL = 8  # the size of a dry run's heads: of one number a norm has no gradient


def _config_of(shape: str, *, small: bool) -> PretrainedConfig:
    return gpu_workloads.config_of(shape, head_size=_SMALL if small else 0)


def reranker_on(
    device: torch.device, shape: str, dtype: torch.dtype = torch.float32, *, small: bool = False
) -> Observed:
    """Of a shape, with random weights on a device."""
    reranker = gpu_workloads.reranker_of(shape, head_size=_SMALL)
    torch.manual_seed(0)
    with torch.device(device):
        config = _config_of(shape, small=small)
        reranker.model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    return reranker.eval()


def training_lists(shape: str, *, small: bool = False) -> TokenizedLists:
    vocabulary = _config_of(shape, small=small).vocab_size
    return gpu_workloads.training_lists(vocabulary, small=small)


def inference_pairs(shape: str, *, small: bool = False) -> TokenizedPairs:
    vocabulary = _config_of(shape, small=small).vocab_size
    if small:
        return gpu_workloads.pairs_of(np.array([3, 9, 5, 12]), vocabulary)
    return gpu_workloads.inference_pairs(vocabulary)


def our_runs(device: torch.device, shape: str, *, small: bool = False) -> dict[str, Run]:
    """What the GPU model counts, by the beginning of the names that it gives."""
    lists, pairs = training_lists(shape, small=small), inference_pairs(shape, small=small)
    return {
        "training, direct": Training(reranker_on(device, shape, small=small), lists, "off"),
        "training, cached": Training(reranker_on(device, shape, small=small), lists, "on"),
        "predict": Scoring(reranker_on(device, shape, torch.bfloat16, small=small), pairs),
        "evaluation in a run": Scoring(reranker_on(device, shape, small=small), pairs),
    }


@contextlib.contextmanager
def saved_model(shape: str, *, small: bool = False) -> Iterator[Path]:
    """A directory that both packages open: random weights, and a tokenizer with a token a word."""
    config = _config_of(shape, small=small)
    count = min(config.vocab_size, _MOST_WORDS)
    words = {word: number for number, word in enumerate(_SPECIAL)}
    words |= {f"w{number}": number for number in range(len(_SPECIAL), count)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), _SPECIAL, strict=True))
    inputs = ["input_ids", "attention_mask"]
    if hasattr(config, "type_vocab_size"):
        inputs.append("token_type_ids")
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            model_max_length=config.max_position_embeddings,
            model_input_names=inputs,
            **names,
        ).save_pretrained(name)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(name)
        yield Path(name)


def texts_of(tokens: TokenizedPairs) -> list[tuple[str, str]]:
    """Pairs of as many words as make that many tokens with the special ones, one word at least."""
    texts = []
    for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        ids = np.maximum(tokens.input_ids[start:end] % _MOST_WORDS, len(_SPECIAL))
        words = [f"w{number}" for number in ids]
        cut = max(min(_QUERY_WORDS, len(words) - 4), 1)
        texts.append((" ".join(words[:cut]), " ".join(words[cut : max(len(words) - 3, cut + 1)])))
    return texts


def rows_of(lists: TokenizedLists) -> list[dict[str, Any]]:
    """Lists of texts, {"query", "docs", "labels"}; a list has the query of its first pair."""
    texts, rows = texts_of(lists.pairs), []
    for start, end in zip(lists.list_offsets[:-1], lists.list_offsets[1:], strict=True):
        docs = [document for _, document in texts[start:end]]
        rows.append(
            {
                "query": texts[start][0],
                "docs": docs,
                "labels": lists.labels[start:end].astype(int).tolist(),
            }
        )
    return rows
