#include "rows/residual_norm.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/threads.h"
#include "rows/kernels.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 64;  // fixed, so that sums over rows do not depend on the number of threads

}  // namespace

void residual_norm_forward(const ResidualNormShape& shape, const ResidualNormForward& tensors) {
  const auto rows = kernels().rows->residual_norm_forward;
  for_rows<kRowsPerTask>(shape, [&](TaskRows part) { rows(shape, tensors, part.begin, part.end); });
}

void residual_norm_backward(const ResidualNormShape& shape, const ResidualNormBackward& tensors) {
  const std::int64_t tasks = (shape.rows + kRowsPerTask - 1) / kRowsPerTask, width = shape.width;
  // A task's sums of the gradients of weight and bias, then room for a row.
  static thread_local std::vector<float> memory;
  memory.assign(static_cast<std::size_t>(3 * tasks * width), 0.0f);
  float* const parts = memory.data();
  const auto rows = kernels().rows->residual_norm_backward;
  for_rows<kRowsPerTask>(shape, [&](TaskRows own) {
    float* const part = parts + 3 * own.number * width;
    rows(shape, tensors, {part, part + width, part + 2 * width}, own.begin, own.end);
  });
  std::fill_n(tensors.grad_weight, width, 0.0f);
  std::fill_n(tensors.grad_bias, width, 0.0f);
  for (std::int64_t task = 0; task < tasks; ++task)
    for (std::int64_t e = 0; e < width; ++e) {
      tensors.grad_weight[e] += parts[3 * task * width + e];
      tensors.grad_bias[e] += parts[(3 * task + 1) * width + e];
    }
}

}  // namespace rerank_fast
