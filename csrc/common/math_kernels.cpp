#include "common/math_kernels.h"

#include "common/math.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

using V = Lanes<float>;

template <V (*kFunction)(V)>
void each_register(const float* from, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; i += kLanes) store(kFunction(load(from + i)), to + i);
}

template <float (*kFunction)(float)>
void each_value(const float* from, std::int64_t count, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) to[i] = kFunction(from[i]);
}

V exp2_lanes(V x) { return exp2_below(x); }
V exp2_coarse_lanes(V x) { return exp2_below<true>(x); }
V exp_lanes(V x) { return exp_negative(x); }
V log1p_lanes(V x) { return log1p_unit(x); }
V log2_lanes(V x) { return log2_of(x); }
float tanh_one(float x) { return tanh_of(x); }
V tanh_lanes(V x) { return tanh_of(x); }
float cdf_one(float x) { return normal_cdf(x, exp_negative(0.5f * x * x)); }
V gelu_lanes(V x) { return gelu_coarse(x); }

const MathFunction functions[] = {{"exp2_below", each_register<exp2_lanes>},
                                  {"exp2_below_coarse", each_register<exp2_coarse_lanes>},
                                  {"exp_negative", each_register<exp_lanes>},
                                  {"log1p_unit", each_register<log1p_lanes>},
                                  {"log2", each_register<log2_lanes>},
                                  {"tanh", each_value<tanh_one>},
                                  {"tanh_lanes", each_register<tanh_lanes>},
                                  {"normal_cdf", each_value<cdf_one>},
                                  {"gelu_coarse", each_register<gelu_lanes>},
                                  {nullptr, nullptr}};

}  // namespace

extern const MathKernels math_kernels;
const MathKernels math_kernels = {functions};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
