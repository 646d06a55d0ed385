// Lays one list out in rank order for the pair loop.
#pragma once

#include <cstdint>
#include <vector>

#include "common/lanes.h"
#include "common/scratch.h"
#include "lambda_loss/labels.h"
#include "lambda_loss/lambda_loss.h"
#include "lambda_loss/pairs.h"
#include "lambda_loss/ranks.h"

namespace rerank_fast {

inline std::int64_t padded(std::int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

// What one thread needs for one list; it grows to the longest list seen and is kept.
template <typename T>
struct ListScratch {
  RankedList<T> list;
  Weighting weighting;
  std::int64_t num_rows;   // to visit
  std::int64_t num_pairs;  // preference pairs (for NDCGLoss1 all ordered pairs) under the cut
  Labels<T> labels;

  // Lays a list out. False where it has no pair, or diverged (a score is NaN or too large, a label
  // NaN or infinity): then *loss is its loss, 0 or NaN, and the gradient of every document equals
  // it.
  bool prepare(const T* scores, const T* labels, std::int64_t size, const LambdaLossOptions& options, double* loss);
  // Writes the gradient of the list's own sum, and scales its loss.
  void finish(const double* pull, const LambdaLossOptions& options, double* loss, T* grad) const;

  double* pull() const { return pull_.data(); }  // (size, padded), to which visit_pairs adds
  T* column_pull() const { return column_pull_; }

 private:
  void reserve(std::int64_t size);
  void place(const T* scores, const T* y);
  void place_gains(const LambdaLossOptions& options);
  void count_pairs();

  std::int64_t capacity_ = -1;
  Scratch<T> arrays_;
  Scratch<double> pull_;
  Scratch<std::int32_t> integers_;
  T* column_pull_;
  std::int32_t *rank_, *rows_;
  RankScratch ranking_;
  // Tables by rank r = 1, 2, ... at r - 1: 1 / log2(1 + r), and the sums of the first n of them.
  std::vector<double> inverse_discount_, ideal_;
  T *inverse_discount_table_, *zeros_, *delta_;
};

}  // namespace rerank_fast
