// Python's door to the kernels: addresses and sizes in, nothing else.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "int8_rows.h"
#include "lambda_loss.h"
#include "lambda_loss_pairs.h"
#include "ndcg.h"
#include "residual_norm.h"
#include "score_head.h"
#include "threads.h"
#include "varlen_attention.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

// False, and nothing done, where the offsets do not rise from 0 to num_documents.
template <typename T>
bool lambda_loss(Address scores, Address labels, Address offsets, std::int64_t num_documents, std::int64_t num_lists,
                 int scheme, std::int64_t k, double sigma, double mu, double eps, double scale, int reduction,
                 int num_threads, Address loss, Address grad) {
  const rerank_fast::LambdaLossOptions options{static_cast<rerank_fast::Scheme>(scheme),
                                               k,
                                               sigma,
                                               mu,
                                               eps,
                                               scale,
                                               static_cast<rerank_fast::Reduction>(reduction),
                                               num_threads};
  const auto* const bounds = reinterpret_cast<const std::int64_t*>(offsets);
  if (!rerank_fast::offsets_rise(bounds, num_lists, num_documents)) return false;
  py::gil_scoped_release release;
  rerank_fast::lambda_loss<T>(reinterpret_cast<const T*>(scores), reinterpret_cast<const T*>(labels), bounds,
                              num_lists, options, reinterpret_cast<T*>(loss), reinterpret_cast<T*>(grad));
  return true;
}

// For benchmarks/test_lambda_loss.py: the arithmetic of num_lists * rows * columns pairs, lists over threads.
double lambda_loss_pair_floor(std::int64_t num_lists, std::int64_t rows, std::int64_t columns, Address score,
                              Address exponential, Address reciprocal, Address weight, Address column_pull,
                              Address row_pull, Address loss, int num_threads) {
  const auto floats = [](Address address) { return reinterpret_cast<float*>(address); };
  auto* const losses = reinterpret_cast<double*>(loss);
  py::gil_scoped_release release;
  rerank_fast::parallel_for(num_threads, num_lists, [&](std::int64_t q) {
    losses[q] = rerank_fast::pair_floor(rows, columns, floats(score) + q * columns, floats(exponential) + q * columns,
                                        floats(reciprocal) + q * columns, floats(weight),
                                        floats(column_pull) + q * columns,
                                        reinterpret_cast<double*>(row_pull) + q * rows);
  });
  double total = 0;
  for (std::int64_t q = 0; q < num_lists; ++q) total += losses[q];
  return total;
}

// Address, token stride and head stride of a tensor (tokens, heads, head_size).
using RowsTuple = std::tuple<Address, std::int64_t, std::int64_t>;
// (sequences, heads, kv_heads, head_size, cu_seqlens_q, cu_seqlens_k, dropout_rows, bf16, scale, window_left,
// window_right, dropout_p, seed, threads)
using AttentionTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, Address, Address, Address,
                                  bool, double, std::int64_t, std::int64_t, double, std::uint64_t, int>;

rerank_fast::Rows rows(const RowsTuple& tuple) {
  return {reinterpret_cast<void*>(std::get<0>(tuple)), std::get<1>(tuple), std::get<2>(tuple)};
}

rerank_fast::AttentionShape attention_shape(const AttentionTuple& tuple) {
  return std::apply(
      [](auto sequences, auto heads, auto kv_heads, auto size, auto cu_q, auto cu_k, auto dropout_rows,
         auto... rest) {
        return rerank_fast::AttentionShape{sequences, heads, kv_heads, size,
                                           reinterpret_cast<const std::int32_t*>(cu_q),
                                           reinterpret_cast<const std::int32_t*>(cu_k),
                                           reinterpret_cast<const std::int32_t*>(dropout_rows), rest...};
      },
      tuple);
}

void varlen_attention_forward(const AttentionTuple& shape, const RowsTuple& q, const RowsTuple& k, const RowsTuple& v,
                              const RowsTuple& out, Address lse) {
  py::gil_scoped_release release;
  rerank_fast::varlen_attention_forward(attention_shape(shape), rows(q), rows(k), rows(v), rows(out),
                                        reinterpret_cast<float*>(lse));
}

