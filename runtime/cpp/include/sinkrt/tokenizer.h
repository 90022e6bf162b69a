// Text to ids and back, out of a tokenizer.json: byte-level BPE (SmolLM2, GPT-2, Llama 3, Qwen, DeepSeek, Falcon,
// BLOOM), BPE as SentencePiece has it (Llama 2, Mistral, Phi-3, Gemma) and Unigram. Twin of runtime/sinkrt/text,
// whose ids and texts it gives; it has no chat templates, which are Python's Jinja. A file with a part or an option
// that is not understood is refused with the reason: its bundle still runs on ids.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace sinkrt {

class Tokenizer {
 public:
  // Throws Error(kBundle) for a file that is unreadable or of a kind that is not supported.
  static Tokenizer load(const std::string& path);
  static Tokenizer fromJson(const std::string& text, const std::string& name);

  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  // Ids of UTF-8 text; `special` adds what the model starts its texts with, if anything.
  // Throws Error(kUsage) for text that is not valid UTF-8.
  std::vector<int64_t> encode(std::string_view text, bool special = true) const;
  // The same of a text that a stream begins with: what the model starts its texts with comes once, though a rendered
  // chat begins with it too.
  std::vector<int64_t> encodePrompt(std::string_view text) const;
  // Ids of a text inside a stream: nothing that marks the beginning of one is added.
  std::vector<int64_t> encodeNext(std::string_view text) const;

  // The text of some ids, special tokens left out unless `keep_special`; unknown ids are left out. Bytes that are no
  // UTF-8 become U+FFFD.
  std::string decode(const int64_t* ids, size_t count, bool keep_special = false) const;
  // Whether an id has text: one that is known and not special.
  bool hasText(int64_t id) const;
  // The id of a token by its text, e.g. "<|im_end|>"; -1: there is none.
  int64_t id(std::string_view token) const;

 private:
  friend class StreamingDecoder;
  struct Data;
  explicit Tokenizer(std::unique_ptr<Data> data);
  std::unique_ptr<Data> data_;
};

// Turns ids into text as they come, never splitting a character that spans several tokens. Allocates nothing after
// construction.
class StreamingDecoder {
 public:
  // Tokens held back: a character has at most 4 bytes, so more are no character.
  static constexpr size_t kMaxPending = 8;

  // after, count: ids that the stream has taken already, such as a prompt's: the last kMaxPending that have text
  // count. Only what follows them comes out: whether it begins with a space depends on them.
  explicit StreamingDecoder(const Tokenizer& tokenizer, const int64_t* after = nullptr, size_t count = 0);
  ~StreamingDecoder();
  StreamingDecoder(StreamingDecoder&&) noexcept;

  // The text that `id` completes: empty while a character is incomplete, and for special tokens. Valid until the next
  // call.
  std::string_view push(int64_t id);
  // What is left when the ids end inside a character, with U+FFFD for what is missing.
  std::string_view flush();

 private:
  struct Work;
  std::string_view piece();

  const Tokenizer& tokenizer_;
  std::unique_ptr<Work> work_;
};

}  // namespace sinkrt
