#include "sinkrt/session.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "files.h"
#include "sinkrt/state.h"

namespace sinkrt {
namespace {

// A chunk of T tokens is about this much faster than T steps; shorter rests go step by step.
constexpr int64_t kStepsOfAChunk = 8;
constexpr int64_t kStepsOfAGpuChunk = 64;  // with TensorRT

// One token is a step.
constexpr int64_t kSmallestChunk = 2;

// Tokens from which on one run of the prefill graph is quicker than as many steps. Matmuls of the CPU library compute
// rows of tokens alone.
int64_t smallestChunk(const Manifest& manifest) {
  const int64_t chunk = manifest.stream.chunk_size;
  if (chunk == 1) return std::numeric_limits<int64_t>::max();
  if (manifest.target == kCpuTarget) return kSmallestChunk;
  return std::max(kSmallestChunk, chunk / (manifest.target == kTensorrtTarget ? kStepsOfAGpuChunk : kStepsOfAChunk));
}

// Limit of `tokens_at_once`: beyond it, coming back to the host takes no measurable time.
constexpr int64_t kMostAtOnce = 4096;

[[noreturn]] void refuse(const std::string& what, const std::string& received, const std::string& expected,
                         const std::string& fix) {
  throw Error(Code::kUsage, problem(what, received, expected, fix));
}

}  // namespace

std::unique_ptr<Session> Session::load(const std::string& bundle, const LoadOptions& options) {
  if (options.threads < 0) {
    refuse("threads", std::to_string(options.threads), ">= 1", "leave it out for all cores");
  }
  Manifest manifest = loadManifest(bundle);
  checkFiles(bundle, manifest, options.verify);
  auto session = std::make_unique<Session>(
      std::move(manifest), [&](const Manifest& kept) { return loadBackend(options.backend, bundle, kept, options); });
  session->bundle_ = bundle;
  return session;
}

Session::Session(Manifest manifest, const std::function<std::unique_ptr<Backend>(const Manifest&)>& make)
    : manifest_(std::move(manifest)), is_recurrent_(manifest_.isRecurrent()), backend_(make(manifest_)) {
  const auto batch = static_cast<size_t>(manifest_.stream.batch);
  position_.assign(batch, 0);
  recent_ids_.assign(batch * static_cast<size_t>(capacity()), -1);
  damaged_.assign(batch, 0);
  step_ids_.assign(batch, 0);
  active_.reset(new bool[batch]());
  all_.resize(batch);
  std::iota(all_.begin(), all_.end(), int64_t{0});
}

void Session::checkStream(int64_t stream) const {
  if (0 <= stream && stream < batch()) return;
  refuse("streams", "stream " + std::to_string(stream), "some of 0 .. " + std::to_string(batch() - 1) + ", each once",
         "use a stream of this bundle");
}

void Session::checkWhole(int64_t stream) const {
  if (!damaged_[stream]) return;
  throw Error(Code::kState, problem("stream " + std::to_string(stream), "one that an error cut short", "a whole stream",
                                    "reset it, or load a saved state"));
}

void Session::checkIds(const int64_t* ids, int64_t count) const {
  const auto outside = std::find_if(ids, ids + count, [this](int64_t id) { return id < 0 || id >= vocabSize(); });
  if (outside == ids + count) return;
  refuse("token id", std::to_string(*outside), "0 .. " + std::to_string(vocabSize() - 1),
         "use the tokenizer of this model");
}

void Session::checkRoom(int64_t stream, int64_t count) const {
  const int64_t limit = manifest_.stream.position_limit;
  if (count <= limit - position_[stream]) return;
  refuse("position", std::to_string(position_[stream]) + " and " + std::to_string(count) + " more tokens",
         "at most " + std::to_string(limit) + " tokens in a stream", "reset the stream");
}

int64_t Session::position(int64_t stream) const {
  checkStream(stream);
  return position_[stream];
}

std::vector<int64_t> Session::recentIds(int64_t stream) const {
  checkStream(stream);
  const int64_t end = position_[stream], count = std::min(end, capacity());
  std::vector<int64_t> out;
  for (int64_t t = end - count; t < end; ++t) out.push_back(recent_ids_[stream * capacity() + t % capacity()]);
  return out;
}

void Session::step(const int64_t* ids) {
  step(ids, all_.data(), batch());
}

void Session::step(const int64_t* ids, const int64_t* streams, int64_t count) {
  if (count < 1 || count > batch()) refuse("streams", std::to_string(count), "1 .. B of them", "name each stream once");
  for (int64_t i = 0; i < count; ++i) {
    checkStream(streams[i]);
    checkWhole(streams[i]);
    checkRoom(streams[i], 1);
    if (std::find(streams, streams + i, streams[i]) != streams + i) {
      refuse("streams", "stream " + std::to_string(streams[i]) + " twice", "each once", "name each stream once");
    }
  }
  checkIds(ids, count);
  run(ids, streams, count);
}

// One token for each of these streams, checked by the caller. The graph knows no idle streams: they take some token at
// the position that comes next. It lands in the slot of the token that this very position evicts, which nothing reads
// any more, and is overwritten when the position is really taken.
void Session::run(const int64_t* ids, const int64_t* streams, int64_t count) {
  std::fill(active_.get(), active_.get() + batch(), false);
  for (int64_t i = 0; i < count; ++i) {
    step_ids_[streams[i]] = ids[i];
    active_[streams[i]] = true;
  }
  for (int64_t i = 0; i < count; ++i) hold(streams[i]);
  backend_->step(step_ids_.data(), position_.data(), active_.get());
  for (int64_t i = 0; i < count; ++i) {
    remember(streams[i], ids + i, 1);
    damaged_[streams[i]] = 0;
  }
}

// What follows must reach its end, where there are recurrent states: they know no positions, so a token that was
// cut short cannot be fed again, and a state that is not all there is not masked.
void Session::hold(int64_t stream) {
  if (is_recurrent_) damaged_[stream] = 1;
}

void Session::remember(int64_t stream, const int64_t* ids, int64_t count) {
  int64_t* recent = recent_ids_.data() + stream * capacity();
  for (int64_t i = 0; i < count; ++i) recent[(position_[stream] + i) % capacity()] = ids[i];
  position_[stream] += count;
}

void Session::prefill(const int64_t* ids, int64_t count, int64_t stream) {
  checkStream(stream);
  checkWhole(stream);
  if (count < 1) refuse("prompt", "no tokens", "at least one", "give some text");
  checkIds(ids, count);
  checkRoom(stream, count);
  const int64_t chunk = manifest_.stream.chunk_size;
  const int64_t smallest = smallestChunk(manifest_);
  int64_t done = 0;
  while (count - done >= smallest) {
    const int64_t size = std::min(count - done, chunk);
    // Unlike a step, a chunk overwrites tokens that it would read again: one that fails cannot be repeated.
    damaged_[stream] = 1;
    backend_->prefill(stream, ids + done, size, position_[stream]);
    damaged_[stream] = 0;
    remember(stream, ids + done, size);
    done += size;
  }
  for (; done < count; ++done) run(ids + done, &stream, 1);
}

void Session::steps(int64_t count, const SamplingParams* sampling, bool ignore_eos, int64_t* ids, int64_t* num_ids,
                    bool* ended) {
  if (count < 1) refuse("count", std::to_string(count), ">= 1", "ask for a token or more");
  for (int64_t b = 0; b < batch(); ++b) {
    if (ended[b]) continue;
    checkWhole(b);
    checkRoom(b, count);
    sampling[b].check();
    if (!sampling[b].seed) refuse("seed", "none", "a number", "use SamplingParams::resolved()");
    if (position_[b] == 0) refuse("prompt", "none", "some tokens: the stream is empty", "prefill, or load a state");
  }
  const std::vector<int64_t>& eos = manifest_.model.eos_token_ids;
  for (int64_t b = 0; b < batch(); ++b) {
    active_[b] = !ended[b];
    if (active_[b]) hold(b);
  }
  backend_->steps({count, sampling, eos.data(), ignore_eos ? 0 : static_cast<int64_t>(eos.size()), position_.data(),
                   recent_ids_.data(), ids, num_ids, ended, damaged_.data()});
  for (int64_t b = 0; b < batch(); ++b) {
    if (active_[b]) damaged_[b] = 0;
  }
}

int64_t Session::generate(const std::vector<int64_t>& prompt, const GenerateParams& params,
                          const std::function<bool(int64_t id)>& on_token) {
  if (batch() != 1) {
    refuse("generate", "a bundle of " + std::to_string(batch()) + " streams", "batch 1",
           "use steps, or export with --batch 1");
  }
  if (params.max_tokens < 0) refuse("max_tokens", std::to_string(params.max_tokens), ">= 1", "leave it out for all");
  if (params.tokens_at_once < 1) {
    refuse("tokens_at_once", std::to_string(params.tokens_at_once), ">= 1", "leave it out for one at a time");
  }
  params.sampling.check();
  const SamplingParams sampling = params.sampling.resolved();
  if (prompt.empty() && position_[0] == 0) {
    refuse("prompt", "none", "some text: the stream is empty", "give a prompt, or load a state");
  }
  const int64_t at_once = std::min(params.tokens_at_once, kMostAtOnce);
  std::vector<int64_t> ids(static_cast<size_t>(at_once));
  if (!prompt.empty()) prefill(prompt.data(), static_cast<int64_t>(prompt.size()));
  int64_t total = 0;
  for (bool ended = false; !ended && (params.max_tokens == 0 || total < params.max_tokens);) {
    const int64_t rest = params.max_tokens == 0 ? at_once : params.max_tokens - total;
    int64_t num_ids = 0;
    steps(std::min(at_once, rest), &sampling, params.ignore_eos, ids.data(), &num_ids, &ended);
    for (int64_t i = 0; i < num_ids; ++i) {
      ++total;
      if (!on_token(ids[i])) return total;
    }
  }
  return total;
}

int64_t Session::generateText(const std::string& prompt, const GenerateParams& params,
                              const std::function<bool(int64_t id, std::string_view piece)>& on_text) {
  const Tokenizer& words = tokenizer();
  std::vector<int64_t> ids;
  if (!prompt.empty()) ids = position_[0] > 0 ? words.encodeNext(prompt) : words.encodePrompt(prompt);
  std::vector<int64_t> earlier = recentIds();  // and the prompt, as much as the stream remembers
  earlier.insert(earlier.end(), ids.begin(), ids.end());
  const auto kept = std::min(earlier.size(), static_cast<size_t>(capacity()));
  earlier.erase(earlier.begin(), earlier.end() - static_cast<std::ptrdiff_t>(kept));
  // Without a prompt, a character that an answer cut short began is completed.
  const size_t pending = prompt.empty() ? std::min(earlier.size(), StreamingDecoder::kMaxPending) : 0;
  StreamingDecoder decoder(words, earlier.data(), earlier.size() - pending);
  for (size_t i = earlier.size() - pending; i < earlier.size(); ++i) decoder.push(earlier[i]);
  bool wanted = true;
  const int64_t count = generate(ids, params, [&](int64_t id) { return wanted = on_text(id, decoder.push(id)); });
  const std::string_view rest = decoder.flush();
  if (wanted && !rest.empty()) on_text(-1, rest);
  return count;
}

void Session::reset() {
  for (int64_t b = 0; b < batch(); ++b) reset(b);
}

void Session::reset(int64_t stream) {
  checkStream(stream);
  // The position first: at 0 every slot is masked, so a failure cannot leave a stream that is half there.
  hold(stream);
  position_[stream] = 0;
  std::fill_n(recent_ids_.begin() + stream * capacity(), capacity(), int64_t{-1});
  backend_->clearStream(stream);
  damaged_[stream] = 0;
}

void Session::saveState(const std::string& path) {
  for (int64_t b = 0; b < batch(); ++b) checkWhole(b);
  const size_t num_states = manifest_.states.size();
  sinkrt::saveState(path, manifest_, [&](size_t index, void* target) {
    if (index < num_states) {
      backend_->readState(index, target);
    } else if (index == num_states) {
      std::memcpy(target, position_.data(), position_.size() * sizeof(int64_t));
    } else if (index == num_states + 1) {
      std::memcpy(target, recent_ids_.data(), recent_ids_.size() * sizeof(int64_t));
    } else {
      std::memcpy(target, backend_->logits(), static_cast<size_t>(batch() * vocabSize()) * sizeof(float));
    }
  });
}

void Session::loadState(const std::string& path) {
  const StateFile file = readState(path, manifest_);
  std::vector<float> logits(static_cast<size_t>(batch() * vocabSize()));  // the file's are not aligned
  for (int64_t b = 0; b < batch(); ++b) hold(b);
  std::fill(position_.begin(), position_.end(), 0);  // as in `reset`; the file's position comes last
  for (size_t i = 0; i < manifest_.states.size(); ++i) backend_->writeState(i, file.tensor(manifest_.states[i].input));
  std::memcpy(logits.data(), file.tensor("logits"), logits.size() * sizeof(float));
  backend_->writeLogits(logits.data());
  std::memcpy(recent_ids_.data(), file.tensor("recent_ids"), recent_ids_.size() * sizeof(int64_t));
  std::memcpy(position_.data(), file.tensor("position"), position_.size() * sizeof(int64_t));
  std::fill(damaged_.begin(), damaged_.end(), 0);
}

const Tokenizer& Session::tokenizer() {
  if (!tokenizer_) {
    if (!manifest_.tokenizer) {
      refuse("tokenizer", "a bundle without one", "tokenizer.json",
             "feed token ids, or export a model folder with its tokenizer");
    }
    tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::load(joined(bundle_, manifest_.tokenizer->file)));
  }
  return *tokenizer_;
}

}  // namespace sinkrt
