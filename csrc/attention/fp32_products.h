// What kernels of attention by products in fp32 share: tiles of a product, rows read and written, softmax over a row.
#pragma once

#include "attention/sequence.h"
#include "common/math.h"
#include "common/stored.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

using Vector = Lanes<float>;

// A tile of a product: kRows rows of kVectors registers each are summed at once, with kVectors more for the right side
// and one for the left. Twelve or sixteen sums keep two multipliers of four cycles busy.
constexpr int kVectors = 2;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6;  // of 16
#else
constexpr int kRows = 4;  // of 16; without a fused multiplication and addition, products need some too
#endif
constexpr std::int64_t kColumns = kVectors * kLanes;
constexpr std::int64_t kBeyond = (kRows + kLanes - 1) / kLanes * kLanes;  // whole registers

// sum (kRows, kSome registers) += left (kRows, depth) x right (depth, columns). Row r of left at depth d is at
// r * row_stride + d * depth_stride.
template <int kSome>
RERANK_FAST_INLINE void add_product(const float* left, std::int64_t row_stride, std::int64_t depth_stride,
                                    const float* right, std::int64_t right_stride, std::int64_t depth,
                                    Vector (&sum)[kRows][kSome]) {
  for (std::int64_t d = 0; d < depth; ++d, left += depth_stride, right += right_stride) {
    Vector column[kSome];
#pragma GCC unroll 2
    for (int n = 0; n < kSome; ++n) column[n] = load(right + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector value = every_lane(left[r * row_stride]);
#pragma GCC unroll 2
      for (int n = 0; n < kSome; ++n) sum[r][n] += value * column[n];
    }
  }
}

// to (kRows, kSome registers) = left x right, or with kAdd that much more.
template <int kSome, bool kAdd>
RERANK_FAST_INLINE void tile(const float* left, std::int64_t row_stride, std::int64_t depth_stride,
                             const float* right, std::int64_t right_stride, std::int64_t depth, float* to,
                             std::int64_t to_stride) {
  Vector sum[kRows][kSome] = {};
  if constexpr (kAdd) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < kSome; ++n) sum[r][n] = load(to + r * to_stride + n * kLanes);
  }
  add_product<kSome>(left, row_stride, depth_stride, right, right_stride, depth, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < kSome; ++n) store(sum[r][n], to + r * to_stride + n * kLanes);
}

// The tile at every kColumns of the columns [from, to), or kLanes of them where no more are left: right and to are
// moved on by what a column is apart.
template <bool kAdd>
RERANK_FAST_INLINE void row_of_tiles(const float* left, std::int64_t row_stride, std::int64_t depth_stride,
                                     const float* right, std::int64_t right_stride, std::int64_t right_step,
                                     std::int64_t depth, std::int64_t from, std::int64_t end, float* to,
                                     std::int64_t to_stride) {
  for (std::int64_t column = from; column < end; column += kColumns) {
    const float* const columns = right + column * right_step;
    if (end - column > kLanes) {
      tile<2, kAdd>(left, row_stride, depth_stride, columns, right_stride, depth, to + column, to_stride);
    } else {
      tile<1, kAdd>(left, row_stride, depth_stride, columns, right_stride, depth, to + column, to_stride);
    }
  }
}

RERANK_FAST_INLINE std::int64_t place(const Rows& rows, std::int64_t head, std::int64_t token) {
  return token * rows.token_stride + head * rows.head_stride;
}

// Copies count rows of one head into fp32 rows of `width` floats, times factor; what is beyond them becomes 0.
template <bool kBf16>
RERANK_FAST_INLINE void read(const Rows& rows, std::int64_t head, std::int64_t first, std::int64_t count,
                             std::int64_t size, std::int64_t width, std::int64_t padded_count, float factor,
                             float* to) {
  for (std::int64_t i = 0; i < count; ++i, to += width) {
    const auto* from = static_cast<const typename Stored<kBf16>::type*>(rows.data) + place(rows, head, first + i);
    fetch<0>(from + rows.head_stride, size);
    std::int64_t e = 0;
    for (; e + kLanes <= size; e += kLanes) store(load_wide<kBf16>(from + e) * factor, to + e);
    for (; e < size; ++e) to[e] = factor * Stored<kBf16>::get(from[e]);
    for (; e < width; ++e) to[e] = 0;
  }
  fill(to, (padded_count - count) * width, 0.0f);
}

template <bool kBf16>
RERANK_FAST_INLINE void write(const Rows& rows, std::int64_t head, std::int64_t first, std::int64_t count,
                              std::int64_t size, std::int64_t width, float factor, const float* from) {
  for (std::int64_t i = 0; i < count; ++i, from += width) {
    auto* to = static_cast<typename Stored<kBf16>::type*>(rows.data) + place(rows, head, first + i);
    fetch<1>(to + rows.head_stride, size);
    std::int64_t e = 0;
    for (; e + kLanes <= size; e += kLanes) store_narrow<kBf16>(load(from + e) * factor, to + e);
    for (; e < size; ++e) to[e] = Stored<kBf16>::put(factor * from[e]);
  }
}

