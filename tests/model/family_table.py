"""The table of docs/families.md, found out from tiny models: python -m tests.model.family_table

That rewrites the table between its two marks; tests/model/test_family_table.py compares it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rerank_fast.model import padded
from rerank_fast.model.packed.architectures import find_architecture
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.packed.ready_layers import ReadyLayers
from rerank_fast.model.precision.int8 import Int8Linear, quantize_linears
from tests.model.packed.test_encoder import make_model, make_tokens, padded_scores
from tests.model.test_encoder_decoders import ANSWERS, make_t5
from tests.model.test_encoder_decoders import MODELS as ENCODER_DECODERS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: python -m tests.model.family_table -->", "<!-- end of table -->"
# Published name, and the tiny model that stands for it.
FAMILIES = {
    "BERT": "bert",
    "RoBERTa": "roberta",
    "XLM-RoBERTa": "xlm-roberta",
    "CamemBERT": "camembert",
    "Data2Vec": "data2vec",
    "X-MOD": "xmod",
    "RoBERTa-PreLayerNorm": "roberta-prelayernorm",
    "ELECTRA": "electra",
    "DistilBERT": "distilbert",
    "MPNet": "mpnet",
    "DeBERTa-v2": "deberta-v2",
    "DeBERTa-v3": "deberta-v3",
    "NomicBERT": "nomic-bert",
    "GTE": "gte",
    "Jina XLM-RoBERTa": "jina",
    "ModernBERT": "modernbert",
    "EuroBERT": "eurobert",
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2-sliding",
    "Qwen3": "qwen3",
    "Gemma": "gemma",
    "Gemma 2": "gemma2",
    "Gemma 3 (text)": "gemma3",
    "T5 (monoT5)": "t5",
    "T5 1.1 (monoT5)": "t5-1.1",
    "mT5": "mt5",
}
# Of which torch's exporter makes no file that scores as PyTorch does: a slow test tries the others.
NOT_EXPORTED: frozenset[str] = frozenset()
HEAD = "| Family | Class | Packed | Trained | A layer on a CPU | A layer on a GPU | int8 | ONNX |"


def rows() -> list[str]:
    return [HEAD, "|---" * (HEAD.count("|") - 1) + "|", *(row(name) for name in FAMILIES)]


def row(family: str) -> str:
    """What a family's model does: scores, gradients and int8 beside the padded model's."""
    name = FAMILIES[family]
    model: Any = made(name).eval()
    packed = find_architecture(model, answers_of(model)) is not None
    expected = _padded(model)
    cells = [family, f"`{type(model).__name__}`", _mark(packed and _equal(model, expected))]
    expected.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _packed(model).sum().backward()
    norm = max(float(grad.norm()) for grad in grads.values())
    trained = all(
        (dict(model.named_parameters())[n].grad - grad).norm() < 1e-4 * norm
        for n, grad in grads.items()
    )
    on_gpu = made(name).to("meta")
    on_gpu.tie_weights()  # which that move has cut
    cells += [_mark(trained), _layers(model), _layers(on_gpu)]
    quantize_linears(model)
    linear = [m for m in model.base_model.modules() if isinstance(m, Int8Linear)]
    with torch.inference_mode():
        near = (_packed(model) - expected).abs().max() < 0.2 * expected.abs().max() + 0.2
    cells += [_mark(bool(linear) and bool(near)), _mark(name not in NOT_EXPORTED)]
    return f"| {' | '.join(cells)} |"


def _mark(holds: bool) -> str:
    return "yes" if holds else "no"


def made(name: str) -> Any:
    """The tiny model of this name."""
    return make_t5(name) if name in ENCODER_DECODERS else make_model(name)


def answers_of(model: Any) -> Answers | None:
    return ANSWERS if model.config.is_encoder_decoder else None


def _padded(model: Any) -> torch.Tensor:
    tokens = make_tokens([5, 17, 3], types=False)
    if not model.config.is_encoder_decoder:
        return padded_scores(model, tokens)
    inputs = tokens.pad(np.arange(3), pad_token_id=model.config.pad_token_id)
    return padded.padded_scores(model, inputs, ANSWERS)


def _packed(model: Any) -> torch.Tensor:
    architecture = find_architecture(model, answers_of(model))
    assert architecture is not None
    tokens = make_tokens([5, 17, 3], types=False)
    return PackedPairs(architecture, tokens, dtype=torch.float32)(np.arange(3))


def _equal(model: Any, expected: torch.Tensor) -> bool:
    return torch.allclose(_packed(model), expected, rtol=1e-4, atol=1e-5)


def _layers(model: Any) -> str:
    """Whether autograd sees a trained layer as one function, or as its parts."""
    architecture = find_architecture(model, answers_of(model))
    assert architecture is not None
    ready = ReadyLayers(architecture, torch.float32, 100, compiles=False)
    whole = [bool(getattr(layer, "trained", None)) for layer in ready.layers]
    return "one function" if all(whole) else "composed"


def page(text: str) -> str:
    """The text with the table as it is found to be."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return "\n".join([before + BEGIN, "", *rows(), "", END + after])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
