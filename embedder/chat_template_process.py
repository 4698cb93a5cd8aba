"""Renders chat templates in a process of its own, with little memory and little time. Run by `chat_template`.

A template comes with a model, so it may loop for ever or make a string that fills the memory. No check of its text can
tell, but the system ends a process that has used its seconds. Standard library and jinja2 only: `python -I this_file
SECONDS FOLDER ...`: seconds of computing for one prompt, and the folders that hold jinja2 and markupsafe.

The first line of standard input is `{"template": ..., "tokens": {...}}`, each further one `{"messages": [...]}`; each
is answered by one line, `{"text": ...}` or `{"error": ...}`.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from typing import Any

MEMORY = 2**29  # bytes, Python included
LONGEST = 2**22  # characters of a rendered prompt
TODAY = datetime.datetime(2024, 7, 26)  # for every template that asks: a vector must not depend on the day


def main() -> None:
    """Answer line by line until standard input ends."""
    seconds = float(sys.argv[1])
    sys.path += sys.argv[2:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template, tokens = None, {}
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # counts computing, not waiting; then the system ends the process
        asked = json.loads(line)
        try:
            if template is None:
                template, tokens = compiled(asked["template"]), asked["tokens"]
                answer = {"text": ""}
            else:
                answer = {"text": rendered(template, asked["messages"], tokens)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def rendered(template: Any, messages: list[dict[str, Any]], tokens: dict[str, Any]) -> str:
    """Return the prompt, with the assistant's turn opened."""
    text: str = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens)
    if len(text) > LONGEST:
        raise ValueError(f"the prompt has {len(text)} characters")
    return text


def compiled(source: str) -> Any:
    """Return a template with what transformers offers to chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; here it only groups."""

        tags = {"generation"}  # noqa: RUF012 - as jinja declares it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class PlainNamespace(Namespace):
        """A namespace without private names."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"private name {name!r}")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=refuse,
        strftime_now=TODAY.strftime,
        dict=lambda *pairs, **values: dict(*pairs, **values),
        namespace=PlainNamespace,
    )
    return environment.from_string(source)


if __name__ == "__main__":
    main()
