"""(query, document) pairs to token ids: a pair of texts for encoders, a filled-in prompt for causal rerankers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from rerank_fast.model.packing import TokenizedPairs

Pair = Sequence[str]
CHUNK = 1024  # pairs a tokenizer call: enough for its threads, little memory beside the result

# Qwen3-Reranker's published prompt, as a chat template with the roles that sentence-transformers gives a pair. Its
# instruction is a system message.
QWEN3_RERANKER_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first "
    "| default('Given a web search query, retrieve relevant passages that answer the query') }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    # Jinja drops a newline at the end of a template.
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>{{ '\\n\\n' }}"
)


def check_pairs(pairs: Sequence[Pair], first: int = 0) -> None:
    """ValueError, with its index, for the first element that is not a pair of strings."""
    for index, pair in enumerate(pairs, start=first):
        if isinstance(pair, str | Mapping) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise ValueError(f"pair {index}: expected (query, document), got {pair!r:.80}")
        for side, text in zip(("query", "document"), pair, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"pair {index}: expected the {side} to be a string, got {type(text).__name__}")


def chunks(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    """The pairs, CHUNK at a time."""
    return [pairs[start : start + CHUNK] for start in range(0, len(pairs), CHUNK)]


@dataclass(frozen=True)
class PairTokenizer:
    """Token ids of pairs, truncated to a number of tokens."""

    tokenizer: Any

    def __call__(
        self, pairs: Sequence[Pair], max_length: int, prompt: str | None = None
    ) -> tuple[TokenizedPairs, int]:
        """The pairs without padding, and how many of them were truncated, the longer text first.

        The prompt goes before each query.
        """
        queries = [(prompt or "") + pair[0] for pair in pairs]
        encoded = self.tokenizer(
            queries, [pair[1] for pair in pairs], truncation="longest_first", max_length=max_length
        )
        ids = encoded["input_ids"]
        full = [n for n, row in enumerate(ids) if len(row) == max_length]
        if full and encoded.encodings is not None:
            truncated = sum(bool(encoded.encodings[n].overflowing) for n in full)
        else:
            truncated = sum(self._length(queries[n], pairs[n][1]) > max_length for n in full)
        return _flat(ids, encoded.get("token_type_ids")), truncated

    def _length(self, query: str, document: str) -> int:
        return len(self.tokenizer(query, document, truncation=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class PromptTokenizer:
    """The same for a causal reranker: the tokenizer's chat template is filled with the roles query and document."""

    tokenizer: Any

    def __post_init__(self) -> None:
        if not _carries_pairs(self._render):
            if "<|im_start|>" not in self.tokenizer.get_vocab():
                raise ValueError(
                    "the tokenizer's chat template can't carry a pair: expected one that renders messages of the "
                    "roles query and document, and the one that Qwen3-Reranker has needs the token <|im_start|>"
                )
            self.tokenizer.chat_template = QWEN3_RERANKER_TEMPLATE
        # The score is read from the last token, which must be the prompt's own.
        self.tokenizer.padding_side = "left"

    def _render(self, pair: Pair, prompt: str | None = None) -> str:
        messages = [{"role": "query", "content": pair[0]}, {"role": "document", "content": pair[1]}]
        if prompt:
            messages.insert(0, {"role": "system", "content": prompt})
        if self._structured:
            messages = [
                {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}  # type: ignore[dict-item]
                for message in messages
            ]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    @property
    def _structured(self) -> bool:
        """Whether the template wants each content as a list of parts; read as sentence-transformers reads it."""
        template = str(self.tokenizer.chat_template)
        return any(part in template for part in ("content[0]", ".type", "'type'", '"type"', "message.content["))

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def __call__(
        self, pairs: Sequence[Pair], max_length: int, prompt: str | None = None
    ) -> tuple[TokenizedPairs, int]:
        """The filled-in prompts, and how many of them were truncated: the end of the pair goes, the prompt's stays.

        The prompt, or instruction, is a system message.
        """
        ids = self._tokenize([self._render(pair, prompt) for pair in pairs])
        truncated = [n for n, row in enumerate(ids) if len(row) > max_length]
        if truncated:
            ending = self._ending(prompt)[-max_length:]
            for n in truncated:
                ids[n] = ids[n][: max_length - len(ending)] + ending
        return _flat(ids, None), len(truncated)

    def _ending(self, prompt: str | None) -> list[int]:
        """The tokens that follow every document."""
        one, other = self._tokenize(
            [self._render(("0", "0"), prompt), self._render(("1 2 3 4", "1 2 3 4"), prompt)]
        )
        same = 0
        while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
            same += 1
        return one[len(one) - same :]


def _carries_pairs(render: Any) -> bool:
    """Whether both texts reach the prompt."""
    try:
        base, query, document = (render(pair) for pair in (("a1", "b2"), ("c3", "b2"), ("a1", "d4")))
    except Exception:  # no template, or one that refuses the roles
        return False
    return base not in (query, document)


def _flat(ids: list[list[int]], types: list[list[int]] | None) -> TokenizedPairs:
    lengths = [len(row) for row in ids]
    total = sum(lengths)
    return TokenizedPairs(
        np.fromiter(chain.from_iterable(ids), np.int32, total),
        None if types is None else np.fromiter(chain.from_iterable(types), np.int8, total),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
