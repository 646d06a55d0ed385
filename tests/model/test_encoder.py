"""Packed execution against the padded Hugging Face model it stands for."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    CamembertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from rerank_fast.model.architectures import find_architecture
from rerank_fast.model.encoder import PackedStep
from rerank_fast.model.packing import TokenizedPairs

VOCABULARY, POSITIONS = 97, 70
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=POSITIONS + 2,
    num_labels=1,
)
ROBERTA = {**SIZES, "pad_token_id": 1, "type_vocab_size": 2}

MODELS = {
    "bert": lambda **o: BertForSequenceClassification(BertConfig(**SIZES, **o)),
    "bert-relu": lambda **o: BertForSequenceClassification(BertConfig(**SIZES, hidden_act="relu", **o)),
    "bert-1-layer": lambda **o: BertForSequenceClassification(BertConfig(**{**SIZES, "num_hidden_layers": 1}, **o)),
    "roberta": lambda **o: RobertaForSequenceClassification(RobertaConfig(**ROBERTA, **o)),
    "xlm-roberta": lambda **o: XLMRobertaForSequenceClassification(XLMRobertaConfig(**ROBERTA, **o)),
    "camembert": lambda **o: CamembertForSequenceClassification(CamembertConfig(**ROBERTA, **o)),
    "electra": lambda **o: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=24, **o)),
    "electra-wide": lambda **o: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=48, **o)),
    "distilbert": lambda **o: DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=48,
            n_layers=3,
            n_heads=4,
            hidden_dim=64,
            max_position_embeddings=POSITIONS + 2,
            num_labels=1,
            attention_dropout=o.get("attention_probs_dropout_prob", 0.1),
            dropout=o.get("hidden_dropout_prob", 0.1),
            seq_classif_dropout=o.get("hidden_dropout_prob", 0.2),
        )
    ),
}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


def make_model(name: str, **options: float) -> torch.nn.Module:
    torch.manual_seed(7)
    model = MODELS[name](**options)
    with torch.no_grad():  # weights of the usual 0.02 would make all scores nearly the same
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
    return model


def make_tokens(lengths: list[int], *, types: bool = True, seed: int = 3) -> TokenizedPairs:
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    return TokenizedPairs(
        generator.integers(4, VOCABULARY, total).astype(np.int32),
        generator.integers(0, 2, total).astype(np.int8) if types else None,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def padded_scores(model: torch.nn.Module, tokens: TokenizedPairs) -> torch.Tensor:
    inputs = tokens.pad(np.arange(len(tokens)), pad_token_id=model.config.pad_token_id)
    if model.config.model_type == "distilbert":
        inputs.pop("token_type_ids", None)
    return model(**inputs).logits.squeeze(1)


def packed_scores(
    model: torch.nn.Module, tokens: TokenizedPairs, plan: list[np.ndarray], **options: object
) -> torch.Tensor:
    architecture = find_architecture(model)
    assert architecture is not None
    step = PackedStep(architecture, tokens, **{"dtype": torch.float32, **options})
    return torch.cat([step(indices) for indices in plan])[np.argsort(np.concatenate(plan))]


def gradients(model: torch.nn.Module, scores: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    scores.backward(upstream)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        # A gradient that is exactly 0 in theory (key biases) is rounding in both: measured against the largest.
        scale = max(gradient.abs().max(), 1e-3 * largest)
        error = (actual[name] - gradient).abs().max() / scale
        assert error < bound, f"{name}: {error:.2e}"


LENGTHS = [5, 1, POSITIONS, 17, 2, 33, 33, 64]
PLANS = {
    "one": [np.arange(8)],
    "several": [np.array([2, 7, 0]), np.array([1]), np.array([5, 4, 6, 3])],
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("types", [True, False], ids=["types", "no-types"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_equal_the_padded_model(name: str, types: bool, plan: str) -> None:
    tokens = make_tokens(LENGTHS, types=types)
    upstream = torch.randn(len(tokens), dtype=torch.float64)
    # In fp64 the two differ by nothing but the order of sums; in fp32, through the kernels, by its rounding.
    model = make_model(name).eval().double()
    expected = padded_scores(model, tokens)
    expected_gradients = gradients(model, expected, upstream)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model.to(dtype)
        actual = packed_scores(model, tokens, PLANS[plan], dtype=dtype)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)
        assert_same_gradients(gradients(model, actual, upstream.to(dtype)), expected_gradients, bound)
