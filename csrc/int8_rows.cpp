#include "int8_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "numeric.h"
#include "threads.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 32;

// Room for one row of fp32, kept by its thread.
float* row_memory(std::int32_t width) {
  static thread_local std::vector<float> kept;
  if (kept.size() < static_cast<std::size_t>(width)) kept.resize(static_cast<std::size_t>(width));
  return kept.data();
}

// The exact GELU to 5e-5, and to 3e-5 |x| beyond 4: far below a level of a row that holds such values.
RERANK_FAST_INLINE float gelu(float x) {
  const float near = std::min(std::max(x, -4.0f), 4.0f), square = near * near;
  float p = -1.3012772e-09f;
  p = p * square + 1.04195045e-07f;
  p = p * square - 3.6571098e-06f;
  p = p * square + 7.48547754e-05f;
  p = p * square - 0.00100648869f;
  p = p * square + 0.00950539205f;
  p = p * square - 0.0658878312f;
  p = p * square + 0.398673385f;
  return x * (0.5f + near * p);
}

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

// One row of x in fp32.
template <bool kBf16>
struct RowOf {
  const std::uint16_t* narrow_x;
  const float* wide_x;

  RowOf(const void* x, std::int64_t row, std::int64_t width)
      : narrow_x(static_cast<const std::uint16_t*>(x) + row * width),
        wide_x(static_cast<const float*>(x) + row * width) {}

  RERANK_FAST_INLINE float operator[](std::int32_t e) const { return kBf16 ? widen(narrow_x[e]) : wide_x[e]; }
};

template <bool kBf16>
RERANK_FAST_INLINE void quantize_each(const Int8RowsShape& shape, const void* x, const Int8Rows& to,
                                      std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  float* const values = row_memory(width);
  for (std::int64_t row = begin; row < end; ++row) {
    const RowOf<kBf16> from(x, row, width);
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = from[e];
      values[e] = value;
      largest = std::max(largest, std::fabs(value));
    }
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void gelu_each(const Int8RowsShape& shape, const void* x, const float* row_scale,
                                  const float* bias, const Int8Rows& to, std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  float* const values = row_memory(width);
  for (std::int64_t row = begin; row < end; ++row) {
    const RowOf<kBf16> from(x, row, width);
    const float factor = row_scale[row];
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int32_t e = 0; e < width; ++e) {
      values[e] = gelu(from[e] * factor + bias[e]);
      largest = std::max(largest, std::fabs(values[e]));
    }
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void norm_each(const Int8RowsShape& shape, const void* x, const float* row_scale,
                                  const float* bias, const Int8Norm& norm, float* y, const Int8Rows& to,
                                  std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const float *weight = norm.weight, *shift = norm.bias;
  for (std::int64_t row = begin; row < end; ++row) {
    const RowOf<kBf16> from(x, row, width);
    const float factor = row_scale[row], *residual = norm.residual + row * width;
    float* const values = y + row * width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = residual[e] + (from[e] * factor + bias[e]);
      values[e] = value;
      sum += value;
    }
    const float mean = sum / static_cast<float>(width);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int32_t e = 0; e < width; ++e) squares += (values[e] - mean) * (values[e] - mean);
    const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(width) + static_cast<float>(norm.eps));
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = (values[e] - mean) * rstd * weight[e] + shift[e];
      values[e] = value;
      largest = std::max(largest, std::fabs(value));
    }
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void scale_each(const Int8RowsShape& shape, void* x, const float* row_scale, const float* bias,
                                   std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    const RowOf<kBf16> from(x, row, width);
    auto* narrow_x = static_cast<std::uint16_t*>(x) + row * width;
    auto* wide_x = static_cast<float*>(x) + row * width;
    const float factor = row_scale[row];
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = from[e] * factor + bias[e];
      if constexpr (kBf16) {
        narrow_x[e] = narrow(value);
      } else {
        wide_x[e] = value;
      }
    }
  }
}

RERANK_FAST_CLONES void quantize_task(const Int8RowsShape& shape, const void* x, const Int8Rows& to,
                                      std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    quantize_each<true>(shape, x, to, begin, end);
  } else {
    quantize_each<false>(shape, x, to, begin, end);
  }
}

RERANK_FAST_CLONES void gelu_task(const Int8RowsShape& shape, const void* x, const float* row_scale,
                                  const float* bias, const Int8Rows& to, std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    gelu_each<true>(shape, x, row_scale, bias, to, begin, end);
  } else {
    gelu_each<false>(shape, x, row_scale, bias, to, begin, end);
  }
}

RERANK_FAST_CLONES void norm_task(const Int8RowsShape& shape, const void* x, const float* row_scale,
                                  const float* bias, const Int8Norm& norm, float* y, const Int8Rows& to,
                                  std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    norm_each<true>(shape, x, row_scale, bias, norm, y, to, begin, end);
  } else {
    norm_each<false>(shape, x, row_scale, bias, norm, y, to, begin, end);
  }
}

RERANK_FAST_CLONES void scale_task(const Int8RowsShape& shape, void* x, const float* row_scale, const float* bias,
                                   std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    scale_each<true>(shape, x, row_scale, bias, begin, end);
  } else {
    scale_each<false>(shape, x, row_scale, bias, begin, end);
  }
}

template <typename Task>
void for_rows(const Int8RowsShape& shape, Task&& task) {
  parallel_for(shape.num_threads, (shape.rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t index) {
    task(index * kRowsPerTask, std::min((index + 1) * kRowsPerTask, shape.rows));
  });
}

}  // namespace

void quantize_rows(const Int8RowsShape& shape, const void* x, const Int8Rows& to) {
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) { quantize_task(shape, x, to, begin, end); });
}

void scale_rows(const Int8RowsShape& shape, void* x, const float* row_scale, const float* bias) {
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) { scale_task(shape, x, row_scale, bias, begin, end); });
}

void gelu_rows(const Int8RowsShape& shape, const void* x, const float* row_scale, const float* bias,
               const Int8Rows& to) {
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) {
    gelu_task(shape, x, row_scale, bias, to, begin, end);
  });
}

void norm_rows(const Int8RowsShape& shape, const void* x, const float* row_scale, const float* bias,
               const Int8Norm& norm, float* y, const Int8Rows& to) {
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) {
    norm_task(shape, x, row_scale, bias, norm, y, to, begin, end);
  });
}

}  // namespace rerank_fast
