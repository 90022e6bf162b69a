// CUDA's runtime as sinkrt/backends/cuda.py calls it, over host memory: for tests where there is no GPU.
//
// It keeps books of what is allocated, recorded and freed, and counts in fake_mistakes what real CUDA would answer with
// corrupt memory: copies from or to what was freed or never allocated, frees of what a graph still uses, frees twice.
// Freed memory is overwritten and never handed out again, so that no later allocation hides a mistake.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  kSuccess = 0,
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidHandle = 400,
  kIllegalAddress = 700,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kHostToDevice = 1,
  kDeviceToHost = 2,
  kDeviceToDevice = 3,
  kMostBlocks = 4096,
  kMostCopies = 256,
  kAlignment = 256,
};

// What tests set.
int fake_devices = 1;
int fake_count_error = 0;
size_t fake_room_bytes = (size_t)1 << 30;
// What tests read.
int fake_mistakes = 0;
int fake_live_blocks = 0;
int fake_live_graphs = 0;
int fake_live_streams = 0;
int fake_launches = 0;
size_t fake_live_bytes = 0;  // on the device

typedef struct {
  char* address;
  size_t size;
  int on_device, live;
} Block;

typedef struct {
  char *target, *source;
  size_t size;
} Copy;

typedef struct {
  int live, count;
  Copy copies[kMostCopies];
} Graph;

static Block blocks[kMostBlocks];
static int block_count = 0;
static Graph* graphs[kMostBlocks];  // instantiated ones
static int graph_count = 0;
static Graph capture;
static int capturing = 0, capture_broken = 0, last_error = 0;

static int failed(int error) {
  last_error = error;
  return error;
}

static int mistake(int error) {
  ++fake_mistakes;
  return failed(error);
}

// What may not be called during a capture: it ends the capture too.
static int forbidden(void) {
  if (capturing) capture_broken = 1;
  return capturing;
}

static int overlaps(const Block* block, const char* start, size_t size) {
  return block->address < start + size && start < block->address + block->size;
}

static int on_device(const char* start, size_t size) {
  for (int i = 0; i < block_count; ++i) {
    const Block* block = &blocks[i];
    const int inside = block->address <= start && start + size <= block->address + block->size;
    if (inside && block->on_device && block->live) return 1;
  }
  return 0;
}

// Any memory of the process, but not the device's nor what was freed.
static int on_host(const char* start, size_t size) {
  for (int i = 0; i < block_count; ++i) {
    if (overlaps(&blocks[i], start, size) && (blocks[i].on_device || !blocks[i].live)) return 0;
  }
  return 1;
}

static int copied(char* target, const char* source, size_t size, int kind) {
  const int fits = (kind == kHostToDevice ? on_host(source, size) : on_device(source, size)) &&
                   (kind == kDeviceToHost ? on_host(target, size) : on_device(target, size));
  if (!fits) return mistake(kIllegalAddress);
  memmove(target, source, size);
  return kSuccess;
}

static int allocated(void** address, size_t size, int device) {
  if (forbidden()) return failed(kCaptureUnsupported);
  const int full = device && fake_live_bytes + size > fake_room_bytes;
  if (full || block_count == kMostBlocks) return failed(kMemoryAllocation);
  char* memory = aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
  if (memory == NULL) return failed(kMemoryAllocation);
  memset(memory, 0xAB, size);
  blocks[block_count++] = (Block){memory, size, device, 1};
  ++fake_live_blocks;
  if (device) fake_live_bytes += size;
  *address = memory;
  return kSuccess;
}

static int freed(const char* address, int device) {
  if (forbidden()) return failed(kCaptureUnsupported);
  for (int i = 0; i < block_count; ++i) {
    Block* block = &blocks[i];
    if (block->address != address) continue;
    if (!block->live || block->on_device != device) return mistake(kInvalidValue);
    for (int g = 0; g < graph_count; ++g) {
      for (int c = 0; graphs[g]->live && c < graphs[g]->count; ++c) {
        const Copy* copy = &graphs[g]->copies[c];
        if (overlaps(block, copy->target, copy->size) || overlaps(block, copy->source, copy->size)) ++fake_mistakes;
      }
    }
    memset(block->address, 0xEE, block->size);
    block->live = 0;
    --fake_live_blocks;
    if (device) fake_live_bytes -= block->size;
    return kSuccess;
  }
  return mistake(kInvalidValue);
}

