"""LoRA: which modules get adapters, and the model that is left when they have been trained."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.model.tokens.templates import QWEN3_RERANKER_TEMPLATE
from rerank_fast.training.events import Event, TrainingInterrupted
from tests.model_factory import make_tiny_qwen3, make_tiny_roberta
from tests.training.conftest import config_for, make_lists, weights

peft = pytest.importorskip("peft")

PAIRS = [("what is the panda", doc) for doc in ("panda rain", "bear", "fish sea city")]
SETTINGS = {"lora_rank": 4, "learning_rate": 5e-3, "warmup_ratio": 0.0}


def terminate(event: Event) -> None:
    if event.name == "step_end" and event.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_model_in_memory_is_an_ordinary_one_of_the_trained_weights(
    tiny_bert: Path, tmp_path: Path
):
    model = CrossEncoder(tiny_bert, device="cpu")
    names = list(model.model.state_dict())
    model.model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    with_adapters = []

    def note(event: Event) -> None:
        if event.name == "step_end" and event.step == 4:
            with_adapters.append(event.trainer.model.predict(PAIRS))

    config = config_for(tmp_path / "run", **SETTINGS, max_steps=4)
    Trainer(model, make_lists(48), config=config, callbacks=[note]).train()
    scores = model.predict(PAIRS)
    np.testing.assert_allclose(scores, with_adapters[0], atol=1e-5)
    assert np.abs(scores - CrossEncoder(tiny_bert, device="cpu").predict(PAIRS)).min() > 1e-4
    assert list(model.model.state_dict()) == names
    assert not hasattr(model.model, "peft_config")
    assert [name for name, one in model.model.named_parameters() if not one.requires_grad] == [
        "bert.embeddings.word_embeddings.weight"
    ]
    model.requires_grad_(True)
    model.save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(
        CrossEncoder(tmp_path / "saved", device="cpu").predict(PAIRS), scores, atol=1e-6
    )
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    # It can be trained again, with adapters and without.
    for name, settings in (("second", SETTINGS), ("third", {"learning_rate": 1e-3})):
        trainer = Trainer(
            model, make_lists(48), config=config_for(tmp_path / name, **settings, max_steps=2)
        )
        trainer.train()
        saved = CrossEncoder(tmp_path / name, device="cpu").predict(PAIRS)
        np.testing.assert_allclose(saved, model.predict(PAIRS), atol=1e-5)
    assert trainer.weights.keys() == dict(model.model.named_parameters()).keys()


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_models_vocabulary_stays_and_its_adapter_gives_the_same_scores(
    tied: bool, tmp_path: Path
):
    directory = make_tiny_qwen3(
        tmp_path / "qwen3", chat_template=QWEN3_RERANKER_TEMPLATE, tied=tied
    )
    trainer = Trainer(
        directory, make_lists(24), config=config_for(tmp_path / "run", **SETTINGS, max_steps=4)
    )
    assert all(".lora_" in name for name in trainer.weights)
    trainer.train()
    base = CrossEncoder(directory, device="cpu", activation_fn=torch.nn.Identity())
    trained = trainer.model.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert np.abs(trained - base.predict(PAIRS)).min() > 1e-3
    again = CrossEncoder(tmp_path / "run", device="cpu").predict(
        PAIRS, activation_fn=torch.nn.Identity()
    )
    np.testing.assert_allclose(again, trained, atol=1e-5)

    adapter = tmp_path / "run" / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("CAUSAL_LM", None)
    assert all(".lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    adapted = peft.PeftModel.from_pretrained(base.model, adapter).eval()
    assert isinstance(adapted, peft.PeftModelForCausalLM)
    with torch.no_grad():
        logits = adapted(**base.preprocess(PAIRS)).logits[:, -1]
    np.testing.assert_allclose(base.answers.score(logits).numpy(), trained, atol=1e-5)
    before, after = weights(directory), weights(tmp_path / "run")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["query", "word_embeddings"],
            r"got 'word_embeddings', which is bert\.embeddings\.word_embeddings \(Embed",
        ),
        (
            ["LayerNorm"],
            r"nn.Linear modules, got 'LayerNorm', which is "
            r"bert\.embeddings\.LayerNorm \(LayerNorm\)",
        ),
        (
            ["quary"],
            "the encoder has no module 'quary'; its nn.Linear are dense, key, query, value",
        ),
        (["classifier"], "the encoder has no module 'classifier'"),  # the head is trained whole
    ],
)
def test_targets_that_are_no_linear_modules_are_refused(
    targets: list[str], message: str, tiny_bert: Path, tmp_path: Path
):
    model = CrossEncoder(tiny_bert, device="cpu")
    names = list(model.model.state_dict())
    with pytest.raises(ValueError, match=message):
        Trainer(
            model,
            make_lists(4),
            config=config_for(tmp_path, **SETTINGS, lora_target_modules=targets),
        )
    assert list(model.model.state_dict()) == names
    assert all(one.requires_grad for one in model.parameters())


def test_a_model_that_has_adapters_is_refused(tiny_bert: Path, tmp_path: Path):
    model = CrossEncoder(tiny_bert, device="cpu")
    Trainer(model, make_lists(4), config=config_for(tmp_path / "never-trained", **SETTINGS))
    for settings in (SETTINGS, {}):
        with pytest.raises(ValueError, match=r"has PEFT adapters already: .*lora_rank"):
            Trainer(model, make_lists(4), config=config_for(tmp_path, **settings))


def test_named_targets_alone_get_adapters(tmp_path: Path):
    roberta = make_tiny_roberta(tmp_path / "roberta")  # with a dense in its head too
    config = config_for(
        tmp_path / "run", **SETTINGS, max_steps=1, lora_target_modules=["query", "output.dense"]
    )
    trainer = Trainer(roberta, make_lists(16), config=config)
    with_adapters = {name.partition(".lora_")[0] for name in trainer.weights if ".lora_" in name}
    assert with_adapters == {
        f"roberta.encoder.layer.{layer}.{name}"
        for layer in (0, 1)
        for name in ("attention.self.query", "attention.output.dense", "output.dense")
    }
    assert "classifier.dense.weight" in trainer.weights


def test_an_interrupted_run_leaves_the_adapters_merged_and_goes_on_from_the_base_model_only(
    tiny_bert: Path, tmp_path: Path
):
    model, lists = CrossEncoder(tiny_bert, device="cpu"), make_lists(48)
    config = config_for(tmp_path / "run", **SETTINGS, max_steps=6)
    with pytest.raises(TrainingInterrupted) as stop:
        Trainer(model, lists, config=config, callbacks=[terminate]).train()
    model.save_pretrained(tmp_path / "saved")
    saved = CrossEncoder(tmp_path / "saved", device="cpu").predict(
        PAIRS, activation_fn=torch.nn.Identity()
    )
    checkpoint = CrossEncoder(
        stop.value.checkpoint, device="cpu", activation_fn=torch.nn.Identity()
    )
    np.testing.assert_allclose(saved, checkpoint.predict(PAIRS), atol=1e-5)
    # The merged model is another base: on it the checkpoint's adapters would count twice.
    again = config_for(tmp_path / "run", **SETTINGS, max_steps=6, resume="auto")
    with pytest.raises(ValueError, match="trained on another base model"):
        Trainer(model, lists, config=again).train()
    Trainer(tiny_bert, lists, config=again).train()
    Trainer(
        tiny_bert, lists, config=config_for(tmp_path / "unbroken", **SETTINGS, max_steps=6)
    ).train()
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "unbroken")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
