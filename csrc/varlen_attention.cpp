#include "varlen_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>

#include "threads.h"
#include "varlen_attention_bf16.h"
#include "varlen_attention_task.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kLanes = kBlock, kRows = 8;  // floats in a vector; queries taken at once
using Vector = Lanes<float>;
using Bits = Lanes<std::uint32_t>;

// 2^x for x <= 0; below -126 it gives the smallest normal number, which no sum sees.
RERANK_FAST_INLINE Vector exp2_vector(Vector x) {
  x = x < -126.0f ? every_lane(-126.0f) : x;
  const Vector shifted = x + 12582912.0f;  // rounds to the nearest whole number, in the low bits
  const Vector f = x - (shifted - 12582912.0f);
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000u + 127u) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  Vector p = every_lane(0.000153458118f);
  p = p * f + 0.00133999312f;
  p = p * f + 0.00961848896f;
  p = p * f + 0.0555032878f;
  p = p * f + 0.240226469f;
  p = p * f + 0.693147206f;
  p = p * f + 1.0f;
  return p * power;
}

// Copies count rows of one head into fp32 rows of `width` floats, times factor; what is beyond them becomes 0.
RERANK_FAST_INLINE void read_rows(const Rows& rows, bool bf16, std::int64_t first, std::int64_t count,
                                  std::int64_t head, std::int64_t size, std::int64_t width,
                                  std::int64_t padded_count, float factor, float* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t at = (first + i) * rows.token_stride + head * rows.head_stride;
    float* row = to + i * width;
    if (bf16) {
      const auto* from = static_cast<const std::uint16_t*>(rows.data) + at;
      for (std::int64_t e = 0; e < size; ++e) row[e] = factor * widen(from[e]);
    } else {
      const auto* from = static_cast<const float*>(rows.data) + at;
      for (std::int64_t e = 0; e < size; ++e) row[e] = factor * from[e];
    }
    for (std::int64_t e = size; e < width; ++e) row[e] = 0;
  }
  std::fill(to + count * width, to + padded_count * width, 0.0f);
}

RERANK_FAST_INLINE void write_rows(const Rows& rows, bool bf16, std::int64_t first, std::int64_t count,
                                   std::int64_t head, std::int64_t size, std::int64_t width, const float* from) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t at = (first + i) * rows.token_stride + head * rows.head_stride;
    const float* row = from + i * width;
    if (bf16) {
      auto* to = static_cast<std::uint16_t*>(rows.data) + at;
      for (std::int64_t e = 0; e < size; ++e) to[e] = narrow(row[e]);
    } else {
      auto* to = static_cast<float*>(rows.data) + at;
      for (std::int64_t e = 0; e < size; ++e) to[e] = row[e];
    }
  }
}

// (count, width) to (width, padded_count); count and width are whole vectors.
RERANK_FAST_INLINE void transpose(const float* from, std::int64_t padded_count, std::int64_t width, float* to) {
  for (std::int64_t i = 0; i < padded_count; i += kLanes)
    for (std::int64_t e = 0; e < width; ++e)
      for (std::int64_t lane = 0; lane < kLanes; ++lane)
        to[e * padded_count + i + lane] = from[(i + lane) * width + e];
}

