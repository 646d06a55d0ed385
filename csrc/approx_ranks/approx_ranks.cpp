#include "approx_ranks/approx_ranks.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "approx_ranks/kernels.h"
#include "common/dispatch.h"
#include "common/threads.h"
#include "lambda_loss/kernels.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 128, kPairsForThreads = 1 << 14;
constexpr double kLargestExponent = 80;  // twice e^80, and one by it, stay within fp32

struct Task {
  std::int64_t list, begin, end;  // rows of the list
};

// The exponentials of one list in `to`, or null.
const float* exponentials(const float* scores, std::int64_t size, double alpha, float* to,
                          float* reciprocal) {
  float highest = scores[0], lowest = scores[0];
  bool numbers = true;
  for (std::int64_t i = 0; i < size; ++i) {
    highest = std::max(highest, scores[i]);
    lowest = std::min(lowest, scores[i]);
    numbers &= scores[i] == scores[i];
  }
  const double range = alpha * (static_cast<double>(highest) - static_cast<double>(lowest));
  if (!numbers || !(range <= kLargestExponent)) return nullptr;
  kernels().lambda_loss->exponentials(scores, size, alpha, to, reciprocal);
  return to;
}

// run(list, task) for the rows of all lists.
template <typename T, typename Run>
void for_rows_of_lists(const ApproxRanksShape& shape, const T* scores, Run&& run) {
  static thread_local std::vector<ApproxRanksList<T>> list_arena;
  static thread_local std::vector<Task> task_arena;
  static thread_local std::vector<T> memory;
  list_arena.clear();
  task_arena.clear();
  const auto n = static_cast<std::size_t>(shape.offsets[shape.num_lists]);
  if constexpr (std::is_same_v<T, float>) memory.resize(2 * n);
  std::int64_t pairs = 0;
  for (std::int64_t q = 0; q < shape.num_lists; ++q) {
    const std::int64_t start = shape.offsets[q], size = shape.offsets[q + 1] - start;
    ApproxRanksList<T> list{scores + start, nullptr, size, static_cast<T>(shape.alpha)};
    if constexpr (std::is_same_v<T, float>) {
      float* const to = memory.data() + start;
      if (size > 0) list.exponentials = exponentials(scores + start, size, shape.alpha, to, to + n);
    }
    list_arena.push_back(list);
    pairs += size * size;
    for (std::int64_t begin = 0; begin < size; begin += kRowsPerTask)
      task_arena.push_back({q, begin, std::min(begin + kRowsPerTask, size)});
  }
  // Worker threads have arenas of their own: these are reached by address.
  const auto* const lists = list_arena.data();
  const auto* const tasks = task_arena.data();
  parallel_for(pairs > kPairsForThreads ? shape.num_threads : 1,
               static_cast<std::int64_t>(task_arena.size()),
               [&](std::int64_t index) { run(lists[tasks[index].list], tasks[index]); });
}

}  // namespace

template <typename T>
void approx_ranks(const ApproxRanksShape& shape, const T* scores, T* ranks) {
  ApproxRanksForward<T> rows;
  if constexpr (std::is_same_v<T, float>) {
    rows = kernels().approx_ranks->forward;
  } else {
    rows = kernels().approx_ranks->forward_double;
  }
  for_rows_of_lists(shape, scores, [&](const ApproxRanksList<T>& list, const Task& task) {
    rows(list, task.begin, task.end, ranks + shape.offsets[task.list]);
  });
}

template <typename T>
void approx_ranks_backward(const ApproxRanksShape& shape, const T* scores, const T* grad_ranks,
                           T* grad_scores) {
  ApproxRanksBackward<T> rows;
  if constexpr (std::is_same_v<T, float>) {
    rows = kernels().approx_ranks->backward;
  } else {
    rows = kernels().approx_ranks->backward_double;
  }
  for_rows_of_lists(shape, scores, [&](const ApproxRanksList<T>& list, const Task& task) {
    const std::int64_t start = shape.offsets[task.list];
    rows(list, grad_ranks + start, task.begin, task.end, grad_scores + start);
  });
}

template void approx_ranks<float>(const ApproxRanksShape&, const float*, float*);
template void approx_ranks<double>(const ApproxRanksShape&, const double*, double*);
template void approx_ranks_backward<float>(const ApproxRanksShape&, const float*, const float*,
                                           float*);
template void approx_ranks_backward<double>(const ApproxRanksShape&, const double*, const double*,
                                            double*);

}  // namespace rerank_fast
