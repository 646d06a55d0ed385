"""Packed execution against the padded Hugging Face model it stands for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    CamembertForSequenceClassification,
    Data2VecTextConfig,
    Data2VecTextForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    EuroBertConfig,
    EuroBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    GteConfig,
    GteForSequenceClassification,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    NomicBertConfig,
    NomicBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XmodConfig,
    XmodForSequenceClassification,
)

from rerank_fast.model.packed.architectures import find_architecture, reason_to_pad
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.preparation import Preparer, prepare_packed
from rerank_fast.model.scoring import score
from rerank_fast.model.tokens.packing import TokenizedPairs, fill_up

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
    "bert-relu": lambda **o: BertForSequenceClassification(
        BertConfig(**SIZES, hidden_act="relu", **o)
    ),
    "bert-1-layer": lambda **o: BertForSequenceClassification(
        BertConfig(**{**SIZES, "num_hidden_layers": 1}, **o)
    ),
    "roberta": lambda **o: RobertaForSequenceClassification(RobertaConfig(**ROBERTA, **o)),
    "xlm-roberta": lambda **o: XLMRobertaForSequenceClassification(
        XLMRobertaConfig(**ROBERTA, **o)
    ),
    "camembert": lambda **o: CamembertForSequenceClassification(CamembertConfig(**ROBERTA, **o)),
    "electra": lambda **o: ElectraForSequenceClassification(
        ElectraConfig(**SIZES, embedding_size=24, **o)
    ),
    "electra-wide": lambda **o: ElectraForSequenceClassification(
        ElectraConfig(**SIZES, embedding_size=48, **o)
    ),
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
DECODER = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 12}
SLIDING = {key: value for key, value in DECODER.items() if key != "head_dim"}
MODERN = {**SIZES, "pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 16}
MODELS |= {
    "modernbert": lambda **o: ModernBertForSequenceClassification(
        ModernBertConfig(**{**MODERN, "num_hidden_layers": 5}, **o)
    ),
    "modernbert-last-layer-slides": lambda **o: ModernBertForSequenceClassification(
        ModernBertConfig(**{**MODERN, "num_hidden_layers": 4}, **o)
    ),
    "modernbert-mean": lambda **o: ModernBertForSequenceClassification(
        ModernBertConfig(**MODERN, classifier_pooling="mean", norm_bias=True, **o)
    ),
    "llama": lambda **o: LlamaForSequenceClassification(LlamaConfig(**DECODER, **o)),
    "qwen2-sliding": lambda **o: Qwen2ForSequenceClassification(
        Qwen2Config(**SLIDING, use_sliding_window=True, sliding_window=8, max_window_layers=1, **o)
    ),
    "qwen3": lambda **o: Qwen3ForSequenceClassification(Qwen3Config(**DECODER, **o)),
    "qwen3-sliding": lambda **o: Qwen3ForSequenceClassification(
        Qwen3Config(**DECODER, use_sliding_window=True, sliding_window=8, max_window_layers=1, **o)
    ),
}
ROTARY = {**SIZES, "type_vocab_size": 2, "pad_token_id": 0}
GEMMA3 = {**DECODER, "sliding_window": 8, "query_pre_attn_scalar": 10}
GEMMA3["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
# A cap that most scores of these weights are bent by.
GEMMA2 = {**GEMMA3, "attn_logit_softcapping": 3.0}
MODELS |= {
    "data2vec": lambda **o: Data2VecTextForSequenceClassification(
        Data2VecTextConfig(**ROBERTA, **o)
    ),
    "xmod": lambda **o: XmodForSequenceClassification(
        XmodConfig(**ROBERTA, default_language="en_XX", **o)
    ),
    "xmod-own-norm": lambda **o: XmodForSequenceClassification(
        XmodConfig(**ROBERTA, default_language="en_XX", adapter_layer_norm=True, **o)
    ),
    "roberta-prelayernorm": lambda **o: RobertaPreLayerNormForSequenceClassification(
        RobertaPreLayerNormConfig(**ROBERTA, **o)
    ),
    "nomic-bert": lambda **o: NomicBertForSequenceClassification(NomicBertConfig(**ROTARY, **o)),
    "gte": lambda **o: GteForSequenceClassification(GteConfig(**ROTARY, **o)),
    "jina": lambda **o: JinaEmbeddingsV3ForSequenceClassification(
        JinaEmbeddingsV3Config(**ROTARY, **o)
    ),
    "eurobert": lambda **o: EuroBertForSequenceClassification(
        EuroBertConfig(**DECODER, classifier_pooling="bos", **o)
    ),
    "eurobert-mean": lambda **o: EuroBertForSequenceClassification(
        EuroBertConfig(**DECODER, classifier_pooling="mean", **o)
    ),
    "eurobert-late": lambda **o: EuroBertForSequenceClassification(
        EuroBertConfig(**DECODER, classifier_pooling="late", **o)
    ),
    "llama-both-ways": lambda **o: LlamaForSequenceClassification(
        LlamaConfig(**DECODER, is_causal=False, **o)
    ),
    "mistral": lambda **o: MistralForSequenceClassification(
        MistralConfig(**DECODER, sliding_window=None, **o)
    ),
    "mistral-sliding": lambda **o: MistralForSequenceClassification(
        MistralConfig(**DECODER, sliding_window=8, **o)
    ),
    "qwen3-sliding-both-ways": lambda **o: Qwen3ForSequenceClassification(
        Qwen3Config(
            **DECODER,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            is_causal=False,
            **o,
        )
    ),
    "gemma": lambda **o: GemmaForSequenceClassification(GemmaConfig(**DECODER, **o)),
    "gemma2": lambda **o: Gemma2ForSequenceClassification(Gemma2Config(**GEMMA2, **o)),
    "gemma2-both-ways": lambda **o: Gemma2ForSequenceClassification(
        Gemma2Config(**GEMMA2, is_causal=False, **o)
    ),
    "gemma2-not-capped": lambda **o: Gemma2ForSequenceClassification(
        Gemma2Config(**{**GEMMA2, "attn_logit_softcapping": None}, **o)
    ),
    "gemma3": lambda **o: Gemma3TextForSequenceClassification(Gemma3TextConfig(**GEMMA3, **o)),
    "gemma3-both-ways": lambda **o: Gemma3TextForSequenceClassification(
        Gemma3TextConfig(**GEMMA3, use_bidirectional_attention=True, **o)
    ),
}
WITHOUT_TYPES = (
    "mpnet",
    "distilbert",
    "modernbert",
    "eurobert",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)
WITHOUT_TYPES += ("gemma", "gemma2", "gemma3_text")
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
DEBERTA_V3 = {
    **DEBERTA,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
}


def deberta(**options: object) -> DebertaV2ForSequenceClassification:
    return DebertaV2ForSequenceClassification(DebertaV2Config(**options))


MODELS |= {
    "deberta-v2": lambda **o: deberta(**DEBERTA, type_vocab_size=2, **o),
    "deberta-v2-narrow": lambda **o: deberta(
        **DEBERTA, position_buckets=16, embedding_size=24, max_relative_positions=40, **o
    ),
    "deberta-v3": lambda **o: deberta(**DEBERTA_V3, **o),
    "mpnet": lambda **o: transformers.MPNetForSequenceClassification(
        transformers.MPNetConfig(**{**SIZES, "pad_token_id": 1}, **o)
    ),
    "deberta-v3-1-layer": lambda **o: deberta(**{**DEBERTA_V3, "num_hidden_layers": 1}, **o),
    "deberta-c2p": lambda **o: deberta(**{**DEBERTA_V3, "pos_att_type": "c2p"}, **o),
    "deberta-p2c": lambda **o: deberta(**{**DEBERTA, "pos_att_type": ["p2c"]}, **o),
    "deberta-absolute": lambda **o: deberta(**SIZES, pos_att_type=["c2p"], pooler_dropout=0.2, **o),
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
    texts = [np.arange(len(tokens))]
    if model.config.model_type == "gemma2" and model.dtype == torch.float64:
        # Its mask is fp64's least, and its softmax fp32: of what reads nothing but padding, NaN.
        texts = [*texts[0][:, None]]
    return torch.cat([_padded_scores(model, tokens, which) for which in texts])


def _padded_scores(
    model: torch.nn.Module, tokens: TokenizedPairs, which: np.ndarray
) -> torch.Tensor:
    inputs = tokens.pad(which, pad_token_id=model.config.pad_token_id)
    if model.config.model_type in WITHOUT_TYPES:
        inputs.pop("token_type_ids", None)
    return model(**inputs).logits.squeeze(1)


def packed_scores(
    model: torch.nn.Module, tokens: TokenizedPairs, plan: list[np.ndarray], **options: object
) -> torch.Tensor:
    architecture = find_architecture(model)
    assert architecture is not None
    step = PackedPairs(architecture, tokens, **{"dtype": torch.float32, **options})
    return torch.cat([step(indices) for indices in plan])[np.argsort(np.concatenate(plan))]


def gradients(
    model: torch.nn.Module, scores: torch.Tensor, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    scores.backward(upstream)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_errors(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Of every gradient, in the norm; one that is 0 in theory (key biases) is measured against the
    largest.
    """
    assert actual.keys() == expected.keys()
    least = 1e-3 * max(gradient.norm() for gradient in expected.values())
    return {
        name: float((actual[name] - g).norm() / max(g.norm(), least))
        for name, g in expected.items()
    }


