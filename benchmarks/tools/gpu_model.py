"""A step's launches, waits, bytes and times on a GPU, without one.

    python -m benchmarks.tools.gpu_model [--shapes MiniLM-L12] [--output benchmarks/tools]
    python -m benchmarks.tools.gpu_model --renew_limits

The real path runs on meta tensors: every operation that would be launched is seen with its tensors.
The device's time is the sum over all operations of the larger of bytes / bandwidth and arithmetic /
peak, at a card's datasheet and a stated share of it. The host's is measured on this CPU with a
model of as many layers and few numbers, so that operations are dispatched and their kernels have
nothing to do; what a driver takes of each launch is added. The step takes the larger of both.
Writes gpu_model.md and gpu_model.json.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.arguments import make_parser
from benchmarks.tools import gpu_attention, gpu_counts, gpu_workloads
from benchmarks.tools.gpu_counts import CARDS, Tally, counting
from benchmarks.tools.gpu_rows import LAUNCH_SECONDS, NODE_SECONDS, TRITON_SECONDS, Row
from benchmarks.tools.gpu_stand_ins import standing_in_for_graphs, stubbed_kernels
from benchmarks.tools.gpu_workloads import (
    SHAPES,
    HostClock,
    Observed,
    Observer,
    PeerScoring,
    PeerStep,
    Scoring,
    Training,
)
from rerank_fast.data.tokenized import TokenizedLists
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.training.distributed.buckets import GradientBuckets

LIMITS = Path(__file__).with_name("gpu_limits.json")
RENEW = "python -m benchmarks.tools.gpu_model --renew_limits"
# What a commit must not raise: by phase.
LIMITED = ("launches", "syncs", "bytes")
PEER_BATCHES = 32, 128, 256, 512  # pairs of its predict; the first is its default
_FEW = 50  # pairs that a service scores for one request
_SMALL = 2  # size of the heads where only the host's time counts; odd ones can't be rotated

Run = Callable[[Observer], None]


def count(shape: str, what: str, run: Run, lengths: np.ndarray, **options: Any) -> Row:
    with counting(lengths, **options) as counts:
        run(counts)
    return Row(shape, what, counts.phases)


def host_times(run: Run, repeats: int = 40) -> dict[str, float]:
    """Seconds of each phase in the fastest of some calls, the first left out: other work only adds
    to them."""
    calls = []
    with stubbed_kernels():
        for _ in range(repeats + 1):
            clock = HostClock()
            run(clock)
            clock.seconds.pop("", None)
            calls.append(clock.seconds)
    return {phase: min(seconds[phase] for seconds in calls[1:]) for phase in calls[0]}


def our_rows(shape: str, *, host: bool = False) -> list[Row]:
    """Training, direct and cached, predict and an evaluation inside a run."""
    config = gpu_workloads.config_of(shape)
    lists, pairs = (
        gpu_workloads.training_lists(config.vocab_size),
        gpu_workloads.inference_pairs(config.vocab_size),
    )
    reranker, few = gpu_workloads.reranker_of(shape), gpu_workloads.training_lists(64, small=True)
    rows = []
    for what, cache in (("training, direct", "off"), ("training, cached", "on")):
        rows.append(count(shape, what, Training(reranker, lists, cache), lists.pairs.lengths))
        if host:
            small = gpu_workloads.reranker_of(shape, head_size=_SMALL)
            rows[-1].host = host_times(Training(small, few, cache))
    rows.append(graph_row(shape, reranker, lists, host=host))
    for what, dtype, scored in (
        ("predict, 1,000 pairs", torch.bfloat16, pairs),
        ("evaluation in a run, 1,000 pairs", torch.float32, pairs),
        (f"predict, {_FEW} pairs", torch.bfloat16, pairs.select(np.arange(_FEW))),
    ):
        scoring = Scoring(gpu_workloads.reranker_of(shape, dtype), scored)
        row = count(shape, what, scoring, scored.lengths)
        rows.append(row)
        if host:
            forwards = row.total().by_name()["varlen_attention"] // config.num_hidden_layers
            small = gpu_workloads.reranker_of(shape, dtype, head_size=_SMALL)
            tokens = gpu_workloads.pairs_of(np.full(2 * forwards, 3), 64)
            row.host = host_times(Scoring(small, tokens, batch_size=2))
    rows.append(scoring_graph_row(shape, scored, host=host))
    return rows


def graph_row(shape: str, reranker: Observed, lists: TokenizedLists, *, host: bool) -> Row:
    """A step whose bucket has been captured: the second one.

    The host's time is of all words and tokens, which it counts and sorts in each step; what
    computes with them on a GPU is not run here.
    """
    with counting(lists.pairs.lengths) as counts, standing_in_for_graphs(counts):
        step = Training(reranker, lists, "off", cuda_graphs=True)
        step(counts)
        counts.phases.clear()
        step(counts)
    row = Row(shape, "training, CUDA graphs", counts.phases)
    if host:
        small = gpu_workloads.reranker_of(shape, head_size=_SMALL, vocabulary=0)
        with standing_in_for_graphs():
            row.host = host_times(Training(small, lists, "off", cuda_graphs=True))
    return row


def scoring_graph_row(shape: str, tokens: TokenizedPairs, *, host: bool) -> Row:
    """Scores of a batch whose bucket has been captured."""
    with counting(tokens.lengths) as counts, standing_in_for_graphs(counts):
        reranker = gpu_workloads.reranker_of(shape, torch.bfloat16)
        reranker.capture_graphs()
        scoring = Scoring(reranker, tokens)
        scoring(counts)
        counts.phases.clear()
        scoring(counts)
    row = Row(shape, f"predict, {len(tokens)} pairs, CUDA graphs", counts.phases)
    if host:
        small = gpu_workloads.reranker_of(shape, torch.bfloat16, head_size=_SMALL, vocabulary=0)
        with standing_in_for_graphs(), stubbed_kernels():
            small.capture_graphs()
            row.host = host_times(Scoring(small, tokens))
    return row


def peer_rows(shape: str, *, host: bool = False) -> list[Row]:
    """sentence-transformers' forward and backward, at its published number of pairs a forward and
    at once."""
    tokens = gpu_workloads.training_lists(gpu_workloads.config_of(shape).vocab_size).pairs
    few = gpu_workloads.training_lists(64, small=True).pairs
    rows = []
    for pairs in (16, len(tokens)):
        step = PeerStep(gpu_workloads.model_of(shape), tokens, pairs_a_forward=pairs)
        with counting(tokens.lengths, autocast=torch.bfloat16) as counts:
            step.after_forward = counts.forget_casts
            step(counts)
        row = Row(shape, f"sentence-transformers, {pairs} pairs a forward", counts.phases)
        rows.append(row)
        if host:  # in as many forwards
            small = gpu_workloads.model_of(shape, head_size=_SMALL)
            row.host = host_times(
                PeerStep(small, few, pairs_a_forward=len(few) * pairs // len(tokens))
            )
    return rows + peer_predict_rows(shape, host=host)


def peer_predict_rows(shape: str, *, host: bool = False) -> list[Row]:
    """sentence-transformers' predict in bf16, by its batch size, of which the fastest counts."""
    tokens = gpu_workloads.inference_pairs(gpu_workloads.config_of(shape).vocab_size)
    rows = []
    for size in PEER_BATCHES:
        scoring = PeerScoring(
            gpu_workloads.model_of(shape, torch.bfloat16), tokens, batch_size=size
        )
        rows.append(
            count(shape, f"sentence-transformers' predict, {size}", scoring, tokens.lengths)
        )
        if host:  # in as many forwards
            small = gpu_workloads.model_of(shape, torch.bfloat16, head_size=_SMALL)
            few = gpu_workloads.pairs_of(np.full(2 * math.ceil(len(tokens) / size), 3), 64)
            rows[-1].host = host_times(PeerScoring(small, few, batch_size=2))
    return rows


