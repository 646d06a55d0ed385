"""How many tokens a forward pass takes where the settings don't say."""

from __future__ import annotations

import logging

import torch

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.tokens.packing import most_tokens
from rerank_fast.training.distributed import collectives
from rerank_fast.training.memory import activation_bytes, available_bytes

logger = logging.getLogger(__name__)

# On a CPU the seconds of a step hardly depend on it (benchmarks/steps/microbatch_tokens.py).
_LEAST = 512


def probe_max_tokens(model: CrossEncoder, dtype: torch.dtype) -> int:
    """A power of two for this device and model: the graph of a micro-batch may take an eighth of
    the free memory.

    The least of all processes', in each of them.
    """
    share = available_bytes(model.device) // 8
    a_token = activation_bytes(model.model, 1, dtype, gradient_checkpointing=False)
    most = min(share / a_token, most_tokens(model.device))
    tokens = min(collectives.gather(max(_LEAST, power_of_two(most))))
    reason = (
        f"a token takes {a_token / 1024:.0f} KiB, a micro-batch may take {share / 2**20:.0f} MiB"
    )
    logger.info("max_tokens_per_microbatch: %d on %s: %s", tokens, model.device, reason)
    return tokens


def power_of_two(value: float) -> int:
    """The largest one up to a value of at least 1: small differences of a machine give the same."""
    return 1 << (max(int(value), 1).bit_length() - 1)
