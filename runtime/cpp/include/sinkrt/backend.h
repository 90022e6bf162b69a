// What a session needs of a backend. Twin of runtime/sinkrt/backends/base.py, made for devices too: logits may stay on
// the device, and `steps` may sample there.
//
// A backend owns the executables of a bundle's graphs and every buffer, all allocated by its constructor; no other
// method allocates. The session owns what counts: positions and recent ids.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sinkrt/manifest.h"
#include "sinkrt/sampler.h"

namespace sinkrt {

struct BackendOptions {
  int threads = 0;                  // CPU threads of one operator; 0: all physical cores
  int repack_prefill = -1;          // CPU: a copy of the weights for prefill. 1, 0; -1: if memory is plentiful
  std::string onnxruntime_library;  // path of libonnxruntime.so; empty: $SINKRT_ONNXRUNTIME, then the loader's path
  std::string plugin_library;       // path of libsinkexport_plugin.so or libsinkexport_cpu.so; empty: the loader's path
  int device = 0;                   // CUDA device
  bool verify = true;               // compare SHA-256 of engines too, not only sizes
};

// Several tokens without going back to the caller in between. Arrays are the session's, on the host.
struct StepsRequest {
  int64_t count;                   // k >= 1, most tokens of each stream
  const SamplingParams* sampling;  // [B], checked, with seeds
  const int64_t* end_ids;          // [num_end_ids] tokens that end a stream's text: picked, but never fed
  int64_t num_end_ids;
  int64_t* positions;   // [B] in: position of the next token; out: advanced by num_ids
  int64_t* recent_ids;  // [B, C] the id of token t at t mod C, -1: none; kept up to date
  int64_t* ids;         // [B, k] out: the ids fed
  int64_t* num_ids;     // [B] out: how many of them, 0 .. k
  bool* ended;          // [B] in: streams that take no token; out: also those that picked one of `end_ids`
  char* damaged;        // [B] set to 1 where an error left tokens in the states that positions do not count
};

class Backend {
 public:
  explicit Backend(const Manifest& manifest);
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  // ort | tensorrt
  virtual const char* name() const = 0;

  // Decode one token a stream. ids, positions, active: [B]. Idle streams come with some id and with the position of
  // their next token: what they write is overwritten when that is really taken. Graphs with recurrent states, which
  // know no positions, are given kNoToken for an id instead. Their logits stay as they were, so that a backend
  // must keep or restore these rows.
  // Throws Error(kBackend). Without recurrent states the same positions can be run again then: that overwrites what the
  // failed run wrote.
  virtual void step(const int64_t* ids, const int64_t* positions, const bool* active) = 0;

  // Feed ids [count], 1 <= count <= T, to one stream, the first of them at `position`; changes its row of the logits
  // only. Called only if the bundle has a prefill graph.
  // Throws Error(kBackend). The stream is lost then: what a chunk overwrites it would read again.
  virtual void prefill(int64_t stream, const int64_t* ids, int64_t count, int64_t position) = 0;

  // Sample, feed, and so on, up to `count` tokens a stream; the first is picked from the logits as they are. Afterwards
  // the logits are those after each stream's last token, also if it ended early. If a stream's logits are no numbers,
  // or a run fails, throws Error(kBackend) where positions, recent_ids, ids and num_ids say what was fed.
  // This default does it on the host by `logits` and `step`, one token at a time.
  virtual void steps(const StepsRequest& request);

  // float32 [B, vocab] on the host, of the token after each stream's last one. A device backend copies them here if
  // they have changed. Valid until the next call of any method.
  virtual const float* logits() = 0;
  // Replace the logits by these, float32 [B, vocab] (a loaded state).
  virtual void writeLogits(const float* logits) = 0;

  // Copy a state, all of its streams, to or from host memory. state: index in Manifest::states.
  virtual void readState(size_t state, void* target) const = 0;
  virtual void writeState(size_t state, const void* source) = 0;
  // Make all states of one stream zero.
  virtual void clearStream(int64_t stream) = 0;

  // Addresses of the states' buffers, on host or device, for tests: they never change.
  virtual std::vector<const void*> stateBuffers() const = 0;

 protected:
  // What a graph is given for a stream's id: see `step`.
  int64_t idFor(int64_t id, bool is_active) const { return is_active || !is_recurrent_ ? id : kNoToken; }

  const Manifest& manifest_;  // the session's, which lives longer

 private:
  const bool is_recurrent_;
  Sampler sampler_;  // of the default `steps`, like the next two
  std::vector<int64_t> next_ids_;
  std::unique_ptr<bool[]> active_;
};

// Whether the graphs have nodes of the TensorRT plugin: plugin_abi is the CPU library's otherwise.
bool hasTensorrtPlugin(const Manifest& manifest);

// The graphs must be those that `Backend` speaks of, with these inputs and outputs and no others: int64 ids and
// num_valid and position int64 [B], or, with the TensorRT plugin, all int32 and position [B, 2] = t >> 16, t & 0xffff.
// Throws Error(kBundle).
void checkGraphs(const Manifest& manifest);

// name: "ort" | "tensorrt". Throws Error(kUsage) for an unknown name, Error(kBackend) for one that this build lacks or
// that cannot run the bundle, Error(kBundle), Error(kOutOfMemory).
std::unique_ptr<Backend> loadBackend(const std::string& name, const std::string& bundle, const Manifest& manifest,
                                     const BackendOptions& options);

// The backends themselves, for loadBackend; the graphs are checked already.
std::unique_ptr<Backend> loadOrtBackend(const std::string& bundle, const Manifest& manifest,
                                        const BackendOptions& options);
std::unique_ptr<Backend> loadTensorrtBackend(const std::string& bundle, const Manifest& manifest,
                                             const BackendOptions& options);

}  // namespace sinkrt
