// What the kernels take of mathematics, in fp32: of one value or of a register of them. Errors are stated in units of
// the result's magnitude; tests/ops/test_csrc_math.py measures them, and finds them for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/lanes.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

template <typename V>
struct BitsOf {
  using type = Lanes<std::uint32_t>;
};
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
};

template <typename To, typename From>
RERANK_FAST_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// One value as a V: a register of it, or itself.
template <typename V>
RERANK_FAST_INLINE V all(float value) {
  return value - V{};
}

template <typename V>
RERANK_FAST_INLINE V absolute(V x) {
  return x < 0 ? -x : x;
}

// A number near zero that is rounded to a whole one by adding this, which then stands in the low bits.
constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23

// p * 2^n of the whole number n that `shifted` holds, kRounds + n, by adding n to p's exponent: where the product is a
// normal number.
template <typename V>
RERANK_FAST_INLINE V times_power_of_two(V p, V shifted) {
  using Bits = typename BitsOf<V>::type;
  return same_bits<V>(same_bits<Bits>(p) + (same_bits<Bits>(shifted) << 23));  // none of kRounds' bits is left
}

// 2^f for f from -1/2 to 1/2, to 1e-7.
template <typename V>
RERANK_FAST_INLINE V exp2_fraction(V f) {
  V p = 0.000153458118f * f + 0.00133999312f;
  p = p * f + 0.00961848896f;
  p = p * f + 0.0555032878f;
  p = p * f + 0.240226469f;
  p = p * f + 0.693147206f;
  return p * f + 1.0f;
}

// The same to 3e-6: far finer than bf16, which it is for.
template <typename V>
RERANK_FAST_INLINE V exp2_fraction_coarse(V f) {
  V p = 0.00957010191f * f + 0.0559178603f;
  p = p * f + 0.240247448f;
  p = p * f + 0.693121815f;
  return p * f + 0.999999261f;
}

// 2^x for x <= 0, to 2e-7; 0 below -126, where no sum sees it. NaN stays NaN.
template <bool kCoarse = false, typename V = float>
RERANK_FAST_INLINE V exp2_below(V x) {
  const V shifted = x + kRounds;
  const V f = x - (shifted - kRounds);
  const V result = times_power_of_two(kCoarse ? exp2_fraction_coarse(f) : exp2_fraction(f), shifted);
  return x < -126.0f ? V{} : result;  // what is below has given anything
}

// e^-d for d >= 0, to 3e-7; e^-87 beyond 87. NaN stays NaN.
template <typename V>
RERANK_FAST_INLINE V exp_negative(V d) {
  const V x = d > 87.0f ? all<V>(-87.0f) : -d;
  const V shifted = x * 1.44269504f + kRounds, n = shifted - kRounds;
  // ln 2 in two parts, of which the first times n is exact.
  const V f = ((x - n * 0.693145752f) - n * 1.42860677e-6f) * 1.44269504f;
  return times_power_of_two(exp2_fraction(f), shifted);
}

// log(1 + t) for t from 0 to 1, to 2e-7: t times a polynomial in t - 1/2 (a fit of log1p(t) / t).
template <typename V>
RERANK_FAST_INLINE V log1p_unit(V t) {
  const V v = t - 0.5f;
  V p = 0.00523269146f * v - 0.0085744617f;
  p = p * v + 0.0115864774f;
  p = p * v - 0.0202282461f;
  p = p * v + 0.0366338598f;
  p = p * v - 0.067711447f;
  p = p * v + 0.132609085f;
  p = p * v - 0.288526665f;
  p = p * v + 0.810930219f;
  return t * p;
}

// log2 x of a normal x > 0, to 3e-7 of the result or, from 1/2 to 2, of 1. NaN stays NaN.
template <typename V>
RERANK_FAST_INLINE V log2_of(V x) {
  using Bits = typename BitsOf<V>::type;
  const Bits bits = same_bits<Bits>(x);
  const V exponent = same_bits<V>((bits >> 23) + (0x4b400000u - 127u)) - kRounds;
  const V fraction = same_bits<V>((bits & 0x7fffffu) | 0x3f800000u) - 1.0f;
  return exponent + log1p_unit(fraction) * 1.44269504f + (x - x);
}

// In double they are the C library's, a value at a time.
RERANK_FAST_INLINE Lanes<double> exp_negative(Lanes<double> d) {
  for (std::int64_t lane = 0; lane < kLanesOf<double>; ++lane) d[lane] = __builtin_exp(-d[lane]);
  return d;
}
RERANK_FAST_INLINE Lanes<double> log1p_unit(Lanes<double> t) {
  for (std::int64_t lane = 0; lane < kLanesOf<double>; ++lane) t[lane] = __builtin_log1p(t[lane]);
  return t;
}

// To 3e-7. NaN stays NaN.
template <typename V>
RERANK_FAST_INLINE V tanh_of(V x) {
  using Bits = typename BitsOf<V>::type;
  const Bits bits = same_bits<Bits>(x);
  const V a = same_bits<V>(bits & 0x7fffffffu), a2 = a * a, t = exp_negative(2.0f * a);
  // Near 0, where 1 - t cancels, an odd polynomial.
  V p = -0.00628366228f * a2 + 0.0211214516f;
  p = p * a2 - 0.053876318f;
  p = p * a2 + 0.133329332f;
  p = p * a2 - 0.333333313f;
  const V result = a < 0.6f ? a + a * (a2 * p) : (1.0f - t) / (1.0f + t);
  return same_bits<V>(same_bits<Bits>(result) | (bits & 0x80000000u));
}

// The normal distribution's P(X <= x), to 3e-7 of 1, from its density's exponential e^(-x^2 / 2).
RERANK_FAST_INLINE float normal_cdf(float x, float exponential) {
  const float t = 1.0f / (1.0f + 0.3f * __builtin_fabsf(x));
  float p = -0.00115676958f;
  p = p * t + 0.0424628556f;
  p = p * t - 0.173512369f;
  p = p * t + 0.227417424f;
  p = p * t - 0.0697029904f;
  p = p * t + 0.13590391f;
  p = p * t + 0.0979359522f;
  p = p * t + 0.121039622f;
  p = p * t + 0.119612373f;
  const float tail = exponential * (p * t);
  return x < 0.0f ? tail : 1.0f - tail;
}

// x P(X <= x) to 5e-5, and to 3e-5 |x| beyond 4: far below a level of an int8 row that holds such values.
template <typename V>
RERANK_FAST_INLINE V gelu_coarse(V x) {
  const V above = x < -4.0f ? all<V>(-4.0f) : x, near = above > 4.0f ? all<V>(4.0f) : above, square = near * near;
  V p = -1.3012772e-09f * square + 1.04195045e-07f;
  p = p * square - 3.6571098e-06f;
  p = p * square + 7.48547754e-05f;
  p = p * square - 0.00100648869f;
  p = p * square + 0.00950539205f;
  p = p * square - 0.0658878312f;
  p = p * square + 0.398673385f;
  return x * (0.5f + near * p);
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
