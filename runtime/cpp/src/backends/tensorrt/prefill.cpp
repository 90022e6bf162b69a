#include "backends/tensorrt/prefill.h"

namespace sinkrt {

Prefill::Prefill(Engine& engine, const Manifest& manifest, const Buffers& buffers, const cuda::Stream& queue)
    : engine_(engine),
      manifest_(manifest),
      buffers_(buffers),
      queue_(queue),
      chunk_(manifest, buffers.integers),
      detours_(static_cast<size_t>(manifest.stream.batch)),
      graphs_(detours_.size()) {
  engine_.bind("ids", chunk_.block.device(chunk_.fields.ids));
  engine_.bind("position", chunk_.block.device(chunk_.fields.position));
  engine_.bind("num_valid", chunk_.block.device(chunk_.fields.count));
  engine_.bind("logits", chunk_.logits.data());
}

void Prefill::record() {
  buffers_.integers.writeNumber(chunk_.block.host(chunk_.fields.count), 0, 1);
  for (size_t s = 0; s < graphs_.size(); ++s) {
    const auto stream = static_cast<int64_t>(s);
    bind(stream);
    launch(stream);  // the first run does work that cannot be recorded
    queue_.synchronize();
    graphs_[s].capture(queue_, [this, stream] { launch(stream); });
  }
}

void Prefill::run(int64_t stream, const int64_t* ids, int64_t count, int64_t position) {
  const ChunkFields& fields = chunk_.fields;
  const GraphIntegers& integers = buffers_.integers;
  for (int64_t i = 0; i < manifest_.stream.chunk_size; ++i) {
    integers.writeNumber(chunk_.block.host(fields.ids), i, i < count ? ids[i] : 0);
  }
  integers.writePosition(chunk_.block.host(fields.position), 0, position);
  integers.writeNumber(chunk_.block.host(fields.count), 0, count);
  if (const cuda::Graph& graph = graphs_[static_cast<size_t>(stream)]) {
    graph.launch(queue_);
  } else {
    bind(stream);
    launch(stream);
  }
}

// Tie the engine to one stream's rows.
void Prefill::bind(int64_t stream) {
  std::vector<Detour>& detours = detours_[static_cast<size_t>(stream)];
  detours.clear();
  char* next = chunk_.copies.data();
  for (size_t i = 0; i < buffers_.states.size(); ++i) {
    const StateSpec& state = manifest_.states[i];
    const auto bytes = static_cast<size_t>(state.rowBytes());
    char* address = buffers_.states[i].data() + static_cast<size_t>(stream) * bytes;
    if (needsCopy(manifest_, state)) {
      detours.push_back({address, next, bytes});
      address = next;
      next += cuda::aligned(bytes);
    }
    engine_.bind(state.input, address);
    engine_.bind(state.output, address);
  }
}

void Prefill::launch(int64_t stream) const {
  chunk_.block.upload(0, chunk_.fields.size, queue_);
  const std::vector<Detour>& detours = detours_[static_cast<size_t>(stream)];
  for (const Detour& each : detours) cuda::copy(each.copy, each.row, each.bytes, queue_);
  engine_.run(queue_);
  for (const Detour& each : detours) cuda::copy(each.row, each.copy, each.bytes, queue_);
  const cuda::Memory& logits = chunk_.logits;
  cuda::copy(buffers_.logits.data() + static_cast<size_t>(stream) * logits.bytes(), logits.data(), logits.bytes(),
             queue_);
}

}  // namespace sinkrt
