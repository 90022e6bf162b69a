// Times of the attention kernels by themselves: no framework, for any machine that CMake can build on (Jetson, too).
//
//   cmake -S plugins -B build/plugins -DSINKEXPORT_BENCH=ON -DCMAKE_CUDA_ARCHITECTURES=native
//   cmake --build build/plugins
//   build/plugins/sink_attention [batch num_q_heads num_kv_heads capacity head_dim num_tokens]
//
// A step (num_tokens 1) attends to a full cache. Chunks of num_tokens are a prompt of 1,024 tokens from an empty cache
// on: their sum, and the floating-point operations of the keys that each token sees.
//
// Each figure is of replays of a CUDA graph whose launches go round sets of buffers that together hold four L2 caches.
// The floor is the cache's bytes, once, at the bandwidth (read and written) of a device-to-device copy measured first.
// GB = 1e9 bytes. sink_attention.py puts PyTorch's times beside these.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sink_attention.h"

namespace {

using sinkexport::DType;
using sinkexport::SinkAttentionParams;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Random bytes below 0x3c: finite halves below 1.1, int8 entries and scales of both uses.
__global__ void fill(uint8_t* bytes, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x = (x ^ (x >> 15)) * 2246822519u;
    bytes[i] = static_cast<uint8_t>((x ^ (x >> 13)) % 0x3c);
  }
}

class Memory {
 public:
  explicit Memory(size_t bytes) {
    check(cudaMalloc(&address_, bytes + 16), "cudaMalloc");
    fill<<<1024, 256>>>(static_cast<uint8_t*>(address_), bytes, static_cast<uint32_t>(bytes));
    check(cudaGetLastError(), "fill");
  }
  Memory(Memory&& other) noexcept : address_(other.address_) { other.address_ = nullptr; }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(address_); }
  void* get() const { return address_; }

 private:
  void* address_ = nullptr;
};

struct Times {
  double median_us;
  double p99_us;
};

// Of one launch, in replays of a CUDA graph that holds `launches`: what the host takes to launch is left out.
template <typename Run>
Times timeOf(int launches, Run run) {
  constexpr int kWarmUp = 10, kReplays = 60;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t recorded;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  run(0, stream);
  check(cudaStreamSynchronize(stream), "run");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  for (int i = 0; i < launches; ++i) run(i, stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&recorded, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = 0; i < kWarmUp + kReplays; ++i) {
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    check(cudaGraphLaunch(recorded, stream), "cudaGraphLaunch");
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "run");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i >= kWarmUp) times.push_back(ms / launches);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(recorded);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2] * 1e3, times[times.size() * 99 / 100] * 1e3};
}

