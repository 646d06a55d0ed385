"""The drop-in loss beside sentence-transformers' own, also inside its trainer."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.cross_encoder import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder import losses as peer_losses

from rerank_fast import losses
from rerank_fast.model.packed.encoder import PackedPairs
from tests.losses.beside_theirs import DOCUMENTS, LABELS, QUERIES, assert_same
from tests.losses.beside_theirs import loss_and_gradients as gradients_of
from tests.model_factory import make_tiny_bert

SCHEMES = [
    "NoWeightingScheme",
    "NDCGLoss1Scheme",
    "NDCGLoss2Scheme",
    "LambdaRankScheme",
    "NDCGLoss2PPScheme",
]


def loss_and_gradients(loss):
    return gradients_of(loss, [QUERIES, DOCUMENTS], [torch.tensor(values) for values in LABELS])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scheme_module", [losses, peer_losses])
def test_every_scheme_ours_or_theirs(model, scheme, scheme_module):
    peer = peer_losses.LambdaLoss(model, weighting_scheme=getattr(peer_losses, scheme)(), k=3)
    ours = losses.LambdaLoss(model, weighting_scheme=getattr(scheme_module, scheme)(), k=3)
    assert_same(loss_and_gradients(ours), loss_and_gradients(peer))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_modules_give_their_weights(scheme):
    gain = torch.rand(2, 5)
    discount = torch.log2(torch.arange(2, 7).float())[None]
    ours = getattr(losses, scheme)()(gain, discount, gain)
    theirs = getattr(peer_losses, scheme)()(gain, discount, gain)
    torch.testing.assert_close(ours.expand(2, 5, 5), theirs.expand(2, 5, 5))


class GainOnly(losses.BaseWeightingScheme):
    def forward(self, gain, discount, true_sorted):
        return (gain[:, :, None] - gain[:, None, :]).abs() + true_sorted[:, :, None]


class PeerGainOnly(peer_losses.NDCGLoss1Scheme):
    def forward(self, gain, discount, true_sorted):
        return (gain / discount)[:, :, None] + true_sorted[:, None, :]


class Tempered(losses.NDCGLoss2PPScheme):
    def forward(self, gain, discount, true_sorted):
        return super().forward(gain, discount, true_sorted) * 0.5


@pytest.mark.parametrize("scheme", [GainOnly(), PeerGainOnly(), Tempered()])
@pytest.mark.parametrize("k", [None, 2])
def test_custom_schemes_fall_back_to_their_own_forward(model, scheme, k):
    peer = peer_losses.LambdaLoss(model, weighting_scheme=scheme, k=k, reduction_log="natural")
    ours = losses.LambdaLoss(model, weighting_scheme=scheme, k=k, reduction_log="natural")
    assert_same(loss_and_gradients(ours), loss_and_gradients(peer))


@pytest.mark.parametrize("mini_batch_size", [None, 1, 4, -1])
def test_mini_batch_size_is_pairs_per_forward_and_text_is_tokenized_once(
    model, mini_batch_size, monkeypatch
):
    loss = losses.LambdaLoss(model, mini_batch_size=mini_batch_size, packed=False)
    sizes, tokenized, padded = [], [], []
    forward, preprocess = model.forward, model.preprocess

    def counting_forward(features, **kwargs):
        mask = features["attention_mask"]
        sizes.append(len(mask))
        padded.append(int((mask == 0).sum()))
        return forward(features, **kwargs)

    def counting_preprocess(pairs, **kwargs):
        tokenized.append(len(pairs))
        return preprocess(pairs, **kwargs)

    monkeypatch.setattr(model, "forward", counting_forward)
    monkeypatch.setattr(model, "preprocess", counting_preprocess)
    loss_and_gradients(loss)
    assert tokenized == [10]
    limit = {None: 3, 1: 1, 4: 4, -1: 10}[mini_batch_size]
    assert sum(sizes) == 10
    assert max(sizes) == limit
    if mini_batch_size == 1:
        assert sum(padded) == 0


@pytest.mark.parametrize("mini_batch_size", [None, 1, 4, -1])
def test_packed_runs_give_the_same_loss_and_gradients(model, mini_batch_size, monkeypatch):
    sizes = []
    call = PackedPairs.__call__

    def counting_call(self, indices):
        sizes.append(len(indices))
        return call(self, indices)

    monkeypatch.setattr(PackedPairs, "__call__", counting_call)
    padded = loss_and_gradients(
        losses.LambdaLoss(model, mini_batch_size=mini_batch_size, packed=False)
    )
    assert not sizes
    assert_same(
        loss_and_gradients(losses.LambdaLoss(model, mini_batch_size=mini_batch_size)), padded
    )
    assert sum(sizes) == 10
    assert max(sizes) == {None: 3, 1: 1, 4: 4, -1: 10}[mini_batch_size]


def test_a_model_with_a_forward_of_its_own_is_called(model, monkeypatch):
    """A wrapper, a hook or a further module may do more than the Hugging Face model does."""
    monkeypatch.setattr(PackedPairs, "__call__", None)
    loss = losses.LambdaLoss(model)
    handle = model.register_forward_hook(
        lambda module, inputs, output: {"scores": output["scores"] * 2}
    )
    doubled, _ = loss_and_gradients(loss)
    handle.remove()
    plain, _ = loss_and_gradients(losses.LambdaLoss(model, sigma=2.0, packed=False))
    torch.testing.assert_close(doubled, plain)
    model.forward = lambda features: {"scores": 2 * type(model).forward(model, features)["scores"]}
    torch.testing.assert_close(loss_and_gradients(loss)[0], plain)
    del model.forward
    handle = model[0].register_forward_hook(
        lambda module, inputs, output: output | {"scores": 2 * output["scores"]}
    )
    torch.testing.assert_close(loss_and_gradients(loss)[0], plain)
    handle.remove()

    class CrossEncoder(PeerCrossEncoder):
        def forward(self, features):
            return {"scores": 2 * super().forward(features)["scores"]}

    monkeypatch.setattr(model, "__class__", CrossEncoder)
    torch.testing.assert_close(loss_and_gradients(loss)[0], plain)


def test_a_model_that_must_be_called_is_said_once(model, monkeypatch, caplog):
    monkeypatch.setattr("rerank_fast.model.preparation._said", set())
    loss = losses.LambdaLoss(model)
    loss.model = torch.compile(model, backend="eager")
    loss.model.preprocess = model.preprocess
    for _ in range(2):
        loss([["q"], [["a", "b"]]], [torch.tensor([1.0, 0.0])])
    assert [
        record.getMessage() for record in caplog.records if "padded" in record.getMessage()
    ] == [
        "Pairs are padded and sorted by length: the model is a OptimizedModule, whose own forward "
        "must run."
    ]


def test_config_and_citation(model):
    peer = peer_losses.LambdaLoss(model, k=10, mini_batch_size=16)
    ours = losses.LambdaLoss(model, losses.NDCGLoss2PPScheme(mu=5.0), k=10, mini_batch_size=16)
    config = ours.get_config_dict()
    assert config.keys() - peer.get_config_dict().keys() == {"mu"}
    assert config["mu"] == 5.0
    assert config["weighting_scheme"] == "rerank_fast.objectives.weighting.NDCGLoss2PPScheme"
    assert "wang2018lambdaloss" in ours.citation


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [
        ([QUERIES, DOCUMENTS], torch.ones(3)),
        ([QUERIES, DOCUMENTS, DOCUMENTS], [torch.tensor(values) for values in LABELS]),
        ([QUERIES, DOCUMENTS], [torch.ones(3), torch.ones(3), torch.ones(5)]),
    ],
)
def test_the_same_errors(model, inputs, labels):
    with pytest.raises(ValueError) as theirs:
        peer_losses.LambdaLoss(model)(inputs, labels)
    with pytest.raises(ValueError) as ours:
        losses.LambdaLoss(model)(inputs, labels)
    assert str(ours.value) == str(theirs.value)


def test_more_than_one_label_is_refused(tmp_path):
    three = PeerCrossEncoder(
        str(make_tiny_bert(tmp_path, num_labels=3)), num_labels=3, device="cpu"
    )
    with pytest.raises(ValueError, match="1 output label"):
        losses.LambdaLoss(three)


def test_our_cross_encoder_can_stand_in(directory, model):
    from rerank_fast import CrossEncoder

    mine = CrossEncoder(directory, device="cpu")
    mine.model.load_state_dict(model.model.state_dict())
    mine.eval()
    batch = [QUERIES, DOCUMENTS], [torch.tensor(values) for values in LABELS]
    ours = losses.LambdaLoss(mine)(*batch)
    torch.testing.assert_close(
        ours, peer_losses.LambdaLoss(model.eval())(*batch), rtol=1e-5, atol=1e-6
    )
