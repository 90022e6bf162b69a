// A whole decode step of SmolLM2-135M by the kernels alone, node after node as a bundle's graph calls them, beside
// reading the same bytes by the same threads with as many barriers.
//
//   bench_step [THREADS] [REPEATS] [int4|int8|fp32] [fp32|fp16|int8 window] [small|huge|file pages] [W] [GAP] [0|1]
//
// GAP: microseconds between nodes in which the caller does something else, as ONNX Runtime does. 1: helpers ask for
// what the next node reads.
//
// Times of each kind of node are sums over the 30 layers: the least of each call, and the median step's. `file` maps
// weights from a temporary file, as ONNX Runtime maps a bundle's; states are anonymous memory.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <deque>
#include <string>

#include "bench.h"
#include "linear.h"
#include "sink_attention.h"
#include "spin_pool.h"

using namespace sinkexport::cpu;
using namespace sinkexport::cpu::bench;

namespace {

constexpr int kLayers = 30, kHidden = 576, kInner = 1536, kHeads = 9, kKvHeads = 3, kDim = 64, kSinks = 4;
constexpr int kVocabulary = 49152, kQkv = (kHeads + 2 * kKvHeads) * kDim;
constexpr int kNodes = 5;  // of a layer
const char* const kNames[] = {"qkv", "attention", "attention out", "gate|up", "down", "head"};

// Memory that is cut from its beginning on, in pages of a kind.
class Arena {
 public:
  Arena(size_t bytes, const std::string& pages) : bytes_((bytes + kHuge - 1) / kHuge * kHuge) {
    int file = -1;
    if (pages == "file") {
      char name[] = "/tmp/bench_step_XXXXXX";
      file = mkstemp(name);
      if (file < 0 || unlink(name) != 0) std::abort();
      const Memory piece = filled(kHuge);
      for (size_t at = 0; at < bytes_; at += kHuge) {
        if (write(file, piece.get(), kHuge) != static_cast<ssize_t>(kHuge)) std::abort();
      }
    }
    const int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_PRIVATE | MAP_POPULATE;
    void* memory = mmap(nullptr, bytes_ + kHuge, PROT_READ | (file < 0 ? PROT_WRITE : 0), flags, file, 0);
    if (memory == MAP_FAILED) std::abort();
    char* start = static_cast<char*>(memory);
    if (file < 0) {
      start += (kHuge - reinterpret_cast<uintptr_t>(start) % kHuge) % kHuge;
      madvise(start, bytes_, pages == "huge" ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
      const Memory piece = filled(kHuge);
      for (size_t at = 0; at < bytes_; at += kHuge) std::memcpy(start + at, piece.get(), kHuge);
    }
    next_ = start;
  }

  char* take(size_t bytes) {
    char* taken = next_;
    next_ += (bytes + 63) / 64 * 64;
    return taken;
  }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  size_t bytes_;
  char* next_;
};

struct Piece {
  const char* start;
  size_t bytes;
};

struct Node {
  LinearParams linear;
  SinkAttentionParams attention;
  bool is_attention = false;
  std::vector<Piece> pieces;
  Reads reads;
};

struct Format {
  WeightType weights;
  WindowType window;
  int window_bytes;
  int window_size;
};

float* floats(Memory& memory) {
  return reinterpret_cast<float*>(memory.get());
}

// Numbers of -1 .. 1: of small ones all logits would be alike.
void fillFloats(float* to, size_t count) {
  uint32_t state = 1;
  for (size_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    to[i] = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
}

class Step {
 public:
  Step(const Format& format, const std::string& pages, SpinPool& pool, Isa isa)
      : pool_(pool),
        parallel_(pool.parallel()),
        linear_(linearFor(isa)),
        attend_(sinkAttentionFor(isa)),
        weights_(weightBytes(format), pages),
        states_(stateBytes(format), pages == "huge" ? "huge" : "small") {
    for (int layer = 0; layer < kLayers; ++layer) {
      addLinear(format.weights, kHidden, kQkv, false, x_, qkv_, true, false);
      addAttention(format);
      addLinear(format.weights, kHeads * kDim, kHidden, false, attended_, x_, false, true);
      addLinear(format.weights, kHidden, kInner, true, x_, inner_, true, false);
      addLinear(format.weights, kInner, kHidden, false, inner_, x_, false, true);
    }
    const WeightType head = format.weights == WeightType::kInt4 ? WeightType::kInt8 : format.weights;
    addLinear(head, kHidden, kVocabulary, false, x_, logits_, true, false);
    fillFloats(floats(x_), kHidden);
    for (size_t i = 0; i < kDim / 2; ++i) frequency_[i] = 683565275 / static_cast<int64_t>(i + 1);
    fillFloats(floats(norm_), kInner);
    for (size_t i = 0; i < nodes_.size(); ++i) {
      Node& node = nodes_[i];
      node.reads.setNext(&nodes_[(i + 1) % nodes_.size()].reads);
      if (node.is_attention) {
        sinkAttentionReads(node.attention, parallel_.threads, node.reads);
      } else {
        linearReads(node.linear, parallel_.threads, node.reads);
      }
    }
  }

  // Seconds of each node with the gap before it, appended to `times`.
  void run(double gap, bool asks, std::vector<double>& times) {
    fillFloats(floats(x_), kHidden);
    double before = now();
    for (Node& node : nodes_) {
      while (now() < before + gap) {
      }
      pool_.expect(asks ? node.reads.next() : nullptr);
      if (node.is_attention) {
        attend_(node.attention, parallel_, scratch_);
      } else {
        linear_(node.linear, parallel_, scratch_);
      }
      const double after = now();
      times.push_back(after - before);
      before = after;
    }
    ++position_;
  }

  // The same where all that is done is reading.
  void read(std::vector<double>& times) {
    pool_.expect(nullptr);
    double before = now();
    for (const Node& node : nodes_) {
      parallelFor(parallel_, parallel_.threads, [&](int64_t task) {
        for (const Piece& piece : node.pieces) {
          const size_t share = piece.bytes / 64 / static_cast<size_t>(parallel_.threads) * 64;
          sums_[static_cast<size_t>(task) * 8] += sumOf(piece.start + share * static_cast<size_t>(task), share);
        }
      });
      const double after = now();
      times.push_back(after - before);
      before = after;
    }
  }

  size_t bytes(size_t kind) const {
    size_t total = 0;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      if (kindOf(i) != kind) continue;
      for (const Piece& piece : nodes_[i].pieces) total += piece.bytes;
    }
    return total;
  }
  size_t nodes() const { return nodes_.size(); }
  static size_t kindOf(size_t node) { return node == size_t{kLayers} * kNodes ? kNodes : node % kNodes; }

 private:
  static size_t weightBytes(const Format& format) {
    const size_t row = format.weights == WeightType::kFloat32 ? 4 : format.weights == WeightType::kInt8 ? 1 : 1;
    return (size_t{kLayers} * (kQkv + kHeads * kDim + 3 * kInner) + kVocabulary) * kHidden * row * 21 / 20;
  }
  static size_t stateBytes(const Format& format) {
    const size_t slots = static_cast<size_t>(format.window_size) * static_cast<size_t>(format.window_bytes);
    return size_t{kLayers} * 2 * kKvHeads * (slots * kDim + static_cast<size_t>(format.window_size) * 2 + 4096);
  }

  void addLinear(WeightType type, int inputs, int outputs, bool is_gated, Memory& x, Memory& y, bool has_norm,
                 bool has_residual) {
    Node& node = nodes_.emplace_back();
    LinearParams& p = node.linear;
    p.num_rows = 1;
    p.num_inputs = inputs;
    p.num_outputs = outputs;
    p.weight_type = type;
    p.block_size = type == WeightType::kInt4 ? 32 : 0;
    p.scale_type = ScaleType::kFloat16;
    p.is_gated = is_gated;
    p.activation = is_gated ? Activation::kSilu : Activation::kNone;
    const PackedBytes bytes = packedBytes(type, inputs, outputs * (is_gated ? 2 : 1), p.block_size, p.scale_type);
    const char* weight = weights_.take(bytes.weight);
    p.weight = weight;
    node.pieces.push_back({weight, bytes.weight});
    if (bytes.scale > 0) {
      const char* scale = weights_.take(bytes.scale);
      p.scale = scale;
      node.pieces.push_back({scale, bytes.scale});
    }
    p.x = floats(x);
    p.y = floats(y);
    if (has_norm) p.norm_weight = floats(norm_);
    if (has_residual) p.residual = floats(y);
  }

  void addAttention(const Format& format) {
    Node& node = nodes_.emplace_back();
    SinkAttentionParams& p = node.attention;
    const size_t rows = static_cast<size_t>(kKvHeads) * static_cast<size_t>(format.window_size);
    const size_t bytes = rows * kDim * static_cast<size_t>(format.window_bytes), sinks = kKvHeads * kSinks * kDim * 4;
    node.is_attention = true;
    p.batch = 1;
    p.num_q_heads = kHeads;
    p.num_kv_heads = kKvHeads;
    p.head_dim = p.value_dim = p.rotary_dim = kDim;
    p.num_sinks = kSinks;
    p.window_size = format.window_size;
    p.window_type = format.window;
    p.tokens_first = p.out_tokens_first = true;
    p.row_width = kQkv;
    p.q = floats(qkv_);
    p.k = p.q + kHeads * kDim;
    p.v = p.k + kKvHeads * kDim;
    p.position = &position_;
    p.frequency = frequency_;
    p.scale = 0.125f;
    p.out = floats(attended_);
    char* k = states_.take(bytes);
    char* v = states_.take(bytes);
    p.window_k = k;
    p.window_v = v;
    node.pieces = {{k, bytes}, {v, bytes}};
    if (format.window == WindowType::kInt8) {
      p.window_k_scale = reinterpret_cast<uint16_t*>(states_.take(rows * 2));
      p.window_v_scale = reinterpret_cast<uint16_t*>(states_.take(rows * 2));
    }
    p.sink_k = reinterpret_cast<float*>(states_.take(sinks));
    p.sink_v = reinterpret_cast<float*>(states_.take(sinks));
    position_ = 3 * format.window_size;
  }

  SpinPool& pool_;
  Parallel parallel_;
  LinearFunction linear_;
  SinkAttentionFunction attend_;
  Scratch scratch_;
  Arena weights_, states_;
  Memory x_ = filled(kInner * 4), qkv_ = filled(kQkv * 4), attended_ = filled(kHidden * 4), inner_ = filled(kInner * 4),
         norm_ = filled(kInner * 4), logits_ = filled(kVocabulary * 4);
  int64_t frequency_[kDim / 2] = {};
  int64_t position_ = 0;
  std::deque<Node> nodes_;
  uint64_t sums_[64 * 8] = {};
};

struct Times {
  std::vector<double> least;    // of each node
  std::vector<double> steps;    // sums of a step
  std::vector<double> medians;  // of each kind

