// Stream an answer from a bundle: text in, text out, or ids in, ids out.
//
//   sinkrt_generate bundle --prompt "Once upon a time" --max-tokens 100 --temperature 0.7
//
// Exit codes: 0, or 2 with one line on standard error.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "sinkrt/sampling_options.h"
#include "sinkrt/session.h"
#include "sinkrt/state.h"

namespace {

constexpr const char* kUsage =
    "usage: sinkrt_generate BUNDLE [options]\n"
    "  --prompt TEXT           what to go on from; without it, --ids or a loaded state\n"
    "  --ids FILE              ids instead, separated by white space ('-': standard input); so is the answer\n"
    "  --max-tokens N          (default: until the model ends its text)\n"
    "  --ignore-eos            go on when the model ends its text\n"
    "  --temperature X         0 is greedy (default)\n"
    "  --top-k N  --top-p X  --repetition-penalty X  --seed N\n"
    "  --tokens-at-once N      decoded without coming back to the host in between, on backends that can\n"
    "  --backend NAME          ort (default) | tensorrt\n"
    "  --threads N             CPU threads (default: all physical cores)\n"
    "  --onnxruntime PATH      libonnxruntime.so (default: $SINKRT_ONNXRUNTIME, then the loader's path)\n"
    "  --plugin PATH           libsinkexport_plugin.so or libsinkexport_cpu.so\n"
    "  --device N              CUDA device (default 0)\n"
    "  --skip-hashes           compare the sizes of the bundle's files only\n"
    "  --load-state FILE  --save-state FILE\n"
    "  --stats                 times and memory on standard error\n";

struct Options {
  std::string bundle, prompt, ids_file, load_state, save_state;
  sinkrt::LoadOptions load;
  sinkrt::GenerateParams generate;
  bool stats = false;
};

[[noreturn]] void refuse(const std::string& what, const std::string& received, const std::string& expected) {
  throw sinkrt::Error(sinkrt::Code::kUsage, sinkrt::problem(what, received, expected, "see --help"));
}

int64_t integer(const std::string& name, const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0) refuse(name, text, "an integer");
  return value;
}

int smallInteger(const std::string& name, const std::string& text) {
  const int64_t value = integer(name, text);
  if (value < 0 || value > 4096) refuse(name, text, "0 .. 4096");
  return static_cast<int>(value);
}

double number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') refuse(name, text, "a number");
  return value;
}

uint64_t seed(const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(text.c_str(), &end, 10);
  if (text.empty() || text[0] == '-' || *end != '\0' || errno != 0) refuse("--seed", text, "0 .. 2^64 - 1");
  return value;
}

// The option of a flag: --top-k is top_k. nullptr: none.
const sinkrt::SamplingOption* samplingOption(const std::string& flag) {
  for (const sinkrt::SamplingOption& option : sinkrt::kSamplingOptions) {
    std::string name = std::string("--") + option.name;
    std::replace(name.begin() + 2, name.end(), '_', '-');
    if (name == flag) return &option;
  }
  return nullptr;
}

