#include "backends/shared_library.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <vector>

#include <dlfcn.h>

namespace sinkrt {
namespace {

constexpr size_t kHeaderBytes = 64;   // of ELF with 64-bit addresses
constexpr size_t kSegmentBytes = 56;  // of an entry of its table
constexpr uint32_t kLoaded = 1;       // kind of a segment that is mapped

template <typename T>
T at(const char* bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes + offset, sizeof value);
  return value;
}

// Bytes from the end of a file to the end of what its headers list. 0: it is whole, or not of a kind that is known
// here (ELF, 64 bits, little-endian): that is for the loader.
uint64_t missingBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char head[kHeaderBytes];
  if (!file.read(head, sizeof head) || std::memcmp(head,
                                                   "\x7f"
                                                   "ELF\x02\x01",
                                                   6) != 0)
    return 0;
  file.seekg(0, std::ios::end);
  const auto size = static_cast<uint64_t>(file.tellg());
  const auto segments = at<uint64_t>(head, 32), sections = at<uint64_t>(head, 40);
  const size_t segment_bytes = at<uint16_t>(head, 54), num_segments = at<uint16_t>(head, 56);
  const uint64_t section_bytes = at<uint16_t>(head, 58), num_sections = at<uint16_t>(head, 60);
  uint64_t end = std::max(segments + segment_bytes * num_segments, sections + section_bytes * num_sections);
  if (end > size || segment_bytes < kSegmentBytes) return end > size ? end - size : 0;
  std::vector<char> table(segment_bytes * num_segments);
  file.seekg(static_cast<std::streamoff>(segments));
  if (!file.read(table.data(), static_cast<std::streamsize>(table.size()))) return 0;
  for (size_t i = 0; i < num_segments; ++i) {
    const char* entry = table.data() + i * segment_bytes;
    if (at<uint32_t>(entry, 0) == kLoaded) end = std::max(end, at<uint64_t>(entry, 8) + at<uint64_t>(entry, 32));
  }
  return end > size ? end - size : 0;
}

// The file that a name without a slash stands for, if LD_LIBRARY_PATH has it; the name if it has a slash.
std::string fileOf(const std::string& name) {
  if (name.find('/') != std::string::npos) return name;
  const char* folders = std::getenv("LD_LIBRARY_PATH");
  std::istringstream all(folders == nullptr ? "" : folders);
  for (std::string folder; std::getline(all, folder, ':');) {
    const std::string path = (folder.empty() ? "." : folder) + "/" + name;
    if (std::ifstream(path).good()) return path;
  }
  return "";
}

}  // namespace

void* openLibrary(const std::string& name, int flags, std::string& reason) {
  if (const uint64_t missing = missingBytes(fileOf(name)); missing > 0) {
    reason = "'" + name + "' was cut short: at least " + std::to_string(missing) + " bytes are missing";
    return nullptr;
  }
  void* library = ::dlopen(name.c_str(), flags);
  if (library != nullptr) return library;
  const char* text = ::dlerror();
  reason = text == nullptr ? "no reason" : text;
  return nullptr;
}

}  // namespace sinkrt
