"""The tokenizer of a checkpoint: there, whole, and such as the model can read the tokens of."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoTokenizer

from rerank_fast.model.storage.files import Checkpoint, named
from rerank_fast.model.texts import shown
from rerank_fast.model.tokens.tokenization import PairTokenizer

logger = logging.getLogger(__name__)

_CONFIG = "tokenizer_config.json"
# What a vocabulary comes in, beside the names that a tokenizer's own class has for it.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
)


@dataclass(frozen=True)
class TokenizerSettings:
    """What calls change in a fast tokenizer, as its files have it."""

    truncation: dict[str, Any] | None
    padding: dict[str, Any] | None

    @staticmethod
    def of(tokenizer: Any) -> TokenizerSettings:
        if not tokenizer.is_fast:
            return TokenizerSettings(None, None)
        return TokenizerSettings(
            tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
        )

    def save(self, tokenizer: Any, directory: Path, max_length: int | None) -> None:
        """Write a tokenizer's files with these settings and a model's limit, None for its own."""
        tokenizer = copy.deepcopy(tokenizer)  # others may be using it
        for name in ("is_local", "local_files_only"):  # how it was opened, which transformers adds
            tokenizer.init_kwargs.pop(name, None)
        if max_length is not None:
            tokenizer.model_max_length = max_length
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            if self.truncation is not None:
                backend.enable_truncation(**self.truncation)
            if self.padding is not None:
                backend.enable_padding(**self.padding)
        tokenizer.save_pretrained(directory)


def load_tokenizer(checkpoint: Checkpoint, model: Any, options: dict[str, Any]) -> Any:
    """The checkpoint's tokenizer, made with these options of from_pretrained.

    Raises:
        ValueError: its files are missing or damaged, it has no words or can't join the texts of a
            pair, or it has tokens that the model has no embedding for.
    """
    others = [_CONFIG, "special_tokens_map.json", "added_tokens.json"]
    contents = {name: checkpoint.read_json(name) for name in others}
    versions = (contents[_CONFIG] or {}).get("fast_tokenizer_files") or []
    if not isinstance(versions, list):
        raise ValueError(
            f"{checkpoint.name}/{_CONFIG}: expected fast_tokenizer_files to be a list of names, "
            f"got {shown(versions)}"
        )
    for version in versions:
        checkpoint.inside(version, _CONFIG)
    # The first that is there: of a model on the hub each question is a request.
    found = next((name for name in (*_VOCABULARIES, *versions) if checkpoint.file(name)), None)
    there = ", ".join(
        [*([found] if found else []), *(name for name in others if contents[name] is not None)]
    )
    what = f"the tokenizer of {checkpoint.name} can't be made of {there}"
    if found is None:
        what = (
            f"{checkpoint.name} has no tokenizer: expected the file tokenizer.json or a vocabulary"
        )
    with named(what):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, **{**checkpoint.hub, **options})
    own = {
        file for kind, file in type(tokenizer).vocab_files_names.items() if kind != "merges_file"
    }
    # Of none transformers makes a tokenizer of special tokens: every word is unknown to it.
    if own and found is None and not any(checkpoint.file(name) for name in own):
        raise ValueError(
            f"{checkpoint.name} has no tokenizer: expected the file {' or '.join(sorted(own))}"
        )
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    if all(token in special for token in vocabulary):
        raise ValueError(
            f"the tokenizer of {checkpoint.name}, made of {there}, has no words: only "
            f"{len(vocabulary)} special tokens"
        )
    _check_numbers(checkpoint, vocabulary, special, getattr(model.config, "vocab_size", None))
    if tokenizer.is_fast:
        with named(f"the tokenizer of {checkpoint.name}, made of {there}, can't tokenise a pair"):
            tokenizer.backend_tokenizer.encode("a")  # one text alone starts no threads
            PairTokenizer(tokenizer).framed([[0], [0]])
    limit = tokenizer.model_max_length  # two texts and their separators
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 4 <= limit < math.inf:
        given = "model_max_length" in options
        where = "processor_kwargs" if given else f"{checkpoint.name}/{_CONFIG}"
        raise ValueError(f"{where}: expected model_max_length to be at least 4, got {shown(limit)}")
    return tokenizer


def lower_case(tokenizer: Any) -> None:
    """Let a tokenizer lower its texts first, as sentence-transformers' do_lower_case does."""
    if not tokenizer.is_fast:
        tokenizer.do_lower_case = True
        return
    backend = tokenizer.backend_tokenizer
    there: Any = backend.normalizer
    several = isinstance(there, Sequence)
    steps = list(there) if several else [] if there is None else [there]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Sequence([Lowercase(), *steps])


def _check_numbers(
    checkpoint: Checkpoint, vocabulary: dict[str, int], special: set[str], rows: Any
) -> None:
    """Whether the model has an embedding for each token; a special one may never be met."""
    beyond = {token: n for token, n in vocabulary.items() if isinstance(rows, int) and n >= rows}
    for token, number in beyond.items():
        said = (
            f"the tokenizer of {checkpoint.name} is not the model's: its token {token!r:.40} has "
            f"the number {number}, and config.json a vocab_size of {rows}"
        )
        if token not in special:
            raise ValueError(said)
    if beyond:
        logger.warning("%s; a text that holds this token can't be scored.", said)
