// Operators as ONNX Runtime knows them: a name, and what makes a kernel of a node.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "node.h"
#include "ort_api.h"
#include "parallel.h"
#include "reads.h"
#include "scratch.h"
#include "spin_pool.h"

namespace sinkexport::ort {

// Scratch memory that the nodes of all sessions share: as many pieces as nodes ever ran at a time.
class ScratchPool {
 public:
  std::unique_ptr<cpu::Scratch> acquire();
  void release(std::unique_ptr<cpu::Scratch> scratch);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<cpu::Scratch>> free_;
};

// What nodes read, for helpers that wait. The memory of a node that has ended serves another one, and is never freed: a
// helper may look at it at any time.
class ReadsPool {
 public:
  cpu::Reads* acquire();
  void release(cpu::Reads* reads);

 private:
  std::mutex mutex_;
  std::deque<cpu::Reads> all_;
  std::vector<cpu::Reads*> free_;
};

// Threads of the library's own: a step has over a hundred nodes of a few microseconds, and helpers ask for the next
// node's weights while ONNX Runtime is between two. They end with the last node that may use them. A session that runs
// at the same time as another one uses ONNX Runtime's.
class Threads {
 public:
  explicit Threads(int count) : count_(count) {}

  // Start them if they are not there, for so many nodes, or for those of a session that is being made: none yet. Throws
  // std::runtime_error.
  void start(int64_t nodes = 0);
  // One node ends. From its `start` until then `pool` is there.
  void release();
  cpu::SpinPool& pool() const { return *pool_; }

 private:
  std::mutex mutex_;
  int count_;
  int64_t nodes_ = 0;
  std::unique_ptr<cpu::SpinPool> pool_;
};

// What kernels share. threads: as many as ONNX Runtime's pool has.
struct Library {
  Library(cpu::Isa used, int count) : isa(used), threads(count), helpers(count) {}

  cpu::Isa isa;
  int threads;
  ScratchPool scratch;
  ReadsPool reads;
  Threads helpers;
};

// One run of a node.
class Run {
 public:
  Run(const Api& api, OrtKernelContext* context, Library& library, cpu::Reads& reads);
  ~Run() { library_.scratch.release(std::move(scratch_)); }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  const void* input(size_t index) const;
  void* output(size_t index, const std::vector<int64_t>& shape) const;
  const cpu::Parallel& parallel() const { return parallel_; }
  cpu::Scratch& scratch() const { return *scratch_; }
  cpu::Reads& reads() const { return reads_; }  // the node's own

 private:
  static void runTasks(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* argument);

  const Api& api_;
  OrtKernelContext* context_;
  Library& library_;
  cpu::Reads& reads_;
  cpu::Parallel parallel_;
  std::unique_ptr<cpu::Scratch> scratch_;
};

// An input whose data is known for good if it is a constant.
class Input {
 public:
  Input() = default;
  Input(const Node& node, size_t index) : index_(index), data_(node.constant(index)) {}

  template <typename T>
  const T* of(const Run& run) const {
    return static_cast<const T*>(data_ != nullptr ? data_ : run.input(index_));
  }

 private:
  size_t index_ = 0;
  const void* data_ = nullptr;
};

// A node that is ready to run.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(Run& run) const = 0;
};

using Create = std::unique_ptr<Kernel> (*)(Node& node, const Library& library);

// An operator of a library. It lives as long as the process.
struct Operator : OrtCustomOp {
  Operator(const char* name, Create create, const Api& api, Library& library);

  const char* operator_name;
  Create create;
  const Api& api;
  Library& library;
};

// The makers, one file each.
std::unique_ptr<Kernel> createFloatLinear(Node& node, const Library& library);
std::unique_ptr<Kernel> createInt8Linear(Node& node, const Library& library);
std::unique_ptr<Kernel> createInt4Linear(Node& node, const Library& library);
std::unique_ptr<Kernel> createBf16Linear(Node& node, const Library& library);
std::unique_ptr<Kernel> createFloatRows(Node& node, const Library& library);
std::unique_ptr<Kernel> createInt8Rows(Node& node, const Library& library);
std::unique_ptr<Kernel> createInt4Rows(Node& node, const Library& library);
std::unique_ptr<Kernel> createBf16Rows(Node& node, const Library& library);
std::unique_ptr<Kernel> createFloatExpertLinear(Node& node, const Library& library);
std::unique_ptr<Kernel> createBf16ExpertLinear(Node& node, const Library& library);
std::unique_ptr<Kernel> createInt8ExpertLinear(Node& node, const Library& library);
std::unique_ptr<Kernel> createSinkAttention(Node& node, const Library& library);

}  // namespace sinkexport::ort
