// What the library exports: its ABI, whether this processor runs it, and the operators for ONNX Runtime.
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "operator.h"

#define SINKEXPORT_EXPORT extern "C" __attribute__((visibility("default")))

namespace sinkexport::ort {
namespace {

// Version of names, inputs and fields of the operators, and of the layout of weights. The manifest of a bundle has the
// one that it was made for (CPU_ABI in sinkrt.contract).
constexpr const char* kAbi = "4";
constexpr const char* kDomain = "ai.sinkexport";
// Threads that nodes of the session may use, which ONNX Runtime does not report to operators.
constexpr const char* kThreadsOption = "sinkexport.threads";
constexpr const char* kIsaVariable = "SINKEXPORT_CPU_ISA";

const struct {
  const char* name;
  Create create;
} kOperators[] = {
    {"FloatLinear", createFloatLinear},
    {"Bf16Linear", createBf16Linear},
    {"Int8Linear", createInt8Linear},
    {"Int4Linear", createInt4Linear},
    {"FloatRows", createFloatRows},
    {"Bf16Rows", createBf16Rows},
    {"Int8Rows", createInt8Rows},
    {"Int4Rows", createInt4Rows},
    {"FloatExpertLinear", createFloatExpertLinear},
    {"Bf16ExpertLinear", createBf16ExpertLinear},
    {"Int8ExpertLinear", createInt8ExpertLinear},
    {"SinkAttention", createSinkAttention},
};

// The operators for one instruction set and number of threads.
struct Domain {
  Domain(const Api& used, cpu::Isa isa, int threads) : api(used), library(isa, threads) {
    api.call<CreateCustomOpDomain>(kDomain, &handle);
    for (const auto& [name, create] : kOperators) {
      operators.push_back(std::make_unique<Operator>(name, create, api, library));
      api.call<CustomOpDomainAdd>(handle, static_cast<const OrtCustomOp*>(operators.back().get()));
    }
  }

  const Api api;
  Library library;
  std::vector<std::unique_ptr<Operator>> operators;
  OrtCustomOpDomain* handle = nullptr;
};

// Sessions refer to a domain for as long as they live, and nothing says when the last one ends: it is kept, but for its
// threads.
Domain& domainOf(const Api& api, cpu::Isa isa, int threads) {
  static std::mutex mutex;
  static std::map<std::pair<cpu::Isa, int>, std::unique_ptr<Domain>> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Domain>& found = domains[{isa, threads}];
  if (found == nullptr) found = std::make_unique<Domain>(api, isa, threads);
  return *found;
}

// As many threads as ONNX Runtime has by itself: of cores that this process may use, each once.
int physicalCores() {
  const int logical = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return logical;
  std::set<std::string> cores;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (!CPU_ISSET(i, &allowed)) continue;
    std::string siblings;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(i) + "/topology/thread_siblings_list");
    if (!std::getline(file, siblings)) return logical;
    cores.insert(siblings);
  }
  if (!cores.empty()) return static_cast<int>(cores.size());
#endif
  return logical;
}

int threadsOf(const Api& api, const OrtSessionOptions* options) {
  int is_there = 0;
  char value[16] = "";
  size_t bytes = sizeof value;
  api.call<HasSessionConfigEntry>(options, kThreadsOption, &is_there);
  if (is_there != 0 && api.succeeds<GetSessionConfigEntry>(options, kThreadsOption, value, &bytes)) {
    return std::max(1, std::atoi(value));
  }
  return physicalCores();
}

}  // namespace
}  // namespace sinkexport::ort

using namespace sinkexport;

SINKEXPORT_EXPORT const char* sinkexport_cpu_abi() {
  return ort::kAbi;
}

// One line that says why this processor, or SINKEXPORT_CPU_ISA, does not suit the library; null: it does.
SINKEXPORT_EXPORT const char* sinkexport_cpu_problem() {
  cpu::Isa isa;
  return cpu::chooseIsa(std::getenv(ort::kIsaVariable), isa);
}

// The instruction set whose kernels are used; null if there is a problem.
SINKEXPORT_EXPORT const char* sinkexport_cpu_isa() {
  cpu::Isa isa;
  return cpu::chooseIsa(std::getenv(ort::kIsaVariable), isa) == nullptr ? cpu::isaName(isa) : nullptr;
}

SINKEXPORT_EXPORT ort::OrtStatus* RegisterCustomOps(ort::OrtSessionOptions* options, const ort::OrtApiBase* base) {
  void* const* table = base->get_api(ort::kApiVersion);
  if (table == nullptr) {
    const ort::Api oldest(base->get_api(1));
    const std::string message = std::string("ONNX Runtime: received ") + base->version() + ", expected 1.17 or later";
    return oldest.status(ort::kFail, message.c_str());
  }
  const ort::Api api(table);
  try {
    cpu::Isa isa;
    if (const char* problem = cpu::chooseIsa(std::getenv(ort::kIsaVariable), isa)) {
      return api.status(ort::kFail, problem);
    }
    ort::Domain& domain = ort::domainOf(api, isa, ort::threadsOf(api, options));
    domain.library.helpers.start();
    api.call<ort::AddCustomOpDomain>(options, domain.handle);
    return nullptr;
  } catch (const std::exception& error) {
    return api.status(ort::kFail, error.what());
  }
}
