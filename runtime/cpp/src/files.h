// Files, read whole or in pieces, with the reason if they cannot be.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include <sys/stat.h>
#include <unistd.h>

namespace sinkrt {

struct FileCloser {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, FileCloser>;

// Bytes of a regular file; -1: there is none.
inline int64_t fileSize(const std::string& path) {
  struct stat facts{};
  return ::stat(path.c_str(), &facts) == 0 && S_ISREG(facts.st_mode) ? int64_t{facts.st_size} : -1;
}

// The content of a file. False, with the reason in `out`, if it cannot be read.
template <typename Bytes>
bool readFile(const std::string& path, Bytes& out) {
  const auto failed = [&](const char* reason) {
    out.assign(reason, reason + std::strlen(reason));
    return false;
  };
  const int64_t size = fileSize(path);
  // Before it is opened: opening a pipe waits for its other end.
  if (size < 0 && ::access(path.c_str(), F_OK) == 0) return failed("not a regular file");
  const File file(std::fopen(path.c_str(), "rb"));
  if (!file) return failed(std::strerror(errno));
  out.resize(static_cast<size_t>(size));
  if (std::fread(out.data(), 1, out.size(), file.get()) != out.size()) return failed("cut short while it was read");
  return true;
}

inline std::string joined(const std::string& folder, const std::string& name) {
  return folder.empty() || folder.back() == '/' ? folder + name : folder + "/" + name;
}

}  // namespace sinkrt
