// A decoding session: endless, in constant memory. Twin of runtime/sinkrt/session.py.
//
//   auto session = sinkrt::Session::load("bundle");
//   session->prefill(ids.data(), ids.size());
//   while (true) session->step(&next);
//
// All buffers are allocated by `load`; from token to token nothing is allocated. One session a thread at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "sinkrt/backend.h"
#include "sinkrt/manifest.h"
#include "sinkrt/sampler.h"
#include "sinkrt/tokenizer.h"

namespace sinkrt {

struct LoadOptions : BackendOptions {
  std::string backend = "ort";  // ort | tensorrt
};

struct GenerateParams {
  SamplingParams sampling;
  int64_t max_tokens = 0;  // 0: until the model ends its text, or forever with ignore_eos
  bool ignore_eos = false;
  // Decoded without coming back to the host in between, on backends that can; at most 4,096. An answer that is stopped
  // early has fed them all: `position` and `recentIds` count them, not what was handed over.
  int64_t tokens_at_once = 1;
};

class Session {
 public:
  // Open a bundle folder. With options.verify every file's SHA-256 is compared with the manifest, else its size.
  // Throws Error.
  static std::unique_ptr<Session> load(const std::string& bundle, const LoadOptions& options = {});
  // Over a backend that is there already (tests, backends of one's own). `make` gets the session's manifest.
  Session(Manifest manifest, const std::function<std::unique_ptr<Backend>(const Manifest&)>& make);

  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const Manifest& manifest() const { return manifest_; }
  Backend& backend() { return *backend_; }
  int64_t batch() const { return manifest_.stream.batch; }
  int64_t capacity() const { return manifest_.stream.capacity(); }
  int64_t vocabSize() const { return manifest_.model.vocab_size; }
  // How many tokens a stream has taken, which is the next token's position. Throws Error(kUsage).
  int64_t position(int64_t stream = 0) const;
  // float32 [B, vocab] of the token after each stream's last one; valid until the next call.
  const float* logits() { return backend_->logits(); }
  // The last min(position, C) tokens of a stream, oldest first. Throws Error(kUsage).
  std::vector<int64_t> recentIds(int64_t stream = 0) const;

  // Feed one token to each stream: ids [B]. Throws Error; no position advances if it fails.
  void step(const int64_t* ids);
  // Feed one token to some streams: ids, streams [count], each stream once. The others do not notice.
  void step(const int64_t* ids, const int64_t* streams, int64_t count);

  // Feed count >= 1 tokens to one stream, exactly as if they came one by one, but faster. Checked before any is fed.
  void prefill(const int64_t* ids, int64_t count, int64_t stream = 0);

  // Sample and feed up to `count` tokens of each stream. ids: [B, count] out; num_ids: [B] out. A stream ends, with
  // fewer, at one of its model's end tokens unless `ignore_eos`; that token is not fed. Streams with ended[b] true take
  // none. sampling: [B], with seeds (SamplingParams::resolved), or the draws of two calls would not belong together.
  void steps(int64_t count, const SamplingParams* sampling, bool ignore_eos, int64_t* ids, int64_t* num_ids,
             bool* ended);

  // Feed `prompt` (empty: go on where the stream stands) and hand over the answer token by token until `on_token`
  // returns false, max_tokens have come, or the model ends its text; that last token is not fed. Needs batch 1.
  // Returns the number of tokens. Throws Error.
  int64_t generate(const std::vector<int64_t>& prompt, const GenerateParams& params,
                   const std::function<bool(int64_t id)>& on_token);
  // The same in text. `on_text` gets each id with the whole characters that it completes, often none, and at the end
  // what is left with the id -1, if anything. Needs a tokenizer that `tokenizer` can read.
  int64_t generateText(const std::string& prompt, const GenerateParams& params,
                       const std::function<bool(int64_t id, std::string_view piece)>& on_text);

  // Forget everything: all streams, or one, start again at position 0.
  void reset();
  void reset(int64_t stream);

  // Write or read states, position, recent ids and logits; files go between this runtime and Python's and between
  // backends of one bundle. Failed loads change nothing. Throws Error.
  void saveState(const std::string& path);
  void loadState(const std::string& path);

  // The bundle's tokenizer, read on first use. Throws Error if it has none or it is not supported.
  const Tokenizer& tokenizer();

 private:
  void checkStream(int64_t stream) const;
  void checkWhole(int64_t stream) const;
  void checkIds(const int64_t* ids, int64_t count) const;
  void checkRoom(int64_t stream, int64_t count) const;
  void run(const int64_t* ids, const int64_t* streams, int64_t count);
  void hold(int64_t stream);
  void remember(int64_t stream, const int64_t* ids, int64_t count);

  std::string bundle_;
  Manifest manifest_;
  bool is_recurrent_;
  std::unique_ptr<Backend> backend_;
  std::vector<int64_t> position_;    // [B]
  std::vector<int64_t> recent_ids_;  // [B, C]: the id of token t at t mod C, -1: none
  std::vector<char> damaged_;        // [B]: streams that something has cut short where it cannot be repeated
  std::vector<int64_t> step_ids_;    // [B]
  std::unique_ptr<bool[]> active_;   // [B]
  std::vector<int64_t> all_;         // [B]: 0 .. B-1
  std::unique_ptr<Tokenizer> tokenizer_;
};

}  // namespace sinkrt
