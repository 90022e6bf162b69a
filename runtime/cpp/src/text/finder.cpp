#include "text/finder.h"

#include "text/utf8.h"

namespace sinkrt {

Finder Finder::read(const TokenizerFile& file, const Json& pattern) {
  if (pattern.members.size() != 1) file.refuse("a pattern of an unknown form", "a String or a Regex");
  if (pattern.find("String") != nullptr) {
    const std::string& text = file.needText(pattern, "String");
    if (text.empty()) file.refuse("a search for nothing", "some text");
    return Finder(text);
  }
  const std::string& source = file.needText(pattern, "Regex");
  try {
    return Finder(Pattern(source));
  } catch (const PatternError& error) {
    file.refuse(std::string("a search for ") + error.what(), "a simpler regular expression");
  }
}

bool Finder::isCharacter() const {
  return !pattern_ && nextUtf8(text_).size == text_.size();
}

std::optional<std::pair<size_t, size_t>> Finder::find(std::string_view text, size_t from) const {
  if (!pattern_) {
    const size_t at = text.find(text_, from);
    if (at == std::string_view::npos) return std::nullopt;
    return std::pair(at, at + text_.size());
  }
  for (size_t at = from; at < text.size(); at += nextUtf8(text.substr(at)).size) {
    const int64_t size = pattern_->match(text, at);
    if (size > 0) return std::pair(at, at + static_cast<size_t>(size));
  }
  return std::nullopt;
}

void Finder::replace(std::string_view text, std::string_view content, std::string& out) const {
  size_t start = 0;
  while (const auto found = find(text, start)) {
    out.append(text.substr(start, found->first - start)).append(content);
    start = found->second;
  }
  out.append(text.substr(start));
}

}  // namespace sinkrt
