#include "sinkrt/tokenizer.h"

#include <algorithm>

#include "files.h"
#include "sinkrt/error.h"
#include "text/tokenizer_data.h"
#include "text/utf8.h"

namespace sinkrt {

void Tokenizer::Data::read(const TokenizerFile& file, const Json& root) {
  const auto part = [&](const char* key) -> const Json& {
    static const Json nothing;
    const Json* value = root.find(key);
    return value == nullptr ? nothing : *value;
  };
  if (!root.isObject()) file.refuse("JSON that is no object", "a file of the library 'tokenizers'");
  const Json& version = part("version");
  if (!version.isNull() && version.text != "1.0") file.refuse("another version", "version 1.0");
  for (const char* key : {"truncation", "padding"}) {
    if (!part(key).isNull()) file.refuse(std::string("a tokenizer with ") + key, "one without");
  }
  decoder.read(file, part("decoder"));
  model = readModel(file, file.need(root, "model"), vocabulary);
  normalizer.read(file, part("normalizer"));
  added.read(file, part("added_tokens"), normalizer, model->size(), vocabulary);
  pre_tokenizer.read(file, part("pre_tokenizer"), normalizer, added.hasNormalized());
  readTemplate(file, part("post_processor"));
  prepared.resize(vocabulary.end());
  skipped.resize(vocabulary.end());
  for (size_t id = 0; id < vocabulary.end(); ++id) {
    if (!vocabulary.has(static_cast<int64_t>(id))) continue;
    const std::string& text = vocabulary.text(static_cast<int64_t>(id));
    prepared[id] = decoder.prepared(text);
    skipped[id] = added.isSpecial(text);
    longest = std::max(longest, prepared[id].size());
  }
}

void Tokenizer::Data::readTemplate(const TokenizerFile& file, const Json& part) {
  for (const Json* item : file.flattened(part, "processors")) {
    const std::string type = file.typeOf(*item);
    if (type == "ByteLevel") continue;  // concerns offsets only
    if (type != "TemplateProcessing") {
      file.refuse("a post-processor of type '" + type + "'", "ByteLevel, TemplateProcessing, Sequence");
    }
    file.checkMembers(*item, {"single", "pair", "special_tokens"});
    const Json& specials = file.need(*item, "special_tokens");
    bool text_came = false;
    std::vector<int64_t> first, last;
    for (const Json& piece : file.need(*item, "single").items) {
      const Json* text = piece.find("Sequence");
      if (const Json* token = piece.find("SpecialToken")) {
        const Json* facts = specials.find(file.needText(*token, "id"));
        if (facts == nullptr) file.refuse("a template with an unknown token", "one that special_tokens lists");
        for (const Json& id : file.need(*facts, "ids").items) (text_came ? last : first).push_back(file.needId(id));
      } else if (text != nullptr && !text_came && file.needText(*text, "id") == "A") {
        text_came = true;
      } else {
        file.refuse("a template with two texts", "one text with special tokens around it");
      }
    }
    if (!text_came) file.refuse("a template without the text", "one text with special tokens around it");
    // A later processor goes around what an earlier one made.
    before.insert(before.begin(), first.begin(), first.end());
    after.insert(after.end(), last.begin(), last.end());
  }
}

void Tokenizer::Data::collect(const int64_t* ids, size_t count, bool keep_special, Pieces& out) const {
  for (size_t i = 0; i < count; ++i) {
    if (!vocabulary.has(ids[i])) continue;
    const auto id = static_cast<size_t>(ids[i]);
    if (keep_special || !skipped[id]) out.add(prepared[id]);
  }
}

Tokenizer::Tokenizer(std::unique_ptr<Data> data) : data_(std::move(data)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::load(const std::string& path) {
  std::string text;
  if (!readFile(path, text)) {
    throw Error(Code::kBundle,
                problem("tokenizer", "'" + path + "' (" + text + ")", "a readable file", "export the model again"));
  }
  return fromJson(text, path.substr(path.rfind('/') + 1));
}

Tokenizer Tokenizer::fromJson(const std::string& text, const std::string& name) {
  const TokenizerFile file(name);
  auto data = std::make_unique<Data>();
  try {
    data->read(file, parseJson(text));
  } catch (const JsonError& error) {
    file.refuse(std::string("invalid JSON (") + error.what() + ")", "a file of the library 'tokenizers'");
  }
  Tokenizer tokenizer(std::move(data));
  tokenizer.data_->newline = tokenizer.encode("\n", false);
  return tokenizer;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool special) const {
  if (!isUtf8(text)) {
    throw Error(Code::kUsage, problem("text", "something that is not Unicode text", "valid UTF-8",
                                      "check the encoding of the input"));
  }
  std::vector<int64_t> out;
  if (special) out = data_->before;
  const auto token = [&](int64_t id) { out.push_back(id); };
  data_->added.cut(text, false, token, [&](std::string_view piece, size_t start) {
    bool at_start = start == 0;
    std::string changed;
    if (!data_->normalizer.isNone()) {
      changed = piece;
      data_->normalizer.apply(changed, at_start);
      piece = changed;
    }
    data_->added.cut(piece, true, token, [&](std::string_view part, size_t inside) {
      data_->pre_tokenizer.encode(part, at_start && inside == 0, *data_->model, out);
    });
  });
  if (special) out.insert(out.end(), data_->after.begin(), data_->after.end());
  return out;
}

std::vector<int64_t> Tokenizer::encodePrompt(std::string_view text) const {
  const std::vector<int64_t>& start = data_->before;
  const std::vector<int64_t> ids = encode(text, false);
  for (size_t n = std::min(start.size(), ids.size()); n > 0; --n) {
    if (!std::equal(start.end() - static_cast<std::ptrdiff_t>(n), start.end(), ids.begin())) continue;
    std::vector<int64_t> out = start;
    out.insert(out.end(), ids.begin() + static_cast<std::ptrdiff_t>(n), ids.end());
    return out;
  }
  return encode(text);
}

std::vector<int64_t> Tokenizer::encodeNext(std::string_view text) const {
  // Some tokenizers put a space before every text. So the text is encoded after a line break, which is taken off again.
  const std::vector<int64_t>& newline = data_->newline;
  std::vector<int64_t> ids = encode("\n" + std::string(text), false);
  if (!newline.empty() && ids.size() >= newline.size() && std::equal(newline.begin(), newline.end(), ids.begin())) {
    ids.erase(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(newline.size()));
    return ids;
  }
  return encode(text, false);  // the line break became part of another token
}

std::string Tokenizer::decode(const int64_t* ids, size_t count, bool keep_special) const {
  Decoder::Work work;
  data_->collect(ids, count, keep_special, work.in);
  return std::string(data_->decoder.run(work));
}

bool Tokenizer::hasText(int64_t id) const {
  return data_->vocabulary.has(id) && !data_->added.isSpecial(id);
}

int64_t Tokenizer::id(std::string_view token) const {
  const int64_t added = data_->added.id(std::string(token));
  return added >= 0 ? added : data_->vocabulary.id(token);
}

}  // namespace sinkrt
