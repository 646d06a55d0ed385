"""Every packed family beside itself padded: a training step and predict, tokens/s and peak memory.

    python -m benchmarks.steps.families --rows families.json     # all, in about 15 minutes
    python -m benchmarks.steps.families --size tiny --only BERT T5

Padded is transformers' own forward, as models of other families run here: sorted by length, in the
micro-batches of --padded_tokens that are fastest for it. All families have one shape for each size,
with random weights: tiny is 4 layers of width 256, base 12 of 768; pairs have MS MARCO's lengths.
A step is forward, LambdaLoss, backward and AdamW in the machine's fastest precision, predict fp32;
both are of tokens, and speeds count those of the pairs. A peak is of the resident set (VmHWM),
above what is resident before: weights, and of a step the optimizer's state.

Each family and size is a process of its own, and is written to the file of --rows at once: a run
that was interrupted goes on with the others. Nothing else should use the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arguments import add_rows, make_parser
from benchmarks.results import Row, Run
from benchmarks.steps.training_memory import resident
from benchmarks.timing import Interleaved
from benchmarks.workload import marco_like_lists
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.precision.hardware import fastest, name_of
from rerank_fast.model.preparation import Prepared, Preparer
from rerank_fast.model.scoring import score
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.ops.lambda_loss import lambda_loss

TABLE = "steps/families"
VOCABULARY = 30522
_FIRST_WORD = 1000  # above every token that a family has a meaning for


@dataclass(frozen=True)
class Size:
    """Of a model and of what it is measured with."""

    layers: int
    width: int
    heads: int
    num_lists: int  # of 3 to 10 pairs
    rounds: int


SIZES = {"tiny": Size(4, 256, 4, 8, 5), "base": Size(12, 768, 12, 2, 1)}
_TYPES: dict[str, Any] = {"type_vocab_size": 2}
_POSITIONS_FROM_2: dict[str, Any] = {**_TYPES, "pad_token_id": 1}
_RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
    "position_biased_input": False,
}
_GATED_T5: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_V3: dict[str, Any] = {"position_buckets": 256, "norm_rel_ebd": "layer_norm"}
# By the name of docs/families.md: the type that transformers knows it by, and what its config says
# beside the shape.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("bert", _TYPES),
    "RoBERTa": ("roberta", _POSITIONS_FROM_2),
    "XLM-RoBERTa": ("xlm-roberta", _POSITIONS_FROM_2),
    "CamemBERT": ("camembert", _POSITIONS_FROM_2),
    "Data2Vec": ("data2vec-text", _POSITIONS_FROM_2),
    "X-MOD": ("xmod", {**_POSITIONS_FROM_2, "default_language": "en_XX"}),
    "RoBERTa-PreLayerNorm": ("roberta-prelayernorm", _POSITIONS_FROM_2),
    "ELECTRA": ("electra", _TYPES),
    "DistilBERT": ("distilbert", {}),
    "MPNet": ("mpnet", {"pad_token_id": 1}),
    "DeBERTa-v2": ("deberta-v2", _RELATIVE),
    "DeBERTa-v3": ("deberta-v2", {**_RELATIVE, **_V3, "share_att_key": True}),
    "NomicBERT": ("nomic_bert", _TYPES),
    "GTE": ("gte", _TYPES),
    "Jina XLM-RoBERTa": ("jina_embeddings_v3", _TYPES),
    "ModernBERT": ("modernbert", {}),
    "EuroBERT": ("eurobert", {}),
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3 (text)": ("gemma3_text", {}),
    "T5 (monoT5)": ("t5", {}),
    "T5 1.1 (monoT5)": ("t5", _GATED_T5),
    "mT5": ("mt5", _GATED_T5),
}
# Which are executed as one above them is, and are measured in base size only if they are named.
ALIKE = ("XLM-RoBERTa", "CamemBERT", "Data2Vec", "Mistral", "mT5")
_ENCODER_DECODERS = ("t5", "mt5")
_SPECIAL: dict[str, Any] = {
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "mask_token_id": 4,
}


def make_model(family: str, size: Size) -> Any:
    """With random weights and a head of one label; of an encoder-decoder none."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    kind, own = FAMILIES[family]
    width, head = size.width, size.width // size.heads
    torch.manual_seed(0)
    if kind in _ENCODER_DECODERS:
        shape = {
            "d_model": width,
            "num_layers": size.layers,
            "num_decoder_layers": size.layers,
            "num_heads": size.heads,
            "d_kv": head,
            "d_ff": 4 * width,
            "decoder_start_token_id": 0,
        }
        config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **shape, **own)
        return AutoModelForSeq2SeqLM.from_config(config)
    shape = {
        "hidden_size": width,
        "embedding_size": width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": head,
        "intermediate_size": 4 * width,
    }
    if kind == "distilbert":
        shape = {"dim": width, "n_layers": size.layers, "n_heads": size.heads}
        shape["hidden_dim"] = 4 * width
    shape |= {"vocab_size": VOCABULARY, "max_position_embeddings": 514, "num_labels": 1}
    config = AutoConfig.for_model(kind, **_SPECIAL | {"pad_token_id": 0} | shape | own)
    return AutoModelForSequenceClassification.from_config(config)


