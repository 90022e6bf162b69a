// What makes tokens of a piece of text.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "text/tokenizer_file.h"
#include "text/vocabulary.h"

namespace sinkrt {

class Model {
 public:
  virtual ~Model() = default;

  // Appends the ids of a piece, valid UTF-8 and not empty.
  virtual void encode(std::string_view piece, std::vector<int64_t>& out) const = 0;
  // The same of a piece whose bytes are to be written as byte-level vocabularies do.
  virtual void encodeBytes(std::string_view piece, std::vector<int64_t>& out) const = 0;

  // Tokens that the model itself has, as the library counts them.
  size_t size() const { return size_; }

 protected:
  size_t size_ = 0;
};

// The "model" of a file. Throws Error(kBundle).
std::unique_ptr<Model> readModel(const TokenizerFile& file, const Json& part, Vocabulary& vocabulary);

}  // namespace sinkrt
