// A reader of the few fields of the format that say where external data lies and who reads it, so that no protobuf
// library is needed. Source: onnx.proto3 (ModelProto, GraphProto, NodeProto, TensorProto) and the encoding of Protocol
// Buffers.
#include "backends/external_tensors.h"

#include <charconv>
#include <set>
#include <string_view>
#include <utility>

namespace sinkrt {
namespace {

constexpr uint64_t kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;      // wire types
constexpr uint64_t kGraph = 7;                                               // of ModelProto
constexpr uint64_t kNode = 1, kInitializer = 5, kOutput = 12;                // of GraphProto
constexpr uint64_t kInput = 1, kAttribute = 5, kDomain = 7;                  // of NodeProto
constexpr uint64_t kSubgraph = 6, kSubgraphs = 11;                           // of AttributeProto
constexpr uint64_t kValueName = 1;                                           // of ValueInfoProto
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

struct Node {
  std::string_view domain;
  std::vector<std::string_view> inputs, subgraphs;
};

Node readNode(Message message) {
  Node node;
  while (message.next()) {
    if (message.is_number) continue;
    if (message.field == kInput) node.inputs.push_back(message.bytes);
    if (message.field == kDomain) node.domain = message.bytes;
    if (message.field != kAttribute) continue;
    for (Message attribute(message.bytes); attribute.next();) {
      const bool is_graph = attribute.field == kSubgraph || attribute.field == kSubgraphs;
      if (is_graph && !attribute.is_number) node.subgraphs.push_back(attribute.bytes);
    }
  }
  return node;
}

// Names that nodes of a domain read, and those that others do.
struct Readers {
  std::set<std::string_view> by_domain, by_others;

  bool domainAlone(std::string_view name) const { return by_domain.count(name) != 0 && by_others.count(name) == 0; }
};

Readers readersIn(const std::vector<std::string_view>& main, std::string_view domain) {
  Readers readers;
  // What is left to read, as graphs may be nested deeply: a graph, and whether it is a subgraph.
  std::vector<std::pair<std::string_view, bool>> graphs;
  for (const std::string_view graph : main) graphs.emplace_back(graph, false);
  while (!graphs.empty()) {
    const auto [data, is_subgraph] = graphs.back();
    graphs.pop_back();
    for (Message graph(data); graph.next();) {
      if (graph.is_number) continue;
      if (graph.field == kNode) {
        const Node node = readNode(Message(graph.bytes));
        auto& names = node.domain == domain && !is_subgraph ? readers.by_domain : readers.by_others;
        names.insert(node.inputs.begin(), node.inputs.end());
        for (const std::string_view subgraph : node.subgraphs) graphs.emplace_back(subgraph, true);
      } else if (graph.field == kOutput) {
        for (Message output(graph.bytes); output.next();) {
          if (output.field == kValueName && !output.is_number) readers.by_others.insert(output.bytes);
        }
      }
    }
  }
  return readers;
}

}  // namespace

bool externalTensors(const std::string& model, std::string_view domain, std::vector<ExternalTensor>& out) {
  try {
    std::vector<std::string_view> graphs;
    for (Message whole(model); whole.next();) {
      if (whole.field == kGraph && !whole.is_number) graphs.push_back(whole.bytes);
    }
    const Readers readers = readersIn(graphs, domain);
    for (const std::string_view data : graphs) {
      for (Message graph(data); graph.next();) {
        if (graph.field != kInitializer || graph.is_number) continue;
        ExternalTensor tensor;
        if (read(Message(graph.bytes), tensor) && readers.domainAlone(tensor.name)) out.push_back(std::move(tensor));
      }
    }
    return true;
  } catch (const Malformed&) {
    return false;
  }
}

}  // namespace sinkrt
