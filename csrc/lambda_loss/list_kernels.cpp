// What LambdaLoss does for a list before its pairs are visited.
#include "common/lanes.h"
#include "common/math.h"
#include "lambda_loss/rank_key.h"
#include "lambda_loss/tasks.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

float largest_small(const float* y, std::int64_t size) {
  using V = Lanes<float>;
  constexpr auto kNotSmall = static_cast<float>(kSmallLabels);
  V largest{};
  for (std::int64_t i = 0; i < size; i += kLanes) {
    V label{};
    if (i + kLanes <= size) {
      label = load(y + i);
    } else {
      for (std::int64_t j = i; j < size; ++j) label[j - i] = y[j];
    }
    // Adding 2^23 leaves no place for a fraction.
    const V whole = (label + 8388608.0f) - 8388608.0f;
    // One comparison a selection: compilers take the lanes apart to combine several.
    const V not_small = every_lane(kNotSmall);
    label = whole == label ? label : not_small;
    label = label >= 0.0f ? label : not_small;
    label = label < kNotSmall ? label : not_small;
    largest = label > largest ? label : largest;
  }
  return maximum<float>(largest);
}

void exponentials(const float* scores, std::int64_t size, double slope, float* result,
                                     float* reciprocal) {
  const auto highest = static_cast<double>(scores[0]);
  // The argument is reduced in double: the rounding of a large difference would show in its exponential.
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) {
    const double x = slope * (static_cast<double>(scores[i]) - highest) * 1.4426950408889634;
    const double shifted = x + 6755399441055744.0;  // rounds to the nearest whole number
    const double n = shifted - 6755399441055744.0;
    const float power = same_bits<float>((static_cast<std::int32_t>(n) + 127) << 23);
    result[i] = exp2_fraction(static_cast<float>(x - n)) * power;
    reciprocal[i] = 1.0f / result[i];
  }
}

// Each document's 0-based rank by counting the documents before it: quadratic, but without branches.
void count_ranks(const float* scores, std::int32_t size, std::int32_t* rank) {
  using V = Lanes<std::int32_t>;
  constexpr auto kWidth = static_cast<std::int32_t>(kLanes);
  alignas(64) std::int32_t keys[kCountedRanks + 2 * kBlock];
  for (std::int32_t i = 0; i < size; ++i) keys[i] = rank_key(scores[i]);
  // Behind every document.
  store(every_lane(0x7ffffffe), keys + size);
  store(every_lane(0x7ffffffe), keys + size + kWidth);
  const V lane = lane_numbers<std::int32_t>();
  // Two blocks of documents at a time share the loads. Equal keys keep their order: of two such documents the earlier
  // one goes before the other.
  for (std::int32_t first = 0; first < size; first += 2 * kWidth) {
    const V own[2] = {load(keys + first), load(keys + first + kWidth)};
    const V above[2] = {own[0] + 1, own[1] + 1};
    V count[2] = {};
    const std::int32_t middle = static_cast<std::int32_t>(smaller(first + kWidth, size)),
                       last = static_cast<std::int32_t>(smaller(first + 2 * kWidth, size));
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

}  // namespace

extern const LambdaLossKernels lambda_loss_kernels;
const LambdaLossKernels lambda_loss_kernels = {largest_small,     exponentials,       count_ranks,
                                               visit_float_pairs, visit_double_pairs, pair_floor};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
