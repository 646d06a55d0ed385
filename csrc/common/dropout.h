// The counter-based generator of dropout.
#pragma once

#include <cstdint>

#include "common/set.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

// A permutation of 32 bits that spreads every one of them over all. Bits is an integer or a vector of them.
template <typename Bits>
RERANK_FAST_INLINE Bits mix(Bits x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Whether a value is kept follows from the seed and its place alone: backward draws what forward drew. A place is a
// row, which names a stream of its own, and a column in it. Where rows are given, rows[i] stands for row i.
struct Dropout {
  std::uint32_t threshold;  // of 2^32 values those below it are dropped
  float rescale;            // 1 / (1 - p)
  std::uint32_t seed;
  const std::int32_t* rows;

  RERANK_FAST_INLINE Dropout(double p, std::uint64_t seed_value, const std::int32_t* rows_given = nullptr)
      : threshold(static_cast<std::uint32_t>(p < 1.0 - 1.0 / 4294967296.0 ? p * 4294967296.0 : 4294967295.0)),
        rescale(static_cast<float>(1.0 / (1.0 - p))),
        seed(mix(static_cast<std::uint32_t>(seed_value) ^ mix(static_cast<std::uint32_t>(seed_value >> 32)))),
        rows(rows_given) {}

  RERANK_FAST_INLINE std::uint32_t row(std::uint32_t stream, std::uint32_t index) const {
    return mix(mix(seed + stream * 0x9e3779b9u) +
               (rows == nullptr ? index : static_cast<std::uint32_t>(rows[index])));
  }
  // Of one place, or where either is a vector, of as many.
  template <typename Row, typename Column>
  static RERANK_FAST_INLINE auto draw(Row row, Column column) {
    return mix(column * 0x9e3779b9u + row);
  }
  // 0 or 1 / (1 - p).
  RERANK_FAST_INLINE float factor(std::uint32_t row, std::int32_t column) const {
    return draw(row, static_cast<std::uint32_t>(column)) < threshold ? 0.0f : rescale;
  }
};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
