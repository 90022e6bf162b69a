// Weights of a bundle on the CPU: each file mapped once in the process, for all of its graphs. Twin of
// runtime/sinkrt/backends/weights.py.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/external_tensors.h"
#include "backends/ort_api.h"
#include "sinkrt/manifest.h"

namespace sinkrt {

// A file in memory, read only: as it was when it was mapped, even if another takes its name.
class MappedFile {
 public:
  // Where it cannot be mapped, bytes() is 0.
  explicit MappedFile(const std::string& path);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Weights that several graphs read from one mapping. It must live as long as the sessions that it was given to.
//
// A tensor that does not fit its file, or is of another type, is not shared: ONNX Runtime reads it itself, or refuses
// the graph.
class SharedWeights {
 public:
  SharedWeights(const OrtApi& api, const std::string& bundle, const Manifest& manifest)
      : api_(api), bundle_(bundle), manifest_(manifest) {}

  // Lets a session that is made with `options` use these weights. graph_file: of the bundle. Throws OrtFailure.
  void give(const std::string& graph_file, OrtSessionOptions* options);

 private:
  // Where the tensor lies; null: it cannot be shared.
  char* find(const ExternalTensor& tensor, int64_t bytes);

  const OrtApi& api_;
  const std::string bundle_;
  const Manifest& manifest_;
  std::map<std::string, std::unique_ptr<MappedFile>> files_;
  std::vector<OrtOwned<OrtValue, ort::ReleaseValue>> values_;
};

}  // namespace sinkrt
