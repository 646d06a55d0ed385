"""Drop-in losses for sentence-transformers' CrossEncoderTrainer: same signatures, fused computation.

from rerank_fast.losses import LambdaLoss
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, get_args

import torch
from torch import Tensor, nn

from rerank_fast.model.packing import TokenizedPairs, upload
from rerank_fast.model.scoring import make_packed_step, run, say_once
from rerank_fast.model.texts import check_inputs, check_labels
from rerank_fast.model.wrappers import find_cross_encoder
from rerank_fast.ops.lambda_loss import ReductionLog, Scheme, lambda_loss
from rerank_fast.ops.options import check_choice, check_cut, check_flag, check_number, check_positive
from rerank_fast.ops.reference import discounts, diverged, normalized_gains, pair_mask, pair_weights, ranks


class BaseWeightingScheme(nn.Module):
    """Weights of the pairs of a batch. Subclass it for a weighting of your own.

    A subclass that sets `scheme` to one of the names of `rerank_fast.lambda_loss` runs fused; any other
    runs through its `forward` in eager PyTorch.
    """

    scheme: Scheme | None = None

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        """Weights of all ordered pairs, broadcastable to (Q, D, D), documents in the order of their scores.

        Args:
            gain: (Q, D) normalised gains.
            discount: (1, D) discounts log2(1 + rank).
            true_sorted: (Q, D) labels, at least 0; 0 in padding.
        """
        if self.scheme is None:
            raise NotImplementedError(f"{type(self).__name__} must implement forward(gain, discount, true_sorted)")
        rank = torch.arange(1, gain.shape[1] + 1, device=gain.device)
        mu = float(getattr(self, "mu", 0.0))
        return torch.stack([pair_weights(g, rank, scheme=self.scheme, mu=mu) for g in gain])


class NoWeightingScheme(BaseWeightingScheme):
    """Every pair weighs 1 (RankNet on preference pairs)."""

    scheme = "none"


class NDCGLoss1Scheme(BaseWeightingScheme):
    """NDCGLoss1: a bound looser than NDCGLoss2's, over all ordered pairs."""

    scheme = "ndcg1"


class NDCGLoss2Scheme(BaseWeightingScheme):
    """NDCGLoss2: a tighter bound of NDCG, by the distance of two ranks."""

    scheme = "ndcg2"


class LambdaRankScheme(BaseWeightingScheme):
    """LambdaRank: the change of NDCG when two documents swap places."""

    scheme = "lambdarank"


class NDCGLoss2PPScheme(BaseWeightingScheme):
    """NDCGLoss2++: mu * NDCGLoss2 + LambdaRank, the strongest in the LambdaLoss paper."""

    scheme = "ndcg2pp"

    def __init__(self, mu: float = 10.0) -> None:
        super().__init__()
        self.mu = check_number("mu", mu, least=0)


# sentence-transformers' own scheme objects are known by name, so that it need not be installed.
_PEER_MODULE = "sentence_transformers.cross_encoder.losses.lambda_loss"
_PEER_SCHEMES: dict[str, Scheme] = {
    "NoWeightingScheme": "none",
    "NDCGLoss1Scheme": "ndcg1",
    "NDCGLoss2Scheme": "ndcg2",
    "LambdaRankScheme": "lambdarank",
    "NDCGLoss2PPScheme": "ndcg2pp",
}


def _fused_scheme(weighting_scheme: nn.Module) -> Scheme | None:
    """The op's name of a weighting scheme; None for a custom one."""
    kind = type(weighting_scheme)
    if kind.__module__ == _PEER_MODULE:
        return _PEER_SCHEMES.get(kind.__name__)
    for base in kind.__mro__:
        # A subclass that overrides forward asks for its own weights, whatever name it inherits.
        if base is BaseWeightingScheme:
            return getattr(kind, "scheme", None)
        if "forward" in base.__dict__:
            return None
    return None


def _takes_every_ordered_pair(weighting_scheme: nn.Module) -> bool:
    """Whether a scheme is, or inherits from, NDCGLoss1 (ours or sentence-transformers')."""
    return any(
        base is NDCGLoss1Scheme or (base.__module__ == _PEER_MODULE and base.__name__ == "NDCGLoss1Scheme")
        for base in type(weighting_scheme).__mro__
    )


