"""ONNX files beside PyTorch, in onnxruntime and, where it can be installed, in
sentence-transformers.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from rerank_fast import CrossEncoder, cli
from rerank_fast.model import export
from tests.model import modular_factory
from tests.model.modular_factory import WIDTH, ettin, make_peer
from tests.model_factory import make_tiny_bert, make_tiny_roberta, make_tiny_t5

EXTRA = ("onnx", "onnxscript", "onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXTRA),
    reason="the onnx extra is not installed",
)
PAIRS = [
    ("what is the panda", "panda eats bamboo all day"),
    ("sea", "rain"),
    ("what kind of weather is over the sea", "wind and rain, all day long, over the wet sea " * 9),
]


def scores_of(file: Path, model: CrossEncoder, pairs: list[tuple[str, str]]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = {one.name for one in session.get_inputs()}
    features = {
        name: value.numpy() for name, value in model.preprocess(pairs).items() if name in names
    }
    return session.run(["logits"], features)[0].reshape(-1)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "reranker"
    model = CrossEncoder(
        make_tiny_bert(directory.with_name("bert")), device="cpu", activation_fn=torch.nn.Identity()
    )
    model.save_pretrained(directory)
    return directory


@needs_onnx
def test_fp32_and_int8_from_the_command_line(
    reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    model = CrossEncoder(reranker, device="cpu")
    raw = model.predict(PAIRS)
    arguments = ["export", "--model", str(reranker), "--format", "onnx"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "scores of 28 pairs differ from PyTorch's by at most" in printed
    file = reranker / "onnx" / "model.onnx"
    np.testing.assert_allclose(scores_of(file, model, PAIRS), raw, atol=1e-5)
    for pair, score in zip(
        PAIRS, raw, strict=True
    ):  # other batch sizes and lengths than were exported with
        np.testing.assert_allclose(scores_of(file, model, [pair]), [score], atol=1e-5)

    # The exporter takes seconds: int8, and what replaces the file, begin with what it gave.
    kept = shutil.copy(file, tmp_path)
    monkeypatch.setattr(export, "_write", lambda *rest: shutil.copy(kept, rest[-1]))
    assert cli.main([*arguments, "--dtype", "int8", "--tolerance", "0.2"]) == 0
    small = reranker / "onnx" / "model_qint8_avx512_vnni.onnx"
    assert small.stat().st_size < file.stat().st_size
    import onnx

    kinds = [node.op_type for node in onnx.load(small).graph.node]
    assert kinds.count("MatMulInteger") >= 12  # six products a layer, all of them quantised
    quantised = scores_of(small, model, PAIRS)
    assert 0 < np.abs(quantised - raw).max() < 0.2
    assert sorted(path.name for path in (reranker / "onnx").iterdir()) == [file.name, small.name]

    assert cli.main(arguments) == 2
    assert "is there already; pass --overwrite to replace it" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


@needs_onnx
def test_own_texts_another_directory_and_a_bf16_model(
    reranker: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    model = CrossEncoder(reranker, device="cpu", dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    done = export.export_onnx(model, tmp_path / "bf16", pairs=PAIRS)
    assert (done.file, done.pairs) == (tmp_path / "bf16" / "onnx" / "model.onnx", 3)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert done.max_difference < 1e-5

    lists = tmp_path / "lists.jsonl"
    lists.write_text(
        json.dumps({"query": "sea", "docs": ["rain", "panda"], "labels": [1, 0]}) + "\n"
    )
    output = tmp_path / "other"
    arguments = ["export", "--model", str(reranker), "--output", str(output), "--data", str(lists)]
    assert cli.main(arguments) == 0
    assert "scores of 2 pairs" in capsys.readouterr().out
    np.testing.assert_array_equal(
        CrossEncoder(output).predict(PAIRS), CrossEncoder(reranker).predict(PAIRS)
    )


@needs_onnx
def test_roberta_whose_positions_come_from_its_tokens(tmp_path: Path):
    model = CrossEncoder(make_tiny_roberta(tmp_path / "roberta"), device="cpu")
    assert export.export_onnx(model, tmp_path / "roberta").max_difference < 1e-5


@needs_onnx
def test_a_file_beyond_the_tolerance_is_not_written(
    reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = CrossEncoder(reranker, device="cpu")
    write = export._write

    def other_weights(copy: torch.nn.Module, *rest: object) -> None:
        write(CrossEncoder(make_tiny_bert(tmp_path / "wrong", seed=7), device="cpu").model, *rest)

    monkeypatch.setattr(export, "_write", other_weights)
    with pytest.raises(
        ValueError, match="is not written: its scores differ from PyTorch's by up to"
    ):
        export.export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_onnx
def test_what_torch_cant_export_is_said_in_a_line(
    reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **options: object) -> None:
        try:
            raise KeyError("aten.einsum")
        except KeyError as error:
            raise torch.onnx.OnnxExporterError("\x1b[96mstep 2/3\x1b[0m\nof many") from error

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(
        ValueError, match=r"^torch can't export a BertFor.*: KeyError: 'aten.einsum'"
    ):
        export.export_onnx(CrossEncoder(reranker, device="cpu"), tmp_path)


@needs_onnx
def test_a_model_too_large_for_one_file_has_its_weights_beside_it(
    reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export, "_LARGEST_FILE", 1000)
    model = CrossEncoder(reranker, device="cpu")
    file = export.export_onnx(model, tmp_path).file
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    np.testing.assert_allclose(scores_of(file, model, PAIRS), model.predict(PAIRS), atol=1e-5)
    small = export.export_onnx(model, tmp_path, dtype="int8", tolerance=0.2).file
    assert 0 < np.abs(scores_of(small, model, PAIRS) - model.predict(PAIRS)).max() < 0.2


@needs_onnx
def test_sentence_transformers_loads_the_files(reranker: Path, tmp_path: Path):
    pytest.importorskip(
        "optimum.onnxruntime.modeling",
        reason="optimum-onnx, which backend='onnx' is built on, is not installed or not for these "
        "transformers",
        exc_type=ImportError,
    )
    from sentence_transformers import CrossEncoder as Theirs

    model = CrossEncoder(reranker, device="cpu")
    model.save_pretrained(tmp_path / "both")
    export.export_onnx(model, tmp_path / "both")
    file = export.export_onnx(model, tmp_path / "both", dtype="int8", tolerance=0.2).file
    theirs = Theirs(str(tmp_path / "both"), backend="onnx")
    np.testing.assert_allclose(theirs.predict(PAIRS), model.predict(PAIRS), atol=1e-5)
    int8 = Theirs(str(tmp_path / "both"), backend="onnx", model_kwargs={"file_name": file.name})
    np.testing.assert_allclose(int8.predict(PAIRS), scores_of(file, model, PAIRS), atol=1e-5)


def test_without_the_extra_it_says_what_to_install(reranker: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in EXTRA else find(name)
    )
    with pytest.raises(
        ValueError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'rerank-fast\[onnx\]'"
    ):
        export.export_onnx(CrossEncoder(reranker, device="cpu"), reranker)


def test_wrong_arguments(reranker: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(ValueError, match="dtype must be one of"):
        export.export_onnx(CrossEncoder(reranker, device="cpu"), reranker, dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        cli.main(["export", "--model", str(reranker), "--format", "gguf"])
    assert cli.main(["export", "--model", "no/such-model"]) == 2
    assert "no/such-model" in capsys.readouterr().err


@needs_onnx
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_model_of_modules_is_one_file_from_ids_to_score(pooling: str, tmp_path: Path):
    make_peer(tmp_path, ettin(pooling))
    model = CrossEncoder(tmp_path / "model", device="cpu")
    done = export.export_onnx(model, tmp_path / "model")
    assert done.file == tmp_path / "model" / "onnx" / "reranker.onnx"
    raw = model.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(scores_of(done.file, model, PAIRS), raw, atol=1e-4)
    small = export.export_onnx(model, tmp_path / "model", dtype="int8").file
    assert small.name == "reranker_qint8_avx512_vnni.onnx"


@needs_onnx
def test_an_encoder_decoder_is_one_file_from_ids_to_score(tmp_path: Path):
    model = CrossEncoder(make_tiny_t5(tmp_path), device="cpu")
    file = export.export_onnx(model, tmp_path).file
    assert file.name == "reranker.onnx"
    raw = model.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(scores_of(file, model, PAIRS), raw, atol=1e-4)


def test_pooling_that_leaves_a_prompt_out_is_refused(tmp_path: Path):
    head = [Pooling(WIDTH, "mean", include_prompt=False), modular_factory.score()]
    make_peer(tmp_path, head, prompts={"ask": "what is "}, default_prompt_name="ask")
    with pytest.raises(ValueError, match="leaves out the tokens of a prompt, whose number is no"):
        export.export_onnx(CrossEncoder(tmp_path / "model", device="cpu"), tmp_path)
