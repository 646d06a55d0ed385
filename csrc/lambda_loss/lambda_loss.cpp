#include "lambda_loss/lambda_loss.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/dispatch.h"
#include "common/threads.h"
#include "lambda_loss/kernels.h"
#include "lambda_loss/list.h"

namespace rerank_fast {
namespace {

// A list with more visits than this is cut into row ranges for all threads; fewer in all are done by one thread.
constexpr double kVisitsPerTask = 1 << 21, kVisitsForThreads = 1 << 14;
constexpr std::int64_t kRangesPerList = 8;  // fixed, so that sums do not depend on the number of threads

double estimated_visits(std::int64_t size) {
  const auto n = static_cast<double>(size);
  return 16 * n + 0.5 * n * n;
}

template <typename T>
VisitPairs<T> visit_pairs() {
  if constexpr (sizeof(T) == 4) {
    return kernels().lambda_loss->visit_pairs;
  } else {
    return kernels().lambda_loss->visit_pairs_double;
  }
}

template <typename T>
ListScratch<T>& this_threads_scratch() {
  static thread_local ListScratch<T> scratch;
  return scratch;
}

template <typename T>
void one_list(const T* scores, const T* labels, std::int64_t size, const LambdaLossOptions& options,
              ListScratch<T>& scratch, double* loss, std::int64_t* pairs, T* grad) {
  const bool has_pairs = scratch.prepare(scores, labels, size, options, loss);
  *pairs = scratch.num_pairs;
  if (!has_pairs) return std::fill(grad, grad + size, static_cast<T>(*loss));
  visit_pairs<T>()(scratch.list, scratch.weighting, 0, scratch.num_rows, loss, scratch.pull(), scratch.column_pull());
  scratch.finish(scratch.pull(), options, loss, grad);
}

// One list on all threads: its rows in ranges of about equal work, each with sums of its own.
template <typename T>
void one_long_list(const T* scores, const T* labels, std::int64_t size, const LambdaLossOptions& options,
                   ListScratch<T>& scratch, double* loss, std::int64_t* pairs, T* grad) {
  static thread_local Scratch<double> pull_arena;
  static thread_local Scratch<T> column_arena;
  const bool has_pairs = scratch.prepare(scores, labels, size, options, loss);
  *pairs = scratch.num_pairs;
  if (!has_pairs) return std::fill(grad, grad + size, static_cast<T>(*loss));
  const std::int64_t width = padded(size);
  double* const pull = pull_arena.room(kRangesPerList * width);
  T* const column_pull = column_arena.room(kRangesPerList * width);
  double losses[kRangesPerList];
  std::int64_t bounds[kRangesPerList + 1];
  for (std::int64_t range = 0; range <= kRangesPerList; ++range) {
    const double share = static_cast<double>(range) / kRangesPerList;
    // Row i of a triangle has size - i columns.
    const auto n = static_cast<double>(size), rows = static_cast<double>(scratch.num_rows);
    const double first = scratch.list.visits == Visits::kTriangle ? n - std::sqrt(n * n - share * rows * (2 * n - rows))
                                                                  : share * rows;
    bounds[range] = range == kRangesPerList ? scratch.num_rows
                                            : std::min(scratch.num_rows, static_cast<std::int64_t>(first));
  }
  parallel_for(options.num_threads, kRangesPerList, [&](std::int64_t range) {
    double* const own_pull = pull + range * width;
    std::fill(own_pull, own_pull + width, 0.0);
    double own_loss = 0;
    visit_pairs<T>()(scratch.list, scratch.weighting, bounds[range], bounds[range + 1], &own_loss, own_pull,
                column_pull + range * width);
    losses[range] = own_loss;
  });
  double* const total = scratch.pull();
  for (std::int64_t range = 0; range < kRangesPerList; ++range) {
    *loss += losses[range];
    for (std::int64_t r = 0; r < size; ++r) total[r] += pull[range * width + r];
  }
  scratch.finish(total, options, loss, grad);
}

}  // namespace

bool offsets_rise(const std::int64_t* offsets, std::int64_t num_lists, std::int64_t num_documents) {
  bool rise = offsets[0] == 0 && offsets[num_lists] == num_documents;
  for (std::int64_t q = 0; q < num_lists; ++q) rise &= offsets[q] <= offsets[q + 1];
  return rise;
}

template <typename T>
void lambda_loss(const T* scores, const T* labels, const std::int64_t* offsets, std::int64_t num_lists,
                 const LambdaLossOptions& options, T* loss, T* grad, std::int64_t* num_pairs) {
  static thread_local std::vector<double> list_loss;
  static thread_local std::vector<std::int64_t> list_pairs;
  list_loss.resize(static_cast<std::size_t>(num_lists));
  list_pairs.resize(static_cast<std::size_t>(num_lists));
  // Worker threads have their own: they are reached by address.
  double* const losses = list_loss.data();
  std::int64_t* const pairs = list_pairs.data();

  double total = 0;
  bool any_long = false;
  for (std::int64_t q = 0; q < num_lists; ++q) {
    const double visits = estimated_visits(offsets[q + 1] - offsets[q]);
    total += visits;
    any_long = any_long || visits > kVisitsPerTask;
  }
  // Runs of lists, several a thread: they even out what the estimate misses.
  const std::int64_t tasks =
      options.num_threads > 1 && total > kVisitsForThreads ? std::min<std::int64_t>(num_lists, 4 * options.num_threads)
                                                           : 1;
  parallel_for(options.num_threads, tasks, [&](std::int64_t task) {
    ListScratch<T>& scratch = this_threads_scratch<T>();
    for (std::int64_t q = num_lists * task / tasks; q < num_lists * (task + 1) / tasks; ++q) {
      const std::int64_t start = offsets[q], size = offsets[q + 1] - start;
      if (estimated_visits(size) > kVisitsPerTask) continue;
      // Neighbouring lists of two threads share a cache line of these: they are written once a list.
      double one_loss;
      one_list(scores + start, labels + start, size, options, scratch, &one_loss, pairs + q, grad + start);
      losses[q] = one_loss;
    }
  });
  for (std::int64_t q = 0; any_long && q < num_lists; ++q) {
    const std::int64_t start = offsets[q], size = offsets[q + 1] - start;
    if (estimated_visits(size) <= kVisitsPerTask) continue;
    one_long_list(scores + start, labels + start, size, options, this_threads_scratch<T>(), losses + q, pairs + q,
                  grad + start);
  }

  *num_pairs = std::accumulate(pairs, pairs + num_lists, std::int64_t{0});
  if (options.reduction == Reduction::kNone) {
    for (std::int64_t q = 0; q < num_lists; ++q) loss[q] = static_cast<T>(losses[q]);
    return;
  }
  double divisor = 1;
  if (options.reduction == Reduction::kLists) divisor = static_cast<double>(num_lists);
  if (options.reduction == Reduction::kPairs) divisor = static_cast<double>(*num_pairs);
  divisor = std::max(divisor, 1.0);
  *loss = static_cast<T>(std::accumulate(losses, losses + num_lists, 0.0) / divisor);
  const T factor = static_cast<T>(1.0 / divisor);
  const std::int64_t n = offsets[num_lists];
  for (std::int64_t i = 0; i < n; ++i) grad[i] *= factor;
}

template void lambda_loss<float>(const float*, const float*, const std::int64_t*, std::int64_t,
                                 const LambdaLossOptions&, float*, float*, std::int64_t*);
template void lambda_loss<double>(const double*, const double*, const std::int64_t*, std::int64_t,
                                  const LambdaLossOptions&, double*, double*, std::int64_t*);

}  // namespace rerank_fast
