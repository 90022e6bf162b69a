// How texts of tokens become one text: the "decoder" of a file, a chain of parts.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/finder.h"

namespace sinkrt {

// Some texts, one after the other.
struct Pieces {
  std::string text;
  std::vector<size_t> ends;  // of each, in `text`

  void clear() {
    text.clear();
    ends.clear();
  }
  void add(std::string_view piece) {
    text.append(piece);
    ends.push_back(text.size());
  }
};

class Decoder {
 public:
  // What a chain works in. Nothing is allocated in it after `reserve`.
  struct Work {
    Pieces in, out;
    std::string bytes;
  };

  // Throws Error(kBundle).
  void read(const TokenizerFile& file, const Json& part);

  // What `run` takes of a token: what the chain's first parts make of each by itself.
  std::string prepared(const std::string& token) const;
  // Turns work.in into one text, valid until work changes.
  std::string_view run(Work& work) const;
  // Makes room for `count` tokens of at most `longest` bytes, as prepared.
  void reserve(Work& work, size_t count, size_t longest) const;

 private:
  enum class Kind : uint8_t { kReplace, kByteFallback, kFuse, kStrip, kMetaspace, kByteLevel, kJoinBytes };
  struct Step {
    Kind kind;
    std::vector<Finder> finder = {};  // kReplace: one
    std::string content = {};         // kReplace
    std::string character = {};       // kStrip, kMetaspace
    size_t start = 0, stop = 0;       // kStrip: how many at most
    bool drops_first = false;         // kMetaspace: those of the first token
  };

  Step readStep(const TokenizerFile& file, const Json& part) const;
  static void apply(const Step& step, Work& work);
  static void byteFallback(const Pieces& in, Pieces& out);
  static void strip(const Step& step, std::string_view token, Pieces& out);

  std::vector<Step> first_;  // done by `prepared`
  std::vector<Step> steps_;
};

}  // namespace sinkrt
