"""The fused head beside the model's own modules, and when those are called instead."""

import pytest
import torch
from torch import nn

from rerank_fast.model.packed import heads
from rerank_fast.model.packed.architectures import find_architecture
from rerank_fast.model.packed.heads import DenseHead
from tests.model.packed.test_encoder import make_model

NAMES = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    calls = []

    def counted(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(options)
        return original(*tensors, **options)

    original = heads.score_head
    monkeypatch.setattr(heads, "score_head", counted)
    return calls


def parts(model: torch.nn.Module) -> DenseHead:
    head = getattr(find_architecture(model), "head", None)
    assert isinstance(head, DenseHead)
    return head


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients_are_those_of_the_models_own_head(name, fused_calls):
    model = make_model(name).eval()
    head = parts(model)
    first, upstream = torch.randn(9, 48), torch.randn(9)
    results = []
    for function in (head, head.own):
        model.zero_grad()
        leaf = first.clone().requires_grad_()
        scores = function(leaf)
        scores.backward(upstream)
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        results.append((scores.detach(), leaf.grad, grads))
    assert len(fused_calls) == 1
    (scores, d_first, grads), (own_scores, own_d_first, own_grads) = results
    assert scores.shape == own_scores.shape == (9,)
    torch.testing.assert_close(scores, own_scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_first, own_d_first, rtol=1e-5, atol=1e-5)
    assert grads.keys() == own_grads.keys()
    assert len(grads) == 4
    for key, grad in own_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_where_the_models_own_head_has_it(name, fused_calls):
    """Different draws, one distribution; a head without its first dropout would have another
    spread.
    """
    torch.manual_seed(0)
    model = make_model(name).train()
    head = parts(model)
    head.dropout.p = 0.3
    first = torch.randn(1, 48)
    with torch.no_grad():
        ours = head(first.expand(20000, 48))
        own = head.own(first.expand(20000, 48))
    assert fused_calls[0]["training"] is True
    assert (ours.mean() - own.mean()).abs() < 5 * own.std() * (2 / 20000) ** 0.5
    assert (ours.std() / own.std() - 1).abs() < 0.04
    torch.manual_seed(1)
    again = head(first.expand(5, 48))
    torch.manual_seed(1)
    assert torch.equal(again, head(first.expand(5, 48)))


def _hooked(head: DenseHead, part: str) -> list[object]:
    heard: list[object] = []
    getattr(head, part).register_forward_hook(lambda *call: heard.append(call))
    return heard


@pytest.mark.parametrize(
    ("name", "part"), [(n, p) for n in NAMES for p in ("container", "dense", "dropout", "out")]
)
def test_hooks_are_called(name, part, fused_calls):
    model = make_model(name).eval()
    head = parts(model)
    if getattr(head, part) is None:
        pytest.skip("this head has no module of its own")
    first = torch.randn(4, 48)
    before = head(first)
    heard = _hooked(head, part)
    assert torch.allclose(head(first), before, atol=1e-5)
    assert heard
    assert len(fused_calls) == 1


def test_adapters_and_other_activations_are_called(fused_calls):
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.mean(dim=-1, keepdim=True)

    first = torch.randn(4, 48)
    for name in NAMES:
        model = make_model(name).eval()
        expected = parts(model)(first)
        attribute = {"bert": "classifier", "distilbert": "classifier"}.get(
            name, "classifier.out_proj"
        )
        parent, _, leaf = attribute.rpartition(".")
        owner = model.get_submodule(parent)
        adapter = Adapter(48, 1)
        adapter.load_state_dict(getattr(owner, leaf).state_dict())
        setattr(owner, leaf, adapter)
        assert not torch.allclose(parts(model)(first), expected)
    model = make_model("bert").eval()
    model.bert.pooler.activation = nn.SiLU()
    pooled = nn.functional.silu(model.bert.pooler.dense(first))
    assert torch.allclose(parts(model)(first), model.classifier(pooled).squeeze(1), atol=1e-5)
    assert len(fused_calls) == len(NAMES)


def test_gelu_of_electra_may_be_another(fused_calls):
    model = make_model("electra").eval()
    first = torch.randn(4, 48)
    model.classifier.activation = nn.GELU(approximate="tanh")
    torch.testing.assert_close(parts(model)(first), model.classifier(first[:, None]).squeeze(1))
    assert fused_calls == []


def test_frozen_weights_get_no_gradient():
    model = make_model("roberta").eval()
    model.classifier.dense.requires_grad_(False)
    parts(model)(torch.randn(3, 48)).sum().backward()
    assert model.classifier.dense.weight.grad is None
    assert model.classifier.out_proj.weight.grad is not None