def make_pairs(num_lists: int) -> tuple[TokenizedPairs, torch.Tensor, torch.Tensor]:
    """Pairs of random tokens, their labels, and the offsets of their lists."""
    lists = marco_like_lists(num_lists)
    words = [len(row["query"].split()) + len(text.split()) for row in lists for text in row["docs"]]
    ends = np.cumsum([0, *(count + 3 for count in words)])  # with the special tokens
    ids = np.random.default_rng(0).integers(_FIRST_WORD, VOCABULARY, ends[-1]).astype(np.int32)
    labels = torch.tensor([label for row in lists for label in row["labels"]])
    offsets = torch.tensor(np.cumsum([0, *(len(row["docs"]) for row in lists)]))
    return TokenizedPairs(ids, None, ends.astype(np.int64)), labels, offsets


@dataclass(frozen=True)
class _Padding:
    """What is asked of a tokenizer."""

    pad_token_id: int
    padding_side: str = "right"
    pad_token_type_id: int = 0


class Measured:
    """A family's model, and its step and predict packed and padded."""

    def __init__(self, family: str, size: Size) -> None:
        self.model = make_model(family, size)
        kind = FAMILIES[family][0]
        self.answers = Answers(5, 9) if kind in _ENCODER_DECODERS else None
        self.tokens, self.labels, self.offsets = make_pairs(size.num_lists)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)
        self.dtype = fastest(torch.device("cpu"))

    def preparer(self, dtype: torch.dtype, *, packed: bool) -> Callable[[TokenizedPairs], Prepared]:
        padding = _Padding(int(self.model.config.pad_token_id or 0))
        made = Preparer(
            self.model,
            padding,
            dtype=dtype,
            packed=packed,
            answers=self.answers,
            adds_gradients=packed,
        )
        if packed and made.architecture is None:
            raise ValueError(f"{type(self.model).__name__} is not packed")
        return made

    def step(
        self, *, packed: bool, max_tokens: int | None, dtype: torch.dtype
    ) -> Callable[[], None]:
        prepare = self.preparer(dtype, packed=packed)

        def run() -> None:
            self.model.train()
            scores = score(prepare(self.tokens), max_tokens=max_tokens)
            lambda_loss(scores, self.labels, self.offsets).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return run

    def predict(
        self, *, packed: bool, max_tokens: int | None, dtype: torch.dtype
    ) -> Callable[[], torch.Tensor]:
        prepare = self.preparer(dtype, packed=packed)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            self.model.eval()
            return score(prepare(self.tokens), max_tokens=max_tokens)

        return run