Options parse(int argc, char** argv) {
  Options out;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) refuse(name, "nothing", "a value");
      return argv[++i];
    };
    sinkrt::SamplingParams& sampling = out.generate.sampling;
    if (name == "--help" || name == "-h") {
      std::cout << kUsage;
      std::exit(0);
    } else if (name == "--prompt") {
      out.prompt = value();
    } else if (name == "--ids") {
      out.ids_file = value();
    } else if (name == "--max-tokens") {
      out.generate.max_tokens = integer(name, value());
      if (out.generate.max_tokens < 1) refuse(name, std::to_string(out.generate.max_tokens), ">= 1");
    } else if (name == "--ignore-eos") {
      out.generate.ignore_eos = true;
    } else if (const sinkrt::SamplingOption* option = samplingOption(name)) {
      if (option->number != nullptr) {
        sampling.*option->number = number(name, value());
      } else {
        sampling.*option->integer = integer(name, value());
      }
    } else if (name == "--seed") {
      sampling.seed = seed(value());
    } else if (name == "--tokens-at-once") {
      out.generate.tokens_at_once = integer(name, value());
    } else if (name == "--backend") {
      out.load.backend = value();
    } else if (name == "--threads") {
      out.load.threads = smallInteger(name, value());
    } else if (name == "--device") {
      out.load.device = smallInteger(name, value());
    } else if (name == "--onnxruntime") {
      out.load.onnxruntime_library = value();
    } else if (name == "--plugin") {
      out.load.plugin_library = value();
    } else if (name == "--skip-hashes") {
      out.load.verify = false;
    } else if (name == "--load-state") {
      out.load_state = value();
    } else if (name == "--save-state") {
      out.save_state = value();
    } else if (name == "--stats") {
      out.stats = true;
    } else if (!name.empty() && name[0] != '-' && out.bundle.empty()) {
      out.bundle = name;
    } else {
      refuse("argument", "'" + name + "'", "a known option");
    }
  }
  if (out.bundle.empty()) refuse("BUNDLE", "nothing", "a folder that 'sinkexport export' wrote");
  if (!out.prompt.empty() && !out.ids_file.empty()) refuse("--ids", "together with --prompt", "one of them");
  return out;
}

std::vector<int64_t> readIds(const std::string& path) {
  std::ifstream file;
  if (path != "-") file.open(path);
  std::istream& in = path == "-" ? std::cin : file;
  std::vector<int64_t> out;
  for (std::string word; in >> word;) out.push_back(integer("--ids", word));
  if (out.empty()) refuse("--ids", "'" + path + "', without any", "a file of token ids");
  return out;
}

// Resident memory in bytes; 0 where the system does not say.
int64_t residentBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) return std::strtoll(line.c_str() + 6, nullptr, 10) * 1024;
  }
  return 0;
}

using Clock = std::chrono::steady_clock;

double secondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void run(const Options& options) {
  const Clock::time_point start = Clock::now();
  if (!options.save_state.empty()) sinkrt::checkStateTarget(options.save_state);  // not after hours of streaming
  const auto session = sinkrt::Session::load(options.bundle, options.load);
  if (!options.load_state.empty()) session->loadState(options.load_state);
  const double load_s = secondsSince(start);

  const bool text = options.ids_file.empty() && session->manifest().tokenizer.has_value();
  Clock::time_point first{}, last{};
  int64_t resident_bytes = 0;
  const auto came = [&](const std::string& piece) {
    last = Clock::now();
    if (first == Clock::time_point{}) {
      first = last;
      resident_bytes = residentBytes();
    }
    std::cout << piece << std::flush;
    return !std::cout.fail();
  };
  const Clock::time_point begin = Clock::now();
  int64_t count = 0;
  if (text) {
    count = session->generateText(options.prompt, options.generate,
                                  [&](int64_t, std::string_view piece) { return came(std::string(piece)); });
  } else {
    const std::vector<int64_t> ids = options.ids_file.empty() ? std::vector<int64_t>() : readIds(options.ids_file);
    count = session->generate(ids, options.generate, [&](int64_t id) { return came(std::to_string(id) + " "); });
  }
  std::cout << std::endl;
  const bool written = !std::cout.fail();
  if (!options.save_state.empty()) session->saveState(options.save_state);
  if (!written) {
    throw sinkrt::Error(sinkrt::Code::kUsage, sinkrt::problem("standard output", "an error while writing",
                                                              "a place for all tokens", "check where it goes"));
  }
  if (!options.stats) return;
  const double decode_s = std::chrono::duration<double>(last - first).count();
  std::fprintf(stderr, "load %.2f s, first token after %.3f s, ", load_s,
               std::chrono::duration<double>(first - begin).count());
  if (count > 1) std::fprintf(stderr, "%.2f ms/token, ", 1e3 * decode_s / static_cast<double>(count - 1));
  std::fprintf(stderr, "%lld tokens, position %lld, memory growth %lld bytes\n", static_cast<long long>(count),
               static_cast<long long>(session->position()), static_cast<long long>(residentBytes() - resident_bytes));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::bad_alloc&) {
    std::cerr << "error: memory: received too little, expected room for the bundle; use a smaller model\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
  }
  return 2;
}
