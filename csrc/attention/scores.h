// What attention makes of its products: scores in powers of 2, capped where the shape says so.
#pragma once

#include "attention/sequence.h"
#include "common/math.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

struct Scores {
  bool capped;
  float factor;  // of products: they are scores in powers of 2 then or, capped, what the cap's tanh takes
  float cap;     // in powers of 2

  explicit Scores(const AttentionShape& shape)
      : capped(shape.softcap > 0),
        factor(static_cast<float>(capped ? shape.scale / shape.softcap : shape.scale * kLog2E)),
        cap(static_cast<float>(shape.softcap * kLog2E)) {}

  // Products, times factor, as scores in powers of 2, whole registers of them.
  RERANK_FAST_INLINE void cap_row(float* row, std::int64_t count, float times = 1.0f) const {
    for (std::int64_t j = 0; j < count; j += kLanes) store(tanh_of(load(row + j) * times) * cap, row + j);
  }

  // How steeply a capped score follows its product; of one that is hidden, anything finite.
  RERANK_FAST_INLINE Lanes<float> bend(Lanes<float> score) const {
    const Lanes<float> share = score * (1.0f / cap), near = share < -1.0f ? all<Lanes<float>>(-1.0f) : share;
    return 1.0f - near * near;
  }
};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
