// The score head's rows [begin, end).
#include "common/math.h"
#include "common/dropout.h"
#include "common/stored.h"
#include "rows/tasks.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

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

template <bool kBf16>
void gather(const ScoreHeadShape& shape, const ScoreHeadGather& tensors, std::int64_t begin, std::int64_t end) {
  using Value = typename Stored<kBf16>::type;
  const Dropout dropout(shape.dropout_in_p, shape.seed);
  const auto width = static_cast<std::int32_t>(shape.hidden);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const from = static_cast<const Value*>(tensors.from) +
                             (tensors.index == nullptr ? row : tensors.index[row]) * tensors.stride;
    auto* const to = static_cast<Value*>(tensors.x) + row * width;
    if (dropout.threshold == 0) {
      if (from != to) std::memcpy(to, from, static_cast<std::size_t>(width) * sizeof *to);
      continue;
    }
    const std::uint32_t stream = dropout.row(1, static_cast<std::uint32_t>(row));
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e)
      to[e] = Stored<kBf16>::put(dropout.factor(stream, e) * Stored<kBf16>::get(from[e]));
  }
}

template <bool kBf16, Activation kActivation>
void dot(const ScoreHeadShape& shape, const ScoreHeadDot& tensors, std::int64_t begin, std::int64_t end) {
  const Dropout dropout(shape.dropout_p, shape.seed);
  const auto width = static_cast<std::int32_t>(shape.width);
  const float* const weight = tensors.out_weight;
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* from = static_cast<const typename Stored<kBf16>::type*>(tensors.product) + row * width;
    float sum = 0;
    if (dropout.threshold == 0) {
#pragma omp simd reduction(+ : sum)
      for (std::int32_t e = 0; e < width; ++e)
        sum += activate<kActivation>(Stored<kBf16>::get(from[e])).value * weight[e];
    } else {
      const std::uint32_t stream = dropout.row(0, static_cast<std::uint32_t>(row));
#pragma omp simd reduction(+ : sum)
      for (std::int32_t e = 0; e < width; ++e)
        sum += dropout.factor(stream, e) * activate<kActivation>(Stored<kBf16>::get(from[e])).value * weight[e];
    }
    tensors.scores[row] = sum + (tensors.out_bias == nullptr ? 0.0f : *tensors.out_bias);
  }
}

template <bool kBf16, Activation kActivation>
void dot_backward(const ScoreHeadShape& shape, const ScoreHeadDotBackward& tensors, std::int64_t begin,
                  std::int64_t end) {
  const Dropout dropout(shape.dropout_p, shape.seed);
  const auto width = static_cast<std::int32_t>(shape.width);
  const float* const weight = tensors.out_weight;
  float *const grad_weight = tensors.grad_out_weight, *const grad_bias = tensors.grad_dense_bias;
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* values = static_cast<const typename Stored<kBf16>::type*>(tensors.product) + row * width;
    auto* grads = static_cast<typename Stored<kBf16>::type*>(tensors.grad_product) + row * width;
    const float upstream = tensors.grad_scores[row];
    const std::uint32_t stream = dropout.row(0, static_cast<std::uint32_t>(row));
    if (dropout.threshold == 0) {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) {
        const Activated active = activate<kActivation>(Stored<kBf16>::get(values[e]));
        const float grad = upstream * weight[e] * active.slope;
        grad_weight[e] += upstream * active.value;
        grad_bias[e] += grad;
        grads[e] = Stored<kBf16>::put(grad);
      }
    } else {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) {
        const Activated active = activate<kActivation>(Stored<kBf16>::get(values[e]));
        const float kept = upstream * dropout.factor(stream, e), grad = kept * weight[e] * active.slope;
        grad_weight[e] += kept * active.value;
        grad_bias[e] += grad;
        grads[e] = Stored<kBf16>::put(grad);
      }
    }
  }
}

template <bool kBf16>
void dot_activated(const ScoreHeadShape& shape, const ScoreHeadDot& tensors, std::int64_t begin, std::int64_t end) {
  switch (shape.activation) {
    case Activation::kNone:
      return dot<kBf16, Activation::kNone>(shape, tensors, begin, end);
    case Activation::kTanh:
      return dot<kBf16, Activation::kTanh>(shape, tensors, begin, end);
    case Activation::kGelu:
      return dot<kBf16, Activation::kGelu>(shape, tensors, begin, end);
    case Activation::kRelu:
      return dot<kBf16, Activation::kRelu>(shape, tensors, begin, end);
  }
}

template <bool kBf16>
void dot_activated_backward(const ScoreHeadShape& shape, const ScoreHeadDotBackward& tensors, std::int64_t begin,
                            std::int64_t end) {
  switch (shape.activation) {
    case Activation::kNone:
      return dot_backward<kBf16, Activation::kNone>(shape, tensors, begin, end);
    case Activation::kTanh:
      return dot_backward<kBf16, Activation::kTanh>(shape, tensors, begin, end);
    case Activation::kGelu:
      return dot_backward<kBf16, Activation::kGelu>(shape, tensors, begin, end);
    case Activation::kRelu:
      return dot_backward<kBf16, Activation::kRelu>(shape, tensors, begin, end);
  }
}

}  // namespace

void score_head_gather_rows(const ScoreHeadShape& shape, const ScoreHeadGather& tensors, std::int64_t begin,
                            std::int64_t end) {
  shape.bf16 ? gather<true>(shape, tensors, begin, end) : gather<false>(shape, tensors, begin, end);
}

void score_head_dot_rows(const ScoreHeadShape& shape, const ScoreHeadDot& tensors, std::int64_t begin,
                         std::int64_t end) {
  shape.bf16 ? dot_activated<true>(shape, tensors, begin, end) : dot_activated<false>(shape, tensors, begin, end);
}

void score_head_dot_backward_rows(const ScoreHeadShape& shape, const ScoreHeadDotBackward& tensors,
                                  std::int64_t begin, std::int64_t end) {
  shape.bf16 ? dot_activated_backward<true>(shape, tensors, begin, end)
             : dot_activated_backward<false>(shape, tensors, begin, end);
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
