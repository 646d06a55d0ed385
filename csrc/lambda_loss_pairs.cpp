#include "lambda_loss_pairs.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "numeric.h"

namespace rerank_fast {
namespace {

// 1 / (1 + t) for t in [0, 1]: a quadratic guess, twice refined by Newton's method.
RERANK_FAST_INLINE float reciprocal(float t) {
  const float u = 1.0f + t, v = t - 0.5f;
  float r = 0.666666693f + v * (-0.484848475f + v * 0.323232109f);
  r = r + r * (1.0f - u * r);
  return r + r * (1.0f - u * r);
}

// log(1 + t) for t in [0, 1]: t times a polynomial in t - 1/2 (a fit of log1p(t) / t in relative error).
RERANK_FAST_INLINE float log1p_unit(float t) {
  const float v = t - 0.5f;
  float p = 0.00523269146f;
  p = p * v - 0.0085744617f;
  p = p * v + 0.0115864774f;
  p = p * v - 0.0202282461f;
  p = p * v + 0.0366338598f;
  p = p * v - 0.067711447f;
  p = p * v + 0.132609085f;
  p = p * v - 0.288526665f;
  p = p * v + 0.810930219f;
  return t * p;
}

// exp(-d) for d >= 0; NaN stays NaN.
RERANK_FAST_INLINE float exp_negative(float d) {
  const float x = d > 87.0f ? -87.0f : -d;
  const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to the nearest whole number, in the low bits
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  float p = 0.00138368458f;
  p = p * f + 0.0083748158f;
  p = p * f + 0.0416682256f;
  p = p * f + 0.166664202f;
  p = p * f + 0.499999921f;
  p = p * f + 1.00000004f;
  p = p * f + 1.0f;
  return p * power;
}

RERANK_FAST_INLINE double reciprocal(double t) { return 1.0 / (1.0 + t); }
RERANK_FAST_INLINE double log1p_unit(double t) { return std::log1p(t); }
RERANK_FAST_INLINE double exp_negative(double d) { return std::exp(-d); }

// Row i against the columns [begin, end), whole blocks. kFull: all columns; else those below i in rank, which with
// kMask is checked.
template <typename T, Weighting kWeighting, bool kFull, bool kFast, bool kMask>
RERANK_FAST_INLINE void visit(const RankedList<T>& list, T* pull, std::int32_t i, std::int32_t begin,
                              std::int32_t end, T* loss, T* row_pull) {
  const T* score = list.score;
  const T* exponential = list.exponential;
  const T* reciprocals = list.reciprocal;
  const T* gain = list.gain;
  const T* inverse = list.inverse_discount;
  const T* label = list.label;
  const T* share = list.share;
  const T* is_majority = list.is_majority;
  const T* delta = list.delta - i;
  const T s_i = score[i], e_i = exponential[i], r_i = reciprocals[i], g_i = gain[i], inverse_i = inverse[i];
  const T y_i = label[i], mu = list.mu, slope = list.slope;
  const bool turned = list.turned;
  const auto size = static_cast<std::int32_t>(list.size);
  T loss_sum = 0, pull_sum = 0;
#pragma omp simd reduction(+ : loss_sum, pull_sum)
  for (std::int32_t j = begin; j < end; ++j) {
    const T signed_d = slope * (s_i - score[j]);
    const T d = kFull ? std::fabs(signed_d) : signed_d;  // at least 0
    T t;                                                 // exp(-d)
    if constexpr (kFast) {
      t = exponential[j] * r_i;
      if constexpr (kFull) {
        const T other_way = e_i * reciprocals[j];
        t = t < other_way ? t : other_way;
      }
    } else {
      t = exp_negative(d);
    }
    bool meant = true;
    if constexpr (kMask) {
      meant = j > i && j < size;
      t = meant ? t : T(0);
    }
    const T r = reciprocal(t);
    const T log_sum = log1p_unit(t);  // -log sigmoid(d)
    if constexpr (kWeighting == Weighting::kEveryPair) {
      // The weights of the pair that prefers the better ranked document, and of the one that prefers the other.
      const T ordered = turned ? gain[j] : g_i, inverted = turned ? g_i : gain[j];
      T pulled = (ordered * t - inverted) * r;
      T term = (ordered + inverted) * log_sum + inverted * d;
      if constexpr (kMask) {
        pulled = meant ? pulled : T(0);
        term = meant ? term : T(0);
      }
      loss_sum += term;
      pull_sum += pulled;
      pull[j] -= pulled;
    } else {
      const T difference = g_i - gain[j];
      const bool inverted = kFull ? difference * signed_d < T(0) : difference < T(0);
      T weight;  // with the sign of the difference
      if constexpr (kWeighting == Weighting::kNone) {
        weight = difference > T(0) ? T(1) : (difference < T(0) ? T(-1) : T(0));
      } else {
        const T swap = inverse_i - inverse[j];
        weight = (mu * delta[j] + (kFull ? std::fabs(swap) : swap)) * difference;
      }
      if constexpr (kMask) weight = meant ? weight : T(0);
      T pulled = weight * (inverted ? r : t * r);
      T term = std::fabs(weight) * (inverted ? log_sum + d : log_sum);
      if constexpr (!kFast) {
        // Infinities and NaN must not leak from pairs that are none.
        const bool counts = label[j] != y_i && j < size && meant;
        pulled = counts ? pulled : T(0);
        term = counts ? term : T(0);
      }
      // Of two rows that meet in each other's columns, each takes its own pull and half of the loss.
      loss_sum += kFull ? term * share[j] : term;
      pull_sum += pulled;
      pull[j] -= kFull ? pulled * is_majority[j] : pulled;
    }
  }
  *loss += loss_sum;
  *row_pull += pull_sum;
}

template <typename T, Weighting kWeighting, bool kFast>
RERANK_FAST_INLINE void visit_rows(const RankedList<T>& list, std::int64_t begin, std::int64_t end, double* loss, double* pull_total, T* pull) {
  constexpr auto kWidth = static_cast<std::int32_t>(kBlock);
  const auto size = static_cast<std::int32_t>(list.size);
  const std::int32_t padded = (size + kWidth - 1) / kWidth * kWidth;
  const auto last = static_cast<std::int32_t>(end);
  double loss_sum = 0;
  // Sums of a few hundred rows in T, then in double: the error does not grow with the list.
  for (auto first = static_cast<std::int32_t>(begin); first < last; first += 256) {
    std::fill(pull, pull + padded, T(0));
    for (std::int32_t row = first; row < std::min(first + 256, last); ++row) {
      const std::int32_t i = list.majority_mode ? list.rows[row] : row;
      T row_loss = 0, row_pull = 0;
      if (kWeighting != Weighting::kEveryPair && list.majority_mode) {
        visit<T, kWeighting, true, kFast, false>(list, pull, i, 0, padded, &row_loss, &row_pull);
      } else {
        const std::int32_t start = (i + 1) / kWidth * kWidth;
        const std::int32_t masked = kFast ? std::min(start + kWidth, padded) : padded;
        visit<T, kWeighting, false, kFast, true>(list, pull, i, start, masked, &row_loss, &row_pull);
        if (kFast) visit<T, kWeighting, false, kFast, false>(list, pull, i, masked, padded, &row_loss, &row_pull);
      }
      loss_sum += static_cast<double>(row_loss);
      pull_total[i] += static_cast<double>(row_pull);
    }
    for (std::int32_t j = 0; j < size; ++j) pull_total[j] += static_cast<double>(pull[j]);
  }
  *loss += loss_sum;
}

// Clones exist for plain functions only, hence a function a type and weighting rather than a template.
#define RERANK_FAST_PAIR_LOOP(NAME, T, WEIGHTING)                                                                   \
  RERANK_FAST_CLONES void NAME(const RankedList<T>& list, std::int64_t begin, std::int64_t end, double* loss,       \
                               double* pull, T* scratch) {                                                          \
    if (list.fast) {                                                                                                \
      visit_rows<T, WEIGHTING, true>(list, begin, end, loss, pull, scratch);                                        \
    } else {                                                                                                        \
      visit_rows<T, WEIGHTING, false>(list, begin, end, loss, pull, scratch);                                       \
    }                                                                                                               \
  }
RERANK_FAST_PAIR_LOOP(gain_float, float, Weighting::kGain)
RERANK_FAST_PAIR_LOOP(none_float, float, Weighting::kNone)
RERANK_FAST_PAIR_LOOP(every_pair_float, float, Weighting::kEveryPair)
RERANK_FAST_PAIR_LOOP(gain_double, double, Weighting::kGain)
RERANK_FAST_PAIR_LOOP(none_double, double, Weighting::kNone)
RERANK_FAST_PAIR_LOOP(every_pair_double, double, Weighting::kEveryPair)

}  // namespace

template <>
void visit_pairs(const RankedList<float>& list, Weighting weighting, std::int64_t begin,
                 std::int64_t end, double* loss, double* pull, float* scratch) {
  const auto loop = weighting == Weighting::kGain   ? gain_float
                    : weighting == Weighting::kNone ? none_float
                                                    : every_pair_float;
  loop(list, begin, end, loss, pull, scratch);
}

template <>
void visit_pairs(const RankedList<double>& list, Weighting weighting, std::int64_t begin,
                 std::int64_t end, double* loss, double* pull, double* scratch) {
  const auto loop = weighting == Weighting::kGain   ? gain_double
                    : weighting == Weighting::kNone ? none_double
                                                    : every_pair_double;
  loop(list, begin, end, loss, pull, scratch);
}

}  // namespace rerank_fast