int cudaGetDeviceCount(int* count) {
  *count = fake_count_error ? 0 : fake_devices;
  return fake_count_error ? failed(fake_count_error) : kSuccess;
}

int cudaSetDevice(int device) {
  return device < fake_devices ? kSuccess : failed(kInvalidValue);
}

int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 9 : 0;
  return kSuccess;
}

int cudaGetLastError(void) {
  const int error = last_error;
  last_error = 0;
  return error;
}

const char* cudaGetErrorString(int error) {
  return error == 35 ? "CUDA driver version is insufficient for CUDA runtime version" : "an error of the fake";
}

int cudaMalloc(void** address, size_t size) {
  return allocated(address, size, 1);
}

int cudaFree(void* address) {
  return freed(address, 1);
}

int cudaHostAlloc(void** address, size_t size, unsigned flags) {
  (void)flags;
  return allocated(address, size, 0);
}

int cudaFreeHost(void* address) {
  return freed(address, 0);
}

int cudaMemset(void* address, int value, size_t size) {
  if (forbidden()) return failed(kCaptureUnsupported);
  if (!on_device(address, size)) return mistake(kIllegalAddress);
  memset(address, value, size);
  return kSuccess;
}

int cudaMemcpy(void* target, const void* source, size_t size, int kind) {
  return forbidden() ? failed(kCaptureUnsupported) : copied(target, source, size, kind);
}

int cudaMemcpyAsync(void* target, const void* source, size_t size, int kind, void* stream) {
  if (stream == NULL) return mistake(kInvalidHandle);
  if (!capturing) return copied(target, source, size, kind);
  if (kind != kDeviceToDevice || capture.count == kMostCopies) return failed(kInvalidValue);
  capture.copies[capture.count++] = (Copy){target, (char*)(uintptr_t)source, size};
  return kSuccess;
}

int cudaStreamCreate(void** stream) {
  *stream = malloc(1);
  ++fake_live_streams;
  return kSuccess;
}

int cudaStreamDestroy(void* stream) {
  if (--fake_live_streams == 0 && (fake_live_graphs || fake_live_bytes)) return mistake(kInvalidHandle);
  free(stream);
  return kSuccess;
}

int cudaStreamSynchronize(void* stream) {
  (void)stream;
  return forbidden() ? failed(kCaptureUnsupported) : kSuccess;
}

int cudaStreamBeginCapture(void* stream, int mode) {
  (void)stream, (void)mode;
  if (capturing) return mistake(kInvalidHandle);
  capturing = 1;
  capture_broken = capture.count = 0;
  return kSuccess;
}

int cudaStreamEndCapture(void* stream, void** graph) {
  (void)stream;
  *graph = NULL;
  if (!capturing) return mistake(kInvalidHandle);
  capturing = 0;
  if (capture_broken) return failed(kCaptureInvalidated);
  Graph* made = malloc(sizeof *made);
  *made = capture;
  *graph = made;
  ++fake_live_graphs;
  return kSuccess;
}

int cudaGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  (void)flags;
  if (graph == NULL || graph_count == kMostBlocks) return failed(kInvalidValue);
  Graph* made = malloc(sizeof *made);
  *made = *(Graph*)graph;
  made->live = 1;
  graphs[graph_count++] = made;
  *executable = made;
  ++fake_live_graphs;
  return kSuccess;
}

int cudaGraphDestroy(void* graph) {
  free(graph);
  --fake_live_graphs;
  return kSuccess;
}

int cudaGraphLaunch(void* executable, void* stream) {
  const Graph* graph = executable;
  if (!graph->live || stream == NULL) return mistake(kInvalidHandle);
  ++fake_launches;
  int error = kSuccess;
  for (int i = 0; i < graph->count && !error; ++i) {
    error = copied(graph->copies[i].target, graph->copies[i].source, graph->copies[i].size, kDeviceToDevice);
  }
  return error;
}

int cudaGraphExecDestroy(void* executable) {
  Graph* graph = executable;
  if (!graph->live) return mistake(kInvalidHandle);
  graph->live = 0;
  --fake_live_graphs;
  return kSuccess;
}
