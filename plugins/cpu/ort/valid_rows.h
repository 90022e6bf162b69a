// Rows of tokens that count: a chunk may have fewer tokens than the prefill graph takes.
#pragma once

#include <algorithm>
#include <cstring>

#include "operator.h"

namespace sinkexport::ort {

// The field num_tokens, T, and the input num_valid, int64 [1]: how many leading tokens count, 1 .. T. 0: no such input,
// and all rows count. With repeats_last, rows of tokens that do not count get copies of the last row that does: finite
// where that is, for nodes that read all rows. Without it they hold anything: nodes that leave them out read the
// result.
class ValidRows {
 public:
  ValidRows() = default;
  // Takes the input. rows: of x or y, as many for each token.
  ValidRows(Node& node, int64_t rows) : num_tokens_(node.size("num_tokens")), repeats_last_(node.flag("repeats_last")) {
    if (num_tokens_ == 0) return;
    if (rows % num_tokens_ != 0) {
      node.refuse("num_tokens", std::to_string(num_tokens_),
                  "a number that divides the " + std::to_string(rows) + " rows");
    }
    num_valid_ = Input(node, node.take("num_valid", kInt64, {1}));
  }

  // How many of so many rows count.
  int64_t of(const Run& run, int64_t rows) const {
    if (num_tokens_ == 0) return rows;
    return rows / num_tokens_ * std::clamp<int64_t>(*num_valid_.of<int64_t>(run), 1, num_tokens_);
  }

  // Rows [valid, rows) of y [rows, width].
  void fill(float* y, int64_t valid, int64_t rows, int64_t width, const cpu::Parallel& parallel) const {
    if (valid == rows || !repeats_last_) return;
    const float* last = y + (valid - 1) * width;
    const int64_t missing = rows - valid, parts = std::min<int64_t>(missing, parallel.threads);
    cpu::parallelFor(parallel, parts, [&](int64_t part) {
      for (int64_t m = valid + part * missing / parts; m < valid + (part + 1) * missing / parts; ++m) {
        std::memcpy(y + m * width, last, static_cast<size_t>(width) * sizeof(float));
      }
    });
  }

 private:
  int64_t num_tokens_ = 0;
  bool repeats_last_ = false;
  Input num_valid_;
};

}  // namespace sinkexport::ort
