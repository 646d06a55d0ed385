// Ranks of one list's scores.
#pragma once

#include <cstdint>
#include <vector>

namespace rerank_fast {

// Working memory that grows to the longest list and is kept.
struct RankScratch {
  std::vector<std::uint64_t> keys, swap;
  std::vector<std::int32_t> order;
};

// The 0-based rank of each document, highest score first; ties keep the input order, NaN comes first. rank has space
// for two blocks more.
void find_ranks(const float* scores, std::int64_t size, RankScratch& scratch, std::int32_t* rank);
void find_ranks(const double* scores, std::int64_t size, RankScratch& scratch, std::int32_t* rank);

}  // namespace rerank_fast
