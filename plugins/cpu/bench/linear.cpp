// Times of SmolLM2-135M's matmuls: one step (M = 1) and chunks, beside the speed at which this memory is read.
//
//   bench_linear [THREADS] [REPEATS] [M,M,..] [int4,int8,bf16,fp32] [BLOCK]
//
// Each of the 30 layers has matrices of its own, so that a step reads all weights from memory. The least time of each
// call counts: other programs can only add to it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bench.h"
#include "linear.h"
#include "spin_pool.h"

using namespace sinkexport::cpu;
using namespace sinkexport::cpu::bench;

namespace {

constexpr int kLayers = 30;

struct Matrix {
  const char* name;
  int64_t inputs, outputs;  // gated: of y
  bool is_gated, has_norm, has_residual;
};
constexpr Matrix kLayer[] = {{"qkv", 576, 960, false, true, false},
                             {"attention out", 576, 576, false, false, true},
                             {"gate|up", 576, 1536, true, true, false},
                             {"down", 1536, 576, false, false, true}};
constexpr Matrix kHead = {"head", 576, 49152, false, true, false};

struct Linear {
  LinearParams params;
  PackedBytes bytes{};
  Memory weight, scale;

  Linear(const Matrix& matrix, WeightType type, int block) {
    params.num_inputs = matrix.inputs;
    params.num_outputs = matrix.outputs;
    params.weight_type = type;
    params.block_size = type == WeightType::kInt4 ? block : 0;
    params.scale_type = ScaleType::kFloat16;
    params.is_gated = matrix.is_gated;
    params.activation = matrix.is_gated ? Activation::kSilu : Activation::kNone;
    bytes = packedBytes(type, matrix.inputs, matrix.outputs * (matrix.is_gated ? 2 : 1), params.block_size,
                        params.scale_type);
    weight = filled(bytes.weight);
    params.weight = weight.get();
    if (bytes.scale > 0) {
      scale = filled(bytes.scale);
      params.scale = scale.get();
    }
  }
};

struct Bench {
  SpinPool pool;
  Parallel parallel;
  LinearFunction run;
  Scratch scratch;
  int repeats;
  Memory x = filled(size_t{1024} * 1536 * 4), norm = filled(1536 * 4), y = filled(size_t{256} * 49152 * 4),
         residual = filled(size_t{1024} * 1536 * 4);

  Bench(int threads, int count, Isa isa)
      : pool(threads), parallel(pool.parallel()), run(linearFor(isa)), repeats(count) {}

  void call(const Linear& linear, const Matrix& matrix, int64_t rows) {
    LinearParams params = linear.params;
    params.num_rows = rows;
    params.x = reinterpret_cast<float*>(x.get());
    params.y = reinterpret_cast<float*>(y.get());
    if (matrix.has_norm) params.norm_weight = reinterpret_cast<float*>(norm.get());
    if (matrix.has_residual) params.residual = reinterpret_cast<float*>(residual.get());
    run(params, parallel, scratch);
  }

  void table(WeightType type, const char* name, int block, int64_t rows, double read_speed) {
    std::vector<std::vector<Linear>> layers(kLayers);
    for (auto& layer : layers) {
      for (const Matrix& matrix : kLayer) layer.emplace_back(matrix, type, block);
    }
    const Linear head(kHead, type, block);
    double best_step = 1e9, best_head = 1e9;
    std::vector<double> best(kLayers * 4, 1e9);
    const int64_t head_rows = 1;  // of a chunk the last token alone needs logits
    for (int i = 0; i < repeats; ++i) {
      const double start = now();
      double before = start;
      for (size_t call_index = 0; call_index < best.size(); ++call_index) {
        const size_t m = call_index % 4;
        call(layers[call_index / 4][m], kLayer[m], rows);
        const double after = now();
        best[call_index] = std::min(best[call_index], after - before);
        before = after;
      }
      call(head, kHead, head_rows);
      const double end = now();
      best_step = std::min(best_step, end - start);
      best_head = std::min(best_head, end - before);
    }
    double all_bytes = 0, all_operations = 0;
    const auto line = [&](const char* what, double seconds, double bytes, double operations) {
      std::printf("%-5s M=%-4lld %-14s %8.3f ms %7.1f MB %6.1f GB/s (%3.0f%%) %8.1f GOPS\n", name,
                  static_cast<long long>(rows), what, seconds * 1e3, bytes / 1e6, bytes / seconds / 1e9,
                  bytes / seconds / 1e7 / read_speed, operations / seconds / 1e9);
    };
    const auto count = [&](const Linear& linear, const Matrix& matrix, int64_t times, int64_t tokens, double& bytes,
                           double& operations) {
      bytes = static_cast<double>(times) * static_cast<double>(linear.bytes.weight + linear.bytes.scale);
      operations =
          2.0 * static_cast<double>(times * tokens * matrix.inputs * matrix.outputs * (matrix.is_gated ? 2 : 1));
      all_bytes += bytes;
      all_operations += operations;
    };
    double bytes, operations, sum = best_head;
    for (size_t m = 0; m < 4; ++m) {
      double seconds = 0;
      for (size_t layer = 0; layer < kLayers; ++layer) seconds += best[layer * 4 + m];
      sum += seconds;
      count(layers[0][m], kLayer[m], kLayers, rows, bytes, operations);
      line(kLayer[m].name, seconds, bytes, operations);
    }
    count(head, kHead, 1, head_rows, bytes, operations);
    line("head", best_head, bytes, operations);
    line("sum of these", sum, all_bytes, all_operations);
    line("a whole step", best_step, all_bytes, all_operations);
    if (rows > 1) {
      std::printf("%-5s M=%-4lld tokens/s %.0f\n", name, static_cast<long long>(rows), static_cast<double>(rows) / sum);
    }
  }
};

}  // namespace

int main(int count, char** arguments) {
  const auto argument = [&](int i, const char* otherwise) { return std::string(count > i ? arguments[i] : otherwise); };
  const int threads = std::atoi(argument(1, "2").c_str()), repeats = std::atoi(argument(2, "20").c_str());
  const std::string rows = argument(3, "1,64,256"), types = argument(4, "int4,int8,bf16,fp32");
  const int block = std::atoi(argument(5, "32").c_str());
  Isa isa;
  if (const char* problem = chooseIsa(std::getenv("SINKEXPORT_CPU_ISA"), isa)) {
    std::fprintf(stderr, "%s\n", problem);
    return 2;
  }
  Bench bench(threads, repeats, isa);
  const double speed = readSpeed(bench.parallel, repeats);
  std::printf("%s, %d threads, %d repeats, int4 in blocks of %d, memory read %.1f GB/s\n", isaName(isa), threads,
              repeats, block, speed);
  const struct {
    const char* name;
    WeightType type;
  } kinds[] = {{"int4", WeightType::kInt4},
               {"int8", WeightType::kInt8},
               {"bf16", WeightType::kBFloat16},
               {"fp32", WeightType::kFloat32}};
  for (const auto& kind : kinds) {
    if (types.find(kind.name) == std::string::npos) continue;
    for (size_t at = 0; at < rows.size();) {
      bench.table(kind.type, kind.name, block, std::atoll(rows.c_str() + at), speed);
      const size_t comma = rows.find(',', at);
      at = comma == std::string::npos ? rows.size() : comma + 1;
    }
  }
}
