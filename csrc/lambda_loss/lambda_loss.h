// LambdaLoss of ragged lists on the CPU: the loss and its gradient in one pass over the preference pairs.
// Raw pointers and sizes only: no PyTorch, no Python.
#pragma once

#include <cstdint>

namespace rerank_fast {

enum class Scheme : int { kNone, kNdcg1, kNdcg2, kLambdaRank, kNdcg2pp };
enum class Reduction : int { kPairs, kLists, kSum, kNone };

struct LambdaLossOptions {
  Scheme scheme;
  std::int64_t k;  // 0 = no cut
  double sigma;  // above 0, as eps
  double mu;     // at least 0
  double eps;
  double scale;  // 1 / ln 2 for the binary logarithm, 1 for the natural one
  Reduction reduction;
  int num_threads;
};

// Whether offsets (num_lists + 1) rise from 0 to num_documents, as lambda_loss needs them to.
bool offsets_rise(const std::int64_t* offsets, std::int64_t num_lists, std::int64_t num_documents);

// scores, labels: (num_documents); offsets: (num_lists + 1), rising from 0 to num_documents.
// A list with a score that is NaN or above 2^64 / max(sigma, 1), or a label that is NaN or
// infinity, has NaN for its loss and for the gradient of each of its documents.
// Writes loss, (num_lists) for Reduction::kNone and else one value, grad (num_documents), and the number of pairs of
// all lists. T is float or double; sums are taken in double. The result does not depend on the number of threads.
template <typename T>
void lambda_loss(const T* scores, const T* labels, const std::int64_t* offsets, std::int64_t num_lists,
                 const LambdaLossOptions& options, T* loss, T* grad, std::int64_t* num_pairs);

}  // namespace rerank_fast
