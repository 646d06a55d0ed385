// Rows [begin, end) of activations to int8 and back.
#include "common/math.h"
#include "common/scratch.h"
#include "common/stored.h"
#include "rows/tasks.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

RERANK_FAST_INLINE float highest(float a, float b) { return a < b ? b : a; }

// A row of fp32 to int8; largest is its largest magnitude.
RERANK_FAST_INLINE void quantize(const float* from, std::int32_t width, float largest, const Int8Rows& rows,
                                 std::int64_t row) {
  const auto most = static_cast<float>(rows.levels);
  std::uint8_t* const to = rows.values + row * width;
  rows.scale[row] = largest / most;
  // What is converted is never negative, so that the half in zero makes cutting it off rounding.
  const float inverse = largest > 0 ? most / largest : 0.0f, zero = most + 1.5f;
#pragma omp simd
  for (std::int32_t e = 0; e < width; ++e)
    to[e] = static_cast<std::uint8_t>(static_cast<std::int32_t>(from[e] * inverse + zero));
}

// Room for one row of fp32, kept by its thread.
float* row_memory(std::int32_t width) {
  static thread_local Scratch<float> kept;
  return kept.room(width);
}

template <bool kBf16>
RERANK_FAST_INLINE const typename Stored<kBf16>::type* row_of(const void* x, std::int64_t row, std::int64_t width) {
  return static_cast<const typename Stored<kBf16>::type*>(x) + row * width;
}

template <bool kBf16>
RERANK_FAST_INLINE void quantize_each(const Int8RowsShape& shape, const void* x, const Int8Rows& to,
                                      std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  float* const values = row_memory(width);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const from = row_of<kBf16>(x, row, width);
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = Stored<kBf16>::get(from[e]);
      values[e] = value;
      largest = highest(largest, __builtin_fabsf(value));
    }
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void gelu_each(const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to, std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const float* const bias = product.bias;
  float* const values = row_memory(width);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const from = row_of<kBf16>(product.x, row, width);
    const float factor = product.row_scale[row];
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int32_t e = 0; e < width; ++e) {
      values[e] = gelu_coarse(Stored<kBf16>::get(from[e]) * factor + bias[e]);
      largest = highest(largest, __builtin_fabsf(values[e]));
    }
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void norm_each(const Int8RowsShape& shape, const Int8Product& product, const Int8Norm& norm, const Int8Rows& to,
                                  std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const float* const bias = product.bias;
  const float *weight = norm.weight, *shift = norm.bias;
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const from = row_of<kBf16>(product.x, row, width);
    const float factor = product.row_scale[row], *residual = norm.residual + row * width;
    float* const values = norm.y + row * width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = residual[e] + (Stored<kBf16>::get(from[e]) * factor + bias[e]);
      values[e] = value;
      sum += value;
    }
    const float mean = sum / static_cast<float>(width);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int32_t e = 0; e < width; ++e) squares += (values[e] - mean) * (values[e] - mean);
    const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + static_cast<float>(norm.eps));
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = (values[e] - mean) * rstd * weight[e] + shift[e];
      values[e] = value;
      largest = highest(largest, __builtin_fabsf(value));
    }
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void scale_each(const Int8RowsShape& shape, const Int8Product& product, void* x,
                                   std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const float* const bias = product.bias;
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const from = row_of<kBf16>(product.x, row, width);
    auto* const to = static_cast<typename Stored<kBf16>::type*>(x) + row * width;
    const float factor = product.row_scale[row];
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e)
      to[e] = Stored<kBf16>::put(Stored<kBf16>::get(from[e]) * factor + bias[e]);
  }
}

}  // namespace

void int8_quantize_rows(const Int8RowsShape& shape, const void* x, const Int8Rows& to, std::int64_t begin,
                        std::int64_t end) {
  shape.bf16 ? quantize_each<true>(shape, x, to, begin, end) : quantize_each<false>(shape, x, to, begin, end);
}

void int8_scale_rows(const Int8RowsShape& shape, const Int8Product& product, void* x, std::int64_t begin,
                     std::int64_t end) {
  shape.bf16 ? scale_each<true>(shape, product, x, begin, end) : scale_each<false>(shape, product, x, begin, end);
}

void int8_gelu_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to, std::int64_t begin,
                    std::int64_t end) {
  shape.bf16 ? gelu_each<true>(shape, product, to, begin, end) : gelu_each<false>(shape, product, to, begin, end);
}

void int8_norm_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Norm& norm, const Int8Rows& to,
                    std::int64_t begin, std::int64_t end) {
  shape.bf16 ? norm_each<true>(shape, product, norm, to, begin, end)
             : norm_each<false>(shape, product, norm, to, begin, end);
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
