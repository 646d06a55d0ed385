"""The score head: the specification, the backends against it in fp64, validation, registration,
compilation.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rerank_fast.ops import cpu
from rerank_fast.ops.dropout import dropout_factors
from rerank_fast.ops.score_head import score_head
from tests.ops.conftest import each_instruction_set
from tests.ops.test_backends import require_triton

ACTIVATIONS = ["tanh", "gelu", "relu", "none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DROPPED = {"dropout_p": 0.3, "dropout_in_p": 0.2, "training": True, "seed": 12}
EAGER = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu, "none": lambda x: x}


def require(backend):
    if backend == "triton":
        require_triton()
    elif backend == "cpu":
        assert cpu.available(), cpu.unavailable_reason()


def inputs(n, hidden, width=None, *, tokens=None, dtype=torch.float64, seed=0, scale=1.0):
    """Hidden states, the rows that are read (None for all), and the weights."""
    width = hidden if width is None else width
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    index = None if tokens is None else torch.randperm(tokens, generator=generator)[:n]
    weights = (
        normal(width, hidden, std=scale * hidden**-0.5),
        normal(width, std=0.3),
        normal(1, width, std=width**-0.5),
        normal(1),
    )
    return normal(n if tokens is None else tokens, hidden), index, *weights


def eager(hidden, index, dense_weight, dense_bias, out_weight, out_bias, *, activation, **dropout):
    """Modules as a model runs them, every step rounded to the inputs' dtype."""
    x = hidden if index is None else hidden[index]
    rows = torch.arange(x.shape[0])
    if dropout.get("training") and dropout["dropout_in_p"]:
        x = x * dropout_factors(dropout["seed"], 1, rows, x.shape[1], dropout["dropout_in_p"]).to(
            x.dtype
        )
    active = EAGER[activation](F.linear(x, dense_weight, dense_bias))
    if dropout.get("training") and dropout["dropout_p"]:
        active = active * dropout_factors(
            dropout["seed"], 0, rows, active.shape[1], dropout["dropout_p"]
        ).to(x.dtype)
    return F.linear(active, out_weight, out_bias).squeeze(1)


def run(function, tensors, upstream, **options):
    """Scores, and the gradients of the five tensors that have one."""
    hidden, index, *weights = tensors
    leaves = [
        None if t is None else t.detach().clone().requires_grad_() for t in (hidden, *weights)
    ]
    scores = function(leaves[0], index, *leaves[1:], **options)
    scores.backward(upstream.to(scores.dtype))
    return [scores.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def assert_within_budget(backend, tensors, **options):
    """Kernel error <= error of the eager modules in the same dtype, plus rounding of the result; on
    the CPU of every instruction set's.
    """
    require(backend)
    index, dtype = tensors[1], tensors[0].dtype
    n = tensors[0].shape[0] if index is None else index.shape[0]
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(4))
    theirs = run(eager, tensors, upstream, **options)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    exact = run(score_head, wide, upstream, backend="reference", **options)
    names = ("scores", "hidden", "dense_weight", "dense_bias", "out_weight", "out_bias")
    # Triton's interpreter rounds to 16 bits by cutting off: twice the error.
    interpreted = backend == "triton" and not torch.cuda.is_available()
    cut = 2 if interpreted and dtype != torch.float32 else 1
    for kernels in each_instruction_set(backend):
        ours = run(score_head, tensors, upstream, backend=backend, **options)
        for name, actual, rounded, true in zip(names, ours, theirs, exact, strict=True):
            if true is None:
                assert actual is None
                continue
            assert actual.dtype == (torch.float32 if name == "scores" else dtype)
            assert actual.shape == true.shape
            rounding = (8 if actual.dtype == torch.float32 else 1) * torch.finfo(actual.dtype).eps
            if true.numel():
                # In the norm: where a bf16 value rounds across relu's corner, single elements
                # differ by their size.
                error, eager_error = (actual - true).norm(), (rounded - true).norm()
                budget = cut * (eager_error + rounding * true.norm()) + 1e-30
                assert error <= budget, (kernels, name, error, eager_error)


