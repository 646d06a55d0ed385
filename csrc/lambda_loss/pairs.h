// The pair loop of LambdaLoss over one list that lies in rank order.
#pragma once

#include <cstdint>

namespace rerank_fast {

enum class Weighting : int {
  kGain,       // |gain_i - gain_j| * (mu * delta(|i - j|) + |inverse_discount_i - inverse_discount_j|)
  kNone,       // 1 where gains differ
  kEveryPair,  // gain_i, for every ordered pair (i, j)
};

// Which pairs the loop visits. A row of rare labels is compared with all documents: fewer visits than the triangle
// where one label is frequent. These two take no cut.
enum class Visits : int {
  kTriangle,    // every row with the documents below it
  kRareRows,    // the rows of all labels but the most frequent one
  kRareOfTwo,   // the same where there are two labels: no two rows prefer one another
};

// One list, best score first.
// Arrays are padded to whole blocks of kBlock.
template <typename T>
struct RankedList {
  std::int64_t size;
  std::int64_t cut;  // pairs count where a rank lies below it: k, or size
  Visits visits;
  bool fast;                  // exponentials hold; else the pair loop takes an exponential a pair
  T slope, mu;
  T majority_gain;            // gain of the most frequent label
  T* score;                   // lowest score in padding
  T* exponential;             // exp(slope * (score - highest score)), 0 in padding
  T* reciprocal;              // 1 / exponential, 0 in padding
  T* gain;                    // lowest gain in padding
  T* label;                   // 0 in padding
  T* is_majority;             // for kRareRows: 1 for documents of the most frequent label, else 0
  const T* inverse_discount;  // 1 / D(rank), or 0 where the weight has no such term
  const T* delta;             // delta[d] for d in (-size - kBlock, size + kBlock), delta[-d] = delta[d], delta[0] = 0
  const std::int32_t* rows;   // the rows of rare labels
};

// Visits the pairs of the rows [begin, end), or rows[begin] to rows[end - 1]. Adds to *loss and to pull (size,
// padded): how strongly each document's score is pulled up. column_pull (size, padded) is overwritten.
template <typename T>
using VisitPairs = void (*)(const RankedList<T>& list, Weighting weighting, std::int64_t begin, std::int64_t end,
                            double* loss, double* pull, T* column_pull);

}  // namespace rerank_fast
