// What the kernels of attention share: which sequence, which keys a query may read, what is dropped.
#pragma once

#include <cstdint>

#include "attention/kernels.h"
#include "common/dropout.h"
#include "common/lanes.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

constexpr double kLog2E = 1.4426950408889634;  // scores are kept in powers of 2
constexpr float kInfinity = __builtin_inff();

// Keys, or queries.
struct KeyRange {
  std::int64_t from, to;  // nothing where to <= from
};

// Where a sequence's queries and keys lie.
struct Sequence {
  std::int64_t first_q, num_q, first_k, num_k;

  RERANK_FAST_INLINE Sequence(const AttentionShape& shape, std::int64_t index)
      : first_q(shape.cu_seqlens_q[index]),
        num_q(shape.cu_seqlens_q[index + 1] - first_q),
        first_k(shape.cu_seqlens_k[index]),
        num_k(shape.cu_seqlens_k[index + 1] - first_k) {}

  // The keys that query i may read; both ends never fall as i rises.
  RERANK_FAST_INLINE KeyRange readable(const AttentionShape& shape, std::int64_t i) const {
    const std::int64_t place = i + num_k - num_q;
    return {shape.window_left < 0 ? 0 : larger(0, place - shape.window_left),
            shape.window_right < 0 ? num_k : larger(0, smaller(num_k, place + shape.window_right + 1))};
  }

  RERANK_FAST_INLINE bool reads_nothing(const AttentionShape& shape, std::int64_t i) const {
    const KeyRange range = readable(shape, i);
    return range.to <= range.from;
  }

  // The keys that any of the queries [first, last) may read, from a whole number of `step` keys on.
  RERANK_FAST_INLINE KeyRange readable(const AttentionShape& shape, std::int64_t first, std::int64_t last,
                                       std::int64_t step) const {
    const std::int64_t from = readable(shape, first).from / step * step, to = readable(shape, last - 1).to;
    return {smaller(from, to), to};
  }

  // The queries that may read any of the keys [first, last).
  RERANK_FAST_INLINE KeyRange readers(const AttentionShape& shape, std::int64_t first, std::int64_t last) const {
    const std::int64_t before = num_k - num_q;  // of a query's place
    const std::int64_t from = shape.window_right < 0 ? 0 : larger(0, first - before - shape.window_right);
    const std::int64_t beyond = shape.window_left < 0 ? num_q : last - before + shape.window_left;
    const std::int64_t to = larger(0, smaller(num_q, beyond));
    return {smaller(from, to), to};
  }

  // The keys that each of the queries [first, last) may read.
  RERANK_FAST_INLINE KeyRange readable_by_all(const AttentionShape& shape, std::int64_t first,
                                              std::int64_t last) const {
    return {readable(shape, last - 1).from, readable(shape, first).to};
  }
};

// The factors of kLanes probabilities from first_key on: 0 or 1 / (1 - p).
RERANK_FAST_INLINE Lanes<float> dropout_factors(const Dropout& dropout, std::uint32_t row, std::int64_t first_key) {
  const Lanes<std::uint32_t> key = lane_numbers<std::uint32_t>() + static_cast<std::uint32_t>(first_key);
  return Dropout::draw(row, key) < dropout.threshold ? Lanes<float>{} : every_lane(dropout.rescale);
}

// Asks for a row of the next head, which comes next and lies too far off for the processor to guess that.
template <int kToWrite, typename Value>
RERANK_FAST_INLINE void fetch(const Value* row, std::int64_t size) {
  for (std::int64_t e = 0; e < size; e += 64 / static_cast<std::int64_t>(sizeof *row))
    __builtin_prefetch(row + e, kToWrite);
}

RERANK_FAST_INLINE std::int64_t whole(std::int64_t count, std::int64_t step) {
  return (count + step - 1) / step * step;
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
