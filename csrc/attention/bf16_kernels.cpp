// Attention by the processor's products of bf16 pairs.
#include "attention/tasks.h"

#if RERANK_FAST_BF16_PRODUCTS

#include "attention/bf16_products.h"
#include "attention/scores.h"
#include "common/math.h"
#include "common/scratch.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

using Vector = Lanes<float>;
constexpr std::int64_t kRows = 8, kKeys = 2 * kLanes;  // queries and keys of a tile
constexpr std::int64_t kPairs = kRows;                 // of queries, in a block of backward: two tiles

// to (kRows, kKeys) = left^T (words, kRows) x columns (words, kKeys) * factor, as far as kVectors reach.
template <int kVectors>
RERANK_FAST_INLINE void store_product(const Word* left, const Word* columns, std::int64_t words, float factor,
                                      float* to) {
  Vector sum[kRows][2] = {};
  add_product<kVectors>(left, 1, kRows, columns, kKeys, words, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) store(sum[r][n] * factor, to + r * kKeys + n * kLanes);
}

// Minus infinity in the tile (kRows, kKeys) of the scores of queries from `first` and keys from j on, where a query may
// not read.
RERANK_FAST_INLINE void mask(const AttentionShape& shape, const Sequence& sequence, std::int64_t first,
                             std::int64_t count, std::int64_t j, float* scores) {
  for (std::int64_t r = 0; r < count; ++r) {
    const KeyRange range = sequence.readable(shape, first + r);
    const auto from = static_cast<std::int32_t>(range.from), to = static_cast<std::int32_t>(range.to);
    for (std::int64_t n = 0; n < kKeys; n += kLanes) {
      float* const score = scores + r * kKeys + n;
      const Lanes<std::int32_t> key = lane_numbers<std::int32_t>() + static_cast<std::int32_t>(j + n);
      const Vector hidden = every_lane(-kInfinity), above = key < from ? hidden : load(score);
      store(key < to ? above : hidden, score);
    }
  }
}

// The columns e and on, kKeys or what is left of them, of one row of a head.
RERANK_FAST_INLINE void write(const Rows& rows, std::int64_t head, std::int64_t token, std::int64_t size,
                              std::int64_t e, const Vector (&sum)[2], float factor) {
  store_elements(narrow(sum[0] * factor, sum[1] * factor), place(rows, head, token) + e, size - e);
}

// result (kRows, columns from e on) = weights (tiles, kRows, kKeys / 2 words) x values (pairs of keys, size).
RERANK_FAST_INLINE void weigh(const Word* weights, std::int64_t tile_words, const Word* values, std::int64_t size,
                              const KeyRange& keys, std::int64_t e, Vector (&result)[kRows][2]) {
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
  Word* const queries = memory.queries.room(whole(sequence.num_q, kRows) * size / 2);
  Word* const weights = memory.weights.room(kRows * stride / 2);  // (tiles, kRows, kKeys / 2)
  float* const scores = memory.scores.room(kRows * stride);       // (tiles, kRows, kKeys)
  const Scores made(shape);
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
          store_product<2>(left, right, size / 2, made.factor, scores + j * kRows);
        } else {
          store_product<1>(left, right, size / 2, made.factor, scores + j * kRows);
        }
        if (made.capped) made.cap_row(scores + j * kRows, kRows * kKeys);
        if (j < every.from || j + kKeys > every.to) mask(shape, sequence, first, count, j, scores + j * kRows);
      }
      float rescale[kRows];
      for (std::int64_t r = 0; r < count; ++r) {
        Vector highest = every_lane(-kInfinity);
        for (std::int64_t j = range.from; j < range.to; j += kKeys) {
          const float* from = scores + j * kRows + r * kKeys;
          const Vector left = load(from), right = load(from + kLanes);
          highest = left > highest ? left : highest;
          highest = right > highest ? right : highest;
        }
        const float top = maximum<float>(highest);
        // A query that may read nothing gives 0; one with no score above minus infinity gives NaN.
        const bool empty = sequence.reads_nothing(shape, first + r);
        const float off = empty ? 0.0f : top;
        const auto stream = static_cast<std::uint32_t>(head);
        const std::uint32_t drawn = dropout.row(stream, static_cast<std::uint32_t>(token + r));
        Vector sums = {};
        for (std::int64_t j = range.from; j < range.to; j += kKeys) {
          const float* from = scores + j * kRows + r * kKeys;
          Vector left = exp2_below<true>(load(from) - off), right = {};
          if (range.to - j > kLanes) right = exp2_below<true>(load(from + kLanes) - off);
          sums += left + right;
          if (dropout.threshold != 0) {
            left *= dropout_factors(dropout, drawn, j);
            right *= dropout_factors(dropout, drawn, j + kLanes);
          }
          store(narrow(left, right), weights + j * kRows / 2 + r * kLanes);
        }
        const float total = sum<float>(sums);
        rescale[r] = empty ? 0.0f : 1.0f / total;
        lse[head * num_queries + token + r] = empty ? kInfinity : top + __builtin_log2f(total);
      }
      for (std::int64_t e = 0; e < size; e += kKeys) {
        Vector result[kRows][2] = {};
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
  RERANK_FAST_INLINE void differentiate(const float* score, const float* grad, const Scores& made,
                                        const Dropout& dropout, std::int64_t j, Vector* weight, Vector* slope) const {
    const Vector all = exp2_below<true>(load(score) - log_sum);
    Vector upstream = load(grad);
    *weight = all;
    if (dropout.threshold != 0) {
      const Vector factors = dropout_factors(dropout, drawn, j);
      upstream *= factors;
      *weight = all * factors;
    }
    *slope = all * (upstream - along);
    if (made.capped) *slope *= made.bend(load(score));
  }
};

