// A tokenizer.json is read or refused; one that is read encodes and decodes anything, here its own text.
#include <cstdint>
#include <string>

#include "sinkrt/error.h"
#include "sinkrt/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    const sinkrt::Tokenizer tokenizer = sinkrt::Tokenizer::fromJson(text, "tokenizer.json");
    sinkrt::StreamingDecoder decoder(tokenizer);
    // Text that is not UTF-8 is refused; some beginning of it is.
    for (size_t length = text.size(); length > 0; length = length * 3 / 4) {
      try {
        const std::vector<int64_t> ids = tokenizer.encode(text.substr(0, length));
        tokenizer.decode(ids.data(), ids.size());
        tokenizer.encodePrompt(text.substr(0, length / 2));
        sinkrt::StreamingDecoder later(tokenizer, ids.data(), ids.size());
        for (int64_t id = 0; id < 600; ++id) later.push(id * 7 % 601);
        for (const int64_t id : ids) decoder.push(id);
        decoder.push(-1);
        decoder.push(int64_t{1} << 40);
        decoder.flush();
        break;
      } catch (const sinkrt::Error& error) {
        if (error.code() != sinkrt::Code::kUsage) __builtin_trap();
      }
    }
  } catch (const sinkrt::Error& error) {
    if (error.code() != sinkrt::Code::kBundle) __builtin_trap();
  }
  return 0;
}
