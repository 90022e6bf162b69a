#include "backends/weights.h"

#include <algorithm>
#include <set>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "files.h"

namespace sinkrt {
namespace {

// Types of onnx.TensorProto.DataType that weights of a bundle have, which are ONNX Runtime's numbers too.
struct ElementType {
  int64_t type;
  int64_t bytes;
};
constexpr ElementType kElementTypes[] = {{1, 4}, {2, 1}, {3, 1}, {6, 4}, {7, 8}, {9, 1}, {10, 2}};

int64_t elementBytes(int64_t type) {
  for (const auto& [number, bytes] : kElementTypes) {
    if (type == number) return bytes;
  }
  return 0;
}

// Bytes of a tensor; 0: it is empty, of another type, or larger than any file.
int64_t tensorBytes(const ExternalTensor& tensor) {
  int64_t bytes = elementBytes(tensor.data_type);
  for (const int64_t size : tensor.shape) {
    if (size <= 0 || bytes > kMaxTensorBytes / size) return 0;
    bytes *= size;
  }
  return bytes;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const int64_t bytes = fileSize(path);
  if (bytes <= 0) return;
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return;
  void* data = ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ, MAP_SHARED, file, 0);
  ::close(file);
  if (data == MAP_FAILED) return;
  data_ = static_cast<char*>(data);
  bytes_ = bytes;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, static_cast<size_t>(bytes_));
}

void SharedWeights::give(const std::string& graph_file, OrtSessionOptions* options) {
  std::string model;
  std::vector<ExternalTensor> tensors;
  if (!readFile(joined(bundle_, graph_file), model) || !externalTensors(model, tensors)) return;
  std::set<std::string> names;
  for (const ExternalTensor& tensor : tensors) names.insert(tensor.name);
  if (names.size() != tensors.size()) return;
  OrtMemoryInfo* made = nullptr;
  api_.call<ort::CreateCpuMemoryInfo>(ort::kDeviceAllocator, ort::kDefaultMemory, &made);
  const OrtOwned<OrtMemoryInfo, ort::ReleaseMemoryInfo> memory(api_, made);
  for (const ExternalTensor& tensor : tensors) {
    const int64_t bytes = tensorBytes(tensor);
    char* data = find(tensor, bytes);
    if (data == nullptr) continue;
    OrtValue* value = nullptr;
    api_.call<ort::CreateTensorWithDataAsOrtValue>(made, data, static_cast<size_t>(bytes), tensor.shape.data(),
                                                   tensor.shape.size(), static_cast<int>(tensor.data_type), &value);
    values_.emplace_back(api_, value);
    api_.call<ort::AddInitializer>(options, tensor.name.c_str(), static_cast<const OrtValue*>(value));
  }
}

char* SharedWeights::find(const ExternalTensor& tensor, int64_t bytes) {
  if (bytes == 0 || (tensor.num_bytes >= 0 && tensor.num_bytes != bytes)) return nullptr;
  if (manifest_.files.count(tensor.file) == 0) return nullptr;
  std::unique_ptr<MappedFile>& file = files_[tensor.file];
  if (file == nullptr) file = std::make_unique<MappedFile>(joined(bundle_, tensor.file));
  const bool fits = tensor.offset >= 0 && bytes <= file->bytes() && tensor.offset <= file->bytes() - bytes &&
                    tensor.offset % elementBytes(tensor.data_type) == 0;
  return fits ? file->data() + tensor.offset : nullptr;
}

}  // namespace sinkrt
