// TensorRT 8 builds weakly typed networks: which values must stay float32 is read off the graph.
#pragma once

#include <NvInfer.h>

#include <string>

namespace sinkrt {

// Allow float16, but not where the graph says float32. Its norms do: squares of massive activations overflow float16.
// INT8 states only pass through the plugin, but TensorRT wants some range for them. graph: content of the ONNX file.
// Throws Error(kBundle) if that is truncated.
void holdPrecision(nvinfer1::INetworkDefinition& network, nvinfer1::IBuilderConfig& config, const std::string& graph);

}  // namespace sinkrt
