// LambdaLoss of ragged lists on the CPU: the loss and its gradient in one pass over the preference pairs.
// Raw pointers and sizes only: no PyTorch, no Python.
#pragma once

#include <cstdint>

namespace rerank_fast {

enum class Scheme : int { kNone, kNdcg1, kNdcg2, kLambdaRank, kNdcg2pp };

struct LambdaLossOptions {
  Scheme scheme;
  std::int64_t k;  // 0 = no cut
  double sigma;
  double mu;
  double eps;
  double scale;  // 1 / ln 2 for the binary logarithm, 1 for the natural one
  int num_threads;
};

// scores, labels: (num_documents); offsets: (num_lists + 1).
// Writes per-list sums list_loss (num_lists), pair counts list_pairs (num_lists) and the gradient of each list's own
// sum, grad (num_documents). T is float or double; loss sums are always double.
template <typename T>
void lambda_loss(const T* scores, const T* labels, const std::int64_t* offsets, std::int64_t num_lists,
                 const LambdaLossOptions& options, double* list_loss, std::int64_t* list_pairs, T* grad);

}  // namespace rerank_fast
