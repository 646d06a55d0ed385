#include "rows/score_head.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/threads.h"
#include "rows/kernels.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 32;  // fixed, so that sums over rows do not depend on the number of threads

}  // namespace

void score_head_gather(const ScoreHeadShape& shape, const ScoreHeadGather& tensors) {
  const auto rows = kernels().rows->score_head_gather;
  for_rows<kRowsPerTask>(shape, [&](TaskRows part) { rows(shape, tensors, part.begin, part.end); });
}

void score_head_dot(const ScoreHeadShape& shape, const ScoreHeadDot& tensors) {
  const auto rows = kernels().rows->score_head_dot;
  for_rows<kRowsPerTask>(shape, [&](TaskRows part) { rows(shape, tensors, part.begin, part.end); });
}

void score_head_dot_backward(const ScoreHeadShape& shape, const ScoreHeadDotBackward& tensors) {
  const std::int64_t tasks = (shape.rows + kRowsPerTask - 1) / kRowsPerTask, width = shape.width;
  // A task's sums for both vectors.
  static thread_local std::vector<float> memory;
  memory.assign(static_cast<std::size_t>(2 * tasks * width), 0.0f);
  float* const parts = memory.data();
  const auto rows = kernels().rows->score_head_dot_backward;
  for_rows<kRowsPerTask>(shape, [&](TaskRows own) {
    ScoreHeadDotBackward part = tensors;
    part.grad_dense_bias = parts + 2 * own.number * width;
    part.grad_out_weight = part.grad_dense_bias + width;
    rows(shape, part, own.begin, own.end);
  });
  std::fill_n(tensors.grad_dense_bias, width, 0.0f);
  std::fill_n(tensors.grad_out_weight, width, 0.0f);
  for (std::int64_t task = 0; task < tasks; ++task)
    for (std::int64_t e = 0; e < width; ++e) {
      tensors.grad_dense_bias[e] += parts[2 * task * width + e];
      tensors.grad_out_weight[e] += parts[(2 * task + 1) * width + e];
    }
}

}  // namespace rerank_fast
