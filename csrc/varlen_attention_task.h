// What the kernels of varlen_attention share: which sequence, which keys a query may read, what is dropped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "numeric.h"
#include "varlen_attention.h"

namespace rerank_fast {

struct KeyRange {
  std::int64_t from, to;  // nothing where to <= from
};

// Where a sequence's queries and keys lie.
struct Sequence {
  std::int64_t first_q, num_q, first_k, num_k;

  Sequence(const AttentionShape& shape, std::int64_t index)
      : first_q(shape.cu_seqlens_q[index]),
        num_q(shape.cu_seqlens_q[index + 1] - first_q),
        first_k(shape.cu_seqlens_k[index]),
        num_k(shape.cu_seqlens_k[index + 1] - first_k) {}

  // The keys that query i may read; both ends never fall as i rises.
  RERANK_FAST_INLINE KeyRange readable(const AttentionShape& shape, std::int64_t i) const {
    const std::int64_t place = i + num_k - num_q, zero = 0;
    return {shape.window_left < 0 ? 0 : std::max(zero, place - shape.window_left),
            shape.window_right < 0 ? num_k : std::max(zero, std::min(num_k, place + shape.window_right + 1))};
  }

  // The keys that any of the queries [first, last) may read, from a whole number of `step` keys on.
  RERANK_FAST_INLINE KeyRange readable(const AttentionShape& shape, std::int64_t first, std::int64_t last,
                                       std::int64_t step) const {
    const std::int64_t from = readable(shape, first).from / step * step, to = readable(shape, last - 1).to;
    return {std::min(from, to), to};
  }

  // The keys that each of the queries [first, last) may read.
  RERANK_FAST_INLINE KeyRange readable_by_all(const AttentionShape& shape, std::int64_t first,
                                              std::int64_t last) const {
    return {readable(shape, last - 1).from, readable(shape, first).to};
  }
};

// The factors of kBlock probabilities from first_key on: 0 or 1 / (1 - p).
RERANK_FAST_INLINE Lanes<float> dropout_factors(const Dropout& dropout, std::uint32_t row, std::int64_t first_key) {
  Lanes<std::uint32_t> key;
  for (std::uint32_t lane = 0; lane < kBlock; ++lane) key[lane] = lane;
  key += static_cast<std::uint32_t>(first_key);
  return Dropout::draw(row, key) < dropout.threshold ? Lanes<float>{} : every_lane(dropout.rescale);
}

constexpr double kLog2E = 1.4426950408889634;  // scores are kept in powers of 2

inline std::int64_t whole(std::int64_t count, std::int64_t step) { return (count + step - 1) / step * step; }

// Memory that a thread keeps from task to task, from a cache line on.
template <typename T>
class Scratch {
 public:
  T* room(std::int64_t count) {
    constexpr std::size_t kLine = 64 / sizeof(T);
    const auto wanted = static_cast<std::size_t>(count) + kLine;
    if (memory_.size() < wanted) memory_.resize(wanted + wanted / 2);
    const auto past = reinterpret_cast<std::uintptr_t>(memory_.data()) % 64;
    return memory_.data() + (64 - past) % 64 / sizeof(T);
  }

 private:
  std::vector<T> memory_;
};

}  // namespace rerank_fast
