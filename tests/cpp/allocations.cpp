// Counts what is allocated while a session decodes: every operator new of the process, by whether it was called from
// inside ONNX Runtime's library or from anywhere else (this program, libsinkrt, the C++ library), and what the kernels
// of the CPU library ask C for.
//
//   allocations BUNDLE STEPS [TOKENIZER.JSON]..  ->  "ours N onnxruntime N kernels N of N buffers same|moved"
//
// kernels: while it decodes, of all since the session began to load.
//
// Further tokenizers decode as many ids of their own.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include <dlfcn.h>

#include "sinkrt/session.h"

namespace {

std::atomic<bool> counting{false};
std::atomic<long> ours{0}, theirs{0}, kernels{0}, kernels_ever{0};

bool isFrom(const char* library, void* caller) {
  Dl_info info{};
  return ::dladdr(caller, &info) != 0 && info.dli_fname != nullptr && std::strstr(info.dli_fname, library) != nullptr;
}

// The C library's function of that name, behind the one of this program.
template <typename Function>
Function real(Function, const char* name) {
  return reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
}

void countKernel(void* caller) {
  if (!isFrom("libsinkexport_cpu", caller)) return;
  ++kernels_ever;
  if (counting.load(std::memory_order_relaxed)) ++kernels;
}

void* counted(std::size_t size, void* caller) {
  if (counting.load(std::memory_order_relaxed)) {
    ++(isFrom("onnxruntime", caller) ? theirs : ours);
  }
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}

void* countedAligned(std::size_t size, std::align_val_t alignment, void* caller) {
  const auto step = static_cast<std::size_t>(alignment);
  if (counting.load(std::memory_order_relaxed)) ::operator delete(counted(1, caller));
  if (void* memory = std::aligned_alloc(step, (size + step - 1) / step * step)) return memory;
  throw std::bad_alloc();
}

}  // namespace

// What kernels keep between their loops comes from here (plugins/cpu/kernels/scratch.cpp).
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t size) {
  static const auto function = real(aligned_alloc, "aligned_alloc");
  countKernel(__builtin_return_address(0));
  return function(alignment, size);
}

void* operator new(std::size_t size) {
  return counted(size, __builtin_return_address(0));
}
void* operator new[](std::size_t size) {
  return counted(size, __builtin_return_address(0));
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return countedAligned(size, alignment, __builtin_return_address(0));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return countedAligned(size, alignment, __builtin_return_address(0));
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  sinkrt::LoadOptions options;
  options.threads = 1;
  const auto session = sinkrt::Session::load(argv[1], options);
  sinkrt::StreamingDecoder decoder(session->tokenizer());
  std::vector<sinkrt::Tokenizer> tokenizers;
  for (int i = 3; i < argc; ++i) tokenizers.push_back(sinkrt::Tokenizer::load(argv[i]));
  std::vector<sinkrt::StreamingDecoder> decoders;
  for (const sinkrt::Tokenizer& tokenizer : tokenizers) decoders.emplace_back(tokenizer);
  const std::vector<const void*> buffers = session->backend().stateBuffers();

  sinkrt::SamplingParams params;
  params.temperature = 0.9;
  params.top_k = 100;
  params.top_p = 0.95;
  params.repetition_penalty = 1.1;
  params.seed = 1;
  const std::vector<sinkrt::SamplingParams> sampling(static_cast<size_t>(session->batch()), params);
  const std::vector<int64_t> prompt(5, 65);
  for (int64_t b = 0; b < session->batch(); ++b) session->prefill(prompt.data(), 5, b);
  std::vector<int64_t> ids(sampling.size()), num_ids(sampling.size());
  const std::unique_ptr<bool[]> ended(new bool[sampling.size()]());
  const auto decode = [&](long steps) {  // sampled and given steps in turn, a chunk and a reset now and then
    for (long i = 0; i < steps; ++i) {
      session->steps(1, sampling.data(), true, ids.data(), num_ids.data(), ended.get());
      decoder.push(ids[0]);
      session->step(ids.data());
      if (i % 1000 == 999) session->prefill(prompt.data(), 5);
      if (i % 5000 == 4999) {
        session->reset();
        for (int64_t b = 0; b < session->batch(); ++b) session->prefill(prompt.data(), 5, b);
      }
    }
  };
  decode(50);
  counting = true;
  decode(std::atol(argv[2]) / 2);
  for (sinkrt::StreamingDecoder& stream : decoders) {
    for (long i = 0; i < std::atol(argv[2]); ++i) stream.push(i * 7919 % 613);
    stream.flush();
  }
  counting = false;
  std::printf("ours %ld onnxruntime %ld kernels %ld of %ld buffers %s\n", ours.load(), theirs.load(), kernels.load(),
              kernels_ever.load(), session->backend().stateBuffers() == buffers ? "same" : "moved");
  return 0;
}
