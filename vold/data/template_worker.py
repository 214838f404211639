"""One process that renders chat templates: `python -m vold.data.template_worker SECONDS BYTES`, JSON lines in and out.

    in   {"template": "{{ messages[0].content }}", "chats": [[{"role": "user", "content": "1+1?"}]], "variables": {}}
    out  {"ready": true} once, then per line {"texts": ["1+1?"], "retire": false}

Behind the texts, which then end early, may stand "refused": the template's reason to refuse the next chat; or "error":
the limit that it broke.

A template comes with a checkpoint, and jinja's sandbox bounds neither time nor memory: `'x' * 9999999999` needs no more
than a line. The limits are those of a grading worker (vold.grading.worker). The environment is the one in which
transformers renders; importing transformers here would take seconds.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from vold.grading.worker import address_space, limit, lines, private_stdout, send

MAX_CHARACTERS = 1 << 24  # of a rendered text, some five million tokens


def main() -> None:
    seconds, max_bytes = float(sys.argv[1]), int(sys.argv[2])
    import os

    parent, output = os.getppid(), private_stdout()
    limit(max_bytes)
    try:
        compile_template("")
    except Exception as error:
        send(output, {"failed": f"{type(error).__name__}: {error}"})
        return
    send(output, {"ready": True})
    for line in lines(parent):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = render(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(output, reply | {"retire": address_space() > max_bytes / 2})


def render(template: str, chats: list[list[dict]], variables: dict[str, Any]) -> dict[str, Any]:
    """The reply to a line."""
    import jinja2

    texts: list[str] = []
    try:
        compiled = compile_template(template)
        for chat in chats:
            texts.append(compiled.render(messages=chat, **variables))
            if sum(map(len, texts)) > MAX_CHARACTERS:
                return {"texts": [], "error": "length"}
    except MemoryError:
        return {"texts": [], "error": "memory"}
    except Exception as error:  # a template may raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return {"texts": texts, "refused": kind + str(error)[:300]}
    return {"texts": texts}


@lru_cache(maxsize=8)
def compile_template(template: str):
    """A compiled template in the environment of transformers 5 (chat_template_utils)."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %}, which marks an assistant's turn: its content."""

        tags = {"generation"}  # noqa: RUF012 - as jinja declares it

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller) -> str:
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


if __name__ == "__main__":
    main()
