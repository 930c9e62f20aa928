"""The commands of README.md, and typing them on machines that were really booted.

A console block has lines `PROMPT# command`: `here` is a machine with a checkout, `every host` means host1, host2
and host3. A here-document follows its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.booted import CHECKOUT, HOSTS, BootedHost, Lan, at_once
from tests.lab.node import ROOT

TEXT = (ROOT / "README.md").read_text()
ADOPT = "Adopt a running network"
"""The heading whose commands are typed on hosts that have such a network (test_adopt_engine.py)."""
TIMES: list[str] = []
"""What took long, a line each."""


@dataclass(frozen=True)
class Line:
    """What is typed: at which prompt, under which heading."""

    prompt: str
    command: str
    heading: str

    @property
    def hosts(self) -> tuple[str, ...]:
        return HOSTS if self.prompt == "every host" else (self.prompt,)


def lines() -> list[Line]:
    """The commands of README's console blocks, in order. A line that is none of the known kinds is an error."""
    found: list[Line] = []
    heading = end = ""
    inside = False
    for text in TEXT.splitlines():
        if not inside:
            if text.startswith("#"):
                heading = text.lstrip("# ")
            inside = text == "```console"
        elif end:
            found[-1] = Line(found[-1].prompt, f"{found[-1].command}\n{text}", heading)
            end = "" if text == end else end
        elif text == "```":
            inside = False
        else:
            match = re.fullmatch(r"(here|every host|host[123])# (\S.*)", text)
            assert match is not None, f"README.md, under {heading}: who types this? {text}"
            found.append(Line(match[1], match[2], heading))
            document = re.search(r"<<('?)(\w+)\1$", match[2])
            end = document[2] if document else ""
    assert not inside, "README.md: a console block has no end"
    return found


def type_all(lan: Lan, batch: list[Line]) -> dict[str, str]:
    """Types lines that have one prompt, on all their hosts at once; what the last one said, by host."""

    def work(host: BootedHost) -> str:
        said = ""
        for line in batch:
            done = host(line.command, 120, cwd=CHECKOUT)
            said = done.stdout + done.stderr
            if done.seconds > 2:
                TIMES.append(f"{done.seconds:5.1f} s  {host.name}# {line.command.splitlines()[0]}")
        return said

    names = batch[0].hosts if batch else ()
    return dict(zip(names, at_once(work, [lan.hosts[name] for name in names]), strict=True)) if names else {}
