// The pair loop of LambdaLoss.
#include "common/lanes.h"
#include "common/math.h"
#include "lambda_loss/tasks.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

// One document against the others, block by block.
template <typename T, Weighting kWeighting, Visits kVisits, bool kFast>
struct Row {
  using V = Lanes<T>;
  static constexpr bool kFull = kVisits != Visits::kTriangle;

  const RankedList<T>& list;
  const std::int32_t i;
  const T score, exponential, reciprocal, gain, inverse_discount;
  const T slope;  // kRareOfTwo: negative where the other label is the preferred one
  const T* delta;
  V loss, pull;

  RERANK_FAST_INLINE Row(const RankedList<T>& list, std::int32_t i)
      : list(list),
        i(i),
        score(list.score[i]),
        exponential(list.exponential[i]),
        reciprocal(list.reciprocal[i]),
        gain(list.gain[i]),
        inverse_discount(list.inverse_discount[i]),
        slope(kVisits == Visits::kRareOfTwo && gain < list.majority_gain ? -list.slope : list.slope),
        delta(list.delta - i),
        loss{},
        pull{} {}

  // x in the columns from j on that are documents (kBelow: and below the row in rank), 0 in the others. One comparison
  // a selection: compilers take the lanes apart to combine several.
  template <bool kBelow>
  RERANK_FAST_INLINE V only(std::int32_t j, V x) const {
    const V column = static_cast<T>(j) + lane_numbers<T>();
    if constexpr (kBelow) x = column > static_cast<T>(i) ? x : V{};
    return column < static_cast<T>(list.size) ? x : V{};
  }

  // The columns of a register from j on. kMask: those that are not below the row in rank, or no documents, are left out.
  template <bool kMask>
  RERANK_FAST_INLINE void visit(std::int32_t j, T* column_pull) {
    const V signed_d = slope * (score - load(list.score + j));
    const V d = kFull ? absolute(signed_d) : signed_d;
    V t;  // exp(-d), at most 1
    if constexpr (kFast) {
      t = load(list.exponential + j) * reciprocal;
      if constexpr (kFull) {
        const V other_way = exponential * load(list.reciprocal + j);
        t = t < other_way ? t : other_way;
      }
    } else {
      t = exp_negative(d);
    }
    if constexpr (kMask) t = only<true>(j, t);
    const V r = T(1) / (T(1) + t);
    const V log_sum = log1p_unit(t);  // -log sigmoid(d)
    V pulled, term;
    if constexpr (kWeighting == Weighting::kEveryPair) {
      // The weights of the pair that prefers the better ranked document, and of the one that prefers the other.
      const V ordered = every_lane(gain), inverted = load(list.gain + j);
      pulled = (ordered * t - inverted) * r;
      term = (ordered + inverted) * log_sum + inverted * d;
    } else {
      const V difference = gain - load(list.gain + j);
      V weight;  // with the sign of the difference
      if constexpr (kWeighting == Weighting::kNone) {
        weight = difference > 0 ? every_lane(T(1)) : (difference < 0 ? every_lane(T(-1)) : V{});
      } else {
        const V swap = inverse_discount - load(list.inverse_discount + j);
        weight = (list.mu * load(delta + j) + (kFull ? absolute(swap) : swap)) * difference;
      }
      if constexpr (kMask) weight = only<true>(j, weight);
      const V sign = kVisits == Visits::kRareOfTwo ? signed_d : (kFull ? difference * signed_d : difference);
      pulled = weight * (sign < 0 ? r : t * r);
      term = absolute(weight) * (sign < 0 ? log_sum + d : log_sum);
      if constexpr (!kFast) {
        // Of what is no document.
        pulled = only<false>(j, pulled);
        term = only<false>(j, term);
      }
    }
    if constexpr (kMask) {
      pulled = only<true>(j, pulled);
      term = only<true>(j, term);
    }
    pull += pulled;
    if constexpr (kVisits == Visits::kRareRows) {
      // Of two rows that meet in each other's columns, each takes its own pull and half of the loss.
      const V is_majority = load(list.is_majority + j);
      term *= T(0.5) + T(0.5) * is_majority;
      pulled *= is_majority;
    }
    loss += term;
    store<T>(load(column_pull + j) - pulled, column_pull + j);
  }
};

