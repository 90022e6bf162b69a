#include "cuda/device.h"

#include <atomic>

#include "sinkrt/error.h"

namespace sinkrt::cuda {
namespace {

std::atomic<int64_t> num_allocations{0};
std::atomic<int> num_streams{0};  // a session on a GPU has one

std::string nameOf(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

Error outOfMemory(size_t bytes, const char* purpose) {
  size_t free_bytes = 0, total = 0;
  if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) cudaGetLastError();
  return {Code::kOutOfMemory, problem("GPU memory", std::to_string(free_bytes >> 20) + " MiB free",
                                      std::to_string((bytes >> 20) + 1) + " MiB more for " + purpose,
                                      "free some, or export with a smaller window or an INT8 recipe")};
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call must not report it again
  if (error == cudaErrorMemoryAllocation) throw outOfMemory(0, what);
  throw Error(Code::kBackend, problem(std::string("CUDA: ") + what, nameOf(error), "success",
                                      "load the session again; if that fails too, restart the program"));
}

void useDevice(int device) {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || device < 0 || device >= count) {
    cudaGetLastError();
    throw Error(Code::kBackend,
                problem("CUDA device",
                        found == cudaSuccess ? std::to_string(device) + " of " + std::to_string(count) : nameOf(found),
                        "an NVIDIA GPU and its driver", "check nvidia-smi, or use the backend 'ort'"));
  }
  check(cudaSetDevice(device), "cudaSetDevice");
  const cudaError_t state = cudaFree(nullptr);
  if (state == cudaSuccess) return;
  cudaGetLastError();
  // Some errors last until the context is made anew, which takes the memory of all sessions away.
  if (num_streams > 0) {
    throw Error(Code::kBackend, problem("CUDA device", nameOf(state), "a context that works",
                                        "free all sessions, then load again; if that fails too, restart the program"));
  }
  cudaDeviceReset();
  cudaGetLastError();
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaFree(nullptr), "making a context");
  check(cudaDeviceSynchronize(), "making a context");
}

std::string computeCapability(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return std::to_string(major) + "." + std::to_string(minor);
}

int64_t numAllocations() {
  return num_allocations;
}

void* tryAllocate(size_t bytes) noexcept {
  void* memory = nullptr;
  ++num_allocations;
  if (cudaMalloc(&memory, bytes) == cudaSuccess) return memory;
  cudaGetLastError();
  return nullptr;
}

void* allocate(size_t bytes, const char* purpose) {
  void* memory = tryAllocate(bytes);
  if (memory == nullptr) throw outOfMemory(bytes, purpose);
  return memory;
}

void release(void* memory) noexcept {
  // An error here is an earlier one's: the context is lost, and the memory with it.
  if (memory != nullptr && cudaFree(memory) != cudaSuccess) cudaGetLastError();
}

Memory::Memory(size_t bytes, const char* purpose)
    : data_(static_cast<char*>(allocate(bytes > 0 ? bytes : 1, purpose))), bytes_(bytes) {
  const cudaError_t error = cudaMemset(data_, 0, bytes > 0 ? bytes : 1);
  if (error == cudaSuccess) return;
  release(std::exchange(data_, nullptr));
  check(error, "cudaMemset");
}

Pinned::Pinned(size_t bytes) {
  void* memory = nullptr;
  ++num_allocations;
  check(cudaHostAlloc(&memory, bytes > 0 ? bytes : 1, cudaHostAllocDefault), "pinned host memory");
  data_ = static_cast<char*>(memory);
  std::char_traits<char>::assign(data_, bytes, '\0');
}

Pinned::~Pinned() {
  if (data_ != nullptr && cudaFreeHost(data_) != cudaSuccess) cudaGetLastError();
}

Stream::Stream() {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  ++num_streams;
}

Stream::~Stream() {
  --num_streams;
  if (cudaStreamDestroy(stream_) != cudaSuccess) cudaGetLastError();
}

void Stream::synchronize() const {
  check(cudaStreamSynchronize(stream_), "work on the GPU");
}

void copy(char* target, const char* source, size_t bytes, const Stream& stream) {
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpy");
}

Graph::~Graph() {
  if (exec_ != nullptr && cudaGraphExecDestroy(exec_) != cudaSuccess) cudaGetLastError();
}

bool Graph::capture(const Stream& stream, const std::function<void()>& work) {
  stream.synchronize();
  // This thread only: another one's cudaMalloc must not spoil the recording.
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  bool whole = true;
  try {
    work();
  } catch (const Error&) {
    whole = false;
  }
  cudaGraph_t graph = nullptr;
  if (cudaStreamEndCapture(stream, &graph) != cudaSuccess || !whole || graph == nullptr) {
    cudaGetLastError();
    if (graph != nullptr) cudaGraphDestroy(graph);
    return false;
  }
  const cudaError_t error = cudaGraphInstantiateWithFlags(&exec_, graph, 0);
  cudaGraphDestroy(graph);
  if (error != cudaSuccess) {
    cudaGetLastError();
    exec_ = nullptr;
    return false;
  }
  check(cudaGraphUpload(exec_, stream), "cudaGraphUpload");
  stream.synchronize();
  return true;
}

void Graph::launch(const Stream& stream) const {
  check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch");
}

}  // namespace sinkrt::cuda
