// Unigram: of all ways to make a piece of tokens, the one of the highest sum of scores (T5, XGLM, LLM-jp).
#pragma once

#include <array>

#include "text/model.h"
#include "text/trie.h"

namespace sinkrt {

class Unigram final : public Model {
 public:
  Unigram(const TokenizerFile& file, const Json& part, Vocabulary& vocabulary);

  void encode(std::string_view piece, std::vector<int64_t>& out) const override;
  void encodeBytes(std::string_view piece, std::vector<int64_t>& out) const override;

 private:
  // What a stretch of a piece becomes: the token that it is, or bytes, or what is unknown.
  void append(std::string_view stretch, std::vector<int64_t>& out) const;

  std::vector<double> scores_;  // by id
  double unknown_score_ = 0;
  int64_t unknown_ = 0;
  bool byte_fallback_ = false;
  std::array<int64_t, 256> byte_tokens_{};  // ids of "<0x00>" .. "<0xFF>"; -1: none
  Trie tokens_;
};

}  // namespace sinkrt
