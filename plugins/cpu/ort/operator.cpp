#include "operator.h"

#include <exception>
#include <utility>

namespace sinkexport::ort {
namespace {

const Operator& of(const OrtCustomOp* op) {
  return *static_cast<const Operator*>(op);
}

// A kernel with what it needs to run.
struct Instance {
  Instance(std::unique_ptr<Kernel> made, const Api& used, Library& shared)
      : kernel(std::move(made)), api(used), library(shared) {
    library.helpers.start(1);
    reads = library.reads.acquire();
  }
  Instance(const Instance&) = delete;
  Instance& operator=(const Instance&) = delete;
  ~Instance() {
    library.helpers.release();
    library.reads.release(reads);
  }

  std::unique_ptr<Kernel> kernel;
  const Api& api;
  Library& library;
  cpu::Reads* reads = nullptr;
};

// Nodes run in the same order each time: this one follows the thread's last one.
void noteOrder(const Instance& instance) {
  thread_local cpu::Reads* last = nullptr;
  if (last != nullptr && last->next() != instance.reads) last->setNext(instance.reads);
  last = instance.reads;
  instance.library.helpers.pool().expect(instance.reads->next());
}

OrtStatus* create(const OrtCustomOp* op, void* const*, const OrtKernelInfo* info, void** kernel) {
  const Operator& found = of(op);
  try {
    Node node(found.api, info, found.operator_name);
    *kernel = new Instance(found.create(node, found.library), found.api, found.library);
    return nullptr;
  } catch (const std::exception& error) {
    return found.api.status(kInvalidGraph, error.what());
  }
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  auto& instance = *static_cast<Instance*>(kernel);
  try {
    noteOrder(instance);
    Run run(instance.api, context, instance.library, *instance.reads);
    instance.kernel->compute(run);
    return nullptr;
  } catch (const std::exception& error) {
    return instance.api.status(kFail, error.what());
  }
}

// What ONNX Runtime hands to a task, and what kernels take.
struct Task {
  void (*task)(void*, int64_t);
  void* argument;
};

}  // namespace

std::unique_ptr<cpu::Scratch> ScratchPool::acquire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    free_.reserve(free_.capacity() + 1);  // for its return
    return std::make_unique<cpu::Scratch>();
  }
  std::unique_ptr<cpu::Scratch> out = std::move(free_.back());
  free_.pop_back();
  return out;
}

void ScratchPool::release(std::unique_ptr<cpu::Scratch> scratch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(scratch));
}

cpu::Reads* ReadsPool::acquire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.reserve(all_.size() + 1);  // for its return
  if (free_.empty()) return &all_.emplace_back();
  cpu::Reads* out = free_.back();
  free_.pop_back();
  return out;
}

void ReadsPool::release(cpu::Reads* reads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  reads->clear();
  free_.push_back(reads);
}

void Threads::start(int64_t nodes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (pool_ == nullptr) pool_ = std::make_unique<cpu::SpinPool>(count_);
  nodes_ += nodes;
}

void Threads::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (--nodes_ == 0) pool_.reset();
}

Run::Run(const Api& api, OrtKernelContext* context, Library& library, cpu::Reads& reads)
    : api_(api), context_(context), library_(library), reads_(reads), scratch_(library.scratch.acquire()) {
  parallel_.run = runTasks;
  parallel_.pool = this;
  parallel_.threads = library.threads;
}

void Run::runTasks(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  const Run& run = *static_cast<const Run*>(pool);
  if (run.library_.helpers.pool().tryRun(tasks, task, argument)) return;
  Task wrapped{task, argument};
  run.api_.call<KernelContextParallelFor>(
      static_cast<const OrtKernelContext*>(run.context_),
      [](void* called, size_t index) {
        const Task& one = *static_cast<const Task*>(called);
        one.task(one.argument, static_cast<int64_t>(index));
      },
      static_cast<size_t>(tasks), size_t{0}, static_cast<void*>(&wrapped));
}

const void* Run::input(size_t index) const {
  const OrtValue* value = nullptr;
  void* data = nullptr;
  api_.call<KernelContextGetInput>(static_cast<const OrtKernelContext*>(context_), index, &value);
  api_.call<GetTensorMutableData>(const_cast<OrtValue*>(value), &data);
  return data;
}

void* Run::output(size_t index, const std::vector<int64_t>& shape) const {
  OrtValue* value = nullptr;
  void* data = nullptr;
  api_.call<KernelContextGetOutput>(context_, index, shape.data(), shape.size(), &value);
  api_.call<GetTensorMutableData>(value, &data);
  return data;
}

// Inputs and outputs are one list each, of any number and of mixed types: the node's own check says what fits.
Operator::Operator(const char* name, Create create_kernel, const Api& used, Library& shared)
    : OrtCustomOp{}, operator_name(name), create(create_kernel), api(used), library(shared) {
  version = kApiVersion;
  OrtCustomOp::name = [](const OrtCustomOp* op) { return of(op).operator_name; };
  provider = [](const OrtCustomOp*) -> const char* { return nullptr; };
  input_type = output_type = [](const OrtCustomOp*, size_t) -> int { return kUndefined; };
  input_count = output_count = [](const OrtCustomOp*) -> size_t { return 1; };
  input_characteristic = output_characteristic = [](const OrtCustomOp*, size_t) -> int { return kVariadic; };
  input_memory = [](const OrtCustomOp*, size_t) -> int { return kDefaultMemory; };
  least_inputs = least_outputs = [](const OrtCustomOp*) -> int { return 1; };
  inputs_are_alike = outputs_are_alike = [](const OrtCustomOp*) -> int { return 0; };
  create_kernel_v2 = ort::create;
  compute_v2 = ort::compute;
  destroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
  start_version = [](const OrtCustomOp*) -> int { return 1; };
}

}  // namespace sinkexport::ort
