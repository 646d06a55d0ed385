"""LambdaLoss's compiled backends against the fp64 reference (Triton natively on a GPU, else in its
interpreter), and which backend an op takes."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from rerank_fast.ops import cpu, registry
from rerank_fast.ops.approx_ranks import approx_ranks
from rerank_fast.ops.cpu import lists as cpu_lists
from rerank_fast.ops.lambda_loss import lambda_loss
from rerank_fast.ops.ndcg import ndcg
from rerank_fast.ops.reference import lambda_loss as reference
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention
from tests.ops.conftest import each_instruction_set

SCHEMES = ["none", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp"]
REDUCTIONS = ["pairs", "lists", "sum", "none"]
OPTIONS = {
    "scheme": "ndcg2pp",
    "k": 0,
    "sigma": 1.0,
    "mu": 10.0,
    "eps": 1e-10,
    "reduction_log": "binary",
    "reduction": "pairs",
}


def require_triton():
    triton = pytest.importorskip("triton")
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0" and not torch.cuda.is_available():
        pytest.skip("the interpreter of triton 3.6 does not run with numpy 2.4 and later")


def forward(backend, scores, labels, offsets, **options):
    if backend == "cpu":
        assert cpu.available(), cpu.unavailable_reason()
        return cpu_lists.lambda_loss_forward(scores, labels, offsets, **options)
    require_triton()
    from rerank_fast.ops.triton import lambda_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = lambda_loss.forward(
        scores.to(device), labels.to(device), offsets.to(device), **options
    )
    return tuple(result.cpu() for result in results)


def assert_within_budget(backend, scores, labels, offsets, **options):
    """Kernel error <= error of the eager formula in the same precision, plus rounding of the
    result; on the CPU of every instruction set's.
    """
    options = OPTIONS | options
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    labels = labels.to(wide)
    *eager, counted = reference.forward(scores, labels, offsets, **options)
    *exact, _ = reference.forward(scores.double(), labels.double(), offsets, **options)
    # For fp64 scores the reference rounds as much as the kernel does, so its own error can't be
    # told.
    rounding = (32 if wide == torch.float64 else 8) * torch.finfo(wide).eps
    finite = scores[scores.isfinite()].double()
    if backend == "triton" and len(finite):
        # 2^x of x = sigma / ln 2 * (s_i - s_j) is off by ln 2 * |x| times the two roundings of x,
        # half an eps each.
        rounding += (
            abs(options["sigma"]) * float(finite.max() - finite.min()) * torch.finfo(wide).eps
        )
    for kernels in each_instruction_set(backend):
        *results, pairs = forward(backend, scores, labels, offsets, **options)
        assert torch.equal(pairs, counted), kernels
        for ours, theirs, true in zip(results, eager, exact, strict=True):
            assert ours.dtype == wide
            assert ours.shape == true.shape
            known = ~true.isnan()
            assert torch.equal(~ours.isnan(), known), kernels
            ours, theirs, true = ours[known], theirs[known], true[known]
            if true.numel():
                error, eager_error = (ours - true).abs().max(), (theirs - true).abs().max()
                budget = eager_error + rounding * true.abs().max()
                budget += 1e-16 if wide == torch.float64 else 1e-30
                assert error <= budget, (kernels, error, eager_error)


def ragged(sizes, *, seed=0, grades=3, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = spread * torch.randn(n, generator=generator)
    labels = torch.randint(0, grades, (n,), generator=generator).float()
    return scores, labels, torch.tensor([0, *itertools.accumulate(sizes)])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grid(backend, scheme, reduction):
    """Cuts are dealt out: each meets every scheme and every reduction."""
    cuts = [(0, 1.0, "binary"), (3, 2.5, "natural"), (100, 0.3, "binary")]
    k, sigma, reduction_log = cuts[(SCHEMES.index(scheme) + REDUCTIONS.index(reduction)) % 3]
    lists = ragged([5, 0, 37, 1, 12])
    options = {
        "scheme": scheme,
        "k": k,
        "sigma": sigma,
        "reduction_log": reduction_log,
        "reduction": reduction,
    }
    assert_within_budget(backend, *lists, **options)


generated_lists = st.lists(
    st.lists(
        st.tuples(st.floats(-20, 20, width=16), st.integers(-1, 4)),
        min_size=0,
        max_size=12,
    ),
    min_size=0,
    max_size=4,
)


# Where in such a batch a score or a label becomes what: most batches stay as they are.
generated_damage = st.lists(
    st.tuples(
        st.integers(0, 47), st.booleans(), st.sampled_from([math.nan, math.inf, -math.inf, 1e30])
    ),
    max_size=2,
) | st.just([])


def flat_lists(lists, damage=()):
    flat = [document for documents in lists for document in documents]
    scores = torch.tensor([score for score, _ in flat], dtype=torch.float32)
    labels = torch.tensor([label for _, label in flat], dtype=torch.float32)
    for place, to_score, value in damage if flat else ():
        (scores if to_score else labels)[place % len(flat)] = value
    return scores, labels, torch.tensor([0, *itertools.accumulate(map(len, lists))])


@settings(max_examples=200, deadline=None)
@given(
    lists=generated_lists,
    damage=generated_damage,
    scheme=st.sampled_from(SCHEMES),
    k=st.integers(0, 6),
    sigma=st.sampled_from([0.5, 1.0, 4.0]),
    reduction=st.sampled_from(REDUCTIONS),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cpu_on_generated_lists(dtype, lists, damage, scheme, k, sigma, reduction):
    scores, labels, offsets = flat_lists(lists, damage)
    options = {"scheme": scheme, "k": k, "sigma": sigma, "reduction": reduction}
    assert_within_budget("cpu", scores.to(dtype), labels, offsets, **options)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("spread", [30.0, 1e4])
def test_extreme_score_differences(backend, scheme, spread):
    assert_within_budget(backend, *ragged([20, 9], spread=spread), scheme=scheme)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_large_labels_and_ties(backend):
    scores = torch.tensor([0.5, 0.5, -1.0, 2.0, 2.0, 0.0])
    labels = torch.tensor([1000.0, 999.0, 0.0, 500.0, 0.0, 1000.0])
    for scheme in SCHEMES:
        loss, grad, _ = forward(
            backend, scores, labels, torch.tensor([0, 6]), **OPTIONS | {"scheme": scheme}
        )
        assert loss.isfinite()
        assert grad.isfinite().all()
        assert_within_budget(backend, scores, labels, torch.tensor([0, 6]), scheme=scheme)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("sizes", [[], [0, 0], [1], [0, 2, 0]])
def test_outputs_are_written_where_nothing_counts(backend, sizes):
    scores, labels, offsets = ragged(sizes)
    loss, grad, pairs = forward(backend, scores, torch.ones_like(labels), offsets, **OPTIONS)
    assert loss.item() == pairs.item() == 0
    assert grad.tolist() == [0.0] * len(scores)


def test_one_long_list_and_threads_agree_with_the_reference():
    # The longest one is cut into row ranges for all threads.
    scores, labels, offsets = ragged([500, 300, 2100, 3], grades=5)
    assert_within_budget("cpu", scores, labels, offsets)
    assert_within_budget("cpu", scores, labels, offsets, k=100)
    assert_within_budget("cpu", scores, (labels > 3).float(), offsets)
    threads = torch.get_num_threads()
    for kernels in each_instruction_set():
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(cpu_lists.lambda_loss_forward(scores, labels, offsets, **OPTIONS))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0])), kernels


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("place", "k"), enumerate([0, 1, 2**40]))
def test_fp64_scores_keep_fp64_accuracy(scheme, place, k):
    lists = [
        tensor.double() if tensor.is_floating_point() else tensor
        for tensor in ragged([5, 0, 1, 35], grades=4)
    ]
    # sigma and mu are no fp32 numbers: they must not be rounded on the way.
    options = OPTIONS | {"scheme": scheme, "k": k, "sigma": 0.3, "mu": 7.1, "reduction": "lists"}
    exact = reference.forward(*lists, **options)
    # The interpreter takes its time: each scheme meets one of the cuts there.
    dealt = (SCHEMES.index(scheme) + place) % 3 == 0
    for backend in ("cpu", "triton") if dealt else ("cpu",):
        for _ in each_instruction_set(backend):
            for ours, true in zip(forward(backend, *lists, **options), exact, strict=True):
                assert ours.dtype == true.dtype
                torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-13)


def test_triton_refuses_cpu_tensors_outside_its_interpreter(monkeypatch):
    pytest.importorskip("triton")
    from rerank_fast.ops.triton import lambda_loss

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="got tensors on cpu; set TRITON_INTERPRET=1"):
        lambda_loss.forward(*ragged([3]), **OPTIONS)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_output_is_written(backend):
    lists = ragged([1, 0, 70, 2, 1, 1, 1, 1])
    before = torch.are_deterministic_algorithms_enabled()
    for reduction in REDUCTIONS:
        expected = forward(backend, *lists, **OPTIONS | {"reduction": reduction})
        try:
            torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
            poisoned = forward(backend, *lists, **OPTIONS | {"reduction": reduction})
        finally:
            torch.use_deterministic_algorithms(before)
        for ours, theirs in zip(poisoned, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("k", [0, 3, 50])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.98])
def test_cpu_rows_of_rare_labels_and_triangles(scheme, k, share):
    """The two ways through the pairs of a list: with binary labels the share of positives chooses
    between them.
    """
    generator = torch.Generator().manual_seed(1)
    sizes = [130, 17, 64, 2]
    scores, _, offsets = ragged(sizes)
    labels = (torch.rand(len(scores), generator=generator) < share).float()
    labels += (torch.rand(len(scores), generator=generator) < 0.03) * 2  # and a third one, rare
    assert_within_budget("cpu", scores, labels, offsets, scheme=scheme, k=k)
    # Labels that are sorted.
    assert_within_budget("cpu", scores, labels - 0.5, offsets, scheme=scheme, k=k)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e4])
@pytest.mark.parametrize("labels", ["graded", "binary", "fractions", "large"])
def test_cpu_sums_of_long_lists(scheme, spread, labels):
    """Hundreds of terms of about one size in a sum, where single precision would drift."""
    scores, grades, offsets = ragged([250, 600], spread=spread, grades=5)
    values = {
        "graded": grades,
        "binary": (grades > 3).float(),
        "fractions": grades / 3 - 0.5,
        "large": grades * 250,
    }
    assert_within_budget("cpu", scores, values[labels], offsets, scheme=scheme)
    assert_within_budget("cpu", scores, values[labels], offsets, scheme=scheme, k=100)


def call(op, device, backend=None):
    """One op on small tensors of a device."""
    rows, vector = torch.zeros(4, 8, device=device), torch.zeros(8, device=device)
    if op == "residual_norm":
        return residual_norm(rows, rows, vector, vector, eps=1e-5, backend=backend)
    if op == "varlen_attention":
        heads = torch.zeros(4, 2, 16, device=device)
        ends = torch.tensor([0, 4], dtype=torch.int32, device=device)
        return varlen_attention(heads, heads, heads, ends, ends, backend=backend)
    if op == "score_head":
        dense, out = torch.zeros(8, 8, device=device), torch.zeros(1, 8, device=device)
        return score_head(rows, None, dense, None, out, None, backend=backend)
    offsets = torch.tensor([0, 8], device=device)
    if op == "approx_ranks":
        return approx_ranks(vector, offsets, backend=backend)
    return {"lambda_loss": lambda_loss, "ndcg": ndcg}[op](vector, vector, offsets, backend=backend)


OPS = ["approx_ranks", "lambda_loss", "ndcg", "residual_norm", "score_head", "varlen_attention"]


@pytest.fixture
def chosen(monkeypatch):
    names = []
    resolve = registry.Backends.resolve

    def recording(*arguments):
        names.append(resolve(*arguments))
        return names[-1]

    monkeypatch.setattr(registry.Backends, "resolve", recording)
    return names


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_a_gpu_without_triton_takes_the_reference(op, has_triton, chosen, monkeypatch):
    monkeypatch.setattr(registry, "HAS_TRITON", has_triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():  # shapes and devices alone: needs no GPU
        call(op, "cuda")
        assert chosen == ["triton" if has_triton else "reference"]
        if not has_triton:
            with pytest.raises(
                ValueError, match="backend 'triton' can't run: triton is not installed"
            ):
                call(op, "cuda", "triton")
        with pytest.raises(ValueError, match=r"backend 'cpu' takes .*cuda"):
            call(op, "cuda", "cpu")


@pytest.mark.parametrize("op", OPS)
def test_without_the_compiled_module_an_op_says_so_once(op, chosen, monkeypatch):
    call(op, "cpu")
    assert chosen.pop() == "cpu"
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(registry, "_warned", [])
    with pytest.warns(
        RuntimeWarning, match=f"runs {op} and its other ops through slower eager PyTorch: the"
    ):
        call(op, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(op, "cpu")
    assert chosen == ["reference", "reference"]
    with pytest.raises(ValueError, match="backend 'cpu' can't run: the compiled module"):
        call(op, "cpu", "cpu")


@pytest.mark.parametrize("op", OPS)
def test_triton_is_not_chosen_for_cpu_tensors_and_refused_outside_its_interpreter(
    op, chosen, monkeypatch
):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call(op, "cpu")
    assert chosen == ["cpu"]
    with pytest.raises(
        ValueError, match="backend 'triton' takes CUDA or ROCm tensors, got tensors on cpu"
    ):
        call(op, "cpu", "triton")
