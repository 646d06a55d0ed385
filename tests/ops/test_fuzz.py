"""Calls drawn at random: one line of ValueError, or what the fp64 reference gives, on every
backend.

Shapes, dtypes, layouts, options, offsets and special values are drawn, good ones and bad ones;
which of them are bad is known, so that an error where all is well fails too. A case follows from
its number alone: run one again with run_case(number).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from rerank_fast.ops.approx_ranks import approx_ranks
from rerank_fast.ops.int8_linear import int8_linear, quantize_rows, quantize_weight
from rerank_fast.ops.lambda_loss import count_pairs, lambda_loss
from rerank_fast.ops.ndcg import ndcg
from rerank_fast.ops.reference import lambda_loss as reference
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention
from tests.ops.test_backends import REDUCTIONS, SCHEMES, require_triton
from tests.ops.test_options import WRONG

SPECIAL = (math.nan, math.inf, -math.inf)


class Case:
    """What the numbers of one case are drawn from, and what was found bad about it."""

    def __init__(self, number: int):
        self.number = number
        self.random = np.random.default_rng(number)
        self.generator = torch.Generator().manual_seed(number)
        self.bad: list[str] = []
        self.backend = ""

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def one(self, choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def int(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> torch.Tensor:
        return self.layout((torch.randn(*shape, generator=self.generator) * scale).to(dtype))

    def layout(self, x: torch.Tensor) -> torch.Tensor:
        """The same values, in memory of another shape."""
        way = self.int(0, 4)
        if way == 1:  # every other element
            return torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0]
        if way == 2 and x.dim() > 1:  # columns that are runs
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if way == 3:  # from the middle of something longer
            return torch.cat([torch.full_like(x[:1], 7), x, torch.full_like(x[:1], 7)])[
                len(x[:1]) : len(x[:1]) + len(x)
            ]
        return x

    def sizes(self, most: int, total: int) -> list[int]:
        sizes = [self.int(0, most) for _ in range(self.int(0, 6))]
        while sum(sizes) > total:
            sizes.pop()
        return sizes

    def bounds(self, sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Cumulative sizes, now and then at fault."""
        right = [0, *itertools.accumulate(sizes)]
        bounds = list(right)
        if self.chance(0.08):
            far = 2**40 if dtype == torch.int64 else 2**31 - 1
            bounds[self.int(0, len(bounds) - 1)] = self.one(
                [-1, far, -far, right[-1] + 1, right[-1] // 2, 0]
            )
        if self.chance(0.03):
            bounds.insert(self.int(0, len(bounds)), self.int(-1, right[-1] + 1))
        if bounds[0] != 0 or bounds[-1] != right[-1] or bounds != sorted(bounds):
            self.bad.append(f"bounds {bounds}")
        return self.layout(torch.tensor(bounds, dtype=dtype))

    def damage(self, x: torch.Tensor, *values: float, share: float = 0.15) -> list[int]:
        """Puts special values into some of the rows of x."""
        if not x.numel() or not self.chance(share):
            return []
        rows = [self.int(0, len(x) - 1) for _ in range(self.int(1, 2))]
        for row in rows:
            flat = x[row].reshape(-1)
            flat[self.int(0, len(flat) - 1)] = self.one(values or SPECIAL)
            x[row] = flat.view(x[row].shape)
        return rows

    def spoil(self, op: str, options: dict[str, Any]) -> None:
        """Now and then one option that is none."""
        if self.chance(0.1):
            name = self.one(list(WRONG[op]))
            options[name] = self.one(WRONG[op][name])
            self.bad.append(f"{name}={options[name]!r}")


def assert_close(
    name: str, ours: Any, eager: Any, exact: Any, slack: float, where: Any = ..., size: float = 0.0
) -> None:
    """Error <= that of the eager formula in the same dtype, and slack roundings; not finite in the
    same places.

    size: of what is added up, where the sum may be 0.
    """
    assert ours.shape == exact.shape, name
    least = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    ours, eager, exact = (x.detach()[where].double() for x in (ours, eager, exact))
    finite = eager.isfinite()
    assert torch.equal(ours.isfinite(), finite), (name, ours[ours.isfinite() != finite][:4])
    ours, eager, exact = ours[finite], eager[finite], exact[finite]
    if exact.numel():
        error, eager_error = (ours - exact).abs().max(), (eager - exact).abs().max()
        budget = 2 * eager_error + slack * max(float(exact.abs().max()), size) + least + 1e-30
        assert error <= budget, (name, float(error), float(budget))


def grads_of(result: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients, of which no further derivative is given: no silent zero, no wrong one."""
    upstream = torch.linspace(0.5, 1.5, max(result.numel(), 1), dtype=torch.float64)
    upstream = upstream[: result.numel()].view(result.shape).to(result.dtype)
    grads = torch.autograd.grad(result, leaves, upstream, create_graph=True)
    total = torch.stack([grad.double().sum() for grad in grads]).sum()
    with pytest.raises(RuntimeError, match="second derivative is not known"):
        torch.autograd.grad(total, leaves, allow_unused=True)
    return [grad.detach() for grad in grads]


def lists(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    small = case.backend == "triton"
    sizes = case.sizes(9 if small else case.one([5, 40]), 40 if small else 200)
    n = sum(sizes)
    dtype = case.one([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    scores = case.normal(n, dtype=dtype, scale=case.one([0.1, 1.0, 1.0, 30.0, 1e4]))
    if case.chance(0.3):
        scores = scores.round()  # ties
    kind = case.one(["binary", "graded", "below", "fractions", "large"])
    high = 2 if kind == "binary" else 5
    labels = torch.randint(0, high, (n,), generator=case.generator).double()
    labels = {"below": labels - 2, "fractions": labels / 3, "large": labels * 200}.get(kind, labels)
    whole = kind in ("binary", "graded") and case.chance(0.3)
    labels = case.layout(
        labels.to(case.one([torch.int64, torch.int32]) if whole else torch.float32)
    )
    scores = scores.clone()
    case.damage(scores, *SPECIAL, 1e25 if dtype != torch.float16 else 6e4, share=0.1)
    if labels.is_floating_point():
        labels = labels.clone()
        case.damage(labels, share=0.1)
    return scores, labels, case.bounds(sizes, torch.int64)


def fuzz_lambda_loss(case: Case) -> None:
    scores, labels, offsets = lists(case)
    options: dict[str, Any] = {
        "scheme": case.one(SCHEMES),
        "k": case.one([None, 0, 1, 3, 10, 2**40]),
        "sigma": case.one([1.0, 1, 0.3, 2.5, 20.0]),
        "mu": case.one([10.0, 0, 3.3]),
        "eps": case.one([1e-10, 1e-3, 1.0]),
        "reduction_log": case.one(["binary", "natural"]),
        "reduction": case.one(REDUCTIONS),
    }
    case.spoil("lambda_loss", options)
    leaf = scores.detach().requires_grad_()
    loss = lambda_loss(leaf, labels, offsets, backend=case.backend, **options)
    (grad,) = grads_of(loss, [leaf])
    assert not case.bad, case.bad
    assert grad.dtype == scores.dtype
    wide = torch.promote_types(scores.dtype, torch.float32)
    rows = torch.repeat_interleave(offsets.diff())
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=torch.float64)[
        : loss.numel()
    ].view(loss.shape)
    upstream = upstream[rows] if loss.dim() else upstream
    results = []
    for dtype in (wide, torch.float64):
        own = options | {"k": options["k"] or 0}
        value, slope, _ = reference.forward(
            scores.to(dtype), labels.to(wide).to(dtype), offsets, **own
        )
        results.append((value, slope * upstream))
    spread = scores[scores.isfinite()].double()
    slack = (
        64
        * torch.finfo(wide).eps
        * (1 + options["sigma"] * float(spread.max() - spread.min()) / 64 if len(spread) else 1)
    )
    assert_close("loss", loss, results[0][0], results[1][0], slack)
    assert_close("grad", grad, results[0][1], results[1][1], slack + torch.finfo(grad.dtype).eps)


def fuzz_count_pairs(case: Case) -> None:
    scores, labels, offsets = lists(case)
    options = {"scheme": case.one(SCHEMES), "k": case.one([None, 0, 1, 3, 10, 2**40])}
    case.spoil("count_pairs", options)
    found = count_pairs(scores, labels, offsets, **options)
    assert not case.bad, case.bad
    expected = 0
    for start, end in itertools.pairwise(offsets.tolist()):
        rank = reference.ranks(scores[start:end])
        expected += int(
            reference.pair_mask(
                labels[start:end], rank, scheme=options["scheme"], k=options["k"] or 0
            ).sum()
        )
    assert found.item() == expected


def fuzz_ndcg(case: Case) -> None:
    scores, labels, offsets = lists(case)
    options = {"k": case.one([None, 0, 1, 3, 10, 2**40])}
    case.spoil("ndcg", options)
    values = ndcg(scores, labels, offsets, backend=case.backend, **options)
    assert not case.bad, case.bad
    wide = torch.promote_types(scores.dtype, torch.float32)
    exact = ndcg(scores.double(), labels.to(wide).double(), offsets, backend="reference", **options)
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def fuzz_approx_ranks(case: Case) -> None:
    scores, _, offsets = lists(case)
    options = {"alpha": case.one([0.5, 1.0, 10.0])}
    case.spoil("approx_ranks", options)
    leaf = scores.detach().requires_grad_()
    ranks = approx_ranks(leaf, offsets, backend=case.backend, **options)
    (grad,) = grads_of(ranks, [leaf])
    assert not case.bad, case.bad
    assert grad.dtype == scores.dtype
    wide = torch.promote_types(scores.dtype, torch.float32)
    upstream = torch.linspace(0.5, 1.5, max(len(scores), 1), dtype=torch.float64)[: len(scores)]
    results = []
    for dtype in (wide, torch.float64):
        own = scores.detach().to(dtype).requires_grad_()
        value = approx_ranks(own, offsets, backend="reference", **options)
        results.append((value, *torch.autograd.grad(value, own, upstream.to(dtype))))
    slack = 64 * torch.finfo(wide).eps
    assert_close("ranks", ranks, results[0][0], results[1][0], slack)
    slack += torch.finfo(grad.dtype).eps
    assert_close("grad", grad, results[0][1], results[1][1], slack, size=options["alpha"])


def fuzz_varlen_attention(case: Case) -> None:
    backend = case.backend
    most, total = (20, 40) if backend == "triton" else (40, 100)
    queries = case.sizes(most, total)
    keys = queries if case.chance(0.5) else [case.int(0, most) for _ in queries]
    kv_heads, group, size = case.int(1, 2), case.int(1, 2), case.one([3, 8, 12, 16, 32])
    dtypes = {"cpu": [torch.float32, torch.bfloat16], "triton": [torch.float32, torch.float16]}
    dtype = case.one(dtypes.get(backend, [torch.float32, torch.float64]))
    scale = 1.0 if case.chance(0.7) else 4.0
    tensors = [
        case.normal(sum(queries), kv_heads * group, size, dtype=dtype, scale=scale).clone(),
        case.normal(sum(keys), kv_heads, size, dtype=dtype).clone(),
        case.normal(sum(keys), kv_heads, size, dtype=dtype).clone(),
    ]
    broken = [case.damage(x, share=0.06) for x in tensors]
    ends = case.bounds(queries, torch.int32), case.bounds(keys, torch.int32)
    options: dict[str, Any] = {
        "scale": case.one([None, 0.25, 0.0, -0.5]),
        "causal": case.chance(0.3),
        "window": case.one([None, None, (3, 2), (0, 0), (-1, 4), (2**31 - 1, -1)]),
        "dropout_p": case.one([0.0, 0.0, 0.2]),
        "seed": case.one([0, 7, 2**63 - 1]),
        "softcap": case.one([None, None, 0.5, 50.0]),
    }
    case.spoil("varlen_attention", options)
    if len(ends[0]) != len(ends[1]):
        case.bad.append("as many queries' as keys' sequences")
    leaves = [x.requires_grad_() for x in tensors]
    out = varlen_attention(*leaves, *ends, backend=backend, **options)
    ours = [out, *grads_of(out, leaves)]
    assert not case.bad, case.bad
    results = []
    for wide in (dtype, torch.float64):
        own = [x.detach().to(wide).requires_grad_() for x in tensors]
        out = varlen_attention(*own, *ends, backend="reference", **options)
        results.append([out, *grads_of(out, own)])
    # What is masked may be NaN or not in a sequence with special values: those are left out.
    masked = options["causal"] or options["window"] is not None
    touched = set()
    for rows, end in zip(broken, (ends[0], ends[1], ends[1]), strict=True):
        touched |= {
            int(torch.searchsorted(end.contiguous(), row, right=True)) - 1 for row in rows if masked
        }
    kept = []
    for end in ends:
        of = torch.searchsorted(end.contiguous(), torch.arange(int(end[-1])), right=True) - 1
        kept.append(torch.tensor([int(n) not in touched for n in of], dtype=torch.bool))
    slack = (256 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    # The gradient of a softmax of one key, or of equal ones, is 0 but for what is rounded on the
    # way.
    scale = size**-0.5 if options["scale"] is None else abs(options["scale"])
    q, k, v = (
        float(x[x.isfinite()].abs().double().max()) if x.isfinite().any() else 0.0 for x in tensors
    )
    sizes = {"dq": scale * size * 1.5 * v * k, "dk": scale * size * 1.5 * v * q}
    for name, where, *three in zip(
        ("out", "dq", "dk", "dv"), (kept[0], kept[0], kept[1], kept[1]), ours, *results, strict=True
    ):
        assert_close(name, *three, slack, where, sizes.get(name, 0.0))


def fuzz_residual_norm(case: Case) -> None:
    backend = case.backend
    dtypes = {"cpu": [torch.float32, torch.bfloat16], "triton": [torch.float32, torch.float16]}
    dtype = case.one(dtypes.get(backend, [torch.float32, torch.bfloat16]))
    rows, width = case.int(0, 20), case.one([1, 2, 7, 16, 33])
    x, residual = case.normal(rows, width, dtype=dtype).clone(), case.normal(rows, width).clone()
    weight, bias = case.normal(width), case.normal(width)
    case.damage(x, share=0.1)
    case.damage(residual, share=0.1)
    options: dict[str, Any] = {
        "eps": case.one([1e-5, 1e-12, 1]),
        "dropout_p": case.one([0.0, 0, 0.3]),
        "seed": case.one([0, 7, 2**63 - 1]),
        "rows": case.one(
            [None, torch.randint(-9, 99, (rows,), generator=case.generator, dtype=torch.int32)]
        ),
    }
    case.spoil("residual_norm", options)
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    y, narrow = residual_norm(*leaves, backend=backend, **options)
    ours = [y, narrow, *grads_of(y + narrow.float(), leaves)]
    assert not case.bad, case.bad
    results = []
    for wide in (False, True):
        own = [t.detach().double() if wide else t.detach() for t in leaves]
        own = [t.requires_grad_() for t in own]
        y, narrow = residual_norm(*own, backend="reference", **options)
        results.append([y, narrow, *grads_of(y + narrow.to(y.dtype), own)])
    for name, mine, eager, exact in zip(
        ("y", "narrow", "dx", "dr", "dw", "db"), ours, *results, strict=True
    ):
        # A row of one value, or of nearly one, is divided by next to nothing.
        steep = 1 / math.sqrt(options["eps"]) if width <= 2 else 16
        slack = 64 * torch.finfo(torch.float32).eps * steep + (2 * torch.finfo(mine.dtype).eps)
        # The parts of dx and dr take each other off there.
        size = float(weight.abs().max()) if width <= 2 and name in ("dx", "dr") else 0.0
        assert_close(name, mine, eager, exact, slack, size=size)


def fuzz_score_head(case: Case) -> None:
    backend = case.backend
    dtype = case.one([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    tokens, size, width = case.int(1, 20), case.one([1, 5, 16, 24]), case.one([1, 4, 17])
    hidden = case.normal(tokens, size, dtype=dtype).clone()
    case.damage(hidden, share=0.1)
    dense, out = (
        case.normal(width, size, dtype=dtype, scale=size**-0.5),
        case.normal(1, width, dtype=dtype),
    )
    dense_bias = case.normal(width, dtype=dtype) if case.chance(0.7) else None
    out_bias = case.normal(1, dtype=dtype) if case.chance(0.7) else None
    index = None
    if case.chance(0.6):
        index = torch.randperm(tokens, generator=case.generator)[: case.int(0, tokens)]
        if len(index) and case.chance(0.1):
            index[case.int(0, len(index) - 1)] = case.one([-1, tokens, 2**31 - 1])
            case.bad.append("index")
        index = case.layout(index.to(case.one([torch.int32, torch.int64])))
    options: dict[str, Any] = {
        "activation": case.one(["tanh", "gelu", "relu", "none"]),
        "dropout_p": case.one([0.0, 0, 0.3]),
        "dropout_in_p": case.one([0.0, 0.2]),
        "training": case.chance(0.5),
        "seed": case.one([0, 7, 2**63 - 1]),
    }
    case.spoil("score_head", options)
    weights = [t for t in (dense, dense_bias, out, out_bias) if t is not None]

    def run(backend: str, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(kind).requires_grad_() for t in (hidden, *weights)]
        of = iter(leaves[1:])
        own = [None if t is None else next(of) for t in (dense, dense_bias, out, out_bias)]
        scores = score_head(leaves[0], index, *own, backend=backend, **options)
        return [scores, *grads_of(scores, leaves)]

    ours = run(backend, dtype)
    assert not case.bad, case.bad
    # Eagerly in fp32, with what narrow results round: the interpreter cuts 16 bits off, twice the
    # error.
    eager, exact = run("reference", torch.float32), run("reference", torch.float64)
    for number, results in enumerate(zip(ours, eager, exact, strict=True)):
        slack = 64 * torch.finfo(torch.float32).eps + (
            0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        )
        if options["activation"] == "relu" and dtype != torch.float32:
            slack = 1.0  # a value that rounds across the corner is an error of its own size
        # Narrow terms of about 1 are added up.
        assert_close(f"result {number}", *results, slack, size=float(dtype != torch.float32))


def fuzz_int8(case: Case) -> None:
    dtype = case.one([torch.float32, torch.bfloat16])
    rows, size, width = case.int(1, 9), case.one([1, 7, 64]), case.one([1, 8, 33])
    x = case.normal(rows, size, dtype=dtype).clone()
    case.damage(x)
    weight = quantize_weight(
        case.normal(width, size), case.normal(width) if case.chance(0.5) else None
    )
    quantized = quantize_rows(x)
    ours, exact = (
        int8_linear(quantized, weight, backend=backend) for backend in ("cpu", "reference")
    )
    assert_close("int8", ours, exact, exact, 4 * torch.finfo(dtype).eps)
    broken = ~x.isfinite().all(dim=1)
    assert torch.equal(ours.isnan(), broken[:, None].expand(rows, width))
    levels = 63.0  # at the least
    finite = quantized.dequantize()[~broken].float()
    bound = x[~broken].float().abs().amax(dim=1, keepdim=True) * (
        0.51 / levels + torch.finfo(dtype).eps
    )
    assert ((finite - x[~broken].float()).abs() <= bound).all()


OPS = {
    "lambda_loss": (fuzz_lambda_loss, ["cpu", "cpu", "triton", "reference"]),
    "count_pairs": (fuzz_count_pairs, ["torch"]),
    "ndcg": (fuzz_ndcg, ["cpu", "triton", "reference"]),
    "approx_ranks": (fuzz_approx_ranks, ["cpu", "triton", "reference"]),
    "varlen_attention": (fuzz_varlen_attention, ["cpu", "cpu", "triton", "reference"]),
    "residual_norm": (fuzz_residual_norm, ["cpu", "triton", "reference"]),
    "score_head": (fuzz_score_head, ["cpu", "triton", "reference"]),
    "int8": (fuzz_int8, ["cpu"]),
}


def run_case(number: int) -> str:
    """What became of one case: "op, backend, agrees" or "..., refused"."""
    case = Case(number)
    op = list(OPS)[number % len(OPS)]
    function, backends = OPS[op]
    case.backend = case.one(backends)
    message = ""
    try:
        function(case)
    except (ValueError, RuntimeError) as error:
        message = str(error)
        if not case.bad:
            raise
    assert "\n" not in message, message
    return f"{op}, {case.backend}, {'refused' if message else 'agrees'}"


def run_cases(numbers: range) -> None:
    require_triton()
    found: Counter[str] = Counter()
    for number in numbers:
        try:
            found[run_case(number)] += 1
        except BaseException as error:
            error.add_note(f"run_case({number})") if hasattr(error, "add_note") else print(
                f"run_case({number})"
            )
            raise
    for op, (_, backends) in OPS.items():
        for backend in set(backends):
            assert found[f"{op}, {backend}, agrees"] >= len(numbers) / 200, found
    assert (
        sum(count for name, count in found.items() if name.endswith("refused")) >= len(numbers) / 20
    ), found


def test_calls_drawn_at_random():
    run_cases(range(600))


@pytest.mark.slow
def test_many_calls_drawn_at_random(request):
    if "slow" not in request.config.getoption("-m").replace("not slow", ""):
        pytest.skip("takes 15 minutes: pytest -m slow")
    run_cases(range(600, 21_000))
