"""What a step asks of a GPU stays within the limits beside its model: launches, waits, bytes."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tools import gpu_attention, gpu_model, gpu_stand_ins, gpu_workloads
from benchmarks.tools.gpu_counts import counting, multi_tensor_launches
from benchmarks.tools.gpu_rows import LAUNCH_SECONDS, NODE_SECONDS, Row
from benchmarks.tools.gpu_workloads import SHAPES
from rerank_fast.ops.registry import HAS_TRITON

rows_of = functools.cache(gpu_model.our_rows)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="what a GPU runs is Triton's")


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_asks_for_more(shape: str):
    limits = gpu_model.read_limits()
    above = gpu_model.beyond(rows_of(shape), limits)
    made = limits["versions"]
    assert not above, "\n".join(
        [
            *above,
            f"the limits are of {made}, this is {gpu_model.versions()}; renew them: "
            f"{gpu_model.RENEW}",
        ]
    )


@needs_triton
@pytest.mark.parametrize("kind", gpu_model.LIMITED)
def test_one_more_is_too_many(kind: str):
    rows = rows_of("MiniLM-L6")
    limits = {"limits": {"MiniLM-L6": {row.what: gpu_model.limited(row) for row in rows}}}
    assert gpu_model.beyond(rows, limits) == []
    fewer = copy.deepcopy(limits)
    fewer["limits"]["MiniLM-L6"]["training, cached"]["backward"][kind] -= 1
    (line,) = gpu_model.beyond(rows, fewer)
    assert line.startswith("MiniLM-L6, training, cached, backward: ")
    assert kind in line
    del fewer["limits"]["MiniLM-L6"]["training, cached"]["backward"]
    assert len(gpu_model.beyond(rows, fewer)) == len(gpu_model.LIMITED)


@needs_triton
def test_the_hosts_time_is_of_a_gpus_path():
    called = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    reranker = gpu_workloads.reranker_of("MiniLM-L6", head_size=2)
    lists = gpu_workloads.training_lists(64, small=True)
    run = gpu_workloads.Training(reranker, lists, "off")
    with gpu_stand_ins.stubbed_kernels(), Seen():
        run(gpu_workloads.HostClock())
    assert "rerank_fast.attention_grads.default" in called
    assert not [name for name in called if name.startswith(("mkldnn.", "aten.mkldnn"))]


def test_views_and_allocations_are_no_launches():
    with counting(np.ones(1, np.int64)) as counts:
        counts.begin("all")
        x = torch.empty(6, 4, device="meta")
        x.view(4, 6).t().unbind(1)
        x.split(2)
        x + 1
    tally = counts.phases["all"]
    assert tally.by_name() == {"add": 1}
    assert tally.bytes == 2 * 6 * 4 * 4


def test_a_replay_is_one_launch_and_takes_the_device_as_long_as_its_kernels():
    x = torch.empty(6, 4, device="meta")
    with counting(np.ones(1, np.int64)) as counts:
        counts.begin("eager")
        x + 1
        x.sum(0)
        counts.begin("replayed")
        with counts.capturing() as captured:
            x + 1
            x.sum(0)
        assert not counts.tally.operations
        counts.replay(captured)
        x - 1
        with pytest.raises(ValueError, match="launches alone in a graph"), counts.capturing():
            torch.ones(3).to("meta")
    eager, replayed = counts.phases["eager"], counts.phases["replayed"]
    assert (eager.launches, replayed.launches, replayed.replays) == (2, 2, [2])
    assert replayed.by_name() == {"replay of a graph": 1, "sub": 1}
    card = gpu_model.CARDS[0]
    assert replayed.seconds(card) == pytest.approx(1.5 * eager.seconds(card))
    row = Row("shape", "what", {"replayed": replayed}, {"replayed": 1.0})
    driver = 2 * LAUNCH_SECONDS + 2 * NODE_SECONDS
    assert row.host_seconds() == pytest.approx(1 + driver)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_step_launches_little(shape: str):
    eager, graphs = (
        next(row for row in rows_of(shape) if row.what == what)
        for what in ("training, direct", "training, CUDA graphs")
    )
    for phase, most in (("forward", 10), ("backward", 20)):
        (kernels,) = graphs.phases[phase].replays
        assert 0.9 < kernels / eager.phases[phase].launches < 1.1
        assert graphs.phases[phase].launches <= most
    assert graphs.total().syncs == 0
    # Buckets are a sixteenth larger at most.
    assert graphs.total().flops < 1.07 * eager.total().flops


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_few_pairs_are_scored_in_few_launches(shape: str):
    eager, graphs = rows_of(shape)[-2:]
    assert graphs.what == f"{eager.what}, CUDA graphs"
    (kernels,) = graphs.total().replays
    assert 0.9 < kernels / eager.total().launches < 1.1
    copies = graphs.total().by_name().get("_foreach_copy_", 0)  # of weights that lie side by side
    assert graphs.total().launches - copies < 12
    assert graphs.total().syncs == 0
    # Buckets are a quarter larger at most.
    assert graphs.total().flops < 1.26 * eager.total().flops


def test_copies_and_reads_are_waits_unless_pinned():
    values = torch.ones(10)
    with counting(np.ones(1, np.int64)) as counts:
        counts.begin("uploads")
        pageable = values.to("meta")
        values.to("meta", non_blocking=True)
        counts.begin("reads")
        assert not pageable.sum() > 0
        assert pageable.cpu().tolist() == [0.0] * 10
    uploads, reads = counts.phases["uploads"], counts.phases["reads"]
    assert (uploads.uploads, uploads.uploaded_bytes, uploads.waits, uploads.launches) == (
        2,
        80,
        1,
        0,
    )
    assert (reads.waits, reads.reads, reads.syncs) == (1, 1, 2)


def test_arithmetic_and_bytes_of_products():
    with counting(np.ones(1, np.int64)) as counts, torch.inference_mode():
        counts.begin("product")
        x = torch.empty(8, 4, device="meta", dtype=torch.bfloat16)
        weight = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
        torch.nn.functional.linear(x, weight, torch.empty(3, device="meta", dtype=torch.bfloat16))
        counts.begin("wide")
        torch.mm(x, weight.t(), out_dtype=torch.float32)
        counts.begin("expanded")
        torch.empty(1, 5, device="meta").expand(100, 5).contiguous()
    product = counts.phases["product"]
    assert (product.launches, product.flops) == (1, 2 * 8 * 4 * 3)
    assert product.bytes == 2 * (8 * 4 + 3 * 4 + 3 + 8 * 3)
    assert counts.phases["wide"].bytes == 2 * (8 * 4 + 3 * 4) + 4 * 8 * 3
    assert counts.phases["expanded"].bytes == 4 * (5 + 500)


def test_attention_is_counted_by_its_lengths():
    from rerank_fast.ops.varlen_attention import varlen_attention

    lengths = np.array([2, 6])
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    q, k, v = (torch.empty(8, 2, 4, device="meta", requires_grad=True) for _ in range(3))
    with counting(lengths) as counts:
        counts.begin("forward")
        out = varlen_attention(q, k, v, ends, ends)
        counts.begin("backward")
        out.sum().backward()
        counts.begin("causal")
        varlen_attention(q, k, v, ends, ends, causal=True)
        counts.begin("window")
        varlen_attention(q, k, v, ends, ends, window=(1, 1))
    pairs = 2 * 2 + 6 * 6
    assert counts.phases["forward"].flops == 4 * 2 * 4 * pairs
    assert counts.phases["backward"].flops == 14 * 2 * 4 * pairs
    assert counts.phases["causal"].flops == pytest.approx(4 * 2 * 4 * (pairs + 8) / 2)
    assert counts.phases["window"].flops == 4 * 2 * 4 * (2 * 2 + 6 * 3)


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([100] * 110, 1, 1),
        ([100] * 111, 1, 2),
        ([320 * 65536], 2, 1),
        ([320 * 65536 + 1], 2, 2),
        ([0, 0], 4, 0),
        ([1] * 72, 4, 2),
    ],
)
def test_launches_of_many_tensors(sizes: list[int], lists: int, launches: int):
    assert multi_tensor_launches(sizes, lists) == launches


@needs_triton
def test_attention_beside_its_rivals():
    heads = gpu_attention.Heads.of("Qwen3-0.6B")
    assert (heads.queries, heads.keys, heads.size) == (16, 8, 128)
    pairs = 16 * 128 * int((heads.lengths**2).sum())
    found = {name: run(heads) for name, run in gpu_attention.BACKENDS.items()}
    ours, flash, padded = found.values()
    assert ours["forward"].flops == flash["forward"].flops == 4 * pairs
    assert ours["forward"].bytes == pytest.approx(flash["forward"].bytes, rel=0.01)
    assert [one["backward"].launches for one in found.values()][:2] == [2, 3]
    assert padded["forward"].flops == 4 * 16 * 128 * len(heads.lengths) * heads.lengths.max() ** 2
    lines = gpu_attention.table()
    assert sum(line.startswith("| MiniLM-L12 | ") for line in lines) == len(found)


@needs_triton
def test_their_predict_is_padded_and_of_every_pair():
    ours = next(row for row in rows_of("MiniLM-L6") if row.what.startswith("predict")).total()
    rows = gpu_model.peer_predict_rows("MiniLM-L6")
    assert len(rows) == len(gpu_model.PEER_BATCHES)
    for row, size in zip(rows, gpu_model.PEER_BATCHES, strict=True):
        total = row.total()
        assert total.flops > ours.flops
        assert total.uploads == 2 * math.ceil(1000 / size)  # ids and mask of each forward


def test_the_wire_carries_every_gradient_once_and_most_of_it_during_backward():
    sizes = gpu_model.wire("MiniLM-L12")
    weights = gpu_model.gpu_workloads.model_of("MiniLM-L12").parameters()
    assert sum(sizes) == 4 * sum(one.numel() for one in weights)
    assert len(sizes) > 2
    line = gpu_model.wire_line("MiniLM-L12")
    assert line.startswith(f"Several processes: {len(sizes)} messages of 133 MB in all, of which ")
