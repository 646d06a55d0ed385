"""Relative positions in Triton's kernels against the reference in fp64; natively on a GPU, else in
its interpreter, whose every program takes tens of milliseconds: few cases, each of several things.
"""

from __future__ import annotations

import pytest
import torch

from rerank_fast.ops.relative_positions import RelativePositions
from rerank_fast.ops.varlen_attention import varlen_attention

from .test_relative_attention import log_buckets, make_relative
from .test_varlen_attention import HAS_GPU, SEED, make

pytest.importorskip("triton")
ALL = ("keys", "queries", "bias")
# Three that have one slot from the second neighbour on, so that most blocks are beyond the reach.
NEAR = torch.tensor([2, 0, 1], dtype=torch.int32)


def run(backend, tensors, grad, ends, relative, dtype, **options):
    """out, and the gradients of q, k, v and of the tables there are, on the CPU again."""
    device = "cuda" if backend == "triton" and HAS_GPU else "cpu"
    wide = torch.promote_types(dtype, torch.float32)

    def leaf(tensor, dtype):
        return None if tensor is None else tensor.detach().to(device, dtype).requires_grad_()

    leaves = [leaf(one, dtype) for one in (*tensors, relative.keys, relative.queries)]
    leaves.append(leaf(relative.bias, wide))
    places = (relative.slots, relative.query_positions)
    slots, positions = (None if one is None else one.to(device) for one in places)
    out = varlen_attention(
        *leaves[:3],
        *(end.to(device) for end in ends),
        relative=RelativePositions(slots, *leaves[3:], positions),
        backend=backend,
        **options,
    )
    there = [one for one in leaves if one is not None]
    grads = torch.autograd.grad(out, there, grad.to(device, dtype))
    return [one.cpu() for one in (out.detach(), *grads)]


def assert_close(lengths, terms, *, slots=None, first=False, dtype=torch.float32, **options):
    """Kernel error <= that of the eager formula in the same dtype, and a few roundings."""
    heads = options.pop("heads", 1)
    size = options.pop("size", 16)
    tensors, grad, ends = make(lengths, heads=heads, kv_heads=heads, size=size, dtype=dtype)
    positions = torch.zeros(len(grad), dtype=torch.int32) if first else None
    slots = log_buckets(5, 2) if slots is None else slots
    relative = make_relative(tensors, terms, slots=slots, positions=positions)
    case = (tensors, grad, ends, relative)
    actual = run("triton", *case, dtype, **options)
    eager, exact = (run("reference", *case, one, **options) for one in (dtype, torch.float64))
    assert len(actual) == 4 + len(terms)
    for ours, theirs, true in zip(actual, eager, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == true.shape
        error, eager_error = ((one.double() - true).abs().max() for one in (ours, theirs))
        rounding = (64 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
        assert error <= 1.5 * eager_error + rounding * true.abs().max() + 1e-12
    return case, actual


def test_all_terms_with_dropout():
    """A block and a part of one, and slots by logarithm."""
    assert_close(([18], [18]), ALL, dropout_p=0.3, seed=SEED)


@pytest.mark.parametrize(("term", "size"), [("keys", 16), ("queries", 12)])
def test_distances_beyond_the_reach(term, size, monkeypatch):
    """Fresh buffers hold NaN: what a kernel leaves out shows. A head size of no power of two."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: _poisoned(empty(*a, **o)))
    assert_close(([36], [36]), (term,), slots=NEAR, size=size)


def _poisoned(tensor):
    return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor


def test_first_token_alone():
    assert_close(([1, 1], [18, 1]), ("queries", "bias"), first=True, slots=NEAR)


def test_half_precision_on_wide_blocks():
    """32 queries and keys in a block, where the others have 16."""
    assert_close(([34], [34]), ("keys", "bias"), dtype=torch.float16, slots=NEAR)


def test_the_same_bits_every_time_from_views_of_one_projection():
    tensors, grad, ends = make(([0, 4], [0, 4]), heads=2, size=16)
    tensors = torch.stack(tensors, dim=1).unbind(1)
    relative = make_relative(tensors, ("keys",), slots=NEAR)
    turned = relative.keys.transpose(0, 1).contiguous().transpose(0, 1)
    views = RelativePositions(NEAR, turned)
    first = run("triton", tensors, grad, ends, relative, torch.float32)
    second = run("triton", tensors, grad, ends, views, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_queries_that_do_not_follow_one_by_one_give_nan_and_no_wrong_scores():
    (q, k, v), _, ends = make(([3, 1], [3, 1]), heads=1, kv_heads=1, size=16)
    positions = torch.tensor([0, 2, 1, 5], dtype=torch.int32)
    relative = make_relative((q, k, v), ("bias",), slots=NEAR, positions=positions)
    if HAS_GPU:
        pytest.skip("the reference for one is on the CPU")
    out = varlen_attention(q, k, v, *ends, relative=relative, backend="triton")
    exact = varlen_attention(q, k, v, *ends, relative=relative, backend="reference")
    assert out[:3].isnan().all()
    torch.testing.assert_close(out[3:], exact[3:])


def test_slots_outside_of_the_tables_read_nothing_there():
    tensors, _, ends = make(([2], [2]), heads=1, kv_heads=1, size=16)
    relative = make_relative(tensors, ("keys",), slots=NEAR)
    device = "cuda" if HAS_GPU else "cpu"
    slots = torch.tensor([2**30, 0, -(2**30)], dtype=torch.int32, device=device)
    out = varlen_attention(
        *(one.to(device) for one in (*tensors, *ends)),
        relative=RelativePositions(slots, relative.keys.to(device)),
        backend="triton",
    )
    assert out.isfinite().all()


def test_heads_that_are_too_wide_are_refused():
    tensors, _, ends = make(([2], [2]), heads=1, kv_heads=1, size=72)
    relative = make_relative(tensors, ("bias",), slots=NEAR)
    with pytest.raises(ValueError, match="head size up to 64 with relative positions, got"):
        varlen_attention(*tensors, *ends, relative=relative, backend="triton")
