"""What the model of a GPU runs: this package's steps and sentence-transformers' of the same texts.

At full size on meta tensors, which have no values; and small on the CPU, where an operation is
dispatched as it is on a GPU and its kernel has next to nothing to do.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from rerank_fast import CrossEncoder, TrainingConfig
from rerank_fast.data.tokenized import TokenizedLists
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.training.backward import Backward
from rerank_fast.training.clipping import clip_gradients
from rerank_fast.training.freezing import layer_depths
from rerank_fast.training.objective import choose_objective
from rerank_fast.training.optimizer import parameter_groups
from rerank_fast.training.run_log import Rates

_ONE_LABEL: dict[str, Any] = {"num_labels": 1, "pad_token_id": 0}
_MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "MiniLM-L6": (BertConfig, {**_MINILM, "num_hidden_layers": 6}),
    "MiniLM-L12": (BertConfig, {**_MINILM, "num_hidden_layers": 12}),
    "BERT-base": (BertConfig, {"num_attention_heads": 12}),
    "ModernBERT-base": (ModernBertConfig, {"num_attention_heads": 12}),
    "Qwen3-0.6B": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
}
SHAPES = tuple(_SHAPES)


def config_of(shape: str, *, head_size: int = 0, vocabulary: int = 64) -> PretrainedConfig:
    """Of a shape; with a head_size a small one: as many layers, each with one head of that size,
    and so many words, 0 for the shape's own.

    What the host does for a layer follows from no width; a product in bf16 of twelve columns takes
    a CPU six times as long as to dispatch it.
    """
    kind, settings = _SHAPES[shape]
    if head_size:
        widths = {"hidden_size": head_size, "intermediate_size": head_size}
        settings = {**settings, **widths, "num_attention_heads": 1}
        if vocabulary:
            settings["vocab_size"] = vocabulary
        if kind is Qwen3Config:
            settings |= {"num_key_value_heads": 1, "head_dim": head_size}
    if kind is ModernBertConfig:
        settings = {
            **settings,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        }
    return kind(**settings, **_ONE_LABEL)


class Observer(Protocol):
    """Is told where a phase begins."""

    def begin(self, phase: str) -> None: ...


class HostClock:
    """Processor time of this thread by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase, self._since = "", time.thread_time()

    def begin(self, phase: str) -> None:
        now = time.thread_time()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


class Observed(CrossEncoder):
    """A CrossEncoder that says when a step is made and when it is done."""

    observer: Observer | None = None

    def preparer(self, **options: Any) -> Any:
        make = super().preparer(**options)
        return make if self.observer is None else lambda tokens: self._made(make, tokens)

    def _made(self, make: Callable[..., Any], tokens: TokenizedPairs) -> Any:
        assert self.observer is not None
        self.observer.begin("make step")
        step = make(tokens)
        self.observer.begin("forward")
        return step


def pairs_of(lengths: np.ndarray, vocabulary: int) -> TokenizedPairs:
    """Random pairs of these lengths; tokens come back as often as words do."""
    generator = np.random.default_rng(0)
    tokens = 5 + (vocabulary - 5) * generator.random(lengths.sum()) ** 4
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedPairs(tokens.astype(np.int32), None, offsets)


def training_lists(vocabulary: int, *, small: bool = False) -> TokenizedLists:
    """16 lists with 104 pairs of 40 to 180 tokens; small: 4 with 7 of 2."""
    sizes = np.array([2, 2, 2, 1]) if small else np.tile([6, 7], 8)
    lengths = np.random.default_rng(0).integers(40, 181, sizes.sum())
    if small:
        lengths = np.full_like(lengths, 2)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    labels = np.zeros(sizes.sum(), np.float32)
    labels[offsets[:-1]] = 1
    return TokenizedLists(pairs_of(lengths, vocabulary), offsets, labels)


def inference_pairs(vocabulary: int) -> TokenizedPairs:
    """1,000 pairs of some 91 tokens, as MS MARCO's are distributed."""
    drawn = np.random.default_rng(1).lognormal(4.3, 0.45, 1000)
    return pairs_of(np.clip(drawn + 10, 20, 250).astype(int), vocabulary)


@functools.cache
def _directory() -> Any:
    """Of the smallest model that a CrossEncoder opens: its own parts then have a tokenizer."""
    directory = tempfile.TemporaryDirectory()
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "word": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory.name)
    tiny = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        **_ONE_LABEL,
    )
    BertForSequenceClassification(tiny).save_pretrained(directory.name)
    return directory


