#include "lambda_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "lambda_loss_pairs.h"
#include "numeric.h"
#include "threads.h"

namespace rerank_fast {
namespace {

// exp of a score must neither overflow nor become subnormal, nor may the ratio of two.
template <typename T>
constexpr double kExponentLimit = sizeof(T) == 4 ? 80.0 : 600.0;
// Labels that are whole numbers below this are counted rather than sorted; their gains are exact in double.
constexpr int kSmallLabels = 64;
// A list with more visits than this is cut into row ranges for all threads; fewer in all are done by one thread.
constexpr double kVisitsPerTask = 1 << 21, kVisitsForThreads = 1 << 14;
constexpr std::int64_t kRangesPerList = 8;  // fixed, so that sums do not depend on the number of threads

std::int64_t padded(std::int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

// Arrays of T on cache-line bounds in one allocation that only grows.
template <typename T>
class Arena {
 public:
  void reserve(std::int64_t count) {
    if (count <= capacity_) return;
    release();
    capacity_ = count + count / 2;
    data_ = static_cast<T*>(::operator new(static_cast<std::size_t>(capacity_) * sizeof(T), std::align_val_t{64}));
  }
  T* data() const { return data_; }
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { release(); }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    capacity_ = 0;
  }
  T* data_ = nullptr;
  std::int64_t capacity_ = 0;
};

// What follows from a list's labels alone. Counts of small labels reach up to `largest`.
struct Labels {
  bool nan;                          // then nothing else is known
  bool small;                        // whole numbers from 0 to kSmallLabels - 1
  std::int64_t count[kSmallLabels];  // of each, where they are small
  int largest;
  std::int64_t distinct;
  std::int64_t pairs;                // unordered pairs of different labels
  double majority;                   // the most frequent label
  std::int64_t majority_count;
};

// What one thread needs for one list; it grows to the longest list seen and is kept.
template <typename T>
struct Scratch {
  Arena<T> arrays, row_pull;
  Arena<double> pull;
  std::vector<T> delta;                    // delta(|d|), its middle at `longest`
  std::int64_t longest = -1;
  std::vector<double> inverse_discount;    // 1 / log2(1 + r) for r = 1, 2, ... at r - 1
  std::vector<double> ideal;               // ideal[n]: the sum of the first n of them
  std::vector<std::int32_t> rank, order;   // 0-based rank of a document; what is wanted in some order
  std::vector<std::uint64_t> keys, swap;
  std::vector<T> sorted_labels;
  RankedList<T> list;
  Labels labels;

