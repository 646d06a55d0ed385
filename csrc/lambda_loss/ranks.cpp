#include "lambda_loss/ranks.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "common/dispatch.h"
#include "lambda_loss/kernels.h"
#include "lambda_loss/rank_key.h"

namespace rerank_fast {
namespace {

// Sorts (key << 32 | index) by key, in three passes of 11 bits.
void radix_sort(std::uint64_t* keys, std::uint64_t* other, std::int64_t size) {
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  std::uint32_t starts[3][kBuckets] = {};
  for (std::int64_t i = 0; i < size; ++i)
    for (int pass = 0; pass < 3; ++pass) ++starts[pass][keys[i] >> (32 + kBits * pass) & (kBuckets - 1)];
  for (int pass = 0; pass < 3; ++pass) {
    std::uint32_t sum = 0;
    for (std::uint32_t& start : starts[pass]) sum += std::exchange(start, sum);
    for (std::int64_t i = 0; i < size; ++i)
      other[starts[pass][keys[i] >> (32 + kBits * pass) & (kBuckets - 1)]++] = keys[i];
    std::swap(keys, other);
  }
  std::copy(keys, keys + size, other);  // three passes end in the other array
}

}  // namespace

void find_ranks(const float* scores, std::int64_t size, RankScratch& scratch, std::int32_t* rank) {
  if (size <= kCountedRanks) return kernels().lambda_loss->count_ranks(scores, static_cast<std::int32_t>(size), rank);
  const auto count = static_cast<std::size_t>(size);
  if (scratch.keys.size() < count) {
    scratch.keys.resize(count);
    scratch.swap.resize(count);
  }
  for (std::int64_t i = 0; i < size; ++i)
    scratch.keys[i] = std::uint64_t{static_cast<std::uint32_t>(rank_key(scores[i])) ^ 0x80000000u} << 32 |
                      static_cast<std::uint64_t>(i);
  radix_sort(scratch.keys.data(), scratch.swap.data(), size);
  for (std::int64_t r = 0; r < size; ++r) rank[scratch.keys[r] & 0xffffffffu] = static_cast<std::int32_t>(r);
}

void find_ranks(const double* scores, std::int64_t size, RankScratch& scratch, std::int32_t* rank) {
  auto& order = scratch.order;
  order.resize(static_cast<std::size_t>(size));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [scores](std::int32_t a, std::int32_t b) {
    const bool nan_a = scores[a] != scores[a], nan_b = scores[b] != scores[b];
    return nan_a != nan_b ? nan_a : scores[a] > scores[b];
  });
  for (std::int64_t r = 0; r < size; ++r) rank[order[r]] = static_cast<std::int32_t>(r);
}

}  // namespace rerank_fast