def assert_gradients_close(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],  # fp64
    *,
    bound: float,
    dtype: torch.dtype,
    num_tokens: int,
) -> None:
    """Within a bound of each gradient's norm, and the rounding that the terms of its sums have in
    the dtype.

    A sum of n terms is off by sqrt(n) roundings of a term, and the terms of query's and key's
    gradients, which all but cancel where a softmax is sure of itself, are as large as the model's
    largest gradient.
    """
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    rounding = torch.finfo(dtype).eps * num_tokens**0.5 * largest
    off = {name: float((actual[name].cpu() - g).norm()) for name, g in expected.items()}
    allowed = {name: bound * float(g.norm()) + rounding for name, g in expected.items()}
    assert all(off[name] <= allowed[name] for name in off), {n: (off[n], allowed[n]) for n in off}


LENGTHS = [5, 1, POSITIONS, 17, 2, 33, 33, 64]
PLANS = {
    "one": [np.arange(8)],
    "several": [np.array([2, 7, 0]), np.array([1]), np.array([5, 4, 6, 3])],
}


@pytest.mark.parametrize("types", [True, False], ids=["types", "no-types"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_equal_the_padded_model(name: str, types: bool) -> None:
    """Each family with both plans, one with types and one without, in turns."""
    plan = [*PLANS][(list(MODELS).index(name) + types) % 2]
    tokens = make_tokens(LENGTHS, types=types)
    torch.manual_seed(0)
    upstream = torch.randn(len(tokens), dtype=torch.float64)
    # In fp64 the two differ by nothing but the order of sums; in fp32, through the kernels, by its
    # rounding.
    model = make_model(name).eval().double()
    expected = padded_scores(model, tokens)
    expected_gradients = gradients(model, expected, upstream)
    # ModernBERT itself takes its rotations and its softmax in fp32, Gemma its norms.
    exact = 1e-6 if name.startswith(("modernbert", "gemma")) else 1e-10
    for dtype, bound in ((torch.float64, exact), (torch.float32, 1e-5)):
        model.to(dtype)
        actual = packed_scores(model, tokens, PLANS[plan], dtype=dtype)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)
        found = gradients(model, actual, upstream.to(dtype))
        assert_gradients_close(
            found, expected_gradients, bound=bound, dtype=dtype, num_tokens=sum(LENGTHS)
        )


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "distilbert",
        "modernbert",
        "qwen3",
        "xmod",
        "gte",
        "eurobert-late",
        "gemma3",
        "deberta-v3",
        "mpnet",
    ],
)
def test_batches_of_one_and_of_a_single_token(name: str) -> None:
    model = make_model(name).eval()
    for lengths in ([1], [POSITIONS], [1, 1, 1]):
        tokens = make_tokens(lengths)
        expected = padded_scores(model, tokens)
        actual = packed_scores(model, tokens, [np.arange(len(lengths))])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "qwen3", "mpnet"])
