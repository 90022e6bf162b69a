"""A folder's tokenizer.json, copied: what tokenizer_config.json changes of it is put in, all else stays as it is.

transformers builds a tokenizer anew from the vocabulary for many classes (GPT2Tokenizer, Qwen2Tokenizer, LlamaTokenizer
..). What a file says beyond the class, such as a split of digits, is lost. What it rightly takes from
tokenizer_config.json are the added tokens, the special tokens and whether a text begins with one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from sinkrt.errors import UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import CONFIG_FILE, TOKENIZER_FILE, library_tokenizer, one_line
from sinkexport.loading.tokenizers.tokenizer_files import TokenizerFiles

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
BEGINNING_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes whose texts began with bos_token in transformers 4, whatever tokenizer.json says; 5 follows the file."""
MISTRAL_PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
"""Beginning of the pattern that ``fix_mistral_regex`` puts in."""


class TokenizerJson:
    """A tokenizer.json that is changed step by step.

    data: the whole file as JSON. remarks: what was found on the way. is_changed: whether it is not `raw` any more.
    """

    def __init__(self, raw: bytes) -> None:
        """Raises: UsageError for what is no tokenizer.json."""
        self.raw, self.is_changed = raw, False
        self.remarks: list[str] = []
        try:
            self.data: dict[str, Any] = json.loads(raw)
            self.tokens = {token["content"]: token for token in self.data.get("added_tokens") or []}
            vocabulary = self.data["model"]["vocab"]
            self.vocabulary: Mapping[str, int] = (
                vocabulary
                if isinstance(vocabulary, dict)
                else {piece: number for number, (piece, _score) in enumerate(vocabulary)}
            )
            self.limits = [name for name in ("truncation", "padding") if self.data.get(name) is not None]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            received = f"{one_line(error)}" if isinstance(error, ValueError) else "JSON of another kind"
            raise UsageError(
                problem(
                    TOKENIZER_FILE,
                    received=received,
                    expected="a file of 'tokenizers'",
                    fix="get the file again from where the model came from",
                )
            ) from error

    def library(self) -> tokenizers.Tokenizer:
        """The tokenizer as it is now. Raises: UsageError."""
        return library_tokenizer(self.content())

    def content(self) -> bytes:
        """The file as it is now: the very bytes if nothing was changed."""
        if not self.is_changed:
            return self.raw
        return json.dumps(self.data, ensure_ascii=False, indent=2).encode("utf-8", "surrogatepass")

    def remove_limits(self) -> None:
        """Left over from training: truncation cuts prompts, padding fills them up, dropout encodes by chance."""
        for name in self.limits:
            self.data[name] = None
            self.is_changed = True
        if self.limits:
            self.remarks.append(f"{' and '.join(self.limits)} of {TOKENIZER_FILE} left out: texts are encoded whole")
        if self.data["model"].get("dropout"):
            self.remarks.append(
                f"dropout {self.data['model']['dropout']} of {TOKENIZER_FILE} left out: it is for training"
            )
            self.data["model"]["dropout"] = None
            self.is_changed = True

    def add(self, content: str, number: int, flags: Mapping[str, bool]) -> None:
        """Make `content` an added token with this id, or change its flags.

        Raises: UsageError if it has another id.
        """
        known = self.tokens.get(content)
        own = self.vocabulary.get(content) if known is None else known["id"]
        if own is not None and own != number:
            raise UsageError(
                problem(
                    "tokenizer",
                    received=f"id {number} for {content!r} beside {TOKENIZER_FILE}, and {own} in it",
                    expected="one id",
                    fix="repair the folder's files",
                )
            )
        if known is None:
            known = {"id": number, "content": content, **_PLAIN, "normalized": not flags.get("special", False)}
            self.data.setdefault("added_tokens", []).append(known)
            self.data["added_tokens"].sort(key=lambda token: token["id"])
            self.tokens[content] = known
            self.is_changed = True
        for flag, value in flags.items():
            if known.get(flag, False) != value:
                known[flag] = value
                self.is_changed = True

    def add_specials(self, texts: list[str]) -> list[str]:
        """Mark tokens of the vocabulary as special; what is returned is not in it."""
        missing = []
        for text in texts:
            if text in self.tokens:
                continue
            if text in self.vocabulary:
                self.add(text, self.vocabulary[text], {"special": True, "normalized": False})
            else:
                missing.append(text)
        return missing

    def remove(self, numbers: set[int]) -> None:
        """Take added tokens out, by id."""
        self.data["added_tokens"] = [token for token in self.data["added_tokens"] if token["id"] not in numbers]
        self.tokens = {token["content"]: token for token in self.data["added_tokens"]}
        self.is_changed = True

    def template_tokens(self) -> dict[str, list[int]]:
        """The tokens that are put around a text, and the ids that they have there."""
        found: dict[str, list[int]] = {}
        for step in self._steps():
            if step.get("type") == "TemplateProcessing":
                found |= {text: list(token["ids"]) for text, token in step["special_tokens"].items()}
        return found

    def _steps(self) -> list[dict[str, Any]]:
        """Steps of the post-processor, sequences unfolded."""
        before = self.data.get("post_processor") or {}
        return list(before["processors"]) if before.get("type") == "Sequence" else [before] if before else []

    def set_beginning(self, bos: tuple[str, int], wanted: bool) -> None:
        """Have texts begin with the token `bos`, text and id, or not."""
        text, number = bos
        library = self.library()
        begins = library.encode("a").ids[:1] == [number] and library.encode("a", add_special_tokens=False).ids[:1] != [
            number
        ]
        if begins == wanted:
            return
        steps = self._steps()
        if wanted:
            sequence: list[dict[str, Any]] = [{"SpecialToken": {"id": text, "type_id": 0}}, _sequence("A")]
            steps = [
                *steps,
                {
                    "type": "TemplateProcessing",
                    "single": sequence,
                    "pair": [*sequence, _sequence("B")],
                    "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
                },
            ]
        else:
            steps = [_without(step, text) if step.get("type") == "TemplateProcessing" else step for step in steps]
        self.data["post_processor"] = {"type": "Sequence", "processors": steps} if steps else None
        self.is_changed = True


