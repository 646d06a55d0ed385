"""Causal rerankers that answer yes or no, beside transformers and sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rerank_fast import CrossEncoder
from rerank_fast.losses import LambdaLoss
from rerank_fast.model.gradient_cache import backward_cached, backward_direct
from rerank_fast.model.packed.architectures import (
    find_answer_head,
    find_architecture,
)
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.tokens.packing import plan_micro_batches
from rerank_fast.model.tokens.templates import BGE_RERANKER_TEMPLATE, QWEN3_RERANKER_TEMPLATE
from tests.model.packed.test_encoder import (
    DECODER,
    GEMMA2,
    GEMMA3,
    LENGTHS,
    PLANS,
    SLIDING,
    gradients,
    make_tokens,
    relative_errors,
)
from tests.model_factory import make_tiny_bert, make_tiny_gemma, make_tiny_qwen3

PAIRS = [
    ("what is a panda", "a panda is a kind of bear"),
    ("how many people live in berlin", "berlin museum"),
    ("rain", ""),
    ("", "the sea and the wind " * 20),
    ("what is the capital of france", "paris"),
]
MODELS = {
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, tie_word_embeddings=False)),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SLIDING, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "llama-both-ways": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, is_causal=False)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**DECODER, sliding_window=8)),
    "gemma-tied": lambda: GemmaForCausalLM(GemmaConfig(**DECODER)),
    "gemma2-tied": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA2, final_logit_softcapping=4.0)),
    "gemma3-tied": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3)),
    "gemma3-capped": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GEMMA3, final_logit_softcapping=4.0)
    ),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen3"
    return make_tiny_qwen3(path, chat_template=QWEN3_RERANKER_TEMPLATE, tied=request.param)


@pytest.mark.parametrize("answers", [Answers(5, 9), Answers(7)], ids=["yes-no", "one"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_equal_the_left_padded_model(name: str, answers: Answers):
    torch.manual_seed(7)
    model = MODELS[name]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
    tokens = make_tokens(LENGTHS, types=False)
    upstream = torch.randn(len(tokens), dtype=torch.float64)
    # Gemma 2's softmax is fp32, and its mask fp64's least: NaN of padding.
    texts = np.arange(len(tokens))
    batches = [*texts[:, None]] if name.startswith("gemma2") else [texts]
    inputs = [tokens.pad(one, pad_token_id=0, padding_side="left") for one in batches]
    logits = torch.cat([model(**one).logits[:, -1] for one in inputs])
    expected = logits[:, answers.true_token_id]
    if answers.false_token_id is not None:
        expected = expected - logits[:, answers.false_token_id]
    expected_gradients = gradients(model, expected, upstream)
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model.to(dtype)
        architecture = find_architecture(model, answers)
        assert architecture is not None
        step = PackedPairs(architecture, tokens, dtype=dtype)
        plan = PLANS["several"]
        actual = torch.cat([step(indices) for indices in plan])[np.argsort(np.concatenate(plan))]
        torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)
        errors = relative_errors(gradients(model, actual, upstream.to(dtype)), expected_gradients)
        assert max(errors.values()) <= 3 * bound, errors


def test_only_the_answers_rows_of_the_vocabulary_are_multiplied(directory: Path, monkeypatch):
    model = CrossEncoder(directory, device="cpu")
    expected = model.predict(PAIRS)

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the whole vocabulary was multiplied")

    monkeypatch.setattr(model.model.lm_head, "forward", forward.__get__(model.model.lm_head))
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-6)
    tokens = model.tokenize(PAIRS)
    with torch.inference_mode():
        padded = model.prepare(tokens, packed=False)(np.arange(len(PAIRS)))
    np.testing.assert_allclose(padded.sigmoid(), expected, rtol=0, atol=1e-5)


def test_scores_equal_sentence_transformers(directory: Path):
    peer, model = (
        PeerCrossEncoder(str(directory), device="cpu"),
        CrossEncoder(directory, device="cpu"),
    )
    assert model.num_labels == 1
    for options in ({}, {"prompt": "is it about a panda"}, {"activation_fn": nn.Identity()}):
        ours, theirs = model.predict(PAIRS, **options), peer.predict(PAIRS, **options)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(set(theirs.tolist())) == len(PAIRS)


def test_truncation_keeps_the_end_of_the_prompt(directory: Path, caplog: pytest.LogCaptureFixture):
    pairs = [(query, document + " the sea" * 300) for query, document in PAIRS[:2]] + PAIRS[2:3]
    peer, model = (
        PeerCrossEncoder(str(directory), device="cpu"),
        CrossEncoder(directory, device="cpu"),
    )
    np.testing.assert_allclose(model.predict(pairs), peer.predict(pairs), rtol=1e-5, atol=1e-5)
    assert [
        record.message for record in caplog.records if record.name.startswith("rerank_fast")
    ] == [
        "2 of 3 pairs are longer than max_length=384 tokens and were truncated; this is said "
        "once, and the model's truncated_pairs counts on."
    ]
    ending = model.tokenize(PAIRS[:1]).input_ids[-12:].tolist()
    tokens = model.tokenize(pairs)
    assert tokens.lengths.tolist()[:2] == [384, 384]
    assert all(tokens.input_ids[end - 12 : end].tolist() == ending for end in tokens.offsets[1:])


def test_the_published_usage(tmp_path: Path):
    """A checkpoint as Qwen published it, with a chat template that knows no pairs; the prompt put
    together here.
    """
    chat = (
        "{% for m in messages if m.role == 'user' %}<|im_start|>user\\n{{ m.content }}{% endfor %}"
    )
    directory = make_tiny_qwen3(tmp_path, chat_template=chat)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    causal = AutoModelForCausalLM.from_pretrained(directory).eval()
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        "and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    task = "Given a web search query, retrieve relevant passages that answer the query"
    texts = [f"{prefix}<Instruct>: {task}\n<Query>: {q}\n<Document>: {d}{suffix}" for q, d in PAIRS]
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        logits = causal(**inputs).logits[:, -1]
    answers = [tokenizer.convert_tokens_to_ids(token) for token in ("no", "yes")]
    expected = torch.log_softmax(logits[:, answers], dim=1)[:, 1].exp().numpy()
    model = CrossEncoder(directory, device="cpu")
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    assert (
        model.tokenizer.apply_chat_template(
            [
                {"role": "query", "content": PAIRS[0][0]},
                {"role": "document", "content": PAIRS[0][1]},
            ],
            tokenize=False,
        )
        == texts[0]
    )
    model.save_pretrained(tmp_path / "saved")  # with a template that sentence-transformers can use
    peer = PeerCrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(peer.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)


def test_the_published_usage_of_bges_gemma(tmp_path: Path):
    """Whose files have no template: its texts are tokenised one by one, and joined."""
    directory = make_tiny_gemma(tmp_path / "gemma")
    with pytest.raises(ValueError, match=r"no token yes or no; expected these, .* or answers="):
        CrossEncoder(directory)
    with pytest.raises(ValueError, match=r"chat template can't carry a pair: .* or as template="):
        CrossEncoder(directory, answers="Yes")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    question = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the "
        "query by providing a prediction of either 'Yes' or 'No'."
    )
    end, question = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", question)
    )
    expected, causal = [], AutoModelForCausalLM.from_pretrained(directory).eval()
    for pair in PAIRS:
        query, passage = (
            tokenizer(f"{name}: {text}", add_special_tokens=False)["input_ids"][:384]
            for name, text in zip("AB", pair, strict=True)
        )
        ids = [tokenizer.bos_token_id, *query, *end, *passage][: 512 - len(end) - len(question)]
        ids += [*end, *question]
        with torch.inference_mode():
            expected.append(
                float(causal(torch.tensor([ids])).logits[0, -1, tokenizer.vocab["Yes"]])
            )
    options = {"template": BGE_RERANKER_TEMPLATE, "answers": "Yes", "device": "cpu"}
    model = CrossEncoder(directory, activation_fn=nn.Identity(), **options)
    assert not model.prepare(model.tokenize(PAIRS)).padded
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")  # which needs neither any more
    again = CrossEncoder(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again.predict(PAIRS), model.predict(PAIRS))
    peer = PeerCrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(peer.predict(PAIRS), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="is no language model: expected template=None"):
        CrossEncoder(make_tiny_bert(tmp_path / "bert"), answers="Yes")


def test_what_is_saved_opens_on_either_side(directory: Path, tmp_path: Path):
    model = CrossEncoder(directory, device="cpu", activation_fn=nn.Tanh())
    scores = model.predict(PAIRS)
    model.save_pretrained(tmp_path / "ours")
    peer = PeerCrossEncoder(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(peer.predict(PAIRS), scores, rtol=0, atol=1e-5)
    peer[1].true_token_id, peer[1].false_token_id = 11, None
    peer.save_pretrained(str(tmp_path / "theirs"))
    again = CrossEncoder(tmp_path / "theirs", device="cpu")
    assert again.answers == Answers(11, None)
    np.testing.assert_allclose(again.predict(PAIRS), peer.predict(PAIRS), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "ours", overwrite=True)


def test_the_drop_in_loss_runs_a_causal_model_packed(directory: Path):
    model = CrossEncoder(directory, device="cpu")
    inputs, labels = (
        [["rain", "panda"], [["rain", "wind"], ["bear", "fish"]]],
        [torch.tensor([1, 0])] * 2,
    )
    losses = {}
    for packed in (True, False):
        model.zero_grad()
        loss = LambdaLoss(model, packed=packed)(inputs, labels)
        loss.backward()
        losses[packed] = loss.detach(), model.model.model.embed_tokens.weight.grad.clone()
    (loss, gradient), (padded_loss, padded_gradient) = losses[True], losses[False]
    torch.testing.assert_close(loss, padded_loss, rtol=1e-5, atol=1e-6)
    assert (gradient - padded_gradient).norm() < 1e-4 * padded_gradient.norm()


@pytest.mark.parametrize("packed", [True, False])
def test_the_gradient_cache_gives_the_same_gradient(directory: Path, packed: bool):
    """The answers' rows of the vocabulary are shared by micro-batches, each of which has its own
    backward.
    """
    model = CrossEncoder(directory, device="cpu", dtype="float32").train()
    tokens = model.tokenize(PAIRS)
    plan = plan_micro_batches(tokens.lengths, max_pairs=2)
    found = []
    for cached in (False, True):
        model.zero_grad(set_to_none=True)
        step = model.prepare(tokens, packed=packed)
        if cached:
            backward_cached(step, plan, torch.sum, device=torch.device("cpu"))
        else:
            backward_direct(step, plan, torch.sum)
        found.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_causal_models_in_int8(directory: Path):
    exact, model = (
        CrossEncoder(directory, device="cpu"),
        CrossEncoder(directory, device="cpu", dtype="int8"),
    )
    np.testing.assert_allclose(model.predict(PAIRS), exact.predict(PAIRS), atol=0.05)
    assert type(model.model.lm_head) is nn.Linear


def test_causal_models_that_can_not_be_used(tmp_path: Path):
    directory = make_tiny_qwen3(tmp_path / "plain")
    file = directory / "tokenizer.json"
    original = file.read_text(encoding="utf-8")
    file.write_text(original.replace("<|im_start|>", "<|begin|>"), encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            text = (directory / name).read_text(encoding="utf-8")
            (directory / name).write_text(
                text.replace("<|im_start|>", "<|begin|>"), encoding="utf-8"
            )
    with pytest.raises(ValueError, match="chat template can't carry a pair"):
        CrossEncoder(directory)
    vocabulary = json.loads(file.read_text(encoding="utf-8"))
    vocabulary["model"]["vocab"]["##yes"] = vocabulary["model"]["vocab"].pop("yes")
    file.write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(ValueError, match="has no token yes or no"):
        CrossEncoder(directory)


def test_a_head_that_is_more_than_a_product_is_called():
    model = MODELS["qwen3"]()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    assert find_answer_head(model, Answers(1, 2)) is None
    assert find_architecture(model, Answers(1, 2)) is None


def test_encoders_have_no_answers(tmp_path: Path):
    assert CrossEncoder(make_tiny_bert(tmp_path)).answers is None