def limited(row: Row) -> dict[str, dict[str, int]]:
    """Of each phase what is limited."""
    return {
        name: {key: int(getattr(tally, key)) for key in LIMITED}
        for name, tally in row.phases.items()
    }


def read_limits() -> dict[str, Any]:
    return json.loads(LIMITS.read_text(encoding="utf-8"))


def beyond(rows: list[Row], limits: dict[str, Any]) -> list[str]:
    """What of the rows is above its limit, or has none."""
    found = []
    for row in rows:
        for phase, counts in limited(row).items():
            known = limits["limits"].get(row.shape, {}).get(row.what, {}).get(phase, {})
            for key, value in counts.items():
                if value > known.get(key, -1):
                    found.append(
                        f"{row.shape}, {row.what}, {phase}: {value:,} {key}, limit {known.get(key)}"
                    )
    return found


def wire(shape: str) -> list[int]:
    """Bytes of the messages that each of several processes sums in a step, in their order; the last
    one leaves when backward is done."""
    weights = list(gpu_workloads.model_of(shape).parameters())
    return GradientBuckets([(one, one) for one in weights]).bytes()


def wire_line(shape: str) -> str:
    sizes = wire(shape)
    return (
        f"Several processes: {len(sizes)} messages of {sum(sizes) / 1e6:.0f} MB in all, of which "
        f"{sum(sizes[:-1]) / 1e6:.0f} MB leave during backward."
    )


