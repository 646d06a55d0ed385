// LayerNorm(residual + dropout(x)), rows [begin, end).
#include "common/dropout.h"
#include "common/stored.h"
#include "rows/tasks.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

// residual + dropout(x) of one row.
template <bool kBf16>
RERANK_FAST_INLINE void add(const ResidualNormShape& shape, const Dropout& dropout, const void* x,
                            const float* residual, std::int64_t row, float* sum) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const auto* values = static_cast<const typename Stored<kBf16>::type*>(x) + row * width;
  const std::uint32_t stream = dropout.row(0, static_cast<std::uint32_t>(row));
  const float* from = residual + row * width;
  if (dropout.threshold == 0) {
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) sum[e] = from[e] + Stored<kBf16>::get(values[e]);
    return;
  }
#pragma omp simd
  for (std::int32_t e = 0; e < width; ++e)
    sum[e] = from[e] + dropout.factor(stream, e) * Stored<kBf16>::get(values[e]);
}

template <bool kBf16>
RERANK_FAST_INLINE void forward_rows(const ResidualNormShape& shape, const ResidualNormForward& tensors,
                                     std::int64_t begin, std::int64_t end) {
  const float *weight = tensors.weight, *bias = tensors.bias;
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    float* to = tensors.y + row * width;
    add<kBf16>(shape, dropout, tensors.x, tensors.residual, row, to);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int32_t e = 0; e < width; ++e) sum += to[e];
    const float middle = sum / static_cast<float>(width);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int32_t e = 0; e < width; ++e) squares += (to[e] - middle) * (to[e] - middle);
    const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + static_cast<float>(shape.eps));
    tensors.mean[row] = middle;
    tensors.rstd[row] = scale;
    auto* narrow_to = static_cast<std::uint16_t*>(tensors.y_narrow) + row * width;
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = (to[e] - middle) * scale * weight[e] + bias[e];
      to[e] = value;
      if constexpr (kBf16) narrow_to[e] = narrow(value);
    }
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void backward_rows(const ResidualNormShape& shape, const ResidualNormBackward& tensors,
                                      const ResidualNormSums& sums, std::int64_t begin, std::int64_t end) {
  float *const normalized = sums.row, *const grad_weight = sums.grad_weight, *const grad_bias = sums.grad_bias;
  const float* const weight = tensors.weight;
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    add<kBf16>(shape, dropout, tensors.x, tensors.residual, row, normalized);
    float* grad = tensors.grad_residual + row * width;
    const float* wide_grad = tensors.grad_y == nullptr ? nullptr : tensors.grad_y + row * width;
    const auto* narrow_grad = tensors.grad_y_narrow == nullptr
                                  ? nullptr
                                  : static_cast<const std::uint16_t*>(tensors.grad_y_narrow) + row * width;
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
    const float middle = tensors.mean[row], scale = tensors.rstd[row];
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
    const std::uint32_t stream = dropout.row(0, static_cast<std::uint32_t>(row));
    auto* to = static_cast<typename Stored<kBf16>::type*>(tensors.grad_x) + row * width;
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = scale * (grad[e] - mean_grad - normalized[e] * mean_along);
      grad[e] = value;
      to[e] = Stored<kBf16>::put(dropout.factor(stream, e) * value);
    }
  }
}

}  // namespace

void residual_norm_forward_rows(const ResidualNormShape& shape, const ResidualNormForward& tensors,
                                std::int64_t begin, std::int64_t end) {
  shape.bf16 ? forward_rows<true>(shape, tensors, begin, end) : forward_rows<false>(shape, tensors, begin, end);
}

void residual_norm_backward_rows(const ResidualNormShape& shape, const ResidualNormBackward& tensors,
                                 const ResidualNormSums& sums, std::int64_t begin, std::int64_t end) {
  shape.bf16 ? backward_rows<true>(shape, tensors, sums, begin, end)
             : backward_rows<false>(shape, tensors, sums, begin, end);
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
