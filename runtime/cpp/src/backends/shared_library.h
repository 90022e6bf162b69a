// Shared libraries that come as files: looked at before the loader maps them. Twin of
// runtime/sinkrt/backends/shared_library.py.
#pragma once

#include <string>

namespace sinkrt {

// dlopen's handle; null: `reason` says why. flags: as dlopen's. The loader maps segments beyond the end of a file that
// was cut short, and the first look at one ends the process: such a file is refused. name: a path, or what the loader
// looks for by itself, which is then found in LD_LIBRARY_PATH or not looked at.
void* openLibrary(const std::string& name, int flags, std::string& reason);

}  // namespace sinkrt
