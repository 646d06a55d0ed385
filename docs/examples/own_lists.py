"""Your own lists: written as JSON lines, checked, trained on, and the model asked once.

python own_lists.py [MODEL]
"""

import json
import sys
from pathlib import Path

from rerank_fast import CrossEncoder, Trainer, TrainingConfig
from rerank_fast.data import hold_out, load_lists

# From wherever you have them: a query, its candidates, and a label for each of these.
judged = [
    ("how many people live in berlin", "Berlin had 3.5 million people in 2019.", 1),
    ("how many people live in berlin", "Berlin is well known for its museums.", 0),
    ("what do pandas eat", "A panda eats bamboo all day long.", 1),
    ("what do pandas eat", "The panda is a kind of bear.", 0),
    ("capital of france", "Paris is the capital and largest city of France.", 2),
    ("capital of france", "France has many cities.", 1),
    ("capital of france", "The sea is wet.", 0),
]
lists: dict[str, dict] = {}
for query, document, label in judged:
    row = lists.setdefault(query, {"query": query, "docs": [], "labels": []})
    row["docs"].append(document)
    row["labels"].append(label)
Path("lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists.values()))

# load_lists takes files, globs, folders, hub ids and a dozen layouts; errors name file and row.
train, evaluation = hold_out(load_lists("lists.jsonl"), 1, seed=12)
model = CrossEncoder(sys.argv[1] if len(sys.argv) > 1 else "microsoft/MiniLM-L12-H384-uncased")
config = TrainingConfig(output="my-reranker", num_epochs=3, batch_size=2, eval_steps=1)
result = Trainer(model, train, eval=evaluation, config=config).train()
print(f"NDCG@10 on {len(evaluation)} held-out list: {result.metrics['ndcg@10']:.4f}")

best, *_ = CrossEncoder("my-reranker").rank(
    "what do pandas eat", ["bamboo", "fish"], return_documents=True
)
print(best)
