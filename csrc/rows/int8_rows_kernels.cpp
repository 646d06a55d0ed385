// Rows [begin, end) of activations to int8 and back.
#include "common/math.h"
#include "common/scratch.h"
#include "common/stored.h"
#include "rows/tasks.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

using Vector = Lanes<float>;

// Where a row is worked on: what other rows have in the same columns, a register of them or one.
struct RegisterAt {
  std::int64_t column;
  RERANK_FAST_INLINE Vector operator()(const float* row) const { return load(row + column); }
};
struct ValueAt {
  std::int64_t column;
  RERANK_FAST_INLINE float operator()(const float* row) const { return row[column]; }
};

// The magnitudes' bits: their order as whole numbers is that of the magnitudes, with infinity and
// then NaN above all.
template <typename V>
RERANK_FAST_INLINE typename BitsOf<V>::type magnitude(V x) {
  return same_bits<typename BitsOf<V>::type>(x) & 0x7fffffffu;
}

template <typename V>
RERANK_FAST_INLINE V higher(V a, V b) {
  return a < b ? b : a;
}

// to = function(from, at) of a row, and the largest magnitude in it: NaN where there is one.
template <bool kBf16, typename Function>
RERANK_FAST_INLINE float map_row(const typename Stored<kBf16>::type* from, std::int64_t width, float* to,
                                 Function function) {
  Lanes<std::uint32_t> largest{};
  std::int64_t e = 0;
  for (; e + kLanes <= width; e += kLanes) {
    const Vector value = function(load_wide<kBf16>(from + e), RegisterAt{e});
    store(value, to + e);
    largest = higher(largest, magnitude(value));
  }
  std::uint32_t top = maximum<std::uint32_t>(largest);
  for (; e < width; ++e) {
    to[e] = function(Stored<kBf16>::get(from[e]), ValueAt{e});
    top = higher(top, magnitude(to[e]));
  }
  return same_bits<float>(top);
}

// The sum of function(row, at) over a row of fp32.
template <typename Function>
RERANK_FAST_INLINE float sum_row(const float* row, std::int64_t width, Function function) {
  Vector sums{};
  std::int64_t e = 0;
  for (; e + kLanes <= width; e += kLanes) sums += function(load(row + e));
  float total = sum<float>(sums);
  for (; e < width; ++e) total += function(row[e]);
  return total;
}

// A row of fp32 to int8; largest is its largest magnitude. Where that is no number, the scale is
// NaN and the row 0.
RERANK_FAST_INLINE void quantize(const float* from, std::int64_t width, float largest, const Int8Rows& rows,
                                 std::int64_t row) {
  const auto most = static_cast<float>(rows.levels);
  std::uint8_t* const to = rows.values + row * width;
  if (!(largest <= __FLT_MAX__)) {
    rows.scale[row] = __builtin_nanf("");
    return fill(to, width, static_cast<std::uint8_t>(rows.levels + 1));
  }
  rows.scale[row] = largest / most;
  // What is converted is never negative, so that the half in zero makes cutting it off rounding.
  const float inverse = most / higher(largest, most * __FLT_MIN__), zero = most + 1.5f;
#pragma omp simd
  for (std::int64_t e = 0; e < width; ++e)
    to[e] = static_cast<std::uint8_t>(static_cast<std::int32_t>(from[e] * inverse + zero));
}

// Room for one row of fp32, kept by its thread.
float* row_memory(std::int64_t width) {
  static thread_local Scratch<float> kept;
  return kept.room(width);
}

template <bool kBf16>
RERANK_FAST_INLINE const typename Stored<kBf16>::type* row_of(const void* x, std::int64_t row, std::int64_t width) {
  return static_cast<const typename Stored<kBf16>::type*>(x) + row * width;
}

template <bool kBf16>
void quantize_each(const Int8RowsShape& shape, const void* x, const Int8Rows& to, std::int64_t begin,
                   std::int64_t end) {
  const std::int64_t width = shape.width;
  float* const values = row_memory(width);
  for (std::int64_t row = begin; row < end; ++row) {
    const float largest = map_row<kBf16>(row_of<kBf16>(x, row, width), width, values, [](auto value, auto) {
      return value;
    });
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
void gelu_each(const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to, std::int64_t begin,
               std::int64_t end) {
  const std::int64_t width = shape.width;
  float* const values = row_memory(width);
  for (std::int64_t row = begin; row < end; ++row) {
    const float factor = product.row_scale[row];
    const auto* const from = row_of<kBf16>(product.x, row, width);
    const float largest = map_row<kBf16>(from, width, values, [&](auto value, auto at) {
      return gelu_coarse(value * factor + at(product.bias));
    });
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
void norm_each(const Int8RowsShape& shape, const Int8Product& product, const Int8Norm& norm, const Int8Rows& to,
               std::int64_t begin, std::int64_t end) {
  const std::int64_t width = shape.width;
  const auto count = static_cast<float>(width), eps = static_cast<float>(norm.eps);
  for (std::int64_t row = begin; row < end; ++row) {
    const float factor = product.row_scale[row], *residual = norm.residual + row * width;
    float* const values = norm.y + row * width;
    map_row<kBf16>(row_of<kBf16>(product.x, row, width), width, values, [&](auto value, auto at) {
      return at(residual) + (value * factor + at(product.bias));
    });
    const float mean = sum_row(values, width, [](auto value) { return value; }) / count;
    const float squares = sum_row(values, width, [mean](auto value) { return (value - mean) * (value - mean); });
    const float rstd = 1.0f / __builtin_sqrtf(squares / count + eps);
    const float largest = map_row<false>(values, width, values, [&](auto value, auto at) {
      return (value - mean) * rstd * at(norm.weight) + at(norm.bias);
    });
    quantize(values, width, largest, to, row);
  }
}

template <bool kBf16>
void scale_each(const Int8RowsShape& shape, const Int8Product& product, void* x, std::int64_t begin,
                std::int64_t end) {
  const std::int64_t width = shape.width;
  const float* const bias = product.bias;
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* const from = row_of<kBf16>(product.x, row, width);
    auto* const to = static_cast<typename Stored<kBf16>::type*>(x) + row * width;
    const float factor = product.row_scale[row];
    std::int64_t e = 0;
    for (; e + kLanes <= width; e += kLanes)
      store_narrow<kBf16>(load_wide<kBf16>(from + e) * factor + load(bias + e), to + e);
    for (; e < width; ++e) to[e] = Stored<kBf16>::put(Stored<kBf16>::get(from[e]) * factor + bias[e]);
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
