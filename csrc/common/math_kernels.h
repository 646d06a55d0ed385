// The functions of common/math.h over arrays: tests measure their errors.
#pragma once

#include <cstdint>

namespace rerank_fast {

struct MathFunction {
  const char* name;
  void (*evaluate)(const float* from, std::int64_t count, float* to);  // count is whole blocks
};

struct MathKernels {
  const MathFunction* functions;  // ended by one without a name
};

}  // namespace rerank_fast
