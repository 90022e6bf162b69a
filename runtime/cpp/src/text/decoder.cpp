#include "text/decoder.h"

#include <algorithm>

#include "text/byte_names.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

template <typename OnPiece>
void each(const Pieces& pieces, const OnPiece& on_piece) {
  size_t start = 0;
  for (const size_t end : pieces.ends) {
    on_piece(std::string_view(pieces.text).substr(start, end - start));
    start = end;
  }
}

int hexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The byte that a token such as "<0x0A>" stands for; -1: none. A plus sign is a digit's sign to the library.
int byteOf(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  const int high = token[3] == '+' ? 0 : hexDigit(token[3]), low = hexDigit(token[4]);
  return high < 0 || low < 0 ? -1 : 16 * high + low;
}

}  // namespace

void Decoder::read(const TokenizerFile& file, const Json& part) {
  if (part.isNull()) file.refuse("no decoder", "one");
  for (const Json* item : file.flattened(part, "decoders")) {
    Step step = readStep(file, *item);
    const bool alone = steps_.empty() && (step.kind == Kind::kReplace || step.kind == Kind::kByteLevel);
    if (!alone) {
      steps_.push_back(std::move(step));
      continue;
    }
    const bool bytes = step.kind == Kind::kByteLevel;
    first_.push_back(std::move(step));
    if (bytes) steps_.push_back(Step{Kind::kJoinBytes});
  }
}

Decoder::Step Decoder::readStep(const TokenizerFile& file, const Json& part) const {
  const std::string type = file.typeOf(part);
  Step step{Kind::kFuse};
  if (type == "Replace") {
    file.checkMembers(part, {"pattern", "content"});
    step.kind = Kind::kReplace;
    step.finder.push_back(Finder::read(file, file.need(part, "pattern")));
    step.content = file.needText(part, "content");
  } else if (type == "ByteFallback") {
    file.checkMembers(part, {});
    step.kind = Kind::kByteFallback;
  } else if (type == "Fuse") {
    file.checkMembers(part, {});
  } else if (type == "Strip") {
    file.checkMembers(part, {"content", "start", "stop"});
    step.kind = Kind::kStrip;
    appendUtf8(step.character, file.needCharacter(part, "content"));
    step.start = file.needCount(part, "start");
    step.stop = file.needCount(part, "stop");
    // The library fails at a token of fewer characters.
    if (step.stop > 0) file.refuse("a decoder that strips the end of tokens", "one that strips the beginning");
  } else if (type == "Metaspace") {
    file.checkMembers(part, {"replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
    step.kind = Kind::kMetaspace;
    appendUtf8(step.character, file.needCharacter(part, "replacement"));
    const Json* scheme = part.find("prepend_scheme");
    step.drops_first = (scheme == nullptr || scheme->text != "never") && file.flag(part, "add_prefix_space", true);
  } else if (type == "ByteLevel") {
    file.checkMembers(part, {"add_prefix_space", "trim_offsets", "use_regex"});
    step.kind = Kind::kByteLevel;
  } else {
    file.refuse("a decoder of type '" + type + "'",
                "ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip, Sequence");
  }
  return step;
}

std::string Decoder::prepared(const std::string& token) const {
  std::string text = token;
  for (const Step& step : first_) {
    if (step.kind == Kind::kByteLevel) {
      text = ByteNames::get().bytes(text).value_or(text);
    } else {
      std::string out;
      step.finder[0].replace(text, step.content, out);
      text = std::move(out);
    }
  }
  return text;
}

void Decoder::reserve(Work& work, size_t count, size_t longest) const {
  size_t bytes = count * longest, most = bytes;
  for (const Step& step : steps_) {
    // A byte that is no UTF-8 becomes three, and so does one that a byte token stands for; a match has a byte or more.
    const size_t factor = step.kind == Kind::kReplace ? std::max<size_t>(1, step.content.size() + 1) : 3;
    if (step.kind == Kind::kReplace || step.kind == Kind::kJoinBytes || step.kind == Kind::kByteLevel) bytes *= factor;
    most = std::max(most, bytes);
  }
  for (Pieces* pieces : {&work.in, &work.out}) {
    pieces->text.reserve(most);
    pieces->ends.reserve(std::max<size_t>(count, 1));
  }
  work.bytes.reserve(most);
}

std::string_view Decoder::run(Work& work) const {
  for (const Step& step : steps_) {
    work.out.clear();
    apply(step, work);
    std::swap(work.in, work.out);
  }
  return work.in.text;
}

void Decoder::apply(const Step& step, Work& work) {
  const Pieces& in = work.in;
  Pieces& out = work.out;
  switch (step.kind) {
    case Kind::kReplace:
      return each(in, [&](std::string_view token) {
        step.finder[0].replace(token, step.content, out.text);
        out.ends.push_back(out.text.size());
      });
    case Kind::kByteFallback:
      return byteFallback(in, out);
    case Kind::kFuse:
      return out.add(in.text);
    case Kind::kStrip:
      return each(in, [&](std::string_view token) { strip(step, token, out); });
    case Kind::kMetaspace:
      return each(in, [&](std::string_view token) {
        const bool drops = step.drops_first && out.ends.empty();
        const std::string_view mark = step.character;
        size_t start = 0;
        for (size_t at; (at = token.find(mark, start)) != std::string_view::npos; start = at + mark.size()) {
          out.text.append(token.substr(start, at - start));
          if (!drops) out.text += ' ';
        }
        out.add(token.substr(start));
      });
    case Kind::kByteLevel:  // behind others; the first ones are applied when the tokens are read
      work.bytes.clear();
      each(in, [&](std::string_view token) { ByteNames::get().appendBytes(token, work.bytes); });
      appendLossy(out.text, work.bytes);
      return out.ends.push_back(out.text.size());
    case Kind::kJoinBytes:
      appendLossy(out.text, in.text);
      return out.ends.push_back(out.text.size());
  }
}

void Decoder::strip(const Step& step, std::string_view token, Pieces& out) {
  for (size_t i = 0; i < step.start && token.substr(0, step.character.size()) == step.character; ++i) {
    token.remove_prefix(step.character.size());
  }
  out.add(token);
}

// A run of byte tokens is a text if it is UTF-8 as a whole, and otherwise as many U+FFFD.
void Decoder::byteFallback(const Pieces& in, Pieces& out) {
  size_t run = 0;  // where it begins in out.text, if there is one: its bytes are there one by one
  size_t count = 0;
  const auto finish = [&] {
    if (count == 0) return;
    if (isUtf8(std::string_view(out.text).substr(run))) {
      out.ends.push_back(out.text.size());
    } else {
      out.text.resize(run);
      for (size_t i = 0; i < count; ++i) out.add(kReplacement);
    }
    count = 0;
  };
  each(in, [&](std::string_view token) {
    const int byte = byteOf(token);
    if (byte < 0) {
      finish();
      return out.add(token);
    }
    if (count++ == 0) run = out.text.size();
    out.text += static_cast<char>(byte);
  });
  finish();
}

}  // namespace sinkrt
