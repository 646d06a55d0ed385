// Between the products of a pre-norm layer: sum and norm, rotary positions and gates, rows [begin, end).
#include "common/math.h"
#include "common/stored.h"
#include "rows/tasks.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

template <bool kBf16>
using Value = typename Stored<kBf16>::type;

// One over the root mean square of a row.
template <bool kBf16>
RERANK_FAST_INLINE float rms_scale(const Value<kBf16>* row, std::int32_t size, double eps) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (std::int32_t e = 0; e < size; ++e) squares += Stored<kBf16>::get(row[e]) * Stored<kBf16>::get(row[e]);
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(size) + static_cast<float>(eps));
}

template <bool kBf16>
RERANK_FAST_INLINE void add_norm_each(const AddNormShape& shape, const AddNormForward& tensors, std::int64_t begin,
                                      std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const auto count = static_cast<float>(width);
  const float *const weight = tensors.weight, *const bias = tensors.bias;
  for (std::int64_t row = begin; row < end; ++row) {
    const float* own = tensors.residual + row * width;
    if (tensors.x != nullptr) {
      const auto* x = static_cast<const Value<kBf16>*>(tensors.x) + row * width;
      float* const total = tensors.total + row * width;
      if (tensors.x_weight == nullptr) {
#pragma omp simd
        for (std::int32_t e = 0; e < width; ++e) total[e] = own[e] + Stored<kBf16>::get(x[e]);
      } else {
        const float* const x_weight = tensors.x_weight;
        const float scale = tensors.x_rstd[row] = rms_scale<kBf16>(x, width, shape.x_eps);
#pragma omp simd
        for (std::int32_t e = 0; e < width; ++e) total[e] = own[e] + Stored<kBf16>::get(x[e]) * scale * x_weight[e];
      }
      own = total;
    }
    float middle = 0;
    if (shape.centered) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int32_t e = 0; e < width; ++e) sum += own[e];
      tensors.mean[row] = middle = sum / count;
    }
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int32_t e = 0; e < width; ++e) squares += (own[e] - middle) * (own[e] - middle);
    const float scale = 1.0f / __builtin_sqrtf(squares / count + static_cast<float>(shape.eps));
    tensors.rstd[row] = scale;
    auto* const to = static_cast<Value<kBf16>*>(tensors.normed) + row * width;
    if (bias == nullptr) {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) to[e] = Stored<kBf16>::put((own[e] - middle) * scale * weight[e]);
    } else {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e)
        to[e] = Stored<kBf16>::put((own[e] - middle) * scale * weight[e] + bias[e]);
    }
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void add_norm_backward_each(const AddNormShape& shape, const AddNormBackward& tensors, float* sums,
                                               std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const auto count = static_cast<float>(width);
  const float* const weight = tensors.weight;
  float* const bias_sums = sums + width;
  float* const x_sums = shape.centered ? bias_sums + width : bias_sums;
  fill(sums, (tensors.x == nullptr ? x_sums : x_sums + width) - sums, 0.0f);
  for (std::int64_t row = begin; row < end; ++row) {
    const float* const total = tensors.total + row * width;
    const auto* const grad = static_cast<const Value<kBf16>*>(tensors.grad_normed) + row * width;
    float* const to = tensors.grad_residual + row * width;
    const float middle = shape.centered ? tensors.mean[row] : 0.0f, scale = tensors.rstd[row];
    float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (std::int32_t e = 0; e < width; ++e) {
      const float unit = (total[e] - middle) * scale, g = Stored<kBf16>::get(grad[e]), weighted = g * weight[e];
      sums[e] += g * unit;
      sum += weighted;
      along += weighted * unit;
    }
    if (shape.centered) {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) bias_sums[e] += Stored<kBf16>::get(grad[e]);
    }
    const float mean_grad = shape.centered ? sum / count : 0.0f, mean_along = along / count;
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float unit = (total[e] - middle) * scale;
      to[e] = scale * (Stored<kBf16>::get(grad[e]) * weight[e] - mean_grad - unit * mean_along);
    }
    if (tensors.grad_total != nullptr) {
      const float* const grad_total = tensors.grad_total + row * width;
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) to[e] += grad_total[e];
    }
    if (tensors.grad_x == nullptr) continue;
    auto* const grad_x = static_cast<Value<kBf16>*>(tensors.grad_x) + row * width;
    if (tensors.x == nullptr) {
#pragma omp simd
      for (std::int32_t e = 0; e < width; ++e) grad_x[e] = Stored<kBf16>::put(to[e]);
      continue;
    }
    const auto* const x = static_cast<const Value<kBf16>*>(tensors.x) + row * width;
    const float* const x_weight = tensors.x_weight;
    const float x_scale = tensors.x_rstd[row];
    float x_along = 0;
