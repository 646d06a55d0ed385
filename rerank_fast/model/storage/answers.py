"""The tokens that a language model answers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rerank_fast.model.modular.reranker import Entry
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.texts import shown

# As published: castorini's monoT5, unicamp-dl's mT5.
_WORDS = {"t5": ("true", "false"), "umt5": ("true", "false"), "mt5": ("yes", "no")}


def find_answers(
    name: str,
    tokenizer: Any,
    config: Any,
    entries: Sequence[Entry],
    words: str | tuple[str, str] | None,
) -> Answers:
    """Those that the caller names, else those that were saved, else yes and no, of T5 true and
    false.

    Raises:
        ValueError: a word is not one token, or a saved number none of the vocabulary.
    """
    if words is not None:
        both = (words,) if isinstance(words, str) else tuple(words)
        if len(both) not in (1, 2) or not all(isinstance(one, str) for one in both):
            raise ValueError(f"answers must be a word or two, got {shown(words)}")
        return Answers(*(_token(name, tokenizer, word) for word in both))
    for entry in entries:
        if entry.kind == "LogitScore":
            file, saved = f"{entry.path}/config.json", entry.config
            answers: list[Any] = [saved.get("true_token_id"), saved.get("false_token_id")]
            known = [type(one) is int and 0 <= one < len(tokenizer) for one in answers]
            if not known[0] or not (known[1] or answers[1] is None):
                raise ValueError(
                    f"{name}/{file}: expected true_token_id and false_token_id below "
                    f"{len(tokenizer)}, the tokens of the vocabulary, got {answers[0]!r:.40} and "
                    f"{answers[1]!r:.40}"
                )
            return Answers(*answers)
    if config.model_type in _WORDS:
        return Answers(*(_token(name, tokenizer, word) for word in _WORDS[config.model_type]))
    vocabulary = tokenizer.get_vocab()
    if "yes" not in vocabulary or "no" not in vocabulary:
        raise ValueError(
            f"{name} is a causal language model whose tokenizer has no token yes or no; expected "
            "these, a LogitScore module as sentence-transformers saves it, or answers=, the words "
            "that it answers with"
        )
    return Answers(vocabulary["yes"], vocabulary["no"])


def _token(name: str, tokenizer: Any, word: str) -> int:
    """The one token that a text of this word is."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        made = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"{name} scores by the logit of one token: expected an answer that is one, got "
            f"{word!r}, which its tokenizer reads as {made}"
        )
    return int(ids[0])
