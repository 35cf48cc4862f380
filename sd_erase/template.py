"""All settings as a YAML file that explains itself; ``--config`` reads it back."""

from __future__ import annotations

import textwrap
from typing import Any

from sd_erase.config import SECTIONS, RunConfig, to_dict
from sd_erase.flags import FLAGS, spelling
from sd_erase.schema import plain_type, walk

WIDTH = 110
HEAD = f"""Settings of sd-erase, each with what it may be and its flag. Keep what you change and delete the rest: what a file
does not name is the default, and a flag overrides it (sd-erase train --config FILE). Sections: {", ".join(SECTIONS)}."""
CONSENT = "evaluate.trust_pickle"  # is never taken from a file


def template(config: RunConfig | None = None) -> str:
    """`config` (by default all defaults) as commented YAML.

    Example:
        >>> from sd_erase.template import template
        >>> print(template()[template().index("  # Most pairs to forget") :].splitlines()[1])
          max_forget: 1000
    """
    import yaml

    values = to_dict(config or RunConfig())
    lines, section = _comment(HEAD, ""), ""
    for dotted, hint, rule in walk(RunConfig):
        *sections, name = dotted.split(".")
        if sections and sections[0] != section:
            section = sections[0]
            lines += ["", f"{section}:"]
        indent = "  " if sections else ""
        if dotted == CONSENT:
            lines += _comment(f"{name} is consent, which no file gives: pass {spelling(dotted)}.", indent)
            continue
        value: Any = values
        for key in (*sections, name):
            value = value[key]
        kind, item = plain_type(hint)
        many = "a list, each " if kind is tuple else "by name, each " if kind is dict else ""
        lines += [
            "",
            *_comment(f"{FLAGS[dotted].help} {_sentence(many + rule.describe(item or kind))} ({spelling(dotted)})", indent),
        ]
        lines += [
            indent + line for line in yaml.safe_dump({name: value}, allow_unicode=True, default_flow_style=False).splitlines()
        ]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_long_words=False, break_on_hyphens=False
    )
