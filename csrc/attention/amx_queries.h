// Queries in the lanes of registers: what they may read, what is dropped, what backward knows, and their rows.
#pragma once

#include "attention/amx_tiles.h"
#include "attention/sequence.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

using Vector = Lanes<float>;
using Numbers = Lanes<std::int32_t>;

// The keys that each of 16 queries may read. Lanes beyond the sequence's queries mean nothing.
struct Reach {
  Numbers from, to;

  RERANK_FAST_INLINE Reach(const AttentionShape& shape, const Sequence& sequence, std::int64_t first) {
    const std::int64_t all = sequence.num_q + sequence.num_k;
    const auto left = static_cast<std::int32_t>(shape.window_left < 0 ? all : smaller(shape.window_left, all));
    const auto right = static_cast<std::int32_t>(shape.window_right < 0 ? all : smaller(shape.window_right, all));
    const auto num_k = static_cast<std::int32_t>(sequence.num_k);
    const Numbers places = lane_numbers<std::int32_t>() + static_cast<std::int32_t>(first + num_k - sequence.num_q);
    const Numbers low = places - left, high = places + right + 1;
    from = low > 0 ? low : Numbers{};
    to = high > num_k ? every_lane(num_k) : high;
  }
  RERANK_FAST_INLINE Numbers nothing() const { return to <= from; }
  RERANK_FAST_INLINE Numbers hides(std::int64_t key) const {
    return (from > static_cast<std::int32_t>(key)) | (to <= static_cast<std::int32_t>(key));
  }
};

// Whether some of `count` queries from `first` on may not read some of the keys [from, to).
RERANK_FAST_INLINE bool hides_some(const AttentionShape& shape, const Sequence& sequence, std::int64_t first,
                                   std::int64_t count, std::int64_t from, std::int64_t to) {
  const KeyRange every = sequence.readable_by_all(shape, first, first + count);
  return from < every.from || to > every.to;
}

// What stands for each of 16 queries in the dropout.
RERANK_FAST_INLINE Words dropout_rows(const Dropout& dropout, std::int64_t head, std::int64_t token,
                                      std::int64_t count) {
  Words rows = {};
  for (std::int64_t r = 0; dropout.threshold != 0 && r < smaller(count, kSide); ++r)
    rows[r] = dropout.row(static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(token + r));
  return rows;
}

RERANK_FAST_INLINE __mmask16 kept(const Dropout& dropout, Words rows, std::int64_t key) {
  const Words drawn = Dropout::draw(rows, static_cast<std::uint32_t>(key));
  return _mm512_cmpge_epu32_mask((__m512i)drawn, _mm512_set1_epi32(static_cast<int>(dropout.threshold)));
}

RERANK_FAST_INLINE Vector keep(__mmask16 which, Vector values, float rescale) {
  return (Vector)_mm512_maskz_mul_ps(which, (__m512)values, _mm512_set1_ps(rescale));
}

// values, those that are kept, less what is taken off.
RERANK_FAST_INLINE Vector keep_less(__mmask16 which, Vector values, float rescale, Vector off) {
  return (Vector)_mm512_mask3_fmadd_ps((__m512)values, _mm512_set1_ps(rescale), (__m512)-off, which);
}

// Elements e and on of the rows of a head from `token` on, as many as `count` of 16, from the columns of a transposed
// result, two by two tiles from `sums` on.
RERANK_FAST_INLINE void write_columns(const float* sums, Vector factor, const Rows& rows, std::int64_t head,
                                      std::int64_t token, std::int64_t count, std::int64_t size, std::int64_t e) {
  Words words[kSide];
#pragma GCC unroll 16
  for (int w = 0; w < kSide; ++w) {
    const float* from = sums + w / 8 * 2 * kTile + w % 8 * 2 * kSide;
    words[w] = interleave(narrow(load(from) * factor, load(from + kSide) * factor));
  }
  transpose(words);
  for (std::int64_t r = 0; r < smaller(kSide, count); ++r) {
    std::uint16_t* const to = place(rows, head, token + r) + e;
    __builtin_prefetch(to + rows.head_stride, 1);
    store_elements(words[r], to, size - e);
  }
}

// What backward knows of 32 queries. Lanes beyond the sequence's weigh nothing.
struct Queries {
  Vector log_sum[2], along[2];  // along: sum of out * grad_out, what the softmax takes off
  Words drawn[2];
};

RERANK_FAST_INLINE Queries known_of(const AttentionShape& shape, const AttentionBackward& tensors,
                                    const Dropout& dropout, std::int64_t head, std::int64_t token,
                                    std::int64_t count) {
  alignas(64) float log_sum[kBlockSide], along[kBlockSide] = {};
  fill(log_sum, kBlockSide, kInfinity);
  for (std::int64_t r = 0; r < count; ++r) {
    fetch<0>(place(tensors.out, head + 1, token + r), shape.head_size);
    log_sum[r] = tensors.lse[head * shape.num_queries + token + r];
    along[r] = dot_rows(place(tensors.out, head, token + r), place(tensors.grad_out, head, token + r),
                        shape.head_size);
  }
  return {{load(log_sum), load(log_sum + kSide)},
          {load(along), load(along + kSide)},
          {dropout_rows(dropout, head, token, count), dropout_rows(dropout, head, token + kSide, count - kSide)}};
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
