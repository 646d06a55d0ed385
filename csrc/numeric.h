// What the kernels share: bf16, and the counter-based generator of dropout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// One build serves every x86-64 processor: the loader picks a clone of a function at run time. Not in a sanitized
// build, whose runtime is not ready when the loader picks.
#if defined(RERANK_FAST_CLONES)  // given: a build for one processor
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define RERANK_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RERANK_FAST_CLONES
#endif
#if defined(__GNUC__)
#define RERANK_FAST_INLINE inline __attribute__((always_inline))
#else
#define RERANK_FAST_INLINE inline
#endif

namespace rerank_fast {

RERANK_FAST_INLINE float widen(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// To the nearest bf16, ties to even.
RERANK_FAST_INLINE std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<std::uint16_t>(value != value ? bits >> 16 | 0x40u : rounded);
}

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

  Dropout(double p, std::uint64_t seed_value, const std::int32_t* rows_given = nullptr)
      : threshold(static_cast<std::uint32_t>(std::min(p * 4294967296.0, 4294967295.0))),
        rescale(static_cast<float>(1.0 / (1.0 - p))),
        seed(mix(static_cast<std::uint32_t>(seed_value) ^ mix(static_cast<std::uint32_t>(seed_value >> 32)))),
        rows(rows_given) {}

  RERANK_FAST_INLINE std::uint32_t row(std::uint32_t stream, std::uint32_t index) const {
    return mix(mix(seed + stream * 0x9e3779b9u) +
               (rows == nullptr ? index : static_cast<std::uint32_t>(rows[index])));
  }
  template <typename Bits>
  static RERANK_FAST_INLINE Bits draw(std::uint32_t row, Bits column) {
    return mix(column * 0x9e3779b9u + row);
  }
};

}  // namespace rerank_fast
