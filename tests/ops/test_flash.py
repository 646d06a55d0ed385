"""What is handed to FlashAttention's functions, whose kernels are CUDA's alone, by what each
takes.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rerank_fast.ops import flash, registry
from rerank_fast.ops import varlen_attention as op
from rerank_fast.ops.flash import PackageFlash, TorchFlash
from rerank_fast.ops.varlen_attention import varlen_attention
from tests.ops.test_varlen_attention import HAS_GPU, LENGTHS, make, run

CALLS: list[dict[str, Any]] = []


def attend(q, k, v, cu_q, cu_k, *, lengths, **options) -> Tensor:
    CALLS.append({"lengths": lengths, **options})
    return varlen_attention(q, k, v, cu_q, cu_k, backend="reference", **options)


def torch_2_10(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert q.shape[1] == k.shape[1]
    return attend(q, k, v, cu_seq_q, cu_seq_k, causal=is_causal, lengths=(max_q, max_k))


def torch_2_11(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert q.shape[1] == k.shape[1]
    return attend(
        q, k, v, cu_seq_q, cu_seq_k, window=window_size, scale=scale, lengths=(max_q, max_k)
    )


def torch_2_12(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return attend(
        q, k, v, cu_seq_q, cu_seq_k, window=window_size, scale=scale, lengths=(max_q, max_k)
    )


def torch_2_15(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
    seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return attend(
        q, k, v, cu_seq_q, cu_seq_k, window=window_size, scale=scale, lengths=(max_q, max_k)
    )


def package_2_0(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False,
):  # fmt: skip
    lengths = (max_seqlen_q, max_seqlen_k)
    return attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=softmax_scale, lengths=lengths
    )


def package_2_8(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert deterministic
    return attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, window=window_size, causal=causal, scale=softmax_scale,
        softcap=softcap or None, lengths=(max_seqlen_q, max_seqlen_k),
    )  # fmt: skip


LIBRARIES = {
    "torch 2.10": TorchFlash(torch_2_10),
    "torch 2.11": TorchFlash(torch_2_11),
    "torch 2.12": TorchFlash(torch_2_12),
    "torch 2.15": TorchFlash(torch_2_15),
    "package 2.0": PackageFlash(package_2_0),
    "package 2.8": PackageFlash(package_2_8),
}
# Options, whether keys have fewer heads, and for whom that is too much.
KINDS: dict[str, tuple[dict[str, Any], bool, dict[str, str]]] = {
    "plain": ({}, False, {}),
    "causal": ({"causal": True}, False, {}),
    "scale": ({"scale": 0.3}, False, {"torch 2.10": "a scale"}),
    "window": (
        {"window": (3, 2)},
        False,
        {"torch 2.10": "a window", "package 2.0": "a window"},
    ),
    "causal window": (
        {"causal": True, "window": (4, -1)},
        False,
        {"torch 2.10": "a window", "package 2.0": "a window"},
    ),
    "left window": (
        {"window": (8, -1)},
        False,
        {"torch 2.10": "a window", "package 2.0": "a window"},
    ),
    "groups": ({}, True, {"torch 2.10": "grouped heads", "torch 2.11": "grouped heads"}),
    "softcap": (
        {"causal": True, "softcap": 2.0},
        False,
        {name: "a softcap" for name in LIBRARIES if name != "package 2.8"},
    ),
}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors pass for a GPU's, for whoever asks whether FlashAttention serves."""

    def refusal(q: torch.Tensor, k: torch.Tensor, scale: float, window: Any, *rest: Any) -> str:
        return flash.refusal(q, k, scale, window, rest[-1])

    served = {**op._BACKENDS._served, "flash": registry.Served(lambda: (), refusal)}
    monkeypatch.setattr(op._BACKENDS, "_served", served)
    monkeypatch.setattr(registry, "_refusal", lambda backend, device: "")
    CALLS.clear()


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_signature_is_called_as_it_is_or_refused(
    name: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
):
    options, grouped, refused = KINDS[kind]
    monkeypatch.setattr(flash, "_FOUND", [LIBRARIES[name]])
    case = make(LENGTHS["fewer queries"], heads=4, kv_heads=2 if grouped else 4, size=16)
    options = {**options, "max_seqlens": (40, 66)}
    if name in refused:
        message = f"'flash' can't run: .* has no parameter for {refused[name]}$"
        with pytest.raises(ValueError, match=message):
            run("flash", *case, **options)
        assert not CALLS
        return
    actual = run("flash", *case, **options)
    (received,) = CALLS
    assert received["lengths"] == (40, 66)
    for ours, theirs in zip(actual, run("reference", *case, **options), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("on_gpu")
def test_the_first_library_that_takes_a_call_runs_it(monkeypatch: pytest.MonkeyPatch):
    few, all_ = LIBRARIES["package 2.0"], LIBRARIES["torch 2.12"]
    monkeypatch.setattr(flash, "_FOUND", [few, all_])
    (q, k, _), _, _ = make(LENGTHS["same"], size=16)
    assert flash.serving(q, k, 0.25, (-1, -1)) is few
    assert flash.serving(q, k, 0.25, (-1, 0)) is few
    assert flash.serving(q, k, 0.25, (3, 0)) is all_
    assert flash.serving(q, k, 0.25, (-1, -1), 30.0) is None
    monkeypatch.setattr(flash, "_FOUND", [few])
    assert flash.serving(q, k, 0.25, (3, 0)) is None
    monkeypatch.setattr(flash, "_FOUND", [])
    monkeypatch.setattr(flash, "_installed", lambda: ())
    assert "has no torch.nn.attention.varlen, and flash_attn" in flash.refusal(q, k, 0.25, (-1, -1))


@pytest.mark.usefixtures("on_gpu")
def test_a_call_is_part_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flash, "_FOUND", [LIBRARIES["torch 2.12"]])
    tensors, grad, ends = make(([3, 5], [3, 5]), size=16)
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(
            q * 2, k, v, *ends, causal=True, max_seqlens=(5, 5), backend="flash"
        )

    expected = torch.autograd.grad(twice(*leaves), leaves, grad)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _flash_attn(**content: Any) -> ModuleType:
    module = ModuleType("flash_attn")
    vars(module).update(content)
    return module