def measure(family: str, name: str, padded_tokens: Sequence[int]) -> list[Row]:
    """Of a family in a size; the process should have done nothing before."""
    size = SIZES[name]
    own = Measured(family, size)
    packed, padded = (
        own.predict(packed=one, max_tokens=None if one else padded_tokens[0], dtype=torch.float32)
        for one in (True, False)
    )
    torch.testing.assert_close(packed(), padded(), rtol=1e-3, atol=1e-3)
    lengths = own.tokens.lengths
    pairs = f"{len(lengths)} pairs of {lengths.min()}-{lengths.mean():.0f}-{lengths.max()} tokens"
    rows = []
    for make, of, dtype in ((own.step, "step", own.dtype), (own.predict, "predict", torch.float32)):
        ours = make(packed=True, max_tokens=None, dtype=dtype)
        ours()
        peers, firsts, excuse = _padded(make, dtype, padded_tokens)
        best = min(range(len(peers)), key=lambda at: firsts[at].seconds)
        peak, peer_peak = _first(ours).peak, firsts[best].peak
        seconds = Interleaved({"ours": ours, "peer": peers[best]}).run(size.rounds)
        case, tokens = f"{family}, {name}: {of}", int(lengths.sum())
        speeds = tokens / seconds["ours"], tokens / seconds["peer"]
        remark = f"{pairs} in {name_of(dtype)}; padded in micro-batches of {padded_tokens[best]}"
        remark += f"; {excuse}" if excuse else ""
        rows.append(Row(TABLE, case, speeds[1], speeds[0], "tokens/s", remark))
        rows.append(Row(TABLE, f"{case}, peak", peer_peak, peak, "B"))
    return rows


@dataclass(frozen=True)
class _First:
    seconds: float
    peak: int  # bytes above what was resident


def _padded(
    make: Callable[..., Callable[[], object]], dtype: torch.dtype, padded_tokens: Sequence[int]
) -> tuple[list[Callable[[], object]], list[_First], str]:
    """For each number of tokens what runs padded and its first run; and what is to be said of them
    where transformers' model fails in the dtype, and they are in fp32.
    """
    peers = [make(packed=False, max_tokens=tokens, dtype=dtype) for tokens in padded_tokens]
    try:
        return peers, [_first(peer) for peer in peers], ""
    except RuntimeError as error:
        if dtype == torch.float32:
            raise
        print(f"Padded in {name_of(dtype)}: {error}", file=sys.stderr)
    wide, firsts, _ = _padded(make, torch.float32, padded_tokens)
    return wide, firsts, f"padded in float32: it fails in {name_of(dtype)}"


def _first(run: Callable[[], object]) -> _First:
    """A run that begins with nothing freed that the C library keeps."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, started = resident("VmRSS"), time.perf_counter()
    run()
    return _First(time.perf_counter() - started, max(resident("VmHWM") - before, 1))


def in_a_process(family: str, size: str, padded_tokens: Sequence[int]) -> list[Row]:
    """Its rows."""
    case = json.dumps([family, size, *padded_tokens])
    command = [sys.executable, "-m", "benchmarks.steps.families", "--case", case]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**row) for row in json.loads(done.stdout.strip().splitlines()[-1])]


def chosen(sizes: Sequence[str], only: Sequence[str] | None) -> list[tuple[str, str]]:
    """Families and sizes to measure."""
    return [
        (family, size)
        for size in sizes
        for family in FAMILIES
        if (family in only if only else size != "base" or family not in ALIKE)
    ]


def main() -> None:
    parser = make_parser(__name__)
    add_rows(parser)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY", help="these alone")
    tokens = "of a padded micro-batch; the fastest of them counts"
    parser.add_argument("--padded_tokens", nargs="+", type=int, default=[1024, 4096], help=tokens)
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        family, size, *padded_tokens = json.loads(options.case)
        print(json.dumps([vars(row) for row in measure(family, size, padded_tokens)]))
        return
    file: Path | None = options.rows
    rows = Run.read(file).rows if file is not None and file.is_file() else []
    measured = {row.case.partition(": ")[0] for row in rows}
    failed: list[str] = []
    for family, size in chosen(options.size, options.only):
        if f"{family}, {size}" in measured:
            continue
        try:
            found = in_a_process(family, size, options.padded_tokens)
        except subprocess.CalledProcessError as error:  # it has said why
            failed.append(f"{family}, {size} ({error.returncode})")
            continue
        rows += found
        Run.of_script(file, "benchmarks.steps.families", rows)
        print("\n".join(Run.here("", found).table()[1:]), flush=True)
    if failed:
        raise SystemExit(f"Not measured, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
