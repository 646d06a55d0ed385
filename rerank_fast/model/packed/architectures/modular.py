"""How the score of a cross-encoder of modules is read: the pooled token or pooled tokens, and what
follows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rerank_fast.model.modular.pooling import Pool, pool_by
from rerank_fast.model.modular.reranker import TOKENS, ModularReranker
from rerank_fast.model.packed.architectures.views import Reading

# sentence-transformers' classes, and this package's by the same names.
_KNOWN = ("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
_PACKAGES = ("sentence_transformers.", "rerank_fast.")
_TOKENS, _POOLED = "token_embeddings", "sentence_embedding"
_TOKEN_OF = {"cls": "first", "lasttoken": "last"}


def modular_reading(model: ModularReranker) -> Reading | str:
    """How the scores are read, or why they must be computed from a padded batch."""
    modules: list[Any] = list(model.head)
    for module in modules:
        kind = type(module)
        if kind.__name__ not in _KNOWN or not kind.__module__.startswith(_PACKAGES):
            name = f"{kind.__module__}.{kind.__name__}"
            return f"the CrossEncoder has the module {name}, which needs a padded batch"
    pools = [place for place, module in enumerate(modules) if type(module).__name__ == "Pooling"]
    if len(pools) != 1 or model.output != TOKENS:
        read = ".".join(map(str, model.output[0]))
        return f"the CrossEncoder has {len(pools)} Pooling modules after a Transformer's {read}"
    (place,) = pools
    before, pooling, after = modules[:place], modules[place], modules[place + 1 :]
    if not pooling.include_prompt:
        return "the CrossEncoder's Pooling leaves out the tokens of a prompt"
    if any(_names(module) != {_TOKENS} for module in before) or any(
        _TOKENS in _names(one) for one in after
    ):
        return "modules of the CrossEncoder read other embeddings than those that were pooled"
    modes = pooling.pooling_mode
    modes = (modes,) if isinstance(modes, str) else tuple(modes)

    def embed(rows: Tensor) -> Tensor:
        features = {_TOKENS: rows}
        for module in before:
            features = module(features)
        return features[_TOKENS]

    def score(pooled: Tensor) -> Tensor:
        features = {_POOLED: pooled}
        for module in after:
            features = module(features)
        return features["scores"].squeeze(1)

    if len(modes) == 1 and modes[0] in _TOKEN_OF:
        reads: Any = _TOKEN_OF[modes[0]]
        return Reading(head=lambda rows: score(embed(rows)), reads=reads)
    pool_embedded = pool_by(modes)
    pool: Pool = (
        (lambda rows, ends, owner: pool_embedded(embed(rows), ends, owner))
        if before
        else pool_embedded
    )
    return Reading(head=score, pool=pool)


def _names(module: nn.Module) -> set[str]:
    """Of the features that a module reads and adds."""
    names = (getattr(module, name, _POOLED) for name in ("module_input_name", "module_output_name"))
    return set(names)