@pytest.mark.parametrize(
    ("module", "names", "logged"),
    [
        (None, ["torch.nn.attention.varlen"], ""),
        (_flash_attn(), ["torch.nn.attention.varlen"], "can't be loaded"),
        (
            _flash_attn(flash_attn_varlen_func=package_2_8),
            ["flash_attn", "torch.nn.attention.varlen"],
            "",
        ),
    ],
    ids=["absent", "broken", "there"],
)
def test_libraries_are_those_that_can_be_loaded(
    module: ModuleType | None,
    names: list[str],
    logged: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has none")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    with caplog.at_level(logging.WARNING):
        assert [one.name for one in flash._installed.__wrapped__()] == names
    assert logged in caplog.text
    assert bool(caplog.text) == bool(logged)


def test_a_torch_without_it_has_no_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert flash._installed.__wrapped__() == ()


def test_this_torchs_function_takes_what_its_release_says():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has none")
    known = TorchFlash(varlen.varlen_attn).known
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    assert ("window_size" in known) == (release >= (2, 11))
    assert ("enable_gqa" in known) == (release >= (2, 12))
    assert "is_causal" in known or "window_size" in known


class TestChoice:
    """Of a backend, for tensors that pass for a GPU's."""

    @pytest.fixture(autouse=True)
    def _a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flash, "_FOUND", [LIBRARIES["torch 2.11"]])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.version, "hip", None)

    def choose(
        self, *, heads=2, kv_heads=2, dropout_p=0.0, lengths=(7, 7), size=64, rows=10
    ) -> str:
        def tensor(number: int) -> Any:
            return SimpleNamespace(
                device=torch.device("cuda"),
                dtype=torch.bfloat16,
                shape=(rows, number, size),
                is_cpu=False,
                is_cuda=True,
            )

        q, k = tensor(heads), tensor(kv_heads)
        return op._BACKENDS.resolve(None, q, k, size**-0.5, (-1, -1), dropout_p, lengths)

    @pytest.mark.parametrize(
        ("options", "backend"),
        [
            ({}, "flash"),
            ({"dropout_p": 0.1}, "triton"),
            ({"lengths": None}, "triton"),
            ({"size": 12}, "triton"),
            ({"kv_heads": 1}, "triton"),  # torch 2.11's takes no groups
            ({"rows": 0}, "triton"),
        ],
        ids=str,
    )
    def test_flash_where_it_serves_else_triton(self, options: dict[str, Any], backend: str):
        pytest.importorskip("triton")
        assert self.choose(**options) == backend

    def test_an_older_gpu_has_triton(self, monkeypatch: pytest.MonkeyPatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert self.choose() == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 2)}], ids=str)
def test_on_a_gpu(lengths: str, options: dict[str, Any]):
    longest = tuple(max(part) for part in LENGTHS[lengths])
    case = make(LENGTHS[lengths], size=64, dtype=torch.bfloat16)
    try:
        actual = run("flash", *case, max_seqlens=longest, **options)
    except ValueError as error:
        pytest.skip(str(error))
    for ours, theirs in zip(actual, run("reference", *case, **options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
