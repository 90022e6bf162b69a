// What e2e.py asks of the C++ runtime on a GPU. Each task is a process; its last line is a JSON object.
//
//   probe load BUNDLE                                load, decode four tokens; errors are the runtime's
//   probe replay BUNDLE TOKENS LOGITS PREFILL        feed tokens (int32 file), write logits (float32 [N, vocab])
//   probe generate BUNDLE PROMPT TOKENS COUNT AT_ONCE    greedy; int32 files
//   probe soak BUNDLE STEPS AT_ONCE [logits]         latency, memory and allocations over many tokens
//   probe sampling BUNDLE TOKENS COUNT               the GPU's picks against the host's sampler
//   probe faults BUNDLE                              too little memory, a CUDA error in the loop
//   probe bandwidth                                  of a device-to-device copy
//
// Sessions skip hashes. Allocations are counted between the first and the last timed step: `operator_new`, by any code
// of the process; `malloc`, by any library of the process, the driver included; `device`, cudaMalloc and cudaHostAlloc
// by libsinkrt and by TensorRT, which takes its memory through libsinkrt.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "allocations.h"
#include "cuda/device.h"
#include "sinkrt/session.h"

void launchFault();  // fault.cu

namespace {

using Clock = std::chrono::steady_clock;
using sinkrt::Session;

double millisecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::unique_ptr<Session> load(const std::string& bundle) {
  sinkrt::LoadOptions options;
  options.backend = "tensorrt";
  options.verify = false;
  return Session::load(bundle, options);
}

std::vector<int64_t> readTokens(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> raw{std::istreambuf_iterator<char>(file), {}};
  std::vector<int64_t> tokens(raw.size() / 4);
  for (size_t i = 0; i < tokens.size(); ++i) {
    int32_t token;
    std::memcpy(&token, raw.data() + 4 * i, 4);
    tokens[i] = token;
  }
  return tokens;
}

void writeTokens(const char* path, const std::vector<int64_t>& tokens) {
  std::ofstream file(path, std::ios::binary);
  for (const int64_t token : tokens) {
    const auto narrow = static_cast<int32_t>(token);
    file.write(reinterpret_cast<const char*>(&narrow), 4);
  }
}

size_t residentBytes() {
  size_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * 4096;
}

size_t deviceBytesUsed() {
  size_t free_bytes = 0, total = 0;
  cudaMemGetInfo(&free_bytes, &total);
  return total - free_bytes;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Greedy decoding of all streams, `at_once` tokens a call.
class Loop {
 public:
  Loop(Session& session, int64_t at_once)
      : session_(session),
        at_once_(at_once),
        sampling_(session.batch()),
        ids_(session.batch() * at_once),
        num_ids_(session.batch()),
        ended_(new bool[session.batch()]()) {
    for (auto& each : sampling_) each.seed = 0;
  }

  void operator()() { session_.steps(at_once_, sampling_.data(), true, ids_.data(), num_ids_.data(), ended_.get()); }
  const std::vector<int64_t>& ids() const { return ids_; }

 private:
  Session& session_;
  int64_t at_once_;
  std::vector<sinkrt::SamplingParams> sampling_;
  std::vector<int64_t> ids_, num_ids_;
  std::unique_ptr<bool[]> ended_;
};

void feedFirst(Session& session) {
  for (int64_t b = 0; b < session.batch(); ++b) {
    const int64_t first = 1 + b;
    session.prefill(&first, 1, b);
  }
}

int taskLoad(char** argv) {
  const auto session = load(argv[0]);
  feedFirst(*session);
  Loop loop(*session, 4);
  loop();
  std::printf("{\"loaded\": true, \"device_bytes\": %zu, \"state_bytes\": %lld}\n", deviceBytesUsed(),
              static_cast<long long>(session->manifest().stateBytes()));
  return 0;
}

int taskReplay(char** argv) {
  const auto session = load(argv[0]);
  const std::vector<int64_t> tokens = readTokens(argv[1]);  // [N, B]
  const int64_t batch = session->batch(), prefill = std::atoll(argv[3]);
  const int64_t num_tokens = static_cast<int64_t>(tokens.size()) / batch;
  std::ofstream out(argv[2], std::ios::binary);
  const auto keep = [&] {
    out.write(reinterpret_cast<const char*>(session->logits()),
              static_cast<std::streamsize>(batch * session->vocabSize() * sizeof(float)));
  };
  for (int64_t b = 0; b < batch && prefill > 0; ++b) {
    std::vector<int64_t> ids;
    for (int64_t t = 0; t < prefill; ++t) ids.push_back(tokens[t * batch + b]);
    session->prefill(ids.data(), prefill, b);
  }
  if (prefill > 0) keep();
  for (int64_t t = prefill; t < num_tokens; ++t) {
    session->step(&tokens[t * batch]);
    keep();
  }
  std::printf("{\"tokens\": %lld}\n", static_cast<long long>(num_tokens));
  return 0;
}

int taskGenerate(char** argv) {
  const auto session = load(argv[0]);
  const std::vector<int64_t> prompt = readTokens(argv[1]);
  std::vector<int64_t> tokens;
  sinkrt::GenerateParams params;
  params.max_tokens = std::atoll(argv[3]);
  params.tokens_at_once = std::atoll(argv[4]);
  params.ignore_eos = true;
  const auto start = Clock::now();
  session->generate(prompt, params, [&](int64_t id) {
    tokens.push_back(id);
    return true;
  });
  const double ms = millisecondsSince(start);
  writeTokens(argv[2], tokens);
  std::printf("{\"tokens\": %zu, \"ms_per_token_with_prompt\": %.4f}\n", tokens.size(), ms / tokens.size());
  return 0;
}

int taskSoak(int argc, char** argv) {
  const auto session = load(argv[0]);
  const int64_t at_once = std::atoll(argv[2]), calls = std::atoll(argv[1]) / at_once;
  const bool wants_logits = argc > 3 && std::strcmp(argv[3], "logits") == 0;
  feedFirst(*session);
  Loop loop(*session, at_once);
  const int64_t warm_calls = session->capacity() / at_once + 10;  // a step over less than the whole cache takes less
  for (int64_t i = 0; i < warm_calls; ++i) loop();
  std::vector<double> times(static_cast<size_t>(calls));
  std::vector<const void*> buffers = session->backend().stateBuffers();
  const size_t device_before = deviceBytesUsed(), resident_before = residentBytes();
  const int64_t allocations_before = sinkrt::cuda::numAllocations();
  const auto all = Clock::now();
  heap::counting = true;
  for (double& time : times) {
    const auto start = Clock::now();
    loop();
    if (wants_logits) session->logits();
    time = millisecondsSince(start) / static_cast<double>(at_once);
  }
  heap::counting = false;
  const double total_ms = millisecondsSince(all);
  const int64_t allocations = sinkrt::cuda::numAllocations() - allocations_before;
  const size_t device_after = deviceBytesUsed(), resident_after = residentBytes();
  const bool same_buffers = buffers == session->backend().stateBuffers();

  const size_t edge = std::min<size_t>(times.size(), std::max<size_t>(1, 1000 / static_cast<size_t>(at_once)));
  const double first = median({times.begin(), times.begin() + edge}), last = median({times.end() - edge, times.end()});
  std::vector<double> sorted = times;
  std::sort(sorted.begin(), sorted.end());
  std::printf(
      "{\"tokens\": %lld, \"at_once\": %lld, \"logits\": %s, \"ms_per_token\": %.5f, \"p99_ms\": %.5f, "
      "\"max_ms\": %.5f, \"mean_ms\": %.5f, \"first_1000_ms\": %.5f, \"last_1000_ms\": %.5f, "
      "\"operator_new\": %lld, \"malloc\": %lld, \"device_allocations\": %lld, \"device_bytes\": %zu, "
      "\"device_growth_bytes\": %lld, \"resident_bytes\": %zu, \"resident_growth_bytes\": %lld, "
      "\"same_buffers\": %s, \"last_position\": %lld}\n",
      static_cast<long long>(calls * at_once), static_cast<long long>(at_once), wants_logits ? "true" : "false",
      sorted[sorted.size() / 2], sorted[(sorted.size() * 99 + 99) / 100 - 1], sorted.back(),
      total_ms / static_cast<double>(calls * at_once), first, last, static_cast<long long>(heap::num_new.load()),
      static_cast<long long>(heap::num_malloc.load()), static_cast<long long>(allocations), device_after,
      static_cast<long long>(device_after) - static_cast<long long>(device_before), resident_after,
      static_cast<long long>(resident_after) - static_cast<long long>(resident_before), same_buffers ? "true" : "false",
      static_cast<long long>(session->position()));
  return 0;
}

// A token at a time on the GPU; each pick is compared with the host's sampler on the same logits. Both round exp and
// sums in their own way: a draw that lies within rounding of a border may fall to the other side.
int taskSampling(char** argv) {
  const auto session = load(argv[0]);
  const std::vector<int64_t> prompt = readTokens(argv[1]);
  const int64_t count = std::atoll(argv[2]);
  sinkrt::Sampler sampler(session->vocabSize());
  sinkrt::SamplingParams cases[7];
  cases[1].temperature = 1.0;
  cases[2].temperature = 0.7, cases[2].top_k = 40;
  cases[3].temperature = 1.2, cases[3].top_p = 0.9;
  cases[4].temperature = 0.8, cases[4].top_k = 200, cases[4].top_p = 0.95, cases[4].repetition_penalty = 1.2;
  cases[5].repetition_penalty = 1.3;
  cases[6].temperature = 3.0, cases[6].top_p = 0.5;
  std::string shown;
  for (size_t c = 0; c < std::size(cases); ++c) {
    sinkrt::SamplingParams params = cases[c];
    params.seed = 1234 + c;
    session->reset();
    session->prefill(prompt.data(), static_cast<int64_t>(prompt.size()));
    std::unique_ptr<bool[]> ended(new bool[1]());
    int64_t differ = 0, id = 0, num_ids = 0;
    for (int64_t i = 0; i < count; ++i) {
      const std::vector<int64_t> recent = session->recentIds();
      const int64_t want = sampler.sample(session->logits(), recent.data(), static_cast<int64_t>(recent.size()),
                                          session->position(), params);
      session->steps(1, &params, true, &id, &num_ids, ended.get());
      differ += num_ids != 1 || id != want;
    }
    // The same stream in pieces of 16: the device draws by position, so it must give the same tokens.
    session->reset();
    session->prefill(prompt.data(), static_cast<int64_t>(prompt.size()));
    std::vector<int64_t> ones, many(16);
    for (int64_t i = 0; i < 64; ++i) {
      session->steps(1, &params, true, &id, &num_ids, ended.get());
      ones.push_back(id);
    }
    session->reset();
    session->prefill(prompt.data(), static_cast<int64_t>(prompt.size()));
    bool same = true;
    for (int64_t i = 0; i < 64; i += 16) {
      session->steps(16, &params, true, many.data(), &num_ids, ended.get());
      same = same && num_ids == 16 && std::equal(many.begin(), many.end(), ones.begin() + i);
    }
    char line[160];
    std::snprintf(line, sizeof line, "%s{\"case\": %zu, \"picks\": %lld, \"differ\": %lld, \"same_in_pieces\": %s}",
                  c > 0 ? ", " : "", c, static_cast<long long>(count), static_cast<long long>(differ),
                  same ? "true" : "false");
    shown += line;
  }
  std::printf("{\"sampling\": [%s]}\n", shown.c_str());
  return 0;
}

std::vector<int64_t> someTokens(Session& session) {
  feedFirst(session);
  Loop loop(session, 16);
  loop();
  return loop.ids();
}

std::string escaped(std::string text) {
  for (char& c : text) c = c == '"' || c == '\\' || static_cast<unsigned char>(c) < ' ' ? '\'' : c;
  return text;
}

int taskFaults(char** argv) {
  std::vector<int64_t> want;
  size_t needed = 0;
  {
    const size_t before = deviceBytesUsed();
    const auto session = load(argv[0]);
    want = someTokens(*session);
    needed = deviceBytesUsed() - before;
  }
  // Too little memory: all is taken but half of what a session needs.
  std::string oom = "no error";
  {
    size_t free_bytes = 0, total = 0;
    cudaMemGetInfo(&free_bytes, &total);
    void* hog = nullptr;
    if (cudaMalloc(&hog, free_bytes - needed / 2) != cudaSuccess) hog = nullptr;
    try {
      load(argv[0]);
    } catch (const sinkrt::Error& error) {
      oom = std::to_string(static_cast<int>(error.code())) + " " + error.what();
    }
    cudaFree(hog);
  }
  auto session = load(argv[0]);
  const bool after_oom = someTokens(*session) == want;
  std::printf("{\"out_of_memory\": \"%s\", \"reload_after_it_is_right\": %s}\n", escaped(oom).c_str(),
              after_oom ? "true" : "false");
  std::fflush(stdout);

  // An error in the loop: a kernel of somebody else writes where nothing is, which spoils the process's context.
  launchFault();
  std::string loop_error = "no error", reload_error = "none";
  bool reloaded = false;
  try {
    someTokens(*session);
  } catch (const sinkrt::Error& error) {
    loop_error = std::to_string(static_cast<int>(error.code())) + " " + error.what();
  }
  try {
    session.reset();
    session = load(argv[0]);
    reloaded = someTokens(*session) == want;
  } catch (const sinkrt::Error& error) {
    reload_error = error.what();
  }
  std::printf(
      "{\"out_of_memory\": \"%s\", \"reload_after_it_is_right\": %s, \"cuda_error\": \"%s\", "
      "\"reload_after_cuda_error_is_right\": %s, \"reload_error\": \"%s\"}\n",
      escaped(oom).c_str(), after_oom ? "true" : "false", escaped(loop_error).c_str(), reloaded ? "true" : "false",
      escaped(reload_error).c_str());
  return 0;
}

int taskBandwidth() {
  constexpr size_t kBytes = size_t{1} << 30;
  sinkrt::cuda::useDevice(0);
  const sinkrt::cuda::Memory from(kBytes, "the copy"), to(kBytes, "the copy");
  const sinkrt::cuda::Stream stream;
  std::vector<double> times;
  for (int i = 0; i < 25; ++i) {
    const auto start = Clock::now();
    for (int j = 0; j < 10; ++j) cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, stream);
    stream.synchronize();
    times.push_back(millisecondsSince(start) / 10);
  }
  cudaDeviceProp device{};
  cudaGetDeviceProperties(&device, 0);
  std::printf("{\"gpu\": \"%s\", \"copy_gb_per_s\": %.1f}\n", device.name, 2.0 * kBytes / median(times) / 1e6);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string task = argc > 1 ? argv[1] : "";
  try {
    if (task == "load" && argc == 3) return taskLoad(argv + 2);
    if (task == "replay" && argc == 6) return taskReplay(argv + 2);
    if (task == "generate" && argc == 7) return taskGenerate(argv + 2);
    if (task == "soak" && argc >= 5) return taskSoak(argc - 2, argv + 2);
    if (task == "sampling" && argc == 5) return taskSampling(argv + 2);
    if (task == "faults" && argc == 3) return taskFaults(argv + 2);
    if (task == "bandwidth") return taskBandwidth();
    std::fprintf(stderr, "probe: error: task: received '%s' and %d words; see benchmarks/gpu/probe.cpp\n", task.c_str(),
                 argc - 2);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "probe: error: %s\n", error.what());
  }
  return 2;
}
