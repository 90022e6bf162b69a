#include "sinkrt/state.h"

#include <algorithm>

#include "bundle/json.h"
#include "bundle/json_fields.h"
#include "bundle/schema.h"
#include "files.h"
#include "text/replacement.h"

namespace sinkrt {
namespace {

const char* safetensorsDtype(const std::string& dtype) {
  for (const Dtype& known : kDtypes) {
    if (dtype == known.name) return known.safetensors;
  }
  return "";
}

[[noreturn]] void refuseFile(const std::string& path, const std::string& reason) {
  throw Error(Code::kState, problem("state file", "'" + path + "' (" + reason + ")",
                                    "a whole file that save_state wrote", "use another save"));
}

std::string baseName(const std::string& path) {
  return path.substr(path.rfind('/') + 1);
}

void checkMetadata(const std::string& name, const Json* metadata, const Manifest& manifest) {
  const struct {
    const char* key;
    std::string wanted;
    const char* fix;
  } checks[] = {
      {"format", kStateFormat, "use a file that save_state wrote"},
      {"version", kStateVersion, "use the sinkexport version that saved it"},
      {"fingerprint", manifest.fingerprint(), "it is of another model, window or batch: use the bundle that saved it"},
  };
  for (const auto& [key, wanted, fix] : checks) {
    const Json* found = metadata == nullptr ? nullptr : metadata->find(key);
    const std::string text = found == nullptr || !found->isString() ? "nothing" : found->text;
    if (text == wanted) continue;
    throw Error(Code::kState,
                problem("state file '" + baseName(name) + "': " + key, text.substr(0, 16), wanted.substr(0, 16), fix));
  }
}

std::string shown(const std::string& dtype, const std::vector<int64_t>& shape) {
  std::string out = dtype + " [";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// int64 values number `first` .. `first + count - 1` of a tensor.
void checkRange(const StateFile& file, const std::string& name, int64_t first, int64_t count, int64_t low,
                int64_t high) {
  const char* bytes = file.tensor(name);
  for (int64_t i = first; i < first + count; ++i) {
    int64_t value;
    std::memcpy(&value, bytes + 8 * i, 8);
    if (low <= value && value <= high) continue;
    throw Error(Code::kState, problem("state '" + name + "'", std::to_string(value),
                                      std::to_string(low) + " .. " + std::to_string(high), "use another save"));
  }
}

// Positions, and an id for each token that the cache spans: token t is at t mod C.
void checkStreams(const StateFile& file, const Manifest& manifest) {
  const StreamFacts& stream = manifest.stream;
  const int64_t capacity = stream.capacity(), last_id = manifest.model.vocab_size - 1;
  checkRange(file, "position", 0, stream.batch, 0, stream.position_limit);
  checkRange(file, "recent_ids", 0, stream.batch * capacity, -1, last_id);
  for (int64_t i = 0; i < stream.batch; ++i) {
    int64_t position;
    std::memcpy(&position, file.tensor("position") + 8 * i, 8);
    checkRange(file, "recent_ids", i * capacity, std::min(position, capacity), 0, last_id);
  }
}

}  // namespace

std::vector<TensorSpec> stateTensors(const Manifest& manifest) {
  const StreamFacts& stream = manifest.stream;
  std::vector<TensorSpec> out;
  for (const StateSpec& state : manifest.states) out.push_back(state.tensor());
  out.push_back({"position", {stream.batch}, "int64"});
  out.push_back({"recent_ids", {stream.batch, stream.capacity()}, "int64"});
  out.push_back({"logits", {stream.batch, manifest.model.vocab_size}, "float32"});
  return out;
}

void checkStateTarget(const std::string& path) {
  Replacement file(path);
}

void saveState(const std::string& path, const Manifest& manifest,
               const std::function<void(size_t index, void* target)>& read) {
  const std::vector<TensorSpec> tensors = stateTensors(manifest);
  // Wide elements first, so that every tensor is aligned to its element.
  std::vector<size_t> order(tensors.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const int64_t wide_a = dtypeBytes(tensors[a].dtype), wide_b = dtypeBytes(tensors[b].dtype);
    return wide_a != wide_b ? wide_a > wide_b : tensors[a].name < tensors[b].name;
  });
  Json tree = Json::object(), metadata = Json::object();
  metadata.add("format", toJson(kStateFormat));
  metadata.add("version", toJson(kStateVersion));
  metadata.add("fingerprint", toJson(manifest.fingerprint()));
  tree.add("__metadata__", std::move(metadata));
  int64_t start = 0, largest = 0;
  for (const size_t i : order) {
    const TensorSpec& spec = tensors[i];
    const int64_t end = start + spec.bytes();
    Json entry = Json::object();
    entry.add("dtype", toJson(safetensorsDtype(spec.dtype)));
    entry.add("shape", toJson(spec.shape));
    entry.add("data_offsets", toJson(std::vector<int64_t>{start, end}));
    tree.add(spec.name, std::move(entry));
    start = end;
    largest = std::max(largest, spec.bytes());
  }
  std::string header = dumpJson(tree);
  header.append((8 - header.size() % 8) % 8, ' ');
  unsigned char size[8];  // little-endian
  for (int i = 0; i < 8; ++i) size[i] = static_cast<unsigned char>(uint64_t{header.size()} >> (8 * i));

