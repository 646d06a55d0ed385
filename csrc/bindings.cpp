// Python's door to the kernels: addresses and sizes in, nothing else.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "lambda_loss.h"

namespace py = pybind11;

namespace {

template <typename T>
void lambda_loss(std::uintptr_t scores, std::uintptr_t labels, std::uintptr_t offsets, std::int64_t num_lists,
                 int scheme, std::int64_t k, double sigma, double mu, double eps, double scale, int reduction,
                 int num_threads, std::uintptr_t loss, std::uintptr_t grad) {
  const rerank_fast::LambdaLossOptions options{static_cast<rerank_fast::Scheme>(scheme),
                                               k,
                                               sigma,
                                               mu,
                                               eps,
                                               scale,
                                               static_cast<rerank_fast::Reduction>(reduction),
                                               num_threads};
  py::gil_scoped_release release;
  rerank_fast::lambda_loss<T>(reinterpret_cast<const T*>(scores), reinterpret_cast<const T*>(labels),
                              reinterpret_cast<const std::int64_t*>(offsets), num_lists, options,
                              reinterpret_cast<T*>(loss), reinterpret_cast<T*>(grad));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of rerank_fast; called through rerank_fast.ops.cpu";
  module.def("lambda_loss_float", &lambda_loss<float>);
  module.def("lambda_loss_double", &lambda_loss<double>);
}
