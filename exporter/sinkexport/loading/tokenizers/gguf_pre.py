r"""Splitting of text before merging, by the name in ``tokenizer.ggml.pre``, as llama.cpp does it.

The names and their patterns are facts of the format (llama.cpp's src/llama-vocab.cpp and src/unicode.cpp, October
2026). Where llama.cpp splits by code of its own or by collapsed characters, the pattern here says the same as one
regular expression: there ``\p{Lu}`` and ``\p{Ll}`` are any letter, since upper case outside ASCII is not known, and
groups of digits take the text before them along.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from sinkrt.errors import UsageError, problem


def _characters(ranges: str) -> str:
    """The inside of a class, from hexadecimal code points and ranges of them."""
    spans = [[chr(int(end, 16)) for end in span.split("-")] for span in ranges.split()]
    return "".join("-".join("\\" + end if end in "-]^[\\&" else end for end in span) for span in spans)


_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # English contractions
_SPACE = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACE
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_DIGIT = r"\p{N}"
_DIGITS = r"\p{N}{1,3}"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACE
_QWEN2 = f"{_SHORT}|{_WORD}|{_DIGIT}|{_SIGNS}|{_LINES}"
_LLAMA3 = f"{_SHORT}|{_WORD}|{_DIGITS}|{_SIGNS}|{_LINES}"

# Letters but a-z, and letters but A-Z: all that llama.cpp knows of upper and lower case.
_UPPER, _LOWER = r"[^\P{L}a-z]", r"[^\P{L}A-Z]"
_MARKED_UPPER, _MARKED_LOWER = (r"[^\p{N}\p{P}\p{S}\p{Z}\p{C}" + case + "]" for case in ("a-z", "A-Z"))
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_PATH_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _cased(upper: str, lower: str, ending: str) -> str:
    """Words with at most one change from upper to lower case."""
    return f"{_HEAD}{upper}*{lower}+{ending}|{_HEAD}{upper}+{lower}*{ending}"


_TEKKEN = f"{_cased(_UPPER, _LOWER, '')}|{_DIGIT}|{_PATH_SIGNS}|{_LINES}"
_GPT4O = f"{_cased(_UPPER, _LOWER, _SHORT + '?')}|{_DIGITS}|{_PATH_SIGNS}|{_LINES}"
_GRANITE_EMBED = f"{_cased(_MARKED_UPPER, _MARKED_LOWER, _SHORT + '?')}|{_DIGITS}|{_PATH_SIGNS}|{_LINES}"
_MARKED_WORD = rf"{_HEAD}[\p{{L}}\p{{M}}]+{_SHORT}?"

# Groups of three from the right, with what stands before a number in its first group.
_DIGITS_FROM_RIGHT = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"

_ASCII_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3_WORDS = rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_CJK = f"[{_characters('4E00-9FA5 3040-309F 30A0-30FF')}]+"
_DEEPSEEK3 = (_DIGITS, _CJK, rf"{_DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}")
_DEEPSEEK_LETTERS = _characters(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1"
    " 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A"
    " 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4"
    " 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128"
    " 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D"
    " A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F"
    " 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
# llama.cpp takes white space out of classes like these two: U+3000 and others are in DeepSeek's own tokenizer.json.
_DEEPSEEK_SIGNS = _characters("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3001-3002")
_DEEPSEEK_FAR = _characters("800-167F 1681-1FFF 200B-2027 202A-202E 2030-205E 2060-2FFF 3001-9FA5 AC00-D7FF")
_DEEPSEEK_CJK = f"[{_DEEPSEEK_FAR}]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    rf"\s?[{_DEEPSEEK_SIGNS}]+",
    r"\s+(?![\s\S])",  # at the end of a line
    _DEEPSEEK_CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGIT)
_SPARK = (
    *_DEEPSEEK3[:2],
    rf"{_DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACE}",
    _DIGIT,
)
_YOUTU_SIGNS = _characters("FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F")
_YOUTU = (
    f"[{_characters('AC00-D7A3 3131-318E')}]+|[{_YOUTU_SIGNS}]+|[{_characters('3105-312F')}]+|{_CJK}",
    f"{_MARKED_WORD}|{_DIGIT}|{_PATH_SIGNS}|{_LINES}",
)
_AFMOE_SCRIPTS = _characters(
    "4E00-9FFF 3400-4DBF 8C48-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F"
    " AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
)
_AFMOE = (_DIGITS_FROM_RIGHT, f"[{_AFMOE_SCRIPTS}]+", _DEEPSEEK3[2])
_TINY_AYA = (_DIGITS_FROM_RIGHT, f"{_MARKED_WORD}|{_DIGITS}|{_PATH_SIGNS}|{_LINES}")

_FALCON_SIGNS = r"\p{P}\$\+<=>\^~\|"
_THREE_DIGITS = "[0-9][0-9][0-9]"
_DEFAULT = (rf"[{_FALCON_SIGNS}]+", GPT2, r"\p{N}+", _THREE_DIGITS)
_FALCON = (rf"[{_FALCON_SIGNS}`]+", GPT2, _THREE_DIGITS)
_STARCODER = (_DIGIT, GPT2)
_BLOOM = rf" ?[^(\s|.,!?{_characters('2026 3002 FF0C 3001 964 6D4 60C')})]+"
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "IMGIMG[A-I]{1,4}Z",
    r"[\t\n]|    |  ",
    _DIGIT,
    r"[\p{P}!-/:-@\[-`{-~]",
    GPT2,
)

# The blocks that llama.cpp counts as Han: a superset of the script's letters there.
_HAN = _characters("3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2EBEF 2F800-2FA1F")
_KIMI = rf"[{_HAN}]+|{_HEAD}[^\P{{L}}{_HAN}]+{_SHORT}?|{_DIGITS}|{_SIGNS}|{_LINES}"

_SHRINKING_SPACE = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
_JAIS2 = rf"{_SHORT}|{_WORD}|{_DIGITS}|{_SIGNS}|\s*[\r\n]+|{_SHRINKING_SPACE}|\s{{1,2}}(?!\S)|\s"
_QWEN35 = rf"{_SHORT}|{_HEAD}[\p{{L}}\p{{M}}]+|{_DIGIT}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"
_K2_SHORT = _SHORT.replace("sS", "sS\u017f")  # long s too
_K2_HORIZON = f"{_K2_SHORT}|{_HEAD}[\\p{{L}}\\p{{M}}\u200c\u200d]+|{_DIGITS}|{_SIGNS}|{_LINES}"
_SEED_CODER = rf"{_SHORT}|{_WORD}|{_DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"
_EXAONE_MOE = (
    rf"{_SHORT}|{_HEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|{_DIGIT}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACE}"
)
_WORD_OR_LINES = r"[^\n]+|\n+"


@dataclasses.dataclass(frozen=True)
class Pre:
    """Meaning of a name in ``tokenizer.ggml.pre``.

    splits: regular expressions, one after the other; matches and what is between them become pieces. ignore_merges: a
    piece that is a token as a whole is taken as it is. add_bos: unless the file says otherwise; always_bos: even then.
    raw: pieces are characters with ``▁`` for a space, not GPT-2's signs for bytes; whole_lines: of `raw` ones, runs of
    line feeds are taken as a whole where they are a token.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    always_bos: bool = False
    raw: bool = False
    whole_lines: bool = False


