// A state file is read or refused; what is read lies inside of it. SINKRT_FUZZ_BUNDLE: the bundle it is to be of.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "sinkrt/state.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const sinkrt::Manifest manifest = sinkrt::loadManifest(std::getenv("SINKRT_FUZZ_BUNDLE"));
  try {
    const sinkrt::StateFile file = sinkrt::parseState("state", std::vector<char>(data, data + size), manifest);
    unsigned sum = 0;
    for (const sinkrt::TensorSpec& spec : sinkrt::stateTensors(manifest)) {
      const char* bytes = file.tensor(spec.name);
      for (int64_t i = 0; i < spec.bytes(); ++i) sum += static_cast<unsigned char>(bytes[i]);
    }
    static volatile unsigned kept;
    kept = sum;
    (void)kept;
  } catch (const sinkrt::Error& error) {
    if (error.code() != sinkrt::Code::kState) __builtin_trap();
  }
  return 0;
}