def test_texts_that_spell_the_padding_token(name: str) -> None:
    """RoBERTa gives it the padding's position; a decoder's score is read from the last token that
    is not one.
    """
    model = make_model(name).eval()
    tokens = make_tokens([6, 9, 4, 3])
    tokens.input_ids[[2, 8, 9, 14, 18, 19, 20, 21]] = model.config.pad_token_id
    # Each by itself: no padding, and an attention mask of ones.
    expected = torch.cat([padded_scores(model, tokens.select(np.array([n]))) for n in range(4)])
    torch.testing.assert_close(
        packed_scores(model, tokens, [np.arange(4)]), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "modernbert-last-layer-slides",
        "modernbert-mean",
        "qwen3-sliding",
        "roberta-prelayernorm",
        "gemma",
        "gemma2",
        *(
            # Made of what the others have.
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "data2vec",
                "nomic-bert",
                "gte",
                "jina",
                "eurobert",
                "gemma3",
                "qwen2-sliding",
                "qwen3",
            )
        ),
    ],
)
def test_the_kernels_of_a_gpu_give_the_same(
    name: str, through_triton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter goes head by head: two of them, of one of keys where heads share those.
    for sizes in (SIZES, ROBERTA, MODERN, ROTARY, SLIDING, DECODER, GEMMA2, GEMMA3):
        monkeypatch.setitem(sizes, "num_attention_heads", 2)
        if "num_key_value_heads" in sizes:
            monkeypatch.setitem(sizes, "num_key_value_heads", 1)
    tokens, plan = make_tokens([3, 10]), [np.array([1, 0])]
    upstream = torch.tensor([0.7, -1.2])  # drawn ones may all but cancel
    model = make_model(name).eval().double()
    expected = padded_scores(model, tokens)
    expected_gradients = gradients(model, expected, upstream.double())
    actual = packed_scores(model.float().to(through_triton), tokens, plan)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    if name in (
        "modernbert-last-layer-slides",
        "qwen3",
        "gemma2",
    ):  # by what predict takes on a GPU
        step = Preparer(model, None)(tokens)
        for layer in step.layers:
            layer.infers = True
        with torch.no_grad():
            inferred = step(plan[0])[np.argsort(plan[0])]
        torch.testing.assert_close(inferred.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    actual_gradients = gradients(model, actual, upstream.to(through_triton))
    assert_gradients_close(
        actual_gradients,
        expected_gradients,
        bound=1e-5,
        dtype=torch.float32,
        num_tokens=len(tokens.input_ids),
    )


def test_the_kernels_of_a_gpu_drop_out_the_same(request: pytest.FixtureRequest) -> None:
    model = make_model("bert", **DROPOUTS["bert"]).train()
    model.bert.encoder.layer = model.bert.encoder.layer[1:]
    model.dropout.p = model.bert.embeddings.dropout.p = 0.0  # a CPU's are torch's own draws
    tokens, plan = make_tokens([3, 9]), [np.array([1, 0])]
    upstream = torch.randn(len(tokens))

    def run_on(device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        scores = packed_scores(model.to(device), tokens, plan)
        return scores.detach().cpu(), gradients(model, scores, upstream.to(device))

    scores, expected = run_on("cpu")
    actual, found = run_on(request.getfixturevalue("through_triton"))
    torch.testing.assert_close(actual, scores, rtol=1e-5, atol=1e-5)
    assert max(relative_errors({n: g.cpu() for n, g in found.items()}, expected).values()) < 1e-5


def test_a_gpu_is_served_in_its_dtypes_and_others_are_padded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rerank_fast.model.preparation._said", set())  # whatever ran earlier
    model = make_model("bert")
    tokens = make_tokens(LENGTHS)
    assert prepare_packed(model, tokens, dtype=torch.bfloat16) is not None
    assert prepare_packed(model, tokens, dtype=torch.float16) is None
    assert prepare_packed(model, tokens, dtype=torch.float16) is None
    assert [r.message for r in caplog.records if "float16" in r.message] == [
        "Pairs are padded and sorted by length: packed execution has no kernels for torch.float16 "
        "on cpu."
    ]

    class OnGPU(type(model)):  # a model that says it is on a device that is not here
        device = torch.device("cuda")

    model.__class__ = OnGPU
    OnGPU.__name__, OnGPU.__module__ = (
        "BertForSequenceClassification",
        "transformers.models.bert.modeling_bert",
    )
    with torch.no_grad():
        assert prepare_packed(model, tokens, dtype=torch.float16) is not None


def test_left_padding_of_the_padded_model_changes_nothing() -> None:
    model = make_model("qwen3").eval()
    tokens = make_tokens(LENGTHS)
    inputs = tokens.pad(np.arange(len(tokens)), pad_token_id=0, padding_side="left")
    del inputs["token_type_ids"]
    expected = model(**inputs).logits.squeeze(1)
    torch.testing.assert_close(
        packed_scores(model, tokens, PLANS["several"]), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "distilbert",
        "modernbert",
        "qwen3",
        "xmod",
        "gte",
        "roberta-prelayernorm",
        "gemma3",
        "deberta-v3",
        "mpnet",
    ],
)
def test_dropout_follows_torch_generator_and_checkpointing_repeats_it(name: str) -> None:
    model = make_model(name).train()
    tokens, plan = make_tokens(LENGTHS), PLANS["several"]
    upstream = torch.randn(len(tokens))

    def run(seed: int, **options: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(seed)
        scores = packed_scores(model, tokens, plan, **options)
        return scores.detach(), gradients(model, scores, upstream)

    scores, expected = run(1)
    again, same = run(1)
    assert torch.equal(scores, again)
    assert max(relative_errors(same, expected).values()) < 1e-6
    recomputed, checkpointed = run(1, gradient_checkpointing=True)
    assert torch.equal(scores, recomputed)
    assert max(relative_errors(checkpointed, expected).values()) < 1e-6
    if name not in ("modernbert", "qwen3", "gemma3"):  # these are made without dropout
        assert not torch.equal(run(2)[0], scores)


DROPOUTS = {
    "bert": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.3},
    "modernbert": {"embedding_dropout": 0.3, "classifier_dropout": 0.3},
    "llama": {"attention_dropout": 0.2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("bert", "bert"),
        ("bert-1-layer", "bert"),
        ("roberta", "bert"),
        ("electra", "bert"),
        ("distilbert", "bert"),
        ("deberta-v2", "bert"),
        ("deberta-v3-1-layer", "bert"),
        ("mpnet", "bert"),
        ("modernbert-last-layer-slides", "modernbert"),
        ("modernbert-mean", "modernbert"),
        ("qwen3-sliding", "llama"),
        ("data2vec", "bert"),
        ("xmod", "bert"),
        ("nomic-bert", "bert"),
        ("jina", "bert"),
        ("eurobert", "llama"),
        ("mistral", "llama"),
        ("gemma", "llama"),
        ("gemma2", "llama"),
        ("gemma3", "llama"),
    ],
)
def test_pairs_kept_of_a_micro_batch_have_the_dropout_that_they_have_among_all(
    name: str, of: str, dtype: torch.dtype
) -> None:
    """In the embeddings, the layers and the head, be it fused or the model's own."""
    model = make_model(name, **DROPOUTS[of]).train()
    architecture = find_architecture(model)
    assert architecture is not None
    step = PackedPairs(architecture, make_tokens(LENGTHS), dtype=dtype)
    indices = np.array([2, 7, 0, 1, 5])
    state = torch.get_rng_state()
    whole = step(indices)
    after = torch.get_rng_state()
    assert not torch.equal(step(indices), whole)
    assert step.draws_by_row
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for keep in ([1, 3, 4], [3], [0, 1, 2, 3, 4]):
        torch.set_rng_state(state)
        kept = step(indices, np.isin(np.arange(5), keep))
        torch.testing.assert_close(kept, whole[keep], rtol=bound, atol=bound)
        assert torch.equal(torch.get_rng_state(), after)
    # Without it they would have another.
    torch.set_rng_state(state)
    assert not torch.allclose(step(indices[[1, 3, 4]]), whole[[1, 3, 4]], rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "electra",
        "modernbert-mean",
        "qwen3-sliding",
        "xmod",
        "gte",
        "gemma2",
        "gemma3",
        "deberta-v3",
        "mpnet",
    ],
)
def test_what_fills_a_micro_batch_up_gives_no_gradient(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a run that is not filled: even one of more positions than the model has."""
    tokens, plan = make_tokens(LENGTHS), [np.arange(8)]
    many = np.zeros(sum(LENGTHS) + 3 * POSITIONS, np.int64)
    many[: sum(LENGTHS)] = np.arange(sum(LENGTHS))
    upstream, results = torch.randn(8), []
    for fill in (
        lambda starts: (np.arange(starts[-1]), starts),
        lambda starts: (many, np.append(starts, len(many))),
        fill_up,
    ):
        monkeypatch.setattr("rerank_fast.model.packed.encoder.fill_up", fill)
        still = name in ("bert", "electra", "xmod", "gte", "deberta-v3", "mpnet")
        model = make_model(name, **NO_DROPOUT) if still else make_model(name)
        scores = packed_scores(model, tokens, plan, dtype=dtype)
        results.append((scores.detach(), gradients(model, scores, upstream)))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for scores, found in results[1:]:
        torch.testing.assert_close(scores, results[0][0], rtol=bound, atol=bound)
        errors = relative_errors(found, results[0][1])
        assert max(errors.values()) < bound, errors


def test_dropout_of_the_models_own_inside_layers_is_noticed() -> None:
    model = make_model("modernbert", mlp_dropout=0.1).train()
    architecture = find_architecture(model)
    assert architecture is not None
    step = PackedPairs(architecture, make_tokens(LENGTHS), dtype=torch.float32)
    assert step.draws_by_row
    with torch.no_grad():
        step(np.arange(3))
    assert not step.draws_by_row


def test_dropout_has_the_padded_models_mean_and_spread() -> None:
    """Different draws, the same distribution: rates and places of dropout are the model's."""
    torch.manual_seed(0)
    model = make_model("bert", attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.1).train()
    tokens = make_tokens([11] * 3)
    with torch.no_grad():
        packed = torch.stack([packed_scores(model, tokens, [np.arange(3)]) for _ in range(1500)])
        padded = torch.stack([padded_scores(model, tokens) for _ in range(1500)])
    spread = padded.std(0)
    assert ((packed.mean(0) - padded.mean(0)).abs() < 5 * spread * (2 / 1500) ** 0.5).all()
    assert ((packed.std(0) / spread - 1).abs() < 0.1).all()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "electra",
        "distilbert",
        "modernbert",
        "qwen3",
        "nomic-bert",
        "roberta-prelayernorm",
        "eurobert",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3",
        "deberta-v2",
        "deberta-v3",
        "mpnet",
    ],
)
def test_bf16_is_no_worse_than_autocast(name: str, weights: torch.dtype) -> None:
    """Scores and gradients of bf16 products, beside those of the padded model in the same
    precision.
    """
    model = make_model(name).eval()
    tokens = make_tokens(3 * LENGTHS)  # eight scores alone are off by chance
    upstream = torch.randn(len(tokens))
    exact = padded_scores(model, tokens)
    exact_gradients = gradients(model, exact, upstream)
    model.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        padded = padded_scores(model, tokens).float()
    padded_gradients = gradients(model, padded, upstream)
    plan = [np.arange(start, len(tokens), 3) for start in range(3)]
    packed = packed_scores(model, tokens, plan, dtype=torch.bfloat16)
    packed_gradients = gradients(model, packed, upstream)
    assert packed.dtype == torch.float32
    assert (packed - exact).abs().mean() <= 1.5 * (padded - exact).abs().mean() + 1e-3

    def error(actual: dict[str, torch.Tensor]) -> float:
        parts = [
            (actual[n].float() - g).norm() / g.norm()
            for n, g in exact_gradients.items()
            if g.norm() > 1e-3
        ]
        return float(torch.stack(parts).mean())

    assert error(packed_gradients) <= 1.2 * error(padded_gradients) + 1e-3


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = make_model("bert").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    packed_scores(model, make_tokens(LENGTHS), PLANS["one"]).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_adapters_and_hooked_layers_are_called() -> None:
    """What stands in for a linear layer, listens to it or has a forward put on it is not passed
    by.
    """
    model = make_model("bert").eval()
    tokens = make_tokens(LENGTHS)

    class Adapter(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(dim=-1, keepdim=True)

    query = model.bert.encoder.layer[1].attention.self.query
    adapter = Adapter(48, 48)
    adapter.load_state_dict(query.state_dict())
    model.bert.encoder.layer[1].attention.self.query = adapter
    model.bert.encoder.layer[0].output.dense.register_forward_hook(
        lambda module, inputs, output: output * 1.5
    )
    up = model.bert.encoder.layer[1].intermediate.dense
    up.forward = lambda x: 0.5 * torch.nn.Linear.forward(up, x)
    expected = padded_scores(model, tokens)
    actual = packed_scores(model, tokens, PLANS["several"])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["bert", "bert.encoder.layer.1", "bert.encoder.layer.0.attention.self"]
)
@pytest.mark.parametrize("change", ["hook", "forward", "class"])
def test_code_of_somebody_around_the_layers_is_not_passed_over(name: str, change: str) -> None:
    model = make_model("bert")
    part = model.get_submodule(name)
    if change == "hook":
        part.register_forward_hook(lambda *call: None)
    elif change == "forward":
        part.forward = type(part).forward.__get__(part)
    else:
        part.__class__ = type("Changed", (type(part),), {"__module__": "somewhere"})
    assert prepare_packed(model, make_tokens(LENGTHS)) is None
    assert (
        f"{name} {'is a somewhere.Changed' if change == 'class' else 'has hooks'}"
        in reason_to_pad(model)
    )


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.word_embeddings",
        "encoder.layer.0.output.LayerNorm",
        "encoder.layer.0.attention.self.dropout",
    ],
)
def test_a_module_whose_weights_are_read_must_be_plain(name: str) -> None:
    model = make_model("bert")
    part = model.bert.get_submodule(name)
    handle = part.register_forward_hook(lambda *call: None)
    assert find_architecture(model) is None
    handle.remove()
    assert find_architecture(model) is not None
    part.__class__ = type("Adapted", (type(part),), {"__module__": "peft.tuners"})
    assert find_architecture(model) is None
    assert f"bert.{name} is a peft.tuners.Adapted, which must be called" in reason_to_pad(model)