def _named(names: str, *splits: str, **facts: bool) -> dict[str, Pre]:
    return dict.fromkeys(names.split(), Pre(splits, **facts))


PRE: Mapping[str, Pre] = MappingProxyType(
    {
        **_named("default", *_DEFAULT),
        **_named(
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
            _LLAMA3,
            ignore_merges=True,
            add_bos=True,
        ),
        **_named("dbrx smaug-bpe chatglm-bpe", _LLAMA3),
        **_named("glm4 glm5", _LLAMA3, ignore_merges=True),
        **_named(
            "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en"
            " jina-v2-code roberta-bpe mpt olmo jais exaone4 trillion granite-docling",
            GPT2,
        ),
        **_named("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", *_STARCODER),
        **_named(
            "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"
            " bailingmoe bailingmoe2 llada-moe",
            _QWEN2,
        ),
        **_named("qwen35", _QWEN35),
        **_named("ufakzeka", f"{_WORD}|{_DIGIT}|{_SIGNS}|{_LINES}"),
        **_named("laguna", _WORD_OR_LINES, _QWEN2),
        **_named("minicpm5", _DIGITS, rf"{_SHORT}|{_WORD}|\p{{N}}+|{_SIGNS}|{_LINES}", ignore_merges=True),
        **_named("seed-coder", _SEED_CODER),
        **_named("exaone-moe", _EXAONE_MOE),
        **_named("deepseek-llm", *_DEEPSEEK_LLM),
        **_named("deepseek-coder", *_DEEPSEEK_CODER),
        **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", *_DEEPSEEK3),
        **_named("spark2_5", *_SPARK),
        **_named("youtu", *_YOUTU, ignore_merges=True),
        **_named("afmoe", *_AFMOE),
        **_named("falcon", *_FALCON),
        **_named("poro-chat bloom gpt3-finnish", _BLOOM),
        **_named("viking", _BLOOM, _DIGIT),
        **_named("tekken", _TEKKEN, ignore_merges=True, add_bos=True),
        **_named("chameleon", *_CHAMELEON, add_bos=True),
        **_named("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O),
        **_named("granite-embed-multi-97m", _GRANITE_EMBED, ignore_merges=True),
        **_named("tiny_aya cohere2moe", *_TINY_AYA),
        **_named("jais-2", _JAIS2),
        **_named("kimi-k2", _KIMI),
        **_named("k2-horizon", _K2_HORIZON),
        **_named("superbpe", r"\p{N}+", "(?=(?:[0-9]{3})+(?![0-9]))"),
        **_named("gemma4 granite-embed-multi-311m", _WORD_OR_LINES, raw=True, always_bos=True, whole_lines=True),
        **_named("sarvam-moe", _WORD_OR_LINES, raw=True),
    }
)


def pre_of(name: str | None) -> Pre:
    """The row of a name.

    Raises: UsageError for a name that the table lacks, and for None, with what comes near.
    """
    if name is None:
        raise UsageError(
            problem(
                "tokenizer",
                received="a GGUF file without tokenizer.ggml.pre",
                expected="the name of the pre-tokenizer that the model was trained with",
                fix="convert the model again with a current llama.cpp, or export its folder",
            )
        )
    if isinstance(name, str) and name in PRE:
        return PRE[name]
    name = str(name)[:60]
    near = difflib.get_close_matches(name, PRE, n=4, cutoff=0.5) or sorted(PRE)
    raise UsageError(
        problem(
            "tokenizer",
            received=f"the pre-tokenizer {name!r}",
            expected=f"one that is known to split as llama.cpp does (near: {', '.join(near)})",
            fix="export the model's folder, which has a tokenizer of its own",
        )
    )
