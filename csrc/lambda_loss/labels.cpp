#include "lambda_loss/labels.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "common/dispatch.h"
#include "lambda_loss/kernels.h"

namespace rerank_fast {
namespace {

constexpr auto kNotSmall = static_cast<double>(kSmallLabels);

float largest_small(const float* y, std::int64_t size) { return kernels().lambda_loss->largest_small(y, size); }

double largest_small(const double* y, std::int64_t size) {
  double largest = 0;
  for (std::int64_t i = 0; i < size; ++i)
    largest = y[i] >= 0 && y[i] < kNotSmall && y[i] == std::floor(y[i]) ? std::max(largest, y[i]) : kNotSmall;
  return largest;
}

template <typename T>
bool is_nan(T label) {
  return label != label;
}

template <typename T>
bool is_below_infinity(T label) {  // false for NaN
  return label < std::numeric_limits<T>::infinity();
}

template <typename T>
void count_small(const T* y, std::int64_t size, int largest, std::int64_t* counts) {
  std::fill(counts, counts + largest + 1, 0);
  if (largest < 8) {
    // Eight counts in one register: no chain of loads and stores where a label repeats.
    for (std::int64_t start = 0; start < size; start += 255) {
      std::uint64_t packed = 0;
      for (std::int64_t i = start; i < std::min(start + 255, size); ++i)
        packed += std::uint64_t{1} << (8 * static_cast<int>(y[i]));
      for (int label = 0; label <= largest; ++label) counts[label] += packed >> (8 * label) & 255;
    }
  } else {
    for (std::int64_t i = 0; i < size; ++i) ++counts[static_cast<int>(y[i])];
  }
}

// Unordered pairs of different labels among `size` documents, of whose labels each occurs count times.
std::int64_t unequal_pairs(const std::int64_t* count, const std::int64_t* end, std::int64_t size) {
  std::int64_t equal = 0;
  for (; count != end; ++count) equal += *count * *count;
  return (size * size - equal) / 2;
}

}  // namespace

template <typename T>
void Labels<T>::sort(const T* y, std::int64_t size) {
  sorted.assign(y, y + size);
  if (diverged) sorted.erase(std::remove_if(sorted.begin(), sorted.end(), is_nan<T>), sorted.end());
  std::sort(sorted.begin(), sorted.end(), std::greater<T>());
  runs.clear();
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    if (i == 0 || sorted[i] != sorted[i - 1]) runs.push_back(0);
    ++runs.back();
  }
}

template <typename T>
void Labels<T>::note(double label, std::int64_t count) {
  ++distinct;
  if (count <= majority_count) return;
  majority_count = count;
  majority = label;
}

template <typename T>
void Labels<T>::read(const T* y, std::int64_t size) {
  largest = static_cast<int>(largest_small(y, size));
  small = largest < kSmallLabels;
  diverged = !small && !std::all_of(y, y + size, is_below_infinity<T>);
  distinct = 0;
  majority_count = 0;
  if (small) {
    count_small(y, size, largest, counts);
    for (int label = 0; label <= largest; ++label)
      if (counts[label] != 0) note(label, counts[label]);
    pairs = unequal_pairs(counts, counts + largest + 1, size);
    return;
  }
  sort(y, size);
  std::int64_t start = 0;
  for (const std::int64_t run : runs) {
    note(static_cast<double>(sorted[start]), run);
    start += run;
  }
  pairs = pairs_of_runs();
}

template <typename T>
std::int64_t Labels<T>::pairs_among(const T* y, std::int64_t size) {
  if (small) {
    std::int64_t some[kSmallLabels];
    count_small(y, size, largest, some);
    return unequal_pairs(some, some + largest + 1, size);
  }
  sort(y, size);
  return pairs_of_runs();
}

template <typename T>
std::int64_t Labels<T>::pairs_of_runs() const {
  return unequal_pairs(runs.data(), runs.data() + runs.size(), static_cast<std::int64_t>(sorted.size()));
}

template <typename T>
Gains::Gains(const Labels<T>& labels, std::int64_t size, std::int64_t k, double eps, const double* inverse_discount,
             const double* ideal) {
  double best = 0;  // the ideal DCG
  if (labels.small) {
    std::int64_t rank = 0;
    for (int label = labels.largest; label >= 0; --label) {
      small[label] = static_cast<double>((std::uint64_t{1} << label) - 1);
      const std::int64_t to = rank + labels.counts[label];
      best += small[label] * (ideal[std::min(to, k)] - ideal[std::min(rank, k)]);
      rank = to;
    }
    const double normalizer = 1.0 / std::max(best, eps);
    for (int label = 0; label <= labels.largest; ++label) small[label] *= normalizer;
    return;
  }
  largest_ = std::max(0.0, static_cast<double>(labels.sorted[0]));
  for (std::int64_t r = 0; r < std::min(k, size); ++r)
    best += of(static_cast<double>(labels.sorted[r])) * inverse_discount[r];
  normalizer_ = 1.0 / std::max(best, eps * std::exp2(-largest_));
}

double Gains::of(double label) const {
  const double relevance = std::max(0.0, label);
  // expm1 where 2^relevance is in range: exact for labels near zero.
  return normalizer_ * (relevance < 64.0 ? std::expm1(relevance * 0.6931471805599453) * std::exp2(-largest_)
                                         : std::exp2(relevance - largest_) - std::exp2(-largest_));
}

template struct Labels<float>;
template struct Labels<double>;
template Gains::Gains(const Labels<float>&, std::int64_t, std::int64_t, double, const double*, const double*);
template Gains::Gains(const Labels<double>&, std::int64_t, std::int64_t, double, const double*, const double*);

}  // namespace rerank_fast
