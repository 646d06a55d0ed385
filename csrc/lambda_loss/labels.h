// What follows from the labels of one list alone: how often each occurs, the pairs of unequal ones, gains.
#pragma once

#include <cstdint>
#include <vector>

#include "lambda_loss/kernels.h"

namespace rerank_fast {

template <typename T>
struct Labels {
  bool diverged;                       // one is NaN, which is no label below, or infinity
  bool small;                          // whole numbers from 0 to kSmallLabels - 1
  int largest;                         // of small labels
  std::int64_t counts[kSmallLabels];   // of small labels, up to the largest
  std::int64_t distinct;
  std::int64_t pairs;                  // unordered pairs of different labels
  double majority;                     // the most frequent label
  std::int64_t majority_count;
  std::vector<T> sorted;               // largest first and without NaN, where labels are not small
  std::vector<std::int64_t> runs;      // of equal labels there

  void read(const T* y, std::int64_t size);

  // Unordered pairs of different labels among some of the list's documents.
  std::int64_t pairs_among(const T* y, std::int64_t size);

 private:
  void sort(const T* y, std::int64_t size);
  std::int64_t pairs_of_runs() const;
  void note(double label, std::int64_t count);
};

// The gain of a label over the ideal DCG@k (at least eps), both over 2^largest so that a large label stays finite.
struct Gains {
  double small[kSmallLabels];  // where labels are small

  template <typename T>
  Gains(const Labels<T>& labels, std::int64_t size, std::int64_t k, double eps, const double* inverse_discount,
        const double* ideal);  // ideal[n]: the sum of the first n inverse discounts
  double of(double label) const;

 private:
  double largest_ = 0, normalizer_ = 1;
};

}  // namespace rerank_fast
