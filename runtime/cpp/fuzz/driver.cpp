// Runs a fuzz target without libFuzzer: mutates a corpus by a fixed seed.
//
//   fuzz_manifest RUNS SEED FILE..
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kLargest = 1 << 16;

class Mutator {
 public:
  Mutator(uint64_t seed, const std::vector<std::string>& corpus) : random_(seed), corpus_(corpus) {}

  std::string next() {
    std::string out = corpus_[below(corpus_.size())];
    for (size_t changes = 1 + below(4); changes > 0; --changes) change(out);
    if (out.size() > kLargest) out.resize(kLargest);
    return out;
  }

 private:
  size_t below(size_t limit) { return limit == 0 ? 0 : random_() % limit; }

  void change(std::string& text) {
    static const char* const kWords[] = {"null",
                                         "true",
                                         "-1",
                                         "0",
                                         "1e999",
                                         "9223372036854775807",
                                         "18446744073709551616",
                                         "[]",
                                         "{}",
                                         "\"\"",
                                         "\"\\ud800\"",
                                         "\"../x\"",
                                         "[[[[",
                                         "1.5",
                                         "\\",
                                         "\xff"};
    const size_t at = below(text.size() + 1);
    switch (below(8)) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ 1 << below(8));
        break;
      case 1:
        if (at < text.size()) text[at] = static_cast<char>(random_());
        break;
      case 2:
        text.erase(at, 1 + below(16));
        break;
      case 3:
        text.insert(at, kWords[below(std::size(kWords))]);
        break;
      case 4: {  // a number or word becomes another
        size_t end = at;
        while (end < text.size() && std::strchr(",]}: \n", text[end]) == nullptr) ++end;
        text.replace(at, end - at, kWords[below(std::size(kWords))]);
        break;
      }
      case 5:
        text.insert(at, text, below(text.size()), below(64));
        break;
      case 6: {
        const std::string& other = corpus_[below(corpus_.size())];
        text.replace(at, std::string::npos, other, std::min(at, other.size()), std::string::npos);
        break;
      }
      default:
        text.resize(at);
    }
  }

  std::mt19937_64 random_;
  const std::vector<std::string>& corpus_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fputs("usage: fuzz_NAME RUNS SEED FILE..\n", stderr);
    return 2;
  }
  std::vector<std::string> corpus;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  Mutator mutator(std::strtoull(argv[2], nullptr, 10), corpus);
  const auto run = [](const std::string& text) {
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  };
  for (const std::string& text : corpus) run(text);
  const long runs = std::atol(argv[1]);
  for (long i = 0; i < runs; ++i) run(mutator.next());
  std::printf("%ld runs\n", runs);
  return 0;
}