def test_what_gradient_checkpointing_hooks_up_changes_nothing() -> None:
    model = make_model("bert")
    model.enable_input_require_grads()
    assert find_architecture(model) is not None


def test_a_head_of_another_dtype_is_called() -> None:
    model = make_model("bert").bfloat16()
    model.classifier.float()
    assert find_architecture(model) is None
    assert "weights of torch.bfloat16 and torch.float32" in reason_to_pad(model)


def test_a_linear_that_is_kept_in_fp32_gives_what_the_others_read() -> None:
    model = make_model("bert", **NO_DROPOUT)
    tokens = make_tokens(LENGTHS)
    expected = score(prepare_packed(model, tokens, dtype=torch.bfloat16))
    model.bert.encoder.layer[0].output.dense.register_forward_hook(
        lambda module, inputs, output: output.float()
    )
    actual = score(prepare_packed(model, tokens, dtype=torch.bfloat16))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_a_part_that_is_gone_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """As after a release of transformers that names it anew: padded, and the log says what is
    missing.
    """
    model = make_model("bert-1-layer")
    attention = model.bert.encoder.layer[0].attention
    attention.renamed = attention.self
    del attention.self
    tokens = make_tokens(LENGTHS)
    assert prepare_packed(model, tokens) is None
    assert "has no attribute 'self'" in caplog.text
    assert "transformers 5" in caplog.text


