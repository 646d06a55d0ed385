"""Every loss class beside sentence-transformers' own: numbers, gradients, signatures, attributes,
configs.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from sentence_transformers.cross_encoder import losses as peer_losses
from torch import nn

from rerank_fast import CrossEncoder, losses
from rerank_fast.model.packed.encoder import PackedPairs
from tests.losses.beside_theirs import (
    BATCHES,
    CASES,
    Case,
    assert_same,
    loss_and_gradients,
    tensors,
)

BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@BY_NAME
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_same_numbers_and_gradients(
    case: Case, packed: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    calls, call = [], PackedPairs.__call__
    monkeypatch.setattr(PackedPairs, "__call__", lambda *args: (calls.append(1), call(*args))[1])
    for options in case.options:
        for batch in BATCHES[case.takes]:
            theirs = loss_and_gradients(case.make_theirs(model, **options), *tensors(*batch))
            assert not calls
            ours = loss_and_gradients(case.make(model, packed=packed, **options), *tensors(*batch))
            assert bool(calls) == packed
            calls.clear()
            # Of a softmax over a list gradients nearly cancel: theirs is 1.2e-5 from fp64's itself.
            assert_same(ours, theirs, gradients=3e-5)


def alike(ours: Any, theirs: Any) -> bool:
    """Whether options are the same, modules by their class's name."""
    if isinstance(theirs, nn.Module):
        return type(ours).__name__ == type(theirs).__name__
    return bool(ours == theirs)


@BY_NAME
def test_the_signature_is_theirs_and_what_is_added_is_by_name(case: Case):
    ours, theirs = (
        inspect.signature(getattr(module, case.name).__init__).parameters
        for module in (losses, peer_losses)
    )
    added = [name for name in ours if name not in theirs]
    assert [name for name in ours if name in theirs] == list(theirs)
    assert "packed" in added
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert alike(ours[name].default, parameter.default)
    for name in added:
        by_name = ours[name].kind == inspect.Parameter.KEYWORD_ONLY
        assert by_name or (case.name, name) == ("LambdaLoss", "packed")
    assert inspect.signature(getattr(losses, case.name).forward).parameters.keys() == (
        inspect.signature(getattr(peer_losses, case.name).forward).parameters.keys()
    )


def public(loss: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in {**vars(loss), **loss._modules}.items()
        if not name.startswith("_")
    }


MODULES = {
    "rerank_fast.objectives.weighting": "sentence_transformers.cross_encoder.losses.lambda_loss",
    "rerank_fast.losses.list_mle": "sentence_transformers.cross_encoder.losses.plist_mle",
}


def paper(citation: str) -> str:
    """The letters of the title of a BibTeX entry."""
    title = re.search(r"\btitle *= *{(.*?)}, *\n", citation, re.DOTALL)[1]
    return "".join(filter(str.isalpha, title.lower()))


@BY_NAME
def test_attributes_config_and_citation_are_theirs(case: Case, model: nn.Module):
    for options in case.options:
        ours, theirs = case.make(model, **options), case.make_theirs(model, **options)
        found, expected = public(ours), public(theirs)
        if case.name == "ListNetLoss":  # what its own arithmetic does there
            del expected["cross_entropy_loss"]
        assert found.keys() >= expected.keys()
        for name, value in expected.items():
            assert alike(found[name], value), name
        config = {key: value for key, value in ours.get_config_dict().items() if key != "mu"}
        for ours_in, theirs_in in MODULES.items():
            config = {
                k: v.replace(ours_in, theirs_in) if isinstance(v, str) else v
                for k, v in config.items()
            }
        assert config == theirs.get_config_dict()
    assert hasattr(ours, "citation") == hasattr(theirs, "citation")
    if hasattr(theirs, "citation"):
        assert paper(ours.citation) == paper(theirs.citation)
    uses = [getattr(loss, "uses_gradient_cache", False) for loss in (ours, theirs)]
    assert uses[0] == uses[1]


TEXTS = ["a", "b"]
BAD_BATCHES = {
    "lists": [
        ([TEXTS, [["c"], ["d"]]], torch.ones(2)),
        ([TEXTS, [["c"], ["d"]], [["e"], ["f"]]], [torch.ones(1)] * 2),
        ([TEXTS], [torch.ones(1)] * 2),
        ([TEXTS, [["c"], ["d", "e"]]], [torch.ones(1)] * 2),
    ],
    "pairs": [
        ([TEXTS], torch.ones(2)),
        ([TEXTS, TEXTS, TEXTS], torch.ones(2)),
        ([TEXTS, TEXTS], torch.ones(3)),
        ([TEXTS, TEXTS], torch.ones(2, 2)),
    ],
    "margins": [
        ([TEXTS, TEXTS, TEXTS], torch.ones(3)),
        ([TEXTS, TEXTS, TEXTS], torch.ones(2, 3)),
        ([TEXTS, TEXTS, TEXTS, TEXTS], [torch.ones(4), torch.ones(4)]),
    ],
    "tuples": [],
}


@BY_NAME
def test_the_same_errors(case: Case, model: nn.Module):
    for inputs, labels in BAD_BATCHES[case.takes]:
        said = []
        for make in (case.make, case.make_theirs):
            with pytest.raises(ValueError) as error:
                make(model)(inputs, labels)
            said.append(str(error.value))
        assert said[0] == said[1]


class TwoLabels(nn.Module):
    num_labels = 2


