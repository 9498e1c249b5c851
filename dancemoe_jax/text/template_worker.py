"""A process that renders chat templates, one JSON line in and one out: a template is a program of somebody else's.

It is run by its path and imports nothing of this package, so that it starts in a moment. Jinja's sandbox keeps templates
from files and from Python's own objects; limits of the system end those that compute for ever or fill the memory.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

SECONDS = 2.0  # of processor time for one rendering; published templates take milliseconds
MEMORY = 2**30  # bytes of the whole process


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training; for serving it is nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_environment() -> jinja2.Environment:
    """What chat templates expect to find, and nothing they could harm: no file, no attribute of Python's own objects."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter writes <, > and & as escapes for web pages, which models are not.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    return environment


def main() -> None:
    """Answer `{"template", "variables", "now"}` with `{"text"}` or `{"error"}`, line by line, until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    environment = template_environment()
    compiled = functools.lru_cache(maxsize=8)(environment.from_string)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # nothing handles its signal, which ends the process
        try:
            request = json.loads(line)
            now = datetime.datetime.fromisoformat(request["now"])
            environment.globals["strftime_now"] = now.strftime
            answer = {"text": compiled(request["template"]).render(request["variables"])}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY >> 20} MiB"}
        except Exception as error:  # a template can fail in any way
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
