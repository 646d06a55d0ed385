"""What each objective says of one list, term by term in plain Python: (the sum, its units)."""

from __future__ import annotations

import math


def log_softmax(values):
    highest = max(values)
    log_sum = highest + math.log(sum(math.exp(v - highest) for v in values))
    return [v - log_sum for v in values]


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def per_document(terms, options):
    if options.reduction == "documents":
        return sum(terms), len(terms)
    return sum(terms) / max(len(terms), 1), 1


def mse(s, y, options):
    return per_document([(a - b) ** 2 for a, b in zip(s, y, strict=True)], options)


def binary_cross_entropy(s, y, options):
    w = options.pos_weight
    terms = [w * b * softplus(-a) + (1 - b) * softplus(a) for a, b in zip(s, y, strict=True)]
    return per_document(terms, options)


def margin_mse(s, t, options):
    n = len(s)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if options.pairs == "all" or i == 0]
    terms = [((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i, j in pairs]
    if options.reduction == "pairs":
        return sum(terms), len(terms)
    return sum(terms) / max(len(terms), 1), 1


def ranknet(s, y, options):
    n = len(s)
    rank = {i: r for r, i in enumerate(sorted(range(n), key=lambda i: -s[i]), start=1)}
    k = options.k or n
    pairs = [(i, j) for i in range(n) for j in range(n) if y[i] > y[j]]
    pairs = [(i, j) for i, j in pairs if min(rank[i], rank[j]) <= k]
    scale = 1 / math.log(2) if options.reduction_log == "binary" else 1.0
    total = sum(scale * softplus(-options.sigma * (s[i] - s[j])) for i, j in pairs)
    return total, len(pairs) if options.reduction == "pairs" else 1


def listnet(s, y, options):
    if not s:
        return 0.0, 1
    log_q = log_softmax([v / options.temperature for v in s])
    log_p = log_softmax([v / options.label_temperature for v in y])
    entropy = -sum(math.exp(p) * p for p in log_p)
    cross = -sum(math.exp(p) * q for p, q in zip(log_p, log_q, strict=True))
    return cross - (entropy if options.kl else 0.0), 1


def listmle(s, y, options, weights=None):
    n = len(s)
    order = list(range(n)) if options.respect_input_order else sorted(range(n), key=lambda i: -y[i])
    weights = weights or [1.0] * n
    return sum(-weights[r] * log_softmax([s[i] for i in order[r:]])[0] for r in range(n)), 1


def plistmle(s, y, options):
    n = len(s)
    weights = [2.0 ** (n - r) - 1 for r in range(1, n + 1)]
    return listmle(s, y, options, [w / max(sum(weights), 1) for w in weights])


def infonce(s, y, options):
    z = [v / options.temperature for v in s]
    positives = [a for a, b in zip(z, y, strict=True) if b > 0]
    negatives = [a for a, b in zip(z, y, strict=True) if b <= 0]
    if not positives or not negatives:
        return 0.0, 1
    if options.positives == "any":
        everything = sum(math.exp(v) for v in z)
        return -math.log(sum(math.exp(v) for v in positives) / everything), 1
    behind = sum(math.exp(v) for v in negatives)
    terms = [-math.log(math.exp(v) / (math.exp(v) + behind)) for v in positives]
    return sum(terms) / len(terms), 1


def soft_ranks(s, alpha):
    return [1 + sum(sigmoid(alpha * (b - a)) for b in s) - 0.5 for a in s]


def adr_mse(s, y, options):
    wanted = [sum(b > a for b in y) + (sum(b == a for b in y) + 1) / 2 for a in y]
    found = soft_ranks(s, options.alpha)
    terms = [(w - f) ** 2 / math.log2(1 + w) for w, f in zip(wanted, found, strict=True)]
    return per_document(terms, options)


def approx_ndcg(s, y, options):
    gains = [2 ** max(b, 0) - 1 for b in y]
    ideal = sum(g / math.log2(1 + r) for r, g in enumerate(sorted(gains, reverse=True), start=1))
    if not ideal:
        return 0.0, 1
    ranks = soft_ranks(s, options.alpha)
    found = sum(g / math.log2(1 + r) for g, r in zip(gains, ranks, strict=True))
    return 1 - found / ideal, 1