#pragma omp simd reduction(+ : x_along)
    for (std::int32_t e = 0; e < width; ++e) {
      const float unit = Stored<kBf16>::get(x[e]) * x_scale;
      x_sums[e] += to[e] * unit;
      x_along += to[e] * x_weight[e] * unit;
    }
    x_along /= count;
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float unit = Stored<kBf16>::get(x[e]) * x_scale;
      grad_x[e] = Stored<kBf16>::put(x_scale * (to[e] * x_weight[e] - unit * x_along));
    }
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void rotary_each(const RotaryShape& shape, const Rotary& tensors, std::int64_t begin,
                                    std::int64_t end) {
  const auto size = static_cast<std::int32_t>(shape.head_size);
  const std::int32_t half = size / 2;
  for (std::int64_t row = begin; row < end; ++row) {
    const float *const cosines = tensors.cosines + row * size, *const sines = tensors.sines + row * size;
    for (std::int64_t head = 0; head < shape.heads; ++head) {
      const auto* const x = static_cast<const Value<kBf16>*>(tensors.x) + row * shape.stride + head * size;
      auto* const out = static_cast<Value<kBf16>*>(tensors.out) + row * shape.other_stride + head * size;
      if (tensors.weights == nullptr) {
#pragma omp simd
        for (std::int32_t e = 0; e < half; ++e) {
          const float left = Stored<kBf16>::get(x[e]), right = Stored<kBf16>::get(x[e + half]);
          out[e] = Stored<kBf16>::put(left * cosines[e] - right * sines[e]);
          out[e + half] = Stored<kBf16>::put(right * cosines[e + half] + left * sines[e + half]);
        }
        continue;
      }
      const float* const weight = tensors.weights + (head < shape.num_queries ? 0 : size);
      const float scale = rms_scale<kBf16>(x, size, shape.eps);
#pragma omp simd
      for (std::int32_t e = 0; e < half; ++e) {
        const float left = Stored<kBf16>::get(x[e]) * scale * weight[e];
        const float right = Stored<kBf16>::get(x[e + half]) * scale * weight[e + half];
        out[e] = Stored<kBf16>::put(left * cosines[e] - right * sines[e]);
        out[e + half] = Stored<kBf16>::put(right * cosines[e + half] + left * sines[e + half]);
      }
    }
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void rotary_backward_each(const RotaryShape& shape, const RotaryBackward& tensors, float* sums,
                                             std::int64_t begin, std::int64_t end) {
  const auto size = static_cast<std::int32_t>(shape.head_size);
  const std::int32_t half = size / 2;
  if (sums != nullptr) fill(sums, 2 * shape.head_size, 0.0f);
  for (std::int64_t row = begin; row < end; ++row) {
    const float *const cosines = tensors.cosines + row * size, *const sines = tensors.sines + row * size;
    for (std::int64_t head = 0; head < shape.heads; ++head) {
      auto* const grad = static_cast<Value<kBf16>*>(tensors.grad) + row * shape.stride + head * size;
      if (sums == nullptr) {
#pragma omp simd
        for (std::int32_t e = 0; e < half; ++e) {
          const float left = Stored<kBf16>::get(grad[e]), right = Stored<kBf16>::get(grad[e + half]);
          grad[e] = Stored<kBf16>::put(left * cosines[e] + right * sines[e + half]);
          grad[e + half] = Stored<kBf16>::put(right * cosines[e + half] - left * sines[e]);
        }
        continue;
      }
      const auto* const x = static_cast<const Value<kBf16>*>(tensors.x) + row * shape.other_stride + head * size;
      const std::int64_t first = head < shape.num_queries ? 0 : size;
      const float *const weight = tensors.weights + first, scale = rms_scale<kBf16>(x, size, shape.eps);
      float* const own = sums + first;
      float along = 0;
#pragma omp simd reduction(+ : along)
      for (std::int32_t e = 0; e < half; ++e) {
        const float left = Stored<kBf16>::get(grad[e]), right = Stored<kBf16>::get(grad[e + half]);
        const float d_left = left * cosines[e] + right * sines[e + half];
        const float d_right = right * cosines[e + half] - left * sines[e];
        const float unit_left = Stored<kBf16>::get(x[e]) * scale, unit_right = Stored<kBf16>::get(x[e + half]) * scale;
        own[e] += d_left * unit_left;
        own[e + half] += d_right * unit_right;
        along += d_left * weight[e] * unit_left + d_right * weight[e + half] * unit_right;
      }
      along /= static_cast<float>(size);
#pragma omp simd
      for (std::int32_t e = 0; e < half; ++e) {
        const float left = Stored<kBf16>::get(grad[e]), right = Stored<kBf16>::get(grad[e + half]);
        const float d_left = (left * cosines[e] + right * sines[e + half]) * weight[e];
        const float d_right = (right * cosines[e + half] - left * sines[e]) * weight[e + half];
        const float unit_left = Stored<kBf16>::get(x[e]) * scale, unit_right = Stored<kBf16>::get(x[e + half]) * scale;
        grad[e] = Stored<kBf16>::put(scale * (d_left - unit_left * along));
        grad[e + half] = Stored<kBf16>::put(scale * (d_right - unit_right * along));
      }
    }
  }
}

// A gate's activation is x * share.
struct Share {
  float share, slope;  // slope: of the activation
};

template <Gate kGate>
RERANK_FAST_INLINE Share share_of(float x) {
  if constexpr (kGate == Gate::kGelu) {
    const float exponential = exp_negative(0.5f * x * x), share = normal_cdf(x, exponential);
    return {share, share + 0.398942280f * x * exponential};
  } else {
    // The logistic function of x or, for (1 + tanh(u)) / 2, of 2 u.
    constexpr bool kTanh = kGate == Gate::kGeluTanh;
    const float below = x > 30.0f ? 30.0f : x, near = below < -30.0f ? -30.0f : below;  // whose cube is finite
    const float at = kTanh ? 1.59576912f * (near + 0.044715f * near * near * near) : x;
    const float t = exp_negative(absolute(at)), share = (at < 0.0f ? t : 1.0f) / (1.0f + t);
    const float rising = kTanh ? 1.59576912f + 0.214064449f * near * near : 1.0f;
    return {share, share + x * share * (1.0f - share) * rising};
  }
}

using GatedEach = void (*)(const GatedShape& shape, const void* gate_up, void* out, std::int64_t begin,
                           std::int64_t end);
using GatedBackwardEach = void (*)(const GatedShape& shape, const void* gate_up, const void* grad, void* grad_gate_up,
                                   std::int64_t begin, std::int64_t end);

template <bool kBf16, Gate kGate>
void gated_each(const GatedShape& shape, const void* gate_up, void* out, std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const gates = static_cast<const Value<kBf16>*>(gate_up) + 2 * row * width;
    const auto* const ups = gates + width;
    auto* const to = static_cast<Value<kBf16>*>(out) + row * width;
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float gate = Stored<kBf16>::get(gates[e]);
      to[e] = Stored<kBf16>::put(gate * share_of<kGate>(gate).share * Stored<kBf16>::get(ups[e]));
    }
  }
}

