// The tensors of a graph that lie in other files are found, or the graph is refused.
#include <cstdint>
#include <string>
#include <vector>

#include "backends/external_tensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<sinkrt::ExternalTensor> tensors;
  sinkrt::externalTensors(std::string(reinterpret_cast<const char*>(data), size), tensors);
  return 0;
}
