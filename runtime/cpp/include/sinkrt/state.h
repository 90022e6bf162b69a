// Save and load a session's streams as safetensors: the files of runtime/sinkrt/state.py, in both directions.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "sinkrt/manifest.h"

namespace sinkrt {

// The tensors of a state file: the states by input name, then position, recent_ids and logits.
std::vector<TensorSpec> stateTensors(const Manifest& manifest);

// Make sure that `saveState` can write `path`: before hours of streaming, not after them. Throws Error(kUsage).
void checkStateTarget(const std::string& path);

// Write a state file, whole or not at all. read: copies the tensor of this index in `stateTensors` to the buffer.
// Throws Error(kUsage) if the file cannot be written.
void saveState(const std::string& path, const Manifest& manifest,
               const std::function<void(size_t index, void* target)>& read);

// A checked state file: its content, and where in it each tensor of `stateTensors` begins.
struct StateFile {
  std::vector<char> content;
  std::map<std::string, size_t> starts;

  const char* tensor(const std::string& name) const { return content.data() + starts.at(name); }
};

// Throws Error(kState) if the file is missing, truncated, of another version or of another bundle.
StateFile readState(const std::string& path, const Manifest& manifest);
// The same of a file's content; `name` is for messages.
StateFile parseState(const std::string& name, std::vector<char> content, const Manifest& manifest);

}  // namespace sinkrt
