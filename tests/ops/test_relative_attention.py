"""varlen_attention with relative positions: the reference against the formula, kernels against the
reference in fp64.
"""

from __future__ import annotations

import pytest
import torch

from rerank_fast.ops.relative_positions import RelativePositions
from rerank_fast.ops.varlen_attention import varlen_attention

from .test_varlen_attention import make

TERMS = ["keys", "queries", "bias"]


def log_buckets(reach: int, span: int) -> torch.Tensor:
    """Slots as DeBERTa has them: near distances one by one, far ones by their logarithm."""
    distance = torch.arange(-reach, reach + 1)
    mid = span // 2
    far = torch.log2(distance.abs().clamp(min=mid) / mid).mul(2).floor().long() + mid
    bucket = torch.where(distance.abs() <= mid, distance, far * distance.sign())
    return (bucket + span).clamp(0, 2 * span - 1).int()


def make_relative(
    tensors, terms=("keys", "queries", "bias"), *, slots=None, positions=None, seed=1
) -> RelativePositions:
    generator = torch.Generator().manual_seed(seed)
    q = tensors[0]
    slots = log_buckets(24, 8) if slots is None else slots
    num_slots = int(slots.max()) + 1
    wide = torch.promote_types(q.dtype, torch.float32)

    def table(*shape, dtype):
        return torch.randn(num_slots, *shape, generator=generator).to(dtype)

    keys, queries = (table(*q.shape[1:], dtype=q.dtype) for _ in range(2))
    found = {"keys": keys, "queries": queries, "bias": table(q.shape[1], dtype=wide)}
    return RelativePositions(
        slots,
        **{name: one for name, one in found.items() if name in terms},
        query_positions=positions,
    )


def as_written(tensors, ends, relative, scale):
    """Attention sequence by sequence, its scores one by one."""
    q, k, v = tensors
    out = torch.zeros_like(q)
    ends_q, ends_k = ends[0].tolist(), ends[1].tolist()
    for first_q, last_q, first_k, last_k in zip(
        ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False
    ):
        for head in range(q.shape[1]):
            for i in range(first_q, last_q):
                place = i - first_q + (last_k - first_k) - (last_q - first_q)
                if relative.query_positions is not None:
                    place = int(relative.query_positions[i])
                scores = []
                for j in range(first_k, last_k):
                    distance = place - (j - first_k)
                    reach = (len(relative.slots) - 1) // 2
                    slot = int(relative.slots[min(max(distance, -reach), reach) + reach])
                    score = q[i, head] @ k[j, head]
                    if relative.keys is not None:
                        score = score + q[i, head] @ relative.keys[slot, head]
                    if relative.queries is not None:
                        score = score + k[j, head] @ relative.queries[slot, head]
                    score = score * scale
                    if relative.bias is not None:
                        score = score + relative.bias[slot, head]
                    scores.append(score)
                if scores:
                    out[i, head] = torch.stack(scores).softmax(0) @ v[first_k:last_k, head]
    return out


@pytest.mark.parametrize("terms", [[term] for term in TERMS] + [TERMS], ids=str)
@pytest.mark.parametrize(
    ("lengths", "positions"),
    [
        (([9, 0, 1, 30], [9, 0, 1, 30]), None),
        (([2, 3], [5, 3]), None),
        (([1, 1, 1], [7, 1, 12]), [0, 0, 0]),
        (([2, 3], [5, 9]), [4, -3, 7, 0, 100]),
    ],
    ids=str,
)
def test_reference_is_the_formula(terms, lengths, positions):
    tensors, _, ends = make(lengths, size=6, dtype=torch.float64)
    positions = None if positions is None else torch.tensor(positions, dtype=torch.int32)
    relative = make_relative(tensors, terms, positions=positions)
    actual = varlen_attention(*tensors, *ends, scale=0.3, relative=relative, backend="reference")
    torch.testing.assert_close(actual, as_written(tensors, ends, relative, 0.3))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradients(dropout_p):
    tensors, _, ends = make(([2, 1, 3], [3, 1, 3]), size=2, dtype=torch.float64)
    given = make_relative(tensors, slots=log_buckets(3, 2))
    leaves = [
        one.detach().requires_grad_() for one in (*tensors, given.keys, given.queries, given.bias)
    ]

    def attention(q, k, v, keys, queries, bias):
        relative = RelativePositions(given.slots, keys, queries, bias)
        return varlen_attention(
            q, k, v, *ends, relative=relative, dropout_p=dropout_p, seed=5, backend="reference"
        )

    assert torch.autograd.gradcheck(attention, leaves)
