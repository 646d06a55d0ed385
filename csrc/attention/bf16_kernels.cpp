// Attention by the processor's products of bf16 pairs.
#include "attention/tasks.h"

#if RERANK_FAST_BF16_PRODUCTS

#include "attention/bf16_products.h"
#include "common/math.h"
#include "common/scratch.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

constexpr std::int64_t kRows = 8, kKeys = 2 * kLanes;  // queries and keys of a tile
constexpr std::int64_t kPairs = kRows;                 // of queries, in a block of backward: two tiles

RERANK_FAST_INLINE std::uint16_t* place(const Rows& rows, std::int64_t head, std::int64_t token) {
  return static_cast<std::uint16_t*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

RERANK_FAST_INLINE Bf16Rows rows_of(const Rows& rows, std::int64_t head, std::int64_t first, std::int64_t count) {
  return {place(rows, head, first), rows.token_stride, count};
}

RERANK_FAST_INLINE __m512 exp2_coarse(__m512 x) { return (__m512)exp2_below<true>((Lanes<float>)x); }

// Which of the kLanes keys from `first` on are in the range.
RERANK_FAST_INLINE __mmask16 lanes_in(const KeyRange& range, std::int64_t first) {
  const auto below = [first](std::int64_t end) {
    return (1u << smaller(larger(end - first, 0), kLanes)) - 1u;
  };
  return static_cast<__mmask16>(below(range.to) & ~below(range.from));
}

// to (kRows, kKeys) = left^T (words, kRows) x columns (words, kKeys) * factor, as far as kVectors reach.
template <int kVectors>
RERANK_FAST_INLINE void store_product(const Word* left, const Word* columns, std::int64_t words, float factor,
                                           float* to) {
  __m512 sum[kRows][2] = {};
  add_product<kVectors>(left, 1, kRows, columns, kKeys, words, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n)
      _mm512_storeu_ps(to + r * kKeys + n * kLanes, _mm512_mul_ps(sum[r][n], _mm512_set1_ps(factor)));
}

// Minus infinity in the tile (kRows, kKeys) of the scores of queries from `first` and keys from j on, where a query may
// not read.
RERANK_FAST_INLINE void mask(const AttentionShape& shape, const Sequence& sequence, std::int64_t first,
                                  std::int64_t count, std::int64_t j, float* scores) {
  for (std::int64_t r = 0; r < count; ++r) {
    const KeyRange range = sequence.readable(shape, first + r);
    for (std::int64_t n = 0; n < kKeys; n += kLanes) {
      const auto hidden = static_cast<__mmask16>(~lanes_in(range, j + n));
      _mm512_mask_storeu_ps(scores + r * kKeys + n, hidden, _mm512_set1_ps(-kInfinity));
    }
  }
}

// The columns e and on, kKeys or the kLanes that are left, of one row of a head.
RERANK_FAST_INLINE void write(const Rows& rows, std::int64_t head, std::int64_t token, std::int64_t size,
                                   std::int64_t e, const __m512 (&sum)[2], float factor) {
  const __m512 scale = _mm512_set1_ps(factor);
  const __m512i both = narrow(_mm512_mul_ps(sum[0], scale), _mm512_mul_ps(sum[1], scale));
  _mm512_mask_storeu_epi16(place(rows, head, token) + e, size - e > kLanes ? ~0u : 0xffffu, both);
}

// result (kRows, columns from e on) = weights (tiles, kRows, kKeys / 2 words) x values (pairs of keys, size).
RERANK_FAST_INLINE void weigh(const Word* weights, std::int64_t tile_words, const Word* values,
                                   std::int64_t size, const KeyRange& keys, std::int64_t e,
                                   __m512 (&result)[kRows][2]) {
  for (std::int64_t j = keys.from; j < keys.to; j += kKeys) {
    const std::int64_t pairs = smaller(kLanes, (keys.to - j + 1) / 2);
    const Word* right = values + j / 2 * size + e;
    add_product<2>(weights + j / kKeys * tile_words, kLanes, 1, right, size, pairs, result);
  }
}

struct ForwardMemory {
  Scratch<Word> queries, keys, values, weights;
  Scratch<float> scores;
};

void forward(const AttentionShape& shape, const AttentionForward& tensors, const Sequence& sequence,
             std::int64_t kv_head) {
  const Rows &q = tensors.q, &k = tensors.k, &v = tensors.v, &out = tensors.out;
  float* const lse = tensors.lse;
  const std::int64_t size = shape.head_size, stride = whole(sequence.num_k, kKeys);
  const std::int64_t num_queries = shape.num_queries;
  const std::int64_t group = shape.num_heads / shape.num_kv_heads;
  static thread_local ForwardMemory memory;
  Word* const keys = memory.keys.room(stride * size / 2);
  Word* const values = memory.values.room(stride * size / 2 + kLanes);  // a row of odd kLanes is read beyond its end
  Word* const queries = memory.queries.room(whole(sequence.num_q, kLanes) * size / 2);
  Word* const weights = memory.weights.room(kRows * stride / 2);  // (tiles, kRows, kKeys / 2)
  float* const scores = memory.scores.room(kRows * stride);       // (tiles, kRows, kKeys)
  const auto factor = static_cast<float>(shape.scale * kLog2E);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  pair_columns<kKeys>(rows_of(k, kv_head, sequence.first_k, sequence.num_k), size, keys);
  pair_rows(rows_of(v, kv_head, sequence.first_k, sequence.num_k), size, values);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    pair_columns<kRows>(rows_of(q, head, sequence.first_q, sequence.num_q), size, queries);
    for (std::int64_t first = 0; first < sequence.num_q; first += kRows) {
      const std::int64_t count = smaller(kRows, sequence.num_q - first), token = sequence.first_q + first;
      for (std::int64_t r = 0; r < count; ++r)
        for (std::int64_t e = 0; e < size; e += kKeys) __builtin_prefetch(place(out, head, token + r) + e, 1);
      const KeyRange range = sequence.readable(shape, first, first + count, kKeys);
      const KeyRange every = sequence.readable_by_all(shape, first, first + count);
      for (std::int64_t j = range.from; j < range.to; j += kKeys) {
        const Word *left = queries + first * size / 2, *right = keys + j * size / 2;
        if (range.to - j > kLanes) {
          store_product<2>(left, right, size / 2, factor, scores + j * kRows);
        } else {
          store_product<1>(left, right, size / 2, factor, scores + j * kRows);
        }
        if (j < every.from || j + kKeys > every.to) mask(shape, sequence, first, count, j, scores + j * kRows);
      }
      float rescale[kRows];
      for (std::int64_t r = 0; r < count; ++r) {
        __m512 highest = _mm512_set1_ps(-kInfinity);
        for (std::int64_t j = range.from; j < range.to; j += kKeys) {
          const float* from = scores + j * kRows + r * kKeys;
          highest = _mm512_max_ps(highest, _mm512_max_ps(_mm512_loadu_ps(from), _mm512_loadu_ps(from + kLanes)));
        }
        const float top = maximum<float>((Lanes<float>)highest);
        const bool empty = top == -kInfinity;  // a query that may read nothing gives 0
        const __m512 off = _mm512_set1_ps(empty ? 0.0f : top);
        const auto stream = static_cast<std::uint32_t>(head);
        const std::uint32_t drawn = dropout.row(stream, static_cast<std::uint32_t>(token + r));
        __m512 sums = _mm512_setzero_ps();
        for (std::int64_t j = range.from; j < range.to; j += kKeys) {
          const float* from = scores + j * kRows + r * kKeys;
          __m512 left = exp2_coarse(_mm512_sub_ps(_mm512_loadu_ps(from), off)), right = _mm512_setzero_ps();
          if (range.to - j > kLanes) right = exp2_coarse(_mm512_sub_ps(_mm512_loadu_ps(from + kLanes), off));
          sums = _mm512_add_ps(sums, _mm512_add_ps(left, right));
          if (dropout.threshold != 0) {
            left = _mm512_mul_ps(left, (__m512)dropout_factors(dropout, drawn, j));
            right = _mm512_mul_ps(right, (__m512)dropout_factors(dropout, drawn, j + kLanes));
          }
          _mm512_storeu_si512(weights + j * kRows / 2 + r * kLanes, narrow(left, right));
        }
        const float total = sum<float>((Lanes<float>)sums);
        rescale[r] = empty ? 0.0f : 1.0f / total;
        lse[head * num_queries + token + r] = empty ? kInfinity : top + __builtin_log2f(total);
      }
      for (std::int64_t e = 0; e < size; e += kKeys) {
        __m512 result[kRows][2] = {};
        weigh(weights, kRows * kLanes, values, size, range, e, result);
        for (std::int64_t r = 0; r < count; ++r) write(out, head, token + r, size, e, result[r], rescale[r]);
      }
    }
  }
}

