// What the C interface does not show, for ctypes: sampler, tokenizer, manifest, steps of several tokens.
// Functions return -1 after an error, whose text `probe_error` has.
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "sinkrt/session.h"

namespace {

std::string last_error;

int64_t guarded(const std::function<int64_t()>& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

int64_t given(const std::string& text, char* out, int64_t room) {
  if (static_cast<int64_t>(text.size()) <= room) std::memcpy(out, text.data(), text.size());
  return static_cast<int64_t>(text.size());
}

}  // namespace

extern "C" {

const char* probe_error() {
  return last_error.c_str();
}

int64_t probe_sample(const float* logits, int64_t vocab_size, const int64_t* recent, int64_t num_recent,
                     int64_t position, double temperature, int64_t top_k, double top_p, double penalty, uint64_t seed) {
  return guarded([&] {
    sinkrt::SamplingParams params{temperature, top_k, top_p, penalty, seed};
    params.check();
    return sinkrt::Sampler(vocab_size).sample(logits, recent, num_recent, position, params);
  });
}

// Bundle's fingerprint, 64 digits.
int64_t probe_fingerprint(const char* bundle, char* out) {
  return guarded([&] { return given(sinkrt::loadManifest(bundle).fingerprint(), out, 64); });
}

// The manifest's text as it would be written. Returns its size.
int64_t probe_manifest(const char* bundle, char* out, int64_t room) {
  return guarded([&] { return given(sinkrt::loadManifest(bundle).toJson(), out, room); });
}

int64_t probe_check(const char* bundle) {
  return guarded([&]() -> int64_t {
    const sinkrt::Manifest manifest = sinkrt::loadManifest(bundle);
    sinkrt::checkFiles(bundle, manifest);
    sinkrt::checkGraphs(manifest);
    return 0;
  });
}

// Load a bundle, and a saved state into it.
int64_t probe_load_state(const char* bundle, const char* onnxruntime, const char* state) {
  return guarded([&]() -> int64_t {
    sinkrt::LoadOptions options;
    options.threads = 1;
    options.onnxruntime_library = onnxruntime;
    sinkrt::Session::load(bundle, options)->loadState(state);
    return 0;
  });
}

void* probe_tokenizer(const char* path) {
  sinkrt::Tokenizer* out = nullptr;
  guarded([&]() -> int64_t {
    out = new sinkrt::Tokenizer(sinkrt::Tokenizer::load(path));
    return 0;
  });
  return out;
}

void probe_tokenizer_free(void* tokenizer) {
  delete static_cast<sinkrt::Tokenizer*>(tokenizer);
}

// mode: 0 without, 1 with what begins texts, 2 inside a stream, 3 as a stream's beginning. Returns how many ids there
// are.
int64_t probe_encode(const void* tokenizer, const char* text, int64_t size, int mode, int64_t* out, int64_t room) {
  return guarded([&] {
    const auto& words = *static_cast<const sinkrt::Tokenizer*>(tokenizer);
    const std::string_view view(text, static_cast<size_t>(size));
    const std::vector<int64_t> ids = mode == 3   ? words.encodePrompt(view)
                                     : mode == 2 ? words.encodeNext(view)
                                                 : words.encode(view, mode == 1);
    if (static_cast<int64_t>(ids.size()) <= room) std::copy(ids.begin(), ids.end(), out);
    return static_cast<int64_t>(ids.size());
  });
}

int64_t probe_decode(const void* tokenizer, const int64_t* ids, int64_t count, int keep_special, char* out,
                     int64_t room) {
  return guarded([&] {
    const auto& words = *static_cast<const sinkrt::Tokenizer*>(tokenizer);
    return given(words.decode(ids, static_cast<size_t>(count), keep_special != 0), out, room);
  });
}

// The pieces of a streaming decoder, each ended by a 0xff byte, and what `flush` gives. The first `after` ids are in
// the stream already.
int64_t probe_stream(const void* tokenizer, const int64_t* ids, int64_t count, int64_t after, char* out, int64_t room) {
  return guarded([&] {
    sinkrt::StreamingDecoder decoder(*static_cast<const sinkrt::Tokenizer*>(tokenizer), ids,
                                     static_cast<size_t>(after));
    std::string all;
    for (int64_t i = after; i < count; ++i) all.append(decoder.push(ids[i])).append("\xff");
    all.append(decoder.flush());
    return given(all, out, room);
  });
}

// Greedy steps of `count` tokens at once of a bundle, after `prompt` [B, N]; ids: [B, count] out, num_ids: [B] out.
int64_t probe_steps(const char* bundle, const char* onnxruntime, const int64_t* prompt, int64_t length, int64_t count,
                    int ignore_eos, int64_t* ids, int64_t* num_ids, const char* state) {
  return guarded([&]() -> int64_t {
    sinkrt::LoadOptions options;
    options.threads = 1;
    options.onnxruntime_library = onnxruntime;
    const auto session = sinkrt::Session::load(bundle, options);
    sinkrt::SamplingParams greedy;
    greedy.seed = 0;
    const std::vector<sinkrt::SamplingParams> sampling(static_cast<size_t>(session->batch()), greedy);
    const std::unique_ptr<bool[]> ended(new bool[sampling.size()]());
    for (int64_t b = 0; b < session->batch(); ++b) session->prefill(prompt + b * length, length, b);
    session->steps(count, sampling.data(), ignore_eos != 0, ids, num_ids, ended.get());
    session->saveState(state);
    return 0;
  });
}
}
