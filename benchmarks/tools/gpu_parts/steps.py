"""Steps, predict and evaluation: measured, beside the GPU model's figures and
sentence-transformers' best setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools import gpu_model, gpu_workloads
from benchmarks.tools.gpu_counts import CARDS, Card, Tally
from benchmarks.tools.gpu_parts import ceilings, workloads
from benchmarks.tools.gpu_parts.results import Results
from benchmarks.tools.gpu_parts.timing import EventClock, Profile, Unobserved, loop_seconds, profile
from rerank_fast.data.tokenized import TokenizedLists
from rerank_fast.model.tokens.packing import TokenizedPairs

_KERNELS = 30  # of a profile and of the model, the longest

Call = Callable[[], object]


def run(results: Results) -> None:
    shapes = ("MiniLM-L6",) if results.dry else ("MiniLM-L12", "ModernBERT-base", "MiniLM-L6")
    for shape in shapes:
        ours(results, shape)
        beside_peer(results, shape)


def ours(results: Results, shape: str) -> None:
    """What the model counts, as it runs."""
    card = measured_card(*ceilings.measured(results))
    modelled = gpu_model.our_rows(shape)
    for what, call in workloads.our_runs(results.device, shape, small=results.dry).items():
        counted = next(row for row in modelled if row.what.startswith(what))
        total = counted.total()
        unobserved = lambda call=call: call(Unobserved())  # noqa: E731
        seconds = loop_seconds(unobserved, results.device)
        results.add(
            f"{shape}, {what}",
            measured_seconds=seconds,
            **_profiled(profile(unobserved, results.device), seconds),
            measured_phases=_phases(call, results.device),
            modelled_on=card.name,
            modelled_launches=total.launches,
            modelled_device_seconds=total.seconds(card),
            modelled_phases={name: tally.seconds(card) for name, tally in counted.phases.items()},
            modelled_kernels=_by_name(total, card),
        )


def measured_card(bytes_per_second: float | None, flops: float | None) -> Card:
    """The model's first card, with this GPU's own copy and product where they were measured.

    The share of a product's peak that the model takes for its shapes stays.
    """
    if bytes_per_second is None or flops is None:
        return CARDS[0]
    return replace(
        CARDS[0],
        name="this GPU's measured copy and product",
        bytes_per_second=bytes_per_second,
        memory_share=1.0,
        narrow_flops=flops,
    )


def _profiled(found: Profile | None, seconds: float | None) -> dict[str, Any]:
    if found is None or seconds is None:
        return {"measured_launches": None, "measured_idle_share": None}
    return {
        "measured_launches": found.launches,
        "measured_copies": found.copies,
        "measured_busy_seconds": found.busy_seconds,
        "measured_idle_share": max(1 - found.busy_seconds / seconds, 0.0),
        "measured_kernels": {
            name[:100]: [found.launches_by_name[name], value]
            for name, value in list(found.seconds_by_name.items())[:_KERNELS]
        },
    }


def _phases(call: workloads.Run, device: torch.device) -> dict[str, float] | None:
    if device.type != "cuda":
        return None
    clock = EventClock()
    call(clock)
    return clock.seconds()


def _by_name(total: Tally, card: Card) -> dict[str, list[float]]:
    launches, seconds = Counter[str](), Counter[str]()
    for one in total.operations:
        launches[one.name] += one.launches
        seconds[one.name] += card.seconds(one)
    return {name: [launches[name], value] for name, value in seconds.most_common(_KERNELS)}


def beside_peer(results: Results, shape: str) -> None:
    """The same texts and weights; their tokenizing is part of their step, as it is of their predict
    and of ours."""
    device, small = results.device, results.dry
    lists, pairs = (
        make(shape, small=small) for make in (workloads.training_lists, workloads.inference_pairs)
    )
    with workloads.saved_model(shape, small=small) as directory:
        for what, cases in (
            ("training step", training_calls(directory, lists, device)),
            ("predict on texts", predict_calls(directory, pairs, device)),
            ("evaluation in a run", evaluation_calls(directory, pairs, device)),
        ):
            _compare(results, f"{shape}, {what}", cases)


def _compare(results: Results, what: str, cases: Iterable[tuple[str, Call]]) -> None:
    """Ours is the first; the peer's best setting is what it is held against."""
    times: dict[str, float | None] = {}
    try:
        for name, call in cases:
            seconds = times[name] = loop_seconds(call, results.device, calls=2)
            results.add(
                f"{what}: {name}",
                measured_seconds=seconds,
                **_profiled(profile(call, results.device), seconds),
            )
    except ImportError as error:
        results.add(what, left_out=str(error))
        return
    own, *others = times.values()
    known = [one for one in others if one is not None]
    ratio = min(known) / own if own is not None and known else None
    results.add(f"{what}: times as fast as their best", measured_ratio=ratio)


