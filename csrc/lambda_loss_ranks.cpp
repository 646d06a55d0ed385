#include "lambda_loss_ranks.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "lanes.h"
#include "numeric.h"

namespace rerank_fast {
namespace {

// A key per score that sorts as ranks do: NaN first, then descending. -0 and +0 are equal.
RERANK_FAST_INLINE std::int32_t rank_key(float score) {
  const float value = score + 0.0f;
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return score != score ? std::numeric_limits<std::int32_t>::min() : ~(bits ^ (bits >> 31 & 0x7fffffff));
}

constexpr std::int64_t kCountedRanks = 192;  // lists up to here are ranked by counting, longer ones by sorting

// Each document's 0-based rank by counting the documents before it: quadratic, but without branches.
RERANK_FAST_CLONES void count_ranks(const float* scores, std::int32_t size, std::int32_t* rank) {
  using V = Lanes<std::int32_t>;
  constexpr auto kWidth = static_cast<std::int32_t>(kBlock);
  alignas(64) std::int32_t keys[kCountedRanks + 2 * kBlock];
  for (std::int32_t i = 0; i < size; ++i) keys[i] = rank_key(scores[i]);
  // Behind every document.
  store(every_lane(0x7ffffffe), keys + size);
  store(every_lane(0x7ffffffe), keys + size + kWidth);
  const V lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  // Two blocks of documents at a time share the loads. Equal keys keep their order: of two such documents the earlier
  // one goes before the other.
  for (std::int32_t first = 0; first < size; first += 2 * kWidth) {
    const V own[2] = {load(keys + first), load(keys + first + kWidth)};
    const V above[2] = {own[0] + 1, own[1] + 1};
    V count[2] = {};
    const std::int32_t middle = std::min(first + kWidth, size), last = std::min(first + 2 * kWidth, size);
    for (std::int32_t j = 0; j < first; ++j) {
      count[0] = keys[j] < above[0] ? count[0] + 1 : count[0];
      count[1] = keys[j] < above[1] ? count[1] + 1 : count[1];
    }
    for (std::int32_t j = first; j < middle; ++j) {
      const V limit = j - first < lane ? above[0] : own[0];
      count[0] = keys[j] < limit ? count[0] + 1 : count[0];
      count[1] = keys[j] < above[1] ? count[1] + 1 : count[1];
    }
    for (std::int32_t j = middle; j < last; ++j) {
      const V limit = j - middle < lane ? above[1] : own[1];
      count[0] = keys[j] < own[0] ? count[0] + 1 : count[0];
      count[1] = keys[j] < limit ? count[1] + 1 : count[1];
    }
    for (std::int32_t j = last; j < size; ++j) {
      count[0] = keys[j] < own[0] ? count[0] + 1 : count[0];
      count[1] = keys[j] < own[1] ? count[1] + 1 : count[1];
    }
    store(count[0], rank + first);
    store(count[1], rank + first + kWidth);
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
