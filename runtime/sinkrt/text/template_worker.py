"""Render chat templates in a process of its own, which may be ended at any time.

A template is a program that came with a model: it may loop forever or fill the memory. `sinkrt.text.template_process`
starts this file as a script, with no other module of this package, and talks to it in lines of JSON:

    {"load": SOURCE}     -> {"variables": [names that the template reads], "literals": text that it writes itself}
    {"render": [VARIABLES, ..], "now": SECONDS} -> {"renderings": [{"text": TEXT} or {"error": REASON}, ..]}

or ``{"error": REASON}`` for the whole. SECONDS since 1970 are the time that the renderings show.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHARACTERS = 16 * 2**20
"""Longest rendering."""
MAX_MEMORY_BYTES = 2**30
"""Most address space of the process, where the system can limit it."""


def environment(now: Callable[[], float] = time.time) -> Any:
    """The Jinja environment of chat templates, with what transformers gives them. Returns: jinja2.Environment.

    now: seconds since 1970, for ``strftime_now``.

    Source: transformers' ``chat_template_utils._compile_jinja_template``.
    """
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox

    class GenerationTag(jinja2.ext.Extension):
        """``{% generation %} .. {% endgeneration %}``: marks answers for training, renders its body."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class TemplateNamespace(jinja2.utils.Namespace):
        """A namespace that stores no private names, as in transformers: the sandbox does not look at them."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=1)` is allowed
            self, args = args[0], args[1:]
            values = dict(*args, **kwargs)
            for name in values:
                _refuse_private(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            super().__setitem__(name, value)

    def raise_exception(message: str) -> Any:
        raise jinja2.TemplateError(message)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.fromtimestamp(now()).strftime(form)
    made.globals["dict"] = _TemplateDict()
    made.globals["namespace"] = TemplateNamespace
    return made


class _TemplateDict:
    """``dict(..)`` in templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class Renderer:
    """Renderer of one template, which it compiles."""

    def __init__(self) -> None:
        self._now = 0.0
        self._environment = environment(lambda: self._now)
        self._template: Any = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The response to one request, as described above."""
        try:
            if "load" in request:
                return self._load(request["load"])
            self._now = request["now"]
            return {"renderings": [self._render(variables) for variables in request["render"]]}
        except Exception as error:  # templates are programs: they fail in any way
            return {"error": _reason(error)}

    def _load(self, source: str) -> dict[str, Any]:
        import jinja2.meta
        import jinja2.nodes

        tree = self._environment.parse(source)
        literals = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        literals += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        self._template = self._environment.from_string(source)
        # "\0" between them: no text is found across two.
        return {"variables": sorted(jinja2.meta.find_undeclared_variables(tree)), "literals": "\0".join(literals)}

    def _render(self, variables: dict[str, Any]) -> dict[str, Any]:
        parts, size = [], 0
        try:
            for part in self._template.generate(**variables):
                parts.append(part)
                size += len(part)
                if size > MAX_CHARACTERS:
                    return {"error": f"more than {MAX_CHARACTERS} characters"}
            return {"text": "".join(parts)}
        except Exception as error:
            return {"error": _reason(error)}


def main() -> None:
    """Answer requests until stdin ends. argv: JSON of {paths: folders to import from, cpu_s: most CPU time of one}."""
    options = json.loads(sys.argv[1])
    sys.path += options["paths"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, which ends this process
    _limit_memory()
    renderer = Renderer()
    for line in sys.stdin.buffer:
        _limit_time(options["cpu_s"])
        try:
            response = json.dumps(renderer.answer(json.loads(line)))
        except Exception as error:
            response = json.dumps({"error": _reason(error)})
        sys.stdout.buffer.write(response.encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def _limit_time(seconds: int) -> None:
    """Limit CPU time: the parent ends a slow rendering, and this ends one whose parent is gone."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(usage.ru_utime + usage.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        import jinja2.exceptions

        raise jinja2.exceptions.SecurityError(f"a namespace cannot store {name!r}")


def _reason(error: Exception) -> str:
    """Reason of an error, in one line."""
    if isinstance(error, MemoryError):
        return f"more than {MAX_MEMORY_BYTES} bytes of memory"
    return " ".join(str(error).split())[:200] or type(error).__name__


if __name__ == "__main__":
    main()
