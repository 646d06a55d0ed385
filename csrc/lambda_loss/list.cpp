#include "lambda_loss/list.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dispatch.h"
#include "lambda_loss/kernels.h"

namespace rerank_fast {
namespace {

// exp of a score must neither overflow nor become subnormal, nor may the ratio of two.
template <typename T>
constexpr double kExponentLimit = sizeof(T) == 4 ? 80.0 : 600.0;

constexpr double kLn2 = 0.6931471805599453;
// Scores beyond it, or beyond it once multiplied by sigma, are divergence: their margins, and sums
// of them, could overflow.
constexpr double kLargestScore = 18446744073709551616.0;  // 2^64

void exponentials(const float* scores, std::int64_t size, double slope, float* result, float* reciprocal) {
  kernels().lambda_loss->exponentials(scores, size, slope, result, reciprocal);
}

void exponentials(const double* scores, std::int64_t size, double slope, double* result, double* reciprocal) {
  for (std::int64_t i = 0; i < size; ++i) {
    result[i] = std::exp(slope * (scores[i] - scores[0]));
    reciprocal[i] = 1.0 / result[i];
  }
}

}  // namespace

template <typename T>
void ListScratch<T>::reserve(std::int64_t size) {
  if (size <= capacity_) return;
  capacity_ = size + size / 2;
  const std::int64_t width = padded(capacity_) + 2 * kBlock;
  T* next = arrays_.room(11 * width);
  // An array more than is counted: delta lies on both sides of its middle.
  T** const arrays[] = {&list.score, &list.exponential, &list.reciprocal,         &list.gain, &list.label,
                        &list.is_majority, &column_pull_, &inverse_discount_table_, &zeros_};
  for (T** array : arrays) {
    *array = next;
    next += width;
  }
  delta_ = next + width;
  pull_.room(width);
  rank_ = integers_.room(2 * width);
  rows_ = rank_ + width;
  inverse_discount_.clear();
  ideal_.assign(1, 0.0);
  for (std::int64_t r = 0; r <= width; ++r) {
    inverse_discount_.push_back(1.0 / std::log2(2.0 + static_cast<double>(r)));
    ideal_.push_back(ideal_.back() + inverse_discount_.back());
  }
  for (std::int64_t r = 0; r < width; ++r) {
    inverse_discount_table_[r] = static_cast<T>(inverse_discount_[r]);
    zeros_[r] = T(0);
    // delta(d) = 1 / D(d) - 1 / D(d + 1)
    const double delta = r == 0 ? 0.0 : inverse_discount_[r - 1] - inverse_discount_[r];
    delta_[r] = delta_[-r] = static_cast<T>(delta);
  }
  list.delta = delta_;
  list.rows = rows_;
}

// Scores and labels in rank order.
template <typename T>
void ListScratch<T>::place(const T* scores, const T* y) {
  find_ranks(scores, list.size, ranking_, rank_);
  for (std::int64_t i = 0; i < list.size; ++i) {
    list.score[rank_[i]] = scores[i];
    list.label[rank_[i]] = y[i];
  }
}

// Their gains, and what lies behind the last document.
template <typename T>
void ListScratch<T>::place_gains(const LambdaLossOptions& options) {
  const std::int64_t size = list.size, width = padded(size);
  T lowest = std::numeric_limits<T>::infinity();
  if (weighting == Weighting::kNone) {
    for (std::int64_t r = 0; r < size; ++r) {
      list.gain[r] = list.label[r];
      lowest = std::min(lowest, list.gain[r]);
    }
    list.majority_gain = static_cast<T>(labels.majority);
  } else {
    const Gains gains(labels, size, list.cut, options.eps, inverse_discount_.data(), ideal_.data());
    if (labels.small) {
      T gain_of[kSmallLabels];
      for (int label = 0; label <= labels.largest; ++label) {
        gain_of[label] = static_cast<T>(gains.small[label]);
        if (labels.counts[label] != 0) lowest = std::min(lowest, gain_of[label]);
      }
      for (std::int64_t r = 0; r < size; ++r) list.gain[r] = gain_of[static_cast<int>(list.label[r])];
      list.majority_gain = gain_of[static_cast<int>(labels.majority)];
    } else {
      for (std::int64_t r = 0; r < size; ++r) {
        list.gain[r] = static_cast<T>(gains.of(static_cast<double>(list.label[r])));
        lowest = std::min(lowest, list.gain[r]);
      }
      list.majority_gain = static_cast<T>(gains.of(labels.majority));
    }
  }
  if (weighting == Weighting::kEveryPair) {
    for (std::int64_t r = 0; r < size; ++r) list.gain[r] *= inverse_discount_table_[r];
    lowest = 0;
  }
  for (std::int64_t r = size; r < width; ++r) {
    list.score[r] = list.score[size - 1];
    list.gain[r] = lowest;
    list.label[r] = T(0);
  }
}

template <typename T>
void ListScratch<T>::count_pairs() {
  const std::int64_t size = list.size, beyond = size - list.cut;
  num_pairs = weighting == Weighting::kEveryPair
                  ? size * size - beyond * beyond
                  : labels.pairs - (beyond > 0 ? labels.pairs_among(list.label + list.cut, beyond) : 0);
}

template <typename T>
bool ListScratch<T>::prepare(const T* scores, const T* y, std::int64_t size, const LambdaLossOptions& options,
                             double* loss) {
  const bool every_pair = options.scheme == Scheme::kNdcg1;
  num_pairs = 0;
  *loss = 0;
  if (size == 0) return false;
  labels.read(y, size);
  const double most = kLargestScore / std::max(options.sigma, 1.0);
  if (labels.pairs == 0 && !every_pair) {
    const bool within = std::all_of(scores, scores + size, [most](T score) { return std::fabs(score) <= most; });
    if (labels.diverged || !within) *loss = std::numeric_limits<double>::quiet_NaN();
    return false;
  }

  reserve(size);
  list.size = size;
  list.cut = options.k == 0 ? size : std::min(options.k, size);
  list.slope = static_cast<T>(options.sigma);
  list.mu = static_cast<T>(options.scheme == Scheme::kNdcg2     ? 1.0
                           : options.scheme == Scheme::kNdcg2pp ? options.mu
                                                                : 0.0);
  const bool by_discount = options.scheme == Scheme::kLambdaRank || options.scheme == Scheme::kNdcg2pp;
  list.inverse_discount = by_discount ? inverse_discount_table_ : zeros_;
  weighting = every_pair                        ? Weighting::kEveryPair
              : options.scheme == Scheme::kNone ? Weighting::kNone
                                                : Weighting::kGain;
  place(scores, y);
  // NaN comes first, and no comparison with it is true.
  const auto highest = static_cast<double>(list.score[0]), lowest = static_cast<double>(list.score[size - 1]);
  if (labels.diverged || !(highest <= most && lowest >= -most)) {
    count_pairs();
    *loss = std::numeric_limits<double>::quiet_NaN();
    return false;
  }
  place_gains(options);

  const std::int64_t width = padded(size);
  list.fast = options.sigma * (highest - lowest) <= kExponentLimit<T>;
  if (list.fast) exponentials(list.score, size, options.sigma, list.exponential, list.reciprocal);
  for (std::int64_t r = list.fast ? size : 0; r < width; ++r) list.exponential[r] = list.reciprocal[r] = T(0);

  // Visits of the triangle of all pairs against those of the rows of rare labels.
  list.visits = Visits::kTriangle;
  num_rows = list.cut;
  if (!every_pair && list.cut == size && 2 * (size - labels.majority_count) < size) {
    list.visits = labels.distinct == 2 ? Visits::kRareOfTwo : Visits::kRareRows;
    const auto majority = static_cast<T>(labels.majority);
    num_rows = 0;
    // Without a branch that the labels' order would make unpredictable.
    for (std::int64_t r = 0; r < size; ++r) {
      rows_[num_rows] = static_cast<std::int32_t>(r);
      num_rows += list.label[r] != majority ? 1 : 0;
    }
    if (list.visits == Visits::kRareRows)
      for (std::int64_t r = 0; r < width; ++r)
        list.is_majority[r] = r < size && list.label[r] == majority ? T(1) : T(0);
  }
  std::fill(pull(), pull() + width, 0.0);
  count_pairs();
  // The pairs (i, i).
  for (std::int64_t r = 0; every_pair && r < list.cut; ++r) *loss += static_cast<double>(list.gain[r]) * kLn2;
  return true;
}

template <typename T>
void ListScratch<T>::finish(const double* pull, const LambdaLossOptions& options, double* loss, T* grad) const {
  const double factor = -options.scale * options.sigma;
  for (std::int64_t i = 0; i < list.size; ++i) grad[i] = static_cast<T>(factor * pull[rank_[i]]);
  *loss *= options.scale;
}

template struct ListScratch<float>;
template struct ListScratch<double>;

}  // namespace rerank_fast