struct BackwardMemory {
  Scratch<Word> queries, query_pairs, grads, grad_pairs, keys, key_pairs, values, slopes, weight_pairs, slope_pairs;
  Scratch<float> scores, weight_grads, dk, dv;
};

// What backward knows of a query.
struct Query {
  float log_sum;
  float along;  // sum of out * grad_out: what the softmax takes off
  std::uint32_t drawn;

  // The probabilities, dropped out, and the scores' gradients of kLanes keys.
  RERANK_FAST_INLINE void differentiate(const float* score, const float* grad, const Dropout& dropout,
                                             std::int64_t j, __m512* weight, __m512* slope) const {
    const __m512 all = exp2_coarse(_mm512_sub_ps(_mm512_loadu_ps(score), _mm512_set1_ps(log_sum)));
    __m512 upstream = _mm512_loadu_ps(grad);
    *weight = all;
    if (dropout.threshold != 0) {
      const auto factors = (__m512)dropout_factors(dropout, drawn, j);
      upstream = _mm512_mul_ps(upstream, factors);
      *weight = _mm512_mul_ps(all, factors);
    }
    *slope = _mm512_mul_ps(all, _mm512_sub_ps(upstream, _mm512_set1_ps(along)));
  }
};

RERANK_FAST_INLINE float dot_rows(const std::uint16_t* left, const std::uint16_t* right, std::int64_t size) {
  __m512 products = _mm512_setzero_ps();
  for (std::int64_t e = 0; e < size; e += kKeys) {
    const __mmask32 kept = size - e > kLanes ? ~0u : 0xffffu;
    products = dot(products, _mm512_maskz_loadu_epi16(kept, left + e), _mm512_maskz_loadu_epi16(kept, right + e));
  }
  return sum<float>((Lanes<float>)products);
}