def training_calls(
    directory: Path, lists: TokenizedLists, device: torch.device
) -> Iterable[tuple[str, Call]]:
    step = gpu_workloads.Training(gpu_workloads.Observed(directory, device=device), lists, "off")
    yield "rerank_fast", lambda: step(Unobserved())
    from sentence_transformers.cross_encoder.losses import LambdaLoss

    rows = workloads.rows_of(lists)
    inputs = [[row["query"] for row in rows], [row["docs"] for row in rows]]
    labels = [torch.tensor(row["labels"]) for row in rows]
    peer = _peer(directory, device).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=2e-5, fused=True)
    for pairs in (16, 32, -1):
        loss = LambdaLoss(peer, mini_batch_size=pairs)

        def train(loss: Any = loss) -> None:
            loss(inputs, labels).backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        yield f"sentence-transformers, {'all' if pairs < 0 else pairs} a forward", train


def _peer(directory: Path, device: torch.device, **options: Any) -> Any:
    """Under autocast to bf16 in each forward, as their trainer has it; or of another dtype."""
    from sentence_transformers import CrossEncoder

    peer = CrossEncoder(str(directory), num_labels=1, device=str(device), **options)
    if not options:
        peer.forward = torch.autocast(device.type, torch.bfloat16)(peer.forward)
    return peer


def predict_calls(
    directory: Path, tokens: TokenizedPairs, device: torch.device
) -> Iterable[tuple[str, Call]]:
    reranker = gpu_workloads.Observed(directory, device=device, dtype=torch.bfloat16)
    texts = workloads.texts_of(tokens)
    yield "rerank_fast", lambda: reranker.predict(texts)
    peer = _peer(directory, device, model_kwargs={"dtype": torch.bfloat16})
    for pairs in (32, 128, 512):
        yield (
            f"sentence-transformers, {pairs} a forward",
            lambda pairs=pairs: peer.predict(texts, batch_size=pairs),
        )


def evaluation_calls(
    directory: Path, tokens: TokenizedPairs, device: torch.device
) -> Iterable[tuple[str, Call]]:
    """Lists of 25 documents of which the first is relevant; after the first call ours keeps its
    tokens."""
    from rerank_fast.evaluation import RerankingEvaluator

    texts = workloads.texts_of(tokens)
    lists = []
    for start in range(0, len(texts), 25):
        documents = list(dict.fromkeys(document for _, document in texts[start : start + 25]))
        lists.append(
            {
                "query": texts[start][0],
                "docs": documents,
                "labels": [1, *[0] * (len(documents) - 1)],
            }
        )
    reranker = gpu_workloads.Observed(directory, device=device)
    evaluator = RerankingEvaluator(lists)

    def evaluate() -> None:
        with reranker.computing_in(torch.bfloat16):
            evaluator(reranker)

    yield "rerank_fast", evaluate
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    samples = [
        {"query": row["query"], "positive": row["docs"][:1], "documents": row["docs"]}
        for row in lists
    ]
    peer = _peer(directory, device)
    for pairs in (64, 512):
        theirs = CrossEncoderRerankingEvaluator(
            samples, batch_size=pairs, always_rerank_positives=False
        )
        yield f"sentence-transformers, {pairs} a forward", lambda theirs=theirs: theirs(peer)