// Bytes read and written a second.
double copyBandwidth() {
  constexpr size_t kBytes = size_t{256} << 20;
  const Memory from(kBytes), to(kBytes);
  const Times times = timeOf(4, [&](int, cudaStream_t stream) {
    check(cudaMemcpyAsync(to.get(), from.get(), kBytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
  });
  return 2.0 * kBytes / (times.median_us * 1e-6);
}

struct Shape {
  int batch, num_q_heads, num_kv_heads, capacity, head_dim, num_tokens;
};

constexpr int kSinks = 4, kPromptTokens = 1024;

SinkAttentionParams paramsOf(const Shape& shape, DType dtype, bool is_int8) {
  SinkAttentionParams p;
  p.batch = shape.batch;
  p.num_tokens = shape.num_tokens;
  p.num_q_heads = shape.num_q_heads;
  p.num_kv_heads = shape.num_kv_heads;
  p.head_dim = shape.head_dim;
  p.num_sinks = kSinks;
  p.window_size = shape.capacity - kSinks;
  p.dtype = dtype;
  p.int8_window = is_int8;
  p.settled_states = true;  // launches go round several sets
  p.rotary_dim = shape.head_dim;
  p.scale = 0.05f;
  return p;
}

// Floating-point operations of a prompt.
double promptOperations(const SinkAttentionParams& p) {
  double keys = 0;
  for (int t = 0; t < kPromptTokens; ++t) keys += std::min(t + 1, p.num_sinks + p.window_size);
  return 4.0 * keys * p.batch * p.num_q_heads * p.head_dim;
}

void measure(const Shape& shape, DType dtype, bool is_int8, double bandwidth, size_t l2_bytes) {
  const SinkAttentionParams p = paramsOf(shape, dtype, is_int8);
  const size_t rows = size_t{2} * p.batch * p.num_kv_heads;  // of keys and values
  const size_t window_bytes = rows * p.window_size * (is_int8 ? p.head_dim + 2 : 2 * p.head_dim);
  const size_t cache_bytes = window_bytes + rows * kSinks * 2 * p.head_dim;
  const size_t q_bytes = size_t{2} * p.batch * p.num_q_heads * p.num_tokens * p.head_dim;
  const bool is_step = p.num_tokens == 1;
  const int chunks = is_step ? 1 : kPromptTokens / p.num_tokens;

  std::vector<Memory> memory;
  auto take = [&](size_t bytes) { return memory.emplace_back(bytes).get(); };
  std::vector<SinkAttentionParams> sets(std::max<size_t>(2, 4 * l2_bytes / (cache_bytes + 2 * q_bytes) + 1), p);
  std::vector<const int32_t*> positions;  // of each chunk
  for (int chunk = 0; chunk < chunks; ++chunk) {
    std::vector<int32_t> position(2 * p.batch, 1 << 12);  // past the capacity: every entry is there
    for (int b = 0; !is_step && b < p.batch; ++b) position[2 * b] = 0, position[2 * b + 1] = chunk * p.num_tokens;
    void* on_device = take(position.size() * sizeof(int32_t));
    check(cudaMemcpy(on_device, position.data(), position.size() * sizeof(int32_t), cudaMemcpyHostToDevice),
          "cudaMemcpy");
    positions.push_back(static_cast<const int32_t*>(on_device));
  }
  for (SinkAttentionParams& one : sets) {
    one.q = take(q_bytes);
    one.out = take(q_bytes);
    one.k = take(q_bytes);
    one.v = take(q_bytes);
    one.position = positions[0];
    one.sink_k = take(rows / 2 * kSinks * 2 * p.head_dim);
    one.sink_v = take(rows / 2 * kSinks * 2 * p.head_dim);
    one.window_k = take(rows / 2 * p.window_size * p.head_dim * (is_int8 ? 1 : 2));
    one.window_v = take(rows / 2 * p.window_size * p.head_dim * (is_int8 ? 1 : 2));
    one.window_k_scale = is_int8 ? take(rows / 2 * p.window_size * 2) : nullptr;
    one.window_v_scale = is_int8 ? take(rows / 2 * p.window_size * 2) : nullptr;
    one.frequency = static_cast<const uint32_t*>(take(p.rotary_dim / 2 * sizeof(uint32_t)));
  }
  if (const char* problem = sinkexport::sinkAttentionProblem(sets[0])) {
    std::fprintf(stderr, "%s\n", problem);
    std::exit(2);
  }
  void* workspace = take(sinkexport::sinkAttentionWorkspaceBytes(sets[0]));
  const int launches = static_cast<int>(std::max<size_t>(sets.size(), 16)) * chunks;
  const Times times = timeOf(launches, [&](int i, cudaStream_t stream) {
    SinkAttentionParams one = sets[i / chunks % sets.size()];
    one.position = positions[i % chunks];
    check(sinkexport::launchSinkAttention(one, workspace, stream), "launchSinkAttention");
  });
  std::printf("B%-3d %3d/%-3d C%-6d D%-4d T%-4d %-4s %-6s", p.batch, p.num_q_heads, p.num_kv_heads, shape.capacity,
              p.head_dim, p.num_tokens, dtype == DType::kFloat16 ? "fp16" : "bf16", is_int8 ? "int8" : "16-bit");
  if (is_step) {
    const double floor_us = cache_bytes / bandwidth * 1e6;
    std::printf(" %9.1f %9.1f %9.1f %9.1f %6.1f%%\n", cache_bytes / 1e6, floor_us, times.median_us, times.p99_us,
                100 * floor_us / times.median_us);
  } else {
    std::printf(" prompt %9.1f us, p99 %9.1f, %6.1f TFLOP/s\n", times.median_us * chunks, times.p99_us * chunks,
                promptOperations(p) / (times.median_us * chunks) * 1e-6);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Shape> shapes = {{1, 32, 32, 1024, 128, 1},  {1, 32, 8, 1024, 128, 1},    {1, 32, 8, 65536, 128, 1},
                               {16, 32, 8, 4096, 128, 1},  {32, 32, 8, 4096, 64, 1},    {16, 32, 32, 2048, 96, 1},
                               {16, 8, 4, 4096, 256, 1},   {1, 32, 32, 4096, 128, 256}, {1, 32, 32, 4096, 128, 1024},
                               {1, 32, 8, 1028, 128, 256}, {1, 32, 8, 4096, 128, 1024}};
  if (argc == 7) {
    const auto number = [&](int i) { return std::atoi(argv[i]); };
    shapes = {{number(1), number(2), number(3), number(4), number(5), number(6)}};
  } else if (argc != 1) {
    std::fprintf(stderr, "usage: %s [batch num_q_heads num_kv_heads capacity head_dim num_tokens]\n", argv[0]);
    return 2;
  }
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  const double bandwidth = copyBandwidth();
  std::printf("%s, copy %.0f GB/s\n%-40s %9s %9s %9s %9s %7s\n", device.name, bandwidth / 1e9, "shape, type, window",
              "MB", "floor us", "us", "p99 us", "share");
  for (const Shape& shape : shapes) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (const bool is_int8 : {false, true}) measure(shape, dtype, is_int8, bandwidth, device.l2CacheSize);
    }
  }
  return 0;
}