def versions() -> dict[str, str]:
    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def table(rows: list[Row]) -> str:
    """Markdown: a line for each row, and for each phase of the first of a shape."""
    cards = [card.name for card in CARDS]
    names = [
        "launches",
        "copies",
        "waits",
        "reads",
        "GB",
        "TFLOP",
        *(f"{one}, ms" for one in cards),
    ]
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        lines += [f"## {shape}", "", _line(["", *names, "host, ms", f"held by, {cards[0]}"])]
        lines.append(_line(["---", *["---:"] * (len(names) + 1), "---"]))
        for row in (one for one in rows if one.shape == shape):
            total = row.total()
            host = row.host_seconds()
            device = total.seconds(CARDS[0])
            holder = "" if host is None else "host" if host > device else "device"
            lines.append(_line([f"**{row.what}**", *_cells(total), _ms(host), holder]))
            for phase, tally in row.phases.items() if row.what.startswith("training") else ():
                lines.append(_line([phase, *_cells(tally), _ms(row.host_seconds(phase)), ""]))
        lines += ["", wire_line(shape), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def _cells(tally: Tally) -> list[str]:
    counts = [str(one) for one in (tally.launches, tally.uploads, tally.waits, tally.reads)]
    times = [_ms(tally.seconds(card)) for card in CARDS]
    return [*counts, f"{tally.bytes / 1e9:.2f}", f"{tally.flops / 1e12:.2f}", *times]


def introduction() -> str:
    cards = "; ".join(
        f"{card.name} {card.bytes_per_second / 1e12:.2f} TB/s x {card.memory_share}, "
        f"{card.narrow_flops / 1e12:.0f} TFLOP/s x {card.product_share}"
        for card in CARDS
    )
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""# A GPU's step, modelled on meta tensors

Made by `python -m benchmarks.tools.gpu_model` ({made}; host: {platform.machine()}). Nothing here
ran on a GPU.

- Training: 104 pairs of 40 to 180 tokens in 16 lists, fp32 weights, products in bf16, all pairs in
  one forward; inference: 1,000 pairs of some 91 tokens. sentence-transformers: its model's forward
  and backward alone of the 104 pairs, without its loss, clipping and optimizer.
- Launches: kernels, views aside. Copies: from host to device. Waits: copies that the host waits
  for. Reads: values that the host asks the device for. GB: all operands. TFLOP: products and
  attention.
- Device: each operation takes the larger of its bytes and its arithmetic, and
  {1e6 * gpu_counts.LEAST_SECONDS:g} microseconds a kernel at least. {cards}.
- Host: processor time of one thread here for the same layers with next to nothing in their tensors
  on a GPU's path, whose own kernels are not launched,
  and {1e6 * LAUNCH_SECONDS:g} microseconds of a driver a launch, {1e6 * TRITON_SECONDS:g} more for
  one of Triton's. It counts the loss to the forward pass.
- CUDA graphs: the second call of a bucket, of all words and tokens; a replay is one launch of the
  host's and {1e6 * NODE_SECONDS:g} microseconds for each of its kernels, which is an assumption.
  The device takes for each of them what it takes outside of a graph.
"""


def main() -> None:
    parser = make_parser(__name__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="directory of table and JSON"
    )
    parser.add_argument(
        "--renew_limits", action="store_true", help=f"write {LIMITS.name} and nothing else"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.renew_limits:
        limits: dict[str, Any] = {"versions": versions(), "limits": {}}
        for shape in SHAPES:
            limits["limits"][shape] = {row.what: limited(row) for row in our_rows(shape)}
        LIMITS.write_text(json.dumps(limits, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {LIMITS}")
        return
    rows = []
    for shape in options.shapes:
        rows += [*our_rows(shape, host=True), *peer_rows(shape, host=True)]
        print(table([row for row in rows if row.shape == shape]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    text = "\n".join([introduction(), table(rows), *gpu_attention.table()])
    (options.output / "gpu_model.md").write_text(text, encoding="utf-8")
    content = {
        "versions": versions(),
        "cards": [asdict(card) for card in CARDS],
        "least_kernel_seconds": gpu_counts.LEAST_SECONDS,
        "launch_seconds": LAUNCH_SECONDS,
        "rows": [row.as_json() for row in rows],
        "message_bytes": {shape: wire(shape) for shape in options.shapes},
    }
    (options.output / "gpu_model.json").write_text(
        json.dumps(content, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
