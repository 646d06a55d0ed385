"""ONNX files of a reranker for onnxruntime, checked when written; of a sequence classifier laid out
as sentence-transformers reads them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.padded import padded_scores, scores_alone
from rerank_fast.model.texts import Pair, check_pairs, one_line

logger = logging.getLogger(__name__)

# sentence-transformers looks for onnx/model.onnx; int8 files it calls by the instruction set they
# are made for.
FILES = {"fp32": "onnx/model.onnx", "int8": "onnx/model_qint8_avx512_vnni.onnx"}
# Of modules it would take onnx/model.onnx for the encoder alone, and of an encoder-decoder for its
# logits: a file of the whole reranker has another name.
_WHOLE_FILES = {name: file.replace("/model", "/reranker") for name, file in FILES.items()}
# A single file of protocol buffers holds at most 2 GiB.
_LARGEST_FILE = 1_900_000_000
_EXTRA = ("onnx", "onnxscript", "onnxruntime")
_QUERIES = (
    "How many people live in Berlin?",
    "side effects of ibuprofen",
    "Why is the sky blue, and why does it turn red when the sun sets?",
    "东京有多少人口",
)
_DOCUMENTS = (
    "Yes.",
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square "
    "kilometres in 2019.",
    "Ibuprofen may cause nausea, heartburn and rashes; taken for long it can harm the stomach and "
    "the kidneys.",
    "Sunlight is scattered by the molecules of the air, blue light far more than red, since its "
    "waves are shorter. In the evening the light takes a longer way through the air, and what is "
    "left of it by then is mostly red.",
    "東京都の人口は約1400万人である。",
    "The museum island in Berlin's Spree holds five museums; the oldest of them opened in 1830. "
    * 8,
    "C++ code: for (int i = 0; i < n; ++i) { total += a[i] * b[i]; } // naïve, 100 % plain",
)
_CHECKED_TOGETHER = 5  # pairs a forward: short and long ones, so that padding is checked as well


@dataclass(frozen=True)
class Exported:
    """A written ONNX file and how far its scores are from PyTorch's, before any activation."""

    file: Path
    dtype: str
    pairs: int
    max_difference: float
    score_range: float  # largest minus smallest of PyTorch's scores
    tolerance: float