def _fullname(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class LambdaLoss(nn.Module):
    """LambdaLoss (Wang et al., CIKM 2018) with sentence-transformers' signature and numbers.

    Tokenises all pairs of the batch once, runs the model on micro-batches of similar length, and takes
    the loss and its gradient from one fused pass over the preference pairs.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        weighting_scheme: one of this module's schemes, one of sentence-transformers', or any module with
            `forward(gain, discount, true_sorted)`; None weighs every pair 1.
        k: count pairs with at least one document in the model's top k; None counts all.
        sigma: slope of the sigmoid, above 0.
        eps: least ideal DCG, above 0.
        reduction_log: "binary" or "natural".
        activation_fn: applied to the logits before the loss. What the model's predict applies to its scores stays
            the model's own, as in the Trainer.
        mini_batch_size: pairs per forward pass; None means the number of queries, 0 or less all pairs.
        packed: run without padding where the model's architecture allows it; False calls the model itself.

    Raises:
        ValueError: an option that is none, or a model with more than one output label.
    """

    def __init__(
        self,
        model: nn.Module,
        weighting_scheme: nn.Module | None = NDCGLoss2PPScheme(),  # noqa: B008 - the peer's signature; it has no state
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: ReductionLog = "binary",
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008
        mini_batch_size: int | None = None,
        packed: bool = True,
    ) -> None:
        super().__init__()
        check_cut(k)
        check_positive("sigma", sigma)
        check_positive("eps", eps)
        check_choice("reduction_log", reduction_log, get_args(ReductionLog))
        check_flag("packed", packed)
        whole = isinstance(mini_batch_size, Integral) and not isinstance(mini_batch_size, bool)
        if mini_batch_size is not None and not whole:
            raise ValueError(f"mini_batch_size must be None or a whole number, got {mini_batch_size!r}")
        for name, function in (("weighting_scheme", weighting_scheme), ("activation_fn", activation_fn)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} must be None or a module, got {function!r}")
        self.model: Any = model
        self.weighting_scheme = weighting_scheme or NoWeightingScheme()
        self.k = k
        self.sigma = sigma
        self.eps = eps
        self.reduction_log: ReductionLog = reduction_log
        self.activation_fn = activation_fn or nn.Identity()
        self.mini_batch_size = mini_batch_size
        self.packed = packed
        if self.model.num_labels != 1:
            raise ValueError(
                f"{type(self).__name__} supports a model with 1 output label, "
                f"but got a model with {self.model.num_labels} output labels."
            )

    def forward(
        self,
        inputs: list[list[Any]],
        labels: list[Any],
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            inputs: [queries, documents]: Q queries, and for each query its list of documents.
            labels: for each query a tensor, or any sequence, with a label for each document.
            prompt: passed on to the model's preprocessing.
            task: passed on to the model's preprocessing.

        Raises:
            ValueError: labels are one tensor, inputs are not two columns, a query's documents and
                labels differ in number, a text is not valid Unicode, or a number, bytes or None
                stands in place of one; names the query and the document.
        """
        name = type(self).__name__
        if isinstance(labels, Tensor):
            raise ValueError(
                f"{name} expects a list of labels for each sample, but got a single value for each sample."
            )
        if len(inputs) != 2:
            raise ValueError(f"{name} expects two inputs (queries, documents_list), but got {len(inputs)} inputs.")
        queries, documents = inputs
        if len(queries) != len(documents):
            raise ValueError(f"{name} got {len(queries)} queries but {len(documents)} lists of documents.")
        queries, documents = check_inputs(queries, documents)
        labels = [_label_tensor(values, q) for q, values in enumerate(labels)]
        docs_per_query = [len(docs) for docs in documents]
        labels_per_query = [len(values) for values in labels]
        if docs_per_query != labels_per_query:
            raise ValueError(
                f"Number of documents per query in inputs ({docs_per_query}) does not match "
                f"number of labels per query ({labels_per_query})."
            )
        pairs = [(query, document) for query, docs in zip(queries, documents, strict=True) for document in docs]
        if not pairs:
            raise ValueError(f"{name} got a batch of {len(queries)} queries without any document.")

        logits = self._score(pairs, len(queries), prompt=prompt, task=task).float()
        scores = self.activation_fn(logits)
        flat_labels = upload(torch.cat([values.reshape(-1) for values in labels]).float(), scores.device)
        offsets = upload(torch.tensor([0, *docs_per_query]).cumsum(0), scores.device)
        scheme = _fused_scheme(self.weighting_scheme)
        if scheme is None:
            return self._eager(scores, flat_labels, docs_per_query)
        return lambda_loss(
            scores,
            flat_labels,
            offsets,
            scheme=scheme,
            # As in sentence-transformers, 0 means no cut.
            k=self.k or None,
            sigma=self.sigma,
            mu=float(getattr(self.weighting_scheme, "mu", 10.0)),
            eps=self.eps,
            reduction_log=self.reduction_log,
        )

    def _score(self, pairs: list[Any], num_queries: int, *, prompt: str | None, task: str | None) -> Tensor:
        """Logits (N,) in the order of the pairs, from forwards of mini_batch_size pairs of similar length."""
        mini_batch_size = self.mini_batch_size or num_queries
        if mini_batch_size <= 0:
            mini_batch_size = len(pairs)
        preprocess = self.model.preprocess
        features: Mapping[str, Any] = preprocess(pairs, prompt=prompt, task=task)
        device = self.model.device
        mask = features.get("attention_mask")
        if not _is_padded_text(features, len(pairs)):
            # Images, audio or flattened inputs can't be cut by row: leave batching to the model.
            parts = [
                self._logits(preprocess(pairs[i : i + mini_batch_size], prompt=prompt, task=task))
                for i in range(0, len(pairs), mini_batch_size)
            ]
            return torch.cat(parts)
        assert mask is not None
        found = find_cross_encoder(self.model) if self.packed else ""
        if isinstance(found, str):
            if found:
                say_once(found)
        else:
            dtype, tokens = found.dtype or _autocast_dtype(device), TokenizedPairs.from_padded(features)
            step = make_packed_step(found.model, tokens, dtype=dtype, answers=found.answers)
            if step is not None:
                return found.call(lambda: run(step, max_pairs=mini_batch_size))
        # Tokens come from the tokenizer on the host, so the lengths are read without waiting for a device.
        lengths = mask.sum(dim=1)
        order = torch.argsort(lengths, descending=True, stable=True)
        logits = []
        for rows in order.split(mini_batch_size):
            kept = _columns_in_use(mask[rows])
            micro_batch = {
                key: value[rows][:, kept].to(device, non_blocking=True)
                if isinstance(value, Tensor) and value.shape == mask.shape
                else value[rows].to(device, non_blocking=True)
                if isinstance(value, Tensor)
                else value
                for key, value in features.items()
            }
            logits.append(self._logits(micro_batch))
        return torch.cat(logits).index_select(0, upload(torch.argsort(order), device))

    def _logits(self, features: Mapping[str, Any]) -> Tensor:
        device = self.model.device
        features = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()
        }
        return self.model(features)["scores"].view(-1)

    def _eager(self, scores: Tensor, labels: Tensor, docs_per_query: list[int]) -> Tensor:
        """The loss with a custom scheme: padded (Q, D, D) tensors, which is what its forward expects."""
        k, every_pair = self.k or 0, _takes_every_ordered_pair(self.weighting_scheme)
        width = max(docs_per_query)
        gains, true_sorted, differences, masks = [], [], [], []
        seen = scores.new_zeros(())  # or NaN, with NaN gradients for the lists that diverged
        for s, y in zip(scores.split(docs_per_query), labels.split(docs_per_query), strict=True):
            padding = width - s.numel()
            if s.numel() == 0:
                gains.append(s.new_zeros(width))
                true_sorted.append(s.new_zeros(width))
                differences.append(s.new_zeros(width, width))
                masks.append(torch.zeros(width, width, dtype=torch.bool, device=s.device))
                continue
            seen = seen + (s * torch.where(diverged(s.detach(), y, self.sigma), torch.nan, 0.0)).sum()
            rank = ranks(s.detach())
            order = torch.argsort(rank)
            mask = pair_mask(y[order], rank[order], scheme="ndcg1" if every_pair else "none", k=k)
            gains.append(nn.functional.pad(normalized_gains(y, k, self.eps)[order], (0, padding)))
            true_sorted.append(nn.functional.pad(y[order].clamp(min=0), (0, padding)))
            difference = s[order][:, None] - s[order][None, :]
            differences.append(nn.functional.pad(difference, (0, padding, 0, padding)))
            masks.append(nn.functional.pad(mask, (0, padding, 0, padding)))
        discount = discounts(width, dtype=scores.dtype, device=scores.device)[None, :]
        weights = self.weighting_scheme(torch.stack(gains), discount, torch.stack(true_sorted))
        mask = torch.stack(masks)
        losses = (weights * nn.functional.logsigmoid(self.sigma * torch.stack(differences)))[mask]
        scale = 1 / math.log(2) if self.reduction_log == "binary" else 1.0
        return seen - scale * losses.sum() / max(losses.numel(), 1)

    def get_config_dict(self) -> dict[str, float | int | str | None]:
        """The loss parameters, for a model card."""
        config: dict[str, float | int | str | None] = {
            "weighting_scheme": _fullname(self.weighting_scheme),
            "k": self.k,
            "sigma": self.sigma,
            "eps": self.eps,
            "reduction_log": self.reduction_log,
            "activation_fn": _fullname(self.activation_fn),
            "mini_batch_size": self.mini_batch_size,
        }
        if hasattr(self.weighting_scheme, "mu"):
            config["mu"] = float(self.weighting_scheme.mu)  # type: ignore[arg-type]
        return config

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return """
@inproceedings{wang2018lambdaloss,
  title={The LambdaLoss Framework for Ranking Metric Optimization},
  author={Wang, Xuanhui and Li, Cheng and Golbandi, Nadav and Bendersky, Michael and Najork, Marc},
  booktitle={Proceedings of the 27th ACM International Conference on Information and Knowledge Management},
  pages={1313--1322},
  year={2018}
}
"""


def _label_tensor(values: Any, query: int) -> Tensor:
    """(D,) labels of one query; a tensor stays where it is."""
    if isinstance(values, Tensor) and values.dim():
        return values
    return torch.tensor(check_labels(values, f"the labels of query {query}"), dtype=torch.float32)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the caller's autocast; None outside of one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _is_padded_text(features: Mapping[str, Any], num_pairs: int) -> bool:
    """Whether every tensor of the features has a row a pair, beside a (N, T) attention mask."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != num_pairs:
        return False
    return all(
        value.dim() == 2 and value.shape[0] == num_pairs for value in features.values() if isinstance(value, Tensor)
    )


def _columns_in_use(mask: Tensor) -> slice:
    """The columns of a (B, T) attention mask between the first and the last token of any row."""
    used = mask.any(dim=0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if used.numel() else slice(0, 1)
