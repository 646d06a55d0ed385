"""monoT5: encoder-decoders that answer true or false, beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.losses import LambdaLoss
from rerank_fast.model.gradient_cache import backward_cached, backward_direct
from rerank_fast.model.packed.architectures import find_architecture, reason_to_pad
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.tokens.packing import plan_micro_batches
from tests.model.packed.test_encoder import (
    LENGTHS,
    PLANS,
    assert_gradients_close,
    gradients,
    make_tokens,
)
from tests.model_factory import make_tiny_t5
from tests.training.conftest import config_for, make_lists

PAIRS = [
    ("what is a panda", "a panda is a kind of bear"),
    ("rain", ""),
    ("", "the sea"),
    ("what is the capital of france", "the sea and the wind " * 20),
]
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 48,
    "d_kv": 8,  # heads of another width than d_model / num_heads
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
GATED = {"feed_forward_proj": "gated-gelu"}
MODELS = {
    "t5": lambda **o: T5ForConditionalGeneration(T5Config(**{**SIZES, **o})),
    "t5-1.1": lambda **o: T5ForConditionalGeneration(
        T5Config(**{**SIZES, **GATED, **o}, tie_word_embeddings=False)
    ),
    "mt5": lambda **o: MT5ForConditionalGeneration(MT5Config(**{**SIZES, **GATED, **o})),
}
ANSWERS = Answers(5, 9)


def make_t5(name: str, **options: float) -> Any:
    torch.manual_seed(7)
    model = MODELS[name](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_equal_the_padded_model(name: str):
    model = make_t5(name).eval().double()
    tokens = make_tokens(LENGTHS, types=False)
    upstream = torch.randn(len(tokens), dtype=torch.float64)
    inputs = tokens.pad(np.arange(len(tokens)), pad_token_id=0)
    start = torch.zeros(len(tokens), 1, dtype=torch.int64)
    logits = model(**inputs, decoder_input_ids=start).logits[:, 0]
    expected = logits[:, 5] - logits[:, 9]
    expected_gradients = gradients(model, expected, upstream)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model.to(dtype)
        architecture = find_architecture(model, ANSWERS)
        assert architecture is not None
        step, plan = PackedPairs(architecture, tokens, dtype=dtype), PLANS["several"]
        actual = torch.cat([step(indices) for indices in plan])[np.argsort(np.concatenate(plan))]
        torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)
        found = gradients(model, actual, upstream.to(dtype))
        assert_gradients_close(
            found, expected_gradients, bound=bound, dtype=dtype, num_tokens=sum(LENGTHS)
        )


def test_the_published_usage(tmp_path: Path):
    """The prompt put together here, cut before its end; log-probabilities of true."""
    directory = make_tiny_t5(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    published = AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    end = tokenizer("Relevant:")["input_ids"]
    ids = [
        tokenizer(f"Query: {query} Document: {document}")["input_ids"][:-1][: 64 - len(end)] + end
        for query, document in PAIRS
    ]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    start = torch.full((len(PAIRS), 1), published.config.decoder_start_token_id)
    with torch.inference_mode():
        logits = published(**batch, decoder_input_ids=start).logits[:, 0]
    vocabulary = tokenizer.get_vocab()
    of_both = logits[:, [vocabulary["▁false"], vocabulary["▁true"]]].log_softmax(dim=1)
    model = CrossEncoder(directory, device="cpu")
    assert not model.prepare(model.tokenize(PAIRS)).padded
    scores = model.predict(PAIRS, activation_fn=nn.LogSigmoid())
    np.testing.assert_allclose(scores, of_both[:, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.predict(PAIRS), of_both[:, 1].exp(), rtol=1e-4, atol=1e-5)
    assert [one["corpus_id"] for one in model.rank("rain", ["sea", "the rain"])] == [
        *np.argsort(-model.predict([("rain", "sea"), ("rain", "the rain")]))
    ]
    instructed = model.tokenize(PAIRS[1:2], prompt="panda question")
    assert tokenizer.decode(instructed.input_ids).startswith("panda question Query: rain")


@pytest.mark.parametrize("gated", [False, True])
def test_saved_as_it_came(gated: bool, tmp_path: Path):
    directory = make_tiny_t5(tmp_path / "made", gated=gated)
    model = CrossEncoder(directory, device="cpu", answers=("rain", "sea"))
    expected = model.predict(PAIRS)
    model.save_pretrained(tmp_path / "saved")
    before, after = (
        AutoModelForSeq2SeqLM.from_pretrained(one) for one in (directory, tmp_path / "saved")
    )
    assert before.config.scale_decoder_outputs is after.config.scale_decoder_outputs is not gated
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(one, after.state_dict()[n]) for n, one in before.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 64)
    again = CrossEncoder(tmp_path / "saved", device="cpu")
    assert again.answers == model.answers != CrossEncoder(directory, device="cpu").answers
    np.testing.assert_array_equal(again.predict(PAIRS), expected)


def test_the_loss_runs_it_packed_and_padded(tmp_path: Path):
    model = CrossEncoder(make_tiny_t5(tmp_path), device="cpu")
    inputs = [["rain", "panda"], [["rain", "wind"], ["bear", "fish"]]]
    labels, found = [torch.tensor([1, 0])] * 2, []
    for packed in (True, False):
        model.zero_grad()
        loss = LambdaLoss(model, packed=packed)(inputs, labels)
        loss.backward()
        named = model.named_parameters()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    options = {"bound": 1e-5, "dtype": torch.float32, "num_tokens": 64}
    assert_gradients_close(found[0][1], found[1][1], **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_gives_the_gradient_of_direct_with_dropout(tmp_path: Path, checkpointing: bool):
    model = CrossEncoder(make_tiny_t5(tmp_path, dropout=0.2), device="cpu").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens = model.tokenize([*PAIRS, *PAIRS[:2]])
    plan, found = plan_micro_batches(tokens.lengths, max_pairs=2), []
    for backward in (backward_direct, backward_cached):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        options = {"device": model.device} if backward is backward_cached else {}
        step = model.prepare(tokens)
        assert not step.padded
        # A pair whose score the loss leaves out has no gradient and need not be run again.
        pushed = backward(step, plan, lambda scores: scores[1:].sin().sum(), **options)
        named = model.named_parameters()
        grads = {name: one.grad.clone() for name, one in named if one.grad is not None}
        found.append((pushed.scores, grads))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-6)


def test_int8_is_near(tmp_path: Path):
    directory = make_tiny_t5(tmp_path)
    exact, model = (CrossEncoder(directory, device="cpu", dtype=one) for one in (None, "int8"))
    assert type(model.model.lm_head) is nn.Linear
    near = model.predict(PAIRS)
    assert not np.array_equal(near, exact.predict(PAIRS))
    np.testing.assert_allclose(near, exact.predict(PAIRS), atol=0.05)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}], ids=["whole", "lora"])
def test_trained_and_written(settings: dict[str, Any], tmp_path: Path):
    model = CrossEncoder(make_tiny_t5(tmp_path / "model", dropout=0.1), device="cpu")
    before = model.predict(PAIRS)
    config = config_for(tmp_path / "out", batch_size=2, learning_rate=1e-2, **settings)
    Trainer(model, make_lists(8), config=config).train()
    expected = model.predict(PAIRS)
    assert np.abs(expected - before).max() > 1e-3
    again = CrossEncoder(tmp_path / "out", device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-6)
    if settings:
        from peft import PeftModel

        base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
        merged = adapted.merge_and_unload().state_dict()
        for name, weight in again.model.state_dict().items():
            torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-5)


def test_what_is_padded_and_what_is_refused(tmp_path: Path):
    model = UMT5ForConditionalGeneration(UMT5Config(**SIZES))
    assert reason_to_pad(model, ANSWERS) == (
        "packed execution does not know UMT5ForConditionalGeneration"
    )
    hooked = make_t5("t5")
    hooked.decoder.block[1].register_forward_hook(lambda *_: None)
    assert "decoder.block.1 has hooks" in reason_to_pad(hooked, ANSWERS)
    apart = make_t5("t5")
    apart.decoder.embed_tokens.weight = nn.Parameter(apart.shared.weight.detach().clone())
    assert "word embeddings of their own" in reason_to_pad(apart, ANSWERS)
    directory = make_tiny_t5(tmp_path)
    with pytest.raises(ValueError, match="an answer that is one, got 'truefalse', which"):
        CrossEncoder(directory, answers=("truefalse", "false"))
    with pytest.raises(ValueError, match="answers must be a word or two, got"):
        CrossEncoder(directory, answers=("a", "b", "c"))
    with pytest.raises(ValueError, match="template can't carry a pair: expected a chat template"):
        CrossEncoder(directory, template="{{ messages[0].content }}")