def folder_tokenizer_json(files: TokenizerFiles, file: TokenizerJson) -> TokenizerJson:
    """`file` with what the folder says beside it.

    Raises: UsageError where files contradict each other.
    """
    file.remove_limits()
    for number, token in sorted(files.added_tokens().items()):
        file.add(token.content, number, token.flags)
    named = files.special_tokens
    missing = file.add_specials([*named.values(), *files.other_named_tokens()])
    if missing:
        file.remarks.append(f"{_listed(missing)}: named in {CONFIG_FILE}, and no token of the vocabulary: left out")
    _set_beginning(files, file, named.get("bos_token"))
    _check_mistral(files, file)
    _check_prefix_space(files, file)
    return file


def _set_beginning(files: TokenizerFiles, file: TokenizerJson, bos: str | None) -> None:
    """add_bos_token is the authors' word, and goes before tokenizer.json: transformers 4 did so for some classes, 5 for
    none. false is followed for those classes alone. add_eos_token is not: what follows a prompt is its continuation.
    """
    wanted = files.config.get("add_bos_token")
    number = None if bos is None or bos not in file.tokens else file.tokens[bos]["id"]
    if number is None or bos is None:
        return
    if wanted is None or (not wanted and files.tokenizer_class not in BEGINNING_CLASSES):
        begins = number in file.library().encode("a").ids
        if wanted is False and begins:
            file.remarks.append(
                f"{bos} is put before texts, as {TOKENIZER_FILE} has it; add_bos_token of {CONFIG_FILE} says otherwise"
            )
        if wanted is None and not begins and files.tokenizer_class in BEGINNING_CLASSES:
            file.remarks.append(
                f"{bos} is not put before texts, as {TOKENIZER_FILE} has it; transformers 4 put it there"
            )
    else:
        was = copy.deepcopy(file.data.get("post_processor"))
        file.set_beginning((bos, number), wanted)
        if was != file.data.get("post_processor"):
            file.remarks.append(
                f"{bos} is {'' if wanted else 'not '}put before texts, as add_bos_token of "
                f"{CONFIG_FILE} says and {TOKENIZER_FILE} does not"
            )
    if files.config.get("add_eos_token"):
        file.remarks.append(f"add_eos_token of {CONFIG_FILE} is not followed: a prompt goes on")


def _check_mistral(files: TokenizerFiles, file: TokenizerJson) -> None:
    if files.config.get("fix_mistral_regex") and json.dumps(MISTRAL_PATTERN)[1:-1] not in json.dumps(
        file.data.get("pre_tokenizer")
    ):
        raise UsageError(
            problem(
                CONFIG_FILE,
                received=f"fix_mistral_regex, and {TOKENIZER_FILE} with the old pattern",
                expected=f"a {TOKENIZER_FILE} that has the pattern",
                fix="load and save the tokenizer once with transformers 5",
            )
        )


def _check_prefix_space(files: TokenizerFiles, file: TokenizerJson) -> None:
    """transformers 4 changed a lone ByteLevel by add_prefix_space, 5 does not: the file is followed, and said so."""
    wanted, splitter = files.config.get("add_prefix_space"), file.data.get("pre_tokenizer") or {}
    if wanted is not None and splitter.get("type") == "ByteLevel" and splitter.get("add_prefix_space") != wanted:
        file.remarks.append(
            f"add_prefix_space {str(wanted).lower()} of {CONFIG_FILE} is not followed: {TOKENIZER_FILE} says otherwise"
        )


def _without(step: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A TemplateProcessing that does not put the token `text` anywhere."""
    changed = dict(step)
    for kind in ("single", "pair"):
        changed[kind] = [part for part in step[kind] if (part.get("SpecialToken") or {}).get("id") != text]
    changed["special_tokens"] = {name: token for name, token in step["special_tokens"].items() if name != text}
    return changed


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
