// Chunks of tokens: the prefill engine, which takes one stream's rows of the states at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "backends/tensorrt/buffers.h"
#include "backends/tensorrt/engine.h"

namespace sinkrt {

class Prefill {
 public:
  // All arguments live longer. Throws Error(kBackend), Error(kOutOfMemory).
  Prefill(Engine& engine, const Manifest& manifest, const Buffers& buffers, const cuda::Stream& queue);

  // Record a graph for each stream. What is in the states and logits then has no meaning.
  void record();

  // Put a chunk on the queue: ids [count], 1 <= count <= T, the first of them at `position` of `stream`.
  void run(int64_t stream, const int64_t* ids, int64_t count, int64_t position);

 private:
  // A row of a state that does not lie where TensorRT wants addresses: the engine sees a copy of it.
  struct Detour {
    char* row;
    char* copy;
    size_t bytes;
  };

  void bind(int64_t stream);
  void launch(int64_t stream) const;

  Engine& engine_;
  const Manifest& manifest_;
  const Buffers& buffers_;
  const cuda::Stream& queue_;
  const ChunkBuffers chunk_;
  std::vector<std::vector<Detour>> detours_;  // by stream
  std::vector<cuda::Graph> graphs_;           // by stream
};

}  // namespace sinkrt