// result (kRows, columns) = rows (kRows, width) x transposed (size, stride), for the columns [begin, end), whole
// vectors.
RERANK_FAST_INLINE void rows_by_columns(const float* rows, std::int64_t width, std::int64_t size,
                                        const float* transposed, std::int64_t stride, std::int64_t begin,
                                        std::int64_t end, float* result) {
  std::int64_t j = begin;
  for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
    Vector sum[kRows][2] = {};
    for (std::int64_t e = 0; e < size; ++e) {
      const Vector left = load(transposed + e * stride + j), right = load(transposed + e * stride + j + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += rows[r * width + e] * left;
        sum[r][1] += rows[r * width + e] * right;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      store(sum[r][0], result + r * stride + j);
      store(sum[r][1], result + r * stride + j + kLanes);
    }
  }
  for (; j < end; j += kLanes) {
    Vector sum[kRows] = {};
    for (std::int64_t e = 0; e < size; ++e) {
      const Vector column = load(transposed + e * stride + j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] += rows[r * width + e] * column;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(sum[r], result + r * stride + j);
  }
}

// result (kRows, width) = weights (kRows, stride) x values (keys, width), over the keys [begin, end).
RERANK_FAST_INLINE void weighted_sum(const float* weights, std::int64_t stride, const float* values,
                                     std::int64_t width, std::int64_t begin, std::int64_t end, float* result) {
  std::int64_t e = 0;
  for (; e + 2 * kLanes <= width; e += 2 * kLanes) {
    Vector sum[kRows][2] = {};
    for (std::int64_t j = begin; j < end; ++j) {
      const Vector left = load(values + j * width + e), right = load(values + j * width + e + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += weights[r * stride + j] * left;
        sum[r][1] += weights[r * stride + j] * right;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      store(sum[r][0], result + r * width + e);
      store(sum[r][1], result + r * width + e + kLanes);
    }
  }
  for (; e < width; e += kLanes) {
    Vector sum[kRows] = {};
    for (std::int64_t j = begin; j < end; ++j) {
      const Vector value = load(values + j * width + e);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] += weights[r * stride + j] * value;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(sum[r], result + r * width + e);
  }
}

// values (keys, width) += weights^T (keys, kRows) x rows (kRows, width), for the keys [begin, end).
RERANK_FAST_INLINE void add_outer(const float* weights, std::int64_t stride, const float* rows, std::int64_t width,
                                  std::int64_t begin, std::int64_t end, float* values) {
  constexpr int kKeys = 4;
  for (std::int64_t e = 0; e < width; e += kLanes) {
    Vector row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = load(rows + r * width + e);
    std::int64_t j = begin;
    for (; j + kKeys <= end; j += kKeys) {
      Vector sum[kKeys];
#pragma GCC unroll 4
      for (int key = 0; key < kKeys; ++key) sum[key] = load(values + (j + key) * width + e);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int key = 0; key < kKeys; ++key) sum[key] += weights[r * stride + j + key] * row[r];
#pragma GCC unroll 4
      for (int key = 0; key < kKeys; ++key) store(sum[key], values + (j + key) * width + e);
    }
    for (; j < end; ++j) {
      Vector sum = load(values + j * width + e);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum += weights[r * stride + j] * row[r];
      store(sum, values + j * width + e);
    }
  }
}

// A sequence and what it needs in fp32. Key rows are `width` floats, query columns `stride`.
struct Task : Sequence {
  std::int64_t width, stride;
  float *keys, *keys_t, *values, *values_t, *scores, *grads, *rows, *grad_rows, *out_rows, *dk, *dv;

  Task(const AttentionShape& shape, std::int64_t index, bool backward)
      : Sequence(shape, index), width(whole(shape.head_size, kLanes)), stride(whole(num_k, kLanes)) {
    const std::int64_t all_keys = stride * width, block = kRows * stride, row_block = kRows * width;
    const std::int64_t sizes[] = {all_keys,  all_keys,  all_keys,  backward ? all_keys : 0,
                                  block,     backward ? block : 0, row_block, row_block,
                                  row_block, backward ? all_keys : 0, backward ? all_keys : 0};
    float** const parts[] = {&keys, &keys_t, &values, &values_t, &scores, &grads, &rows, &grad_rows, &out_rows,
                             &dk,   &dv};
    static thread_local Scratch<float> memory;
    float* next = memory.room(std::accumulate(std::begin(sizes), std::end(sizes), std::int64_t{0}));
    for (std::size_t part = 0; part < std::size(sizes); ++part) {
      *parts[part] = next;
      next += sizes[part];
    }
  }

  // The keys that any of the queries [first, last) may read: a range, whole vectors.
  KeyRange bounds(const AttentionShape& shape, std::int64_t first, std::int64_t last) const {
    const KeyRange keys = readable(shape, first, last, kLanes);
    return {keys.from, std::max(keys.from, whole(keys.to, kLanes))};
  }

  // Minus infinity where query i may not read.
  RERANK_FAST_INLINE void mask(const AttentionShape& shape, std::int64_t i, std::int64_t begin, std::int64_t end,
                               float* row) const {
    const KeyRange keys = readable(shape, i);
    const float nothing = -std::numeric_limits<float>::infinity();
    for (std::int64_t j = begin; j < std::min(keys.from, end); ++j) row[j] = nothing;
    for (std::int64_t j = std::max(keys.to, begin); j < end; ++j) row[j] = nothing;
  }
};

RERANK_FAST_CLONES void forward_task(const AttentionShape& shape, std::int64_t sequence, std::int64_t kv_head,
                                     const Rows& q, const Rows& k, const Rows& v, const Rows& out, float* lse) {
  const Task task(shape, sequence, false);
  if (task.num_q == 0) return;
  const std::int64_t size = shape.head_size, width = task.width, stride = task.stride;
  const std::int64_t num_queries = shape.cu_seqlens_q[shape.num_sequences];
  const std::int64_t group = shape.num_heads / shape.num_kv_heads;
  read_rows(k, shape.bf16, task.first_k, task.num_k, kv_head, size, width, stride, 1.0f, task.keys);
  read_rows(v, shape.bf16, task.first_k, task.num_k, kv_head, size, width, stride, 1.0f, task.values);
  transpose(task.keys, stride, width, task.keys_t);
  const auto factor = static_cast<float>(shape.scale * kLog2E);  // scores in powers of 2
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (std::int64_t first = 0; first < task.num_q; first += kRows) {
      const std::int64_t count = std::min(kRows, task.num_q - first);
      const auto [begin, end] = task.bounds(shape, first, first + count);
      read_rows(q, shape.bf16, task.first_q + first, count, head, size, width, kRows, factor, task.rows);
      rows_by_columns(task.rows, width, size, task.keys_t, stride, begin, end, task.scores);
      float rescale[kRows];
      for (std::int64_t r = 0; r < count; ++r) {
        float* row = task.scores + r * stride;
        task.mask(shape, first + r, begin, end, row);
        Vector highest = every_lane(-std::numeric_limits<float>::infinity());
        for (std::int64_t j = begin; j < end; j += kLanes) {
          const Vector score = load(row + j);
          highest = score > highest ? score : highest;
        }
        float top = highest[0];
        for (std::int64_t lane = 1; lane < kLanes; ++lane) top = std::max(top, highest[lane]);
        Vector sums = {};
        const auto stream = static_cast<std::uint32_t>(head);
        const std::uint32_t drawn = dropout.row(stream, static_cast<std::uint32_t>(task.first_q + first + r));
        const bool empty = top == -std::numeric_limits<float>::infinity();  // a query that may read nothing gives 0
        for (std::int64_t j = begin; j < end; j += kLanes) {
          const Vector score = load(row + j);
          Vector weight = exp2_vector(score - (empty ? 0.0f : top));
          weight = score == -std::numeric_limits<float>::infinity() ? Vector{} : weight;
          sums += weight;
          if (dropout.threshold != 0) weight *= dropout_factors(dropout, drawn, j);
          store(weight, row + j);
        }
        float sum = 0;
        for (std::int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
        rescale[r] = empty ? 0.0f : 1.0f / sum;
        lse[head * num_queries + task.first_q + first + r] =
            empty ? std::numeric_limits<float>::infinity() : top + std::log2(sum);
      }
      for (std::int64_t r = count; r < kRows; ++r) std::fill_n(task.scores + r * stride, stride, 0.0f);
      weighted_sum(task.scores, stride, task.values, width, begin, end, task.out_rows);
      for (std::int64_t r = 0; r < count; ++r)
        for (std::int64_t e = 0; e < width; ++e) task.out_rows[r * width + e] *= rescale[r];
      write_rows(out, shape.bf16, task.first_q + first, count, head, size, width, task.out_rows);
    }
  }
}

RERANK_FAST_CLONES void backward_task(const AttentionShape& shape, std::int64_t sequence, std::int64_t kv_head,
                                      const Rows& q, const Rows& k, const Rows& v, const Rows& out,
                                      const float* lse, const Rows& grad_out, const Rows& dq, const Rows& dk,
                                      const Rows& dv) {
  const Task task(shape, sequence, true);
  const std::int64_t size = shape.head_size, width = task.width, stride = task.stride;
  const std::int64_t num_queries = shape.cu_seqlens_q[shape.num_sequences];
  const std::int64_t group = shape.num_heads / shape.num_kv_heads;
  read_rows(k, shape.bf16, task.first_k, task.num_k, kv_head, size, width, stride, 1.0f, task.keys);
  read_rows(v, shape.bf16, task.first_k, task.num_k, kv_head, size, width, stride, 1.0f, task.values);
  transpose(task.keys, stride, width, task.keys_t);
  transpose(task.values, stride, width, task.values_t);
  std::fill_n(task.dk, stride * width, 0.0f);
  std::fill_n(task.dv, stride * width, 0.0f);
  const auto factor = static_cast<float>(shape.scale * kLog2E);
  const auto scale = static_cast<float>(shape.scale);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (std::int64_t first = 0; first < task.num_q; first += kRows) {
      const std::int64_t count = std::min(kRows, task.num_q - first), token = task.first_q + first;
      const auto [begin, end] = task.bounds(shape, first, first + count);
      read_rows(q, shape.bf16, token, count, head, size, width, kRows, factor, task.rows);
      read_rows(grad_out, shape.bf16, token, count, head, size, width, kRows, 1.0f, task.grad_rows);
      read_rows(out, shape.bf16, token, count, head, size, width, kRows, 1.0f, task.out_rows);
      rows_by_columns(task.rows, width, size, task.keys_t, stride, begin, end, task.scores);
      rows_by_columns(task.grad_rows, width, size, task.values_t, stride, begin, end, task.grads);
      for (std::int64_t r = 0; r < kRows; ++r) {
        float *row = task.scores + r * stride, *grad = task.grads + r * stride;
        if (r >= count) {
          std::fill_n(row, stride, 0.0f);
          std::fill_n(grad, stride, 0.0f);
          continue;
        }
        task.mask(shape, first + r, begin, end, row);
        float along = 0;  // sum of out * grad_out: what the softmax takes off
        for (std::int64_t e = 0; e < size; ++e) along += task.out_rows[r * width + e] * task.grad_rows[r * width + e];
        const float log_sum = lse[head * num_queries + token + r];
        const auto stream = static_cast<std::uint32_t>(head);
        const std::uint32_t drawn = dropout.row(stream, static_cast<std::uint32_t>(token + r));
        for (std::int64_t j = begin; j < end; j += kLanes) {
          const Vector score = load(row + j);
          Vector weight = exp2_vector(score - log_sum);
          weight = score == -std::numeric_limits<float>::infinity() ? Vector{} : weight;
          Vector upstream = load(grad + j);
          Vector dropped = weight;
          if (dropout.threshold != 0) {
            const Vector factors = dropout_factors(dropout, drawn, j);
            upstream *= factors;
            dropped *= factors;
          }
          store(dropped, row + j);
          store(weight * (upstream - along), grad + j);
        }
      }
      add_outer(task.scores, stride, task.grad_rows, width, begin, end, task.dv);
      // rows hold q times scale and log2(e): the latter is taken off at the end.
      add_outer(task.grads, stride, task.rows, width, begin, end, task.dk);
      weighted_sum(task.grads, stride, task.keys, width, begin, end, task.out_rows);
      for (std::int64_t e = 0; e < count * width; ++e) task.out_rows[e] *= scale;
      write_rows(dq, shape.bf16, token, count, head, size, width, task.out_rows);
    }
  }
  for (std::int64_t e = 0; e < task.num_k * width; ++e) task.dk[e] *= 0.6931471805599453f;
  write_rows(dk, shape.bf16, task.first_k, task.num_k, kv_head, size, width, task.dk);
  write_rows(dv, shape.bf16, task.first_k, task.num_k, kv_head, size, width, task.dv);
}

}  // namespace

void varlen_attention_forward(const AttentionShape& shape, Rows q, Rows k, Rows v, Rows out, float* lse) {
  const auto task = has_bf16_attention(shape) ? bf16_forward_task : forward_task;
  parallel_for(shape.num_threads, shape.num_sequences * shape.num_kv_heads, [&](std::int64_t index) {
    task(shape, index / shape.num_kv_heads, index % shape.num_kv_heads, q, k, v, out, lse);
  });
}

void varlen_attention_backward(const AttentionShape& shape, Rows q, Rows k, Rows v, Rows out, const float* lse,
                               Rows grad_out, Rows dq, Rows dk, Rows dv) {
  const auto task = has_bf16_attention(shape) ? bf16_backward_task : backward_task;
  parallel_for(shape.num_threads, shape.num_sequences * shape.num_kv_heads, [&](std::int64_t index) {
    task(shape, index / shape.num_kv_heads, index % shape.num_kv_heads, q, k, v, out, lse, grad_out, dq, dk, dv);
  });
}

}  // namespace rerank_fast
