// NDCG@k of ragged lists on the CPU.
#pragma once

#include <cstdint>

namespace rerank_fast {

// scores, labels: (documents of all lists); offsets: (num_lists + 1). Writes ndcg (num_lists): its
// expected value over the orders of documents with equal scores. 0 where no label is above 0, NaN
// where a score is NaN or a label is NaN or +inf. k below 1 is no cut. T is float or double; sums
// are taken in double.
template <typename T>
void ndcg(const T* scores, const T* labels, const std::int64_t* offsets, std::int64_t num_lists, std::int64_t k,
          int num_threads, T* ndcg);

}  // namespace rerank_fast