def test_two_rows_worked_out_on_paper():
    hidden = torch.tensor([[9.0, 9.0], [1.0, -2.0], [0.5, 0.25]])
    dense, bias = torch.tensor([[1.0, 0.5], [2.0, 1.0]]), torch.tensor([0.5, -1.0])
    out = torch.tensor([[2.0, -3.0]])
    scores = score_head(
        hidden,
        torch.tensor([2, 1]),
        dense,
        bias,
        out,
        torch.tensor([0.25]),
        activation="relu",
        backend="reference",
    )
    # Row 2: relu(0.625 + 0.5, 1.25 - 1) = (1.125, 0.25); row 1: relu(0 + 0.5, 0 - 1) = (0.5, 0).
    assert scores.tolist() == [2 * 1.125 - 3 * 0.25 + 0.25, 2 * 0.5 + 0.25]
    tanh = score_head(
        hidden, torch.tensor([1]), dense, bias, out, None, activation="tanh", backend="reference"
    )
    assert tanh.item() == pytest.approx(2 * math.tanh(0.5) - 3 * math.tanh(-1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [{}, DROPPED], ids=["kept", "dropped"])
@pytest.mark.parametrize("tokens", [None, 9])
def test_gradients_of_the_reference(activation, options, tokens):
    hidden, index, *weights = inputs(4, 5, 3, tokens=tokens)

    def function(*leaves):
        return score_head(leaves[0], index, *leaves[1:], activation=activation, **options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (hidden, *weights)])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [((5, 7, 3, 11), {}), ((37, 72, 40, 99), DROPPED)],
    ids=["kept", "dropped"],
)
def test_small_shapes(backend, activation, dtype, shape, options):
    *sizes, tokens = shape
    tensors = inputs(*sizes, tokens=tokens, dtype=dtype)
    assert_within_budget(backend, tensors, activation=activation, **options)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_one_row_of_one(backend):
    require(backend)
    tensors, upstream = inputs(1, 1, dtype=torch.float32), torch.tensor([0.7])
    expected = run(score_head, tensors, upstream, backend="reference")
    for ours, theirs in zip(
        run(score_head, tensors, upstream, backend=backend), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("place", "n", "size"),
    [(0, 33, 312), (1, 1000, 384), (2, 100, 768), (3, 64, 1024), (4, 4096, 96)],
)
def test_cpu_at_models_sizes(place, n, size, activation):
    """Dtypes are dealt out: each meets every size and every activation."""
    dtype = DTYPES[(place + ACTIVATIONS.index(activation)) % 3]
    tensors = inputs(n, size, tokens=n + 50, dtype=dtype)
    assert_within_budget("cpu", tensors, activation=activation, **(DROPPED if n % 2 == 0 else {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "hidden", "width", "tokens"),
    [(18, 312, 33, 40), (3, 20, 384, None), (2, 768, 20, 5), (2, 8, 1024, None)],
)
def test_triton_at_models_sizes(n, hidden, width, tokens, dtype):
    """One side at a time: the interpreter takes minutes for both."""
    tensors = inputs(n, hidden, width, tokens=tokens, dtype=dtype)
    options = DROPPED if hidden in (312, 8) else {}
    assert_within_budget("triton", tensors, activation="tanh", **options)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_tiny_activations(backend, activation):
    tensors = inputs(20, 16, 24, dtype=torch.float32, scale=1e4)
    assert_within_budget(backend, tensors, activation=activation)
    hidden, index, dense_weight, _, *out = inputs(20, 16, 24, dtype=torch.float32, scale=1e-4)
    assert_within_budget(
        backend, (hidden, index, dense_weight, None, out[0], None), activation=activation
    )


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_the_mask_is_the_generators(backend):
    """Every backend drops the elements that dropout_factors names, before and after the dense
    layer.
    """
    require(backend)
    n, size = 40, 33
    hidden, weight = torch.ones(n, size), torch.randn(1, size)
    eye = torch.eye(size)
    for seed in (0, 7, 2**40 + 3, 2**62 - 1):
        for stream, name in ((0, "dropout_p"), (1, "dropout_in_p")):
            factors = dropout_factors(seed, stream, torch.arange(n), size, 0.25).float()
            options = {name: 0.25, "training": True, "seed": seed}
            scores = score_head(
                hidden, None, eye, None, weight, None, activation="none", backend=backend, **options
            )
            torch.testing.assert_close(
                scores, (factors @ weight.t()).squeeze(1), rtol=1e-5, atol=1e-5
            )
            assert 0.2 < (factors == 0).float().mean() < 0.3


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_nothing_is_dropped_outside_training(backend):
    require(backend)
    tensors = inputs(6, 20, dtype=torch.float32)
    kept = score_head(*tensors, backend=backend)
    assert torch.equal(score_head(*tensors, backend=backend, **DROPPED | {"training": False}), kept)
    assert not torch.allclose(score_head(*tensors, backend=backend, **DROPPED), kept)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart_and_indices_of_32_bits(backend, dtype):
    """The first tokens of a padded batch, columns that are no run of memory, and rows that nobody
    reads.
    """
    require(backend)
    states = torch.randn(5, 6, 18).to(dtype)
    first = states[:, 0].clone()
    _, _, *weights = inputs(5, 18, dtype=dtype)
    upstream = torch.randn(5)
    expected = run(score_head, (first, None, *weights), upstream, backend=backend)
    flat, cu_seqlens = states.flatten(0, 1), torch.arange(0, 31, 6, dtype=torch.int32)
    for index in (cu_seqlens[:-1], cu_seqlens[:-1].long(), torch.arange(0, 60, 6)[::2].clone()[:5]):
        rows = index if index.max() < 30 else torch.arange(0, 30, 6)
        actual = run(score_head, (flat, rows, *weights), upstream, backend=backend)
        for ours, theirs in zip(
            (actual[0], *actual[2:]), (expected[0], *expected[2:]), strict=True
        ):
            assert torch.equal(ours, theirs)
        assert torch.equal(actual[1].view(5, 6, 18)[:, 0], expected[1])
        assert (actual[1].view(5, 6, 18)[:, 1:] == 0).all()
    for hidden in (states[:, 0], first.t().contiguous().t()):
        leaf = hidden.detach().requires_grad_()
        scores = score_head(leaf, None, *weights, backend=backend)
        scores.backward(upstream)
        assert torch.equal(scores, expected[0])
        assert torch.equal(leaf.grad, expected[1])
    transposed = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
    for ours, theirs in zip(
        run(score_head, (first, None, *transposed), upstream, backend=backend),
        expected,
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_that_are_asked_for(backend, wanted):
    require(backend)
    tensors = inputs(6, 12, 8, tokens=9, dtype=torch.float32)
    upstream = torch.randn(6)
    expected = run(score_head, tensors, upstream, backend=backend, **DROPPED)[1:]
    hidden, index, *weights = tensors
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((hidden, *weights))]
    score_head(leaves[0], index, *leaves[1:], backend=backend, **DROPPED).backward(upstream)
    assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(5)]
    assert torch.equal(leaves[wanted].grad, expected[wanted])
    options = ("tanh", 0.3, 0.2, 12, backend)
    _, dense = torch.ops.rerank_fast.score_head.default(hidden, index, *weights, *options)
    grads = torch.ops.rerank_fast.score_head_backward.default(
        upstream, hidden, index, *weights[:3], dense, [i == wanted for i in range(5)], *options
    )
    assert [grad.numel() > 0 for grad in grads] == [i == wanted for i in range(5)]


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("tokens", [None, 0, 7])
def test_no_rows(backend, tokens):
    require(backend)
    tensors = inputs(0, 12, 8, tokens=tokens, dtype=torch.float32)
    results = run(score_head, tensors, torch.zeros(0), backend=backend, **DROPPED)
    assert results[0].shape == (0,)
    for grad, tensor in zip(results[1:], (tensors[0], *tensors[2:]), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_is_written(backend, dtype):
    require(backend)
    before = torch.are_deterministic_algorithms_enabled()
    upstream = torch.randn(21)
    for tokens in (None, 50):
        tensors = inputs(21, 40, 30, tokens=tokens, dtype=dtype)
        expected = run(score_head, tensors, upstream, backend=backend, **DROPPED)
        try:
            torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
            poisoned = run(score_head, tensors, upstream, backend=backend, **DROPPED)
        finally:
            torch.use_deterministic_algorithms(before)
        for ours, theirs in zip(poisoned, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_seen_and_stays_in_its_row(backend, activation):
    require(backend)
    hidden, index, *weights = inputs(20, 12, dtype=torch.float32)
    hidden[3, 5] = math.nan
    scores = score_head(hidden, index, *weights, activation=activation, backend=backend)
    assert scores.isnan().tolist() == [i == 3 for i in range(20)]


def test_cpu_gives_the_same_bits_whatever_the_threads():
    """Sums over rows are ours; products are the machine's own, and here of sixteenths, which are
    exact in whatever order.
    """
    hidden, index, weight, *rest = inputs(300, 64, 48, tokens=400, dtype=torch.float32)
    hidden, weight = ((16 * one).round() / 16 for one in (hidden, weight))
    tensors, upstream = (hidden, index, weight, *rest), torch.randn(300)
    dropped = {**DROPPED, "dropout_in_p": 0.5}  # what is kept counts twice
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(score_head, tensors, upstream, backend="cpu", **dropped))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[3], results[0][3])
        assert torch.equal(result[4], results[0][4])


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_autocast_changes_nothing(backend):
    require(backend)
    tensors, upstream = inputs(9, 24, dtype=torch.float32), torch.randn(9)
    expected = run(score_head, tensors, upstream, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(score_head, tensors, upstream, backend=backend)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_differentiating_twice_raises():
    hidden, index, *weights = inputs(3, 8, dtype=torch.float32)
    hidden.requires_grad_()
    upstream = torch.ones(3, requires_grad=True)
    scores = score_head(hidden, index, *weights)
    (grad,) = torch.autograd.grad(scores, hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tokens", [None, 9])
def test_opcheck(backend, tokens):
    hidden, index, *weights = inputs(4, 10, 6, tokens=tokens, dtype=torch.float32)
    options = ("gelu", 0.1, 0.2, 3, backend)
    torch.library.opcheck(
        torch.ops.rerank_fast.score_head.default, (hidden, index, *weights, *options)
    )
    for wants in ([True] * 5, [False, True, False, True, False]):
        _, dense = torch.ops.rerank_fast.score_head.default(hidden, index, *weights, *options)
        arguments = (torch.randn(4), hidden, index, *weights[:3], dense, wants, *options)
        torch.library.opcheck(torch.ops.rerank_fast.score_head_backward.default, arguments)


def test_compiles_whole():
    def step(*tensors):
        return 2 * score_head(tensors[0] * 1.5, *tensors[1:], activation="gelu", **DROPPED)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9):
        tensors, upstream = inputs(n, 10, 6, tokens=20, dtype=torch.float32), torch.randn(n)
        for ours, theirs in zip(
            run(compiled, tensors, upstream), run(step, tensors, upstream), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_bert_and_roberta_modules_are_what_it_computes():
    """Against nn modules in evaluation, where nothing is random."""
    hidden = torch.randn(3, 5, 16)
    dense, out = nn.Linear(16, 16), nn.Linear(16, 1)
    head = nn.Sequential(nn.Dropout(0.1), dense, nn.Tanh(), nn.Dropout(0.1), out).eval()
    weights = (dense.weight, dense.bias, out.weight, out.bias)
    scores = score_head(hidden[:, 0], None, *weights, dropout_p=0.1, dropout_in_p=0.1)
    torch.testing.assert_close(scores, head(hidden[:, 0]).squeeze(1))


GOOD = dict(
    zip(
        ("hidden", "index", "dense_weight", "dense_bias", "out_weight", "out_bias"),
        inputs(3, 8, 6, tokens=5),
        strict=True,
    )
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(8, dtype=torch.float64)}, r"hidden must be .* of shape \(T, H\)"),
        ({"hidden": torch.zeros(5, 8, dtype=torch.int64)}, "hidden must be a floating-point"),
        (
            {"dense_weight": torch.zeros(6, 7, dtype=torch.float64)},
            r"dense_weight must have the shape \(6, 8\)",
        ),
        (
            {"dense_weight": torch.zeros(6, dtype=torch.float64)},
            r"dense_weight must have the shape \('D', 8\)",
        ),
        (
            {"dense_bias": torch.zeros(8, dtype=torch.float64)},
            r"dense_bias must have the shape \(6,\), got \(8,\)",
        ),
        (
            {"out_weight": torch.zeros(2, 6, dtype=torch.float64)},
            r"out_weight must have the shape \(1, 6\)",
        ),
        ({"out_bias": torch.zeros(2, dtype=torch.float64)}, r"out_bias must have the shape \(1,\)"),
        (
            {"out_weight": torch.zeros(1, 6)},
            "out_weight must have hidden's dtype and device, torch.float64 on cpu",
        ),
        (
            {"out_bias": torch.zeros(1, dtype=torch.float64, device="meta")},
            "got torch.float64 on meta",
        ),
        (
            {"index": torch.zeros(2, 1, dtype=torch.int64)},
            r"first_token_index must be int32 or int64 of shape \(N,\)",
        ),
        ({"index": torch.zeros(2)}, "first_token_index must be int32 or int64"),
        ({"index": torch.tensor([0, 5])}, "different rows from 0 to 4"),
        ({"index": torch.tensor([-1, 2])}, "different rows from 0 to 4"),
        ({"index": torch.tensor([2, 1, 2])}, r"different rows from 0 to 4, got \[2, 1, 2\]"),
        (
            {"index": torch.zeros(1, dtype=torch.int64, device="meta")},
            "first_token_index must be on hidden's device",
        ),
        ({"activation": "silu"}, "activation must be one of"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1"),
        ({"dropout_in_p": -0.1}, "dropout_in_p must be"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"backend": "cpu"}, "backend 'cpu' takes fp32, bf16 or fp16, got torch.float64"),
        ({"backend": "triton"}, "backend 'triton' takes fp32"),
    ],
)
def test_errors_say_what_is_wrong(change, message):
    arguments = GOOD | change
    options = {key: arguments.pop(key) for key in list(arguments) if key not in GOOD}
    with pytest.raises(ValueError, match=message):
        score_head(*arguments.values(), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_public_op_on_a_gpu_does_not_wait_for_it():
    hidden, index, *weights = (t.cuda() for t in inputs(40, 384, tokens=900, dtype=torch.bfloat16))
    leaves = [t.requires_grad_() for t in (hidden, *weights)]

    def step():
        score_head(leaves[0], index, *leaves[1:], **DROPPED).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