  void reserve(std::int64_t size) {
    const std::int64_t width = padded(size) + kBlock;
    arrays.reserve(8 * width);
    pull.reserve(width);
    row_pull.reserve(width);
    T** const targets[] = {&list.score,            &list.exponential, &list.reciprocal,  &list.gain,
                           &list.inverse_discount, &list.label,       &list.is_majority, &list.share};
    for (int a = 0; a < 8; ++a) *targets[a] = arrays.data() + a * width;
    if (static_cast<std::int64_t>(order.size()) < width) {
      order.resize(static_cast<std::size_t>(width));
      rank.resize(static_cast<std::size_t>(width));
      keys.resize(static_cast<std::size_t>(width));
    }
    if (longest < width) {
      longest = width + width / 2;
      ideal.assign(1, 0.0);
      inverse_discount.clear();
      for (std::int64_t r = 1; r <= longest + 1; ++r) {
        inverse_discount.push_back(1.0 / std::log2(1.0 + static_cast<double>(r)));
        ideal.push_back(ideal.back() + inverse_discount.back());
      }
      delta.assign(static_cast<std::size_t>(2 * longest + 1), T(0));
      for (std::int64_t d = 1; d <= longest; ++d) {
        const auto value = static_cast<T>(inverse_discount[d - 1] - inverse_discount[d]);
        delta[longest - d] = delta[longest + d] = value;
      }
    }
    list.delta = delta.data() + longest;
  }
};

template <typename T>
Scratch<T>& this_threads_scratch() {
  static thread_local Scratch<T> scratch;
  return scratch;
}

// A key per score that sorts as ranks do: NaN first, then descending. -0 and +0 are equal.
std::uint32_t rank_key(float score) {
  if (score != score) return 0;
  score += 0.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return ~(bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u));
}

constexpr std::int64_t kCountedRanks = 192;  // lists up to here are ranked by counting, longer ones by sorting

// Each document's 0-based rank by counting the documents before it: quadratic, but without branches.
RERANK_FAST_CLONES void count_ranks(const std::uint32_t* keys, std::int32_t size, std::int32_t* rank) {
  // Vectors by name: compilers turn the loop over the documents that are counted into the vector one otherwise.
  using Lanes = std::uint32_t __attribute__((vector_size(kBlock * sizeof(std::uint32_t))));
  Lanes lane;
  for (std::uint32_t l = 0; l < kBlock; ++l) lane[l] = l;
  for (std::int32_t first = 0; first < size; first += kBlock) {
    Lanes own, count = {};
    std::memcpy(&own, keys + first, sizeof own);
    const std::int32_t stop = std::min(first + static_cast<std::int32_t>(kBlock), size);
    // A comparison gives -1. Equal keys keep their order: an earlier document goes before, a later one does not.
    const Lanes above = own + 1;
    for (std::int32_t j = 0; j < first; ++j) count -= reinterpret_cast<Lanes>(keys[j] < above);
    for (std::int32_t j = first; j < stop; ++j)
      count -= reinterpret_cast<Lanes>(
          keys[j] < own - reinterpret_cast<Lanes>(static_cast<std::uint32_t>(j - first) < lane));
    for (std::int32_t j = stop; j < size; ++j) count -= reinterpret_cast<Lanes>(keys[j] < own);
    std::memcpy(rank + first, &count, sizeof count);
  }
}

// Sorts (key << 32 | index) by key, in three passes of 11 bits.
void radix_sort(std::uint64_t* keys, std::uint64_t* other, std::int64_t size) {
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  std::uint32_t starts[3][kBuckets] = {};
  for (std::int64_t i = 0; i < size; ++i)
    for (int pass = 0; pass < 3; ++pass) ++starts[pass][keys[i] >> (32 + kBits * pass) & (kBuckets - 1)];
  for (int pass = 0; pass < 3; ++pass) {
    std::uint32_t sum = 0;
    for (std::uint32_t& start : starts[pass]) sum += std::exchange(start, sum);
    for (std::int64_t i = 0; i < size; ++i)
      other[starts[pass][keys[i] >> (32 + kBits * pass) & (kBuckets - 1)]++] = keys[i];
    std::swap(keys, other);
  }
  std::copy(keys, keys + size, other);  // three passes end in the other array
}

void find_ranks(const float* scores, std::int64_t size, Scratch<float>& scratch) {
  std::int32_t* rank = scratch.rank.data();
  if (size <= kCountedRanks) {
    alignas(64) std::uint32_t keys[kCountedRanks + kBlock];
    for (std::int64_t i = 0; i < size; ++i) keys[i] = rank_key(scores[i]);
    std::fill(keys + size, keys + padded(size), 0xffffffffu);
    return count_ranks(keys, static_cast<std::int32_t>(size), rank);
  }
  scratch.swap.resize(scratch.keys.size());
  for (std::int64_t i = 0; i < size; ++i)
    scratch.keys[i] = static_cast<std::uint64_t>(rank_key(scores[i])) << 32 | static_cast<std::uint64_t>(i);
  radix_sort(scratch.keys.data(), scratch.swap.data(), size);
  for (std::int64_t r = 0; r < size; ++r) rank[scratch.keys[r] & 0xffffffffu] = static_cast<std::int32_t>(r);
}

void find_ranks(const double* scores, std::int64_t size, Scratch<double>& scratch) {
  std::iota(scratch.order.begin(), scratch.order.begin() + size, 0);
  std::stable_sort(scratch.order.begin(), scratch.order.begin() + size, [scores](std::int32_t a, std::int32_t b) {
    const bool nan_a = scores[a] != scores[a], nan_b = scores[b] != scores[b];
    return nan_a != nan_b ? nan_a : scores[a] > scores[b];
  });
  for (std::int64_t r = 0; r < size; ++r) scratch.rank[scratch.order[r]] = static_cast<std::int32_t>(r);
}

// Unordered pairs of different labels among `size` documents, of whose labels each occurs count times.
std::int64_t unequal_pairs(const std::int64_t* count, const std::int64_t* end, std::int64_t size) {
  std::int64_t equal = 0;
  for (; count != end; ++count) equal += *count * *count;
  return (size * size - equal) / 2;
}

// Runs of equal labels, from the highest label down.
template <typename T>
std::vector<std::int64_t> label_runs(std::vector<T>& labels) {
  std::sort(labels.begin(), labels.end(), std::greater<T>());
  std::vector<std::int64_t> runs;
  for (std::size_t i = 0; i < labels.size(); ++i) {
    if (i == 0 || labels[i] != labels[i - 1]) runs.push_back(0);
    ++runs.back();
  }
  return runs;
}

// Whether all labels are whole numbers from 0 to kSmallLabels - 1, whether one is NaN, and the largest small one.
RERANK_FAST_CLONES void look_at_labels(const float* y, std::int64_t size, Labels& labels) {
  int odd = 0, nan = 0, largest = 0;
#pragma omp simd reduction(| : odd, nan) reduction(max : largest)
  for (std::int64_t i = 0; i < size; ++i) {
    const bool in_range = y[i] >= 0.0f && y[i] < static_cast<float>(kSmallLabels);
    const int whole = static_cast<int>(in_range ? y[i] : 0.0f);
    odd |= in_range && static_cast<float>(whole) == y[i] ? 0 : 1;
    nan |= y[i] != y[i] ? 1 : 0;
    largest = whole > largest ? whole : largest;
  }
  labels.small = odd == 0;
  labels.nan = nan != 0;
  labels.largest = largest;
}

void look_at_labels(const double* y, std::int64_t size, Labels& labels) {
  labels.small = true;
  labels.nan = false;
  labels.largest = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const bool in_range = y[i] >= 0 && y[i] < kSmallLabels;
    const int whole = in_range ? static_cast<int>(y[i]) : 0;
    labels.small = labels.small && in_range && whole == y[i];
    labels.nan = labels.nan || y[i] != y[i];
    labels.largest = std::max(labels.largest, whole);
  }
}