void varlen_attention_backward(const AttentionTuple& shape, const RowsTuple& q, const RowsTuple& k,
                               const RowsTuple& v, const RowsTuple& out, Address lse, const RowsTuple& grad_out,
                               const RowsTuple& dq, const RowsTuple& dk, const RowsTuple& dv) {
  py::gil_scoped_release release;
  rerank_fast::varlen_attention_backward(attention_shape(shape), rows(q), rows(k), rows(v), rows(out),
                                         reinterpret_cast<const float*>(lse), rows(grad_out), rows(dq), rows(dk),
                                         rows(dv));
}

// (rows, width, dropout_rows, bf16, eps, dropout_p, seed, threads)
using NormTuple = std::tuple<std::int64_t, std::int64_t, Address, bool, double, double, std::uint64_t, int>;

rerank_fast::ResidualNormShape norm_shape(const NormTuple& tuple) {
  return std::apply(
      [](auto rows, auto width, auto dropout_rows, auto... rest) {
        return rerank_fast::ResidualNormShape{rows, width, reinterpret_cast<const std::int32_t*>(dropout_rows),
                                              rest...};
      },
      tuple);
}

void residual_norm_forward(const NormTuple& shape, Address x, Address residual, Address weight, Address bias,
                           Address y, Address y_narrow, Address mean, Address rstd) {
  py::gil_scoped_release release;
  rerank_fast::residual_norm_forward(
      norm_shape(shape), reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(residual),
      reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(y),
      reinterpret_cast<void*>(y_narrow), reinterpret_cast<float*>(mean), reinterpret_cast<float*>(rstd));
}

void residual_norm_backward(const NormTuple& shape, Address x, Address residual, Address weight, Address mean,
                            Address rstd, Address grad_y, Address grad_y_narrow, Address grad_x,
                            Address grad_residual, Address grad_weight, Address grad_bias) {
  py::gil_scoped_release release;
  rerank_fast::residual_norm_backward(
      norm_shape(shape), reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(residual),
      reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(mean),
      reinterpret_cast<const float*>(rstd), reinterpret_cast<const float*>(grad_y),
      reinterpret_cast<const void*>(grad_y_narrow), reinterpret_cast<void*>(grad_x),
      reinterpret_cast<float*>(grad_residual), reinterpret_cast<float*>(grad_weight),
      reinterpret_cast<float*>(grad_bias));
}

// (rows, hidden, width, bf16, activation, dropout_p, dropout_in_p, seed, threads)
using HeadTuple =
    std::tuple<std::int64_t, std::int64_t, std::int64_t, bool, int, double, double, std::uint64_t, int>;

rerank_fast::ScoreHeadShape head_shape(const HeadTuple& tuple) {
  return std::apply(
      [](auto rows, auto hidden, auto width, auto bf16, auto activation, auto... rest) {
        return rerank_fast::ScoreHeadShape{rows, hidden, width, bf16,
                                           static_cast<rerank_fast::Activation>(activation), rest...};
      },
      tuple);
}

void score_head_gather(const HeadTuple& shape, Address from, std::int64_t stride, Address index, Address x) {
  py::gil_scoped_release release;
  rerank_fast::score_head_gather(head_shape(shape), reinterpret_cast<const void*>(from), stride,
                                 reinterpret_cast<const std::int64_t*>(index), reinterpret_cast<void*>(x));
}

void score_head_dot(const HeadTuple& shape, Address product, Address out_weight, Address out_bias, Address scores) {
  py::gil_scoped_release release;
  rerank_fast::score_head_dot(head_shape(shape), reinterpret_cast<const void*>(product),
                              reinterpret_cast<const float*>(out_weight), reinterpret_cast<const float*>(out_bias),
                              reinterpret_cast<float*>(scores));
}

void score_head_dot_backward(const HeadTuple& shape, Address product, Address out_weight, Address grad_scores,
                             Address grad_product, Address grad_dense_bias, Address grad_out_weight) {
  py::gil_scoped_release release;
  rerank_fast::score_head_dot_backward(
      head_shape(shape), reinterpret_cast<const void*>(product), reinterpret_cast<const float*>(out_weight),
      reinterpret_cast<const float*>(grad_scores), reinterpret_cast<void*>(grad_product),
      reinterpret_cast<float*>(grad_dense_bias), reinterpret_cast<float*>(grad_out_weight));
}

