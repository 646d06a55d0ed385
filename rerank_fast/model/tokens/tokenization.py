"""(query, document) pairs to token ids: two texts for encoders, a filled-in prompt for decoders.

Texts are tokenised whole, cut here, and then joined. A tokenizer that truncates a pair itself also
makes all that it cuts off: each piece of one text with each of the other's. Its truncation is a
setting that threads share, too; here it is only ever off, so that any number of threads may
tokenise with one tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any

import numpy as np
from tokenizers import Encoding

from rerank_fast.model.texts import Pair
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.model.tokens.templates import MONO_T5_TEMPLATE, QWEN3_RERANKER_TEMPLATE

CHUNK = 1024  # pairs tokenised together: enough for a tokenizer's threads, little memory for ids
CHARACTERS = 1 << 20  # of a tokenizer call's texts; until these are cut, each takes 100 bytes
_QUERY, _DOCUMENT = 2**32 - 1, 2**32 - 2  # ids that no vocabulary has


def chunks(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    """The pairs, CHUNK at a time."""
    return [pairs[start : start + CHUNK] for start in range(0, len(pairs), CHUNK)]


def _calls(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, in order, about CHARACTERS at a time."""
    call: list[str] = []
    size = 0
    for text in texts:
        if call and size + len(text) > CHARACTERS:
            yield call
            call, size = [], 0
        call.append(text)
        size += len(text)
    if call:
        yield call