@BY_NAME
def test_models_that_are_none_of_it_are_refused_in_their_words(
    case: Case, model: nn.Module, monkeypatch
):
    monkeypatch.setattr(type(model), "num_labels", 2)
    models = [model, TwoLabels()]
    for refused in models:
        said = []
        for make in (case.make, case.make_theirs):
            with pytest.raises(ValueError) as error:
                make(refused)
            said.append(str(error.value))
        assert said[0] == said[1]


@BY_NAME
def test_a_text_that_is_none_is_named(case: Case, model: nn.Module):
    columns, labels = BATCHES[case.takes][-1]
    columns = {name: list(column) for name, column in columns.items()}
    first = next(iter(columns))
    columns[first][1] = None
    place = "query 1" if case.takes == "lists" else "column 0, row 1"
    with pytest.raises(ValueError, match=f"^{place}: expected a string, got NoneType"):
        case.make(model)(*tensors(columns, labels))


@BY_NAME
@pytest.mark.parametrize("faulty", ["empty", "a row short"])
def test_columns_that_are_none_are_refused(case: Case, faulty: str, model: nn.Module):
    inputs, labels = tensors(*BATCHES[case.takes][-1])
    if faulty == "empty":
        inputs, labels = [column[:0] for column in inputs], labels if labels is None else labels[:0]
    else:
        inputs[1] = inputs[1][:-1]
    with pytest.raises(ValueError, match=r"got a batch|columns of one length|lists of documents"):
        case.make(model)(inputs, labels)


@BY_NAME
def test_our_cross_encoder_can_stand_in(case: Case, model: nn.Module, directory: str):
    mine = CrossEncoder(directory, device="cpu")
    mine.model.load_state_dict(model.model.state_dict())
    batch = tensors(*BATCHES[case.takes][0])
    values = []
    for loss in (case.make(mine.eval()), case.make_theirs(model.eval())):
        torch.manual_seed(3)
        values.append(loss(*batch).detach())
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [case.name for case in CASES])
@pytest.mark.parametrize("option", ["packed", "gradient_cache", "mini_batch_size", "activation_fn"])
def test_options_that_are_none_are_refused(name: str, option: str, model: nn.Module):
    if (name, option) == ("CachedMultipleNegativesRankingLoss", "gradient_cache"):
        pytest.skip("it is always on")
    with pytest.raises(ValueError, match=f"^{option} must be"):
        getattr(losses, name)(model, **{option: "yes"})


def test_their_cross_entropy_loss_stays_theirs(monkeypatch: pytest.MonkeyPatch):
    from rerank_fast.losses import CrossEntropyLoss

    assert CrossEntropyLoss is peer_losses.CrossEntropyLoss
    monkeypatch.setitem(
        __import__("sys").modules, "sentence_transformers.cross_encoder.losses", None
    )
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        from rerank_fast.losses import CrossEntropyLoss
    with pytest.raises(AttributeError, match="no attribute 'NoSuchLoss'"):
        losses.NoSuchLoss  # noqa: B018


@pytest.mark.parametrize("name", [case.name for case in CASES if case.takes == "lists"])
def test_a_query_without_documents_has_no_share(name: str, model: nn.Module):
    """It counts as a list where theirs does; there ListNet is NaN."""
    inputs, labels = (
        [["a", "b"], [["c", "d", "e"], []]],
        [torch.tensor([1.0, 0.0, 0.5]), torch.ones(0)],
    )
    value = getattr(losses, name)(model)(inputs, labels)
    theirs = getattr(peer_losses, name)(model)(inputs, labels)
    if name == "ListNetLoss":
        assert theirs.isnan()
        theirs = peer_losses.ListNetLoss(model)([["a"], inputs[1][:1]], labels[:1]) / 2
    torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-6)


def test_negatives_are_drawn_as_theirs(model: nn.Module):
    anchors = [f"anchor {i}" for i in range(9)]
    columns = [[f"text {c} {i}" for i in range(9)] for c in range(3)]
    for number in (1, 4, 23, 24, None):
        drawn = []
        for module in (losses, peer_losses):
            torch.manual_seed(4)
            loss = module.MultipleNegativesRankingLoss(model, num_negatives=number)
            drawn.append([list(column) for column in loss.get_in_batch_negatives(anchors, columns)])
        assert drawn[0] == drawn[1]
        assert len(drawn[0]) == min(number or 24, 24)
        for column in drawn[0]:
            assert all(
                text.split()[2] != anchor.split()[1]
                for anchor, text in zip(anchors, column, strict=True)
            )


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "4"])
def test_numbers_of_negatives_that_are_none_are_refused(number: object, model: nn.Module):
    with pytest.raises(ValueError, match=r"^num_negatives must be"):
        losses.MultipleNegativesRankingLoss(model, num_negatives=number)


def test_an_anchor_alone_has_a_loss_of_zero(model: nn.Module):
    value = losses.MultipleNegativesRankingLoss(model)([["a"], ["b"]])
    assert value == peer_losses.MultipleNegativesRankingLoss(model)([["a"], ["b"]], None) == 0


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("MarginMSELoss", [["a"], ["b"]]),
        ("MarginMSELoss", [["a"]]),
        ("MultipleNegativesRankingLoss", [["a"]]),
    ],
)
def test_too_few_columns_are_named(name: str, inputs: list[list[str]], model: nn.Module):
    with pytest.raises(
        ValueError,
        match=rf"{name} expects an anchor.* but got a dataset with {len(inputs)} columns",
    ):
        getattr(losses, name)(model)(inputs, torch.ones(1, 1))
