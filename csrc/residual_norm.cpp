#include "residual_norm.h"

#include <cmath>
#include <vector>

#include "numeric.h"
#include "threads.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 64;  // fixed, so that sums over rows do not depend on the number of threads

// residual + dropout(x) of one row.
template <bool kBf16>
RERANK_FAST_INLINE void add(const ResidualNormShape& shape, const Dropout& dropout, const void* x,
                            const float* residual, std::int64_t row, float* sum) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const auto* narrow_x = static_cast<const std::uint16_t*>(x) + row * width;
  const auto* wide_x = static_cast<const float*>(x) + row * width;
  const std::uint32_t stream = dropout.row(0, static_cast<std::uint32_t>(row)), threshold = dropout.threshold;
  const float* from = residual + row * width;
  if (threshold == 0) {
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) sum[e] = from[e] + (kBf16 ? widen(narrow_x[e]) : wide_x[e]);
    return;
  }
  const float rescale = dropout.rescale;
#pragma omp simd
  for (std::int32_t e = 0; e < width; ++e) {
    const float value = kBf16 ? widen(narrow_x[e]) : wide_x[e];
    const float factor = Dropout::draw(stream, static_cast<std::uint32_t>(e)) < threshold ? 0.0f : rescale;
    sum[e] = from[e] + factor * value;
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void forward_rows(const ResidualNormShape& shape, const void* x, const float* residual,
                                     const float* weight, const float* bias, float* y, void* y_narrow, float* mean,
                                     float* rstd, std::int64_t begin, std::int64_t end) {
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    float* to = y + row * width;
    add<kBf16>(shape, dropout, x, residual, row, to);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int32_t e = 0; e < width; ++e) sum += to[e];
    const float middle = sum / static_cast<float>(width);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int32_t e = 0; e < width; ++e) squares += (to[e] - middle) * (to[e] - middle);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + static_cast<float>(shape.eps));
    mean[row] = middle;
    rstd[row] = scale;
    auto* narrow_to = static_cast<std::uint16_t*>(y_narrow) + row * width;
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = (to[e] - middle) * scale * weight[e] + bias[e];
      to[e] = value;
      if constexpr (kBf16) narrow_to[e] = narrow(value);
    }
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void backward_rows(const ResidualNormShape& shape, const void* x, const float* residual,
                                      const float* weight, const float* mean, const float* rstd, const float* grad_y,
                                      const void* grad_y_narrow, void* grad_x, float* grad_residual,
                                      float* grad_weight, float* grad_bias, float* normalized, std::int64_t begin,
                                      std::int64_t end) {
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    add<kBf16>(shape, dropout, x, residual, row, normalized);
    float* grad = grad_residual + row * width;
    const float* wide_grad = grad_y == nullptr ? nullptr : grad_y + row * width;
    const auto* narrow_grad = grad_y_narrow == nullptr
                                  ? nullptr
                                  : static_cast<const std::uint16_t*>(grad_y_narrow) + row * width;
    if (wide_grad != nullptr && narrow_grad != nullptr) {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) grad[e] = wide_grad[e] + widen(narrow_grad[e]);
    } else if (narrow_grad != nullptr) {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) grad[e] = widen(narrow_grad[e]);
    } else {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) grad[e] = wide_grad == nullptr ? 0.0f : wide_grad[e];
    }
    const float middle = mean[row], scale = rstd[row];
    float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (std::int32_t e = 0; e < width; ++e) {
      const float unit = (normalized[e] - middle) * scale, g = grad[e];
      grad_weight[e] += g * unit;
      grad_bias[e] += g;
      const float weighted = g * weight[e];
      normalized[e] = unit;
      grad[e] = weighted;
      sum += weighted;
      along += weighted * unit;
    }
    const float mean_grad = sum / static_cast<float>(width), mean_along = along / static_cast<float>(width);
    const std::uint32_t stream = dropout.row(0, static_cast<std::uint32_t>(row)), threshold = dropout.threshold;
    const float rescale = dropout.rescale;
    auto* narrow_to = static_cast<std::uint16_t*>(grad_x) + row * width;
    auto* wide_to = static_cast<float*>(grad_x) + row * width;
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = scale * (grad[e] - mean_grad - normalized[e] * mean_along);
      grad[e] = value;
      const float factor = Dropout::draw(stream, static_cast<std::uint32_t>(e)) < threshold ? 0.0f : rescale;
      if constexpr (kBf16) {
        narrow_to[e] = narrow(factor * value);
      } else {
        wide_to[e] = factor * value;
      }
    }
  }
}

