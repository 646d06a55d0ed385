#include "score_head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "numeric.h"
#include "threads.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 32;  // fixed, so that sums over rows do not depend on the number of threads

template <bool kBf16>
using Stored = std::conditional_t<kBf16, std::uint16_t, float>;

template <bool kBf16>
RERANK_FAST_INLINE float get(Stored<kBf16> value) {
  if constexpr (kBf16) {
    return widen(value);
  } else {
    return value;
  }
}
template <bool kBf16>
RERANK_FAST_INLINE Stored<kBf16> put(float value) {
  if constexpr (kBf16) {
    return narrow(value);
  } else {
    return value;
  }
}

// exp(-d) for d >= 0; NaN stays NaN.
RERANK_FAST_INLINE float exp_negative(float d) {
  const float x = d > 87.0f ? -87.0f : -d;
  const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to the nearest whole number, in the low bits
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  float p = 0.00138368458f;
  p = p * f + 0.0083748158f;
  p = p * f + 0.0416682256f;
  p = p * f + 0.166664202f;
  p = p * f + 0.499999921f;
  p = p * f + 1.00000004f;
  p = p * f + 1.0f;
  return p * power;
}

RERANK_FAST_INLINE float tanh_of(float x) {
  const float a = std::fabs(x), a2 = a * a, t = exp_negative(2.0f * a);
  // Near 0, where 1 - t cancels, an odd polynomial.
  float p = -0.00628366228f;
  p = p * a2 + 0.0211214516f;
  p = p * a2 - 0.053876318f;
  p = p * a2 + 0.133329332f;
  p = p * a2 - 0.333333313f;
  const float result = a < 0.6f ? a + a * (a2 * p) : (1.0f - t) / (1.0f + t);
  return std::copysign(result, x);
}

// The normal distribution's P(X <= x), from its density's exponential exp(-x^2 / 2).
RERANK_FAST_INLINE float normal_cdf(float x, float exponential) {
  const float t = 1.0f / (1.0f + 0.3f * std::fabs(x));
  float p = -0.00115676958f;
  p = p * t + 0.0424628556f;
  p = p * t - 0.173512369f;
  p = p * t + 0.227417424f;
  p = p * t - 0.0697029904f;
  p = p * t + 0.13590391f;
  p = p * t + 0.0979359522f;
  p = p * t + 0.121039622f;
  p = p * t + 0.119612373f;
  const float tail = exponential * (p * t);
  return x < 0.0f ? tail : 1.0f - tail;
}

struct Activated {
  float value, slope;
};

template <Activation kActivation>
RERANK_FAST_INLINE Activated activate(float x) {
  if constexpr (kActivation == Activation::kTanh) {
    const float y = tanh_of(x);
    return {y, 1.0f - y * y};
  } else if constexpr (kActivation == Activation::kGelu) {
    const float exponential = exp_negative(0.5f * x * x), cdf = normal_cdf(x, exponential);
    return {x * cdf, cdf + x * exponential * 0.398942280f};
  } else if constexpr (kActivation == Activation::kRelu) {
    return {x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};  // NaN stays NaN
  } else {
    return {x, 1.0f};
  }
}

RERANK_FAST_INLINE float factor(const Dropout& dropout, std::uint32_t row, std::int32_t column) {
  return Dropout::draw(row, static_cast<std::uint32_t>(column)) < dropout.threshold ? 0.0f : dropout.rescale;
}

template <bool kBf16>
RERANK_FAST_INLINE void copy_row(const Dropout& dropout, std::uint32_t stream, std::int32_t width,
                                 const Stored<kBf16>* from, Stored<kBf16>* to) {
  if (dropout.threshold == 0) {
    if (from != to) std::memcpy(to, from, static_cast<std::size_t>(width) * sizeof *to);
    return;
  }
#pragma omp simd
  for (std::int32_t e = 0; e < width; ++e) to[e] = put<kBf16>(factor(dropout, stream, e) * get<kBf16>(from[e]));
}

