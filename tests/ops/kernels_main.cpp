// Runs CPU kernels without Python: built by test_csrc_targets.py for other compilers and processors than this one's.
// Takes the instruction set, the operation, and the files that it reads and writes; without arguments it prints the
// instruction sets that are here. Fails where a second LambdaLoss allocates memory.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "common/dispatch.h"
#include "lambda_loss/lambda_loss.h"

namespace {
long allocations = 0;
}

void* operator new(std::size_t size) {
  ++allocations;
  return std::malloc(size);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto step = static_cast<std::size_t>(alignment);
  return std::aligned_alloc(step, (size + step - 1) / step * step);
}
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::align_val_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t, std::align_val_t) noexcept { std::free(pointer); }

namespace {

template <typename T>
std::vector<T> take(std::istream& in, std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  in.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  return values;
}

template <typename T>
void give(std::ostream& out, const std::vector<T>& values) {
  out.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
}

// int64 lists, documents, scheme, k; offsets; scores, labels. Gives the loss and the gradient.
int lambda_loss(std::istream& in, std::ostream& out) {
  const auto header = take<std::int64_t>(in, 4);
  const auto offsets = take<std::int64_t>(in, header[0] + 1);
  const auto scores = take<float>(in, header[1]), labels = take<float>(in, header[1]);
  std::vector<float> result(scores.size() + 1);
  std::int64_t num_pairs;
  const rerank_fast::LambdaLossOptions options{static_cast<rerank_fast::Scheme>(header[2]),
                                               header[3],
                                               1.0,
                                               10.0,
                                               1e-10,
                                               1.0,
                                               rerank_fast::Reduction::kPairs,
                                               1};
  for (int call = 0; call < 2; ++call) {
    allocations = 0;
    rerank_fast::lambda_loss(scores.data(), labels.data(), offsets.data(), header[0], options, result.data(),
                             result.data() + 1, &num_pairs);
  }
  if (allocations != 0) return 1;
  give(out, result);
  return 0;
}

// int64 sequences, queries, keys, heads, kv_heads, head_size, bytes of a value, softcap; cu_seqlens_q, cu_seqlens_k; q,
// k, v and the gradient of out, causal. Gives out and the gradients of q, k and v.
int attention(std::istream& in, std::ostream& out) {
  const auto header = take<std::int64_t>(in, 8);
  const std::int64_t queries = header[1], keys = header[2], heads = header[3], kv_heads = header[4], size = header[5],
                     bytes = header[6];
  const auto cu_q = take<std::int32_t>(in, header[0] + 1), cu_k = take<std::int32_t>(in, header[0] + 1);
  std::vector<char> q = take<char>(in, queries * heads * size * bytes), k = take<char>(in, keys * kv_heads * size * bytes),
                    v = take<char>(in, keys * kv_heads * size * bytes), grad = take<char>(in, queries * heads * size * bytes);
  std::vector<char> result(q.size()), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<float> lse(static_cast<std::size_t>(queries * heads));
  const rerank_fast::AttentionShape shape{header[0],    queries, keys, heads,      kv_heads,
                                          size,         cu_q.data(), cu_k.data(), nullptr,    bytes == 2,
                                          0.25,         static_cast<double>(header[7]),
                                          -1,           0,       0.0,  0,          1};
  const auto rows = [size](std::vector<char>& values, std::int64_t count) {
    return rerank_fast::Rows{values.data(), count * size, size};
  };
  rerank_fast::attention_forward(shape, {rows(q, heads), rows(k, kv_heads), rows(v, kv_heads), rows(result, heads),
                                         lse.data()});
  rerank_fast::attention_backward(shape, {rows(q, heads), rows(k, kv_heads), rows(v, kv_heads), rows(result, heads),
                                          lse.data(), rows(grad, heads), rows(dq, heads), rows(dk, kv_heads),
                                          rows(dv, kv_heads)});
  for (const auto* values : {&result, &dq, &dk, &dv}) give(out, *values);
  return 0;
}

// int64 sequences, queries, keys, heads, head_size, bytes of a value, reach, slots of a table, parts; cu_seqlens_q,
// cu_seqlens_k, slots, query_positions; the bias; q, k, v, the gradient of out, and the tables of keys and queries. Gives
// out and the gradients of q, k and v, then in fp32 those of the keys, queries and bias of each part.
int relative(std::istream& in, std::ostream& out) {
  const auto header = take<std::int64_t>(in, 9);
  const std::int64_t queries = header[1], keys = header[2], heads = header[3], size = header[4], bytes = header[5],
                     reach = header[6], num_slots = header[7], parts = header[8];
  const auto cu_q = take<std::int32_t>(in, header[0] + 1), cu_k = take<std::int32_t>(in, header[0] + 1);
  const auto slots = take<std::int32_t>(in, 2 * reach + 1), positions = take<std::int32_t>(in, queries);
  const auto bias = take<float>(in, num_slots * heads);
  const std::int64_t row = heads * size * bytes;
  std::vector<char> q = take<char>(in, queries * row), k = take<char>(in, keys * row), v = take<char>(in, keys * row),
                    grad = take<char>(in, queries * row), key_table = take<char>(in, num_slots * row),
                    query_table = take<char>(in, num_slots * row);
  std::vector<char> result(q.size()), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<float> lse(static_cast<std::size_t>(queries * heads));
  std::vector<float> d_keys(static_cast<std::size_t>(parts * heads * num_slots * size)), d_queries(d_keys.size()),
      d_bias(static_cast<std::size_t>(parts * heads * num_slots));
  const rerank_fast::AttentionShape shape{header[0],   queries,     keys,    heads, heads, size, cu_q.data(),
                                          cu_k.data(), nullptr,     bytes == 2, 0.25,  0.0,   -1,   -1,
                                          0.0,         0,           1};
  const auto rows = [heads, size](std::vector<char>& values) {
    return rerank_fast::Rows{values.data(), heads * size, size};
  };
  const rerank_fast::RelativeTerms terms{slots.data(),    reach,             num_slots,   positions.data(),
                                         rows(key_table), rows(query_table), bias.data(), parts};
  if (!rerank_fast::sequences_fit(shape) || !rerank_fast::slots_fit(terms)) return 1;
  rerank_fast::relative_forward(shape, terms, {rows(q), rows(k), rows(v), rows(result), lse.data()});
  rerank_fast::relative_backward(
      shape, terms, {rows(q), rows(k), rows(v), rows(result), lse.data(), rows(grad), rows(dq), rows(dk), rows(dv)},
      {d_keys.data(), d_queries.data(), d_bias.data()});
  for (const auto* values : {&result, &dq, &dk, &dv}) give(out, *values);
  for (const auto* values : {&d_keys, &d_queries, &d_bias}) give(out, *values);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    for (const std::string& name : rerank_fast::instruction_sets()) std::puts(name.c_str());
    return 0;
  }
  if (!rerank_fast::choose_instruction_set(arguments[1])) return 2;
  std::ifstream in(arguments[3], std::ios::binary);
  std::ofstream out(arguments[4], std::ios::binary);
  const std::string operation = arguments[2];
  if (operation == "attention") return attention(in, out);
  return operation == "relative" ? relative(in, out) : lambda_loss(in, out);
}
