#include "common/dispatch.h"

#include <atomic>

#if defined(RERANK_FAST_HAS_AMX_BF16)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace rerank_fast {

// RERANK_FAST_SETS(X) is X(name) for every set that the build has, lowest first: setup.py gives it.
#define RERANK_FAST_DECLARE(SET)                  \
  namespace SET {                                 \
  extern const ApproxRanksKernels approx_ranks_kernels; \
  extern const AttentionKernels attention_kernels;  \
  extern const LambdaLossKernels lambda_loss_kernels; \
  extern const MathKernels math_kernels;          \
  extern const RowKernels row_kernels;            \
  }
RERANK_FAST_SETS(RERANK_FAST_DECLARE)
#if defined(RERANK_FAST_HAS_AMX_BF16)
namespace amx_bf16 {
extern const AttentionKernels attention_kernels;
}
#endif

namespace {

// Whether the processor, and the system, has what setup.py compiles a set of that name for.
bool has(const std::string& set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool sse4 = __builtin_cpu_supports("sse4.2");
  const bool avx2 = sse4 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == "sse4") return sse4;
  if (set == "avx2") return avx2;
  if (set == "avx512") return avx512;
#if defined(RERANK_FAST_HAS_AVX512_BF16)  // older compilers know neither the instructions nor their name here
  if (set == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return set == "neon" || (set == "neon_bf16" && (getauxval(AT_HWCAP2) & kBf16) != 0);
#elif defined(__aarch64__) && defined(__APPLE__)
  int found = 0;
  std::size_t size = sizeof found;
  if (sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) != 0) found = 0;
  return set == "neon" || (set == "neon_bf16" && found != 0);
#else
  return true;
#endif
}

#if defined(RERANK_FAST_HAS_AMX_BF16)
// Whether the processor has tiles of bf16, and Linux lets this process use them: it has to be asked.
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTileBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const std::vector<Kernels>& sets_here() {
  static const std::vector<Kernels> found = [] {
    std::vector<Kernels> sets;
    const auto add = [&sets](const Kernels& kernels) {
      if (has(kernels.set)) sets.insert(sets.begin(), kernels);
    };
#define RERANK_FAST_ADD(SET) \
  add({#SET, &SET::approx_ranks_kernels, &SET::attention_kernels, &SET::lambda_loss_kernels, &SET::math_kernels, \
       &SET::row_kernels});
    RERANK_FAST_SETS(RERANK_FAST_ADD)
#if defined(RERANK_FAST_HAS_AMX_BF16)
    // Tiles are attention's alone: the rest is that of the set below.
    if (has("avx512_bf16") && may_use_tiles()) {
      Kernels tiles = sets.front();
      tiles.set = "amx_bf16";
      tiles.attention = &amx_bf16::attention_kernels;
      sets.insert(sets.begin(), tiles);
    }
#endif
    return sets;
  }();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* known = chosen.load(std::memory_order_acquire);
  if (known == nullptr) chosen.store(known = sets_here().data(), std::memory_order_release);
  return *known;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& set : sets_here()) names.emplace_back(set.set);
  return names;
}

bool choose_instruction_set(const std::string& name) {
  for (const Kernels& set : sets_here())
    if (name == set.set) {
      chosen.store(&set, std::memory_order_release);
      return true;
    }
  return false;
}

}  // namespace rerank_fast
