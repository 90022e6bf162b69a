#include "text/pre_tokenizer.h"

#include <algorithm>

#include "text/byte_names.h"
#include "text/unicode.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

// GPT-2's, which ByteLevel applies if use_regex is set.
constexpr const char* kByteLevel = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

}  // namespace

PreTokenizer::Behavior PreTokenizer::behaviorOf(const TokenizerFile& file, const Json& part, const char* otherwise) {
  const std::string name = part.find("behavior") == nullptr && otherwise != nullptr ? std::string(otherwise)
                                                                                    : file.needText(part, "behavior");
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  file.refuse("the behavior '" + name + "'", "Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous");
}

void PreTokenizer::read(const TokenizerFile& file, const Json& part, const Normalizer& normalizer, bool cut) {
  keeps_places_ = normalizer.keepsPlaces();
  knows_start_ = normalizer.followsStart() && (keeps_places_ || !cut);
  for (const Json* item : file.flattened(part, "pretokenizers")) steps_.push_back(readStep(file, *item));
}

PreTokenizer::Step PreTokenizer::readStep(const TokenizerFile& file, const Json& part) const {
  const std::string type = file.typeOf(part);
  Step step{Kind::kCharacters};
  if (type == "ByteLevel") {
    file.checkMembers(part, {"add_prefix_space", "trim_offsets", "use_regex"});
    step.kind = Kind::kByteLevel;
    step.prefix_space = file.flag(part, "add_prefix_space", false);
    if (file.flag(part, "use_regex", true)) step.finder.emplace_back(Pattern(kByteLevel));
  } else if (type == "Metaspace") {
    return readMetaspace(file, part);
  } else if (type == "Split") {
    file.checkMembers(part, {"pattern", "behavior", "invert"});
    step.kind = Kind::kFinder;
    step.finder.push_back(Finder::read(file, file.need(part, "pattern")));
    step.behavior = behaviorOf(file, part);
    step.invert = file.flag(part, "invert", false);
  } else if (type == "Digits") {
    file.checkMembers(part, {"individual_digits"});
    step.characters = isNumeric;
    step.behavior = file.flag(part, "individual_digits", false) ? Behavior::kIsolated : Behavior::kContiguous;
  } else if (type == "Punctuation") {
    file.checkMembers(part, {"behavior"});
    step.characters = isPunctuation;
    step.behavior = behaviorOf(file, part, "Isolated");
  } else if (type == "WhitespaceSplit") {
    file.checkMembers(part, {});
    step.characters = isSpace;
    step.behavior = Behavior::kRemoved;
  } else if (type == "Whitespace") {
    file.checkMembers(part, {});
    step.kind = Kind::kWords;
    step.behavior = Behavior::kRemoved;
  } else {
    file.refuse("a pre-tokenizer of type '" + type + "'",
                "ByteLevel, Metaspace, Split, Digits, Punctuation, Whitespace, WhitespaceSplit, Sequence");
  }
  return step;
}

