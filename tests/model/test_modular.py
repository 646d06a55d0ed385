"""CrossEncoders of modules beside sentence-transformers: opened, packed, trained and saved as they
came.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.losses import LambdaLoss as PeerLambdaLoss
from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling
from torch import nn

from rerank_fast import CrossEncoder
from rerank_fast.losses import LambdaLoss
from rerank_fast.model import preparation
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.wrappers import Wrapped, find_cross_encoder
from tests.model.modular_factory import (
    ENCODERS,
    HEADS,
    PAIRS,
    THEIRS,
    check_both_ways,
    check_gradients,
    ettin,
    make_peer,
)
from tests.model.storage.damage import edit


@pytest.mark.parametrize("name", HEADS)
def test_sequences_of_modules(name: str, tmp_path: Path):
    check_gradients(check_both_ways(make_peer(tmp_path, HEADS[name]()), tmp_path, packed=True))


# The first token of a causal model sees no other.
@pytest.mark.parametrize(
    ("encoder", "mode"),
    [
        (one, mode)
        for one in ENCODERS
        for mode in ("cls", "mean", "lasttoken")
        if (one, mode) != ("qwen3", "cls")
    ],
)
def test_encoders(encoder: str, mode: str, tmp_path: Path):
    packed = encoder != "deberta-conv"
    model = check_both_ways(make_peer(tmp_path, ettin(mode), encoder), tmp_path, packed=packed)
    if packed:
        check_gradients(model)


@pytest.mark.parametrize("read", ["hidden_states.1", "pooler_output", "all_layer_embeddings"])
def test_other_outputs_of_the_encoder(read: str, tmp_path: Path):
    head = ettin("mean")
    if read == "all_layer_embeddings":
        head = [WeightedLayerPooling(32, num_hidden_layers=2, layer_start=0), *head]
    elif read == "pooler_output":
        head = head[1:]
    make_peer(tmp_path, head, "bert")
    path, name = tmp_path / "model", "sentence_bert_config.json"
    if read == "hidden_states.1":
        text = {"method": "forward", "method_output_name": ["hidden_states", 1]}
        edit(path, name, modality_config={"text": text})
    elif read == "pooler_output":
        text = {"method": "forward", "method_output_name": "pooler_output"}
        edit(path, name, modality_config={"text": text}, module_output_name="sentence_embedding")
    else:
        edit(path, "config.json", output_hidden_states=True)
    peer = PeerCrossEncoder(str(path), activation_fn=nn.Identity(), device="cpu")
    check_both_ways(peer, tmp_path, packed=False)


@pytest.mark.parametrize("name", THEIRS)
def test_what_is_theirs_alone_runs_padded(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    preparation._said.clear()
    check_both_ways(make_peer(tmp_path, THEIRS[name]()), tmp_path, packed=False)
    assert sum("padded and sorted by length" in record.message for record in caplog.records) == 1


def test_only_the_token_that_is_read_is_computed_in_the_last_layer(tmp_path: Path):
    make_peer(tmp_path, ettin("cls"))
    model = CrossEncoder(tmp_path / "model", device="cpu")
    step = model.prepare(model.tokenize(PAIRS))
    assert [layer.one_token for layer in step.layers] == [False, True]


@pytest.mark.parametrize("prompt", [None, "query: "])
def test_prompts(prompt: str | None, tmp_path: Path):
    prompts = {"web": "is it of the sea ", "none": ""}
    peer = make_peer(tmp_path, ettin("mean"), prompts=prompts, default_prompt_name="web")
    model = CrossEncoder(tmp_path / "model", device="cpu")
    expected = peer.predict(PAIRS, prompt=prompt)
    np.testing.assert_allclose(model.predict(PAIRS, prompt=prompt), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(model.predict(PAIRS, prompt="") - expected).max() > 1e-3
    model.save_pretrained(tmp_path / "saved")
    theirs = PeerCrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert theirs.prompts == peer.prompts
    np.testing.assert_allclose(theirs.predict(PAIRS, prompt=prompt), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prompts", "default"), [({"a": "x"}, "b"), ({}, "a"), ({"a": 3}, "a")])
def test_prompts_that_could_not_be_opened_are_not_saved(prompts: Any, default: str, tmp_path: Path):
    make_peer(tmp_path, ettin("cls"))
    model = CrossEncoder(tmp_path / "model", device="cpu")
    model.prompts, model.default_prompt_name = prompts, default
    with pytest.raises(ValueError, match=r"default_prompt_name is|prompt 'a': expected a string"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_texts_are_lowered_and_limited_as_the_transformer_says(tmp_path: Path):
    from tokenizers.normalizers import NFD

    peer = make_peer(tmp_path, ettin("mean"))
    path = tmp_path / "model"
    peer.tokenizer.backend_tokenizer.normalizer = NFD()
    peer.save_pretrained(str(path))
    file = path / "sentence_bert_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"do_lower_case": True, "processing_kwargs": {"text": {"max_length": 20}}}
    pairs = [(query.upper(), document) for query, document in PAIRS]
    unlike = CrossEncoder(path, device="cpu").predict(pairs)
    file.write_text(json.dumps(config), encoding="utf-8")
    model = CrossEncoder(path, device="cpu")
    assert model.max_length == 20
    expected = PeerCrossEncoder(str(path), device="cpu").predict(pairs)
    np.testing.assert_allclose(model.predict(pairs), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(unlike - expected).max() > 1e-4
    model.save_pretrained(tmp_path / "saved")
    again = PeerCrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.predict(pairs), expected, rtol=1e-5, atol=1e-5)


LONG = [("the sea " * 20, "rain in paris " * 40), *PAIRS]


@pytest.mark.parametrize("encoder", ["bert", "distilbert", "deberta", "deberta-conv"])
def test_texts_may_fill_all_positions(encoder: str, tmp_path: Path):
    expected = make_peer(tmp_path, ettin("mean"), encoder).predict(LONG)
    model = CrossEncoder(tmp_path / "model", device="cpu")
    assert model.max_length == 64
    np.testing.assert_allclose(model.predict(LONG), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "limit",
    [{"max_seq_length": 40}, {"processing_kwargs": {"text": {"max_length": 40}}}],
    ids=["max_seq_length", "processing_kwargs"],
)
def test_the_transformers_limit_goes_before_the_tokenizers(limit: dict[str, Any], tmp_path: Path):
    make_peer(tmp_path, ettin("mean"))
    path = tmp_path / "model"
    edit(path, "sentence_bert_config.json", **limit)
    edit(path, "tokenizer_config.json", model_max_length=20)
    model = CrossEncoder(path, device="cpu")
    assert model.max_length == 40
    expected = PeerCrossEncoder(str(path), device="cpu").predict(LONG)
    np.testing.assert_allclose(model.predict(LONG), expected, rtol=1e-5, atol=1e-5)
    # And is saved where it was changed.
    model.max_length = 12
    expected = model.predict(LONG)
    model.save_pretrained(tmp_path / "saved")
    for kind in (CrossEncoder, PeerCrossEncoder):
        again = kind(str(tmp_path / "saved"), device="cpu")
        assert again.max_seq_length == 12 if kind is PeerCrossEncoder else again.max_length == 12
        np.testing.assert_allclose(again.predict(LONG), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoder", ["bert", "qwen3"])
def test_the_first_token_of_any_encoder_is_read_alone(encoder: str, tmp_path: Path):
    """Of a causal one it sees nothing but itself."""
    peer = make_peer(tmp_path, ettin("cls"), encoder)
    model = CrossEncoder(tmp_path / "model", device="cpu")
    tokens = model.tokenize(PAIRS)
    step = model.prepare(tokens)
    assert step.layers[-1].one_token
    with torch.inference_mode():
        packed = step(np.arange(len(PAIRS))).numpy()
    np.testing.assert_allclose(packed, peer.predict(PAIRS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names", [["4.linear"], ["2.linear", "4.linear"], ["0.model.layers.0.mlp.Wo"]], ids=str
)
def test_layers_that_are_kept_in_fp32(names: list[str], tmp_path: Path):
    peer = make_peer(tmp_path, ettin("cls"), keep_in_fp32_modules=names)
    model = check_both_ways(peer, tmp_path, packed=True)
    assert model.keep_in_fp32_modules == names
    half = CrossEncoder(tmp_path / "saved", device="cpu", dtype="bfloat16")
    if "2.linear" not in names:  # a norm of bf16 weights takes no fp32, there as here
        np.testing.assert_allclose(half.predict(PAIRS), model.predict(PAIRS), atol=0.15)
    outputs = []
    last: Any = half.model.get_submodule("head.3.linear")
    last.register_forward_hook(lambda module, args, out: outputs.append(out.dtype))
    with torch.no_grad():
        last(torch.zeros(1, 32, dtype=torch.bfloat16))
    assert outputs == [torch.float32 if "4.linear" in names else torch.bfloat16]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_narrower_arithmetic(dtype: str, tmp_path: Path):
    peer = make_peer(tmp_path, ettin("mean"), "bert")
    model = CrossEncoder(tmp_path / "model", device="cpu", dtype=dtype)
    np.testing.assert_allclose(model.predict(PAIRS), peer.predict(PAIRS), atol=0.2)


def test_a_sequence_classifier_with_a_layer_behind_it_runs_padded(tmp_path: Path):
    from sentence_transformers.cross_encoder.modules import Dense, Transformer

    from tests.model_factory import make_tiny_bert

    path = make_tiny_bert(tmp_path / "encoder", num_labels=3)
    last = Dense(3, 1, activation_function=nn.Identity(), module_input_name="scores")
    first = Transformer(str(path), transformer_task="sequence-classification")
    peer = PeerCrossEncoder(modules=[first, last], activation_fn=nn.Identity(), device="cpu")
    peer.save_pretrained(str(tmp_path / "model"))
    check_both_ways(peer, tmp_path, packed=False)


# -- inside their trainer -------------------------------------------------------------------------

QUERIES = ["what is a panda", "rain"]
DOCS = [["a bear", "the sea", "a panda is a kind of bear"], ["the wind", "rain in paris"]]
LABELS = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0])]


@pytest.mark.parametrize(
    ("head", "packed"),
    [(lambda: ettin("cls"), True), (lambda: ettin("mean"), True), (THEIRS["convolutions"], False)],
    ids=["cls", "mean", "theirs alone"],
)
def test_the_drop_in_packs_their_model(
    head: Callable[[], list[nn.Module]],
    packed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    steps = []
    original = PackedPairs.__call__
    monkeypatch.setattr(
        PackedPairs, "__call__", lambda self, *a: (steps.append(self), original(self, *a))[1]
    )
    peer = make_peer(tmp_path, head()).eval()
    results = []
    for kind in (PeerLambdaLoss, LambdaLoss):
        peer.zero_grad()
        loss = kind(peer)([QUERIES, DOCS], LABELS)
        loss.backward()
        results.append(
            (
                loss.item(),
                {n: p.grad.clone() for n, p in peer.named_parameters() if p.grad is not None},
            )
        )
    assert bool(steps) is packed
    (expected, gradients), (found, ours) = results
    assert found == pytest.approx(expected, rel=1e-5)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_module_with_a_hook_must_be_called(place: int, tmp_path: Path):
    peer = make_peer(tmp_path, ettin())
    found = find_cross_encoder(peer)
    assert isinstance(found, Wrapped)
    peer[place].register_forward_hook(lambda module, args, out: None)
    assert "has hooks" in str(find_cross_encoder(peer))


def test_their_logits_of_answers_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rerank_fast.model.tokens.templates import QWEN3_RERANKER_TEMPLATE
    from tests.model_factory import make_tiny_qwen3

    path = make_tiny_qwen3(tmp_path / "qwen3", chat_template=QWEN3_RERANKER_TEMPLATE)
    peer = PeerCrossEncoder(str(path), device="cpu").eval()
    steps = []
    original = PackedPairs.__call__
    monkeypatch.setattr(
        PackedPairs, "__call__", lambda self, *a: (steps.append(self), original(self, *a))[1]
    )
    values = [kind(peer)([QUERIES, DOCS], LABELS).item() for kind in (PeerLambdaLoss, LambdaLoss)]
    assert steps
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_a_transformer_in_a_directory_of_its_own(tmp_path: Path):
    """As older releases of sentence-transformers saved it."""
    peer = make_peer(tmp_path, ettin("mean"))
    path = tmp_path / "model"
    folder = path / "0_Transformer"
    folder.mkdir()
    for file in list(path.iterdir()):
        kept = ("modules.json", "config_sentence_transformers.json", "README.md")
        if file.is_file() and file.name not in kept:
            file.rename(folder / file.name)
    modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
    modules[0]["path"] = folder.name
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    expected = PeerCrossEncoder(str(path), device="cpu").predict(PAIRS)
    np.testing.assert_allclose(expected, peer.predict(PAIRS), rtol=1e-5, atol=1e-5)
    model = CrossEncoder(path, device="cpu")
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = PeerCrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    modules[0]["path"] = "missing"
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(ValueError, match=r"got 'missing'|got str 'missing'"):
        CrossEncoder(path, device="cpu")