RERANK_FAST_CLONES std::int64_t count_label(const float* y, std::int64_t size, float label) {
  std::int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (std::int64_t i = 0; i < size; ++i) count += y[i] == label ? 1 : 0;
  return count;
}

std::int64_t count_label(const double* y, std::int64_t size, double label) { return std::count(y, y + size, label); }

template <typename T>
void read_labels(const T* y, std::int64_t size, Scratch<T>& scratch) {
  Labels& labels = scratch.labels;
  look_at_labels(y, size, labels);
  labels.distinct = 0;
  labels.majority_count = 0;
  if (labels.nan) return;
  const auto note = [&labels](double label, std::int64_t count) {
    ++labels.distinct;
    if (count <= labels.majority_count) return;
    labels.majority_count = count;
    labels.majority = label;
  };
  if (labels.small) {
    if (labels.largest < 8) {
      // A vector pass a label is shorter than a chain of increments. The last count is what the others leave.
      std::int64_t left = size;
      for (int label = 0; label < labels.largest; ++label)
        left -= labels.count[label] = count_label(y, size, static_cast<T>(label));
      labels.count[labels.largest] = left;
    } else {
      std::fill(labels.count, labels.count + kSmallLabels, 0);
      for (std::int64_t i = 0; i < size; ++i) ++labels.count[static_cast<int>(y[i])];
    }
    for (int label = 0; label <= labels.largest; ++label)
      if (labels.count[label] != 0) note(label, labels.count[label]);
    labels.pairs = unequal_pairs(labels.count, labels.count + labels.largest + 1, size);
    return;
  }
  scratch.sorted_labels.assign(y, y + size);
  const std::vector<std::int64_t> runs = label_runs(scratch.sorted_labels);
  std::int64_t start = 0;
  for (const std::int64_t run : runs) {
    note(static_cast<double>(scratch.sorted_labels[static_cast<std::size_t>(start)]), run);
    start += run;
  }
  labels.pairs = unequal_pairs(runs.data(), runs.data() + runs.size(), size);
}

