"""Forms that a request may ask its answer to have."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from sinkrt.grammar import Grammar
from sinkrt.text.tools.calls import ANY_OBJECT

from sinkexport.serve.requests.base import Fields, Nested

FORMAT = (
    '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"name": .., "schema": ..}}'
)


class NamedSchema(Fields):
    """A JSON schema. strict: answers match it in any case."""

    name: str | None = Field(None, description="a text")
    description: str | None = Field(None, description="a text")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="a JSON schema")
    strict: bool | None = Field(None, description="true or false")


class ResponseFormat(Fields):
    """The form of a chat's answer, as OpenAI has it."""

    nested: ClassVar[Nested] = {"json_schema": NamedSchema}

    type: Literal["text", "json_object", "json_schema"] = Field(description='"text", "json_object" or "json_schema"')
    json_schema: NamedSchema | None = Field(None, description='an object such as {"name": "x", "schema": {}}')

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"expected {FORMAT}")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the text of the answer must match.

        Raises: UsageError.
        """
        return format_grammar(self.type, self.json_schema)


def format_grammar(kind: str, named: NamedSchema | None) -> Grammar | None:
    """What a text must match to have a form. named: the schema of the kind ``json_schema``.

    Raises: UsageError.
    """
    if kind == "text":
        return None
    schema = None if named is None else named.schema_
    return Grammar.of_schema(ANY_OBJECT if schema is None else schema)


class StructuredOutputs(Fields):
    """The form of an answer, as vLLM has it: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema, or its text")
    regex: str | None = Field(None, description="a regular expression")
    choice: list[str] | None = Field(None, description="a list of texts")
    grammar: str | None = Field(None, description="a grammar in Lark or GBNF")
    json_object: bool | None = Field(None, description="true or false")

    @model_validator(mode="after")
    def _only_one(self) -> StructuredOutputs:
        given = [name for name in ("json_", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            received = " and ".join(name.strip("_") for name in given) or "none"
            raise ValueError(f"received {received}, expected one of json, regex, choice, grammar and json_object")
        return self

    @property
    def wanted(self) -> Grammar:
        """What the text of the answer must match.

        Raises: UsageError.
        """
        if self.regex is not None:
            return Grammar.of_regex(self.regex)
        if self.choice is not None:
            return Grammar.of_choices(self.choice)
        if self.grammar is not None:
            return Grammar.of_text(self.grammar)
        return Grammar.of_schema(ANY_OBJECT if self.json_ is None else self.json_)


class FormFields(Fields):
    """Fields of a request that ask for a form of its answer. structured_outputs is vLLM's."""

    response_format: ResponseFormat | None = Field(None, description=FORMAT)
    structured_outputs: StructuredOutputs | None = Field(None, description='an object such as {"regex": "[a-z]+"}')

    @model_validator(mode="after")
    def _one_form(self) -> FormFields:
        form = None if self.response_format is None else self.response_format.type
        if self.structured_outputs is not None and form not in (None, "text"):
            raise ValueError("response_format and structured_outputs: received both, expected one of them")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the text of the answer must match; None for any text.

        Raises: UsageError.
        """
        if self.structured_outputs is not None:
            return self.structured_outputs.wanted
        return None if self.response_format is None else self.response_format.grammar
