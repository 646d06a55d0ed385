// Attention by products in fp32. A block of queries meets all keys that it may read: its scores lie in the first level
// of the cache, and softmax runs over whole rows of them.
#include "attention/tasks.h"
#include "common/math.h"
#include "common/scratch.h"
#include "common/stored.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

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
// Queries of a block. Backward's is longer: the keys' gradients are read and written once a block.
constexpr std::int64_t kQueries = kRows, kBackwardQueries = 4 * kRows;

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

// The keys and values of a sequence in fp32, and room for a block of queries.
struct Memory {
  Scratch<float> keys, keys_t, values, values_t, scores, grads, rows, grad_rows, out_rows, dk, dv;
};

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

template <bool kBf16>
RERANK_FAST_INLINE void forward_of(const AttentionShape& shape, const AttentionForward& tensors,
                                   std::int64_t index, std::int64_t kv_head) {
  static thread_local Memory memory;
  const Sizes task(shape, index);
  const std::int64_t size = task.size, width = task.width, stride = task.stride;
  const std::int64_t group = shape.num_heads / shape.num_kv_heads, keys_size = task.padded_keys * width;
  float* const keys = memory.keys.room(keys_size);
  float* const keys_t = memory.keys_t.room(keys_size);
  float* const values = memory.values.room(keys_size);
  float* const scores = memory.scores.room(kQueries * stride);
  float* const rows = memory.rows.room(kQueries * width);
  float* const out_rows = memory.out_rows.room(kQueries * width);
  read<kBf16>(tensors.k, kv_head, task.first_k, task.num_k, size, width, task.padded_keys, 1.0f, keys);
  read<kBf16>(tensors.v, kv_head, task.first_k, task.num_k, size, width, task.num_k, 1.0f, values);
  as_columns(keys, task.padded_keys, width, keys_t);
  const auto factor = static_cast<float>(shape.scale * kLog2E);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (std::int64_t first = 0; first < task.num_q; first += kQueries) {
      const std::int64_t count = smaller(kQueries, task.num_q - first), token = task.first_q + first;
      const KeyRange range = task.readable(shape, first, first + count, kColumns);
      read<kBf16>(tensors.q, head, token, count, size, width, kQueries, factor, rows);
      const std::int64_t end = task.by_columns(rows, keys_t, range, scores);
      float rescale[kQueries];
      for (std::int64_t r = 0; r < count; ++r) {
        float* const row = scores + r * stride;
        task.mask(shape, first + r, range, end, row);
        Vector highest = every_lane(-kInfinity);
        for (std::int64_t j = range.from; j < end; j += kLanes) {
          const Vector score = load(row + j);
          highest = score > highest ? score : highest;
        }
        const float top = maximum<float>(highest);
        // A query that may read nothing gives 0; one with no score above minus infinity gives NaN.
        const bool empty = task.reads_nothing(shape, first + r);
        const float off = empty ? 0.0f : top;
        const std::uint32_t drawn =
            dropout.row(static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(token + r));
        Vector sums = {};
        for (std::int64_t j = range.from; j < end; j += kLanes) {
          Vector weight = exp2_below(load(row + j) - off);
          sums += weight;
          if (dropout.threshold != 0) weight *= dropout_factors(dropout, drawn, j);
          store(weight, row + j);
        }
        const float total = sum<float>(sums);
        rescale[r] = empty ? 0.0f : 1.0f / total;
        tensors.lse[head * shape.num_queries + token + r] = empty ? kInfinity : top + __builtin_log2f(total);
      }
      row_of_tiles<false>(scores + range.from, stride, 1, values + range.from * width, width, 1, range.to - range.from,
                          0, width, out_rows, width);
      for (std::int64_t r = 0; r < count; ++r)
        write<kBf16>(tensors.out, head, token + r, 1, size, width, rescale[r], out_rows + r * width);
    }
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void backward_of(const AttentionShape& shape, const AttentionBackward& tensors,
                                    std::int64_t index, std::int64_t kv_head) {
  static thread_local Memory memory;
  const Sizes task(shape, index);
  const std::int64_t size = task.size, width = task.width, stride = task.stride;
  const std::int64_t group = shape.num_heads / shape.num_kv_heads, keys_size = task.padded_keys * width;
  const std::int64_t grads_size = (task.num_k + kRows) * width;
  float* const keys = memory.keys.room(keys_size);
  float* const keys_t = memory.keys_t.room(keys_size);
  float* const values = memory.values.room(keys_size);
  float* const values_t = memory.values_t.room(keys_size);
  float* const weights = memory.scores.room(kBackwardQueries * stride);
  float* const slopes = memory.grads.room(kBackwardQueries * stride);
  float* const rows = memory.rows.room(kBackwardQueries * width);
  float* const grad_rows = memory.grad_rows.room(kBackwardQueries * width);
  float* const out_rows = memory.out_rows.room(kBackwardQueries * width);
  float* const dk = memory.dk.room(grads_size);
  float* const dv = memory.dv.room(grads_size);
  read<kBf16>(tensors.k, kv_head, task.first_k, task.num_k, size, width, task.padded_keys, 1.0f, keys);
  read<kBf16>(tensors.v, kv_head, task.first_k, task.num_k, size, width, task.padded_keys, 1.0f, values);
  as_columns(keys, task.padded_keys, width, keys_t);
  as_columns(values, task.padded_keys, width, values_t);
  fill(dk, grads_size, 0.0f);
  fill(dv, grads_size, 0.0f);
  const auto factor = static_cast<float>(shape.scale * kLog2E);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (std::int64_t first = 0; first < task.num_q; first += kBackwardQueries) {
      const std::int64_t count = smaller(kBackwardQueries, task.num_q - first), token = task.first_q + first;
      const std::int64_t padded = whole(count, kRows);
      const KeyRange range = task.readable(shape, first, first + count, kColumns);
      read<kBf16>(tensors.q, head, token, count, size, width, padded, factor, rows);
      read<kBf16>(tensors.grad_out, head, token, count, size, width, padded, 1.0f, grad_rows);
      read<kBf16>(tensors.out, head, token, count, size, width, padded, 1.0f, out_rows);
      std::int64_t end = range.from;
      for (std::int64_t r = 0; r < padded; r += kRows) {
        end = task.by_columns(rows + r * width, keys_t, range, weights + r * stride);
        task.by_columns(grad_rows + r * width, values_t, range, slopes + r * stride);
      }
      for (std::int64_t r = 0; r < count; ++r) {
        float *const weight_row = weights + r * stride, *const slope_row = slopes + r * stride;
        task.mask(shape, first + r, range, end, weight_row);
        Vector products = {};  // sum of out * grad_out: what the softmax takes off
        for (std::int64_t e = 0; e < width; e += kLanes)
          products += load(out_rows + r * width + e) * load(grad_rows + r * width + e);
        const float along = sum<float>(products);
        const float log_sum = tensors.lse[head * shape.num_queries + token + r];
        const std::uint32_t drawn =
            dropout.row(static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(token + r));
        for (std::int64_t j = range.from; j < end; j += kLanes) {
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
      for (std::int64_t j = range.from; j < range.to; j += kRows) {
        row_of_tiles<true>(weights + j, 1, stride, grad_rows, width, 1, count, 0, width, dv + j * width, width);
        row_of_tiles<true>(slopes + j, 1, stride, rows, width, 1, count, 0, width, dk + j * width, width);
      }
      for (std::int64_t r = 0; r < padded; r += kRows)
        row_of_tiles<false>(slopes + r * stride + range.from, stride, 1, keys + range.from * width, width, 1,
                            range.to - range.from, 0, width, out_rows + r * width, width);
      write<kBf16>(tensors.dq, head, token, count, size, width, static_cast<float>(shape.scale), out_rows);
    }
  }
  // rows hold q times scale and log2(e): the latter is taken off.
  write<kBf16>(tensors.dk, kv_head, task.first_k, task.num_k, size, width, 0.6931471805599453f, dk);
  write<kBf16>(tensors.dv, kv_head, task.first_k, task.num_k, size, width, 1.0f, dv);
}

}  // namespace

void fp32_forward(const AttentionShape& shape, const AttentionForward& tensors, std::int64_t sequence,
                  std::int64_t kv_head) {
  shape.bf16 ? forward_of<true>(shape, tensors, sequence, kv_head)
             : forward_of<false>(shape, tensors, sequence, kv_head);
}

void fp32_backward(const AttentionShape& shape, const AttentionBackward& tensors, std::int64_t sequence,
                   std::int64_t kv_head) {
  shape.bf16 ? backward_of<true>(shape, tensors, sequence, kv_head)
             : backward_of<false>(shape, tensors, sequence, kv_head);
}

extern const AttentionKernels attention_kernels;
#if RERANK_FAST_BF16_PRODUCTS
const AttentionKernels attention_kernels = {fp32_forward, fp32_backward, bf16_forward, bf16_backward};
#else
const AttentionKernels attention_kernels = {fp32_forward, fp32_backward, nullptr, nullptr};
#endif

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
