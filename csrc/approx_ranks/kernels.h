// What approximate ranks run of an instruction set: the rows [begin, end) of one list.
#pragma once

#include <cstdint>

namespace rerank_fast {

// Of one list. Its scores are given twice, in the second place as exp(alpha * (score - any of
// them)) where all of these are far from an overflow, or null: a division then takes an
// exponential's place.
template <typename T>
struct ApproxRanksList {
  const T *scores, *exponentials;
  std::int64_t size;
  T alpha;
};

template <typename T>
using ApproxRanksForward = void (*)(const ApproxRanksList<T>& list, std::int64_t begin,
                                    std::int64_t end, T* ranks);
template <typename T>
using ApproxRanksBackward = void (*)(const ApproxRanksList<T>& list, const T* grad_ranks,
                                     std::int64_t begin, std::int64_t end, T* grad_scores);

struct ApproxRanksKernels {
  ApproxRanksForward<float> forward;
  ApproxRanksForward<double> forward_double;
  ApproxRanksBackward<float> backward;
  ApproxRanksBackward<double> backward_double;
};

}  // namespace rerank_fast
