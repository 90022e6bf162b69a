// What a loaded session has in memory.
//
//   memory BUNDLE [REPLACEMENT]  ->  "weights N states together|apart aligned|unaligned"
//
// N: mappings of the bundle's weights.bin after a prompt and some steps. With REPLACEMENT, a file that takes the name
// of weights.bin while the session runs: " same" if a step gives what it gave before, else " others".
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "sinkrt/session.h"

namespace {

// Pieces of this process's memory that are mapped from a file, even if another has its name by now.
int mappingsOf(const std::string& path) {
  char* whole = ::realpath(path.c_str(), nullptr);
  const std::string wanted = whole != nullptr ? whole : "";
  std::free(whole);
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  char line[4096];
  int count = 0;
  while (maps != nullptr && std::fgets(line, sizeof line, maps) != nullptr) {
    const std::string text(line);
    count +=
        text.find(" " + wanted + "\n") != std::string::npos || text.find(" " + wanted + " (d") != std::string::npos;
  }
  if (maps != nullptr) std::fclose(maps);
  return count;
}

std::vector<float> logitsAfter(sinkrt::Session& session) {
  const std::vector<int64_t> prompt(9, 65), ids(static_cast<size_t>(session.batch()), 66);
  session.reset();
  for (int64_t b = 0; b < session.batch(); ++b) session.prefill(prompt.data(), 9, b);
  for (int i = 0; i < 40; ++i) session.step(ids.data());
  const int64_t count = session.batch() * session.manifest().model.vocab_size;
  return {session.logits(), session.logits() + count};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  sinkrt::LoadOptions options;
  options.threads = 1;
  const auto session = sinkrt::Session::load(argv[1], options);
  const std::string weights = std::string(argv[1]) + "/weights.bin";
  const std::vector<float> before = logitsAfter(*session);
  const int mappings = mappingsOf(weights);
  bool together = true, aligned = true;
  const std::vector<const void*> states = session->backend().stateBuffers();
  for (size_t i = 0; i < states.size(); ++i) {
    const auto start = reinterpret_cast<uintptr_t>(states[i]);
    aligned = aligned && start % 64 == 0;
    if (i + 1 == states.size()) break;
    const auto bytes = static_cast<uintptr_t>(session->manifest().states[i].bytes());
    together = together && reinterpret_cast<uintptr_t>(states[i + 1]) == start + (bytes + 63) / 64 * 64;
  }
  std::printf("weights %d states %s %s", mappings, together ? "together" : "apart", aligned ? "aligned" : "unaligned");
  if (argc > 2) {
    if (std::rename(argv[2], weights.c_str()) != 0) return 3;
    std::printf(logitsAfter(*session) == before ? " same" : " others");
  }
  std::printf("\n");
  return 0;
}
