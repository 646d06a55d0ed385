// Tensors of fp32 or bf16 (the upper half of a float's bits), read and written as fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/lanes.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

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

// One value.
template <bool kBf16>
struct Stored;
template <>
struct Stored<true> {
  using type = std::uint16_t;
  static RERANK_FAST_INLINE float get(type value) { return widen(value); }
  static RERANK_FAST_INLINE type put(float value) { return narrow(value); }
};
template <>
struct Stored<false> {
  using type = float;
  static RERANK_FAST_INLINE float get(type value) { return value; }
  static RERANK_FAST_INLINE type put(float value) { return value; }
};

typedef std::uint16_t NarrowLanes __attribute__((vector_size(kLanes * 2)));

// kLanes values.
template <bool kBf16>
RERANK_FAST_INLINE Lanes<float> load_wide(const typename Stored<kBf16>::type* from) {
  if constexpr (kBf16) {
    NarrowLanes values;
    std::memcpy(&values, from, sizeof values);
    const Lanes<std::uint32_t> bits = __builtin_convertvector(values, Lanes<std::uint32_t>) << 16;
    Lanes<float> result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  } else {
    return load(from);
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void store_narrow(Lanes<float> values, typename Stored<kBf16>::type* to) {
  if constexpr (kBf16) {
    Lanes<std::uint32_t> bits;
    std::memcpy(&bits, &values, sizeof bits);
    const Lanes<std::uint32_t> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    bits = values == values ? rounded : (bits >> 16 | 0x40u);
    const NarrowLanes result = __builtin_convertvector(bits, NarrowLanes);
    std::memcpy(to, &result, sizeof result);
  } else {
    store(values, to);
  }
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