PreTokenizer::Step PreTokenizer::readMetaspace(const TokenizerFile& file, const Json& part) const {
  file.checkMembers(part, {"replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
  Step step{Kind::kMetaspace};
  step.replacement = file.needCharacter(part, "replacement");
  appendUtf8(step.replacement_text, step.replacement);
  step.behavior = Behavior::kMergedWithNext;
  step.splits = file.flag(part, "split", true);
  const std::string scheme = part.find("prepend_scheme") == nullptr ? "always" : file.needText(part, "prepend_scheme");
  if (scheme != "always" && scheme != "first" && scheme != "never") {
    file.refuse("the prepend_scheme '" + scheme + "'", "always, first, never");
  }
  step.prepend = scheme == "always" ? Prepend::kAlways : scheme == "first" ? Prepend::kFirst : Prepend::kNever;
  if (!file.flag(part, "add_prefix_space", true) && step.prepend != Prepend::kNever) {
    file.refuse("a Metaspace that both adds a space and does not", "one or the other");
  }
  if (step.prepend == Prepend::kFirst && (!knows_start_ || (!keeps_places_ && !steps_.empty()))) {
    file.refuse("a Metaspace of the first piece, after parts that leave open which is first", "a simpler normalizer");
  }
  const bool after_bytes =
      std::any_of(steps_.begin(), steps_.end(), [](const Step& s) { return s.kind == Kind::kByteLevel; });
  if (after_bytes) file.refuse("a Metaspace after ByteLevel", "one of them");
  return step;
}

template <typename OnPart>
void PreTokenizer::parts(const Step& step, std::string_view text, const OnPart& on_part) {
  size_t start = 0;
  if (step.kind == Kind::kFinder) {
    while (const auto found = step.finder[0].find(text, start)) {
      if (found->first > start) on_part(start, found->first, step.invert);
      on_part(found->first, found->second, !step.invert);
      start = found->second;
    }
    if (start < text.size()) on_part(start, text.size(), step.invert);
    return;
  }
  // Characters by themselves, or runs: of words, of what is neither word nor space.
  const auto classOf = [&](uint32_t code) {
    if (step.kind == Kind::kCharacters) return step.characters(code) ? 1 : 0;
    return isPlainWord(code) ? 2 : isSpace(code) ? 1 : 3;  // 1: what is between
  };
  int current = 0;
  for (size_t at = 0; at < text.size();) {
    const Utf8Step next = nextUtf8(text.substr(at));
    const int cls = classOf(next.code);
    if (at > start && (cls != current || (cls == 1 && step.kind == Kind::kCharacters))) {
      on_part(start, at, current == 1);
      start = at;
    }
    current = cls;
    at += next.size;
  }
  if (start < text.size()) on_part(start, text.size(), current == 1);
}

// As the library folds them: what is found joins a neighbour unless the part before it in that direction was found too.
std::vector<PreTokenizer::Part> PreTokenizer::merged(const std::vector<Part>& parts, Behavior behavior) {
  std::vector<Part> out;
  bool previous = false;
  const bool backwards = behavior == Behavior::kMergedWithNext;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[backwards ? parts.size() - 1 - i : i];
    const bool joins = behavior == Behavior::kContiguous ? part.found == previous : part.found && !previous;
    if (!joins || out.empty()) {
      out.push_back(part);
    } else if (backwards) {
      out.back().start = part.start;
    } else {
      out.back().end = part.end;
    }
    previous = part.found;
  }
  if (backwards) std::reverse(out.begin(), out.end());
  return out;
}

template <typename OnPiece>
void PreTokenizer::pieces(const Step& step, std::string_view text, const OnPiece& on_piece) {
  if (step.behavior == Behavior::kIsolated || step.behavior == Behavior::kRemoved) {
    const bool keep = step.behavior == Behavior::kIsolated;
    return parts(step, text, [&](size_t start, size_t end, bool found) {
      if (keep || !found) on_piece(start, end);
    });
  }
  std::vector<Part> all;
  parts(step, text, [&](size_t start, size_t end, bool found) { all.push_back({start, end, found}); });
  for (const Part& part : merged(all, step.behavior)) on_piece(part.start, part.end);
}

void PreTokenizer::split(std::string_view text, bool at_start, size_t index, const Model& model,
                         std::vector<int64_t>& out) const {
  if (text.empty()) return;
  if (index == steps_.size()) return model.encode(text, out);
  const Step& step = steps_[index];
  if (step.kind == Kind::kByteLevel) return splitByteLevel(text, index, model, out);
  if (step.kind == Kind::kMetaspace) return splitMetaspace(text, at_start, index, model, out);
  pieces(step, text, [&](size_t start, size_t end) {
    split(text.substr(start, end - start), at_start && start == 0, index + 1, model, out);
  });
}

void PreTokenizer::splitByteLevel(std::string_view text, size_t index, const Model& model,
                                  std::vector<int64_t>& out) const {
  const Step& step = steps_[index];
  const bool last = index + 1 == steps_.size();
  const auto piece = [&](std::string_view part) {
    if (last) return model.encodeBytes(part, out);
    split(ByteNames::get().written(part), false, index + 1, model, out);
  };
  std::string spaced;
  if (step.prefix_space && text[0] != ' ') {
    spaced.append(" ").append(text);
    text = spaced;
  }
  if (step.finder.empty()) return piece(text);
  size_t start = 0;
  while (const auto found = step.finder[0].find(text, start)) {
    if (found->first > start) piece(text.substr(start, found->first - start));
    piece(text.substr(found->first, found->second - found->first));
    start = found->second;
  }
  if (start < text.size()) piece(text.substr(start));
}

void PreTokenizer::splitMetaspace(std::string_view text, bool at_start, size_t index, const Model& model,
                                  std::vector<int64_t>& out) const {
  const Step& step = steps_[index];
  const std::string& mark = step.replacement_text;
  std::string marked;
  const bool wanted = step.prepend == Prepend::kAlways || (step.prepend == Prepend::kFirst && at_start);
  if (wanted && text[0] != ' ' && text.substr(0, mark.size()) != mark) marked = mark;
  for (const char c : text) {
    if (c == ' ') {
      marked += mark;
    } else {
      marked += c;
    }
  }
  if (!step.splits) return split(marked, at_start, index + 1, model, out);
  // Each mark begins a piece of its own, a run of them too.
  for (size_t start = 0; start < marked.size();) {
    const size_t next =
        std::min(marked.find(mark, start == 0 && marked.compare(0, mark.size(), mark) != 0 ? 0 : start + mark.size()),
                 marked.size());
    split(std::string_view(marked).substr(start, next - start), at_start && start == 0, index + 1, model, out);
    start = next;
  }
}

}  // namespace sinkrt
