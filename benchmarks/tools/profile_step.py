"""Where one training step's time goes, or predict's, this package's and sentence-transformers'.

    python -m benchmarks.tools.profile_step --only ours
    python -m benchmarks.tools.profile_step --model ettin-17m --predict

The step is that of steps/test_training_step.py, predict scores --pairs in fp32 on both sides; times
are self times on the CPU, grouped by what the operators are for.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pkgutil
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.arguments import make_parser
from benchmarks.steps.test_deberta import make_deberta
from benchmarks.steps.test_modular import SHAPES, make_ettin
from benchmarks.steps.test_predict import make_pairs, our_predict, peer_predict
from benchmarks.steps.training import make_peer_step, make_step
from benchmarks.workload import marco_like_lists
from rerank_fast.demo import encoder_directory
from rerank_fast.ops import cpu

# Each given an empty directory that it may write itself to.
MODELS: dict[str, Callable[[Path], str]] = {
    "minilm-l6": lambda directory: encoder_directory(),
    **{name: functools.partial(make_ettin, name) for name in SHAPES},
    "deberta-v3-base": make_deberta,
}

# What an operator's name begins with, or holds, and what it is for.
_GROUPS = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::linear",
        "aten::mkldnn_linear",
        "aten::bmm",
        "mkldnn::",
    ),
    "attention": (
        "rerank_fast::varlen_attention",
        "rerank_fast::relative_attention",
        "aten::_scaled_dot_product",
        "aten::_efficient",
        "aten::_flash",
    ),
    "dropout, residual, norm": (
        "rerank_fast::residual_norm",
        "rerank_fast::add_norm",
        "aten::native_layer_norm",
        "aten::bernoulli",
        "aten::native_dropout",
    ),
    "activation": ("aten::gelu", "aten::tanh", "rerank_fast::gated"),
    "rotation": ("rerank_fast::rotary",),
    "rows of int8": tuple(
        f"rerank_fast::{name}_rows" for name in ("quantize", "scale", "gelu", "norm")
    ),
    "score head": ("rerank_fast::score_head",),
    "embeddings": ("aten::embedding", "aten::index_select", "aten::index"),
    "optimizer, clipping": (
        "aten::_fused_adam",
        "aten::linalg_vector_norm",
        "aten::_foreach",
        "Optimizer",
    ),
    "casts and copies": (
        "aten::copy_",
        "aten::_to_copy",
        "aten::cat",
        "aten::clone",
        "aten::contiguous",
        "rerank_fast::transposed",
    ),
    "sums, fills, pointwise": (
        "aten::add",
        "aten::mul",
        "aten::sum",
        "aten::fill_",
        "aten::zero_",
        "aten::div",
        "rerank_fast::column_sums",
    ),
    "loss": ("rerank_fast::lambda_loss", "rerank_fast::ndcg", "rerank_fast::approx_ranks"),
}
# What functions of the rooms of ops/cpu that are kernels are called.
_KERNEL = re.compile(
    r"\w+_(forward|backward|grads?|rows_?)|transposed|add_norm|rotary|gated|column_sums"
)


def group_of(name: str) -> str:
    for group, prefixes in _GROUPS.items():
        if name.startswith(prefixes):
            return group
    return "other"


def name_kernels() -> None:
    """Calls of the compiled kernels under their ops' names: a trained layer makes them without the
    dispatcher.
    """
    for room in pkgutil.iter_modules(cpu.__path__, f"{cpu.__name__}."):
        module = importlib.import_module(room.name)
        for name, kernel in list(vars(module).items()):
            if _KERNEL.fullmatch(name) and not name.startswith("_"):
                label = f"rerank_fast::{name.removesuffix('_forward')}"
                setattr(module, name, _named(label, kernel))


def _named(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return kernel(*arguments, **options)

    return call


def profile_step(name: str, step: Callable[[], object], *, steps: int, top: int) -> None:
    """Print the groups, then the operators that take longest, of a call of it."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(steps):
            step()
    events = [
        (e.key, e.self_cpu_time_total / steps / 1e3, e.count // steps) for e in run.key_averages()
    ]
    total = sum(time for _, time, _ in events)
    groups: dict[str, float] = defaultdict(float)
    for key, time, _ in events:
        groups[group_of(key)] += time
    print(f"\n{name}: {total:.0f} ms")
    for group, time in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"  {time:8.1f} ms {100 * time / total:5.1f} %  {group}")
    for key, time, count in sorted(events, key=lambda event: -event[1])[:top]:
        print(f"      {time:8.1f} ms {count:6d} calls  {key}")


def main() -> None:
    parser = make_parser(__name__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lists", type=int, default=16, help="of the step")
    parser.add_argument("--top", type=int, default=12, help="operators listed")
    parser.add_argument(
        "--mini_batch_size", type=int, default=16, help="of sentence-transformers' loss"
    )
    parser.add_argument("--only", choices=["ours", "peer"], default=None)
    parser.add_argument("--model", choices=MODELS, default="minilm-l6")
    parser.add_argument("--predict", action="store_true", help="no step, but predict")
    parser.add_argument("--pairs", type=int, default=200, help="of predict")
    options = parser.parse_args()
    name_kernels()
    with tempfile.TemporaryDirectory() as directory:
        model = MODELS[options.model](Path(directory) / "model")
        for name, run in calls(options, model, directory).items():
            profile_step(name, run, steps=options.steps, top=options.top)


def calls(options: argparse.Namespace, model: str, output: str) -> dict[str, Callable[[], object]]:
    """What is asked for of ours and the peer."""
    sides = [options.only] if options.only else ["ours", "peer"]
    made: dict[str, Callable[[], object]] = {}
    if options.predict:
        pairs = make_pairs(options.pairs)
        for side in sides:
            predict = our_predict if side == "ours" else peer_predict
            made[f"{side}, {len(pairs)} pairs"] = predict(model, "float32", pairs)
        return made
    lists = marco_like_lists(options.lists)
    if "ours" in sides:
        ours = make_step(lists, output, model=model)
        made[f"ours, {ours.describe}"] = ours.run
    if "peer" in sides:
        peer = make_peer_step(lists, mini_batch_size=options.mini_batch_size, model=model)
        made["peer"] = peer.run
    return made


if __name__ == "__main__":
    main()
