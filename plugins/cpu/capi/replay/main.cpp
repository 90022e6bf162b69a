// Runs calls of the C interface that a file holds, for processors that are emulated and have no Python:
//
//   replay CALLS RESULTS
//
// CALLS, little-endian, one after another: char name[32], int32 isa, int32 threads, int32 bytes of the struct, int32
// pointers, int64 bytes of the arrays; the struct; for each pointer int64 its offset in the struct and int64 its offset
// in the arrays; the arrays. RESULTS: the arrays of each call, afterwards. Ends with 77 if this processor lacks a
// call's instruction set.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "isa.h"

#define SINKEXPORT_DECLARE(name)                                              \
  extern "C" const char* sinkexport_cpu_##name##_problem(const void* params); \
  extern "C" size_t sinkexport_cpu_##name##_params_bytes();                   \
  extern "C" void sinkexport_cpu_##name(const void* params, int isa, int threads);
#define SINKEXPORT_ENTRY(name) \
  {#name, sinkexport_cpu_##name##_params_bytes, sinkexport_cpu_##name##_problem, sinkexport_cpu_##name},
#define SINKEXPORT_CALLS(X) X(linear) X(rows) X(sink_attention)

SINKEXPORT_CALLS(SINKEXPORT_DECLARE)

namespace {

struct Entry {
  const char* name;
  size_t (*params_bytes)();
  const char* (*problem)(const void*);
  void (*run)(const void*, int, int);
};
constexpr Entry kEntries[] = {SINKEXPORT_CALLS(SINKEXPORT_ENTRY)};

struct Header {
  char name[32];
  int32_t isa, threads, params_bytes, pointers;
  int64_t bytes;
};

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

[[noreturn]] void fail(const char* name, const char* why, int code = 1) {
  std::fprintf(stderr, "%s: %s\n", name, why);
  std::exit(code);
}

void runCall(const Header& header, std::ifstream& calls, std::ofstream& results) {
  std::vector<char> params(static_cast<size_t>(header.params_bytes));
  calls.read(params.data(), header.params_bytes);
  std::vector<int64_t> places(static_cast<size_t>(header.pointers) * 2);
  calls.read(reinterpret_cast<char*>(places.data()), static_cast<std::streamsize>(places.size() * 8));
  const size_t bytes = static_cast<size_t>(header.bytes + 63) / 64 * 64;
  std::unique_ptr<char, Free> arrays(static_cast<char*>(std::aligned_alloc(64, bytes)));
  calls.read(arrays.get(), header.bytes);
  if (!calls) fail(header.name, "the file ends early");
  for (size_t i = 0; i < places.size(); i += 2) {
    char* address = arrays.get() + places[i + 1];
    std::memcpy(params.data() + places[i], &address, sizeof address);
  }
  if (!sinkexport::cpu::hasIsa(static_cast<sinkexport::cpu::Isa>(header.isa))) {
    fail(header.name, "this processor lacks the instruction set", 77);
  }
  for (const Entry& entry : kEntries) {
    if (std::strncmp(entry.name, header.name, sizeof header.name) != 0) continue;
    if (entry.params_bytes() != params.size()) fail(header.name, "another size of the struct");
    if (const char* problem = entry.problem(params.data())) fail(header.name, problem);
    entry.run(params.data(), header.isa, header.threads);
    results.write(arrays.get(), header.bytes);
    return;
  }
  fail(header.name, "no such call");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) fail("replay", "expected CALLS and RESULTS");
  std::ifstream calls(arguments[1], std::ios::binary);
  std::ofstream results(arguments[2], std::ios::binary);
  for (Header header; calls.read(reinterpret_cast<char*>(&header), sizeof header);) runCall(header, calls, results);
  return results.flush() ? 0 : 1;
}