// The gain of a label, and the ideal DCG@k at least eps, both over 2^largest so that a large label stays finite.
struct Gains {
  double largest = 0, normalizer = 0;
  double small[kSmallLabels];  // normalised, where labels are small whole numbers

  double of(double label) const {
    const double relevance = std::max(0.0, label);
    // expm1 where 2^relevance is in range: exact for labels near zero.
    return normalizer * (relevance < 64.0 ? std::expm1(relevance * 0.6931471805599453) * std::exp2(-largest)
                                          : std::exp2(relevance - largest) - std::exp2(-largest));
  }
};

template <typename T>
void find_gains(std::int64_t k, double eps, const Scratch<T>& scratch, std::int64_t size, Gains& gains) {
  double ideal = 0;
  gains.normalizer = 1;
  if (scratch.labels.small) {
    std::int64_t rank = 0;
    double power = std::ldexp(1.0, scratch.labels.largest);
    for (int label = scratch.labels.largest; label >= 0; --label, power *= 0.5) {
      const std::int64_t count = scratch.labels.count[label];
      gains.small[label] = power - 1.0;
      const std::int64_t from = std::min(rank, k), to = std::min(rank + count, k);
      ideal += gains.small[label] * (scratch.ideal[to] - scratch.ideal[from]);
      rank += count;
    }
    const double normalizer = 1.0 / std::max(ideal, eps);
    for (int label = 0; label <= scratch.labels.largest; ++label) gains.small[label] *= normalizer;
    return;
  }
  gains.largest = std::max(0.0, static_cast<double>(scratch.sorted_labels[0]));
  for (std::int64_t r = 0; r < std::min(k, size); ++r)
    ideal += gains.of(static_cast<double>(scratch.sorted_labels[r])) * scratch.inverse_discount[r];
  gains.normalizer = 1.0 / std::max(ideal, eps * std::exp2(-gains.largest));
}

RERANK_FAST_CLONES void exponentials(const float* scores, std::int64_t size, double slope, float* result, float* reciprocal) {
  const auto highest = static_cast<double>(scores[0]);
  // The argument is reduced in double: the rounding of a large difference would show in its exponential.
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) {
    const double x = slope * (static_cast<double>(scores[i]) - highest);
    const double shifted = x * 1.4426950408889634 + 6755399441055744.0;  // rounds to the nearest whole number
    const double n = shifted - 6755399441055744.0;
    const auto f = static_cast<float>(x - n * 0.6931471805599453);
    const auto exponent = static_cast<std::int32_t>(n);
    const std::int32_t bits = (exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    float p = 0.00138368458f;
    p = p * f + 0.0083748158f;
    p = p * f + 0.0416682256f;
    p = p * f + 0.166664202f;
    p = p * f + 0.499999921f;
    p = p * f + 1.00000004f;
    p = p * f + 1.0f;
    result[i] = p * power;
    reciprocal[i] = 1.0f / result[i];
  }
}

void exponentials(const double* scores, std::int64_t size, double slope, double* result, double* reciprocal) {
  for (std::int64_t i = 0; i < size; ++i) {
    result[i] = std::exp(slope * (scores[i] - scores[0]));
    reciprocal[i] = 1.0 / result[i];
  }
}

struct Plan {
  Weighting weighting;
  std::int64_t rows;   // to visit
  std::int64_t pairs;  // preference pairs (for NDCGLoss1 all ordered pairs) under the cut
};

