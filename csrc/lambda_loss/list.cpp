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

// Scores, labels and gains in rank order.
template <typename T>
void ListScratch<T>::place(const T* scores, const T* y, const LambdaLossOptions& options) {
  const std::int64_t size = list.size, width = padded(size);
  find_ranks(scores, size, ranking_, rank_);
  for (std::int64_t i = 0; i < size; ++i) {
    list.score[rank_[i]] = scores[i];
    list.label[rank_[i]] = y[i];
  }
  // Preferences turn round with a negative sigma; for kEveryPair the pair loop sees to it.
  const T sign = list.turned && weighting != Weighting::kEveryPair ? T(-1) : T(1);
  T lowest = std::numeric_limits<T>::infinity();
  if (weighting == Weighting::kNone) {
    for (std::int64_t r = 0; r < size; ++r) {
      list.gain[r] = sign * list.label[r];
      lowest = std::min(lowest, list.gain[r]);
    }
    list.majority_gain = sign * static_cast<T>(labels.majority);
  } else {
    const Gains gains(labels, size, list.cut, options.eps, inverse_discount_.data(), ideal_.data());
    if (labels.small) {
      T gain_of[kSmallLabels];
      for (int label = 0; label <= labels.largest; ++label) {
        gain_of[label] = sign * static_cast<T>(gains.small[label]);
        if (labels.counts[label] != 0) lowest = std::min(lowest, gain_of[label]);
      }
      for (std::int64_t r = 0; r < size; ++r) list.gain[r] = gain_of[static_cast<int>(list.label[r])];
      list.majority_gain = gain_of[static_cast<int>(labels.majority)];
    } else {
      for (std::int64_t r = 0; r < size; ++r) {
        list.gain[r] = sign * static_cast<T>(gains.of(static_cast<double>(list.label[r])));
        lowest = std::min(lowest, list.gain[r]);
      }
      list.majority_gain = sign * static_cast<T>(gains.of(labels.majority));
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
void ListScratch<T>::count_pairs(double* loss) {
  const std::int64_t size = list.size, cut = list.cut;
  if (weighting == Weighting::kEveryPair) {
    num_pairs = size * size - (size - cut) * (size - cut);
    double diagonal = 0;
    for (std::int64_t r = 0; r < cut; ++r) {
      // A score that is not finite must be seen.
      const auto nothing = static_cast<double>(list.score[r] - list.score[r]);
      diagonal += static_cast<double>(list.gain[r]) + nothing;
      pull()[r] += nothing;
    }
    *loss = diagonal * 0.6931471805599453;
    return;
  }
  num_pairs = labels.pairs - (cut < size ? labels.pairs_among(list.label + cut, size - cut) : 0);
}

template <typename T>
bool ListScratch<T>::prepare(const T* scores, const T* y, std::int64_t size, const LambdaLossOptions& options,
                             double* loss) {
  const bool every_pair = options.scheme == Scheme::kNdcg1;
  num_pairs = 0;
  *loss = 0;
  if (size == 0 || (size == 1 && !every_pair)) return false;
  labels.read(y, size);
  if (labels.nan) {
    *loss = std::numeric_limits<double>::quiet_NaN();
    return false;
  }
  if (labels.distinct < 2 && !every_pair) return false;

  reserve(size);
  const double slope = std::fabs(options.sigma);
  list.size = size;
  list.cut = options.k == 0 ? size : std::min(options.k, size);
  list.turned = options.sigma < 0;
  list.slope = static_cast<T>(slope);
  list.mu = static_cast<T>(options.scheme == Scheme::kNdcg2     ? 1.0
                           : options.scheme == Scheme::kNdcg2pp ? options.mu
                                                                : 0.0);
  const bool by_discount = options.scheme == Scheme::kLambdaRank || options.scheme == Scheme::kNdcg2pp;
  list.inverse_discount = by_discount ? inverse_discount_table_ : zeros_;
  weighting = every_pair                        ? Weighting::kEveryPair
              : options.scheme == Scheme::kNone ? Weighting::kNone
                                                : Weighting::kGain;
  place(scores, y, options);

  const std::int64_t width = padded(size);
  // NaN comes first: one at either end makes the range NaN, and the comparison false.
  const auto highest = static_cast<double>(list.score[0]), lowest = static_cast<double>(list.score[size - 1]);
  list.fast = slope * (highest - lowest) <= kExponentLimit<T> && !(list.turned && every_pair);
  if (list.fast) exponentials(list.score, size, slope, list.exponential, list.reciprocal);
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
  count_pairs(loss);
  return true;
}

template <typename T>
void ListScratch<T>::finish(const double* pull, const LambdaLossOptions& options, double* loss, T* grad) const {
  const double factor = -options.scale * std::fabs(options.sigma);
  for (std::int64_t i = 0; i < list.size; ++i) grad[i] = static_cast<T>(factor * pull[rank_[i]]);
  *loss *= options.scale;
}

template struct ListScratch<float>;
template struct ListScratch<double>;

}  // namespace rerank_fast
