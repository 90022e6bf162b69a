"""tokenizer.model, of sentencepiece, as a tokenizer.json: converted, then compared with sentencepiece itself.

transformers 5 converts such files too. It puts no space before the first word where the text begins with one, and
ignores how the model's own class treats text after a special token.
"""

from __future__ import annotations

from typing import Any

import tokenizers
from sinkrt.errors import UsageError, problem
from tokenizers import decoders, models, normalizers, processors

from sinkexport.loading.tokenizers.gguf_merges import scored_merges
from sinkexport.loading.tokenizers.gguf_vocab import Vocabulary
from sinkexport.loading.tokenizers.source_tokenizer import one_line
from sinkexport.loading.tokenizers.tokenizer_corpus import TEXTS, compare
from sinkexport.loading.tokenizers.tokenizer_files import TokenizerFiles

FILE = "tokenizer.model"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes whose ids are sentencepiece's own; others move or rename pieces."""
MODEL_TYPES = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "gemma3", "phi3", "stablelm")
"""Models with such a class, where tokenizer_config.json names none."""
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SAMPLED_PIECES = 400


def from_sentencepiece(raw: bytes, files: TokenizerFiles) -> bytes:
    """tokenizer.json of the sentencepiece model `raw`.

    Raises: UsageError if sentencepiece is not installed, for what is no such model, for classes that change its ids,
    and if the conversion gives other ids than sentencepiece.
    """
    _check_class(files)
    proto, processor = _opened(raw)
    library = converted(proto, _prefixes(proto, files), _begins(files))
    original = f"sentencepiece {_module().__version__}"
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type == 1]
    sampled = pieces[:: max(1, len(pieces) // _SAMPLED_PIECES)]
    defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED][:20]
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    texts = [*TEXTS, *sampled, " ".join(sampled[::7]), "".join(sampled[::5]), *(f"a{text}b {text}" for text in defined)]
    compare(
        lambda text: library.encode(text, add_special_tokens=False).ids,
        processor.encode,
        (text for text in texts if not any(token in text for token in special)),
        FILE,
        original,
    )
    if files.config.get("legacy") is False and proto.normalizer_spec.add_dummy_prefix:
        raise UsageError(
            problem(
                FILE,
                received="legacy: false in tokenizer_config.json and no tokenizer.json",
                expected="a tokenizer.json: what comes after a special token cannot be converted exactly",
                fix="add the model's tokenizer.json to the folder",
            )
        )
    return library.to_str(pretty=True).encode()


def converted(proto: Any, has_prefix: bool, has_beginning: bool) -> tokenizers.Tokenizer:
    """A tokenizer with the pieces, scores and rules of a sentencepiece model.

    has_prefix: whether a space goes before every text. has_beginning: whether the beginning-of-text token does.
    """
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    unknown = next((piece.piece for piece in proto.pieces if piece.type == _UNKNOWN), None)
    if trainer.model_type == _BPE:
        vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        model: Any = models.BPE(
            vocabulary, merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback
        )
    elif trainer.model_type == _UNIGRAM:
        model = models.Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces], trainer.unk_id, trainer.byte_fallback
        )
    else:
        raise UsageError(
            problem(
                FILE,
                received=f"a model of type {trainer.model_type}",
                expected="BPE or Unigram",
                fix="add the model's tokenizer.json to the folder",
            )
        )
    library = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if has_prefix else []
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    library.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if has_prefix else []),
        ]
    )
    library.add_tokens(
        [
            tokenizers.AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
            for piece in proto.pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    if has_beginning and trainer.bos_id >= 0:
        text = proto.pieces[trainer.bos_id].piece
        library.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], pair=[text, "$A", "$B:1"], special_tokens=[(text, trainer.bos_id)]
        )
    return library


def merges(proto: Any) -> list[tuple[str, str]]:
    """The pairs that sentencepiece's BPE merges, best first: whatever two pieces give a third, by its score.

    Raises: UsageError if no order of all pairs gives what sentencepiece gives.
    """
    texts = [piece.piece for piece in proto.pieces]
    ids = {text: number for number, text in enumerate(texts)}
    types, scores = [piece.type for piece in proto.pieces], [piece.score for piece in proto.pieces]
    try:
        return scored_merges(Vocabulary(tokens=texts, ids=ids, types=types, scores=scores, special={}, ends=()))
    except UsageError as error:
        raise UsageError(
            problem(
                FILE,
                received=f"scores that cannot be converted ({one_line(error)})",
                expected="a score of its own for each piece",
                fix="add the model's tokenizer.json to the folder",
            )
        ) from error


def _prefixes(proto: Any, files: TokenizerFiles) -> bool:
    """Whether a space goes before every text, and so before every piece of text after a special token."""
    wanted = files.config.get("add_prefix_space")
    return bool(proto.normalizer_spec.add_dummy_prefix) if wanted is None else bool(wanted)


def _begins(files: TokenizerFiles) -> bool:
    """Whether texts begin with BOS: as the classes do, where the folder says nothing."""
    wanted = files.config.get("add_bos_token")
    return True if wanted is None else bool(wanted)


def _check_class(files: TokenizerFiles) -> None:
    name = files.tokenizer_class
    family = (files.json_object("config.json") or {}).get("model_type")
    if name in CLASSES or (not name and family in MODEL_TYPES):
        return
    raise UsageError(
        problem(
            FILE,
            received=f"a tokenizer of class {name or 'unknown'} without tokenizer.json",
            expected=f"tokenizer.json, or one of {', '.join(CLASSES)}, whose ids are its own",
            fix="add the model's tokenizer.json to the folder",
        )
    )


def _module() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UsageError(
            problem(
                FILE,
                received="a model without tokenizer.json, and no package 'sentencepiece'",
                expected="the package that the conversion is compared with",
                fix="pip install 'sinkexport[export]'",
            )
        ) from error
    return sentencepiece


def _opened(raw: bytes) -> tuple[Any, Any]:
    """The protocol buffer and sentencepiece's own processor."""
    sentencepiece = _module()
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(raw)
        if not proto.pieces:
            raise ValueError("no pieces in it")
        return proto, sentencepiece.SentencePieceProcessor(model_proto=raw)
    except Exception as error:  # protobuf's DecodeError, RuntimeError and ValueError
        raise UsageError(
            problem(
                FILE,
                received=f"what is no sentencepiece model ({one_line(error)})",
                expected="a sentencepiece model, or tokenizer.json beside it",
                fix="add the model's tokenizer.json to the folder",
            )
        ) from error
