// Ranks of ragged lists that scores can be differentiated by: r_i = 1 + sum over j != i of
// sigmoid(alpha (s_j - s_i)), on the CPU, D^2 terms of a list of D documents and nothing of that
// size stored.
#pragma once

#include <cstdint>

namespace rerank_fast {

struct ApproxRanksShape {
  const std::int64_t* offsets;  // (num_lists + 1), rising from 0
  std::int64_t num_lists;
  double alpha;  // above 0
  int num_threads;
};

template <typename T>
void approx_ranks(const ApproxRanksShape& shape, const T* scores, T* ranks);

template <typename T>
void approx_ranks_backward(const ApproxRanksShape& shape, const T* scores, const T* grad_ranks,
                           T* grad_scores);

}  // namespace rerank_fast
