// The kernels of LambdaLoss that an instruction set's table names.
#pragma once

#include "common/set.h"
#include "lambda_loss/kernels.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

void visit_float_pairs(const RankedList<float>& list, Weighting weighting, std::int64_t begin, std::int64_t end,
                       double* loss, double* pull, float* column_pull);
void visit_double_pairs(const RankedList<double>& list, Weighting weighting, std::int64_t begin, std::int64_t end,
                        double* loss, double* pull, double* column_pull);
double pair_floor(std::int64_t rows, std::int64_t columns, const float* score, const float* exponential,
                  const float* reciprocal, const float* weight, float* column_pull, double* row_pull);

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
