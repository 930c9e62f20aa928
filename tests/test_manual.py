"""The manual page and the shells' completions: what an operator has beside README, without the network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conftest import missing
from ipam_plugin import __version__, manual
from ipam_plugin.cli import cli

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "ipam_plugin/assets"
PAGE = manual.page(cli, __version__)


def commands(group: click.Group = cli, before: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield " ".join((*before, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))


def formatted(text: str) -> str:
    """The page as it is read; man's own complaints fail the test."""
    if shutil.which("groff") is None:
        missing("systemd", "groff is not installed")
    done = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", "-ww"], input=text, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


# --- the page ----------------------------------------------------------------------------------------------


def test_every_command_says_what_it_does_and_so_does_every_option() -> None:
    """`--help` stands alone: nobody has to look into README for a word of it."""
    for name, command in commands():
        assert command.help, name
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{name} {option.opts}"


def test_the_page_has_every_command_with_every_option() -> None:
    read = " ".join(formatted(PAGE).split())
    for name, command in commands():
        if isinstance(command, click.Group):
            continue
        [part] = re.findall(
            rf" ipam-plugin {name} \[OPTIONS\](.*?)(?= ipam-plugin [a-z -]+ \[OPTIONS\]| EXIT STATUS )", read
        )
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(each in part for each in option.opts), f"{name} {option.opts}"
        assert " ".join((command.help or "").split())[:40].replace("-", "") in part.replace("-", ""), name
    assert f"ipam-plugin {__version__}" in read


def test_the_page_reads_the_same_in_every_locale() -> None:
    assert PAGE.isascii()
    assert PAGE.endswith("\n")


HOSTILE = "Begins.\n\n.so /etc/passwd\n\n'ig\n\nC:\\new \\fB -- x–y `z` \\*[a]"


def test_no_help_is_taken_for_an_order_to_man() -> None:
    """Text that begins with a full stop, a backslash or a quote is text."""

    @click.group()
    def program() -> None:
        """Does."""

    @program.command(help=HOSTILE)
    @click.option("--dot", help=".br")
    def one(dot: str) -> None: ...

    read = " ".join(formatted(manual.page(program, "1")).split())
    for text in (".so /etc/passwd", "'ig", "C:\\new \\fB -- x", "`z` \\*[a]", "--dot TEXT .br"):
        assert text in read, read


# --- completion ----------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with the command as it is installed."""
    command = tmp_path / "bin/ipam-plugin"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m ipam_plugin "$@"\n')
    command.chmod(0o755)
    return f"{command.parent}:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("rel", ["release"]),
        ("un", ["uninstall", "unreserve"]),
        ("host re", ["retire"]),
        ("host ", ["retire"]),
        ("leases --k", ["--kind"]),
        ("leases --kind st", ["standby"]),
        ("leases -o ", ["table", "json"]),
        ("--config x show --seg", ["--segment"]),
    ],
)
def test_bash_completes(path: str, typed: str, offered: list[str]) -> None:
    """Commands, options and their choices, in a real bash; it asks nobody on the network for that."""
    words = ["ipam-plugin", *typed.split(" ")]
    script = (
        f"source {ASSETS}/completion.bash; "
        "read -r _ _ _ _ function _ < <(complete -p ipam-plugin); "
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $function ipam-plugin; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", *words],
        env={"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == offered
    assert done.stderr == ""


@pytest.mark.parametrize(("shell", "check"), [("zsh", "-n"), ("fish", "--no-execute")])
def test_other_shells_take_their_file(shell: str, check: str) -> None:
    """They are click's own, as bash's is; where the shell is there, it reads them."""
    text = (ASSETS / f"completion.{shell}").read_text()
    assert f"_IPAM_PLUGIN_COMPLETE={shell}_complete" in text
    if shutil.which(shell) is not None:
        subprocess.run([shell, check, str(ASSETS / f"completion.{shell}")], check=True, timeout=60)


@pytest.mark.parametrize(
    ("shell", "words", "current", "offered"),
    [
        ("zsh", "ipam-plugin rele", "1", "plain\nrelease\n"),
        ("fish", "ipam-plugin rele", "rele", "plain,release"),
    ],
)
def test_other_shells_are_answered(path: str, shell: str, words: str, current: str, offered: str) -> None:
    """What their file sends to the command gets the command's name back."""
    told = {"_IPAM_PLUGIN_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": current}
    done = subprocess.run(
        ["ipam-plugin"], env={"PATH": path, **told}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(offered)
