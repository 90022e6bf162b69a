// A manifest is read or refused; one that is read can be used.
#include <cstdint>
#include <string>

#include "sinkrt/backend.h"
#include "sinkrt/state.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const sinkrt::Manifest manifest =
        sinkrt::Manifest::fromJson(std::string(reinterpret_cast<const char*>(data), size));
    manifest.fingerprint();
    manifest.stateBytes();
    manifest.weightsBytes();
    sinkrt::stateTensors(manifest);
    sinkrt::checkGraphs(manifest);
  } catch (const sinkrt::Error& error) {
    if (error.code() != sinkrt::Code::kBundle) __builtin_trap();
  }
  return 0;
}