template <bool kBf16>
RERANK_FAST_INLINE void gather_rows(const ScoreHeadShape& shape, const void* from, std::int64_t stride,
                                    const std::int64_t* index, void* x, std::int64_t begin, std::int64_t end) {
  const Dropout dropout(shape.dropout_in_p, shape.seed);
  for (std::int64_t row = begin; row < end; ++row)
    copy_row<kBf16>(dropout, dropout.row(1, static_cast<std::uint32_t>(row)), static_cast<std::int32_t>(shape.hidden),
                    static_cast<const Stored<kBf16>*>(from) + (index == nullptr ? row : index[row]) * stride,
                    static_cast<Stored<kBf16>*>(x) + row * shape.hidden);
}

RERANK_FAST_CLONES void gather_task(const ScoreHeadShape& shape, const void* from, std::int64_t stride,
                                    const std::int64_t* index, void* x, std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    gather_rows<true>(shape, from, stride, index, x, begin, end);
  } else {
    gather_rows<false>(shape, from, stride, index, x, begin, end);
  }
}

template <bool kBf16, Activation kActivation>
RERANK_FAST_INLINE void dot_rows(const ScoreHeadShape& shape, const void* product, const float* weight,
                                 float out_bias, float* scores, std::int64_t begin,
                                 std::int64_t end) {
  const Dropout dropout(shape.dropout_p, shape.seed);
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* from = static_cast<const Stored<kBf16>*>(product) + row * shape.width;
    float sum = 0;
    if (dropout.threshold == 0) {
#pragma omp simd reduction(+ : sum)
      for (std::int32_t e = 0; e < width; ++e)
        sum += activate<kActivation>(get<kBf16>(from[e])).value * weight[e];
    } else {
      const std::uint32_t stream = dropout.row(0, static_cast<std::uint32_t>(row));
#pragma omp simd reduction(+ : sum)
      for (std::int32_t e = 0; e < width; ++e)
        sum += factor(dropout, stream, e) * activate<kActivation>(get<kBf16>(from[e])).value * weight[e];
    }
    scores[row] = sum + out_bias;
  }
}

template <bool kBf16, Activation kActivation>
RERANK_FAST_INLINE void dot_backward_rows(const ScoreHeadShape& shape, const void* product, void* grad_product,
                                          const float* weight, const float* grad_scores, float* grad_bias,
                                          float* grad_weight, std::int64_t begin, std::int64_t end) {
  const Dropout dropout(shape.dropout_p, shape.seed);
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* values = static_cast<const Stored<kBf16>*>(product) + row * shape.width;
    auto* grads = static_cast<Stored<kBf16>*>(grad_product) + row * shape.width;
    const float upstream = grad_scores[row];
    const std::uint32_t stream = dropout.row(0, static_cast<std::uint32_t>(row));
    if (dropout.threshold == 0) {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) {
        const Activated active = activate<kActivation>(get<kBf16>(values[e]));
        const float grad = upstream * weight[e] * active.slope;
        grad_weight[e] += upstream * active.value;
        grad_bias[e] += grad;
        grads[e] = put<kBf16>(grad);
      }
    } else {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) {
        const Activated active = activate<kActivation>(get<kBf16>(values[e]));
        const float kept = upstream * factor(dropout, stream, e), grad = kept * weight[e] * active.slope;
        grad_weight[e] += kept * active.value;
        grad_bias[e] += grad;
        grads[e] = put<kBf16>(grad);
      }
    }
  }
}

template <Activation kActivation>
RERANK_FAST_INLINE void dot_typed(const ScoreHeadShape& shape, const void* product, const float* weight,
                                  float out_bias, float* scores, std::int64_t begin,
                                  std::int64_t end) {
  if (shape.bf16) {
    dot_rows<true, kActivation>(shape, product, weight, out_bias, scores, begin, end);
  } else {
    dot_rows<false, kActivation>(shape, product, weight, out_bias, scores, begin, end);
  }
}

RERANK_FAST_CLONES void dot_task(const ScoreHeadShape& shape, const void* product, const float* weight,
                                 float out_bias, float* scores, std::int64_t begin,
                                 std::int64_t end) {
  switch (shape.activation) {
    case Activation::kNone:
      return dot_typed<Activation::kNone>(shape, product, weight, out_bias, scores, begin, end);
    case Activation::kTanh:
      return dot_typed<Activation::kTanh>(shape, product, weight, out_bias, scores, begin, end);
    case Activation::kGelu:
      return dot_typed<Activation::kGelu>(shape, product, weight, out_bias, scores, begin, end);
    case Activation::kRelu:
      return dot_typed<Activation::kRelu>(shape, product, weight, out_bias, scores, begin, end);
  }
}

