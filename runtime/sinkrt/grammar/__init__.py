"""Answers in a given form: JSON schemas, regular expressions and grammars, by the package llguidance.

`Grammar` says what an answer must match and needs no package. `GrammarCompiler` makes it ready for one tokenizer, and
a `Matcher` follows one answer: which tokens may come next is computed while the model's step runs.
"""

from sinkrt.grammar.answers import Calls, answer_grammar, loosened
from sinkrt.grammar.compiler import CompiledGrammar, GrammarCompiler, require_library
from sinkrt.grammar.matcher import MAX_GRAMMAR_TOKENS, Matcher
from sinkrt.grammar.spec import Grammar, grammar_of

__all__ = [
    "MAX_GRAMMAR_TOKENS",
    "Calls",
    "CompiledGrammar",
    "Grammar",
    "GrammarCompiler",
    "Matcher",
    "answer_grammar",
    "grammar_of",
    "loosened",
    "require_library",
]
