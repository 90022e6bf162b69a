// The manifest's file list compared with the disk.
#include <cstdio>
#include <cstring>
#include <vector>

#include "bundle/checks.h"
#include "bundle/sha256.h"
#include "files.h"
#include "sinkrt/manifest.h"

namespace sinkrt {

FileFacts hashFile(const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"));
  if (!file) refuse("'" + path + "'", std::strerror(errno), "a readable file", "check its permissions");
  Sha256 digest;
  int64_t size = 0;
  std::vector<char> piece(size_t{1} << 20);
  while (const size_t count = std::fread(piece.data(), 1, piece.size(), file.get())) {
    digest.add(piece.data(), count);
    size += static_cast<int64_t>(count);
  }
  if (std::ferror(file.get())) {
    refuse("'" + path + "'", "an error while it was read", "a readable file", "copy it again");
  }
  return {size, digest.hex()};
}

void checkFiles(const std::string& bundle, const Manifest& manifest, bool hashes) {
  for (const auto& [name, facts] : manifest.files) {
    const std::string path = joined(bundle, name);
    const int64_t size = fileSize(path);
    if (size < 0) refuse(name, "no such file", "every file of the bundle", "copy the whole folder");
    if (size != facts.bytes) {
      refuse(name, std::to_string(size) + " bytes", std::to_string(facts.bytes) + " bytes", "copy or export it again");
    }
    if (!hashes) continue;
    const std::string found = hashFile(path).sha256;
    if (found != facts.sha256) {
      refuse(name, "sha256 " + found.substr(0, 12) + "..", facts.sha256.substr(0, 12) + "..",
             "the file is corrupt: copy or export it again");
    }
  }
}

}  // namespace sinkrt