template <Activation kActivation>
RERANK_FAST_INLINE void dot_backward_typed(const ScoreHeadShape& shape, const void* product, void* grad_product,
                                           const float* weight, const float* grad_scores, float* grad_bias,
                                           float* grad_weight, std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    dot_backward_rows<true, kActivation>(shape, product, grad_product, weight, grad_scores, grad_bias, grad_weight,
                                         begin, end);
  } else {
    dot_backward_rows<false, kActivation>(shape, product, grad_product, weight, grad_scores, grad_bias, grad_weight,
                                          begin,
                                          end);
  }
}

RERANK_FAST_CLONES void dot_backward_task(const ScoreHeadShape& shape, const void* product, void* grad_product,
                                          const float* weight, const float* grad_scores, float* grad_bias,
                                          float* grad_weight, std::int64_t begin, std::int64_t end) {
  switch (shape.activation) {
    case Activation::kNone:
      return dot_backward_typed<Activation::kNone>(shape, product, grad_product, weight, grad_scores, grad_bias,
                                                   grad_weight,
                                                   begin, end);
    case Activation::kTanh:
      return dot_backward_typed<Activation::kTanh>(shape, product, grad_product, weight, grad_scores, grad_bias,
                                                   grad_weight,
                                                   begin, end);
    case Activation::kGelu:
      return dot_backward_typed<Activation::kGelu>(shape, product, grad_product, weight, grad_scores, grad_bias,
                                                   grad_weight,
                                                   begin, end);
    case Activation::kRelu:
      return dot_backward_typed<Activation::kRelu>(shape, product, grad_product, weight, grad_scores, grad_bias,
                                                   grad_weight,
                                                   begin, end);
  }
}

// Calls task(number, first row, row past the last) for all rows.
template <typename Task>
void for_rows(const ScoreHeadShape& shape, Task&& task) {
  parallel_for(shape.num_threads, (shape.rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t number) {
    task(number, number * kRowsPerTask, std::min((number + 1) * kRowsPerTask, shape.rows));
  });
}

}  // namespace

void score_head_gather(const ScoreHeadShape& shape, const void* from, std::int64_t stride, const std::int64_t* index,
                       void* x) {
  for_rows(shape, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    gather_task(shape, from, stride, index, x, begin, end);
  });
}

void score_head_dot(const ScoreHeadShape& shape, const void* product, const float* out_weight,
                    const float* out_bias, float* scores) {
  const float last = out_bias == nullptr ? 0.0f : *out_bias;
  for_rows(shape, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    dot_task(shape, product, out_weight, last, scores, begin, end);
  });
}

void score_head_dot_backward(const ScoreHeadShape& shape, const void* product, const float* out_weight,
                             const float* grad_scores, void* grad_product, float* grad_dense_bias,
                             float* grad_out_weight) {
  const std::int64_t tasks = (shape.rows + kRowsPerTask - 1) / kRowsPerTask, width = shape.width;
  // A task's sums for both vectors.
  static thread_local std::vector<float> memory;
  memory.assign(static_cast<std::size_t>(2 * tasks * width), 0.0f);
  float* const parts = memory.data();
  for_rows(shape, [&](std::int64_t task, std::int64_t begin, std::int64_t end) {
    float* part = parts + 2 * task * width;
    dot_backward_task(shape, product, grad_product, out_weight, grad_scores, part, part + width, begin, end);
  });
  std::fill_n(grad_dense_bias, width, 0.0f);
  std::fill_n(grad_out_weight, width, 0.0f);
  for (std::int64_t task = 0; task < tasks; ++task)
    for (std::int64_t e = 0; e < width; ++e) {
      grad_dense_bias[e] += parts[2 * task * width + e];
      grad_out_weight[e] += parts[(2 * task + 1) * width + e];
    }
}

}  // namespace rerank_fast