  std::vector<char> buffer(static_cast<size_t>(largest));
  Replacement file(path);
  file.write(size, sizeof size);
  file.write(header.data(), header.size());
  for (const size_t i : order) {
    read(i, buffer.data());
    file.write(buffer.data(), static_cast<size_t>(tensors[i].bytes()));
  }
  file.commit();
}

StateFile readState(const std::string& path, const Manifest& manifest) {
  std::vector<char> content;
  if (!readFile(path, content)) refuseFile(path, std::string(content.begin(), content.end()));
  return parseState(path, std::move(content), manifest);
}

StateFile parseState(const std::string& name, std::vector<char> content, const Manifest& manifest) {
  StateFile file{std::move(content), {}};
  const size_t total = file.content.size();
  if (total < 8) refuseFile(name, "shorter than a header");
  uint64_t header_size = 0;
  for (int i = 0; i < 8; ++i) header_size |= uint64_t{static_cast<uint8_t>(file.content[i])} << (8 * i);
  if (header_size > total - 8) refuseFile(name, "shorter than its header says");
  Json header;
  try {
    header = parseJson({file.content.data() + 8, static_cast<size_t>(header_size)});
  } catch (const JsonError& error) {
    refuseFile(name, error.what());
  }
  if (!header.isObject()) refuseFile(name, "a header that is no object");
  checkMetadata(name, header.find("__metadata__"), manifest);

  const std::vector<TensorSpec> tensors = stateTensors(manifest);
  const size_t first = 8 + static_cast<size_t>(header_size), data_size = total - first;
  size_t used = 0;
  for (const TensorSpec& spec : tensors) {
    const Json* found = header.find(spec.name);
    const Json* dtype = found == nullptr ? nullptr : found->find("dtype");
    const Json* shape = found == nullptr ? nullptr : found->find("shape");
    const Json* offsets = found == nullptr ? nullptr : found->find("data_offsets");
    const auto integers = [](const Json* list) {
      std::vector<int64_t> out;
      for (const Json& item : list->items) out.push_back(item.type == Json::Type::kInt ? item.integer : -1);
      return out;
    };
    std::string received = "nothing";
    if (dtype != nullptr && shape != nullptr && offsets != nullptr) received = shown(dtype->text, integers(shape));
    const std::string wanted = shown(safetensorsDtype(spec.dtype), spec.shape);
    if (received != wanted) {
      throw Error(Code::kState,
                  problem("state '" + spec.name + "'", received, wanted, "use a state that this bundle saved"));
    }
    const std::vector<int64_t> range = integers(offsets);
    const int64_t bytes = spec.bytes();
    if (range.size() != 2 || range[0] < 0 || range[1] < range[0] || range[1] - range[0] != bytes ||
        static_cast<uint64_t>(range[1]) > data_size) {
      refuseFile(name, "'" + spec.name + "' lies outside of the file");
    }
    file.starts[spec.name] = first + static_cast<size_t>(range[0]);
    used += static_cast<size_t>(bytes);
  }
  for (const auto& member : header.members) {
    if (member.first != "__metadata__" && file.starts.count(member.first) == 0) {
      throw Error(Code::kState,
                  problem("state '" + member.first + "'", "a tensor", "nothing", "use a state that this bundle saved"));
    }
  }
  if (used != data_size) refuseFile(name, "more bytes than its tensors have");
  checkStreams(file, manifest);
  return file;
}

}  // namespace sinkrt
