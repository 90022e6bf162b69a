#include <algorithm>
#include <array>

#include "text/tokenizer_data.h"

namespace sinkrt {

struct StreamingDecoder::Work {
  // The ids of the last piece, on which depends whether a space comes next; then those after it that are no whole
  // character yet.
  std::array<int64_t, 2 * kMaxPending> ids{};
  size_t num_context = 0, num_pending = 0;
  Decoder::Work chain;
  std::string before;  // the text of the context
};

StreamingDecoder::StreamingDecoder(const Tokenizer& tokenizer, const int64_t* after, size_t count)
    : tokenizer_(tokenizer), work_(std::make_unique<Work>()) {
  const Tokenizer::Data& data = *tokenizer.data_;
  data.decoder.reserve(work_->chain, work_->ids.size(), data.longest);
  work_->before.reserve(work_->chain.in.text.capacity());
  size_t& found = work_->num_context;
  for (size_t i = count; i > 0 && found < kMaxPending; --i) {
    if (tokenizer.hasText(after[i - 1])) work_->ids[found++] = after[i - 1];
  }
  std::reverse(work_->ids.begin(), work_->ids.begin() + static_cast<std::ptrdiff_t>(found));
}

StreamingDecoder::~StreamingDecoder() = default;
StreamingDecoder::StreamingDecoder(StreamingDecoder&&) noexcept = default;

std::string_view StreamingDecoder::piece() {
  const Tokenizer::Data& data = *tokenizer_.data_;
  Work& work = *work_;
  const auto text = [&](size_t first, size_t count) {
    work.chain.in.clear();
    data.collect(work.ids.data() + first, count, false, work.chain.in);
    return data.decoder.run(work.chain);
  };
  work.before.assign(text(0, work.num_context));
  const std::string_view whole = text(0, work.num_context + work.num_pending);
  // Bytes can spoil a character before them in the eyes of some decoders; it is out already, as it was.
  if (whole.compare(0, work.before.size(), work.before) == 0) return whole.substr(work.before.size());
  return text(work.num_context, work.num_pending);
}

std::string_view StreamingDecoder::push(int64_t id) {
  if (!tokenizer_.hasText(id)) return {};
  Work& work = *work_;
  work.ids[work.num_context + work.num_pending++] = id;
  const std::string_view text = piece();
  const bool unfinished = text.size() >= 3 && text.substr(text.size() - 3) == "\xef\xbf\xbd";
  if (unfinished && work.num_pending < kMaxPending) return {};
  std::copy_n(work.ids.begin() + static_cast<std::ptrdiff_t>(work.num_context), work.num_pending, work.ids.begin());
  work.num_context = work.num_pending;
  work.num_pending = 0;
  return text;
}

std::string_view StreamingDecoder::flush() {
  const std::string_view text = work_->num_pending > 0 ? piece() : std::string_view();
  work_->num_context = work_->num_pending = 0;
  return text;
}

}  // namespace sinkrt
