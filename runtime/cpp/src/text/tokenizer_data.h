// What a Tokenizer is made of.
#pragma once

#include "sinkrt/tokenizer.h"
#include "text/added_tokens.h"
#include "text/decoder.h"
#include "text/model.h"
#include "text/normalizer.h"
#include "text/pre_tokenizer.h"

namespace sinkrt {

struct Tokenizer::Data {
  Vocabulary vocabulary;
  AddedTokens added;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::unique_ptr<Model> model;
  Decoder decoder;
  std::vector<std::string> prepared;   // for the decoder, by id
  std::vector<bool> skipped;           // by id: left out by a decoder unless special tokens are kept
  size_t longest = 0;                  // bytes of the longest of `prepared`
  std::vector<int64_t> before, after;  // what is added around a text
  std::vector<int64_t> newline;        // its ids

  void read(const TokenizerFile& file, const Json& root);
  // The "post_processor" of a file: what is added around a text.
  void readTemplate(const TokenizerFile& file, const Json& part);
  // Appends what the decoder takes of some ids.
  void collect(const int64_t* ids, size_t count, bool keep_special, Pieces& out) const;
};

}  // namespace sinkrt
