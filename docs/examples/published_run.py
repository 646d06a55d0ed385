"""The published MS MARCO run: MiniLM-L12 with LambdaLoss (NDCGLoss2++), every setting written out.

python published_run.py                          # microsoft/ms_marco and NanoBEIR from the hub
python published_run.py --ms_marco DIR --nano_beir DIR    # downloaded copies of both
python published_run.py --lists train.jsonl      # any lists instead; a tenth of them is held out
"""

import argparse

from rerank_fast import CrossEncoder, Trainer, TrainingConfig
from rerank_fast.data import hold_out, load_lists, load_ms_marco
from rerank_fast.evaluation import NanoBEIREvaluator

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="microsoft/MiniLM-L12-H384-uncased")
parser.add_argument("--ms_marco", default="microsoft/ms_marco", help="hub id or directory")
parser.add_argument(
    "--nano_beir", default="sentence-transformers/NanoBEIR-en", help="hub id or directory"
)
parser.add_argument("--lists", help="file, folder or hub id, in place of MS MARCO and NanoBEIR")
parser.add_argument("--output", default="reranker-msmarco-minilm-l12-lambdaloss")
arguments = parser.parse_args()

lists = load_lists(arguments.lists) if arguments.lists else load_ms_marco(arguments.ms_marco)
held_out = 1000 if not arguments.lists else max(1, len(lists) // 10)
train, evaluation = hold_out(lists, held_out, seed=12)  # no query is in both, however spelled
nano, best = None, "ndcg@10"
if not arguments.lists:
    nano = NanoBEIREvaluator(["msmarco", "nfcorpus", "nq"], arguments.nano_beir, rerank_k=100)
    best = nano.primary_metric

config = TrainingConfig(
    output=arguments.output,
    objective="lambda_loss",
    scheme="ndcg2pp",
    batch_size=16,  # lists per optimizer step
    num_epochs=1,
    learning_rate=2e-5,
    warmup_ratio=0.1,
    schedule="linear",
    precision="bf16",
    seed=12,
    eval_steps=500,
    metric_for_best=best,  # the model that is saved
)
model = CrossEncoder(arguments.model)
result = Trainer(model, train, eval=evaluation, evaluator=nano, config=config).train()
print(f"{result.output}: step {result.best_step} of {result.steps}")
for name, value in sorted(result.metrics.items()):
    print(f"{name:<40} {value:.4f}")
