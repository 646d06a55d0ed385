"""Dtypes on machines that have them and on machines that don't: what scores are computed in, and
that all score.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from rerank_fast import CrossEncoder
from rerank_fast.model import preparation
from rerank_fast.model.packed.linear import StepLinear
from rerank_fast.model.precision import hardware
from rerank_fast.model.scoring import is_out_of_memory
from rerank_fast.model.tokens.templates import QWEN3_RERANKER_TEMPLATE
from tests.model_factory import make_tiny_bert, make_tiny_qwen3, make_tokenizer

CPU = torch.device("cpu")
PAIRS = [("what is the panda", doc) for doc in ("a kind of bear", "rain and wind", "", "sea " * 40)]


def make_deberta(directory: Path) -> Path:
    """Save a tiny model that can't be packed."""
    tokenizer = make_tokenizer()
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=1,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        conv_kernel_size=3,  # which packed execution does not know
    )
    torch.manual_seed(0)
    DebertaV2ForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


MODELS = {
    "packed": make_tiny_bert,
    "padded": make_deberta,
    "causal": lambda path: make_tiny_qwen3(path, chat_template=QWEN3_RERANKER_TEMPLATE),
}


@pytest.fixture
def emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which 16 bits take five times as long."""
    seconds = {torch.float32: 1.0, torch.bfloat16: 5.0, torch.float16: 5.0}
    monkeypatch.setattr(hardware, "product_seconds", seconds.get)
    preparation._say_wide.cache_clear()


@pytest.mark.usefixtures("emulates")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_only_emulated_are_computed_in_fp32(
    name: str,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    seen: set[torch.dtype] = set()
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, *rest: (seen.add(x.dtype), linear(x, *rest))[1]
    )
    directory = MODELS[name](tmp_path / "model")
    narrow = CrossEncoder(directory, dtype=dtype, device="cpu")
    wide = CrossEncoder(directory, dtype=dtype, device="cpu")
    wide.model.float()  # the rounded weights
    actual = narrow.predict(PAIRS, activation_fn=nn.Identity())
    if name == "padded":
        assert seen == {torch.float32}
    # Packed execution embeds, and applies the head, in the weights' own dtype.
    bound = 1e-5 if name == "padded" else 16 * torch.finfo(dtype).eps
    np.testing.assert_allclose(
        actual, wide.predict(PAIRS, activation_fn=nn.Identity()), rtol=bound, atol=bound
    )
    assert {one.dtype for one in narrow.model.parameters()} == {dtype}  # as they were
    assert narrow.dtype_name == "float32"
    said = [record.message for record in caplog.records if "computed in float32" in record.message]
    assert len(said) == 1
    assert str(dtype).removeprefix("torch.") in said[0]


def test_what_is_fast_is_kept(monkeypatch: pytest.MonkeyPatch):
    seconds = {torch.float32: 1.0, torch.bfloat16: 0.5, torch.float16: 5.0}
    monkeypatch.setattr(hardware, "product_seconds", seconds.get)
    kept = [hardware.arithmetic(one, CPU) for one in (*seconds, torch.float64)]
    assert kept == [torch.float32, torch.bfloat16, torch.float32, torch.float64]
    assert hardware.arithmetic(torch.float16, torch.device("meta")) == torch.float16


@pytest.mark.usefixtures("emulates")
@pytest.mark.parametrize("name", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_emulated_weights(name: str, checkpointing: bool, tmp_path: Path):
    """They arrive in the weights themselves."""
    directory = MODELS[name](tmp_path / "model")
    gradients = {}
    for wide in (False, True):
        model = CrossEncoder(directory, dtype=torch.bfloat16, device="cpu").eval()
        if wide:
            model.model.float()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        tokens = model.tokenize(PAIRS)
        step = model.prepare(tokens)
        with step.region:
            step(np.arange(len(PAIRS))).sum().backward()
        gradients[wide] = {
            n: p.grad.float() for n, p in model.model.named_parameters() if p.grad is not None
        }
    assert gradients[False].keys() == gradients[True].keys()
    for one, exact in gradients[True].items():
        assert (gradients[False][one] - exact).norm() <= 0.1 * exact.norm() + 1e-2, one


def test_a_checkpoint_of_several_dtypes_scores(tmp_path: Path):
    directory = make_tiny_bert(tmp_path / "model")
    exact = CrossEncoder(directory, device="cpu").predict(PAIRS)
    tensors = load_file(directory / "model.safetensors")
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    mixed = {name: one.to(dtypes[n % 3]) for n, (name, one) in enumerate(tensors.items())}
    save_file(mixed, directory / "model.safetensors", metadata={"format": "pt"})
    for dtype in (None, "auto", "int8", "float16", "bfloat16", "float32"):
        scores = CrossEncoder(directory, dtype=dtype, device="cpu").predict(PAIRS)
        np.testing.assert_allclose(scores, exact, atol=5e-2, err_msg=str(dtype))
    opened = CrossEncoder(directory, dtype="float32", device="cpu")
    opened.model.bert.encoder.layer[0].bfloat16()
    np.testing.assert_allclose(opened.predict(PAIRS), exact, atol=5e-2)


def test_a_model_moved_to_a_dtype_is_that_which_is_opened_in_it(tmp_path: Path):
    """Frequencies of rotary positions are no weights: rounded, they would be others than those of
    the model that is saved.
    """
    directory = make_tiny_qwen3(tmp_path / "qwen3", chat_template=QWEN3_RERANKER_TEMPLATE)
    opened = CrossEncoder(directory, dtype="bfloat16", device="cpu")
    moved = CrossEncoder(directory, device="cpu").to(torch.bfloat16)
    np.testing.assert_array_equal(moved.predict(PAIRS), opened.predict(PAIRS))
    buffers = dict(moved.named_buffers())
    assert {name: one.dtype for name, one in opened.named_buffers()} == {
        name: one.dtype for name, one in buffers.items()
    }
    assert {one.dtype for one in moved.parameters()} == {torch.bfloat16}


def test_a_step_in_another_dtype_than_the_weights(tmp_path: Path):
    model = CrossEncoder(make_tiny_bert(tmp_path / "model"), device="cpu")
    exact = model.predict(PAIRS)
    with model.computing_in(torch.bfloat16):
        assert model.dtype_name == "bfloat16"
        narrow = model.predict(PAIRS)
    assert model.dtype_name == "float32"
    assert 0 < np.abs(narrow - exact).max() < 2e-2
    np.testing.assert_array_equal(model.predict(PAIRS), exact)


def test_adapters_are_called_whatever_the_dtypes():
    module = nn.Linear(8, 4, dtype=torch.bfloat16)
    module.register_forward_hook(lambda *call: None)
    with torch.no_grad():
        assert StepLinear([module], torch.float32, 0)(torch.randn(3, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        ("could not create a primitive", True),  # as oneDNN says it under a limit of memory
        (
            "could not create a primitive descriptor for the inner product forward propagation "
            "primitive.",
            False,
        ),
        (
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
            "memory",
            True,
        ),
        ("mat1 and mat2 must have the same dtype", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("HIP error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("MPS backend out of memory (MPS allocated: 9.0 GB, other allocations: 1.0 GB)", True),
        ("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
        ("out of resource: shared memory, Required: 114688, Hardware limit: 101376", False),
    ],
)
def test_lack_of_memory_is_known_by_its_messages(message: str, memory: bool):
    assert is_out_of_memory(RuntimeError(message)) == memory


def test_dtype_auto_is_said_in_one_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        dtype = hardware.fastest(CPU)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(f"dtype auto: {hardware.name_of(dtype)} on cpu: a product takes ")


AVX2 = {
    "RERANK_FAST_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
EVERYTHING = """
import sys
import numpy as np
import torch
from rerank_fast import CrossEncoder, Trainer
from tests.model.test_precision import PAIRS
from tests.training.conftest import config_for, make_lists
from pathlib import Path

assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
*models, output = map(Path, sys.argv[1:])
for directory in models:
    exact = CrossEncoder(directory, dtype="float32").predict(PAIRS)
    for dtype in (None, "auto", "int8", "bfloat16", "float16"):
        scores = CrossEncoder(directory, dtype=dtype).predict(PAIRS)
        np.testing.assert_allclose(scores, exact, atol=5e-2, err_msg=f"{directory} {dtype}")
    assert CrossEncoder(directory, dtype="auto").dtype_name == "float32"
runs = (("auto", models[0]), ("bf16-pure", models[0]), ("bf16-pure", models[1]))
for precision, directory in runs:
    config = config_for(output / f"{precision}-{directory.name}", precision=precision, max_steps=2)
    trainer = Trainer(directory, make_lists(8), eval=make_lists(4, seed=1), config=config)
    trainer.train()
    assert trainer.config.precision == precision.replace("auto", "fp32")
    assert trainer.backward.dtype == trainer.evaluated_in == torch.float32
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86's instruction sets")
def test_every_dtype_scores_and_trains_without_avx512_and_bf16(tmp_path: Path):
    """In a process that leaves those instructions unused."""
    models = [make(tmp_path / name) for name, make in MODELS.items()]
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING, *map(str, models), str(tmp_path / "runs")],
        env={**os.environ, **AVX2},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