template <typename T>
void ndcg(Address scores, Address labels, Address offsets, std::int64_t num_lists, std::int64_t k, int num_threads,
          Address result) {
  py::gil_scoped_release release;
  rerank_fast::ndcg<T>(reinterpret_cast<const T*>(scores), reinterpret_cast<const T*>(labels),
                       reinterpret_cast<const std::int64_t*>(offsets), num_lists, k, num_threads,
                       reinterpret_cast<T*>(result));
}

// (rows, width, bf16, threads)
using Int8RowsTuple = std::tuple<std::int64_t, std::int64_t, bool, int>;

rerank_fast::Int8RowsShape int8_rows_shape(const Int8RowsTuple& tuple) {
  return std::apply([](auto... values) { return rerank_fast::Int8RowsShape{values...}; }, tuple);
}

// (values, scale, levels)
using Int8RowsOut = std::tuple<Address, Address, int>;

rerank_fast::Int8Rows int8_rows(const Int8RowsOut& tuple) {
  return {reinterpret_cast<std::uint8_t*>(std::get<0>(tuple)), reinterpret_cast<float*>(std::get<1>(tuple)),
          std::get<2>(tuple)};
}

void quantize_rows(const Int8RowsTuple& shape, Address x, const Int8RowsOut& to) {
  py::gil_scoped_release release;
  rerank_fast::quantize_rows(int8_rows_shape(shape), reinterpret_cast<const void*>(x), int8_rows(to));
}

void scale_rows(const Int8RowsTuple& shape, Address x, Address row_scale, Address bias) {
  py::gil_scoped_release release;
  rerank_fast::scale_rows(int8_rows_shape(shape), reinterpret_cast<void*>(x),
                          reinterpret_cast<const float*>(row_scale), reinterpret_cast<const float*>(bias));
}

void gelu_rows(const Int8RowsTuple& shape, Address x, Address row_scale, Address bias, const Int8RowsOut& to) {
  py::gil_scoped_release release;
  rerank_fast::gelu_rows(int8_rows_shape(shape), reinterpret_cast<const void*>(x),
                         reinterpret_cast<const float*>(row_scale), reinterpret_cast<const float*>(bias),
                         int8_rows(to));
}

void norm_rows(const Int8RowsTuple& shape, Address x, Address row_scale, Address bias, Address residual,
               Address norm_weight, Address norm_bias, double eps, Address y, const Int8RowsOut& to) {
  const rerank_fast::Int8Norm norm{reinterpret_cast<const float*>(residual),
                                   reinterpret_cast<const float*>(norm_weight),
                                   reinterpret_cast<const float*>(norm_bias), eps};
  py::gil_scoped_release release;
  rerank_fast::norm_rows(int8_rows_shape(shape), reinterpret_cast<const void*>(x),
                         reinterpret_cast<const float*>(row_scale), reinterpret_cast<const float*>(bias), norm,
                         reinterpret_cast<float*>(y), int8_rows(to));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of rerank_fast; called through rerank_fast.ops.cpu";
  module.def("lambda_loss_float", &lambda_loss<float>);
  module.def("lambda_loss_double", &lambda_loss<double>);
  module.def("lambda_loss_pair_floor", &lambda_loss_pair_floor);
  module.def("varlen_attention_forward", &varlen_attention_forward);
  module.def("varlen_attention_backward", &varlen_attention_backward);
  module.def("residual_norm_forward", &residual_norm_forward);
  module.def("residual_norm_backward", &residual_norm_backward);
  module.def("score_head_gather", &score_head_gather);
  module.def("score_head_dot", &score_head_dot);
  module.def("score_head_dot_backward", &score_head_dot_backward);
  module.def("ndcg_float", &ndcg<float>);
  module.def("ndcg_double", &ndcg<double>);
  module.def("quantize_rows", &quantize_rows);
  module.def("scale_rows", &scale_rows);
  module.def("gelu_rows", &gelu_rows);
  module.def("norm_rows", &norm_rows);
}
