"""LambdaLoss alone, in any PyTorch model: here a linear ranker over features, no text at all."""

import torch

from rerank_fast import lambda_loss, ndcg

torch.manual_seed(12)
sizes = torch.randint(8, 40, (64,))  # 64 lists of 8 to 39 documents
offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])  # (Q + 1,)
features = torch.randn(int(offsets[-1]), 8)  # (N, 8), list after list: no padding, no mask
hidden = features @ torch.randn(8) + 0.2 * torch.randn(len(features))
labels = torch.bucketize(hidden, hidden.quantile(torch.tensor([0.6, 0.9])))  # graded, 0 to 2

ranker = torch.nn.Linear(8, 1)
optimizer = torch.optim.Adam(ranker.parameters(), lr=0.05)
for step in range(60):
    scores = ranker(features).squeeze(-1)  # (N,)
    loss = lambda_loss(scores, labels, offsets, scheme="ndcg2pp", k=10)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == 59:
        quality = ndcg(scores, labels, offsets, k=10).mean()
        print(f"step {step:2}  loss {loss.item():7.4f}  ndcg@10 {quality.item():.4f}")
