"""The manual page: the help of every command on one page, in the language of man(7). Pure.

`ipam-plugin install` writes it, so that it always tells of the version that is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

FRONT = """\
.TH IPAM\\-PLUGIN 8 "" "ipam\\-plugin {version}" "System administration"
.SH NAME
ipam\\-plugin \\- Docker IPAM driver: one register of addresses, in etcd, for all hosts of a LAN
.SH SYNOPSIS
"""
BACK = """\
.SH EXIT STATUS
.TP
.B 0
Done.
.TP
.B 1
Something was found, or refused; a line on standard error says what, and what to do.
.TP
.B 2
The command or the configuration cannot be used.
.SH ENVIRONMENT
.TP
.B IPAM_PLUGIN_CONFIG
The configuration, where \\-\\-config does not name it.
.SH FILES
.TP
.I /etc/ipam\\-plugin/config.yaml
The configuration. The example that is put there shows every key with its default; only etcd.endpoints has none.
.TP
.I /etc/docker/plugins/ipam\\-plugin.spec
Tells Docker where the daemon listens.
.TP
.I /run/ipam\\-plugin/ipam\\-plugin.sock
There; for root alone.
.TP
.I /var/lib/ipam\\-plugin
The name under which this host is in the register, and what was done while etcd was away.
.SH SEE ALSO
.BR dockerd (8),
.BR docker\\-network\\-create (1),
.BR etcdctl (1),
.BR systemctl (1),
.BR journalctl (1)
"""


def page(program: click.Group, version: str) -> str:
    """The page, in ASCII, so that it reads the same in every locale."""
    top = click.Context(program, info_name="ipam-plugin", **program.context_settings)
    lines = [".B ipam\\-plugin", _text(" ".join(program.collect_usage_pieces(top)))]
    lines += [".SH DESCRIPTION", *_paragraphs(program.help)]
    lines += [".SH OPTIONS", *_options(program, top)]
    lines += [".SH COMMANDS"]
    lines += [line for command, context in _commands(program, top) for line in _command(command, context)]
    return FRONT.format(version=_text(version)) + "\n".join(lines) + "\n" + BACK


def _commands(group: click.Group, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Every command that does something, with the words before it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from _commands(command, inner)
        elif not command.hidden:
            yield command, inner


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    yield f".SS {_text(context.command_path)} {_text(' '.join(command.collect_usage_pieces(context)))}".rstrip()
    yield from _paragraphs(command.help)
    yield from _options(command, context, but="--help")


def _options(command: click.Command, context: click.Context, but: str = "") -> Iterator[str]:
    for option in command.get_params(context):
        told = option.get_help_record(context) if isinstance(option, click.Option) else None
        if told is not None and but not in option.opts:
            yield from (".TP", f".B {_text(told[0])}", _text(told[1]))


def _paragraphs(text: str | None) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", (text or "").strip())
    return [line for each in paragraphs for line in (".PP", _text(" ".join(each.split())))]


def _text(text: str) -> str:
    """As it is read: a backslash is one, a dash can be copied, and no line begins with what man takes for an order."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("'", "\\(aq")
    ascii_only = "".join(each if each.isascii() else f"\\[u{ord(each):04X}]" for each in escaped)
    return f"\\&{ascii_only}" if ascii_only.startswith(".") else ascii_only
