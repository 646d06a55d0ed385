// The order of scores as that of whole numbers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/set.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

// A key per score that sorts as ranks do: NaN first, then descending. -0 and +0 are equal.
RERANK_FAST_INLINE std::int32_t rank_key(float score) {
  const float value = score + 0.0f;
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return score != score ? INT32_MIN : ~(bits ^ (bits >> 31 & 0x7fffffff));
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
