#include "int8_rows.h"

#include <cmath>

#include "numeric.h"
#include "threads.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 32;

template <bool kBf16>
RERANK_FAST_INLINE void quantize(const Int8RowsShape& shape, const void* x, int levels, std::uint8_t* quantized,
                                 float* scale, std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  const auto most = static_cast<float>(levels);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* narrow_x = static_cast<const std::uint16_t*>(x) + row * width;
    const auto* wide_x = static_cast<const float*>(x) + row * width;
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int32_t e = 0; e < width; ++e)
      largest = std::max(largest, std::fabs(kBf16 ? widen(narrow_x[e]) : wide_x[e]));
    scale[row] = largest / most;
    const float inverse = largest > 0 ? most / largest : 0.0f, zero = most + 1.5f;
    std::uint8_t* to = quantized + row * width;
    // What is converted is never negative, so that the half in zero makes cutting it off rounding.
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = (kBf16 ? widen(narrow_x[e]) : wide_x[e]) * inverse + zero;
      to[e] = static_cast<std::uint8_t>(static_cast<std::int32_t>(value));
    }
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void scale(const Int8RowsShape& shape, void* x, const float* row_scale, const float* bias,
                              std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int32_t>(shape.width);
  for (std::int64_t row = begin; row < end; ++row) {
    auto* narrow_x = static_cast<std::uint16_t*>(x) + row * width;
    auto* wide_x = static_cast<float*>(x) + row * width;
    const float factor = row_scale[row];
#pragma omp simd
    for (std::int32_t e = 0; e < width; ++e) {
      const float value = (kBf16 ? widen(narrow_x[e]) : wide_x[e]) * factor + (bias == nullptr ? 0.0f : bias[e]);
      if constexpr (kBf16) {
        narrow_x[e] = narrow(value);
      } else {
        wide_x[e] = value;
      }
    }
  }
}

RERANK_FAST_CLONES void quantize_task(const Int8RowsShape& shape, const void* x, int levels, std::uint8_t* quantized,
                                      float* scales, std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    quantize<true>(shape, x, levels, quantized, scales, begin, end);
  } else {
    quantize<false>(shape, x, levels, quantized, scales, begin, end);
  }
}

RERANK_FAST_CLONES void scale_task(const Int8RowsShape& shape, void* x, const float* row_scale, const float* bias,
                                   std::int64_t begin, std::int64_t end) {
  if (shape.bf16) {
    scale<true>(shape, x, row_scale, bias, begin, end);
  } else {
    scale<false>(shape, x, row_scale, bias, begin, end);
  }
}

template <typename Task>
void for_rows(const Int8RowsShape& shape, Task&& task) {
  parallel_for(shape.num_threads, (shape.rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t index) {
    task(index * kRowsPerTask, std::min((index + 1) * kRowsPerTask, shape.rows));
  });
}

}  // namespace

void quantize_rows(const Int8RowsShape& shape, const void* x, int levels, std::uint8_t* quantized, float* scales) {
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) {
    quantize_task(shape, x, levels, quantized, scales, begin, end);
  });
}

void scale_rows(const Int8RowsShape& shape, void* x, const float* row_scale, const float* bias) {
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) { scale_task(shape, x, row_scale, bias, begin, end); });
}

}  // namespace rerank_fast