RERANK_FAST_CLONES void forward_task(const ResidualNormShape& shape, const void* x, const float* residual,
                                     const float* weight, const float* bias, float* y, void* y_narrow, float* mean,
                                     float* rstd, std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    forward_rows<true>(shape, x, residual, weight, bias, y, y_narrow, mean, rstd, begin, end);
  } else {
    forward_rows<false>(shape, x, residual, weight, bias, y, y_narrow, mean, rstd, begin, end);
  }
}

RERANK_FAST_CLONES void backward_task(const ResidualNormShape& shape, const void* x, const float* residual,
                                      const float* weight, const float* mean, const float* rstd, const float* grad_y,
                                      const void* grad_y_narrow, void* grad_x, float* grad_residual,
                                      float* grad_weight, float* grad_bias, float* normalized, std::int64_t begin,
                                      std::int64_t end) {
  if (shape.bf16) {
    backward_rows<true>(shape, x, residual, weight, mean, rstd, grad_y, grad_y_narrow, grad_x, grad_residual,
                        grad_weight, grad_bias, normalized, begin, end);
  } else {
    backward_rows<false>(shape, x, residual, weight, mean, rstd, grad_y, grad_y_narrow, grad_x, grad_residual,
                         grad_weight, grad_bias, normalized, begin, end);
  }
}

}  // namespace

void residual_norm_forward(const ResidualNormShape& shape, const void* x, const float* residual, const float* weight,
                           const float* bias, float* y, void* y_narrow, float* mean, float* rstd) {
  parallel_for(shape.num_threads, (shape.rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task) {
    forward_task(shape, x, residual, weight, bias, y, y_narrow, mean, rstd, task * kRowsPerTask,
                 std::min((task + 1) * kRowsPerTask, shape.rows));
  });
}

void residual_norm_backward(const ResidualNormShape& shape, const void* x, const float* residual, const float* weight,
                            const float* mean, const float* rstd, const float* grad_y, const void* grad_y_narrow,
                            void* grad_x, float* grad_residual, float* grad_weight, float* grad_bias) {
  const std::int64_t tasks = (shape.rows + kRowsPerTask - 1) / kRowsPerTask, width = shape.width;
  // A task's sums of the gradients of weight and bias, then room for a row.
  static thread_local std::vector<float> memory;
  memory.assign(static_cast<std::size_t>(3 * tasks * width), 0.0f);
  float* const parts = memory.data();
  parallel_for(shape.num_threads, tasks, [&](std::int64_t task) {
    float* part = parts + 3 * task * width;
    backward_task(shape, x, residual, weight, mean, rstd, grad_y, grad_y_narrow, grad_x, grad_residual, part,
                  part + width, part + 2 * width, task * kRowsPerTask,
                  std::min((task + 1) * kRowsPerTask, shape.rows));
  });
  std::fill_n(grad_weight, width, 0.0f);
  std::fill_n(grad_bias, width, 0.0f);
  for (std::int64_t task = 0; task < tasks; ++task)
    for (std::int64_t e = 0; e < width; ++e) {
      grad_weight[e] += parts[3 * task * width + e];
      grad_bias[e] += parts[(3 * task + 1) * width + e];
    }
}

}  // namespace rerank_fast
