"""docs/families.md says what is so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rerank_fast.model import export
from tests.model.family_table import (
    BEGIN,
    END,
    FAMILIES,
    HEAD,
    NOT_EXPORTED,
    PAGE,
    answers_of,
    made,
    row,
)


def committed() -> dict[str, str]:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == HEAD
    return {line.split("|")[1].strip(): line for line in lines[1:]}


def test_each_family_has_a_row():
    assert list(committed()) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_its_model_does(family: str):
    assert committed()[family] == row(family), "python -m tests.model.family_table rewrites it"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FAMILIES.values() if n not in NOT_EXPORTED])
def test_a_family_is_exported(name: str, tmp_path: Path):
    """At another batch size and length than those of the example."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = made(name).eval()
    if answers_of(model) is not None:
        model = export._Answering(model, answers_of(model)).eval()
        model.config = model.model.config
    ids, mask = torch.randint(4, 97, (3, 17)), torch.ones(3, 17, dtype=torch.int64)
    example = {"input_ids": ids[:2, :9], "attention_mask": mask[:2, :9]}
    export._write(model, list(example), example, tmp_path / "model.onnx")
    mask[1, 12:], ids[1, 12:] = 0, model.config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    session = runtime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    feed = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
    np.testing.assert_allclose(session.run(None, feed)[0], expected, rtol=1e-3, atol=1e-3)