class _Logits(nn.Module):
    """The model with its inputs by position, which torch's exporter wants."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


class _Answering(nn.Module):
    """An encoder-decoder that gives a score, as a sequence classifier does."""

    def __init__(self, model: Any, answers: Answers) -> None:
        super().__init__()
        self.model, self.answers = model, answers

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        logits = padded_scores(self.model, inputs, self.answers)[:, None]
        return SequenceClassifierOutput(logits=logits)


def export_onnx(
    model: CrossEncoder,
    directory: str | Path,
    *,
    dtype: Literal["fp32", "int8"] = "fp32",
    pairs: Sequence[Pair] | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write DIRECTORY/onnx/model.onnx, or model_qint8_avx512_vnni.onnx there, once its scores are
    checked.

    Of a CrossEncoder of modules and of an encoder-decoder the file holds all that there is from
    token ids to the score, and is called reranker instead of model.

    The graph is torch's own export (torch.onnx.export with dynamo) in fp32, batch and length free;
    int8 is dynamic quantisation: weights are int8, activations are quantised as they come.

    Args:
        model: what to export; its weights are left as they are.
        directory: of the model, as save_pretrained writes it; only its onnx/ is written to.
        dtype: fp32 or int8.
        pairs: texts to check with; None takes a few dozen pairs of several languages and lengths.
        tolerance: largest difference from PyTorch's raw scores; None takes a fifth of the range
            that the scores of the pairs span for int8, and a thousandth of it for fp32, at most
            1e-3.
        overwrite: replace a file that is there.

    Raises:
        ValueError: the pooling leaves out a prompt's tokens, the model has no padding token and
            needs one, torch can't export it, a package is missing, the file is there, or the scores
            differ by more than the tolerance; then nothing is written.
    """
    if dtype not in FILES:
        raise ValueError(f"dtype must be one of {tuple(FILES)}, got {dtype!r}")
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"export needs {', '.join(missing)}: pip install 'rerank-fast[onnx]'")
    of_classifier = not (isinstance(model.model, ModularReranker) or _answers_by_decoder(model))
    target = Path(directory) / (FILES if of_classifier else _WHOLE_FILES)[dtype]
    if target.exists() and not overwrite:
        raise ValueError(
            f"{target} is there already; pass overwrite=True (--overwrite) to replace it"
        )
    if pairs is None:
        pairs = [(query, document) for query in _QUERIES for document in _DOCUMENTS]
    pairs = check_pairs(pairs)
    if not pairs:
        raise ValueError("export needs at least one pair of texts to check with")
    names = list(model.preprocess(pairs[:2]))
    if "prompt_length" in names:
        raise ValueError(
            f"the pooling of {model.name_or_path} leaves out the tokens of a prompt, whose number "
            "is no input of an ONNX file: expected include_prompt, or no default prompt"
        )
    if scores_alone(model.model, model.answers):
        raise ValueError(
            f"{model.name_or_path} has no padding token, by which a batch of an ONNX file is told "
            "from its padding: expected a pad_token_id in config.json"
        )
    exact = _copy_in_fp32(model)
    new = [path for path in (target.parent, Path(directory)) if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as staging:
            file = Path(staging) / target.name
            _write(exact, names, model.preprocess(pairs[:2]), file)
            if dtype == "int8":
                _quantize(file)
            exported = _compare(model, exact, names, file, target, dtype, pairs, tolerance)
            for part in sorted(
                Path(staging).iterdir(), reverse=True
            ):  # the weights of a large model first
                os.replace(part, target.parent / part.name)
    except OSError as error:
        raise ValueError(f"can't write to {target.parent}: {error}") from error
    finally:
        for made in new:
            with contextlib.suppress(OSError):  # it holds the file
                made.rmdir()
    return exported


def _answers_by_decoder(model: CrossEncoder) -> bool:
    return model.answers is not None and bool(model.model.config.is_encoder_decoder)


def _copy_in_fp32(model: CrossEncoder) -> Any:
    """The model on the CPU in fp32, with the attention that every exporter knows."""
    inner = model.model
    if isinstance(inner, ModularReranker):
        head = [copy.deepcopy(module).cpu().float() for module in inner.head]
        encoder = _encoder_in_fp32(inner.encoder)
        return ModularReranker(encoder, head, output=inner.output).eval()
    made = _encoder_in_fp32(inner).eval()
    if _answers_by_decoder(model):
        assert model.answers is not None
        return _Answering(made, model.answers).eval()
    return made


def _encoder_in_fp32(model: Any) -> Any:
    """A Hugging Face model anew."""
    kind, config = type(model), type(model.config)(**model.config.to_dict())
    config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
    made = kind(config)
    made.load_state_dict(
        {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    )
    return made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' reports: what matters, the difference of the scores, is checked and
    said.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _write(model: Any, names: Sequence[str], example: dict[str, Tensor], file: Path) -> None:
    free = torch.export.Dim.DYNAMIC
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Logits(model, names),
                tuple(example[name] for name in names),
                input_names=list(names),
                output_names=["logits"],
                dynamic_shapes=(tuple({0: free, 1: free} for _ in names),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        said = one_line(error.__cause__ or error)
        raise ValueError(f"torch can't export a {type(model).__name__}: {said}") from error
    if program is None:
        raise ValueError(f"torch could not export {type(model).__name__}")
    _save(program.model_proto, file)


def _save(proto: Any, file: Path) -> None:
    """One file; the weights of a model too large for that beside it, under the name that Optimum
    looks for.
    """
    import onnx

    large = proto.ByteSize() > _LARGEST_FILE
    onnx.save_model(
        proto,
        str(file),
        save_as_external_data=large,
        location=f"{file.name}_data" if large else None,
    )


def _quantize(file: Path) -> None:
    """Replace the file's weights with int8 ones; a scale for each output channel, which halves the
    error.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    fp32 = file.with_name(f"fp32-{file.name}")
    os.replace(file, fp32)
    with _quiet():
        quantize_dynamic(fp32, file, weight_type=QuantType.QInt8, per_channel=True)
    fp32.unlink()


def _compare(
    model: CrossEncoder,
    exact: Any,
    names: Sequence[str],
    file: Path,
    target: Path,
    dtype: str,
    pairs: Sequence[Pair],
    tolerance: float | None,
) -> Exported:
    """Scores of the file beside the model's own, in fp32, in padded batches of mixed lengths and
    one pair alone.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    starts = range(0, len(pairs), _CHECKED_TOGETHER)
    batches = [pairs[:1], *(pairs[start : start + _CHECKED_TOGETHER] for start in starts)]
    expected, found = [], []
    for batch in batches:
        features = model.preprocess(batch)
        with torch.inference_mode():
            expected.append(exact(**features).logits.reshape(-1).numpy())
        inputs = {
            name: features[name].numpy()
            for name in names
            if name in {i.name for i in session.get_inputs()}
        }
        found.append(session.run(None, inputs)[0].reshape(-1))
    scores, others = np.concatenate(expected), np.concatenate(found)
    difference = float(np.abs(scores - others).max())
    score_range = float(np.ptp(scores))
    if tolerance is None:
        tolerance = max(1e-6, 1e-3 * min(1, score_range)) if dtype == "fp32" else 0.2 * score_range
    if not difference <= tolerance:  # NaN too
        raise ValueError(
            f"{target} is not written: its scores differ from PyTorch's by up to {difference:.3g} "
            f"on {len(pairs)} pairs, whose scores span {score_range:.3g}; the tolerance is "
            f"{tolerance:.3g}"
        )
    return Exported(target, dtype, len(pairs), difference, score_range, tolerance)
