#include "sinkrt/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "sinkrt/error.h"
#include "sinkrt/sampling_options.h"

namespace sinkrt {
namespace {

// Tokens that top-p sorts at first: sorting a whole vocabulary costs more than the model's own small operators.
constexpr int64_t kFirstCandidates = 1024;

// A number as short as it can be said: std::to_string knows no 1e-300.
std::string shown(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace

void SamplingParams::check() const {
  for (const SamplingOption& option : kSamplingOptions) {
    const double value = option.number != nullptr ? this->*option.number : static_cast<double>(this->*option.integer);
    if (value >= option.least && value <= option.most) continue;  // neither holds for NaN
    const std::string received = option.number != nullptr ? shown(value) : std::to_string(this->*option.integer);
    throw Error(Code::kUsage, problem(option.name, received, option.expected, std::string("change ") + option.name));
  }
}

SamplingParams SamplingParams::resolved() const {
  SamplingParams out = *this;
  if (!out.seed) {
    std::random_device device;  // 32 bits a draw
    out.seed = uint64_t{device()} << 32 | device();
  }
  return out;
}

Sampler::Sampler(int64_t vocab_size)
    : vocab_size_(vocab_size),
      weights_(static_cast<size_t>(vocab_size)),
      sorted_(weights_.size()),
      ids_(weights_.size()),
      order_(weights_.size()) {}

int64_t Sampler::sample(const float* logits, const int64_t* recent, int64_t num_recent, int64_t position,
                        const SamplingParams& params) {
  if (params.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(params.repetition_penalty);
    std::copy(logits, logits + vocab_size_, weights_.begin());
    for (int64_t i = 0; i < num_recent; ++i) {
      if (recent[i] < 0) continue;
      const float value = logits[recent[i]];  // of the original: a token seen twice is penalized once
      weights_[recent[i]] = value < 0 ? value * penalty : value / penalty;
    }
    logits = weights_.data();
  }
  int64_t best = 0;
  bool finite = true;
  for (int64_t i = 0; i < vocab_size_; ++i) {
    finite = finite && !std::isnan(logits[i]);
    if (logits[i] > logits[best]) best = i;
  }
  if (!finite || !std::isfinite(logits[best])) {
    throw Error(Code::kBackend,
                problem("logits", finite ? std::to_string(logits[best]) : "nan", "finite numbers",
                        "reset the stream; if this is an fp16 bundle that overflows, export with --dtype fp32"));
  }
  if (params.temperature == 0) return best;

  // The maximum first: a temperature close to 0 would overflow otherwise.
  const float largest = logits[best];
  const auto temperature = static_cast<float>(std::max(params.temperature, double{std::numeric_limits<float>::min()}));
  for (int64_t i = 0; i < vocab_size_; ++i) weights_[i] = (logits[i] - largest) / temperature;
  int64_t count = vocab_size_;
  if (0 < params.top_k && params.top_k < vocab_size_) {
    sorted_ = weights_;
    const auto kth = sorted_.begin() + (params.top_k - 1);
    std::nth_element(sorted_.begin(), kth, sorted_.end(), std::greater<>());
    count = 0;
    for (int64_t i = 0; i < vocab_size_; ++i) {  // ties at the k-th place are all kept
      if (weights_[i] < *kth) continue;
      ids_[count] = i;
      weights_[count++] = weights_[i];
    }
  } else {
    std::iota(ids_.begin(), ids_.end(), int64_t{0});
  }
  for (int64_t i = 0; i < count; ++i) weights_[i] = std::exp(weights_[i]);
  if (params.top_p < 1.0) count = nucleus(count, params.top_p);

  double sum = 0;
  int64_t last = 0;  // of any weight
  for (int64_t i = 0; i < count; ++i) {
    if (sum + weights_[i] > sum) last = i;
    sum += weights_[i];
  }
  const double goal = uniform(*params.seed, position) * sum;
  double cumulative = 0;
  for (int64_t i = 0; i < last; ++i) {
    cumulative += weights_[i];
    if (cumulative > goal) return ids_[i];
  }
  return ids_[last];  // rounding may carry the goal up to the sum itself
}

// Moves the fewest largest weights whose share of the sum reaches `top_p` to the front, the largest first and equal
// ones by id; returns how many.
int64_t Sampler::nucleus(int64_t count, double top_p) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += weights_[i];
  const double goal = top_p * sum;
  const auto before = [&](int64_t a, int64_t b) {
    return weights_[a] != weights_[b] ? weights_[a] > weights_[b] : a < b;
  };
  const auto first = order_.begin();
  std::iota(first, first + count, int64_t{0});
  for (int64_t sorted = std::min(kFirstCandidates, count);; sorted = std::min(sorted * 8, count)) {
    std::nth_element(first, first + (sorted - 1), first + count, before);
    std::sort(first, first + sorted, before);
    double cumulative = 0;
    int64_t kept = 0;
    // A token stays if those before it do not reach the goal by themselves: the first one always does.
    while (kept < sorted && (kept == 0 || cumulative < goal)) cumulative += weights_[order_[kept++]];
    if (cumulative < goal && sorted < count) continue;
    for (int64_t i = 0; i < kept; ++i) sorted_[i] = weights_[order_[i]];
    std::copy(sorted_.begin(), sorted_.begin() + kept, weights_.begin());
    for (int64_t i = 0; i < kept; ++i) order_[i] = ids_[order_[i]];
    std::copy(first, first + kept, ids_.begin());
    return kept;
  }
}

}  // namespace sinkrt
