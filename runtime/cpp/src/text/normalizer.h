// What a text becomes before it is split: normal forms, replacements, what is put before it.
#pragma once

#include <string>
#include <vector>

#include "text/characters_map.h"
#include "text/finder.h"
#include "text/unicode.h"

namespace sinkrt {

class Normalizer {
 public:
  // The "normalizer" of a file. Throws Error(kBundle).
  void read(const TokenizerFile& file, const Json& part);

  bool isNone() const { return steps_.empty(); }
  // Whether no character becomes several, so that a piece inside the result is no part of the text's first character.
  bool keepsPlaces() const { return !expands_; }
  // Whether `apply` depends on the beginning.
  bool followsStart() const { return follows_start_; }
  // Changes `text` in place. at_start: whether it begins where the whole text does; after it, whether what is first
  // now still counts as that beginning for the library, which follows each character's origin.
  void apply(std::string& text, bool& at_start) const;

 private:
  enum class Kind : uint8_t { kForm, kLower, kStripMarks, kStrip, kPrepend, kReplace, kMap };
  struct Step {
    Kind kind;
    Form form = Form::kNfc;
    bool left = false, right = false;     // kStrip
    std::vector<Finder> finder = {};      // kReplace: one
    std::vector<CharactersMap> map = {};  // kMap: one
    std::string content = {};             // kPrepend, kReplace
  };

  static void strip(const Step& step, std::string& text, bool& at_start);

  std::vector<Step> steps_;
  bool expands_ = false, follows_start_ = true;
};

}  // namespace sinkrt
