"""Which metrics and labels a PromQL expression speaks of, and which of them a daemon serves.

Whether an expression is valid at all, Prometheus itself says (promtool). To it a metric that does not exist is fine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

#: What Prometheus adds to everything that it reads, and what it makes itself.
TARGET = frozenset({"job", "instance"})
OF_PROMETHEUS: Mapping[str, frozenset[str]] = {"up": frozenset()}

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)
    |(?P<window>\[[^\]]*\])
    |(?P<word>[a-zA-Z_:][a-zA-Z0-9_:]*)
    |(?P<number>[0-9][0-9a-zA-Z_.]*|\$\w+)
    |(?P<sign>=~|!~|!=|==|<=|>=|[-+*/%^<>=(){},@])""",
    re.VERBOSE,
)
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


class Spoken(NamedTuple):
    """What an expression speaks of: each selector as its metric and the labels that it asks for, and the labels that
    its operators name."""

    selectors: list[tuple[str, frozenset[str]]]
    grouped: frozenset[str]


def spoken_of(expression: str) -> Spoken:
    """Raises ValueError at what no token begins with."""
    tokens = list(_tokens(expression))
    selectors: list[tuple[str, frozenset[str]]] = []
    grouped: set[str] = set()
    number = 0

    def labels(end: str) -> frozenset[str]:
        """From the opening sign, which is next, to the end: every word in between is a label."""
        nonlocal number
        found = set()
        while tokens[number][1] != end:
            kind, text = tokens[number]
            if kind == "word":
                found.add(text)
            number += 1
        return frozenset(found)

    while number < len(tokens):
        kind, text = tokens[number]
        number += 1
        if kind != "word" or text.lower() in _WORDS:
            continue
        following = tokens[number][1] if number < len(tokens) else ""
        if text in _GROUPING:
            if following == "(":
                grouped |= labels(")")
        elif following == "{":
            selectors.append((text, labels("}")))
        elif following != "(" and following not in _GROUPING:  # else a function, or an aggregation
            selectors.append((text, frozenset()))
    return Spoken(selectors, frozenset(grouped))


def _tokens(expression: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"{expression[at : at + 20]!r} in {expression!r} is no PromQL")
        at = match.end()
        if match.lastgroup != "space":
            yield str(match.lastgroup), match[0]


def served(exposition: str) -> dict[str, frozenset[str]]:
    """Every name that may be asked for in what a daemon serves, with its labels; without any where it has no sample."""
    found: dict[str, frozenset[str]] = {}
    for family in text_string_to_metric_families(exposition):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if family.type != "histogram":
            found[name] = frozenset()
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found[sample.name] = found.get(sample.name, frozenset()) | sample.labels.keys()
    return found


def unknown(expression: str, metrics: Mapping[str, frozenset[str]]) -> list[str]:
    """What an expression speaks of and these metrics do not have, as sentences."""
    known = {**OF_PROMETHEUS, **metrics}
    found = []
    selectors, grouped = spoken_of(expression)
    if not selectors:
        found.append(f"{expression!r} speaks of no metric")
    there = set(TARGET)
    for name, asked in selectors:
        if name not in known:
            found.append(f"there is no metric {name}")
        else:
            there |= known[name]
            found += [f"{name} has no label {label}" for label in sorted(asked - known[name] - TARGET)]
    if all(name in known for name, _ in selectors):
        found += [f"nothing in {expression!r} has the label {label}" for label in sorted(grouped - there)]
    return found
