"""The approximations of csrc/common/math.h keep the errors that are stated there, on every
instruction set.
"""

from __future__ import annotations

import math

import pytest
import torch

from rerank_fast.ops import cpu


def evaluate(name: str, x: torch.Tensor) -> torch.Tensor:
    result = torch.full_like(x, torch.nan)
    cpu._C.evaluate(name, x.data_ptr(), len(x), result.data_ptr())
    return result.double()


def cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.special.erfc(-x / math.sqrt(2))


# Name, what it stands for in double, from where to where, the error, and what that is a share of.
CASES = [
    ("exp2_below", torch.exp2, -125.9, 0.0, 2e-7, "result"),
    ("exp2_below_coarse", torch.exp2, -125.9, 0.0, 3e-6, "result"),
    ("exp_negative", lambda d: torch.exp(-d), 0.0, 87.0, 3e-7, "result"),
    ("log1p_unit", torch.log1p, 1e-6, 1.0, 2e-7, "result"),
    ("log2", torch.log2, 2.0, 1e6, 3e-7, "result"),
    ("log2", torch.log2, 0.5, 2.0, 3e-7, "one"),
    ("tanh", torch.tanh, -10.0, 10.0, 3e-7, "result"),
    ("tanh_lanes", torch.tanh, -10.0, 10.0, 3e-7, "result"),
    ("tanh_lanes", torch.tanh, -0.01, 0.01, 3e-7, "result"),
    ("normal_cdf", cdf, -8.0, 8.0, 3e-7, "one"),
    ("gelu_coarse", lambda x: x * cdf(x), -4.0, 4.0, 5e-5, "one"),
    ("gelu_coarse", lambda x: x * cdf(x), -100.0, 100.0, 5e-5, "one and the argument"),
]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("name", "exact", "low", "high", "error", "of"), CASES)
def test_errors_are_as_stated(name, exact, low, high, error, of):
    x = torch.linspace(low, high, 2**20)
    true = exact(x.double())
    scale = {
        "result": true.abs(),
        "one": 1.0,
        "one and the argument": x.double().abs().clamp(min=1),
    }[of]
    found = ((evaluate(name, x) - true).abs() / scale).nan_to_num(0).max()
    assert found <= error, found


@pytest.mark.usefixtures("instruction_set")
def test_ends_and_nan():
    x = torch.tensor([0.0, -126.0, -127.0, -1e30, -math.inf, math.nan] + [0.0] * 10)
    for name in ("exp2_below", "exp2_below_coarse"):
        values = evaluate(name, x).tolist()
        assert values[0] == pytest.approx(1.0, rel=1e-6)
        assert values[2:5] == [0.0, 0.0, 0.0]
        assert math.isnan(values[5])
    values = evaluate("exp_negative", -x).tolist()
    assert values[0] == 1.0
    assert values[3] == values[4] == pytest.approx(math.exp(-87), rel=1e-5)
    assert math.isnan(values[5])
    names = ("log1p_unit", "log2", "tanh", "tanh_lanes")
    assert all(math.isnan(evaluate(name, x)[5]) for name in names)
    for name in ("tanh", "tanh_lanes"):
        x = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e30, -200.0] + [0.0] * 10)
        values = evaluate(name, x)[:6]
        assert values.tolist() == [0.0, 0.0, 1.0, -1.0, 1.0, -1.0]
        assert values.signbit().tolist() == [False, True, False, True, False, True]
