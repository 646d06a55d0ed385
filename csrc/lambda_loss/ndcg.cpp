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
  T score;
  double gain;
};

template <typename T>
T ndcg_of(const T* scores, const T* labels, std::int64_t size, std::int64_t k, std::vector<Ranked<T>>& order) {
  double largest = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const bool finite = labels[i] < std::numeric_limits<T>::infinity();  // false of NaN; -inf is no gain
    if (!finite || std::isnan(scores[i])) return std::numeric_limits<T>::quiet_NaN();
    largest = std::max<double>(largest, labels[i]);
  }
  if (largest == 0) return 0;
  order.resize(static_cast<std::size_t>(size));
  // Both sums are divided by 2^largest, so that a large label stays finite.
  for (std::int64_t i = 0; i < size; ++i) {
    const double gain = labels[i] > 0 ? std::exp2(labels[i] - largest) - std::exp2(-largest) : 0;
    order[static_cast<std::size_t>(i)] = {scores[i], gain};
  }
  const std::int64_t cut = k < 1 ? size : std::min(k, size);
  const auto sum = [&] {
    double total = 0;
    for (std::int64_t r = 0; r < cut; ++r) {
      const double gain = order[static_cast<std::size_t>(r)].gain;
      if (gain > 0) total += gain / std::log2(2.0 + static_cast<double>(r));
    }
    return total;
  };
  std::sort(order.begin(), order.end(),
            [](const Ranked<T>& a, const Ranked<T>& b) { return a.gain > b.gain; });
  const double ideal = sum();
  // Stable, so that the sum of a tie is of the largest gain first whatever the order of input.
  std::stable_sort(order.begin(), order.end(),
                   [](const Ranked<T>& a, const Ranked<T>& b) { return a.score > b.score; });
  for (auto first = order.begin(); first != order.end() && first - order.begin() < cut;) {
    double gains = 0;
    auto last = first;
    for (; last != order.end() && last->score == first->score; ++last) gains += last->gain;
    const double expected = gains / static_cast<double>(last - first);
    for (; first != last; ++first) first->gain = expected;
  }
  return static_cast<T>(sum() / ideal);
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
