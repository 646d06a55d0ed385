"""A device that is missing, hidden, too old or lost is said in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from rerank_fast import CrossEncoder
from rerank_fast.model import devices
from rerank_fast.model.devices import choose_device, fault
from tests.model_factory import make_tiny_bert

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: "
    "http://www.nvidia.com/Download/index.aspx"
)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A build for CUDA, with two GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_devices_that_are_there(cuda: pytest.MonkeyPatch):
    assert choose_device(None) == torch.device("cuda")
    for name in ("cpu", "meta", "cuda", "cuda:0", "cuda:1"):
        assert choose_device(name) == torch.device(name)
    cuda.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", 1.5])
def test_no_device_has_that_name(name: object, cuda: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=f"device must be cpu, cuda, .*, got {name!r}"):
        choose_device(name)  # type: ignore[arg-type]


def test_a_gpu_beyond_those_there_are(cuda: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="device cuda:2 is not there: cuda has 2, counted from 0"):
        choose_device("cuda:2")


@pytest.mark.parametrize("hidden", ["", " ", "-1"])
def test_hidden_gpus(hidden: str, cuda: pytest.MonkeyPatch):
    cuda.setattr(torch.cuda, "is_available", lambda: False)
    cuda.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(ValueError, match=r"cuda can't be used: CUDA_VISIBLE_DEVICES is .*hides"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (OLD_DRIVER, "The NVIDIA driver on your system is too old (found version 11040)"),
        ("No CUDA GPUs are available", "No CUDA GPUs are available"),
    ],
)
def test_what_torch_says_of_a_gpu_it_cant_use(message: str, said: str, cuda: pytest.MonkeyPatch):
    def init() -> None:
        raise RuntimeError(message)

    cuda.setattr(torch.cuda, "is_available", lambda: False)
    cuda.setattr(torch.cuda, "init", init)
    with pytest.raises(ValueError) as caught:
        choose_device("cuda:0")
    assert str(caught.value) == f"device cuda:0 can't be used: {said}"


def test_a_build_for_cpus_says_so(cuda: pytest.MonkeyPatch):
    cuda.setattr(torch.version, "cuda", None)
    cuda.setattr(torch.version, "hip", None)
    cuda.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch .* is built for CPUs alone"):
        choose_device("cuda")


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators(kind: str, monkeypatch: pytest.MonkeyPatch):
    module = torch.get_device_module(kind)
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device {kind} can't be used: .* has no {kind}"):
        choose_device(kind)
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "device_count", lambda: 1, raising=False)
    assert choose_device(kind) == torch.device(kind)
    with pytest.raises(ValueError, match=f"{kind} has 1, counted from 0"):
        choose_device(f"{kind}:1")


def test_an_old_driver_is_one_line_where_nobody_asked_for_a_gpu(
    cuda: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def unavailable() -> bool:
        warnings.warn(
            f"CUDA initialization: {OLD_DRIVER} (Triggered internally at x.cpp:1)", stacklevel=1
        )
        warnings.warn("of something else", stacklevel=1)
        return False

    cuda.setattr(torch.cuda, "is_available", unavailable)
    with pytest.warns(UserWarning, match="of something else") as caught:
        assert choose_device(None) == torch.device("cpu")
    assert len(caught) == 1
    (record,) = caplog.records
    said = "The NVIDIA driver on your system is too old (found version 11040)"
    assert record.message == f"The CPU is used: {said}"


def test_a_model_names_the_device_before_it_is_read(tmp_path: Path, cuda: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="device cuda:7 is not there"):
        CrossEncoder(tmp_path / "no model", device="cuda:7")


def test_weights_in_bf16_are_computed_in_fp32_on_a_gpu_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from rerank_fast.model import preparation

    model = CrossEncoder(make_tiny_bert(tmp_path / "model"), dtype="bfloat16", device="cpu").model
    preparation._say_wide.cache_clear()
    monkeypatch.setattr(type(model), "device", torch.device("cuda:1"))
    for capability, dtype in (((9, 0), torch.bfloat16), ((7, 5), torch.float32)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, found=capability: found
        )
        assert preparation._own_dtype(model) == dtype
    preparation._say_wide.cache_clear()
    assert [record.message for record in caplog.records] == [
        "Weights in bfloat16 are computed in float32 here: this GPU has no bf16 of its own."
    ]


@pytest.mark.parametrize(
    ("message", "meaning"),
    [
        (OLD_DRIVER, "the GPU's driver is older"),
        (
            "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
            "the GPU's driver is older",
        ),
        (
            "CUDA error: no kernel image is available for execution on the device\nCompile with",
            "no kernels",
        ),
        ("No CUDA GPUs are available", "there is no such GPU"),
        (
            "CUDA error: invalid device ordinal\nGPU device may be out of range",
            "there is no such GPU",
        ),
        (
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
            "taken by another process",
        ),
        ("CUDA error: unspecified launch failure\nCUDA kernel errors might be", "the GPU was lost"),
        ("CUDA error: uncorrectable ECC error encountered", "the GPU was lost"),
        ("CUDA error: unknown error", "the GPU was lost"),
        ("HIP error: unspecified launch failure", "the GPU was lost"),
        ("Triton Error [CUDA]: unspecified launch failure", "the GPU was lost"),
        (
            "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
            "the GPU was lost",
        ),
        ("CUDA error: an illegal memory access was encountered", ""),
        ("CUDA error: device-side assert triggered", ""),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
    ],
)
def test_faults_are_known_by_their_messages(message: str, meaning: str):
    found = fault(RuntimeError(message))
    assert (meaning in found) if meaning else not found
    assert "\n" not in found
    assert "Please update" not in found
    assert not found or found.endswith(f"({devices._first_sentences(message)})")


@pytest.mark.parametrize("kind", ["cpu", "meta", "cuda", "xpu", "mps"])
def test_what_torch_keeps_is_given_back_where_it_was_taken(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    emptied: list[str] = []
    for name in ("cuda", "xpu", "mps"):
        module = torch.get_device_module(name)
        monkeypatch.setattr(module, "empty_cache", lambda name=name: emptied.append(name))
    devices.empty_cache(torch.device(kind))
    assert emptied == ([] if kind in ("cpu", "meta") else [kind])