// Lays one list out in rank order. False where it has no pair, or a NaN label: then the loss is written, and the
// gradient of every document equals it.
template <typename T>
bool prepare(const T* scores, const T* labels, std::int64_t size, const LambdaLossOptions& options,
             Scratch<T>& scratch, Plan& plan, double* loss) {
  const bool every_pair = options.scheme == Scheme::kNdcg1;
  plan.pairs = 0;
  *loss = 0;
  if (size == 0 || (size == 1 && !every_pair)) return false;
  scratch.reserve(size);
  read_labels(labels, size, scratch);
  if (scratch.labels.nan) {
    *loss = std::numeric_limits<double>::quiet_NaN();
    return false;
  }
  if (scratch.labels.distinct < 2 && !every_pair) return false;

  const std::int64_t cut = options.k == 0 ? size : std::min(options.k, size);
  const double slope = std::fabs(options.sigma);
  RankedList<T>& list = scratch.list;
  list.size = size;
  list.cut = cut;
  list.turned = options.sigma < 0;
  list.slope = static_cast<T>(slope);
  list.mu = static_cast<T>(options.scheme == Scheme::kNdcg2     ? 1.0
                           : options.scheme == Scheme::kNdcg2pp ? options.mu
                                                                : 0.0);
  plan.weighting = every_pair                        ? Weighting::kEveryPair
                   : options.scheme == Scheme::kNone ? Weighting::kNone
                                                     : Weighting::kGain;
  find_ranks(scores, size, scratch);
  const std::int32_t* rank = scratch.rank.data();
  const std::int64_t width = padded(size);

  Gains gains;
  const bool none = plan.weighting == Weighting::kNone, small = scratch.labels.small;
  if (!none) find_gains(cut, options.eps, scratch, size, gains);
  for (std::int64_t i = 0; i < size; ++i) {
    list.score[rank[i]] = scores[i];
    list.label[rank[i]] = labels[i];
  }
  // Preferences turn round with a negative sigma; for kEveryPair the pair loop sees to it.
  const T sign = list.turned && !every_pair ? T(-1) : T(1);
  const auto majority = static_cast<T>(scratch.labels.majority);
  if (none) {
    for (std::int64_t r = 0; r < size; ++r) list.gain[r] = sign * list.label[r];
  } else if (small) {
    T gain_of[kSmallLabels];
    for (int label = 0; label <= scratch.labels.largest; ++label)
      gain_of[label] = sign * static_cast<T>(gains.small[label]);
    for (std::int64_t r = 0; r < size; ++r) list.gain[r] = gain_of[static_cast<int>(list.label[r])];
  } else {
    for (std::int64_t r = 0; r < size; ++r)
      list.gain[r] = sign * static_cast<T>(gains.of(static_cast<double>(list.label[r])));
  }
  T lowest_gain = 0;
  for (std::int64_t r = 0; r < size; ++r) {
    const auto is_majority = static_cast<T>(list.label[r] == majority);
    list.is_majority[r] = is_majority;
    list.share[r] = T(0.5) + T(0.5) * is_majority;
    lowest_gain = list.gain[r] < lowest_gain ? list.gain[r] : lowest_gain;
  }
  const bool by_discount = options.scheme == Scheme::kLambdaRank || options.scheme == Scheme::kNdcg2pp;
  for (std::int64_t r = 0; r < size; ++r)
    list.inverse_discount[r] = by_discount ? static_cast<T>(scratch.inverse_discount[r]) : T(0);
  if (every_pair)
    for (std::int64_t r = 0; r < size; ++r) list.gain[r] *= static_cast<T>(scratch.inverse_discount[r]);

  // NaN comes first: one at either end makes the range NaN, and the comparison false.
  const auto highest = static_cast<double>(list.score[0]), lowest = static_cast<double>(list.score[size - 1]);
  list.fast = slope * (highest - lowest) <= kExponentLimit<T> && !(list.turned && every_pair);
  if (list.fast) exponentials(list.score, size, slope, list.exponential, list.reciprocal);
  for (std::int64_t r = list.fast ? size : 0; r < width; ++r) list.exponential[r] = list.reciprocal[r] = T(0);
  for (std::int64_t r = size; r < width; ++r) {
    list.inverse_discount[r] = list.label[r] = list.is_majority[r] = list.share[r] = T(0);
    list.score[r] = list.score[size - 1];
    list.gain[r] = every_pair ? T(0) : lowest_gain;
  }

  // Visits of the triangle of all pairs against those of the rows of rare labels.
  const std::int64_t rare = size - scratch.labels.majority_count;
  list.majority_mode = !every_pair && cut == size && 2 * rare < size;
  plan.rows = cut;
  if (list.majority_mode) {
    // Without a branch that the labels' order would make unpredictable.
    plan.rows = 0;
    for (std::int64_t r = 0; r < size; ++r) {
      scratch.order[plan.rows] = static_cast<std::int32_t>(r);
      plan.rows += list.is_majority[r] == T(0) ? 1 : 0;
    }
    list.rows = scratch.order.data();
  }

  if (every_pair) {
    plan.pairs = size * size - (size - cut) * (size - cut);
    double diagonal = 0;
    // s - s: a score that is not finite must be seen.
    for (std::int64_t r = 0; r < cut; ++r)
      diagonal += static_cast<double>(list.gain[r]) + static_cast<double>(list.score[r] - list.score[r]);
    *loss = diagonal * 0.6931471805599453;
  } else if (cut == size) {
    plan.pairs = scratch.labels.pairs;
  } else if (small) {
    std::int64_t count[kSmallLabels] = {};
    for (std::int64_t r = cut; r < size; ++r) ++count[static_cast<int>(list.label[r])];
    plan.pairs = scratch.labels.pairs - unequal_pairs(count, count + kSmallLabels, size - cut);
  } else {
    std::vector<T> below(list.label + cut, list.label + size);
    const std::vector<std::int64_t> runs = label_runs(below);
    plan.pairs = scratch.labels.pairs - unequal_pairs(runs.data(), runs.data() + runs.size(), size - cut);
  }
  std::fill(scratch.pull.data(), scratch.pull.data() + width, 0.0);
  return true;
}

