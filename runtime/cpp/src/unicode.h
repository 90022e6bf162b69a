// What tokenizers need of Unicode: general categories, white space, numbers, NFC. Tables: tools/make_unicode_tables.py.
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

// Normalization form C of valid UTF-8.
std::string nfc(std::string_view text);

}  // namespace sinkrt
