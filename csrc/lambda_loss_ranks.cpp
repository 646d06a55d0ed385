#include "lambda_loss_ranks.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "lanes.h"
#include "numeric.h"

namespace rerank_fast {
namespace {

// A key per score that sorts as ranks do: NaN first, then descending. -0 and +0 are equal.
RERANK_FAST_INLINE std::uint32_t rank_key(float score) {
  const float value = score + 0.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t key = ~(bits ^ (static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31) | 0x80000000u));
  return score != score ? 0 : key;
}

constexpr std::int64_t kCountedRanks = 192;  // lists up to here are ranked by counting, longer ones by sorting

// Each document's 0-based rank by counting the documents before it: quadratic, but without branches.
RERANK_FAST_CLONES void count_ranks(const float* scores, std::int32_t size, std::int32_t* rank) {
  using V = Lanes<std::uint32_t>;
  alignas(64) std::uint32_t keys[kCountedRanks + kBlock];
  for (std::int32_t i = 0; i < size; ++i) keys[i] = rank_key(scores[i]);
  store(every_lane(0xffffffffu), keys + size);
  const V lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (std::int32_t first = 0; first < size; first += kBlock) {
    const V own = load(keys + first);
    V count{};
    const std::int32_t stop = std::min(first + static_cast<std::int32_t>(kBlock), size);
    // A comparison gives -1. Equal keys keep their order: an earlier document goes before, a later one does not.
    const V above = own + 1;
    for (std::int32_t j = 0; j < first; ++j) count -= reinterpret_cast<V>(keys[j] < above);
    for (std::int32_t j = first; j < stop; ++j)
      count -= reinterpret_cast<V>(keys[j] < own - reinterpret_cast<V>(static_cast<std::uint32_t>(j - first) < lane));
    for (std::int32_t j = stop; j < size; ++j) count -= reinterpret_cast<V>(keys[j] < own);
    std::memcpy(rank + first, &count, sizeof count);
  }
}

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
  if (size <= kCountedRanks) return count_ranks(scores, static_cast<std::int32_t>(size), rank);
  const auto count = static_cast<std::size_t>(size);
  if (scratch.keys.size() < count) {
    scratch.keys.resize(count);
    scratch.swap.resize(count);
  }
  for (std::int64_t i = 0; i < size; ++i)
    scratch.keys[i] = static_cast<std::uint64_t>(rank_key(scores[i])) << 32 | static_cast<std::uint64_t>(i);
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
