// A reader of the few fields of the format that say where external data lies, so that no protobuf library is needed.
// Source: onnx.proto3 (ModelProto, GraphProto, TensorProto) and the encoding of Protocol Buffers.
#include "backends/external_tensors.h"

#include <charconv>
#include <string_view>

namespace sinkrt {
namespace {

constexpr uint64_t kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;      // wire types
constexpr uint64_t kGraph = 7;                                               // of ModelProto
constexpr uint64_t kInitializer = 5;                                         // of GraphProto
constexpr uint64_t kDims = 1, kDataType = 2, kName = 8, kExternalData = 13;  // of TensorProto
constexpr uint64_t kKey = 1, kValue = 2;                                     // of StringStringEntryProto
constexpr int kMostVarintBytes = 10;

struct Malformed {};

// Reads a message field by field: next() goes to the next one. Throws Malformed if it is cut short.
class Message {
 public:
  explicit Message(std::string_view data) : rest_(data) {}

  uint64_t field = 0;
  bool is_number = false;
  uint64_t number = 0;     // if is_number
  std::string_view bytes;  // else: of strings, messages, lists and numbers of fixed size

  bool next() {
    if (rest_.empty()) return false;
    const uint64_t key = varint();
    field = key >> 3;
    is_number = (key & 7) == kVarint;
    if (is_number) {
      number = varint();
      return true;
    }
    uint64_t size = 0;
    switch (key & 7) {
      case kBytes:
        size = varint();
        break;
      case kFixed64:
        size = 8;
        break;
      case kFixed32:
        size = 4;
        break;
      default:
        throw Malformed();
    }
    if (size > rest_.size()) throw Malformed();
    bytes = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return true;
  }

  bool ends() const { return rest_.empty(); }

  // A number of seven bits a byte, the lowest first.
  uint64_t varint() {
    uint64_t value = 0;
    for (int i = 0; i < kMostVarintBytes && static_cast<size_t>(i) < rest_.size(); ++i) {
      const auto byte = static_cast<uint8_t>(rest_[static_cast<size_t>(i)]);
      value |= uint64_t{byte & 0x7fu} << (7 * i);
      if (byte < 0x80) {
        rest_.remove_prefix(static_cast<size_t>(i) + 1);
        return value;
      }
    }
    throw Malformed();
  }

 private:
  std::string_view rest_;
};

int64_t parsed(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) throw Malformed();
  return value;
}

// False: the data is in the graph itself.
bool read(Message message, ExternalTensor& out) {
  bool is_external = false;
  while (message.next()) {
    if (message.field == kDims && message.is_number) out.shape.push_back(static_cast<int64_t>(message.number));
    if (message.field == kDims && !message.is_number) {
      for (Message list(message.bytes); !list.ends();) out.shape.push_back(static_cast<int64_t>(list.varint()));
    }
    if (message.field == kDataType && message.is_number) out.data_type = static_cast<int64_t>(message.number);
    if (message.field == kName && !message.is_number) out.name = message.bytes;
    if (message.field != kExternalData || message.is_number) continue;
    std::string_view key, value;
    for (Message entry(message.bytes); entry.next();) {
      if (entry.field == kKey && !entry.is_number) key = entry.bytes;
      if (entry.field == kValue && !entry.is_number) value = entry.bytes;
    }
    if (key == "location") {
      out.file = value;
      is_external = true;
    } else if (key == "offset") {
      out.offset = parsed(value);
    } else if (key == "length") {
      out.num_bytes = parsed(value);
      if (out.num_bytes < 0) throw Malformed();
    }
  }
  return is_external;
}

}  // namespace

bool externalTensors(const std::string& model, std::vector<ExternalTensor>& out) {
  try {
    for (Message whole(model); whole.next();) {
      if (whole.field != kGraph || whole.is_number) continue;
      for (Message graph(whole.bytes); graph.next();) {
        if (graph.field != kInitializer || graph.is_number) continue;
        ExternalTensor tensor;
        if (read(Message(graph.bytes), tensor)) out.push_back(std::move(tensor));
      }
    }
    return true;
  } catch (const Malformed&) {
    return false;
  }
}

}  // namespace sinkrt
