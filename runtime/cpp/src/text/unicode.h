// What tokenizers need of Unicode: classes of characters, normal forms, lower case. The tables are the library
// 'tokenizers'' own, whose parts are of different versions of Unicode: tools/make_unicode_tables.py.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sinkrt {

// General categories as bits, in the order of the tables: Lu, Ll, .., Cn (unassigned).
uint32_t categoryBit(uint32_t code);
// Bits of the categories that a name stands for: "Lu", or "L" for all that begin so. 0: there is none.
uint32_t categoryMask(std::string_view name);

// White_Space, as \s of regular expressions.
bool isSpace(uint32_t code);
// Rust's char::is_numeric: Nd, Nl, No.
bool isNumeric(uint32_t code);

// The library's is_punctuation, with ASCII's symbols.
bool isPunctuation(uint32_t code);
// \w of Oniguruma by itself, \w in a class of Oniguruma, \w of the Rust crate 'regex'.
bool isWord(uint32_t code);
bool isClassWord(uint32_t code);
bool isPlainWord(uint32_t code);
// Combining marks, which StripAccents removes.
bool isMark(uint32_t code);

enum class Form : uint8_t { kNfc, kNfd, kNfkc, kNfkd };
// A normalization form of valid UTF-8.
std::string normalized(std::string_view text, Form form);
// Lower case, character by character.
std::string lowered(std::string_view text);

// Bytes of the first extended grapheme cluster of a text, valid UTF-8 and not empty: what is one character on the
// screen.
size_t clusterSize(std::string_view text);

}  // namespace sinkrt
