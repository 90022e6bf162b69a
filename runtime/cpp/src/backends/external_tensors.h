// Tensors of an ONNX graph whose data lies in another file: where each is. Twin of
// runtime/sinkrt/backends/external_tensors.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sinkrt {

// An initializer of the graph: its place in a file that lies beside the graph's.
struct ExternalTensor {
  std::string name;
  int64_t data_type = 0;  // of onnx.TensorProto.DataType
  std::vector<int64_t> shape;
  std::string file;
  int64_t offset = 0;
  int64_t num_bytes = -1;  // -1: the graph does not say
};

// Initializers of the main graph with external data, in the graph's order. model: the content of an ONNX file. False
// for what is no ONNX file.
bool externalTensors(const std::string& model, std::vector<ExternalTensor>& out);

}  // namespace sinkrt
