"""A digest of a sample of weights: tells one model from another without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def sample_digest(weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """16 hexadecimal digits of the names and the first 64 values of each weight.

    Args:
        weights: by name, on any device.
        dtype: the values are rounded to it first, so that wider copies of the weights are the same.
    """
    digest = hashlib.sha256()
    for name, weight in weights.items():
        first = weight.detach().flatten()[:64].to("cpu", dtype).view(torch.uint8)
        digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]
