// How a text is split into the pieces that become tokens by themselves.
#pragma once

#include <string>
#include <vector>

#include "text/finder.h"
#include "text/model.h"
#include "text/normalizer.h"

namespace sinkrt {

class PreTokenizer {
 public:
  // The "pre_tokenizer" of a file, behind a normalizer. cut: whether texts may come cut into pieces by what was found
  // after it. Throws Error(kBundle).
  void read(const TokenizerFile& file, const Json& part, const Normalizer& normalizer, bool cut);

  // Appends the ids that `model` makes of a text. at_start: whether it is the beginning of the whole text.
  void encode(std::string_view text, bool at_start, const Model& model, std::vector<int64_t>& out) const {
    split(text, at_start, 0, model, out);
  }

 private:
  enum class Behavior : uint8_t { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend : uint8_t { kAlways, kFirst, kNever };
  enum class Kind : uint8_t { kByteLevel, kMetaspace, kFinder, kCharacters, kWords };
  struct Step {
    Kind kind;
    Behavior behavior = Behavior::kIsolated;
    std::vector<Finder> finder = {};         // kByteLevel: with use_regex; kFinder: one
    bool invert = false;                     // kFinder: the rest is what is found
    bool (*characters)(uint32_t) = nullptr;  // kCharacters: which are found, each by itself
    bool prefix_space = false;               // kByteLevel
    Prepend prepend = Prepend::kNever;       // kMetaspace
    uint32_t replacement = 0;                // kMetaspace
    std::string replacement_text = {};
    bool splits = true;  // kMetaspace
  };
  struct Part {
    size_t start, end;
    bool found;
  };

  static Behavior behaviorOf(const TokenizerFile& file, const Json& part, const char* otherwise = nullptr);
  Step readStep(const TokenizerFile& file, const Json& part) const;
  Step readMetaspace(const TokenizerFile& file, const Json& part) const;

  void split(std::string_view text, bool at_start, size_t index, const Model& model, std::vector<int64_t>& out) const;
  void splitByteLevel(std::string_view text, size_t index, const Model& model, std::vector<int64_t>& out) const;
  void splitMetaspace(std::string_view text, bool at_start, size_t index, const Model& model,
                      std::vector<int64_t>& out) const;
  // Calls on_part(start, end, found) for all of a text, in order.
  template <typename OnPart>
  static void parts(const Step& step, std::string_view text, const OnPart& on_part);
  // Calls on_piece(start, end) for what a behaviour makes of parts.
  template <typename OnPiece>
  static void pieces(const Step& step, std::string_view text, const OnPiece& on_piece);
  static std::vector<Part> merged(const std::vector<Part>& parts, Behavior behavior);

  std::vector<Step> steps_;
  bool knows_start_ = true, keeps_places_ = true;  // whether "the first piece" is well defined: alone, after a cut
};

}  // namespace sinkrt
