"""Every setting of a training run; the defaults are the published MS MARCO recipe's."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from rerank_fast.ops.choices import BatchReduction, ReductionLog, Scheme
from rerank_fast.training.config_checks import check

# Those of transformers' names that need no metric.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Optimizer = Literal[
    "adamw",
    "adam",
    "nadam",
    "radam",
    "adamax",
    "adagrad",
    "adadelta",
    "rmsprop",
    "sgd",
    "adafactor",
]

# The settings that are options of LambdaLoss alone.
LAMBDA_LOSS = ("scheme", "k", "sigma", "mu", "eps", "reduction_log", "reduction")


@dataclass
class TrainingConfig:
    """Settings of a training run.

    Args:
        output: directory of the best model, its checkpoints and logs.
        overwrite: replace a model that output already holds.
        resume: "auto" goes on from the newest checkpoint in output, and begins anew where there is
            none, also over what a run left that was killed before its first one; or a checkpoint's
            path; or "never".
        resume_changed: go on also where settings or lists are others than the interrupted run's;
            the card tells the change. Where a run writes, what it logs, how a step is cut and the
            number of processes may differ without it; the order of the lists and which weights are
            trained may not differ at all.
        streaming: read the lists anew every epoch instead of holding them: for more than memory
            holds. Needs max_steps.
        shuffle_buffer: lists of a stream among which the next one is drawn.
        max_docs_per_list: most documents of a list; relevant ones are kept, the rest is drawn anew
            every epoch.
        batch_size: lists per optimizer step, over all processes. The loss is that of the whole
            batch, however it is cut.
        gradient_accumulation_steps: parts that each process's share of a batch is cut into, one
            after the other.
        gradient_cache: "on" keeps one micro-batch's graph at a time and scores twice: memory does
            not grow with the lists. "off" keeps all graphs. "auto" does that while they fit half of
            the free memory.
        skip_below: with the gradient cache, pairs whose |dL/dscore| is at most this are not run
            again: 0 skips only those that have no gradient. With k, a part's own share of pairs
            under the cut stands for the batch's.
        mini_batch_size: most pairs per forward pass; None leaves it to max_tokens_per_microbatch.
        max_tokens_per_microbatch: most tokens per forward pass, padding counted where there is any.
            None takes what fits a share of the device's free memory, up to what keeps it busy; a
            resumed run keeps the number.
        num_epochs: passes over the lists; a fraction stops inside one.
        max_steps: optimizer steps; above 0 it replaces num_epochs.
        max_length: longest pair in tokens; None keeps the model's.
        learning_rate: peak of the schedule.
        warmup_ratio: share of the steps in which the learning rate rises.
        warmup_steps: their number in its place; None takes the share.
        schedule: how the learning rate goes on after that, as transformers names it; constant has
            no warmup.
        schedule_options: of the schedule, as transformers.get_scheduler's
            scheduler_specific_kwargs: num_cycles, power, lr_end, min_lr, num_decay_steps ...
        optimizer: adamw, or another one of torch.optim.
        optimizer_options: further arguments of it, as {"momentum": 0.9} for sgd.
        adam_beta1: of the optimizers named after Adam: share of the gradient's average that a step
            keeps.
        adam_beta2: of those optimizers: share of the squared gradient's average that a step keeps.
        adam_epsilon: of those optimizers: added to the root of that average.
        weight_decay: of weight matrices; biases and norms are never decayed.
        layer_lr_decay: each layer learns this times as fast as the one above it; 1 is off.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        freeze_layers: the embeddings and this many first layers are not trained; 0 trains all.
        freeze: nor are parameters whose names match one of these patterns, as in *.LayerNorm.*.
        lora_rank: of LoRA adapters (PEFT), trained in place of the encoder's weights; 0 is off.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank.
        lora_dropout: of what goes into an adapter.
        lora_target_modules: names of the linear modules that get one; None takes all of the
            encoder.
        ema_decay: evaluate and save the moving average of the weights that keeps this share a step;
            0 is off.
        precision: fp32; bf16 or fp16 products with fp32 weights (fp16 with a loss scale, and a step
            that overflows is left out); or bf16-pure, bf16 weights with fp32 copies in the
            optimizer. The loss is fp32 in all. "auto" takes the mixed precision that `accelerate
            launch` was told (no is fp32); without it bf16 where the device multiplies that faster
            than fp32, as is measured on a CPU, and else fp32 (fp16 on a GPU). A resumed run keeps
            what it came to.
        sharding: "fsdp2" cuts weights, gradients and the optimizer's state into parts, one for each
            process; "none" gives every process all of them; "auto" does what `accelerate launch`
            was told. A callback that runs a model in parts does so in every process, inside `with
            trainer.trained.whole()`.
        gradient_checkpointing: recompute activations in backward: less memory, more time.
        torch_compile: run the layers of packed execution through torch.compile; the first steps
            build the kernels.
        cuda_graphs: experimental: capture what a step's layers launch, for numbers of tokens that
            are rounded up to few, and replay it; on one NVIDIA GPU, of families without relative
            positions. Memory: the gradients of all weights up to eight times.
        seed: of the order of the lists, the fresh head and dropout.
        objective: the loss by its name, or several that are added up: a list of {"name": ...,
            "weight": 1} with the options of each beside.
        objective_options: options of the objective by their names, as {"temperature": 2.0}; those
            of lambda_loss are the settings below, of several each has its own.
        in_batch_negatives: documents of other lists of the batch that are added to each list with
            label 0, drawn from the seed; none that is one of the list's own or of a list of its
            query. 0 adds none.
        scheme: LambdaLoss weighting.
        k: LambdaLoss cut: a pair counts where one of its documents is among the first k; None
            counts all pairs.
        sigma: LambdaLoss sigmoid slope.
        mu: share of NDCGLoss2 in ndcg2pp.
        eps: least ideal DCG.
        reduction_log: LambdaLoss logarithm.
        reduction: LambdaLoss mean: over the batch's pairs or its lists, or its sum.
        eval_on_start: measure the model also before the first step; that one is never taken for the
            best.
        eval_steps: steps between evaluations.
        save_steps: steps between checkpoints.
        save_total_limit: checkpoints kept, the newest.
        metric_for_best: the evaluation metric that chooses the saved model: any that an evaluator
            gives, after its name where it has one, as in NanoBEIR_R100_mean_ndcg@10; of evaluation
            lists map, mrr@K, ndcg@K or another measure of ir-measures, as R@100.
        load_best: after train() the model in memory is the one that was saved; False leaves the
            last one.
        early_stopping_patience: end after this many evaluations without a better one; None never
            does.
        stop_on_collapse: end the run, the best model kept, where it warns that scores no longer
            tell documents apart or that the model is measured as worse than what was there.
        logging_steps: steps between log lines.
        trackers: where the log goes beside train_log.jsonl: tensorboard, wandb, and others that
            Accelerate knows.
        distributed_timeout: seconds after which a process that waits for another one gives up.
        show_progress_bar: one bar with loss, learning rate and pairs/s.
    """

    output: str = "reranker"
    overwrite: bool = False
    resume: str = "never"
    resume_changed: bool = False
    streaming: bool = False
    shuffle_buffer: int = 10_000
    max_docs_per_list: int | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    gradient_cache: Literal["auto", "on", "off"] = "auto"
    skip_below: float = 0.0
    mini_batch_size: int | None = None
    max_tokens_per_microbatch: int | None = None
    num_epochs: float = 1.0
    max_steps: int = -1
    max_length: int | None = None
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.1
    warmup_steps: int | None = None
    schedule: Schedule = "linear"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = "adamw"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    layer_lr_decay: float = 1.0
    max_grad_norm: float = 1.0
    freeze_layers: int = 0
    freeze: list[str] = field(default_factory=list)
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    ema_decay: float = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16-pure"] = "auto"
    sharding: Literal["auto", "none", "fsdp2"] = "auto"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    cuda_graphs: bool = False
    seed: int = 12
    objective: list[dict[str, Any]] | str = "lambda_loss"
    objective_options: dict[str, Any] = field(default_factory=dict)
    in_batch_negatives: int = 0
    scheme: Scheme = "ndcg2pp"
    k: int | None = None
    sigma: float = 1.0
    mu: float = 10.0
    eps: float = 1e-10
    reduction_log: ReductionLog = "binary"
    reduction: BatchReduction = "pairs"
    eval_on_start: bool = True
    eval_steps: int = 500
    save_steps: int = 500
    save_total_limit: int = 2
    metric_for_best: str = "ndcg@10"
    load_best: bool = True
    early_stopping_patience: int | None = None
    stop_on_collapse: bool = False
    logging_steps: int = 10
    trackers: list[str] = field(default_factory=list)
    distributed_timeout: float = 600.0
    show_progress_bar: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value out of its range."""
        check(self)

    @property
    def at_k(self) -> int:
        """Cut of the evaluation's MRR and NDCG: metric_for_best's, else 10."""
        found = re.search(r"(?:^|_)(?:mrr|ndcg)@([1-9]\d*)$", self.metric_for_best)
        return int(found[1]) if found else 10