template <typename T, Weighting kWeighting, Visits kVisits, bool kFast>
RERANK_FAST_INLINE void visit_rows(const RankedList<T>& list, std::int64_t begin, std::int64_t end, double* loss,
                                   double* pull, T* column_pull) {
  constexpr auto kWidth = static_cast<std::int32_t>(kLanesOf<T>);
  const auto size = static_cast<std::int32_t>(list.size);
  const std::int32_t padded = (size + kWidth - 1) / kWidth * kWidth;
  const auto last = static_cast<std::int32_t>(end);
  double loss_sum = 0;
  // A lane sums 64 terms or so in T before they go on in double: the error does not grow with the list.
  constexpr std::int32_t kRows = 64, kColumns = 64 * kWidth;
  for (auto first = static_cast<std::int32_t>(begin); first < last; first += kRows) {
    const std::int32_t touched = kVisits == Visits::kTriangle ? first / kWidth * kWidth : 0;
    fill(column_pull + touched, padded - touched, T(0));
    for (std::int32_t at = first; at < static_cast<std::int32_t>(smaller(first + kRows, last)); ++at) {
      Row<T, kWeighting, kVisits, kFast> row(list, kVisits == Visits::kTriangle ? at : list.rows[at]);
      std::int32_t j = 0;
      if constexpr (kVisits == Visits::kTriangle) {
        j = (row.i + 1) / kWidth * kWidth;
        if (j < padded) row.template visit<true>(j, column_pull);
        j += kWidth;
      }
      do {
        const auto stop = static_cast<std::int32_t>(smaller(j + kColumns, padded));
        // Without exponentials padding counts for something, unless it is masked.
        for (; j < stop; j += kWidth) row.template visit<!kFast && kVisits == Visits::kTriangle>(j, column_pull);
        loss_sum += static_cast<double>(sum<T>(row.loss));
        pull[row.i] += static_cast<double>(sum<T>(row.pull));
        row.loss = row.pull = typename Row<T, kWeighting, kVisits, kFast>::V{};
      } while (j < padded);
    }
    for (std::int32_t j = touched; j < size; ++j) pull[j] += static_cast<double>(column_pull[j]);
  }
  *loss += loss_sum;
}

template <typename T, Weighting kWeighting, bool kFast>
RERANK_FAST_INLINE void visit_rows(const RankedList<T>& list, std::int64_t begin, std::int64_t end, double* loss,
                                   double* pull, T* column_pull) {
  if constexpr (kWeighting != Weighting::kEveryPair) {
    if (list.visits == Visits::kRareOfTwo)
      return visit_rows<T, kWeighting, Visits::kRareOfTwo, kFast>(list, begin, end, loss, pull, column_pull);
    if (list.visits == Visits::kRareRows)
      return visit_rows<T, kWeighting, Visits::kRareRows, kFast>(list, begin, end, loss, pull, column_pull);
  }
  visit_rows<T, kWeighting, Visits::kTriangle, kFast>(list, begin, end, loss, pull, column_pull);
}

template <typename T, Weighting kWeighting>
void visit(const RankedList<T>& list, std::int64_t begin, std::int64_t end, double* loss, double* pull,
           T* column_pull) {
  list.fast ? visit_rows<T, kWeighting, true>(list, begin, end, loss, pull, column_pull)
            : visit_rows<T, kWeighting, false>(list, begin, end, loss, pull, column_pull);
}

template <typename T>
RERANK_FAST_INLINE void visit_weighted(const RankedList<T>& list, Weighting weighting, std::int64_t begin,
                                       std::int64_t end, double* loss, double* pull, T* column_pull) {
  const auto loop = weighting == Weighting::kGain   ? visit<T, Weighting::kGain>
                    : weighting == Weighting::kNone ? visit<T, Weighting::kNone>
                                                    : visit<T, Weighting::kEveryPair>;
  loop(list, begin, end, loss, pull, column_pull);
}

}  // namespace

void visit_float_pairs(const RankedList<float>& list, Weighting weighting, std::int64_t begin, std::int64_t end,
                       double* loss, double* pull, float* column_pull) {
  visit_weighted(list, weighting, begin, end, loss, pull, column_pull);
}

void visit_double_pairs(const RankedList<double>& list, Weighting weighting, std::int64_t begin, std::int64_t end,
                        double* loss, double* pull, double* column_pull) {
  visit_weighted(list, weighting, begin, end, loss, pull, column_pull);
}

double pair_floor(std::int64_t rows, std::int64_t columns, const float* score,
                                     const float* exponential, const float* reciprocal, const float* weight,
                                     float* column_pull, double* row_pull) {
  double loss = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const float score_i = score[i], exponential_i = exponential[i], reciprocal_i = reciprocal[i];
    Lanes<float> terms{}, pull{};
    for (std::int64_t j = 0; j < columns; j += kLanes) {
      const Lanes<float> d = score_i - load(score + j), w = load(weight + j);
      const Lanes<float> one_way = load(exponential + j) * reciprocal_i;
      const Lanes<float> other_way = exponential_i * load(reciprocal + j);
      const Lanes<float> t = one_way < other_way ? one_way : other_way;
      const Lanes<float> r = 1.0f / (1.0f + t), log_sum = log1p_unit(t);
      const Lanes<float> pulled = w * (d < 0 ? r : t * r);
      terms += w * (d < 0 ? log_sum - d : log_sum);
      pull += pulled;
      store<float>(load(column_pull + j) - pulled, column_pull + j);
    }
    loss += static_cast<double>(sum<float>(terms));
    row_pull[i] += static_cast<double>(sum<float>(pull));
  }
  return loss;
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
