// kBlock values at once, in the compiler's own vectors: one text for AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numeric.h"

namespace rerank_fast {

constexpr std::int64_t kBlock = 16;

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(kBlock * sizeof(float))));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(kBlock * sizeof(double))));
};
template <>
struct LanesOf<std::uint32_t> {
  typedef std::uint32_t type __attribute__((vector_size(kBlock * sizeof(std::uint32_t))));
};
template <>
struct LanesOf<std::int32_t> {
  typedef std::int32_t type __attribute__((vector_size(kBlock * sizeof(std::int32_t))));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

// One value in every lane. A minus and not a plus: x - 0 is x, -0 included.
template <typename T>
RERANK_FAST_INLINE Lanes<T> every_lane(T value) {
  return value - Lanes<T>{};
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

// The sum of all lanes, halves first: a short chain, and an error that does not grow with the lanes.
template <typename T>
RERANK_FAST_INLINE T sum(const Lanes<T>& lanes) {
  typedef T Half __attribute__((vector_size(kBlock / 2 * sizeof(T))));
  typedef T Quarter __attribute__((vector_size(kBlock / 4 * sizeof(T))));
  Half halves[2];
  std::memcpy(halves, &lanes, sizeof lanes);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

template <typename T>
RERANK_FAST_INLINE T maximum(const Lanes<T>& lanes) {
  typedef T Half __attribute__((vector_size(kBlock / 2 * sizeof(T))));
  typedef T Quarter __attribute__((vector_size(kBlock / 4 * sizeof(T))));
  Half halves[2];
  std::memcpy(halves, &lanes, sizeof lanes);
  const Half half = halves[0] > halves[1] ? halves[0] : halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter q = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
  const T even = q[0] > q[2] ? q[0] : q[2], odd = q[1] > q[3] ? q[1] : q[3];
  return even > odd ? even : odd;
}

}  // namespace rerank_fast
