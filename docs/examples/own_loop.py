"""A training loop of one's own: packed pairs, LambdaLoss, PyTorch's optimizer and schedule.

python own_loop.py train.jsonl [MODEL]
"""

import random
import sys

import torch

from rerank_fast import CrossEncoder, lambda_loss, ndcg, score
from rerank_fast.data import load_lists, tokenize_lists

BATCH, LEARNING_RATE = 16, 2e-5

rows = list(load_lists(sys.argv[1]))
model = CrossEncoder(sys.argv[2] if len(sys.argv) > 2 else "microsoft/MiniLM-L12-H384-uncased")
random.Random(12).shuffle(rows)
steps = -(-len(rows) // BATCH)
optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
warmup = max(1, steps // 10)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
)

model.train()
for step in range(steps):
    lists = tokenize_lists(rows[step * BATCH : (step + 1) * BATCH], model)
    scores = score(model.prepare(lists.pairs))  # (N,) fp32, all documents, list after list
    labels = torch.from_numpy(lists.labels).to(scores.device)
    offsets = torch.from_numpy(lists.list_offsets).to(scores.device)
    loss = lambda_loss(scores, labels, offsets, scheme="ndcg2pp")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    quality = ndcg(scores, labels, offsets, k=10).mean()  # before the step; needs no evaluator
    print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  ndcg@10 {quality.item():.4f}")

model.eval().save_pretrained("my-reranker", overwrite=True)