  Times(const std::vector<std::vector<double>>& runs, size_t nodes) : least(nodes, 1e9), medians(kNodes + 1) {
    std::vector<std::vector<double>> kinds(kNodes + 1);
    for (const std::vector<double>& one : runs) {
      std::vector<double> sums(kNodes + 1);
      double all = 0;
      for (size_t i = 0; i < nodes; ++i) {
        least[i] = std::min(least[i], one[i]);
        sums[Step::kindOf(i)] += one[i];
        all += one[i];
      }
      for (size_t kind = 0; kind < kinds.size(); ++kind) kinds[kind].push_back(sums[kind]);
      steps.push_back(all);
    }
    std::sort(steps.begin(), steps.end());
    for (size_t kind = 0; kind < kinds.size(); ++kind) {
      std::sort(kinds[kind].begin(), kinds[kind].end());
      medians[kind] = kinds[kind][kinds[kind].size() / 2];
    }
  }
  double leastOf(size_t kind) const {
    double sum = 0;
    for (size_t i = 0; i < least.size(); ++i) sum += Step::kindOf(i) == kind ? least[i] : 0;
    return sum;
  }
};

}  // namespace

int main(int count, char** arguments) {
  const auto argument = [&](int i, const char* otherwise) { return std::string(count > i ? arguments[i] : otherwise); };
  const int threads = std::atoi(argument(1, "2").c_str()), repeats = std::atoi(argument(2, "50").c_str());
  const std::string type = argument(3, "int4"), window = argument(4, "fp32"), pages = argument(5, "file");
  Isa isa;
  if (const char* problem = chooseIsa(std::getenv("SINKEXPORT_CPU_ISA"), isa)) {
    std::fprintf(stderr, "%s\n", problem);
    return 2;
  }
  const Format format{type == "fp32"   ? WeightType::kFloat32
                      : type == "int8" ? WeightType::kInt8
                                       : WeightType::kInt4,
                      window == "int8"   ? WindowType::kInt8
                      : window == "fp16" ? WindowType::kFloat16
                                         : WindowType::kFloat32,
                      window == "int8"   ? 1
                      : window == "fp16" ? 2
                                         : 4,
                      std::atoi(argument(6, "1020").c_str())};
  const double gap = std::atof(argument(7, "0").c_str()) * 1e-6;
  const bool asks = argument(8, "1") == "1";
  SpinPool pool(threads);
  Step step(format, pages, pool, isa);
  std::vector<std::vector<double>> runs(static_cast<size_t>(repeats)), reads = runs;
  for (auto& one : runs) one.reserve(step.nodes());
  for (auto& one : reads) one.reserve(step.nodes());
  for (size_t i = 0; i < runs.size(); ++i) {  // in turns
    step.run(gap, asks, runs[i]);
    step.read(reads[i]);
  }
  const Times times(runs, step.nodes()), floors(reads, step.nodes());
  std::printf("%s, %d threads, %d repeats, weights %s, window %s of %d, pages %s\n", isaName(isa), threads, repeats,
              type.c_str(), window.c_str(), format.window_size, pages.c_str());
  std::printf("%-14s %7s | %9s %6s %9s | %9s %6s %9s\n", "ms a step", "MB", "least", "GB/s", "median", "read", "GB/s",
              "median");
  double all = 0, floor = 0, megabytes = 0;
  const auto line = [&](const char* name, double mb, double least, double median, double read, double read_median) {
    std::printf("%-14s %7.1f | %9.3f %6.1f %9.3f | %9.3f %6.1f %9.3f\n", name, mb, least * 1e3, mb / least / 1e3,
                median * 1e3, read * 1e3, mb / read / 1e3, read_median * 1e3);
  };
  for (size_t kind = 0; kind <= kNodes; ++kind) {
    const double mb = static_cast<double>(step.bytes(kind)) / 1e6;
    all += times.leastOf(kind);
    floor += floors.leastOf(kind);
    megabytes += mb;
    line(kNames[kind], mb, times.leastOf(kind), times.medians[kind], floors.leastOf(kind), floors.medians[kind]);
  }
  const size_t middle = runs.size() / 2;
  line("sum", megabytes, all, times.steps[middle], floor, floors.steps[middle]);
  line("a whole step", megabytes, times.steps[0], times.steps[middle], floors.steps[0], floors.steps[middle]);
}
