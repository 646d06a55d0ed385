#include "common/threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

namespace rerank_fast {
namespace {

struct Job {
  void (*task)(void*, std::int64_t);
  void* context;
  std::int64_t count;
  std::atomic<std::int64_t> next{0};

  static void work(void* self) {
    Job& job = *static_cast<Job*>(self);
    for (std::int64_t i = job.next.fetch_add(1); i < job.count; i = job.next.fetch_add(1)) job.task(job.context, i);
  }
};

// What `#pragma omp parallel` compiles to, the same in GNU's, LLVM's and Intel's runtime. It is looked up rather than
// linked: PyTorch brings its own copy under a name of its own, and two copies would keep two sets of threads.
using Parallel = void (*)(void (*work)(void*), void* job, unsigned num_threads, unsigned flags);

Parallel openmp() {
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void parallel_for(int num_threads, std::int64_t count, void (*task)(void*, std::int64_t), void* context) {
  Job job{task, context, count};
  const std::int64_t threads = std::min<std::int64_t>(num_threads, count);
  if (threads > 1 && openmp() != nullptr) return openmp()(Job::work, &job, static_cast<unsigned>(threads), 0);
  Job::work(&job);
}

}  // namespace rerank_fast
