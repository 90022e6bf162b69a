// Times of sink attention over full caches: steps beside the time in which this memory is read, chunks beside what
// their matmuls would take at the processor's peak.
//
//   bench_sink_attention [THREADS] [REPEATS] [step|chunk|all]
//
// Layers have caches of their own, 256 MB or more in all, so that a step reads from memory. The least time counts:
// other programs can only add to it.
#include <cstdio>
#include <string>

#include "bench.h"
#include "sink_attention.h"
#include "spin_pool.h"

using namespace sinkexport::cpu;
using namespace sinkexport::cpu::bench;

namespace {

struct Shape {
  const char* name;
  int num_q_heads, num_kv_heads, head_dim;
};
constexpr Shape kShapes[] = {{"SmolLM2 9/3 D64", 9, 3, 64}, {"Llama-7B 32/32 D128", 32, 32, 128}};
constexpr struct {
  const char* name;
  WindowType type;
  int bytes;
} kTypes[] = {{"fp32", WindowType::kFloat32, 4}, {"fp16", WindowType::kFloat16, 2}, {"int8", WindowType::kInt8, 1}};
constexpr int kSinks = 4;

// Numbers of -1 .. 1.
Memory filledFloats(size_t count) {
  Memory memory = filled(count * 4);
  uint32_t state = 1;
  for (size_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
    std::memcpy(memory.get() + 4 * i, &x, 4);
  }
  return memory;
}

struct Layer {
  Memory sink_k, sink_v, window_k, window_v, scale_k, scale_v;
};

struct Bench {
  SpinPool pool;
  Parallel parallel;
  SinkAttentionFunction run;
  Scratch scratch;
  int repeats;
  std::vector<int64_t> frequency;

  Bench(int threads, int count, Isa isa)
      : pool(threads), parallel(pool.parallel()), run(sinkAttentionFor(isa)), repeats(count), frequency(512) {
    for (size_t i = 0; i < frequency.size(); ++i) frequency[i] = 683565275 / static_cast<int64_t>(i + 1);
  }

  // Seconds of one layer.
  double time(const Shape& shape, WindowType type, int bytes, int window, int num_tokens, bool bfloat16,
              int64_t position) {
    const size_t rows = static_cast<size_t>(shape.num_kv_heads) * static_cast<size_t>(window);
    const size_t dim = static_cast<size_t>(shape.head_dim), state = rows * dim * static_cast<size_t>(bytes);
    const size_t tokens = static_cast<size_t>(num_tokens), width = static_cast<size_t>(shape.num_q_heads) * dim;
    std::vector<Layer> layers(num_tokens > 1 ? 2 : (size_t{256} << 20) / (2 * state) + 1);
    for (Layer& one : layers) {
      const size_t sinks = static_cast<size_t>(shape.num_kv_heads) * kSinks * dim;
      const auto window_rows = [&] { return type == WindowType::kFloat32 ? filledFloats(state / 4) : filled(state); };
      one = {filledFloats(sinks), filledFloats(sinks), window_rows(),
             window_rows(),       filled(rows * 2),    filled(rows * 2)};
    }
    const Memory qkv = filledFloats(tokens * (width + 2 * static_cast<size_t>(shape.num_kv_heads) * dim));
    const Memory out = filled(tokens * width * 4);
    SinkAttentionParams p;
    p.batch = 1;
    p.num_tokens = num_tokens;
    p.num_q_heads = shape.num_q_heads;
    p.num_kv_heads = shape.num_kv_heads;
    p.head_dim = p.value_dim = p.rotary_dim = shape.head_dim;
    p.num_sinks = kSinks;
    p.window_size = window;
    p.window_type = type;
    p.bfloat16_chunks = bfloat16;
    p.tokens_first = p.out_tokens_first = true;
    p.row_width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim;
    p.q = reinterpret_cast<const float*>(qkv.get());
    p.k = p.q + width;
    p.v = p.k + static_cast<size_t>(shape.num_kv_heads) * dim;
    p.position = &position;
    p.frequency = frequency.data();
    p.scale = 0.125f;
    p.out = reinterpret_cast<float*>(out.get());
    double best = 1e9;
    for (int i = 0; i < repeats; ++i) {
      const double start = now();
      for (const Layer& one : layers) {
        p.sink_k = reinterpret_cast<float*>(one.sink_k.get());
        p.sink_v = reinterpret_cast<float*>(one.sink_v.get());
        p.window_k = one.window_k.get();
        p.window_v = one.window_v.get();
        p.window_k_scale = reinterpret_cast<uint16_t*>(one.scale_k.get());
        p.window_v_scale = reinterpret_cast<uint16_t*>(one.scale_v.get());
        run(p, parallel, scratch);
      }
      best = std::min(best, (now() - start) / static_cast<double>(layers.size()));
      position += num_tokens;
    }
    return best;
  }
};

}  // namespace

int main(int count, char** arguments) {
  const auto argument = [&](int i, const char* otherwise) { return std::string(count > i ? arguments[i] : otherwise); };
  const int threads = std::atoi(argument(1, "2").c_str()), repeats = std::atoi(argument(2, "20").c_str());
  const std::string what = argument(3, "all");
  Isa isa;
  if (const char* problem = chooseIsa(std::getenv("SINKEXPORT_CPU_ISA"), isa)) {
    std::fprintf(stderr, "%s\n", problem);
    return 2;
  }
  Bench bench(threads, repeats, isa);
  const double speed = readSpeed(bench.parallel, repeats);
  std::printf("%s, %d threads, %d repeats, memory read %.1f GB/s\n", isaName(isa), threads, repeats, speed);
  for (const Shape& shape : kShapes) {
    for (const int window : {1020, 16380}) {
      for (const auto& type : kTypes) {
        if (what == "chunk") break;
        const double seconds = bench.time(shape, type.type, type.bytes, window, 1, false, 3 * window);
        const double bytes =
            2.0 * shape.num_kv_heads *
            (window * (shape.head_dim * type.bytes + (type.bytes == 1 ? 2 : 0)) + kSinks * shape.head_dim * 4.0);
        std::printf("step  %-20s W=%-5d %s %8.3f MB floor %8.1f us, %8.1f us (%3.0f%%)\n", shape.name, window,
                    type.name, bytes / 1e6, bytes / speed / 1e3, seconds * 1e6, bytes / speed / seconds / 1e7);
      }
    }
    for (const auto& type : kTypes) {
      for (const bool bfloat16 : {false, true}) {
        if (what == "step") break;
        constexpr int kTokens = 64, kWindow = 1020;
        const double seconds = bench.time(shape, type.type, type.bytes, kWindow, kTokens, bfloat16, 3 * kWindow);
        const double operations = 4.0 * shape.num_q_heads * kTokens * shape.head_dim * (kWindow + kSinks);
        std::printf("chunk %-20s W=%-5d %s%s T=%d %8.1f us, %7.1f GFLOPS\n", shape.name, kWindow, type.name,
                    bfloat16 ? " bfloat16" : "", kTokens, seconds * 1e6, operations / seconds / 1e9);
      }
    }
  }
}