// to (keys, size) += pairs^T x rows: pairs (count, stride) and rows (count, size) are pairs of queries.
template <int kVectors>
RERANK_FAST_INLINE void add_outer(const Word* pairs, std::int64_t stride, const Word* rows, std::int64_t count,
                                       const KeyRange& keys, std::int64_t size, float* to) {
  for (std::int64_t j = keys.from; j < keys.to; j += kRows) {
    __m512 sum[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) sum[r][n] = _mm512_loadu_ps(to + (j + r) * size + n * kLanes);
    add_product<kVectors>(pairs + j, 1, stride, rows, size, count, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) _mm512_storeu_ps(to + (j + r) * size + n * kLanes, sum[r][n]);
  }
}

RERANK_FAST_INLINE void add_outer(const Word* pairs, std::int64_t stride, const Word* rows, std::int64_t count,
                                       const KeyRange& keys, std::int64_t size, float* to) {
  std::int64_t e = 0;
  for (; e + kKeys <= size; e += kKeys) add_outer<2>(pairs, stride, rows + e, count, keys, size, to + e);
  if (e < size) add_outer<1>(pairs, stride, rows + e, count, keys, size, to + e);
}

void backward(const AttentionShape& shape, const AttentionBackward& tensors, const Sequence& sequence,
              std::int64_t kv_head) {
  const Rows &q = tensors.q, &k = tensors.k, &v = tensors.v, &out = tensors.out, &grad_out = tensors.grad_out;
  const Rows &dq = tensors.dq, &dk = tensors.dk, &dv = tensors.dv;
  const float* const lse = tensors.lse;
  constexpr std::int64_t kQueries = 2 * kPairs;
  const std::int64_t size = shape.head_size, stride = whole(sequence.num_k, kKeys);
  const std::int64_t num_queries = shape.num_queries;
  const std::int64_t group = shape.num_heads / shape.num_kv_heads;
  static thread_local BackwardMemory memory;
  const std::int64_t q_words = whole(sequence.num_q, kLanes) * size / 2, kv_words = stride * size / 2;
  Word* const keys = memory.keys.room(kv_words);
  Word* const key_pairs = memory.key_pairs.room(kv_words + kLanes);
  Word* const values = memory.values.room(kv_words);
  Word* const queries = memory.queries.room(q_words);
  Word* const query_pairs = memory.query_pairs.room(q_words);
  Word* const grads = memory.grads.room(q_words);
  Word* const grad_pairs = memory.grad_pairs.room(q_words);
  Word* const slopes = memory.slopes.room(kQueries * stride / 2);        // (tiles, kQueries, kKeys / 2)
  Word* const weight_pairs = memory.weight_pairs.room(kPairs * stride);  // (kPairs, stride)
  Word* const slope_pairs = memory.slope_pairs.room(kPairs * stride);
  float* const scores = memory.scores.room(kQueries * stride);  // (tiles, kQueries, kKeys)
  float* const weight_grads = memory.weight_grads.room(kQueries * stride);
  float* const key_grads = memory.dk.room(stride * size + kLanes);
  float* const value_grads = memory.dv.room(stride * size + kLanes);
  const auto scale = static_cast<float>(shape.scale), factor = static_cast<float>(shape.scale * kLog2E);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  const Bf16Rows key_rows = rows_of(k, kv_head, sequence.first_k, sequence.num_k);
  pair_columns<kKeys>(key_rows, size, keys);
  pair_rows(key_rows, size, key_pairs);
  pair_columns<kKeys>(rows_of(v, kv_head, sequence.first_k, sequence.num_k), size, values);
  fill(key_grads, stride * size, 0.0f);
  fill(value_grads, stride * size, 0.0f);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Bf16Rows from_q = rows_of(q, head, sequence.first_q, sequence.num_q);
    const Bf16Rows from_grad = rows_of(grad_out, head, sequence.first_q, sequence.num_q);
    const Bf16Rows from_out = rows_of(out, head, sequence.first_q, sequence.num_q);
    pair_columns<kRows>(from_q, size, queries);
    pair_rows(from_q, size, query_pairs);
    pair_columns<kRows>(from_grad, size, grads);
    pair_rows(from_grad, size, grad_pairs);
    for (std::int64_t first = 0; first < sequence.num_q; first += kQueries) {
      const std::int64_t count = smaller(kQueries, sequence.num_q - first), token = sequence.first_q + first;
      const std::int64_t pairs = (count + 1) / 2, at = first * size / 2;
      const KeyRange range = sequence.readable(shape, first, first + count, kKeys);
      const KeyRange every = sequence.readable_by_all(shape, first, first + count);
      for (std::int64_t row = 0; row < count; row += kRows)
        for (std::int64_t j = range.from; j < range.to; j += kKeys) {
          const std::int64_t left = at + row * size / 2, right = j * size / 2;
          float* const to = scores + j * kQueries + row * kKeys;
          store_product<2>(queries + left, keys + right, size / 2, factor, to);
          store_product<2>(grads + left, values + right, size / 2, 1.0f, weight_grads + (to - scores));
          if (j < every.from || j + kKeys > every.to)
            mask(shape, sequence, first + row, smaller(kRows, count - row), j, to);
        }
      Query known[kQueries];
      for (std::int64_t r = 0; r < count; ++r) {
        const auto stream = static_cast<std::uint32_t>(head);
        known[r] = {lse[head * num_queries + token + r], dot_rows(from_out[first + r], from_grad[first + r], size),
                    dropout.row(stream, static_cast<std::uint32_t>(token + r))};
      }
      for (std::int64_t r = 0; r < count; r += 2) {
        for (std::int64_t j = range.from; j < range.to; j += kKeys) {
          __m512 weight[2][2] = {}, slope[2][2] = {};
          for (std::int64_t row = 0; row < smaller(2, count - r); ++row)
            for (std::int64_t n = 0; n < 2; ++n) {
              const std::int64_t from = j * kQueries + (r + row) * kKeys + n * kLanes;
              known[r + row].differentiate(scores + from, weight_grads + from, dropout, j + n * kLanes, &weight[row][n],
                                           &slope[row][n]);
            }
          for (std::int64_t n = 0; n < 2; ++n) {
            const std::int64_t to = r / 2 * stride + j + n * kLanes;
            _mm512_storeu_si512(weight_pairs + to, interleave(narrow(weight[0][n], weight[1][n])));
            _mm512_storeu_si512(slope_pairs + to, interleave(narrow(slope[0][n], slope[1][n])));
            _mm512_storeu_si512(slopes + j * kQueries / 2 + (r + n) * kLanes, narrow(slope[n][0], slope[n][1]));
          }
        }
      }
      add_outer(weight_pairs, stride, grad_pairs + at, pairs, range, size, value_grads);
      add_outer(slope_pairs, stride, query_pairs + at, pairs, range, size, key_grads);
      for (std::int64_t row = 0; row < count; row += kRows)
        for (std::int64_t e = 0; e < size; e += kKeys) {
          __m512 result[kRows][2] = {};
          weigh(slopes + row * kLanes, kQueries * kLanes, key_pairs, size, range, e, result);
          for (std::int64_t r = 0; r < smaller(kRows, count - row); ++r)
            write(dq, head, token + row + r, size, e, result[r], scale);
        }
    }
  }
  for (std::int64_t i = 0; i < sequence.num_k; ++i)
    for (std::int64_t e = 0; e < size; e += kKeys) {
      const float *key = key_grads + i * size + e, *value = value_grads + i * size + e;
      const std::int64_t token = sequence.first_k + i;
      write(dk, kv_head, token, size, e, {_mm512_loadu_ps(key), _mm512_loadu_ps(key + kLanes)}, scale);
      write(dv, kv_head, token, size, e, {_mm512_loadu_ps(value), _mm512_loadu_ps(value + kLanes)}, 1.0f);
    }
}

}  // namespace

void bf16_forward(const AttentionShape& shape, const AttentionForward& tensors, std::int64_t sequence,
                  std::int64_t kv_head) {
  forward(shape, tensors, Sequence(shape, sequence), kv_head);
}

void bf16_backward(const AttentionShape& shape, const AttentionBackward& tensors, std::int64_t sequence,
                   std::int64_t kv_head) {
  backward(shape, tensors, Sequence(shape, sequence), kv_head);
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast

#endif
