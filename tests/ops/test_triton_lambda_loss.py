"""LambdaLoss in Triton: natively on a GPU, else in its interpreter; what it compiles to; what only
a GPU shows.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rerank_fast import lambda_loss
from tests.ops.test_backends import (
    OPTIONS,
    REDUCTIONS,
    SCHEMES,
    assert_within_budget,
    flat_lists,
    forward,
    generated_damage,
    generated_lists,
    ragged,
    require_triton,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _triton():
    require_triton()


@pytest.fixture
def kernels():
    from rerank_fast.ops.triton import lambda_loss as kernels

    return kernels


@pytest.fixture(params=["ordered by its blocks", "ordered by a launch", "either"])
def order(request, kernels, monkeypatch):
    """Which lists get their order where, at sizes the interpreter can run."""
    longest = {"ordered by its blocks": 1024, "ordered by a launch": 0, "either": 12}[request.param]
    monkeypatch.setattr(kernels, "SMALL_BATCH", longest)
    monkeypatch.setattr(kernels, "SHORT_LIST", longest)


@settings(max_examples=10, deadline=None)
@given(
    lists=generated_lists,
    damage=generated_damage,
    scheme=st.sampled_from(SCHEMES),
    k=st.integers(0, 6),
    sigma=st.sampled_from([0.5, 4.0]),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generated_lists(dtype, lists, damage, scheme, k, sigma):
    scores, labels, offsets = flat_lists(lists, damage)
    assert_within_budget(
        "triton", scores.to(dtype), labels, offsets, scheme=scheme, k=k, sigma=sigma
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order(order, scheme):
    """Empty and single-document lists, lists across block bounds, a cut, scores far apart."""
    sizes = [3, 0, 29, 13, 0, 1, 2, 0]
    assert_within_budget("triton", *ragged(sizes, grades=4), scheme=scheme)
    assert_within_budget(
        "triton", *ragged(sizes, grades=4, spread=1e4), scheme=scheme, k=3, reduction="none"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_and_dtypes(dtype, reduction):
    scores, labels, offsets = ragged([5, 0, 17, 1], grades=4)
    for scheme in SCHEMES if dtype == torch.float32 else ["ndcg2pp"]:
        assert_within_budget(
            "triton", scores.to(dtype), labels, offsets, scheme=scheme, reduction=reduction
        )


@pytest.mark.parametrize("size", [31, 32, 33, 64, 65])
def test_lists_at_the_bounds_of_blocks_and_versions(size, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "SMALL_BATCH", 64)
    monkeypatch.setattr(kernels, "SHORT_LIST", 32)
    assert_within_budget("triton", *ragged([size], grades=4), k=7)
    assert_within_budget("triton", *ragged([2, size, 3], grades=4))


@pytest.mark.parametrize("size", [1023, 1024, 1025])
def test_long_lists(size, kernels, monkeypatch):
    # Large blocks: the interpreter's time goes by the number of tiles.
    monkeypatch.setattr(kernels, "PAIRS", kernels.PAIRS | {"BLOCK": 256, "TILE": 512})
    scores, labels, offsets = ragged([size, 2], grades=2)
    assert_within_budget(
        "triton", scores[:size], labels[:size] * (scores[:size] > 1), offsets[:2], k=10
    )
    if size == 1025:
        assert_within_budget("triton", scores, labels, offsets)


def test_shipped_blocks_with_a_list_ordered_by_a_launch(kernels):
    assert kernels.SHORT_LIST == 256
    assert kernels.SMALL_BATCH == 1024
    sizes = [10] * 77 + [257]
    assert_within_budget("triton", *ragged(sizes, grades=3))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ties_and_labels_up_to_1000(order, scheme):
    scores = torch.tensor([0.5, 0.5, -1.0, 2.0, 2.0, 0.0, -0.0, 0.0] * 2)
    labels = torch.tensor([1000.0, 999.0, 0.0, 500.0, -2.0, 1000.0, 0.25, 1.0] * 2)
    offsets = torch.tensor([0, 16])
    loss, grad, _ = forward("triton", scores, labels, offsets, **OPTIONS | {"scheme": scheme})
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert_within_budget("triton", scores, labels, offsets, scheme=scheme, k=4)
    assert_within_budget("triton", torch.zeros(16), labels, offsets, scheme=scheme)


@pytest.mark.parametrize("labels", [[0.0] * 14, [1.0] * 14], ids=["no positive", "all positive"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lists_without_a_preference_pair(order, scheme, labels):
    scores, _, offsets = ragged([13, 1])
    assert_within_budget("triton", scores, torch.tensor(labels), offsets, scheme=scheme)
    if scheme != "ndcg1":
        loss, grad, _ = forward(
            "triton", scores, torch.tensor(labels), offsets, **OPTIONS | {"scheme": scheme}
        )
        assert loss.item() == 0
        assert not grad.any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("of", "value"), [("scores", -math.inf), ("labels", math.nan)])
def test_a_list_that_diverged(order, scheme, value, of):
    """Wherever it is put in order; its neighbours, in the same blocks, keep their loss."""
    scores, labels, offsets = ragged([9, 6, 14])
    {"scores": scores, "labels": labels}[of][11] = value
    assert_within_budget("triton", scores, labels, offsets, scheme=scheme, reduction="none")


def test_every_output_is_written(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "SMALL_BATCH", 12)
    monkeypatch.setattr(kernels, "SHORT_LIST", 12)
    lists = ragged([1, 0, 37, 2, 1])
    before = torch.are_deterministic_algorithms_enabled()
    for reduction in REDUCTIONS:
        expected = forward("triton", *lists, **OPTIONS | {"reduction": reduction})
        try:
            # torch.empty then gives NaN, and the largest integers.
            torch.use_deterministic_algorithms(True)
            poisoned = forward("triton", *lists, **OPTIONS | {"reduction": reduction})
        finally:
            torch.use_deterministic_algorithms(before)
        for ours, theirs in zip(poisoned, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_of_the_public_op(dtype, reduction):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores, labels, offsets = (tensor.to(device) for tensor in ragged([5, 0, 7, 1]))
    gradients = []
    for backend in ("triton", "reference"):
        leaf = scores.to(dtype).requires_grad_()
        loss = lambda_loss(leaf, labels, offsets, reduction=reduction, backend=backend)
        # Not contiguous, as the gradient of an expanded sum is.
        loss.backward(
            torch.linspace(-2, 3, 8, device=device)[::2]
            if loss.dim()
            else torch.tensor(1.5, device=device)
        )
        assert leaf.grad.dtype == dtype
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["pairs", "none"])
def test_opcheck_of_the_backward(backend, reduction):
    grad, _, offsets = ragged([5, 0, 7])
    grad_loss = torch.tensor([1.0, 2.0, 3.0]) if reduction == "none" else torch.tensor(2.0)
    arguments = (grad, grad_loss, offsets, torch.float16, backend)
    torch.library.opcheck(torch.ops.rerank_fast.lambda_loss_backward.default, arguments)


class _Recorder(TorchDispatchMode):
    """The operations beside the kernels: each that runs on the device would be a launch more."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(kernels, monkeypatch):
    """The kernels' names as they are launched, with meta tensors: whoever reads one on the host
    gets an error.
    """
    names = []
    for name in (
        "order_kernel",
        "pair_kernel",
        "mean_kernel",
        "list_sum_kernel",
        "backward_kernel",
    ):

        class Stub:
            def __getitem__(self, grid, name=name):
                assert all(type(size) is int for size in grid)
                return lambda *args, **options: names.append(name)

        monkeypatch.setattr(kernels, name, Stub())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return names


