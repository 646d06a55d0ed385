// The pair loops of approximate ranks: a register of a list's documents against all of them.
#include "approx_ranks/kernels.h"
#include "common/lanes.h"
#include "common/math.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

// Terms that a lane adds up before they go on: the error does not grow with the list.
constexpr std::int64_t kTerms = 64;

template <typename T>
RERANK_FAST_INLINE Lanes<T> load_some(const T* from, std::int64_t count) {
  if (count >= kLanesOf<T>) return load(from);
  Lanes<T> lanes{};
  for (std::int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return lanes;
}

template <typename T>
RERANK_FAST_INLINE void store_some(const Lanes<T>& lanes, T* to, std::int64_t count) {
  if (count >= kLanesOf<T>) return store<T>(lanes, to);
  for (std::int64_t lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
}

// sigmoid(alpha (s_j - s_i)) for the documents i of a register, and its complement.
template <typename T, bool kFast>
struct Pair {
  Lanes<T> above, below;

  RERANK_FAST_INLINE Pair(const ApproxRanksList<T>& list, const Lanes<T>& own, std::int64_t j) {
    if constexpr (kFast) {
      const T other = list.exponentials[j];
      const Lanes<T> r = T(1) / (own + other);
      above = other * r;
      below = own * r;
    } else {
      const Lanes<T> d = list.alpha * (list.scores[j] - own);
      const Lanes<T> t = exp_negative(absolute(d)), r = T(1) / (T(1) + t), rest = t * r;
      above = d < 0 ? rest : r;
      below = d < 0 ? r : rest;
    }
  }
};

template <typename T, bool kFast>
RERANK_FAST_INLINE void forward_rows(const ApproxRanksList<T>& list, std::int64_t begin,
                                     std::int64_t end, T* ranks) {
  const T* const values = kFast ? list.exponentials : list.scores;
  for (std::int64_t i = begin; i < end; i += kLanesOf<T>) {
    const Lanes<T> own = load_some(values + i, end - i);
    // One half of the document itself is taken away from the one that ranks begin with.
    Lanes<T> total = every_lane(T(0.5));
    for (std::int64_t first = 0; first < list.size; first += kTerms) {
      Lanes<T> part{};
      const std::int64_t last = smaller(first + kTerms, list.size);
      for (std::int64_t j = first; j < last; ++j) part += Pair<T, kFast>(list, own, j).above;
      total += part;
    }
    store_some<T>(total, ranks + i, end - i);
  }
}

template <typename T, bool kFast>
RERANK_FAST_INLINE void backward_rows(const ApproxRanksList<T>& list, const T* grad_ranks,
                                      std::int64_t begin, std::int64_t end, T* grad_scores) {
  const T* const values = kFast ? list.exponentials : list.scores;
  for (std::int64_t i = begin; i < end; i += kLanesOf<T>) {
    const Lanes<T> own = load_some(values + i, end - i), grad = load_some(grad_ranks + i, end - i);
    Lanes<T> total{};
    for (std::int64_t first = 0; first < list.size; first += kTerms) {
      Lanes<T> part{};
      const std::int64_t last = smaller(first + kTerms, list.size);
      for (std::int64_t j = first; j < last; ++j) {
        const Pair<T, kFast> pair(list, own, j);
        part += (grad_ranks[j] - grad) * (pair.above * pair.below);
      }
      total += part;
    }
    store_some<T>(list.alpha * total, grad_scores + i, end - i);
  }
}

void approx_ranks_forward(const ApproxRanksList<float>& list, std::int64_t begin, std::int64_t end,
                          float* ranks) {
  list.exponentials == nullptr ? forward_rows<float, false>(list, begin, end, ranks)
                               : forward_rows<float, true>(list, begin, end, ranks);
}

void approx_ranks_forward_double(const ApproxRanksList<double>& list, std::int64_t begin,
                                 std::int64_t end, double* ranks) {
  forward_rows<double, false>(list, begin, end, ranks);
}

void approx_ranks_backward(const ApproxRanksList<float>& list, const float* grad_ranks,
                           std::int64_t begin, std::int64_t end, float* grad_scores) {
  list.exponentials == nullptr
      ? backward_rows<float, false>(list, grad_ranks, begin, end, grad_scores)
      : backward_rows<float, true>(list, grad_ranks, begin, end, grad_scores);
}

void approx_ranks_backward_double(const ApproxRanksList<double>& list, const double* grad_ranks,
                                  std::int64_t begin, std::int64_t end, double* grad_scores) {
  backward_rows<double, false>(list, grad_ranks, begin, end, grad_scores);
}

}  // namespace

extern const ApproxRanksKernels approx_ranks_kernels;
const ApproxRanksKernels approx_ranks_kernels = {approx_ranks_forward, approx_ranks_forward_double,
                                                 approx_ranks_backward,
                                                 approx_ranks_backward_double};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
