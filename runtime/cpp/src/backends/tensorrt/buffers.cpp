#include "backends/tensorrt/buffers.h"

#include <algorithm>

namespace sinkrt {
namespace {

constexpr int64_t kHistory = 256;  // tokens that one call decodes before it looks at them
constexpr int64_t kMinEndIds = 16;

// Bytes of the rows of one stream that prefill has to copy.
size_t copiedBytes(const Manifest& manifest) {
  size_t total = 0;
  for (const StateSpec& state : manifest.states) {
    if (needsCopy(manifest, state)) total += cuda::aligned(static_cast<size_t>(state.rowBytes()));
  }
  return total;
}

size_t logitsBytes(const Manifest& manifest, int64_t streams) {
  return static_cast<size_t>(streams * manifest.model.vocab_size) * sizeof(float);
}

}  // namespace

bool needsCopy(const Manifest& manifest, const StateSpec& state) {
  return manifest.stream.batch > 1 && static_cast<size_t>(state.rowBytes()) % cuda::kAlignment != 0;
}

void GraphIntegers::writeNumber(char* target, int64_t index, int64_t value) const {
  if (wide_) {
    reinterpret_cast<int64_t*>(target)[index] = value;
  } else {
    reinterpret_cast<int32_t*>(target)[index] = static_cast<int32_t>(value);
  }
}

void GraphIntegers::writePosition(char* target, int64_t index, int64_t position) const {
  if (wide_) {
    reinterpret_cast<int64_t*>(target)[index] = position;
  } else {
    auto* parts = reinterpret_cast<int32_t*>(target) + 2 * index;
    parts[0] = static_cast<int32_t>(position >> 16);
    parts[1] = static_cast<int32_t>(position & 0xffff);
  }
}

ControlFields::ControlFields(GraphIntegers integers, int64_t batch, int64_t num_end_ids_at_most, int64_t history_size) {
  Layout layout;
  layout.add(ids, integers.numbers(batch));
  layout.add(position, integers.positions(batch));
  layout.add(active, {batch});
  layout.add(sampling, {batch});  // a step on the host's ids takes what comes before
  layout.add(end_ids, {num_end_ids_at_most});
  layout.add(num_end_ids, {1});
  layout.add(ended, {batch});
  layout.add(invalid, {batch});
  layout.add(num_ids, {batch});
  layout.add(history, {batch, history_size});
  size = layout.size();
}

ChunkFields::ChunkFields(GraphIntegers integers, int64_t num_tokens) {
  Layout layout;
  layout.add(ids, integers.numbers(num_tokens));
  layout.add(position, integers.positions(1));
  layout.add(count, integers.numbers(1));
  size = layout.size();
}

Buffers::Buffers(const Manifest& manifest, GraphIntegers graph_integers)
    : logits(logitsBytes(manifest, manifest.stream.batch), "logits"),
      raw_logits(logits.bytes(), "logits"),
      weights(logits.bytes(), "sampling"),
      host_logits(logits.bytes()),
      integers(graph_integers),
      most_end_ids(std::max(kMinEndIds, static_cast<int64_t>(manifest.model.eos_token_ids.size()))),
      fields(integers, manifest.stream.batch, most_end_ids, kHistory),
      control(fields.size, "tokens"),
      recent_ids{0, {manifest.stream.batch, manifest.stream.capacity()}},
      recent(recent_ids.bytes(), "tokens") {
  for (const StateSpec& state : manifest.states) {
    const auto bytes = static_cast<size_t>(state.bytes());
    states.emplace_back(bytes, "the cache");
    next.push_back(state.isRecurrent() ? cuda::Memory(bytes, "the cache") : cuda::Memory());
  }
}

cuda::SamplingArgs Buffers::samplingArgs(const Manifest& manifest) const {
  cuda::SamplingArgs out{};
  out.batch = static_cast<int32_t>(manifest.stream.batch);
  out.vocab_size = static_cast<int32_t>(manifest.model.vocab_size);
  out.capacity = static_cast<int32_t>(manifest.stream.capacity());
  out.history_size = static_cast<int32_t>(fields.history.shape[1]);
  out.logits = reinterpret_cast<float*>(logits.data());
  out.raw_logits = reinterpret_cast<const float*>(raw_logits.data());
  out.scratch = reinterpret_cast<float*>(weights.data());
  out.ids = control.device(fields.ids);
  out.position = control.device(fields.position);
  out.wide = integers.wide();
  out.marks_idle = manifest.isRecurrent();
  out.sampling = control.device(fields.sampling);
  out.end_ids = control.device(fields.end_ids);
  out.num_end_ids = control.device(fields.num_end_ids);
  out.recent_ids = recent.device(recent_ids);
  out.active = control.device(fields.active);
  out.ended = control.device(fields.ended);
  out.invalid = control.device(fields.invalid);
  out.num_ids = control.device(fields.num_ids);
  out.history = control.device(fields.history);
  return out;
}

ChunkBuffers::ChunkBuffers(const Manifest& manifest, GraphIntegers integers)
    : fields(integers, manifest.stream.chunk_size),
      block(fields.size, "tokens"),
      logits(logitsBytes(manifest, 1), "logits"),
      copies(copiedBytes(manifest), "the cache") {}

}  // namespace sinkrt
