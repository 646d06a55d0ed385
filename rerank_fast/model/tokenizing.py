"""Text to tokens, as a model reads it: its tokenizer, prompts and max_length."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.padded import padded
from rerank_fast.model.pretrained import PretrainedModel
from rerank_fast.model.texts import Pair, check_pairs, check_text
from rerank_fast.model.tokens.ahead import ahead
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.model.tokens.tokenization import CHUNK, PairTokenizer, PromptTokenizer, chunks


class TokenizingModel(PretrainedModel):
    """A pretrained model that makes tokens of pairs of texts."""

    def _prompt(self, prompt: str | None, name: str | None = None) -> str | None:
        """The one given, or that of the name, or the default one.

        Raises:
            ValueError: it is no string, or not valid Unicode; there is none of the name.
        """
        if prompt is None and (name := name or self.default_prompt_name) is not None:
            if name not in self.prompts:
                raise ValueError(
                    f"there is no prompt {name!r}: expected {', '.join(self.prompts) or 'none'}"
                )
            prompt = self.prompts[name]
        return None if prompt is None else check_text(prompt, "prompt")

    def tokenize(
        self, pairs: Iterable[Pair], *, show_progress_bar: bool = False, prompt: str | None = None
    ) -> TokenizedPairs:
        """Token ids of all pairs, without padding, truncated to max_length (the longer text first).

        That some were truncated is said once, and counted: see truncated_pairs. The prompt goes
        before each query; a language model takes it for the instruction.

        Raises:
            ValueError: an element is not a pair of strings; names its index.
        """
        tokens, truncated = self.tokenize_counting(
            pairs, show_progress_bar=show_progress_bar, prompt=prompt
        )
        self.warn_of_truncation(truncated, len(tokens))
        return tokens

    def tokenize_counting(
        self, pairs: Iterable[Pair], *, show_progress_bar: bool = False, prompt: str | None = None
    ) -> tuple[TokenizedPairs, int]:
        """Token ids of all pairs, without padding, and how many pairs were truncated, unwarned.

        Raises:
            ValueError: an element is not a pair of strings; names its index.
        """
        checked, prompt = check_pairs(pairs), self._prompt(prompt)
        parts, truncated = [], 0
        tokenize = self._pair_tokenizer()
        bar = tqdm(chunks(checked), desc="Tokenizing", disable=not show_progress_bar)
        for number, chunk in enumerate(bar):
            part, cut = self._tokenized(tokenize, chunk, prompt, number * CHUNK)
            parts.append(part)
            truncated += cut
        return TokenizedPairs.concatenate(parts), truncated

    def _tokenized(
        self,
        tokenize: PairTokenizer | PromptTokenizer,
        pairs: Sequence[Pair],
        prompt: str | None,
        first: int,
    ) -> tuple[TokenizedPairs, int]:
        """Token ids of pairs, of which the first has this number, and how many were truncated."""
        limit = self.max_length or sys.maxsize
        tokens, truncated = tokenize(pairs, limit, prompt)
        if len(empty := np.flatnonzero(tokens.lengths == 0)):
            raise ValueError(
                f"pair {first + empty[0]}: both texts are empty, and the tokenizer has no token "
                "that ends a text: expected at least one token to read a score from"
            )
        if prompt and isinstance(tokenize, PairTokenizer) and self._leaves_prompt_out():
            tokens = replace(tokens, prompt_length=tokenize.prompt_length(prompt, limit))
        rows = getattr(self.model.config, "vocab_size", None)
        number = int(tokens.input_ids.max(initial=0))
        if isinstance(rows, int) and number >= rows:  # on a GPU a look-up of it ends the process
            place = int(tokens.input_ids.argmax())
            pair = first + int(np.searchsorted(tokens.offsets, place, side="right")) - 1
            token = self.tokenizer.convert_ids_to_tokens(number)
            raise ValueError(
                f"pair {pair}: a text has the token {token!r} with the number {number}, and the "
                f"model has embeddings for {rows}"
            )
        self._truncation.count(truncated, limit)
        return tokens, truncated

    def _leaves_prompt_out(self) -> bool:
        """Whether pooling passes a prompt's tokens over."""
        head = self.model.head if isinstance(self.model, ModularReranker) else ()
        return any(getattr(one, "include_prompt", True) is False for one in head)

    def tokenization_key(self) -> tuple[Any, ...]:
        """What tokenize depends on beside the pairs: with equal keys it gives equal tokens.

        A fast tokenizer holds how it was last called: a key is taken after the call it stands for.
        """
        state: Any
        try:
            state = hashlib.sha256(pickle.dumps(self.tokenizer)).digest()
        except (
            Exception
        ):  # of as many kinds as there are parts of somebody's own: it equals no other
            state = object()
        return self.max_length, self._prompt(None), state

    def warn_of_truncation(self, truncated: int, total: int) -> None:
        """One warning of how many pairs were truncated, if any were and none was said yet."""
        self._truncation.warn(truncated, total, self.max_length or sys.maxsize)

    def preprocess(
        self, pairs: Sequence[Pair], prompt: str | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """One padded batch of the pairs, on the host; the prompt as tokenize has it."""
        tokens = self.tokenize(pairs, prompt=prompt)
        return padded(tokens, np.arange(len(tokens)), self.model, self.tokenizer)

    def _tokenized_chunks(
        self, pairs: Sequence[Pair], prompt: str | None
    ) -> Iterator[TokenizedPairs]:
        truncated, tokenize = 0, self._pair_tokenizer()
        parts = (
            self._tokenized(tokenize, chunk, prompt, number * CHUNK)
            for number, chunk in enumerate(chunks(pairs))
        )
        if len(pairs) > CHUNK:  # for one part a thread would only cost
            parts = ahead(parts)
        for tokens, cut in parts:
            truncated += cut
            yield tokens
        self.warn_of_truncation(truncated, len(pairs))
