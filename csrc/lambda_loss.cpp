#include "lambda_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

// One build serves every x86-64 processor: the loader picks a clone of the pair loop at run time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define RERANK_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RERANK_FAST_CLONES
#endif
#if defined(__GNUC__)
#define RERANK_FAST_INLINE inline __attribute__((always_inline))
#else
#define RERANK_FAST_INLINE inline
#endif

namespace rerank_fast {
namespace {

// log(1 + x) for x >= 0 given r = 1 / (1 + x): the rounding of 1 + x is put back as c * r, so small x keep their
// relative accuracy. The logarithm is exponent + polynomial (a Chebyshev fit of (log(1+f) - f + f*f/2) / f^3).
RERANK_FAST_INLINE float log1p_positive(float x, float r) {
  const float u = 1.0f + x;
  const float c = x < 1.0f ? x - (u - 1.0f) : 1.0f - (u - x);
  std::int32_t bits;
  std::memcpy(&bits, &u, sizeof bits);
  // Exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const std::int32_t exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float f = m - 1.0f;
  const float e = static_cast<float>(exponent);
  float p = 0.06980701959f;
  p = p * f - 0.1149454661f;
  p = p * f + 0.1168907114f;
  p = p * f - 0.1242403772f;
  p = p * f + 0.1424855126f;
  p = p * f - 0.1666785097f;
  p = p * f + 0.200007305f;
  p = p * f - 0.2499999663f;
  p = p * f + 0.3333333112f;
  const float ff = f * f;
  // ln 2 in two parts: the high one times an exponent is exact.
  const float low = ff * (f * p) - 0.5f * ff + e * -2.12194440e-4f + c * r;
  return (f + low) + e * 0.693359375f;
}

RERANK_FAST_INLINE double log1p_positive(double x, double) { return std::log1p(x); }

// exp of a score must neither overflow nor become subnormal, nor may the ratio of two.
template <typename T>
constexpr double kExponentLimit = sizeof(T) == 4 ? 80.0 : 600.0;

// A list's documents in descending order of label, one array a quantity, so that the documents below a label are a
// contiguous suffix and the pair loop reads memory in order.
template <typename T>
struct Documents {
  std::vector<T> score, gain, inverse_discount, exponential, pull;
  std::vector<std::int32_t> rank;
  std::vector<T> in_cut;
};

template <typename T>
struct Row {
  T loss, pull;
  T pairs;
};

// The pairs of one document i with the documents [begin, end): sums of loss and pull, and pull added to the others.
template <typename T, Scheme kScheme, bool kCut, bool kFast>
RERANK_FAST_INLINE Row<T> visit(const Documents<T>& documents, T* pull, const T* delta, std::int64_t i,
                                std::int64_t begin, std::int64_t end, T sigma, T mu) {
  const T* score = documents.score.data();
  const T* gain = documents.gain.data();
  const T* inverse = documents.inverse_discount.data();
  const T* exponential = documents.exponential.data();
  const T* in_cut = documents.in_cut.data();
  const std::int32_t* rank = documents.rank.data();
  const T s_i = score[i], g_i = gain[i], inverse_i = inverse[i], in_cut_i = in_cut[i];
  const T reciprocal_i = kFast ? T(1) / exponential[i] : T(0);
  const std::int32_t rank_i = rank[i];
  T loss = 0, row_pull = 0, pairs = 0;
#pragma omp simd reduction(+ : loss, row_pull, pairs)
  for (std::int64_t j = begin; j < end; ++j) {
    T probability, negative_log;  // sigmoid(-d) and -log sigmoid(d) of d = sigma * (s_i - s_j)
    if constexpr (kFast) {
      const T x = exponential[j] * reciprocal_i;  // exp(-d)
      const T r = T(1) / (T(1) + x);
      probability = x * r;
      negative_log = log1p_positive(x, r);
    } else {
      const T d = sigma * (s_i - score[j]);
      const T t = std::exp(-std::fabs(d));
      probability = (d >= 0 ? t : T(1)) / (T(1) + t);
      probability = d != d ? d : probability;
      negative_log = (d < 0 ? -d : T(0)) + std::log1p(t);
    }
    T weight;
    if constexpr (kScheme == Scheme::kNone) {
      weight = T(1);
    } else if constexpr (kScheme == Scheme::kNdcg1) {
      weight = g_i * inverse_i;
    } else {
      const T difference = std::fabs(g_i - gain[j]);
      const T swap = std::fabs(inverse_i - inverse[j]);
      if constexpr (kScheme == Scheme::kLambdaRank) {
        weight = swap * difference;
      } else {
        const std::int32_t distance = rank_i - rank[j];
        const T by_distance = delta[distance < 0 ? -distance : distance];
        weight = (kScheme == Scheme::kNdcg2 ? by_distance : mu * by_distance + swap) * difference;
      }
    }
    if constexpr (kCut) {
      const bool counts = in_cut_i + in_cut[j] > T(0);
      // A pair outside the cut contributes nothing, not even a NaN.
      weight = counts ? weight : T(0);
      probability = counts ? probability : T(0);
      negative_log = counts ? negative_log : T(0);
      pairs += counts ? T(1) : T(0);
    }
    const T pulled = weight * probability;
    loss += weight * negative_log;
    row_pull += pulled;
    pull[j] -= pulled;
  }
  if constexpr (!kCut) pairs = static_cast<T>(end - begin);
  return {loss, row_pull, pairs};
}

template <typename T, Scheme kScheme, bool kCut, bool kFast>
RERANK_FAST_INLINE void visit_all(Documents<T>& documents, const T* sorted_labels, const T* delta, std::int64_t size,
                                  T sigma, T mu, double* loss, std::int64_t* pairs) {
  T* pull = documents.pull.data();
  double loss_sum = 0;
  std::int64_t pair_sum = 0;
  std::int64_t below = 0;  // first document with a lower label than i's
  for (std::int64_t i = 0; i < size; ++i) {
    std::int64_t begin = 0;
    if constexpr (kScheme != Scheme::kNdcg1) {
      while (below < size && sorted_labels[below] >= sorted_labels[i]) ++below;
      if (below == size) break;
      begin = below;
    }
    const Row<T> row = visit<T, kScheme, kCut, kFast>(documents, pull, delta, i, begin, size, sigma, mu);
    pull[i] += row.pull;
    loss_sum += row.loss;
    pair_sum += static_cast<std::int64_t>(row.pairs);
  }
  *loss = loss_sum;
  *pairs = pair_sum;
}

#define RERANK_FAST_PAIR_LOOP(NAME, T, SCHEME)                                                                       \
  RERANK_FAST_CLONES void NAME(Documents<T>& documents, const T* sorted_labels, const T* delta, std::int64_t size,   \
                               bool cut, bool fast, T sigma, T mu, double* loss, std::int64_t* pairs) {              \
    if (cut) {                                                                                                       \
      fast ? visit_all<T, SCHEME, true, true>(documents, sorted_labels, delta, size, sigma, mu, loss, pairs)         \
           : visit_all<T, SCHEME, true, false>(documents, sorted_labels, delta, size, sigma, mu, loss, pairs);       \
    } else {                                                                                                         \
      fast ? visit_all<T, SCHEME, false, true>(documents, sorted_labels, delta, size, sigma, mu, loss, pairs)        \
           : visit_all<T, SCHEME, false, false>(documents, sorted_labels, delta, size, sigma, mu, loss, pairs);      \
    }                                                                                                                \
  }
// Clones exist for plain functions only, hence a function for each type and scheme rather than a template.
#define RERANK_FAST_PAIR_LOOPS(T)                                        \
  RERANK_FAST_PAIR_LOOP(pairs_none_##T, T, Scheme::kNone)               \
  RERANK_FAST_PAIR_LOOP(pairs_ndcg1_##T, T, Scheme::kNdcg1)             \
  RERANK_FAST_PAIR_LOOP(pairs_ndcg2_##T, T, Scheme::kNdcg2)             \
  RERANK_FAST_PAIR_LOOP(pairs_lambdarank_##T, T, Scheme::kLambdaRank)   \
  RERANK_FAST_PAIR_LOOP(pairs_ndcg2pp_##T, T, Scheme::kNdcg2pp)         \
  void pair_loop(Scheme scheme, Documents<T>& documents, const T* sorted_labels, const T* delta,                     \
                 std::int64_t size, bool cut, bool fast, T sigma, T mu, double* loss, std::int64_t* pairs) {         \
    switch (scheme) {                                                                                                \
      case Scheme::kNone:                                                                                            \
        return pairs_none_##T(documents, sorted_labels, delta, size, cut, fast, sigma, mu, loss, pairs);             \
      case Scheme::kNdcg1:                                                                                           \
        return pairs_ndcg1_##T(documents, sorted_labels, delta, size, cut, fast, sigma, mu, loss, pairs);            \
      case Scheme::kNdcg2:                                                                                           \
        return pairs_ndcg2_##T(documents, sorted_labels, delta, size, cut, fast, sigma, mu, loss, pairs);            \
      case Scheme::kLambdaRank:                                                                                      \
        return pairs_lambdarank_##T(documents, sorted_labels, delta, size, cut, fast, sigma, mu, loss, pairs);       \
      case Scheme::kNdcg2pp:                                                                                         \
        return pairs_ndcg2pp_##T(documents, sorted_labels, delta, size, cut, fast, sigma, mu, loss, pairs);          \
    }                                                                                                                \
  }
RERANK_FAST_PAIR_LOOPS(float)
RERANK_FAST_PAIR_LOOPS(double)

// Scratch of one thread, reused from list to list and from call to call.
template <typename T>
struct Scratch {
  Documents<T> documents;
  std::vector<std::int64_t> order, by_label;
  std::vector<std::int32_t> rank;
  std::vector<T> sorted_labels, delta;
  std::vector<double> gain, inverse_discount;  // inverse_discount[r - 1] = 1 / log2(1 + r), grown as lists need it

  void reserve(std::int64_t size) {
    const auto n = static_cast<std::size_t>(size);
    for (std::int64_t r = static_cast<std::int64_t>(inverse_discount.size()) + 1; r <= size + 1; ++r)
      inverse_discount.push_back(1.0 / std::log2(1.0 + static_cast<double>(r)));
    if (delta.empty()) delta.push_back(T(0));
    for (std::size_t d = delta.size(); d <= n; ++d)
      delta.push_back(static_cast<T>(inverse_discount[d - 1] - inverse_discount[d]));
    if (order.size() >= n) return;
    for (auto* v : {&order, &by_label}) v->resize(n);
    rank.resize(n);
    gain.resize(n);
    sorted_labels.resize(n);
    Documents<T>& d = documents;
    for (auto* v : {&d.score, &d.gain, &d.inverse_discount, &d.exponential, &d.pull, &d.in_cut}) v->resize(n);
    d.rank.resize(n);
  }
};

template <typename T>
void one_list(const T* scores, const T* labels, std::int64_t size, const LambdaLossOptions& options,
              Scratch<T>& scratch, double* loss, std::int64_t* pairs, T* grad) {
  *loss = 0;
  *pairs = 0;
  std::fill(grad, grad + size, T(0));
  const bool every_pair = options.scheme == Scheme::kNdcg1;
  if (size == 0 || (size == 1 && !every_pair)) return;
  scratch.reserve(size);

  // Ranks: NaN first, then by score descending; ties keep the input order.
  auto order = scratch.order.begin();
  std::iota(order, order + size, std::int64_t{0});
  std::sort(order, order + size, [scores](std::int64_t a, std::int64_t b) {
    const bool nan_a = scores[a] != scores[a], nan_b = scores[b] != scores[b];
    if (nan_a != nan_b) return nan_a;
    if (!nan_a && scores[a] != scores[b]) return scores[a] > scores[b];
    return a < b;
  });
  for (std::int64_t r = 0; r < size; ++r) scratch.rank[order[r]] = static_cast<std::int32_t>(r + 1);

  auto by_label = scratch.by_label.begin();
  std::iota(by_label, by_label + size, std::int64_t{0});
  std::sort(by_label, by_label + size, [labels](std::int64_t a, std::int64_t b) {
    return labels[a] != labels[b] ? labels[a] > labels[b] : a < b;
  });

  // Gains, divided like the ideal DCG by 2^largest so that large labels stay finite.
  const double largest = std::max(0.0, static_cast<double>(labels[by_label[0]]));
  const double one = std::exp2(-largest);
  const std::int64_t k = options.k == 0 ? size : std::min(options.k, size);
  double ideal = 0;
  for (std::int64_t r = 0; r < size; ++r) {
    const double relevance = std::max(0.0, static_cast<double>(labels[by_label[r]]));
    // expm1 where 2^relevance is in range: exact for labels near zero.
    scratch.gain[r] = relevance < 64.0 ? std::expm1(relevance * 0.6931471805599453) * one
                                       : std::exp2(relevance - largest) - one;
    if (r < k) ideal += scratch.gain[r] * scratch.inverse_discount[r];
  }
  const double normalizer = 1.0 / std::max(ideal, options.eps * one);

  double lowest = scores[0], highest = scores[0];
  for (std::int64_t i = 0; i < size; ++i) {
    const double s = scores[i];
    lowest = s < lowest ? s : lowest;
    highest = s > highest ? s : highest;
  }
  bool fast = std::fabs(options.sigma) * (highest - lowest) <= kExponentLimit<T>;

  Documents<T>& documents = scratch.documents;
  for (std::int64_t r = 0; r < size; ++r) {
    const std::int64_t i = by_label[r];
    const std::int32_t rank = scratch.rank[i];
    documents.score[r] = scores[i];
    documents.rank[r] = rank;
    documents.gain[r] = static_cast<T>(scratch.gain[r] * normalizer);
    documents.inverse_discount[r] = static_cast<T>(scratch.inverse_discount[rank - 1]);
    documents.in_cut[r] = rank <= k ? T(1) : T(0);
    documents.pull[r] = T(0);
    scratch.sorted_labels[r] = labels[i];
    fast = fast && scores[i] == scores[i];
    // In double: the rounding of a large difference would show in its exponential.
    documents.exponential[r] =
        fast ? static_cast<T>(std::exp(options.sigma * (static_cast<double>(scores[i]) - highest))) : T(0);
  }
  // A negative sigma turns exp(sigma * (s - max)) upside down: it may overflow.
  fast = fast && options.sigma >= 0;

  pair_loop(options.scheme, documents, scratch.sorted_labels.data(), scratch.delta.data(), size,
            options.k != 0 && options.k < size, fast, static_cast<T>(options.sigma), static_cast<T>(options.mu), loss,
            pairs);

  *loss *= options.scale;
  const double slope = -options.scale * options.sigma;
  for (std::int64_t r = 0; r < size; ++r)
    grad[by_label[r]] = static_cast<T>(slope * static_cast<double>(documents.pull[r]));
}

template <typename T>
void some_lists(const T* scores, const T* labels, const std::int64_t* offsets, std::int64_t begin, std::int64_t end,
                const LambdaLossOptions& options, double* list_loss, std::int64_t* list_pairs, T* grad) {
  thread_local Scratch<T> scratch;
  for (std::int64_t q = begin; q < end; ++q) {
    const std::int64_t start = offsets[q];
    one_list(scores + start, labels + start, offsets[q + 1] - start, options, scratch, list_loss + q, list_pairs + q,
             grad + start);
  }
}

}  // namespace

template <typename T>
void lambda_loss(const T* scores, const T* labels, const std::int64_t* offsets, std::int64_t num_lists,
                 const LambdaLossOptions& options, double* list_loss, std::int64_t* list_pairs, T* grad) {
  // Ordered pairs bound the work; a thread is worth its start above about a million of them.
  std::vector<double> work(static_cast<std::size_t>(num_lists) + 1, 0.0);
  for (std::int64_t q = 0; q < num_lists; ++q) {
    const double size = static_cast<double>(offsets[q + 1] - offsets[q]);
    work[q + 1] = work[q] + size * size;
  }
  const double worth = work.back() / 1e6;
  const auto threads = static_cast<int>(
      std::min({static_cast<double>(options.num_threads), static_cast<double>(num_lists), worth}));
  if (threads <= 1) {
    some_lists(scores, labels, offsets, 0, num_lists, options, list_loss, list_pairs, grad);
    return;
  }
  // Contiguous ranges of lists with about equal work: each writes its own part of every output.
  std::vector<std::thread> pool;
  std::int64_t begin = 0;
  for (int t = 0; t < threads; ++t) {
    const double until = work.back() * (t + 1) / threads;
    std::int64_t end = t + 1 == threads
                           ? num_lists
                           : std::upper_bound(work.begin(), work.end(), until) - work.begin() - 1;
    end = std::max(begin, std::min(end, num_lists));
    if (t + 1 == threads) {
      some_lists(scores, labels, offsets, begin, end, options, list_loss, list_pairs, grad);
    } else {
      pool.emplace_back(some_lists<T>, scores, labels, offsets, begin, end, std::cref(options), list_loss, list_pairs,
                        grad);
    }
    begin = end;
  }
  for (std::thread& thread : pool) thread.join();
}

template void lambda_loss<float>(const float*, const float*, const std::int64_t*, std::int64_t,
                                 const LambdaLossOptions&, double*, std::int64_t*, float*);
template void lambda_loss<double>(const double*, const double*, const std::int64_t*, std::int64_t,
                                  const LambdaLossOptions&, double*, std::int64_t*, double*);

}  // namespace rerank_fast