template <bool kBf16, Gate kGate>
void gated_backward_each(const GatedShape& shape, const void* gate_up, const void* grad, void* grad_gate_up,
                         std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const gates = static_cast<const Value<kBf16>*>(gate_up) + 2 * row * width;
    const auto* const ups = gates + width;
    const auto* const upstream = static_cast<const Value<kBf16>*>(grad) + row * width;
    auto* const to = static_cast<Value<kBf16>*>(grad_gate_up) + 2 * row * width;
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float gate = Stored<kBf16>::get(gates[e]), g = Stored<kBf16>::get(upstream[e]);
      const Share of = share_of<kGate>(gate);
      to[e] = Stored<kBf16>::put(g * Stored<kBf16>::get(ups[e]) * of.slope);
      to[e + width] = Stored<kBf16>::put(g * gate * of.share);
    }
  }
}

}  // namespace

void add_norm_rows(const AddNormShape& shape, const AddNormForward& tensors, std::int64_t begin, std::int64_t end) {
  shape.bf16 ? add_norm_each<true>(shape, tensors, begin, end) : add_norm_each<false>(shape, tensors, begin, end);
}

void add_norm_backward_rows(const AddNormShape& shape, const AddNormBackward& tensors, float* sums, std::int64_t begin,
                            std::int64_t end) {
  shape.bf16 ? add_norm_backward_each<true>(shape, tensors, sums, begin, end)
             : add_norm_backward_each<false>(shape, tensors, sums, begin, end);
}

void rotary_rows(const RotaryShape& shape, const Rotary& tensors, std::int64_t begin, std::int64_t end) {
  shape.bf16 ? rotary_each<true>(shape, tensors, begin, end) : rotary_each<false>(shape, tensors, begin, end);
}

void rotary_backward_rows(const RotaryShape& shape, const RotaryBackward& tensors, float* sums, std::int64_t begin,
                          std::int64_t end) {
  shape.bf16 ? rotary_backward_each<true>(shape, tensors, sums, begin, end)
             : rotary_backward_each<false>(shape, tensors, sums, begin, end);
}

void gated_rows(const GatedShape& shape, const void* gate_up, void* out, std::int64_t begin, std::int64_t end) {
  constexpr GatedEach kEach[][2] = {{gated_each<false, Gate::kGelu>, gated_each<true, Gate::kGelu>},
                                    {gated_each<false, Gate::kGeluTanh>, gated_each<true, Gate::kGeluTanh>},
                                    {gated_each<false, Gate::kSilu>, gated_each<true, Gate::kSilu>}};
  kEach[static_cast<int>(shape.gate)][shape.bf16 ? 1 : 0](shape, gate_up, out, begin, end);
}

void gated_backward_rows(const GatedShape& shape, const void* gate_up, const void* grad, void* grad_gate_up,
                         std::int64_t begin, std::int64_t end) {
  constexpr GatedBackwardEach kEach[][2] = {
      {gated_backward_each<false, Gate::kGelu>, gated_backward_each<true, Gate::kGelu>},
      {gated_backward_each<false, Gate::kGeluTanh>, gated_backward_each<true, Gate::kGeluTanh>},
      {gated_backward_each<false, Gate::kSilu>, gated_backward_each<true, Gate::kSilu>}};
  kEach[static_cast<int>(shape.gate)][shape.bf16 ? 1 : 0](shape, gate_up, grad, grad_gate_up, begin, end);
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
