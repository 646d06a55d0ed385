// The pair loop of LambdaLoss over one list that lies in rank order.
#pragma once

#include <cstdint>

namespace rerank_fast {

// Blocks of columns that the pair loop takes at once; arrays of a RankedList are padded to whole blocks.
constexpr std::int64_t kBlock = 16;

enum class Weighting : int {
  kGain,       // |gain_i - gain_j| * (mu * delta(|i - j|) + |inverse_discount_i - inverse_discount_j|)
  kNone,       // 1 where gains differ
  kEveryPair,  // gain_i, for every ordered pair (i, j)
};

// One list, best score first. With a negative sigma preferences turn round: gains are then negated, slope is |sigma|.
template <typename T>
struct RankedList {
  std::int64_t size;
  std::int64_t cut;     // pairs count where a rank lies below it: k, or size
  bool fast;            // exponentials hold; else the pair loop takes an exponential a pair
  bool majority_mode;   // see visit_pairs
  bool turned;          // sigma is negative (for kEveryPair, whose gains are not negated)
  T slope, mu;
  T* score;             // lowest score in padding
  T* exponential;       // exp(slope * (score - highest score)), 0 in padding
  T* reciprocal;        // 1 / exponential, 0 in padding
  T* gain;              // lowest gain in padding
  T* inverse_discount;  // 1 / D(rank), or 0 where the weight has no such term
  T* label;
  T* is_majority;       // 1 for documents of the most frequent label, else 0
  T* share;             // 1 for those, else 1/2
  const std::int32_t* rows;  // the rows to visit in majority mode
  const T* delta;       // delta[d] for d in (-size - kBlock, size + kBlock), delta[-d] = delta[d], delta[0] = 0
};

// Visits the pairs of the rows [begin, end), each compared with the documents below it. In majority mode, which takes
// no cut, only the rows of other labels than the most frequent one are visited, list.rows[begin] to list.rows[end - 1],
// but compared with all documents: fewer visits where one label is frequent. Adds to *loss and to pull (size, padded): how strongly each document's
// score is pulled up.
template <typename T>
void visit_pairs(const RankedList<T>& list, Weighting weighting, std::int64_t begin,
                 std::int64_t end, double* loss, double* pull, T* scratch);

}  // namespace rerank_fast