@pytest.mark.parametrize(("kind", "options"), [("DebertaV2", {"conv_kernel_size": 3})])
def test_models_that_are_not_known_are_padded(kind: str, options: dict) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    assert find_architecture(model) is None
    assert f"{kind}ForSequenceClassification" in reason_to_pad(model)
    tokens = make_tokens(LENGTHS, types=False)
    tokenizer = SimpleNamespace(
        pad_token_id=config.pad_token_id, padding_side="right", pad_token_type_id=0
    )
    step = Preparer(model, tokenizer)(tokens)
    assert step.padded
    with torch.no_grad():
        together, alone = (score(step, max_pairs=pairs) for pairs in (4, 1))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_familiar_name_is_not_enough() -> None:
    class BertForSequenceClassification(torch.nn.Module):
        """Remote code with a familiar name."""

    assert find_architecture(BertForSequenceClassification()) is None


def test_an_activation_joins_its_product_only_where_nobody_listens() -> None:
    model = make_model("bert", **NO_DROPOUT).eval()
    tokens = make_tokens(LENGTHS)
    with torch.inference_mode():
        expected = score(prepare_packed(model, tokens))
    called = []
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn.register_forward_hook(lambda *_: called.append(1))
    with torch.inference_mode():
        torch.testing.assert_close(
            score(prepare_packed(model, tokens)), expected, rtol=1e-5, atol=1e-5
        )
    assert len(called) == 3  # one a layer


@pytest.mark.parametrize("frozen", ["", "embeddings", "layer.1", "query"])
def test_layers_add_their_gradients_themselves(frozen: str) -> None:
    model = make_model("bert").eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or frozen not in name)

    def bound(weight: torch.Tensor) -> None:
        weight.grad.clamp_(max=0.01)

    layers = model.bert.encoder.layer
    layers[0].output.dense.weight.register_post_accumulate_grad_hook(bound)
    if layers[2].output.dense.weight.requires_grad:
        layers[2].output.dense.weight.register_hook(lambda gradient: 3 * gradient)
    tokens, plan = make_tokens([3, 10, 7]), [np.array([1]), np.array([0, 2])]

    def added(*, adds_gradients: bool) -> dict[str, torch.Tensor]:
        step = Preparer(model, None, adds_gradients=adds_gradients)(tokens)
        model.zero_grad()
        for indices in plan:  # each adds to what the one before has left
            step(indices).sum().backward(retain_graph=True)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = added(adds_gradients=False), added(adds_gradients=True)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