def model_of(
    shape: str, dtype: torch.dtype = torch.float32, *, head_size: int = 0, vocabulary: int = 64
) -> Any:
    """A Hugging Face model of the shape that has no values, or a small one on the CPU."""
    with torch.device("cpu" if head_size else "meta"):
        config = config_of(shape, head_size=head_size, vocabulary=vocabulary)
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def reranker_of(shape: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Observed:
    """Of model_of's model."""
    reranker = Observed(_directory().name, device="cpu")
    reranker.model = model_of(shape, dtype, **sizes)
    return reranker.eval()


@dataclass
class Training:
    """One optimizer step of a run in bf16, its weights in fp32."""

    reranker: Observed
    lists: TokenizedLists
    gradient_cache: Any
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        config = TrainingConfig(
            precision="bf16", gradient_cache=self.gradient_cache, cuda_graphs=self.cuda_graphs
        )
        # Kernels that are not launched leave gradients that may be 0: of no pair is that asked.
        config.skip_below = -1.0
        self.reranker.train()
        weights = dict(self.reranker.model.named_parameters())
        objective = choose_objective(config, None)
        self.units = objective.num_units(self.lists.labels, self.lists.list_offsets)
        self.backward = Backward(
            self.reranker, config, objective, self._scale, self._forget, max_tokens=65536
        )
        groups = parameter_groups(
            weights,
            layer_depths(self.reranker.model),
            learning_rate=2e-5,
            weight_decay=0.01,
            decay=1.0,
        )
        self.groups = [group["params"] for group in groups]
        self.moments = [
            [[torch.zeros_like(one) for one in group] for _ in range(2)] for group in self.groups
        ]
        device = self.reranker.device
        self.counts = [[torch.zeros((), device=device) for _ in group] for group in self.groups]

    def _scale(self, value: Tensor) -> Tensor:
        self.observer.begin("backward")
        return value

    def _forget(self) -> None:
        self.reranker.model.zero_grad(set_to_none=True)

    def __call__(self, observer: Observer) -> None:
        self.observer = self.reranker.observer = observer
        observer.begin("upload")
        self.backward([self.lists], self.units, Rates())
        observer.begin("clip, optimizer")
        self._move()
        observer.begin("")
        self._forget()

    @torch.no_grad()
    def _move(self) -> None:
        """clip_gradients, and AdamW(fused=True) as it is on CUDA; on meta tensors torch has
        none."""
        clip_gradients([weight for group in self.groups for weight in group], 1.0)
        for group, (first, second), counts in zip(
            self.groups, self.moments, self.counts, strict=True
        ):
            torch._foreach_add_(counts, 1)
            torch._fused_adamw_(
                group,
                [weight.grad for weight in group],
                first,
                second,
                [],
                counts,
                lr=2e-5,
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.01,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )


@dataclass
class Scoring:
    """Scores in bf16, left on the device: of a model of that dtype, or of one that is trained in
    fp32.

    The latter is an evaluation inside a run.
    """

    reranker: Observed
    tokens: TokenizedPairs
    batch_size: int | None = None

    def __call__(self, observer: Observer) -> None:
        observer.begin("scores")
        with self.reranker.computing_in(torch.bfloat16):
            self.reranker.score_tokens(self.tokens, batch_size=self.batch_size)
        observer.begin("")


class PeerStep:
    """Forward and backward as sentence-transformers does them: padded, some pairs a forward, under
    autocast.

    The sum of the scores stands for its loss, which reads values. Meta tensors know no autocast:
    what stands for it is told where a region ends.
    """

    def __init__(self, model: Any, tokens: TokenizedPairs, *, pairs_a_forward: int) -> None:
        self.model = model.train()
        self.tokens, self.pairs_a_forward = tokens, pairs_a_forward
        self.after_forward: Callable[[], object] = lambda: None

    def __call__(self, observer: Observer) -> None:
        observer.begin("forward")
        scores = []
        for start in range(0, len(self.tokens), self.pairs_a_forward):
            indices = np.arange(start, min(start + self.pairs_a_forward, len(self.tokens)))
            batch = self.tokens.pad(indices, pad_token_id=0)
            device = self.model.device
            features = {name: one.to(device) for name, one in batch.items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=device.type == "cpu"):
                scores.append(self.model(**features).logits.view(-1).float())
            self.after_forward()
        loss = torch.cat(scores).sum()
        observer.begin("backward")
        loss.backward()
        observer.begin("")
        self.model.zero_grad(set_to_none=True)


class PeerScoring:
    """predict as sentence-transformers does it: sorted by length, padded, some pairs a forward; of
    a model in bf16, its texts tokenised.
    """

    def __init__(self, model: Any, tokens: TokenizedPairs, *, batch_size: int) -> None:
        self.model = model.eval()
        self.tokens, self.batch_size = tokens, batch_size

    @torch.inference_mode()
    def __call__(self, observer: Observer) -> None:
        observer.begin("scores")
        order = np.argsort(-self.tokens.lengths)
        scores: list[Tensor] = []
        for start in range(0, len(order), self.batch_size):
            batch = self.tokens.pad(order[start : start + self.batch_size], pad_token_id=0)
            features = {name: one.to(self.model.device) for name, one in batch.items()}
            logits = self.model(**features).logits.float()
            scores.extend(torch.sigmoid(logits).squeeze(-1))
        torch.stack([scores[place] for place in np.argsort(order)])
        observer.begin("")
