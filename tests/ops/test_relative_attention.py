"""varlen_attention with relative positions: the reference against the formula, kernels against the
reference in fp64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rerank_fast.ops.relative_positions import RelativePositions
from rerank_fast.ops.varlen_attention import varlen_attention

from .conftest import each_instruction_set
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


LENGTHS = {
    "same": ([5, 0, 67, 1], [5, 0, 67, 1]),
    "blocks": ([150, 97], [150, 97]),
    "one query": ([1, 1, 1, 1], [7, 64, 65, 1]),
    "fewer queries": ([4, 40, 3], [9, 66, 17]),
    "more queries": ([9, 20, 5], [4, 17, 0]),
}
# Of the four sequences' first tokens, and places that are no run of neighbours.
POSITIONS = {
    "one query": [0, 0, 0, 0],
    "fewer queries": [*range(3, 7), *range(0, 80, 2), 9, -7, 40],
}


def run(backend, tensors, grad, ends, relative, **options):
    """out, and the gradients of q, k, v and the tables that are there."""
    tables = [one for one in (relative.keys, relative.queries, relative.bias) if one is not None]
    leaves = [one.detach().requires_grad_() for one in (*tensors, *tables)]
    given = iter(leaves[3:])
    parts = (
        None if one is None else next(given)
        for one in (relative.keys, relative.queries, relative.bias)
    )
    own = RelativePositions(relative.slots, *parts, relative.query_positions)
    out = varlen_attention(*leaves[:3], *ends, relative=own, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def widened(relative: RelativePositions) -> RelativePositions:
    tables = (
        None if one is None else one.double()
        for one in (relative.keys, relative.queries, relative.bias)
    )
    return RelativePositions(relative.slots, *tables, relative.query_positions)


def assert_close(case, relative, **options):
    """Of every instruction set's kernels results are as near as assert_near asks, in the dtypes and
    shapes of eager's.
    """
    tensors, grad, ends = case
    results = {
        kernels: run("cpu", tensors, grad, ends, relative, **options)
        for kernels in each_instruction_set()
    }
    eager = assert_near(results, case, relative, **options)
    for actual in results.values():
        for ours, theirs in zip(actual, eager, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


def assert_near(results, case, relative, **options):
    """Kernel error <= that of the eager formula in the same dtype, and a few roundings.

    results are, by the name of what made them, out and the gradients of q, k, v and the tables, of
    any shape. Returns the eager formula's.
    """
    tensors, grad, ends = case
    eager = run("reference", tensors, grad, ends, relative, **options)
    exact = run(
        "reference",
        [t.double() for t in tensors],
        grad.double(),
        ends,
        widened(relative),
        **options,
    )
    # Where all keys have one slot its gradient is 0: the rounding of what cancels is left.
    largest = max(float(true.abs().max()) for true in exact if true.numel())
    for name, actual in results.items():
        for ours, theirs, true in zip(actual, eager, exact, strict=True):
            if true.numel():
                error = (ours.reshape(true.shape).double() - true).abs().max()
                eager_error = (theirs.double() - true).abs().max()
                rounding = (64 if ours.dtype == torch.float32 else 2) * torch.finfo(ours.dtype).eps
                # A bias is in fp32 where what it is summed from was rounded to bf16 before.
                rounding = max(rounding, 2 * torch.finfo(tensors[0].dtype).eps)
                of = max(float(true.abs().max()), 0.1 * largest)
                budget = 1.5 * eager_error + rounding * of + 1e-12
                assert error <= budget, (name, error, eager_error)
    return eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [6, 32, 64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_and_head_sizes(lengths, size, dtype):
    positions = POSITIONS.get(lengths)
    positions = None if positions is None else torch.tensor(positions, dtype=torch.int32)
    case = make(LENGTHS[lengths], size=size, dtype=dtype)
    assert_close(case, make_relative(case[0], positions=positions))


@pytest.mark.parametrize("terms", [[term] for term in TERMS] + [["keys", "queries"]], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_terms_and_dropout(terms, dropout_p):
    case = make(([33, 1, 40], [33, 1, 40]), size=16)
    options = {"dropout_p": dropout_p, "seed": 11, "scale": 0.2}
    assert_close(case, make_relative(case[0], terms), **options)


@pytest.mark.parametrize("reach", [0, 1, 5, 300])
def test_reaches(reach):
    """From one slot for all distances to a table that is larger than any sequence."""
    case = make(([20, 31], [20, 31]), size=16)
    slots = torch.arange(2 * reach + 1, dtype=torch.int32)
    assert_close(case, make_relative(case[0], slots=slots))


def test_every_length():
    """Blocks, tiles and squares that are full, and that lack one query or one key."""
    lengths = [*range(1, 36), 63, 64, 65, 95, 96, 97, 129]
    case = make((lengths, lengths), heads=1, kv_heads=1, size=8)
    assert_close(case, make_relative(case[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_output_is_written(dtype, monkeypatch):
    """Fresh buffers hold NaN: what a kernel leaves out shows."""
    tensors, grad, ends = make(LENGTHS["more queries"], size=16, dtype=dtype)
    relative = make_relative(tensors)
    expected = run("cpu", tensors, grad, ends, relative)
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **o: empty(*a, **o).fill_(float("nan")) if "dtype" in o else empty(*a, **o),
    )
    for ours, theirs in zip(run("cpu", tensors, grad, ends, relative), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_lies_beyond_a_sequence_is_not_read():
    tensors, grad, ends = make(([6, 7], [6, 7]), size=16)
    relative = make_relative(tensors)
    both = run("cpu", tensors, grad, ends, relative)
    poisoned = [t.clone() for t in tensors]
    for t in poisoned:
        t[6:] = float("nan")
    alone = run("cpu", poisoned, grad, ends, relative)
    for ours, theirs in zip(alone[:4], both[:4], strict=True):
        assert torch.equal(ours[:6], theirs[:6])
    assert all(one.isnan().any() for one in alone[4:])  # tables belong to all sequences


def test_threads_and_runs_change_nothing():
    lengths = [17, 3, 64, 9] * 6
    tensors, grad, ends = make((lengths, lengths))
    relative = make_relative(tensors)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run("cpu", tensors, grad, ends, relative, dropout_p=0.1, seed=5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_views_of_one_projection():
    """As layers hand them over: query, key and value interleaved, tables beside each other."""
    (q, k, v), grad, ends = make(LENGTHS["same"])
    relative = make_relative((q, k, v))
    expected = run("cpu", (q, k, v), grad, ends, relative)
    views = torch.stack([q, k, v], dim=1).unbind(1)
    tables = torch.stack([relative.keys, relative.queries], dim=1).unbind(1)
    assert not tables[0].is_contiguous()
    own = RelativePositions(relative.slots, *tables, relative.bias)
    leaves = [one.detach().requires_grad_() for one in (*views, *tables)]
    out = varlen_attention(
        *leaves[:3], *ends, relative=RelativePositions(own.slots, *leaves[3:], own.bias)
    )
    found = torch.autograd.grad(out, leaves, grad)
    for ours, theirs in zip((out, *found), expected, strict=False):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [0, 0]), ([0, 3], [5, 0])])
def test_nothing_to_attend(backend, lengths):
    tensors, grad, ends = make(lengths, size=16)
    for result in run(backend, tensors, grad, ends, make_relative(tensors)):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("terms", [TERMS, ["bias"]], ids=str)
def test_opcheck(backend, terms):
    (q, k, v), grad, ends = make(([3, 5], [3, 5]), size=16)
    relative = make_relative((q, k, v), terms)
    tables = (relative.slots, relative.keys, relative.queries, relative.bias)
    for positions in (None, torch.arange(8, dtype=torch.int32)):
        places = (*ends, positions, *tables, positions)
        options = (0.25, 0.1, 3, backend)
        op = torch.ops.rerank_fast.relative_attention.default
        torch.library.opcheck(op, (q, k, v, *places, *options))
        out, lse = op(q, k, v, *places, *options)
        torch.library.opcheck(
            torch.ops.rerank_fast.relative_attention_backward.default,
            (q, k, v, out, lse, grad, *places, *options),
        )


def test_compiles_as_one_graph():
    tensors, grad, ends = make(([3, 5], [3, 5]), size=16)
    given = make_relative(tensors)
    leaves = [t.requires_grad_() for t in (*tensors, given.keys, given.queries)]

    def twice(q, k, v, keys, queries):
        relative = RelativePositions(given.slots, keys * 2, queries, given.bias)
        return varlen_attention(q * 2, k, v, *ends, relative=relative)

    expected = torch.autograd.grad(twice(*leaves), leaves, grad)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*leaves), leaves, grad), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_differentiating_twice_raises():
    tensors, grad, ends = make(([3], [3]), size=16)
    leaves = [t.requires_grad_() for t in tensors]
    out = varlen_attention(*leaves, *ends, relative=make_relative(tensors))
    (first,) = torch.autograd.grad((out.square() * grad).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def test_errors_say_what_was_expected_and_what_came():
    tensors, _, ends = make(([3, 5], [3, 5]), size=16)
    good = make_relative(tensors)
    wrong = [
        ({"slots": good.slots.long()}, {}, "relative.slots must be torch.int32"),
        ({"slots": good.slots[1:]}, {}, r"\(2 \* reach \+ 1,\), an odd number"),
        ({"slots": good.slots + 1}, {}, "relative.slots must be from 0 to 15, got 1 to 16"),
        ({"slots": good.slots - 1}, {"backend": "reference"}, "from 0 to 15, got -1 to 14"),
        ({"keys": good.keys[:, :1]}, {}, r"relative.keys must be .* \(16, 2, 16\)"),
        ({"queries": good.queries[1:]}, {}, r"relative.queries must be .* \(16, 2, 16\)"),
        ({"bias": good.bias.double()}, {}, "relative.bias must be torch.float32"),
        ({"query_positions": ends[0]}, {}, r"relative.query_positions must be .* \(8,\)"),
        ({"keys": None, "queries": None, "bias": None}, {}, "keys, queries or bias"),
        ({}, {"causal": True}, "causal=False, window=None and softcap=None"),
        ({}, {"window": (3, 3)}, "causal=False, window=None and softcap=None"),
        ({}, {"backend": "flash"}, "'flash' has no relative positions"),
    ]
    for changes, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            varlen_attention(*tensors, *ends, relative=replace(good, **changes), **options)
    grouped = (tensors[0], *(t[:, :1] for t in tensors[1:]))
    with pytest.raises(ValueError, match="as many heads of keys as of queries, got 1 and 2"):
        varlen_attention(*grouped, *ends, relative=good)
