// A file that takes the place of another whole or not at all. Twin of runtime/sinkrt/files.py.
#pragma once

#include <cstddef>
#include <string>

#include "files.h"

namespace sinkrt {

// Written under ".NAME.xxxxxxxx.partial" in the folder of NAME, locked for as long as the process lives, and renamed
// once it has reached the disk. A symbolic link stays one: the file that it names is replaced. Partial files that
// killed processes left, whose lock is free, are removed.
//
// Throws Error(kUsage) if `path` is a folder, a device, a pipe or a socket, or cannot be written.
class Replacement {
 public:
  explicit Replacement(const std::string& path);
  Replacement(const Replacement&) = delete;
  Replacement& operator=(const Replacement&) = delete;
  ~Replacement();

  void write(const void* data, size_t size);
  void commit();

 private:
  [[noreturn]] void fail(int reason) const;
  [[noreturn]] void fail(const char* reason) const;
  void removeLeftovers() const;
  void open();

  std::string path_, target_, temporary_;
  File file_;
  bool done_ = false;
};

}  // namespace sinkrt
