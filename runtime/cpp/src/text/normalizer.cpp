#include "text/normalizer.h"

#include "text/utf8.h"

namespace sinkrt {

void Normalizer::read(const TokenizerFile& file, const Json& part) {
  for (const Json* item : file.flattened(part, "normalizers")) {
    const std::string type = file.typeOf(*item);
    Step step{Kind::kForm};
    bool expands = true;   // makes several characters of one
    bool removes = false;  // makes one or none of several
    if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
      file.checkMembers(*item, {});
      const bool compatible = type[2] == 'K', composed = type.back() == 'C';
      step.form = compatible ? (composed ? Form::kNfkc : Form::kNfkd) : (composed ? Form::kNfc : Form::kNfd);
    } else if (type == "Lowercase") {
      file.checkMembers(*item, {});
      step.kind = Kind::kLower;
    } else if (type == "StripAccents") {
      file.checkMembers(*item, {});
      step.kind = Kind::kStripMarks;
      expands = false;
      removes = true;
    } else if (type == "Strip") {
      file.checkMembers(*item, {"strip_left", "strip_right"});
      step.kind = Kind::kStrip;
      step.left = file.flag(*item, "strip_left", false);
      step.right = file.flag(*item, "strip_right", false);
      expands = false;
      removes = true;
    } else if (type == "Prepend") {
      file.checkMembers(*item, {"prepend"});
      step.kind = Kind::kPrepend;
      step.content = file.needText(*item, "prepend");
    } else if (type == "Replace") {
      file.checkMembers(*item, {"pattern", "content"});
      step.kind = Kind::kReplace;
      step.finder.push_back(Finder::read(file, file.need(*item, "pattern")));
      step.content = file.needText(*item, "content");
      expands = !step.content.empty() && nextUtf8(step.content).size != step.content.size();
      removes = !step.finder[0].isCharacter() || step.content.empty();
    } else if (type == "Precompiled") {
      file.checkMembers(*item, {"precompiled_charsmap"});
      step.kind = Kind::kMap;
      step.map.push_back(CharactersMap::read(file, file.needText(*item, "precompiled_charsmap")));
    } else {
      file.refuse("a normalizer of type '" + type + "'",
                  "NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip, Prepend, Replace, Precompiled");
    }
    follows_start_ = follows_start_ && !(expands_ && removes);
    expands_ = expands_ || expands;
    steps_.push_back(std::move(step));
  }
}

void Normalizer::strip(const Step& step, std::string& text, bool& at_start) {
  size_t start = 0, end = text.size();
  while (step.left && start < end) {
    const Utf8Step first = nextUtf8(std::string_view(text).substr(start));
    if (!isSpace(first.code)) break;
    start += first.size;
  }
  while (step.right && start < end) {
    size_t last = end - 1;
    while ((static_cast<uint8_t>(text[last]) & 0xc0) == 0x80) --last;
    if (!isSpace(nextUtf8(std::string_view(text).substr(last)).code)) break;
    end = last;
  }
  if (start > 0) at_start = false;
  text = text.substr(start, end - start);
}

void Normalizer::apply(std::string& text, bool& at_start) const {
  for (const Step& step : steps_) {
    std::string out;
    switch (step.kind) {
      case Kind::kForm:
        text = normalized(text, step.form);
        break;
      case Kind::kLower:
        text = lowered(text);
        break;
      case Kind::kStripMarks:
        for (std::string_view rest = text; !rest.empty();) {
          const Utf8Step next = nextUtf8(rest);
          if (!isMark(next.code)) {
            out.append(rest.substr(0, next.size));
          } else if (out.empty()) {
            at_start = false;
          }
          rest.remove_prefix(next.size);
        }
        text = std::move(out);
        break;
      case Kind::kMap:
        step.map[0].apply(text, out);
        text = std::move(out);
        break;
      case Kind::kStrip:
        strip(step, text, at_start);
        break;
      case Kind::kPrepend:
        if (!text.empty()) text.insert(0, step.content);
        break;
      case Kind::kReplace: {
        // What replaces several characters at the start counts as the last of them.
        const auto found = step.finder[0].find(text, 0);
        if (!found) break;
        if (found->first == 0 && (step.content.empty() || nextUtf8(text).size != found->second)) at_start = false;
        step.finder[0].replace(text, step.content, out);
        text = std::move(out);
        break;
      }
    }
  }
}

}  // namespace sinkrt
