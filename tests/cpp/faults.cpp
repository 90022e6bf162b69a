// A session over a backend that fails when asked to: what counts afterwards, and how a stream gets well again.
// Arguments: a toy bundle of batch 2, chunks of 4 and streams of at most 100 tokens, and a folder to write to.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "sinkrt/session.h"

#define CHECK(what)                                           \
  do {                                                        \
    if (!(what)) {                                            \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #what); \
      std::exit(1);                                           \
    }                                                         \
  } while (0)

namespace {

// The logits of a stream are largest at the id after the one that it took last.
class Counting final : public sinkrt::Backend {
 public:
  explicit Counting(const sinkrt::Manifest& manifest)
      : Backend(manifest), logits_(static_cast<size_t>(manifest.stream.batch * manifest.model.vocab_size)) {
    for (const sinkrt::StateSpec& state : manifest.states) states_.emplace_back(static_cast<size_t>(state.bytes()));
  }

  int fail_after = -1;  // runs that succeed before one fails; -1: none fails
  bool broken_numbers = false;

  const char* name() const override { return "counting"; }
  void step(const int64_t* ids, const int64_t*, const bool* active) override {
    run();
    for (int64_t b = 0; b < manifest_.stream.batch; ++b) {
      if (active[b]) took(b, ids[b]);
    }
  }
  void prefill(int64_t stream, const int64_t* ids, int64_t count, int64_t) override {
    run();
    took(stream, ids[count - 1]);
  }
  const float* logits() override { return logits_.data(); }
  void writeLogits(const float* logits) override { std::copy(logits, logits + logits_.size(), logits_.begin()); }
  void readState(size_t state, void* target) const override {
    std::memcpy(target, states_[state].data(), states_[state].size());
  }
  void writeState(size_t state, const void* source) override {
    std::memcpy(states_[state].data(), source, states_[state].size());
  }
  void clearStream(int64_t) override {}
  std::vector<const void*> stateBuffers() const override { return {}; }

 private:
  void run() {
    if (fail_after == 0) throw sinkrt::Error(sinkrt::Code::kBackend, "as asked");
    if (fail_after > 0) --fail_after;
  }
  void took(int64_t stream, int64_t id) {
    float* row = logits_.data() + stream * manifest_.model.vocab_size;
    std::fill(row, row + manifest_.model.vocab_size, broken_numbers ? NAN : 0.0f);
    if (!broken_numbers) row[(id + 1) % manifest_.model.vocab_size] = 1.0f;
  }

  std::vector<float> logits_;
  std::vector<std::vector<char>> states_;
};

// Runs `body`, which must throw an error of this code that contains `part`.
template <typename Body>
void refused(sinkrt::Code code, const char* part, Body body) {
  try {
    body();
  } catch (const sinkrt::Error& error) {
    if (error.code() == code && std::strstr(error.what(), part) != nullptr) return;
    std::fprintf(stderr, "%s\n", error.what());
  }
  std::fprintf(stderr, "expected an error with '%s'\n", part);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 3);
  Counting* backend = nullptr;
  sinkrt::Session session(sinkrt::loadManifest(argv[1]), [&](const sinkrt::Manifest& manifest) {
    auto made = std::make_unique<Counting>(manifest);
    backend = made.get();
    return made;
  });
  const std::string state = std::string(argv[2]) + "/state";
  const std::vector<int64_t> prompt = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  const int64_t pair[2] = {20, 30};
  using sinkrt::Code;

  session.prefill(prompt.data(), 10, 0);
  session.prefill(prompt.data(), 3, 1);
  CHECK(session.position(0) == 10 && session.position(1) == 3);
  session.saveState(state);

  // A step that fails counts for nobody, and can be taken again.
  backend->fail_after = 0;
  refused(Code::kBackend, "as asked", [&] { session.step(pair); });
  CHECK(session.position(0) == 10 && session.position(1) == 3 && session.recentIds(1).back() == 3);
  backend->fail_after = -1;
  session.step(pair);
  CHECK(session.position(0) == 11 && session.position(1) == 4 && session.recentIds(1).back() == 30);

  // A chunk that fails loses its stream, from the chunks before it on, until it is reset; the other goes on.
  backend->fail_after = 1;
  refused(Code::kBackend, "as asked", [&] { session.prefill(prompt.data(), 10, 0); });
  backend->fail_after = -1;
  CHECK(session.position(0) == 15);
  refused(Code::kState, "stream 0: received one that an error cut short", [&] { session.step(pair); });
  refused(Code::kState, "cut short", [&] { session.prefill(prompt.data(), 1, 0); });
  refused(Code::kState, "cut short", [&] { session.saveState(state + ".no"); });
  const int64_t one = 1;
  session.step(pair, &one, 1);
  CHECK(session.position(1) == 5 && session.recentIds(1).back() == 20);
  refused(Code::kState, "state file", [&] { session.loadState(argv[0]); });
  refused(Code::kState, "cut short", [&] { session.step(pair); });  // a failed load has changed nothing
  session.reset(0);
  CHECK(session.position(0) == 0 && session.recentIds(0).empty() && session.position(1) == 5);
  session.loadState(state);
  CHECK(session.position(0) == 10 && session.position(1) == 3 && session.recentIds(1).size() == 3);

  // Steps of several tokens that fail halfway say what was fed.
  sinkrt::SamplingParams greedy;
  greedy.seed = 0;
  const sinkrt::SamplingParams sampling[2] = {greedy, greedy};
  int64_t ids[16], num_ids[2];
  bool ended[2] = {false, true};  // the second stream takes no part
  backend->fail_after = 3;
  refused(Code::kBackend, "as asked", [&] { session.steps(8, sampling, true, ids, num_ids, ended); });
  backend->fail_after = -1;
  CHECK(num_ids[0] == 3 && num_ids[1] == 0 && ids[0] == 11 && ids[2] == 13);
  CHECK(session.position(0) == 13 && session.position(1) == 3 && session.recentIds(0).back() == 13);
  session.steps(2, sampling, true, ids, num_ids, ended);
  CHECK(num_ids[0] == 2 && ids[0] == 14 && ids[1] == 15);

  // Logits that are no numbers.
  backend->broken_numbers = true;
  session.step(pair);
  refused(Code::kBackend, "logits: received nan", [&] { session.steps(1, sampling, true, ids, num_ids, ended); });
  CHECK(num_ids[0] == 0 && session.position(0) == 16);

  // Arguments.
  const int64_t twice[2] = {1, 1}, outside[2] = {0, 258};
  refused(Code::kUsage, "stream 1 twice", [&] { session.step(pair, twice, 2); });
  refused(Code::kUsage, "streams: received 3", [&] { session.step(pair, twice, 3); });
  refused(Code::kUsage, "token id: received 258", [&] { session.step(outside); });
  refused(Code::kUsage, "count: received 0", [&] { session.steps(0, sampling, true, ids, num_ids, ended); });
  const sinkrt::SamplingParams seedless[2];
  refused(Code::kUsage, "seed: received none", [&] { session.steps(1, seedless, true, ids, num_ids, ended); });
  const std::vector<int64_t> endless(100, 1);
  refused(Code::kUsage, "at most 100 tokens in a stream", [&] { session.prefill(endless.data(), 100, 0); });
  refused(Code::kUsage, "a bundle of 2 streams", [&] { session.generate({1}, {}, [](int64_t) { return true; }); });
  session.reset();
  refused(Code::kUsage, "the stream is empty", [&] { session.steps(1, sampling, true, ids, num_ids, ended); });
  CHECK(session.position(1) == 0);
  std::puts("well");
  return 0;
}