// to (keys, size) += pairs^T x rows: pairs (count, stride) and rows (count, size) are pairs of queries.
template <int kVectors>
RERANK_FAST_INLINE void add_outer(const Word* pairs, std::int64_t stride, const Word* rows, std::int64_t count,
                                  const KeyRange& keys, std::int64_t size, float* to) {
  for (std::int64_t j = keys.from; j < keys.to; j += kRows) {
    Vector sum[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) sum[r][n] = load(to + (j + r) * size + n * kLanes);
    add_product<kVectors>(pairs + j, 1, stride, rows, size, count, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) store(sum[r][n], to + (j + r) * size + n * kLanes);
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
  const std::int64_t q_words = whole(sequence.num_q, 2 * kPairs) * size / 2, kv_words = stride * size / 2;
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
  const auto scale = static_cast<float>(shape.scale);
  const Scores made(shape);
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
          store_product<2>(queries + left, keys + right, size / 2, made.factor, to);
          if (made.capped) made.cap_row(to, kRows * kKeys);
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
          Vector weight[2][2] = {}, slope[2][2] = {};
          for (std::int64_t row = 0; row < smaller(2, count - r); ++row)
            for (std::int64_t n = 0; n < 2; ++n) {
              const std::int64_t from = j * kQueries + (r + row) * kKeys + n * kLanes;
              known[r + row].differentiate(scores + from, weight_grads + from, made, dropout, j + n * kLanes,
                                           &weight[row][n], &slope[row][n]);
            }
          for (std::int64_t n = 0; n < 2; ++n) {
            const std::int64_t to = r / 2 * stride + j + n * kLanes;
            store(interleave(narrow(weight[0][n], weight[1][n])), weight_pairs + to);
            store(interleave(narrow(slope[0][n], slope[1][n])), slope_pairs + to);
            store(narrow(slope[n][0], slope[n][1]), slopes + j * kQueries / 2 + (r + n) * kLanes);
          }
        }
      }
      add_outer(weight_pairs, stride, grad_pairs + at, pairs, range, size, value_grads);
      add_outer(slope_pairs, stride, query_pairs + at, pairs, range, size, key_grads);
      for (std::int64_t row = 0; row < count; row += kRows)
        for (std::int64_t e = 0; e < size; e += kKeys) {
          Vector result[kRows][2] = {};
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
      write(dk, kv_head, token, size, e, {load(key), load(key + kLanes)}, scale);
      write(dv, kv_head, token, size, e, {load(value), load(value + kLanes)}, 1.0f);
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