// Writes the gradient of the list's own sum.
template <typename T>
void finish(const Scratch<T>& scratch, const LambdaLossOptions& options, const double* pull, double* loss, T* grad) {
  const double factor = -options.scale * std::fabs(options.sigma);
  for (std::int64_t i = 0; i < scratch.list.size; ++i) grad[i] = static_cast<T>(factor * pull[scratch.rank[i]]);
  *loss *= options.scale;
}

template <typename T>
void one_list(const T* scores, const T* labels, std::int64_t size, const LambdaLossOptions& options, double* loss,
              std::int64_t* pairs, T* grad) {
  Scratch<T>& scratch = this_threads_scratch<T>();
  Plan plan;
  const bool has_pairs = prepare(scores, labels, size, options, scratch, plan, loss);
  *pairs = plan.pairs;
  if (!has_pairs) return std::fill(grad, grad + size, static_cast<T>(*loss));
  visit_pairs(scratch.list, plan.weighting, 0, plan.rows, loss, scratch.pull.data(),
              scratch.row_pull.data());
  finish(scratch, options, scratch.pull.data(), loss, grad);
}

// One list on all threads: its rows in ranges of about equal work, each with sums of its own.
template <typename T>
void one_long_list(const T* scores, const T* labels, std::int64_t size, const LambdaLossOptions& options,
                   double* loss, std::int64_t* pairs, T* grad) {
  Scratch<T>& scratch = this_threads_scratch<T>();
  Plan plan;
  const bool has_pairs = prepare(scores, labels, size, options, scratch, plan, loss);
  *pairs = plan.pairs;
  if (!has_pairs) return std::fill(grad, grad + size, static_cast<T>(*loss));
  const std::int64_t width = padded(size);
  std::vector<double> pull(static_cast<std::size_t>(kRangesPerList * width)), losses(kRangesPerList);
  std::vector<T> row_pull(static_cast<std::size_t>(kRangesPerList * width));
  std::vector<std::int64_t> bounds(kRangesPerList + 1, plan.rows);
  for (std::int64_t range = 0; range < kRangesPerList; ++range) {
    const double share = static_cast<double>(range) / kRangesPerList;
    // Row i of a triangle has size - i columns.
    const double n = static_cast<double>(size), rows = static_cast<double>(plan.rows);
    const double first = scratch.list.majority_mode ? share * rows : n - std::sqrt(n * n - share * rows * (2 * n - rows));
    bounds[range] = std::min(plan.rows, static_cast<std::int64_t>(first));
  }
  parallel_for(options.num_threads, kRangesPerList, [&](std::int64_t range) {
    visit_pairs(scratch.list, plan.weighting, bounds[range], bounds[range + 1], &losses[range],
                pull.data() + range * width, row_pull.data() + range * width);
  });
  for (std::int64_t range = 0; range < kRangesPerList; ++range) {
    *loss += losses[range];
    for (std::int64_t r = 0; r < size; ++r) scratch.pull.data()[r] += pull[range * width + r];
  }
  finish(scratch, options, scratch.pull.data(), loss, grad);
}

}  // namespace

