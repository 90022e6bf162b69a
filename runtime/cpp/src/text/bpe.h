// Byte pair encoding: of the bytes of a text (GPT-2, Llama 3, Qwen), or of its characters with single bytes for those
// that the vocabulary lacks (Llama 2, Mistral, Gemma).
#pragma once

#include <array>
#include <string>
#include <unordered_map>

#include "text/model.h"
#include "text/pair_table.h"

namespace sinkrt {

class Bpe final : public Model {
 public:
  Bpe(const TokenizerFile& file, const Json& part, Vocabulary& vocabulary);

  void encode(std::string_view piece, std::vector<int64_t>& out) const override;
  void encodeBytes(std::string_view piece, std::vector<int64_t>& out) const override;

 private:
  struct Merge {
    uint32_t rank, id;
  };

  void readVocabulary(const TokenizerFile& file, const Json& part, Vocabulary& vocabulary);
  void readUnknown(const TokenizerFile& file, const Json& part, const Vocabulary& vocabulary);
  void readMerges(const TokenizerFile& file, const Json& part, const Vocabulary& vocabulary);

  int64_t characterId(uint32_t code) const {
    const size_t page = code >> 8;
    return page < pages_.size() && !pages_[page].empty() ? pages_[page][code & 0xff] : -1;
  }
  // The symbols that a piece begins as.
  void symbols(std::string_view piece, std::vector<uint32_t>& out) const;
  // Merges `count` symbols in place and appends what becomes of them: few by looking at all, many with a queue.
  void mergeFew(uint32_t* ids, size_t count, std::vector<int64_t>& out) const;
  void mergeMany(const std::vector<uint32_t>& ids, std::vector<int64_t>& out) const;

  std::vector<std::vector<int32_t>> pages_;  // ids of single characters, by 256 code points; -1: none
  std::array<int64_t, 256> byte_symbols_{};  // ids of single bytes, as byte-level vocabularies write them; -1: none
  std::array<int64_t, 256> byte_tokens_{};   // ids of "<0x00>" .. "<0xFF>"; -1: none
  bool has_all_bytes_ = true;                // byte_symbols_ has
  bool byte_fallback_ = false, fuse_unknown_ = false;
  int64_t unknown_ = -1;  // -1: characters that are not in the vocabulary are left out
  PairTable<Merge> merges_;
  // With ignore_merges, pieces that are tokens as they stand: by text, and by the bytes that they are written for.
  bool ignore_merges_ = false;
  std::unordered_map<std::string, int64_t> words_, byte_words_;
};

}  // namespace sinkrt
