#pragma once

#include <NvInferRuntime.h>

namespace sinkexport::trt {

// TensorRT's logger; null if it has none for this library. Each plugin interface finds it in its own way.
nvinfer1::ILogger* findLogger();

}  // namespace sinkexport::trt
