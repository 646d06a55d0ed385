// Python's door to the kernels: addresses and sizes in, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "approx_ranks/approx_ranks.h"
#include "attention/attention.h"
#include "common/dispatch.h"
#include "common/lanes.h"
#include "common/math_kernels.h"
#include "common/threads.h"
#include "lambda_loss/kernels.h"
#include "lambda_loss/lambda_loss.h"
#include "lambda_loss/ndcg.h"
#include "rows/int8_rows.h"
#include "rows/pre_norm.h"
#include "rows/residual_norm.h"
#include "rows/score_head.h"
#include "rows/transposed.h"

namespace py = pybind11;

namespace {

using namespace rerank_fast;
using Address = std::uintptr_t;
using Names = std::vector<std::string>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The names of C++'s enumerations, in their order; Python gives and reads these.
const Names kSchemes{"none", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp"};
const Names kReductions{"pairs", "lists", "sum", "none"};
const Names kGates{"gelu", "gelu_tanh", "silu"};
const Names kActivations{"none", "tanh", "gelu", "relu"};

template <typename Enum>
Enum named(const Names& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) throw std::invalid_argument("unknown name " + name);
  return static_cast<Enum>(found - names.begin());
}

// False, and nothing done, where the offsets do not rise from 0 to num_documents.
template <typename T>
bool run_lambda_loss(const LambdaLossOptions& options, Address scores, Address labels, Address offsets,
                     std::int64_t num_documents, std::int64_t num_lists, Address loss, Address grad, Address num_pairs) {
  if (!offsets_rise(at<std::int64_t>(offsets), num_lists, num_documents)) return false;
  py::gil_scoped_release release;
  lambda_loss<T>(at<T>(scores), at<T>(labels), at<std::int64_t>(offsets), num_lists, options, at<T>(loss), at<T>(grad),
                 at<std::int64_t>(num_pairs));
  return true;
}

template <typename T>
bool run_ndcg(Address scores, Address labels, Address offsets, std::int64_t num_documents, std::int64_t num_lists,
              std::int64_t k, int num_threads, Address result) {
  if (!offsets_rise(at<std::int64_t>(offsets), num_lists, num_documents)) return false;
  py::gil_scoped_release release;
  ndcg<T>(at<T>(scores), at<T>(labels), at<std::int64_t>(offsets), num_lists, k, num_threads, at<T>(result));
  return true;
}

template <typename T>
bool run_approx_ranks(double alpha, Address scores, Address offsets, std::int64_t num_documents,
                      std::int64_t num_lists, int num_threads, Address ranks) {
  if (!offsets_rise(at<std::int64_t>(offsets), num_lists, num_documents)) return false;
  py::gil_scoped_release release;
  approx_ranks<T>({at<std::int64_t>(offsets), num_lists, alpha, num_threads}, at<T>(scores), at<T>(ranks));
  return true;
}

template <typename T>
bool run_approx_ranks_backward(double alpha, Address scores, Address grad_ranks, Address offsets,
                               std::int64_t num_documents, std::int64_t num_lists, int num_threads,
                               Address grad_scores) {
  if (!offsets_rise(at<std::int64_t>(offsets), num_lists, num_documents)) return false;
  py::gil_scoped_release release;
  approx_ranks_backward<T>({at<std::int64_t>(offsets), num_lists, alpha, num_threads}, at<T>(scores),
                           at<T>(grad_ranks), at<T>(grad_scores));
  return true;
}

// For benchmarks/ops/test_lambda_loss.py: the arithmetic of num_lists * rows * columns pairs, lists over threads.
double lambda_loss_pair_floor(std::int64_t num_lists, std::int64_t rows, std::int64_t columns, Address score,
                              Address exponential, Address reciprocal, Address weight, Address column_pull,
                              Address row_pull, Address loss, int num_threads) {
  const auto floor = kernels().lambda_loss->pair_floor;
  auto* const losses = at<double>(loss);
  py::gil_scoped_release release;
  parallel_for(num_threads, num_lists, [&](std::int64_t q) {
    losses[q] = floor(rows, columns, at<float>(score) + q * columns, at<float>(exponential) + q * columns,
                      at<float>(reciprocal) + q * columns, at<float>(weight), at<float>(column_pull) + q * columns,
                      at<double>(row_pull) + q * rows);
  });
  double total = 0;
  for (std::int64_t q = 0; q < num_lists; ++q) total += losses[q];
  return total;
}

// For tests: a function of common/math.h at `count` values, whole blocks.
void evaluate(const std::string& name, Address from, std::int64_t count, Address to) {
  for (const MathFunction* function = kernels().math->functions; function->name != nullptr; ++function)
    if (name == function->name && count % kBlock == 0)
      return function->evaluate(at<float>(from), count, at<float>(to));
  throw std::invalid_argument("no function " + name + ", or no whole blocks");
}

void bind_lambda_loss(py::module_& module) {
  module.attr("SCHEMES") = kSchemes;
  module.attr("REDUCTIONS") = kReductions;
  py::class_<LambdaLossOptions>(module, "LambdaLossOptions")
      .def(py::init([](const std::string& scheme, std::int64_t k, double sigma, double mu, double eps, double scale,
                       const std::string& reduction, int num_threads) {
             return LambdaLossOptions{named<Scheme>(kSchemes, scheme),          k,  sigma, mu, eps, scale,
                                      named<Reduction>(kReductions, reduction), num_threads};
           }),
           py::kw_only(), py::arg("scheme"), py::arg("k"), py::arg("sigma"), py::arg("mu"), py::arg("eps"),
           py::arg("scale"), py::arg("reduction"), py::arg("num_threads"));
  module.def("lambda_loss_float", &run_lambda_loss<float>);
  module.def("lambda_loss_double", &run_lambda_loss<double>);
  module.def("lambda_loss_pair_floor", &lambda_loss_pair_floor);
  module.def("ndcg_float", &run_ndcg<float>);
  module.def("ndcg_double", &run_ndcg<double>);
}

void bind_approx_ranks(py::module_& module) {
  module.def("approx_ranks_float", &run_approx_ranks<float>);
  module.def("approx_ranks_double", &run_approx_ranks<double>);
  module.def("approx_ranks_backward_float", &run_approx_ranks_backward<float>);
  module.def("approx_ranks_backward_double", &run_approx_ranks_backward<double>);
}

void bind_attention(py::module_& module) {
  py::class_<Rows>(module, "Rows")
      .def(py::init([](Address data, std::int64_t token_stride, std::int64_t head_stride) {
        return Rows{at<void>(data), token_stride, head_stride};
      }));
  py::class_<AttentionShape>(module, "AttentionShape")
      .def(py::init([](std::int64_t num_sequences, std::int64_t num_queries, std::int64_t num_keys,
                       std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_size,
                       Address cu_seqlens_q, Address cu_seqlens_k, Address dropout_rows, bool bf16, double scale,
                       double softcap, std::int64_t window_left, std::int64_t window_right, double dropout_p,
                       std::uint64_t seed, int num_threads) {
             return AttentionShape{num_sequences,
                                   num_queries,
                                   num_keys,
                                   num_heads,
                                   num_kv_heads,
                                   head_size,
                                   at<std::int32_t>(cu_seqlens_q),
                                   at<std::int32_t>(cu_seqlens_k),
                                   at<std::int32_t>(dropout_rows),
                                   bf16,
                                   scale,
                                   softcap,
                                   window_left,
                                   window_right,
                                   dropout_p,
                                   seed,
                                   num_threads};
           }),
           py::kw_only(), py::arg("num_sequences"), py::arg("num_queries"), py::arg("num_keys"), py::arg("num_heads"),
           py::arg("num_kv_heads"), py::arg("head_size"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"),
           py::arg("dropout_rows"), py::arg("bf16"), py::arg("scale"), py::arg("softcap"), py::arg("window_left"),
           py::arg("window_right"), py::arg("dropout_p"), py::arg("seed"), py::arg("num_threads"));
  // False, and nothing done, where the cu_seqlens do not rise from 0 to the tokens.
  module.def("attention_forward", [](const AttentionShape& shape, const Rows& q, const Rows& k, const Rows& v,
                                     const Rows& out, Address lse) {
    if (!sequences_fit(shape)) return false;
    py::gil_scoped_release release;
    attention_forward(shape, {q, k, v, out, at<float>(lse)});
    return true;
  });
  module.def("attention_backward",
             [](const AttentionShape& shape, const Rows& q, const Rows& k, const Rows& v, const Rows& out, Address lse,
                const Rows& grad_out, const Rows& dq, const Rows& dk, const Rows& dv) {
               if (!sequences_fit(shape)) return false;
               py::gil_scoped_release release;
               attention_backward(shape, {q, k, v, out, at<float>(lse), grad_out, dq, dk, dv});
               return true;
             });
  py::class_<RelativeTerms>(module, "RelativeTerms")
      .def(py::init([](Address slots, std::int64_t reach, std::int64_t num_slots, Address query_positions,
                       const Rows& keys, const Rows& queries, Address bias, std::int64_t num_parts) {
             return RelativeTerms{at<std::int32_t>(slots), reach,   num_slots,       at<std::int32_t>(query_positions),
                                  keys,                    queries, at<float>(bias), num_parts};
           }),
           py::kw_only(), py::arg("slots"), py::arg("reach"), py::arg("num_slots"), py::arg("query_positions"),
           py::arg("keys"), py::arg("queries"), py::arg("bias"), py::arg("num_parts"));
  // False, and nothing done, where the cu_seqlens do not rise from 0 to the tokens or a slot is in no table.
  module.def("relative_forward", [](const AttentionShape& shape, const RelativeTerms& terms, const Rows& q,
                                    const Rows& k, const Rows& v, const Rows& out, Address lse) {
    if (!sequences_fit(shape) || !slots_fit(terms)) return false;
    py::gil_scoped_release release;
    relative_forward(shape, terms, {q, k, v, out, at<float>(lse)});
    return true;
  });
  module.def("relative_backward",
             [](const AttentionShape& shape, const RelativeTerms& terms, const Rows& q, const Rows& k, const Rows& v,
                const Rows& out, Address lse, const Rows& grad_out, const Rows& dq, const Rows& dk, const Rows& dv,
                Address d_keys, Address d_queries, Address d_bias) {
               if (!sequences_fit(shape) || !slots_fit(terms)) return false;
               py::gil_scoped_release release;
               relative_backward(shape, terms, {q, k, v, out, at<float>(lse), grad_out, dq, dk, dv},
                                 {at<float>(d_keys), at<float>(d_queries), at<float>(d_bias)});
               return true;
             });
}

void bind_residual_norm(py::module_& module) {
  py::class_<ResidualNormShape>(module, "ResidualNormShape")
      .def(py::init([](std::int64_t rows, std::int64_t width, Address dropout_rows, bool bf16, double eps,
                       double dropout_p, std::uint64_t seed, int num_threads) {
             return ResidualNormShape{rows, width,     at<std::int32_t>(dropout_rows), bf16,
                                      eps,  dropout_p, seed,                           num_threads};
           }),
           py::kw_only(), py::arg("rows"), py::arg("width"), py::arg("dropout_rows"), py::arg("bf16"), py::arg("eps"),
           py::arg("dropout_p"), py::arg("seed"), py::arg("num_threads"));
  module.def("residual_norm_forward",
             [](const ResidualNormShape& shape, Address x, Address residual, Address weight, Address bias, Address y,
                Address y_narrow, Address mean, Address rstd) {
               py::gil_scoped_release release;
               residual_norm_forward(shape, {at<void>(x), at<float>(residual), at<float>(weight), at<float>(bias),
                                             at<float>(y), at<void>(y_narrow), at<float>(mean), at<float>(rstd)});
             });
  module.def("residual_norm_backward",
             [](const ResidualNormShape& shape, Address x, Address residual, Address weight, Address mean,
                Address rstd, Address grad_y, Address grad_y_narrow, Address grad_x, Address grad_residual,
                Address grad_weight, Address grad_bias) {
               py::gil_scoped_release release;
               residual_norm_backward(
                   shape, {at<void>(x), at<float>(residual), at<float>(weight), at<float>(mean), at<float>(rstd),
                           at<float>(grad_y), at<void>(grad_y_narrow), at<void>(grad_x), at<float>(grad_residual),
                           at<float>(grad_weight), at<float>(grad_bias)});
             });
}

void bind_transposed(py::module_& module) {
  module.def("transpose", [](std::int64_t rows, std::int64_t columns, int num_threads, Address from, Address to) {
    py::gil_scoped_release release;
    transpose({rows, columns, num_threads}, at<std::uint16_t>(from), at<std::uint16_t>(to));
  });
}

void bind_score_head(py::module_& module) {
  module.attr("ACTIVATIONS") = kActivations;
  py::class_<ScoreHeadShape>(module, "ScoreHeadShape")
      .def(py::init([](std::int64_t rows, std::int64_t hidden, std::int64_t width, bool bf16,
                       const std::string& activation, double dropout_p, double dropout_in_p, std::uint64_t seed,
                       int num_threads) {
             return ScoreHeadShape{rows,      hidden,       width, bf16,       named<Activation>(kActivations, activation),
                                   dropout_p, dropout_in_p, seed,  num_threads};
           }),
           py::kw_only(), py::arg("rows"), py::arg("hidden"), py::arg("width"), py::arg("bf16"), py::arg("activation"),
           py::arg("dropout_p"), py::arg("dropout_in_p"), py::arg("seed"), py::arg("num_threads"));
  module.def("score_head_gather", [](const ScoreHeadShape& shape, Address from, std::int64_t stride,
                                     std::int64_t from_rows, Address index, Address x) {
    const auto* const rows = at<std::int64_t>(index);
    for (std::int64_t i = 0; rows != nullptr && i < shape.rows; ++i)
      if (rows[i] < 0 || rows[i] >= from_rows)
        throw std::out_of_range("index " + std::to_string(rows[i]) + " is out of range for " +
                                std::to_string(from_rows) + " hidden states");
    py::gil_scoped_release release;
    score_head_gather(shape, {at<void>(from), stride, rows, at<void>(x)});
  });
  module.def("score_head_dot", [](const ScoreHeadShape& shape, Address product, Address out_weight, Address out_bias,
                                  Address scores) {
    py::gil_scoped_release release;
    score_head_dot(shape, {at<void>(product), at<float>(out_weight), at<float>(out_bias), at<float>(scores)});
  });
  module.def("score_head_dot_backward",
             [](const ScoreHeadShape& shape, Address product, Address out_weight, Address grad_scores,
                Address grad_product, Address grad_dense_bias, Address grad_out_weight) {
               py::gil_scoped_release release;
               score_head_dot_backward(shape, {at<void>(product), at<float>(out_weight), at<float>(grad_scores),
                                               at<void>(grad_product), at<float>(grad_dense_bias),
                                               at<float>(grad_out_weight)});
             });
}

void bind_int8_rows(py::module_& module) {
  py::class_<Int8RowsShape>(module, "Int8RowsShape")
      .def(py::init([](std::int64_t rows, std::int64_t width, bool bf16, int num_threads) {
             return Int8RowsShape{rows, width, bf16, num_threads};
           }),
           py::kw_only(), py::arg("rows"), py::arg("width"), py::arg("bf16"), py::arg("num_threads"));
  py::class_<Int8Rows>(module, "Int8Rows").def(py::init([](Address values, Address scale, int levels) {
    return Int8Rows{at<std::uint8_t>(values), at<float>(scale), levels};
  }));
  py::class_<Int8Product>(module, "Int8Product").def(py::init([](Address x, Address row_scale, Address bias) {
    return Int8Product{at<void>(x), at<float>(row_scale), at<float>(bias)};
  }));
  module.def("quantize_rows", [](const Int8RowsShape& shape, Address x, const Int8Rows& to) {
    py::gil_scoped_release release;
    quantize_rows(shape, at<void>(x), to);
  });
  module.def("scale_rows", [](const Int8RowsShape& shape, const Int8Product& product, Address x) {
    py::gil_scoped_release release;
    scale_rows(shape, product, at<void>(x));
  });
  module.def("gelu_rows", [](const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to) {
    py::gil_scoped_release release;
    gelu_rows(shape, product, to);
  });
  module.def("norm_rows", [](const Int8RowsShape& shape, const Int8Product& product, Address residual,
                             Address norm_weight, Address norm_bias, double eps, Address y, const Int8Rows& to) {
    py::gil_scoped_release release;
    norm_rows(shape, product,
              {at<float>(residual), at<float>(norm_weight), at<float>(norm_bias), eps, at<float>(y)}, to);
  });
}

void bind_pre_norm(py::module_& module) {
  module.attr("GATES") = kGates;
  module.attr("PRE_NORM_ROWS_PER_TASK") = kPreNormRowsPerTask;
  py::class_<AddNormShape>(module, "AddNormShape")
      .def(py::init([](std::int64_t rows, std::int64_t width, bool bf16, bool centered, double eps, double x_eps,
                       int num_threads) {
             return AddNormShape{rows, width, bf16, centered, eps, x_eps, num_threads};
           }),
           py::kw_only(), py::arg("rows"), py::arg("width"), py::arg("bf16"), py::arg("centered"), py::arg("eps"),
           py::arg("x_eps"), py::arg("num_threads"));
  module.def("add_norm_forward", [](const AddNormShape& shape, Address residual, Address x, Address x_weight,
                                    Address weight, Address bias, Address total, Address normed, Address mean,
                                    Address rstd, Address x_rstd) {
    py::gil_scoped_release release;
    add_norm(shape, {at<float>(residual), at<void>(x), at<float>(x_weight), at<float>(weight), at<float>(bias),
                     at<float>(total), at<void>(normed), at<float>(mean), at<float>(rstd), at<float>(x_rstd)});
  });
  module.def("add_norm_backward", [](const AddNormShape& shape, Address total, Address weight, Address mean,
                                     Address rstd, Address x, Address x_weight, Address x_rstd, Address grad_normed,
                                     Address grad_total, Address grad_x, Address grad_residual, Address sums) {
    py::gil_scoped_release release;
    add_norm_backward(shape, {at<float>(total), at<float>(weight), at<float>(mean), at<float>(rstd), at<void>(x),
                              at<float>(x_weight), at<float>(x_rstd), at<void>(grad_normed), at<float>(grad_total),
                              at<void>(grad_x), at<float>(grad_residual), at<float>(sums)});
  });
  py::class_<RotaryShape>(module, "RotaryShape")
      .def(py::init([](std::int64_t rows, std::int64_t heads, std::int64_t num_queries, std::int64_t head_size,
                       std::int64_t stride, std::int64_t other_stride, bool bf16, double eps, int num_threads) {
             return RotaryShape{rows, heads, num_queries, head_size, stride, other_stride, bf16, eps, num_threads};
           }),
           py::kw_only(), py::arg("rows"), py::arg("heads"), py::arg("num_queries"), py::arg("head_size"),
           py::arg("stride"), py::arg("other_stride"), py::arg("bf16"), py::arg("eps"), py::arg("num_threads"));
  module.def("rotary_forward", [](const RotaryShape& shape, Address x, Address out, Address cosines, Address sines,
                                  Address weights) {
    py::gil_scoped_release release;
    rotary(shape, {at<void>(x), at<void>(out), at<float>(cosines), at<float>(sines), at<float>(weights)});
  });
  module.def("rotary_backward", [](const RotaryShape& shape, Address grad, Address x, Address cosines, Address sines,
                                   Address weights, Address sums) {
    py::gil_scoped_release release;
    rotary_backward(shape, {at<void>(grad), at<void>(x), at<float>(cosines), at<float>(sines), at<float>(weights),
                            at<float>(sums)});
  });
  py::class_<GatedShape>(module, "GatedShape")
      .def(py::init([](std::int64_t rows, std::int64_t width, bool bf16, const std::string& gate, int num_threads) {
             return GatedShape{rows, width, bf16, named<Gate>(kGates, gate), num_threads};
           }),
           py::kw_only(), py::arg("rows"), py::arg("width"), py::arg("bf16"), py::arg("gate"), py::arg("num_threads"));
  module.def("gated_forward", [](const GatedShape& shape, Address gate_up, Address out) {
    py::gil_scoped_release release;
    gated(shape, at<void>(gate_up), at<void>(out));
  });
  module.def("gated_backward", [](const GatedShape& shape, Address gate_up, Address grad, Address grad_gate_up) {
    py::gil_scoped_release release;
    gated_backward(shape, at<void>(gate_up), at<void>(grad), at<void>(grad_gate_up));
  });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of rerank_fast; called through rerank_fast.ops.cpu";
  module.def("instruction_sets", &instruction_sets);
  module.def("instruction_set", [] { return kernels().set; });
  module.def("choose_instruction_set", &choose_instruction_set);
  module.def("evaluate", &evaluate);
  bind_lambda_loss(module);
  bind_approx_ranks(module);
  bind_attention(module);
  bind_residual_norm(module);
  bind_score_head(module);
  bind_transposed(module);
  bind_int8_rows(module);
  bind_pre_norm(module);
}