template <typename T>
void lambda_loss(const T* scores, const T* labels, const std::int64_t* offsets, std::int64_t num_lists,
                 const LambdaLossOptions& options, T* loss, T* grad) {
  static thread_local std::vector<double> list_loss;
  static thread_local std::vector<std::int64_t> list_pairs;
  list_loss.resize(static_cast<std::size_t>(num_lists));
  list_pairs.resize(static_cast<std::size_t>(num_lists));
  // Worker threads have their own: they are reached by address.
  double* const losses = list_loss.data();
  std::int64_t* const pairs = list_pairs.data();

  const auto visits = [&](std::int64_t q) {
    const auto size = static_cast<double>(offsets[q + 1] - offsets[q]);
    return 16 * size + 0.5 * size * size;
  };
  double total = 0;
  bool any_long = false;
  for (std::int64_t q = 0; q < num_lists; ++q) {
    total += visits(q);
    any_long = any_long || visits(q) > kVisitsPerTask;
  }
  // Runs of lists, several a thread: they even out what the estimate misses.
  const std::int64_t tasks =
      options.num_threads > 1 && total > kVisitsForThreads ? std::min<std::int64_t>(num_lists, 4 * options.num_threads)
                                                           : 1;
  parallel_for(options.num_threads, tasks, [&](std::int64_t task) {
    for (std::int64_t q = num_lists * task / tasks; q < num_lists * (task + 1) / tasks; ++q) {
      if (visits(q) > kVisitsPerTask) continue;
      const std::int64_t start = offsets[q];
      one_list(scores + start, labels + start, offsets[q + 1] - start, options, losses + q, pairs + q, grad + start);
    }
  });
  for (std::int64_t q = 0; any_long && q < num_lists; ++q) {
    if (visits(q) <= kVisitsPerTask) continue;
    const std::int64_t start = offsets[q];
    one_long_list(scores + start, labels + start, offsets[q + 1] - start, options, losses + q, pairs + q,
                  grad + start);
  }

  if (options.reduction == Reduction::kNone) {
    for (std::int64_t q = 0; q < num_lists; ++q) loss[q] = static_cast<T>(losses[q]);
    return;
  }
  double divisor = 1;
  if (options.reduction == Reduction::kLists) divisor = static_cast<double>(num_lists);
  if (options.reduction == Reduction::kPairs)
    divisor = static_cast<double>(std::accumulate(pairs, pairs + num_lists, std::int64_t{0}));
  divisor = std::max(divisor, 1.0);
  *loss = static_cast<T>(std::accumulate(losses, losses + num_lists, 0.0) / divisor);
  const T factor = static_cast<T>(1.0 / divisor);
  const std::int64_t n = num_lists == 0 ? 0 : offsets[num_lists];
  for (std::int64_t i = 0; i < n; ++i) grad[i] *= factor;
}

template void lambda_loss<float>(const float*, const float*, const std::int64_t*, std::int64_t,
                                 const LambdaLossOptions&, float*, float*);
template void lambda_loss<double>(const double*, const double*, const std::int64_t*, std::int64_t,
                                  const LambdaLossOptions&, double*, double*);

}  // namespace rerank_fast