@pytest.mark.parametrize("num_docs", [160, 1024, 1025, 2**20])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_is_read_on_the_host_and_launches_are_few(
    kernels, launches, num_docs, reduction, dtype
):
    scores = torch.empty(num_docs, dtype=dtype, device="meta")
    labels = torch.empty_like(
        scores, dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    offsets = torch.empty(17, dtype=torch.int64, device="meta")
    for read in (
        lambda: offsets[-1].item(),
        offsets.tolist,
        offsets.cpu,
        lambda: bool(offsets[0] > 0),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):  # so that this test can fail
            read()
    with _Recorder() as torch_side:
        loss, grad, _ = kernels.forward(
            scores, labels, offsets, **OPTIONS | {"reduction": reduction}
        )
        last = "list_sum_kernel" if reduction == "none" else "mean_kernel"
        assert launches == ["order_kernel"] * (num_docs > 1024) + ["pair_kernel", last]
        launches.clear()
        kernels.backward(grad, loss, offsets, dtype)
    assert launches == ["backward_kernel"]
    assert set(torch_side.operations) == {"empty"}


def test_documents_without_a_list_are_refused_by_the_shapes():
    """A kernel would read past the end of the offsets."""
    documents = torch.empty(4, device="meta")
    with pytest.raises(ValueError, match="offsets must rise from 0 to N = 4, got a single one"):
        lambda_loss(documents, documents, torch.empty(1, dtype=torch.int64, device="meta"))


@pytest.mark.gpu
@needs_gpu
class TestOnAGpu:
    SHAPES = ([3, 0, 10, 7] * 16, [100] * 64, [1024], [1025, 3], [5000, 20])

    @pytest.mark.parametrize("sizes", SHAPES)
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_agrees_with_the_fp64_reference(self, sizes, scheme, dtype):
        scores, labels, offsets = ragged(sizes, grades=5)
        assert_within_budget("triton", scores.to(dtype), labels, offsets, scheme=scheme)
        assert_within_budget(
            "triton", scores.to(dtype), labels, offsets, scheme=scheme, k=10, reduction="none"
        )

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("sizes", SHAPES)
    def test_does_not_wait_for_the_gpu(self, sizes, reduction):
        scores, labels, offsets = (tensor.cuda() for tensor in ragged(sizes))
        for dtype in (torch.float32, torch.bfloat16):
            leaf = scores.to(dtype).requires_grad_()
            loss = lambda_loss(leaf, labels, offsets, reduction=reduction)  # compiles
            upstream = torch.ones_like(loss)
            loss.backward(upstream)
            torch.cuda.set_sync_debug_mode("error")
            try:
                lambda_loss(leaf, labels, offsets, reduction=reduction).backward(upstream)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("sizes", SHAPES)
    def test_captured_in_a_graph_and_replayed_on_other_lists(self, sizes, kernels):
        lists = [tensor.cuda() for tensor in ragged(sizes)]
        kernels.forward(*lists, **OPTIONS)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernels.forward(*lists, **OPTIONS)
        # Other scores, labels and list bounds in the same tensors.
        for seed in (1, 2):
            others = ragged(sizes[::-1], seed=seed, grades=4)
            for tensor, other in zip(lists, others, strict=True):
                tensor.copy_(other)
            graph.replay()
            for ours, expected in zip(captured, kernels.forward(*lists, **OPTIONS), strict=True):
                assert torch.equal(ours, expected)

    @pytest.mark.parametrize("sizes", SHAPES)
    def test_gives_the_same_bits_every_time(self, sizes, kernels):
        lists = [tensor.cuda() for tensor in ragged(sizes, grades=5)]
        expected = kernels.forward(*lists, **OPTIONS)
        for _ in range(20):
            for ours, first in zip(kernels.forward(*lists, **OPTIONS), expected, strict=True):
                assert torch.equal(ours, first)
