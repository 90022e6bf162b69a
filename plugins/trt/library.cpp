// What the plugin library exports besides its creators, and where its messages go.
#include "library.h"

#include <cstdio>

#include "operator.h"
#include "sinkrt/constants.h"

#define SINKEXPORT_API extern "C" __attribute__((visibility("default")))

// Changes whenever an engine that was built with this library could not run with another one.
SINKEXPORT_API const char* sinkexport_plugin_abi() {
  return sinkrt::kPluginAbi;
}

// The TensorRT whose headers it was compiled against: its major version decides which loads it.
SINKEXPORT_API int sinkexport_plugin_tensorrt_major() {
  return NV_TENSORRT_MAJOR;
}

namespace sinkexport::trt {

void logError(const char* name, const std::string& line) {
  const std::string text = std::string(name) + " plugin: " + line;
  if (nvinfer1::ILogger* logger = findLogger()) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
  } else {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
}

}  // namespace sinkexport::trt
