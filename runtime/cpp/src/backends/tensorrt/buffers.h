// Memory of a session on the device, all allocated when it is loaded, and how the small arrays lie in it.
#pragma once

#include <cstdint>
#include <vector>

#include "backends/tensorrt/mirror.h"
#include "cuda/device.h"
#include "cuda/sampling.h"
#include "sinkrt/manifest.h"

namespace sinkrt {

// Integers as a graph takes them: int64, or, with the plugin, int32 and positions as two of them.
class GraphIntegers {
 public:
  explicit GraphIntegers(bool wide) : wide_(wide) {}

  bool wide() const { return wide_; }
  // Shapes in bytes of so many numbers, and of so many positions.
  std::vector<int64_t> numbers(int64_t count) const { return {count, wide_ ? 8 : 4}; }
  std::vector<int64_t> positions(int64_t count) const { return {count, 8}; }

  void writeNumber(char* target, int64_t index, int64_t value) const;
  void writePosition(char* target, int64_t index, int64_t position) const;

 private:
  bool wide_;
};

// What goes to the device before a step and comes back after a round. B streams, H tokens a round, E end tokens.
struct ControlFields {
  Field<char> ids;                       // [B] numbers
  Field<char> position;                  // [B] positions
  Field<int32_t> active;                 // [B] 1: this step counts
  Field<cuda::DeviceSampling> sampling;  // [B]
  Field<int32_t> end_ids;                // [E]
  Field<int32_t> num_end_ids;            // [1]
  Field<int32_t> ended;                  // [B] 1: takes no more tokens
  Field<int32_t> invalid;                // [B] 1: its logits were no numbers
  Field<int32_t> num_ids;                // [B] tokens picked and fed so far
  Field<int32_t> history;                // [B, H] they
  size_t size = 0;                       // bytes of all

  ControlFields(GraphIntegers integers, int64_t batch, int64_t num_end_ids_at_most, int64_t history_size);
  // Ends of what a step on the host's ids takes, and of what a round of sampled steps takes; both begin at 0.
  size_t endOfStep() const { return sampling.offset; }
  size_t endOfRound() const { return history.offset; }
  // From here on a round has results.
  size_t beginOfResults() const { return ended.offset; }
};

// What goes to the device before a chunk of T tokens.
struct ChunkFields {
  Field<char> ids;       // [T] numbers
  Field<char> position;  // [1] positions
  Field<char> count;     // [1] numbers
  size_t size = 0;       // bytes of all

  ChunkFields(GraphIntegers integers, int64_t num_tokens);
};

// For decoding. V logits, C tokens in the cache.
struct Buffers {
  Buffers(const Manifest& manifest, GraphIntegers integers);

  // Arguments of the sampling kernels.
  cuda::SamplingArgs samplingArgs(const Manifest& manifest) const;

  std::vector<cuda::Memory> states;  // as Manifest::states
  // What a step makes of them, where it must not write to what it reads: TensorRT promises nothing of the order within
  // an engine but where an operator is made for it. Empty: written in place.
  std::vector<cuda::Memory> next;
  cuda::Memory logits;      // float32 [B, V] after each stream's last token
  cuda::Memory raw_logits;  // the same as the engine writes it, idle streams included
  cuda::Memory weights;     // float32 [B, V], scratch of sampling
  cuda::Pinned host_logits;

  const GraphIntegers integers;
  const int64_t most_end_ids;
  const ControlFields fields;
  Mirror control;
  Field<int32_t> recent_ids;  // [B, C], alone in `recent`
  Mirror recent;
};

// Whether the rows of a state after the first do not lie where TensorRT wants addresses.
bool needsCopy(const Manifest& manifest, const StateSpec& state);

// For prefill, a chunk of one stream at a time.
struct ChunkBuffers {
  ChunkBuffers(const Manifest& manifest, GraphIntegers integers);

  const ChunkFields fields;
  Mirror block;
  cuda::Memory logits;  // float32 [V]
  cuda::Memory copies;  // rows of one stream that `needsCopy`; all streams use them in turn
};

}  // namespace sinkrt
