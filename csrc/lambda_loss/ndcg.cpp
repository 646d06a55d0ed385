#include "lambda_loss/ndcg.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/threads.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kListsPerTask = 8;

template <typename T>
struct Ranked {
  T score, label;
};

template <typename T>
T ndcg_of(const T* scores, const T* labels, std::int64_t size, std::int64_t k, std::vector<Ranked<T>>& order) {
  T largest = 0;
  order.resize(static_cast<std::size_t>(size));
  for (std::int64_t i = 0; i < size; ++i) {
    if (std::isnan(labels[i])) return std::numeric_limits<T>::quiet_NaN();
    largest = std::max(largest, labels[i]);
    order[static_cast<std::size_t>(i)] = {scores[i], std::max(labels[i], T(0))};
  }
  if (largest == 0) return 0;
  const std::int64_t cut = k < 1 ? size : std::min(k, size);
  // Both sums are divided by 2^largest, so that a large label stays finite.
  const auto sum = [&] {
    double total = 0;
    for (std::int64_t r = 0; r < cut; ++r) {
      const double label = order[static_cast<std::size_t>(r)].label;
      if (label > 0)
        total += (std::exp2(label - largest) - std::exp2(-static_cast<double>(largest))) / std::log2(2.0 + r);
    }
    return total;
  };
  // NaN goes first, ties keep the input order.
  std::stable_sort(order.begin(), order.end(), [](const Ranked<T>& a, const Ranked<T>& b) {
    return a.score > b.score || (std::isnan(a.score) && !std::isnan(b.score));
  });
  const double found = sum();
  std::partial_sort(order.begin(), order.begin() + cut, order.end(),
                    [](const Ranked<T>& a, const Ranked<T>& b) { return a.label > b.label; });
  return static_cast<T>(found / sum());
}

}  // namespace

template <typename T>
void ndcg(const T* scores, const T* labels, const std::int64_t* offsets, std::int64_t num_lists, std::int64_t k,
          int num_threads, T* result) {
  parallel_for(num_threads, (num_lists + kListsPerTask - 1) / kListsPerTask, [&](std::int64_t task) {
    static thread_local std::vector<Ranked<T>> order;
    for (std::int64_t q = task * kListsPerTask; q < std::min((task + 1) * kListsPerTask, num_lists); ++q)
      result[q] = ndcg_of(scores + offsets[q], labels + offsets[q], offsets[q + 1] - offsets[q], k, order);
  });
}

template void ndcg<float>(const float*, const float*, const std::int64_t*, std::int64_t, std::int64_t, int, float*);
template void ndcg<double>(const double*, const double*, const std::int64_t*, std::int64_t, std::int64_t, int,
                           double*);

}  // namespace rerank_fast
