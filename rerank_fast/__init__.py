"""Fast training and inference of cross-encoder rerankers.

Every public name is imported when it is first used: `import rerank_fast` loads neither torch nor
triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rerank_fast.model.cross_encoder import CrossEncoder as CrossEncoder
    from rerank_fast.model.scoring import score as score
    from rerank_fast.ops.lambda_loss import count_pairs as count_pairs
    from rerank_fast.ops.lambda_loss import lambda_loss as lambda_loss
    from rerank_fast.ops.ndcg import ndcg as ndcg
    from rerank_fast.training import Trainer as Trainer
    from rerank_fast.training import TrainingConfig as TrainingConfig

_ORIGIN = {
    "CrossEncoder": "rerank_fast.model.cross_encoder",
    "Trainer": "rerank_fast.training",
    "TrainingConfig": "rerank_fast.training",
    "count_pairs": "rerank_fast.ops.lambda_loss",
    "lambda_loss": "rerank_fast.ops.lambda_loss",
    "ndcg": "rerank_fast.ops.ndcg",
    "score": "rerank_fast.model.scoring",
}

__all__ = [*_ORIGIN, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _ORIGIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ORIGIN[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
