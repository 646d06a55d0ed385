"""Drop-in losses for sentence-transformers' CrossEncoderTrainer: same signatures, fused
computation.

from rerank_fast.losses import LambdaLoss
"""

from __future__ import annotations

from typing import Any

from rerank_fast.losses.adr_mse import ADRMSELoss
from rerank_fast.losses.lambda_loss import LambdaLoss, RankNetLoss
from rerank_fast.losses.list_mle import ListMLELoss, PListMLELambdaWeight, PListMLELoss
from rerank_fast.losses.list_net import ListNetLoss
from rerank_fast.losses.margin_mse import MarginMSELoss
from rerank_fast.losses.multiple_negatives_ranking import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from rerank_fast.losses.pointwise import BinaryCrossEntropyLoss, MSELoss
from rerank_fast.objectives.weighting import (
    BaseWeightingScheme,
    LambdaRankScheme,
    NDCGLoss1Scheme,
    NDCGLoss2PPScheme,
    NDCGLoss2Scheme,
    NoWeightingScheme,
)

__all__ = [
    "ADRMSELoss",
    "BaseWeightingScheme",
    "BinaryCrossEntropyLoss",
    "CachedMultipleNegativesRankingLoss",
    "LambdaLoss",
    "LambdaRankScheme",
    "ListMLELoss",
    "ListNetLoss",
    "MSELoss",
    "MarginMSELoss",
    "MultipleNegativesRankingLoss",
    "NDCGLoss1Scheme",
    "NDCGLoss2PPScheme",
    "NDCGLoss2Scheme",
    "NoWeightingScheme",
    "PListMLELambdaWeight",
    "PListMLELoss",
    "RankNetLoss",
]


def __getattr__(name: str) -> Any:
    """sentence-transformers' own CrossEntropyLoss, so that an import of several losses needs no
    second line.

    It is of models with several labels, which are no rerankers: nothing here makes them faster.
    """
    if name != "CrossEntropyLoss":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from sentence_transformers.cross_encoder.losses import CrossEntropyLoss
    except ImportError as error:
        raise ImportError(
            "CrossEntropyLoss, of models with several labels, is sentence-transformers' own: "
            "expected it to be installed (pip install sentence-transformers)"
        ) from error
    return CrossEntropyLoss
