"""varlen_attention against the fp64 reference; Triton natively on a GPU, else in its
interpreter.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rerank_fast.ops import cpu
from rerank_fast.ops import dropout as specification
from rerank_fast.ops.cpu import attention as cpu_attention
from rerank_fast.ops.varlen_attention import varlen_attention
from tests.ops.conftest import each_instruction_set

HAS_GPU = torch.cuda.is_available()
BACKENDS = ["cpu", "triton"]
# (queries, keys) of every sequence: odd ones, one token, none, queries of a last layer, more than
# one block.
LENGTHS = {
    "same": ([5, 0, 67, 1], [5, 0, 67, 1]),
    "one query": ([1, 1, 1, 1], [7, 64, 65, 1]),
    "fewer queries": ([4, 40, 3], [9, 66, 17]),
    "more queries": ([9, 20, 5], [4, 17, 0]),
}
SEED = 0x1234_5678_9ABC_DEF0 >> 2


def require(backend: str, dtype: torch.dtype = torch.float32) -> None:
    if backend == "cpu":
        assert cpu.available(), cpu.unavailable_reason()
        return
    pytest.importorskip("triton")
    if not HAS_GPU and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes in numpy, which has no bf16")


def make(lengths, *, heads=2, kv_heads=2, size=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = lengths

    def rows(count, number):
        return torch.randn(count, number, size, generator=generator).to(dtype)

    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(part)], dtype=torch.int32) for part in lengths
    )
    tensors = rows(sum(queries), heads), rows(sum(keys), kv_heads), rows(sum(keys), kv_heads)
    return tensors, rows(sum(queries), heads), (cu_q, cu_k)


def run(backend, tensors, grad, ends, **options):
    """out, dq, dk, dv through the public function, on the CPU again."""
    device = "cuda" if backend not in ("cpu", "reference") and HAS_GPU else "cpu"
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
    out = varlen_attention(*leaves, *(end.to(device) for end in ends), backend=backend, **options)
    return [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, leaves, grad.to(device)))]


def assert_close(backend, lengths, *, dtype=torch.float32, heads=1, kv_heads=1, size=16, **options):
    """Kernel error <= that of the eager formula in the same dtype, and a few roundings; on the CPU
    of every instruction set's.
    """
    require(backend, dtype)
    tensors, grad, ends = make(lengths, heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    eager = run("reference", tensors, grad, ends, **options)
    exact = run("reference", [t.double() for t in tensors], grad.double(), ends, **options)
    for kernels in each_instruction_set(backend):
        actual = run(backend, tensors, grad, ends, **options)
        for ours, theirs, true in zip(actual, eager, exact, strict=True):
            assert ours.dtype == dtype
            assert ours.shape == true.shape
            if true.numel():
                error = (ours.double() - true).abs().max()
                eager_error = (theirs.double() - true).abs().max()
                # Scores reach some tens, so that 2^score has lost bits that the sums then share.
                rounding = (64 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
                budget = 1.5 * eager_error + rounding * true.abs().max() + 1e-12
                assert error <= budget, (kernels, error, eager_error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [12, 16, 32, 40, 64, 96, 128])
def test_head_sizes(backend, size):
    assert_close(backend, ([5, 35], [5, 35]), size=size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (3, 2)},
        {"window": (8, -1)},
        {"causal": True, "window": (4, -1)},
        {"window": (2**31 - 1, 2**31 - 1)},
    ],
    ids=str,
)
def test_lengths_and_masks(backend, lengths, options):
    assert_close(backend, LENGTHS[lengths], **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_grouped_queries(backend, dropout_p):
    assert_close(
        backend,
        ([5, 0, 21], [5, 0, 21]),
        heads=4,
        kv_heads=2,
        causal=True,
        dropout_p=dropout_p,
        seed=SEED,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", ["same", "one query"])
@pytest.mark.parametrize("seed", [0, SEED])
def test_dropout_drops_the_same_everywhere(backend, lengths, seed):
    """One probability that is kept here and dropped there would be an error of its own size."""
    assert_close(backend, LENGTHS[lengths], heads=2, kv_heads=2, dropout_p=0.4, seed=seed)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("triton", torch.float32),
        ("reference", torch.float64),
    ],
)
@pytest.mark.parametrize(
    ("lengths", "chosen"), [("same", [2, 3]), ("one query", [1, 3]), ("fewer queries", [0, 2])]
)
def test_some_sequences_alone_lose_what_they_lost_among_all(backend, dtype, lengths, chosen):
    require(backend if backend != "reference" else "cpu", dtype)
    tensors, grad, ends = make(LENGTHS[lengths], heads=2, kv_heads=1, dtype=dtype)
    whole = run(backend, tensors, grad, ends, dropout_p=0.4, seed=SEED)
    of_q, of_k = (torch.cat([torch.arange(end[n], end[n + 1]) for n in chosen]) for end in ends)
    few = [[part[n] for n in chosen] for part in LENGTHS[lengths]]
    cut = tuple(torch.tensor([0, *itertools.accumulate(part)], dtype=torch.int32) for part in few)
    case = (tensors[0][of_q], tensors[1][of_k], tensors[2][of_k]), grad[of_q], cut
    rows = of_q.int().to("cuda" if backend == "triton" and HAS_GPU else "cpu")
    alone = run(backend, *case, dropout_p=0.4, seed=SEED, rows=rows)
    for ours, theirs, kept in zip(alone, whole, (of_q, of_q, of_k, of_k), strict=True):
        assert torch.equal(ours, theirs[kept])
    assert not torch.equal(run(backend, *case, dropout_p=0.4, seed=SEED)[0], alone[0])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.bfloat16), ("triton", torch.float16), ("triton", torch.bfloat16)],
)
@pytest.mark.parametrize("options", [{}, {"causal": True, "dropout_p": 0.2, "seed": SEED}], ids=str)
def test_half_precision(backend, dtype, options):
    assert_close(backend, LENGTHS["same"], dtype=dtype, **options)


CAPS = [0.3, 4.0, 1e4]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_softcap(backend, softcap, lengths):
    """Most scores beyond the cap, some, and none: there a cap that loses bits would show."""
    options = {"scale": 1.0, "softcap": softcap}
    assert_close(backend, LENGTHS[lengths], size=12, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (3, 2)},
        {"causal": True, "window": (4, -1)},
        {"causal": True, "dropout_p": 0.3, "seed": SEED},
        {"scale": -0.5},
    ],
    ids=str,
)
def test_softcap_of_groups_and_masks(backend, options):
    lengths = ([5, 0, 37, 1, 3], [5, 0, 37, 1, 9])
    assert_close(backend, lengths, heads=4, kv_heads=2, size=20, softcap=2.0, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_of_the_widest_heads(backend):
    assert_close(backend, ([3, 19], [3, 19]), size=256, causal=True, softcap=2.0)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.bfloat16), ("triton", torch.float16), ("triton", torch.bfloat16)],
)
@pytest.mark.parametrize("softcap", CAPS)
def test_softcap_in_half_precision(backend, dtype, softcap):
    """Of a size that products of bf16 pairs take, and of one that those of fp32 do."""
    drops = {"window": (9, 4), "dropout_p": 0.2, "seed": SEED}
    for size, options in ((32, {"causal": True}), (32, drops), (40, {"causal": True})):
        assert_close(backend, LENGTHS["same"], dtype=dtype, size=size, softcap=softcap, **options)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_softcap_of_scores_of_some_hundreds(backend):
    require(backend if backend != "reference" else "cpu")
    tensors, grad, ends = make(LENGTHS["same"], size=16)
    tensors = (tensors[0] * 30, tensors[1] * 30, tensors[2])
    for _ in each_instruction_set(backend):
        actual = run(backend, tensors, grad, ends, softcap=20.0)
        exact = run("reference", [t.double() for t in tensors], grad.double(), ends, softcap=20.0)
        torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-3, atol=1e-3)
        assert all(torch.isfinite(x).all() for x in actual)


def test_softcap_is_tanh_of_scores_before_they_are_masked():
    q, k = torch.tensor([[[3.0]], [[-2.0]]]), torch.tensor([[[1.0]], [[5.0]]])
    v, ends = torch.tensor([[[1.0]], [[10.0]]]), torch.tensor([0, 2], dtype=torch.int32)
    out = varlen_attention(
        q, k, v, ends, ends, scale=0.5, softcap=2.0, causal=True, backend="reference"
    )
    first, second = (2 * math.tanh(score / 2) for score in (-2 * 1 * 0.5, -2 * 5 * 0.5))
    weight = math.exp(first) / (math.exp(first) + math.exp(second))
    assert out.flatten().tolist() == pytest.approx([1.0, weight + 10 * (1 - weight)])


@pytest.mark.parametrize("size", [12, 16, 32, 40, 48, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_bf16_head_sizes(size, lengths):
    """12 and 40 are computed in fp32 everywhere, the others in products of pairs where a processor
    has them.
    """
    assert_close("cpu", LENGTHS[lengths], dtype=torch.bfloat16, size=size)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (3, 2)},
        {"window": (8, -1)},
        {"window": (40, 2)},
        {"dropout_p": 0.3, "seed": SEED},
    ],
    ids=str,
)
def test_bf16_masks(lengths, options):
    assert_close(
        "cpu", LENGTHS[lengths], dtype=torch.bfloat16, heads=4, kv_heads=2, size=32, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(3, 2), (40, 0), (-1, 5)])
@pytest.mark.parametrize("lengths", [([40], [300]), ([300], [40]), ([150], [150])], ids=str)
def test_windows_that_leave_whole_blocks_out(dtype, window, lengths):
    assert_close("cpu", lengths, dtype=dtype, size=32, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.5])
def test_scales(dtype, scale):
    """The largest score is not that of the largest product where the scale is not above 0."""
    options = {"causal": True, "window": (7, -1)}
    assert_close(
        "cpu", LENGTHS["same"], dtype=dtype, heads=2, kv_heads=1, size=32, scale=scale, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_length(dtype):
    """Tiles that are full, and that lack one query or one key."""
    lengths = [*range(1, 36), 63, 64, 65, 97]
    assert_close("cpu", (lengths, lengths), dtype=dtype, size=16)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("cut", [(0, 9, 5), (0, 4, 8), (1, 4, 9), (0, -1, 9), (0, 50, 9)])
def test_the_kernels_themselves_refuse_sequences_that_do_not_fit(cut):
    """Where a program is compiled, nothing else looks at their values any more."""
    (q, k, v), grad, ends = make(([4, 5], [4, 5]))
    bad = torch.tensor(cut, dtype=torch.int32)
    options = (1.0, -1, -1, 0.0, 0)
    with pytest.raises(ValueError, match="must rise from 0 to 9 tokens, got"):
        cpu_attention.varlen_attention_forward(q, k, v, ends[0], bad, None, *options)
    out, lse = cpu_attention.varlen_attention_forward(q, k, v, *ends, None, *options)
    with pytest.raises(ValueError, match="must rise from 0 to 9 tokens, got"):
        cpu_attention.varlen_attention_backward(
            q, k, v, out, lse, grad, bad, ends[1], None, *options
        )


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_query_may_not_read_is_as_if_it_were_not_there(dtype):
    """Bit for bit: a key that is masked weighs exactly nothing."""
    (q, k, v), grad, ends = make(([40], [40]), size=32, dtype=dtype)
    full = run("cpu", (q, k, v), grad, ends, causal=True)
    few = torch.tensor([0, 23], dtype=torch.int32)
    cut = run("cpu", (q[:23], k[:23], v[:23]), grad[:23], (few, few), causal=True)
    assert torch.equal(full[0][:23], cut[0])
    assert torch.equal(full[1][:23], cut[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend):
    """Scores of some hundreds: without the running maximum the exponentials overflow."""
    require(backend)
    tensors, grad, ends = make(LENGTHS["same"], size=16)
    tensors = (tensors[0] * 30, tensors[1] * 30, tensors[2])
    actual = run(backend, tensors, grad, ends)
    exact = run("reference", [t.double() for t in tensors], grad.double(), ends)
    torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-3, atol=1e-3)
    assert all(torch.isfinite(x).all() for x in actual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_projection_and_strided_gradients(backend):
    """As layers hand them over: query, key and value interleaved, and a gradient that is a view."""
    require(backend)
    (q, k, v), grad, ends = make(LENGTHS["same"])
    joined = torch.stack([q, k, v], dim=1)
    views = joined.unbind(1)
    assert not views[0].is_contiguous()
    wide = torch.stack([grad, grad], dim=2)[:, :, 0]
    turned = grad.transpose(1, 2).contiguous().transpose(1, 2)  # rows of a head are not contiguous
    expected = run(backend, (q, k, v), grad, ends)
    for upstream in (wide, turned):
        for ours, theirs in zip(run(backend, views, upstream, ends), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.bfloat16), ("triton", torch.float32)],
)
def test_every_output_is_written(backend, dtype, monkeypatch):
    """Fresh buffers hold NaN: what a kernel leaves out shows."""
    require(backend)
    tensors, grad, ends = make(LENGTHS["more queries"], size=16, dtype=dtype)
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **o: empty(*a, **o).fill_(float("nan")) if "dtype" in o else empty(*a, **o),
    )
    actual = run(backend, tensors, grad, ends, causal=True)
    monkeypatch.undo()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for ours, theirs in zip(
        actual, run("reference", tensors, grad, ends, causal=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.bfloat16), ("triton", torch.float32)],
)
def test_what_lies_beyond_a_sequence_is_not_read(backend, dtype):
    require(backend)
    tensors, grad, ends = make(([6, 7], [6, 7]), size=16, dtype=dtype)
    both = run(backend, tensors, grad, ends)
    poisoned = [t.clone() for t in tensors]
    for t in poisoned:
        t[6:] = float("nan")
    alone = run(backend, poisoned, grad, ends)
    for ours, theirs in zip(alone, both, strict=True):
        assert torch.equal(ours[:6], theirs[:6])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.bfloat16), ("triton", torch.float32)],
)
def test_the_same_bits_every_time(backend, dtype):
    require(backend)
    case = make(LENGTHS["same"], heads=2, kv_heads=1, size=16, dtype=dtype)
    first, second = (run(backend, *case, dropout_p=0.1, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype):
    require("cpu")
    case = make(LENGTHS["same"], dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run("cpu", *case, dropout_p=0.1, seed=5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [0, 0]), ([0, 3], [5, 0])])
def test_nothing_to_attend(backend, lengths):
    require(backend if backend != "reference" else "cpu")
    tensors, grad, ends = make(lengths, size=16)
    results = run(backend, tensors, grad, ends)
    for result, like in zip(results, (tensors[0], *tensors), strict=True):
        assert torch.equal(result, torch.zeros_like(like))


def test_reference_equals_torch_on_each_sequence():
    (q, k, v), _, ends = make(LENGTHS["same"], heads=4, kv_heads=2)
    out = varlen_attention(q, k, v, *ends, causal=True, backend="reference")
    for start, end in itertools.pairwise(ends[0].tolist()):
        parts = [x[None, start:end].transpose(1, 2) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *parts, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(
            out[start:end], expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5
        )


def test_dropout_is_of_its_rate_and_without_pattern():
    factors = specification.dropout_factors(SEED, 3, torch.arange(400), 500, 0.3)
    kept = factors > 0
    assert torch.equal(factors[kept], torch.full_like(factors[kept], 1 / 0.7))
    share = kept.double()
    # Five standard deviations of a fair draw: over everything, over rows, over columns, and of
    # neighbours.
    assert abs(share.mean() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    assert (share.mean(1) - 0.7).abs().max() < 5 * (0.21 / 500) ** 0.5
    assert (share.mean(0) - 0.7).abs().max() < 5 * (0.21 / 400) ** 0.5
    for shifted in (share[1:] * share[:-1], share[:, 1:] * share[:, :-1]):
        assert abs(shifted.mean() - 0.49) < 5 * (0.25 / shifted.numel()) ** 0.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": (2, 1)},
        {"causal": True, "dropout_p": 0.3, "seed": 7},
        {"causal": True, "softcap": 0.8},
        {"window": (2, 1), "dropout_p": 0.3, "softcap": 3.0},
    ],
    ids=str,
)
def test_gradcheck(options):
    tensors, _, ends = make(
        ([2, 0, 4], [2, 0, 4]), heads=2, kv_heads=1, size=2, dtype=torch.float64
    )
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, *ends, backend="reference", **options), leaves
    )


def test_differentiating_twice_raises():
    tensors, grad, ends = make(([3], [3]), size=16)
    leaves = [t.requires_grad_() for t in tensors]
    out = varlen_attention(*leaves, *ends)
    (first,) = torch.autograd.grad((out.square() * grad).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    (q, k, v), grad, ends = make(([3, 5], [3, 5]), size=16)
    for rows, softcap in ((None, ()), (torch.arange(8, 16, dtype=torch.int32), (2.0,))):
        options = (rows, 0.25, -1, 0, 0.1, 3, backend, *softcap)
        torch.library.opcheck(
            torch.ops.rerank_fast.varlen_attention.default, (q, k, v, *ends, *options)
        )
        out, lse = torch.ops.rerank_fast.varlen_attention.default(q, k, v, *ends, *options)
        arguments = (q, k, v, out, lse, grad, *ends, *options)
        torch.library.opcheck(torch.ops.rerank_fast.varlen_attention_backward.default, arguments)


def test_compiles_as_one_graph():
    tensors, grad, ends = make(([3, 5], [3, 5]), size=16)
    leaves = [t.requires_grad_() for t in tensors]

    def twice(q, k, v):
        return varlen_attention(q * 2, k, v, *ends, causal=True, softcap=2.0)

    expected = torch.autograd.grad(twice(*leaves), leaves, grad)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*leaves), leaves, grad), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_errors_say_what_was_expected_and_what_came():
    (q, k, v), _, (cu_q, cu_k) = make(([3, 5], [3, 5]), size=16)
    wrong = [
        (
            lambda: varlen_attention(q[0], k, v, cu_q, cu_k),
            r"q must be .*\(tokens, heads, head_size\), got",
        ),
        (lambda: varlen_attention(q, k.half(), v, cu_q, cu_k), "one dtype"),
        (
            lambda: varlen_attention(q, k[:, :1].repeat(1, 3, 1), v, cu_q, cu_k),
            "multiple of their heads",
        ),
        (lambda: varlen_attention(q, k, v, cu_q.long(), cu_k), "cu_seqlens_q must be int32"),
        (lambda: varlen_attention(q, k, v, cu_q, cu_k + 1), "rise from 0 to 8 tokens"),
        (lambda: varlen_attention(q, k, v, cu_q[[0, 2]], cu_k), "same sequences, got 1 and 2"),
        (lambda: varlen_attention(q, k, v, cu_q, cu_k, window=(-2, 0)), "window"),
        (lambda: varlen_attention(q, k, v, cu_q, cu_k, dropout_p=1.0), "dropout_p"),
        (
            lambda: varlen_attention(q, k, v, cu_q, cu_k, rows=cu_q),
            r"rows must be int32 of shape \(8,\)",
        ),
        (lambda: varlen_attention(q, k, v, cu_q, cu_k, backend="cuda"), "backend must be one of"),
        (
            lambda: varlen_attention(q.half(), k.half(), v.half(), cu_q, cu_k, backend="cpu"),
            "fp32 or bf16 CPU",
        ),
        (lambda: varlen_attention(q, k, v, cu_q, cu_k, backend="flash"), "flash.*NVIDIA GPU"),
        (
            lambda: varlen_attention(
                *(t.double() for t in (q, k, v)), cu_q, cu_k, backend="triton"
            ),
            "float64",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()


def test_dropout_scalars_are_the_references():
    """The host half of the generator that Triton's kernels use."""
    pytest.importorskip("triton")
    from rerank_fast.ops.triton import dropout

    for seed in (0, 1, SEED, 2**62 - 1):
        mixed, threshold, rescale = dropout.scalars(0.25, seed)
        low, high = (torch.tensor(part & 0xFFFFFFFF) for part in (seed, seed >> 32))
        expected = specification._mix(low ^ specification._mix(high))
        assert np.uint32(mixed & 0xFFFFFFFF) == expected.item()
        assert (threshold, rescale) == (2**30, 1 / 0.75)
