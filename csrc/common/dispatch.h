// The kernels of the instruction set that this process runs.
#pragma once

#include <string>
#include <vector>

namespace rerank_fast {

struct ApproxRanksKernels;
struct AttentionKernels;
struct LambdaLossKernels;
struct MathKernels;
struct RowKernels;

struct Kernels {
  const char* set;
  const ApproxRanksKernels* approx_ranks;
  const AttentionKernels* attention;
  const LambdaLossKernels* lambda_loss;
  const MathKernels* math;
  const RowKernels* rows;
};

// Those of the widest set that the processor has, or of the one that was chosen.
const Kernels& kernels();

// The sets that were built and that this processor has, widest first.
std::vector<std::string> instruction_sets();

// From now on the process runs this one of instruction_sets(). False, and nothing done, where it is none of them. Not
// while a kernel runs.
bool choose_instruction_set(const std::string& name);

}  // namespace rerank_fast