def _tokens(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """All ids of each text, without special tokens."""
    for call in _calls(texts):
        if not tokenizer.is_fast:
            yield from tokenizer(call, add_special_tokens=False, verbose=False)["input_ids"]
            continue
        # As transformers calls it, but without offsets, which nothing here reads.
        backend = tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != tokenizer.split_special_tokens:
            backend.encode_special_tokens = tokenizer.split_special_tokens
        for encoding in backend.encode_batch_fast(call, add_special_tokens=False):
            yield encoding.ids


def _cut(ids: list[int], length: int, side: str) -> list[int]:
    """At most this many ids; what is beyond goes from the side."""
    return ids[:length] if side == "right" else ids[max(len(ids) - length, 0) :]


def _longest_first(query: int, document: int, room: int) -> tuple[int, int]:
    """How many tokens stay of each text of a pair that is too long, as fast tokenizers truncate it.

    The longer text is cut until both are as long, then both. Of an odd number the longer text keeps
    one more; of two as long that is the document.
    """
    shorter = min(query, document, room // 2)
    return (room - shorter, shorter) if query > document else (shorter, room - shorter)


@dataclass(frozen=True)
class PairTokenizer:
    """Token ids of pairs, truncated to a number of tokens."""

    tokenizer: Any

    def __call__(
        self, pairs: Sequence[Pair], max_length: int, prompt: str | None = None
    ) -> tuple[TokenizedPairs, int]:
        """The pairs without padding, and how many of them were truncated, the longer text first.

        The prompt goes before each query. A text that stands in several pairs is tokenised once.
        Two empty texts to which the tokenizer adds nothing are read as the token that ends a text;
        without such a token the pair has none.

        Raises:
            ValueError: max_length is less than the special tokens of a pair.
        """
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        room = max_length - special
        if room < 0:
            raise ValueError(
                f"expected max_length to be at least {special}, the number of special tokens that "
                f"the tokenizer gives a pair, got {max_length}"
            )
        queries = [(prompt or "") + pair[0] for pair in pairs]
        documents = [pair[1] for pair in pairs]
        distinct = list(dict.fromkeys(chain(queries, documents)))
        side = self.tokenizer.truncation_side
        tokens = {
            text: (_cut(ids, max_length, side), len(ids))
            for text, ids in zip(distinct, _tokens(self.tokenizer, distinct), strict=True)
        }
        fast = self.tokenizer.is_fast
        texts: list[list[int]] = []
        truncated = 0
        for query, document in zip(queries, documents, strict=True):
            (query_ids, of_query), (document_ids, of_document) = tokens[query], tokens[document]
            if of_query + of_document > room:
                truncated += 1
                if fast:
                    of_query, of_document = _longest_first(of_query, of_document, room)
                    query_ids = _cut(query_ids, of_query, side)
                    document_ids = _cut(document_ids, of_document, side)
            if not (special or query_ids or document_ids):
                query_ids = self._end_of_text()
            texts += query_ids, document_ids
        return self.framed(texts) if fast else self._prepared(texts, max_length), truncated

    def prompt_length(self, prompt: str, max_length: int) -> int:
        """The tokens of a prompt before any text, with the special one that begins a pair; what
        max_length leaves of them where they are more.
        """
        ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        ends = bool(ids) and ids[-1] in self.tokenizer.all_special_ids
        return min(len(ids), max_length) - ends

    def _end_of_text(self) -> list[int]:
        known = (
            self.tokenizer.eos_token_id,
            self.tokenizer.sep_token_id,
            self.tokenizer.bos_token_id,
        )
        return [one for one in known if one is not None][:1]

    def framed(self, texts: list[list[int]]) -> TokenizedPairs:
        """The pairs of a fast tokenizer; texts: a query, its document, the next query, ...

        Where special tokens go is asked of what puts them there, with two marks in place of texts.
        """
        query, document = Encoding(), Encoding()
        query.pad(1, pad_id=_QUERY, pad_type_id=0)
        document.pad(1, pad_id=_DOCUMENT, pad_type_id=1)
        marked = self.tokenizer.backend_tokenizer.post_process(query, document)
        frame = marked.ids
        if frame.count(_QUERY) != 1 or frame.count(_DOCUMENT) != 1:
            raise ValueError(
                "the tokenizer's post-processor does not give each text of a pair once"
            )
        rows = [[token] for token in frame] * (len(texts) // 2)
        rows[frame.index(_QUERY) :: len(frame)] = texts[::2]
        rows[frame.index(_DOCUMENT) :: len(frame)] = texts[1::2]
        types = None
        if "token_type_ids" in self.tokenizer.model_input_names:
            kinds = cycle(marked.type_ids)
            types = [[kind] * len(row) for kind, row in zip(kinds, rows, strict=False)]
        return _flat(rows, types, len(frame))

    def _prepared(self, texts: list[list[int]], max_length: int) -> TokenizedPairs:
        """The pairs of a slow tokenizer, whose own way it is to cut and to join them."""
        pairs = [
            self.tokenizer.prepare_for_model(
                query,
                document,
                truncation="longest_first",
                max_length=max_length,
                return_attention_mask=False,
            )
            for query, document in zip(texts[::2], texts[1::2], strict=True)
        ]
        typed = "token_type_ids" in self.tokenizer.model_input_names
        return _flat(
            [pair["input_ids"] for pair in pairs],
            [pair["token_type_ids"] for pair in pairs] if typed else None,
        )


@dataclass(frozen=True)
class PromptTokenizer:
    """Tokens of a language model's pairs: its tokenizer's chat template, filled with the roles
    query and document.

    A template that can't carry a pair gives way to monoT5's where there is an encoder, else to
    Qwen3-Reranker's.
    """

    tokenizer: Any
    encoder_decoder: bool = False

    def __post_init__(self) -> None:
        if not carries_pairs(self.tokenizer):
            if self.encoder_decoder:
                self.tokenizer.chat_template = MONO_T5_TEMPLATE
            elif "<|im_start|>" in self.tokenizer.get_vocab():
                self.tokenizer.chat_template = QWEN3_RERANKER_TEMPLATE
            else:
                raise ValueError(
                    "the tokenizer's chat template can't carry a pair: expected one that renders "
                    "messages of the roles query and document, in the files or as template=, and "
                    "the one that Qwen3-Reranker has needs the token <|im_start|>"
                )
        if not self.encoder_decoder:
            # The score is read from the last token, which must be the prompt's own.
            self.tokenizer.padding_side = "left"

    def __call__(
        self, pairs: Sequence[Pair], max_length: int, prompt: str | None = None
    ) -> tuple[TokenizedPairs, int]:
        """The filled-in prompts, and how many of them were truncated.

        Of these the end of the pair goes, and the prompt's stays; where the tokenizer's truncation
        side is left, the beginning goes. The prompt, or instruction, is a system message.
        """
        texts = (_rendered(self.tokenizer, pair, prompt) for pair in pairs)
        side = self.tokenizer.truncation_side
        rows, truncated = [], []
        for n, ids in enumerate(_tokens(self.tokenizer, texts)):
            rows.append(_cut(ids, max_length, side))
            if len(ids) > max_length:
                truncated.append(n)
        if truncated and side == "right":
            ending = self._ending(prompt)[-max_length:]
            for n in truncated:
                rows[n][max_length - len(ending) :] = ending
        return _flat(rows, None), len(truncated)

    def _ending(self, prompt: str | None) -> list[int]:
        """The tokens that follow every document."""
        texts = [_rendered(self.tokenizer, (text, text), prompt) for text in ("0", "1 2 3 4")]
        one, other = _tokens(self.tokenizer, texts)
        same = 0
        while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
            same += 1
        return one[len(one) - same :]


def carries_pairs(tokenizer: Any) -> bool:
    """Whether both texts of a pair reach the prompt that a tokenizer's chat template makes."""
    try:
        base, query, document = (
            _rendered(tokenizer, pair) for pair in (("a1", "b2"), ("c3", "b2"), ("a1", "d4"))
        )
    except Exception:  # no template, or one that refuses the roles
        return False
    return base not in (query, document)


def _rendered(tokenizer: Any, pair: Pair, prompt: str | None = None) -> str:
    """The template with a pair, and a prompt as its system message."""
    messages = [{"role": "query", "content": pair[0]}, {"role": "document", "content": pair[1]}]
    if prompt:
        messages.insert(0, {"role": "system", "content": prompt})
    if _structured(str(tokenizer.chat_template)):
        messages = [
            {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}  # type: ignore[dict-item]
            for message in messages
        ]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _structured(template: str) -> bool:
    """Whether a template wants each content as a list of parts; read as sentence-transformers reads
    it.
    """
    return any(
        part in template for part in ("content[0]", ".type", "'type'", '"type"', "message.content[")
    )


def _flat(
    rows: list[list[int]], types: list[list[int]] | None, rows_per_pair: int = 1
) -> TokenizedPairs:
    """The pairs, each of as many rows of ids and of token types."""
    offsets = np.cumsum([0, *map(len, rows)])
    total = offsets[-1]
    return TokenizedPairs(
        np.fromiter(chain.from_iterable(rows), np.int32, total),
        None if types is None else np.fromiter(chain.from_iterable(types), np.int8, total),
        offsets[::rows_per_pair].astype(np.int64),
    )