// Rows (count, width) as columns in tiles: (count / kColumns, width, kColumns). count and width are whole.
RERANK_FAST_INLINE void as_columns(const float* from, std::int64_t count, std::int64_t width, float* to) {
  for (std::int64_t i = 0; i < count; i += kColumns, to += kColumns * width)
    for (std::int64_t e = 0; e < width; e += 4)
      for (std::int64_t r = 0; r < kColumns; r += 4) {
        FourLanes rows[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) std::memcpy(&rows[n], from + (i + r + n) * width + e, sizeof rows[n]);
        transpose(rows);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) std::memcpy(to + (e + n) * kColumns + r, &rows[n], sizeof rows[n]);
      }
}

// One sequence's sizes. Key rows are `width` floats, rows of scores `stride`: some more than padded_keys, since the
// tiles of the keys' gradients, kRows of them, end where registers do not.
struct Sizes : Sequence {
  std::int64_t size, width, padded_keys, stride;

  RERANK_FAST_INLINE Sizes(const AttentionShape& shape, std::int64_t index)
      : Sequence(shape, index),
        size(shape.head_size),
        width(whole(size, kLanes)),
        padded_keys(whole(num_k, kColumns)),
        stride(padded_keys + kBeyond) {}

  // Minus infinity among the scores of query i where it may not read, from begin to end.
  RERANK_FAST_INLINE void mask(const AttentionShape& shape, std::int64_t i, const KeyRange& block,
                               std::int64_t end, float* row) const {
    const KeyRange range = readable(shape, i);
    for (std::int64_t j = block.from; j < smaller(range.from, end); ++j) row[j] = -kInfinity;
    for (std::int64_t j = larger(range.to, block.from); j < end; ++j) row[j] = -kInfinity;
  }

  // scores (kRows, stride) = rows (kRows, width) x the tiles of a transpose, for the keys of the range; the end of what
  // is written, whole registers.
  RERANK_FAST_INLINE std::int64_t by_columns(const float* left, const float* tiles, const KeyRange& range,
                                             float* to) const {
    if (range.to <= range.from) return range.from;
    const std::int64_t end = whole(range.to, kLanes);
    // A column is `width` floats on from the column a tile before it.
    row_of_tiles<false>(left, width, 1, tiles, kColumns, width, size, range.from, end, to, stride);
    return end;
  }
};

// The weights of one query, not yet divided by their sum, in place of its scores [from, end), which are in powers of 2:
// dropped where dropout says so. What is left to multiply with goes to rescale; the result is the row's lse. A query
// that may read nothing gives 0; one with no score above minus infinity gives NaN.
RERANK_FAST_INLINE float softmax_row(float* row, std::int64_t from, std::int64_t end, bool empty,
                                     const Dropout& dropout, std::uint32_t drawn, float* rescale) {
  Vector highest = every_lane(-kInfinity);
  for (std::int64_t j = from; j < end; j += kLanes) {
    const Vector score = load(row + j);
    highest = score > highest ? score : highest;
  }
  const float top = maximum<float>(highest);
  const float off = empty ? 0.0f : top;
  Vector sums = {};
  for (std::int64_t j = from; j < end; j += kLanes) {
    Vector weight = exp2_below(load(row + j) - off);
    sums += weight;
    if (dropout.threshold != 0) weight *= dropout_factors(dropout, drawn, j);
    store(weight, row + j);
  }
  const float total = sum<float>(sums);
  *rescale = empty ? 0.0f : 1.0f / total;
  return empty ? kInfinity : top + __builtin_log2f(total);
}

// The sum of out * grad_out of one query, rows of `width` floats: what the softmax takes off its scores' gradients.
RERANK_FAST_INLINE float along_of(const float* out, const float* grad_out, std::int64_t width) {
  Vector products = {};
  for (std::int64_t e = 0; e < width; e += kLanes) products += load(out + e) * load(grad_out + e);
  return sum<float>(products);
}

// The weights of one query, dropped, in place of its scores [from, end), and the gradients of its scores in place of
// those of its weights; kBeyond zeros after both.
RERANK_FAST_INLINE void softmax_row_gradient(float* weight_row, float* slope_row, std::int64_t from, std::int64_t end,
                                             float along, float log_sum, const Dropout& dropout,
                                             std::uint32_t drawn) {
  for (std::int64_t j = from; j < end; j += kLanes) {
    const Vector weight = exp2_below(load(weight_row + j) - log_sum);
    Vector upstream = load(slope_row + j), dropped = weight;
    if (dropout.threshold != 0) {
      const Vector factors = dropout_factors(dropout, drawn, j);
      upstream *= factors;
      dropped *= factors;
    }
    store(dropped, weight_row + j);
    store(weight * (upstream - along), slope_row + j);
  }
  fill(weight_row + end, kBeyond, 0.0f);
  fill(slope_row + end, kBeyond, 0.0f);
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
