// What LambdaLoss runs of an instruction set.
#pragma once

#include <cstdint>

#include "lambda_loss/pairs.h"

namespace rerank_fast {

// Labels that are whole numbers below this are counted rather than sorted; their gains are exact in double.
constexpr int kSmallLabels = 64;
// Lists up to here are ranked by counting, longer ones by sorting.
constexpr std::int64_t kCountedRanks = 192;

struct LambdaLossKernels {
  // The largest label where all are whole numbers from 0 to kSmallLabels - 1, else kSmallLabels.
  float (*largest_small)(const float* labels, std::int64_t size);
  // exp(slope * (score - the first)) and its reciprocal.
  void (*exponentials)(const float* scores, std::int64_t size, double slope, float* result, float* reciprocal);
  // find_ranks of up to kCountedRanks scores; rank has space for two blocks more.
  void (*count_ranks)(const float* scores, std::int32_t size, std::int32_t* rank);
  VisitPairs<float> visit_pairs;
  VisitPairs<double> visit_pairs_double;
  // What any exact algorithm does for a preference pair once its weight is known, over contiguous arrays (columns):
  // a product in place of the exponential, one logarithm, one reciprocal, and the sums of the loss and of both
  // documents' gradients. The floor that benchmarks hold visit_pairs against. Returns the loss.
  double (*pair_floor)(std::int64_t rows, std::int64_t columns, const float* score, const float* exponential,
                       const float* reciprocal, const float* weight, float* column_pull, double* row_pull);
};

}  // namespace rerank_fast
