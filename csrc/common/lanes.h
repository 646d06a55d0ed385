// A register's worth of values, in the compiler's own vectors: one text for every instruction set. Compilers take
// comparisons of vectors that are wider than a register apart, and spill what they add up.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/set.h"

namespace rerank_fast {

// Arrays that kernels read are padded to whole blocks of this many values, whatever the set.
constexpr std::int64_t kBlock = 16;

inline namespace RERANK_FAST_SET {

#if defined(__AVX512F__)
constexpr std::int64_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr std::int64_t kRegisterBytes = 32;
#else
constexpr std::int64_t kRegisterBytes = 16;
#endif
constexpr std::int64_t kLanes = kRegisterBytes / 4;  // floats of a register

template <typename T>
struct LanesOf {
  static constexpr std::int64_t kCount = kRegisterBytes / static_cast<std::int64_t>(sizeof(T));
  typedef T type __attribute__((vector_size(kRegisterBytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;
template <typename T>
constexpr std::int64_t kLanesOf = LanesOf<T>::kCount;

// One value in every lane. A minus and not a plus: x - 0 is x, -0 included.
template <typename T>
RERANK_FAST_INLINE Lanes<T> every_lane(T value) {
  return value - Lanes<T>{};
}

// 0, 1, 2, ...
template <typename T>
RERANK_FAST_INLINE Lanes<T> lane_numbers() {
  Lanes<T> lanes;
  for (std::int64_t lane = 0; lane < kLanesOf<T>; ++lane) lanes[lane] = static_cast<T>(lane);
  return lanes;
}

template <typename T>
RERANK_FAST_INLINE Lanes<T> load(const T* from) {
  Lanes<T> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <typename T>
RERANK_FAST_INLINE void store(const Lanes<T>& lanes, T* to) {
  std::memcpy(to, &lanes, sizeof lanes);
}

// Lanes of a and b, which count on from a's, in the order given. V is any vector.
template <int... kFrom, typename V>
RERANK_FAST_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  using Number = std::conditional_t<sizeof(a[0]) == 2, std::int16_t, std::int32_t>;
  typedef Number Order __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Order{kFrom...});
#endif
}

typedef float FourLanes __attribute__((vector_size(16)));

// Four rows of four values turned round.
RERANK_FAST_INLINE void transpose(FourLanes (&row)[4]) {
  const FourLanes low[2] = {shuffle<0, 4, 1, 5>(row[0], row[1]), shuffle<0, 4, 1, 5>(row[2], row[3])};
  const FourLanes high[2] = {shuffle<2, 6, 3, 7>(row[0], row[1]), shuffle<2, 6, 3, 7>(row[2], row[3])};
  row[0] = shuffle<0, 1, 4, 5>(low[0], low[1]);
  row[1] = shuffle<2, 3, 6, 7>(low[0], low[1]);
  row[2] = shuffle<0, 1, 4, 5>(high[0], high[1]);
  row[3] = shuffle<2, 3, 6, 7>(high[0], high[1]);
}

struct Add {
  template <typename V>
  RERANK_FAST_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Highest {
  template <typename V>
  RERANK_FAST_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

// All lanes joined, halves first: a short chain, and an error that does not grow with the lanes.
template <typename T, int kBytes, typename Vector, typename Join>
RERANK_FAST_INLINE T join_lanes(Vector lanes, Join join) {
  if constexpr (kBytes == 16) {
    T values[16 / sizeof(T)];
    std::memcpy(values, &lanes, sizeof values);
    if constexpr (sizeof(T) == 8) {
      return join(values[0], values[1]);
    } else {
      return join(join(values[0], values[2]), join(values[1], values[3]));
    }
  } else {
    typedef T Half __attribute__((vector_size(kBytes / 2)));
    Half halves[2];
    std::memcpy(halves, &lanes, sizeof lanes);
    return join_lanes<T, kBytes / 2>(join(halves[0], halves[1]), join);
  }
}

template <typename T>
RERANK_FAST_INLINE T sum(Lanes<T> lanes) {
  return join_lanes<T, kRegisterBytes>(lanes, Add{});
}

template <typename T>
RERANK_FAST_INLINE T maximum(Lanes<T> lanes) {
  return join_lanes<T, kRegisterBytes>(lanes, Highest{});
}

RERANK_FAST_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
RERANK_FAST_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

template <typename T>
RERANK_FAST_INLINE void fill(T* to, std::int64_t count, T value) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
