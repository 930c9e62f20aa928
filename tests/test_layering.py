"""Which module may import which: the arrangement of the code, held by its own imports."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ipam_plugin"
MODULES = sorted(each.stem for each in PACKAGE.glob("*.py") if each.stem not in ("__init__", "__main__"))

# What a module may import of this package. One that is not here fails: put it where it belongs.
ALLOWED = {
    "errors": set(),
    "addresses": set(),
    "model": {"addresses", "errors"},
    "protocol": {"addresses", "errors"},
    "decisions": {"addresses", "errors", "model"},
    "view": {"addresses", "errors", "model"},
    "interfaces": set(),
    "packets": {"addresses"},
    "wire": {"addresses", "errors", "interfaces", "packets"},
    "scan": {"addresses", "errors", "interfaces", "packets", "wire"},
    "vendors": set(),
    "evidence": {"addresses", "errors", "model"},
    "dockerd": {"addresses", "errors", "evidence"},
    "check": {"addresses", "decisions", "errors", "evidence", "model"},
    "board": {"addresses", "errors", "model"},
    "doctor": {"addresses", "evidence", "model"},
    "etcd3_import": set(),
    "etcd": {"errors", "etcd3_import"},
    "config": {"addresses", "errors"},
    "metrics": {"addresses"},
    "embedded_etcd": {"errors"},
    "install": {"errors"},
    "manual": set(),
    "schema": {"errors", "etcd", "model"},
    "ledger": {"addresses", "decisions", "errors", "etcd", "model", "view"},
    "neighbourhood": {"addresses", "errors", "interfaces", "model", "view", "wire"},
    "journal": {"addresses", "errors", "model"},
    "outage": {"addresses", "errors", "journal", "model"},
    "claims": {"addresses", "decisions", "errors", "etcd", "ledger", "model", "neighbourhood", "outage", "view"},
    "holds": {"addresses", "claims", "decisions", "errors", "evidence", "ledger", "model", "view"},
    "standby": {"addresses", "claims", "errors", "ledger", "model", "neighbourhood", "view", "wire"},
    "register": {
        "addresses", "claims", "decisions", "errors", "etcd", "journal", "ledger", "model", "neighbourhood", "outage",
        "protocol", "view",
    },
    "reconcile": {
        "addresses", "claims", "decisions", "errors", "evidence", "ledger", "model", "neighbourhood", "register",
        "view",
    },
    "restoration": {"errors", "etcd", "ledger", "model", "view"},
    "retirement": {"decisions", "model"},
    "retire": {"addresses", "errors", "etcd", "ledger", "model", "neighbourhood", "retirement", "view"},
    "explain": {"addresses", "model"},
    "adopt": {"addresses", "check", "decisions", "evidence", "explain", "model"},
    "operations": {"addresses", "adopt", "check", "decisions", "errors", "etcd", "explain", "model", "schema"},
    "examine": {
        "addresses", "config", "dockerd", "doctor", "errors", "etcd", "evidence", "interfaces", "model", "operations",
        "wire",
    },
    "host": {"addresses", "errors", "etcd", "interfaces", "model", "register", "view"},
    "app": {"errors", "metrics", "model", "protocol"},
    "daemon": {
        "addresses", "app", "claims", "config", "dockerd", "embedded_etcd", "errors", "etcd", "holds", "host",
        "interfaces", "journal", "ledger", "metrics", "model", "neighbourhood", "outage", "reconcile", "register",
        "restoration", "retire", "schema", "standby", "vendors", "view", "wire",
    },
    "web": {"addresses", "board", "errors", "etcd", "model"},
    "cli": {
        "addresses", "adopt", "check", "config", "daemon", "dockerd", "doctor", "errors", "etcd", "evidence", "examine",
        "explain", "host", "install", "journal", "manual", "model", "operations", "scan", "schema", "vendors", "web",
    },
}  # fmt: skip

# Who may import a library, by its top-level name.
OWNERS = {
    "etcd3": {"etcd3_import"},
    "grpc": {"etcd"},
    "google": {"etcd3_import"},
    "docker": {"dockerd"},
    "requests": {"dockerd"},  # its errors come through the SDK as they are
    "pyroute2": {"interfaces"},
    "yaml": {"config"},
    "flask": {"app", "daemon", "web"},  # the daemon only names the type
    "werkzeug": {"app", "web"},
    "gunicorn": {"daemon", "web"},
    "prometheus_client": {"metrics"},
    "click": {"cli", "manual"},
    "rich": {"cli"},
    "msgspec": {
        "app",
        "board",
        "check",
        "cli",
        "config",
        "daemon",
        "decisions",
        "host",
        "install",
        "journal",
        "model",
        "operations",
        "protocol",
        "register",
        "retire",
        "retirement",
        "web",
    },
}

# Pure: values in, values out, and the time is one of the values.
PURE = {
    "errors": set(),
    "addresses": {"bisect", "collections", "ipaddress", "typing"},
    "packets": {"dataclasses", "enum", "ipaddress", "struct"},
    "model": {"collections", "dataclasses", "datetime", "functools", "re", "typing"},
    "protocol": {"enum", "re", "typing"},
    "decisions": {"collections", "enum", "ipaddress", "typing"},
    "evidence": {"collections", "enum", "typing"},
    "retirement": {"collections", "typing"},
    "check": {"collections", "datetime", "typing"},
    "explain": {"collections", "datetime", "enum", "shlex", "typing"},
    "adopt": {"collections", "shlex", "typing"},
    "board": {"collections", "heapq", "typing"},
    "doctor": {"collections", "shlex", "typing"},
    "manual": {"collections", "re"},
}
CLOCKS = {"now", "utcnow", "today", "time", "monotonic"}


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module: str) -> tuple[set[str], set[str]]:
    """What a module imports anywhere in its text: modules of this package, and others by their top-level name."""
    ours, others = set(), set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; say ipam_plugin"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "ipam_plugin":
                others.add(top)
            elif rest and rest.split(".")[0] != "__version__":
                ours.add(rest.split(".")[0])
    return ours, others - {"__future__"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    """A module imports only what lies below it, so that each can be read, tested and replaced with those alone."""
    assert imports(module)[0] <= ALLOWED[module]


def test_the_arrangement_has_no_circle() -> None:
    """What is allowed has an order: every module can be put after all that it may import."""
    order: list[str] = []
    while len(order) < len(ALLOWED):
        fit = [each for each in ALLOWED if each not in order and ALLOWED[each] <= set(order)]
        assert fit, f"a circle among {set(ALLOWED) - set(order)}"
        order += fit


@pytest.mark.parametrize("module", MODULES)
def test_a_library_has_one_door(module: str) -> None:
    """Each library is known in one place only: there it is replaced, and there its habits are mended."""
    for library in imports(module)[1] - set(sys.stdlib_module_names):
        assert module in OWNERS[library], f"{module} imports {library}, which belongs to {OWNERS[library]}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_stay_pure(module: str) -> None:
    """What is decided is apart from input and output: no sockets, threads, files, logs, randomness or clocks."""
    assert imports(module)[1] & set(sys.stdlib_module_names) <= PURE[module]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in {*CLOCKS, "open", "print", "input"}, f"{module}:{node.lineno} calls {called}()"


def test_the_view_reads_its_clock_in_one_place() -> None:
    """The view is given its clock: time.time only as the default, time.monotonic only to wait until a deadline."""
    used = {
        node.attr
        for node in ast.walk(tree("view"))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    }
    assert used <= {"time", "monotonic"}
    assert not imports("view")[1] & {"socket", "os", "random", "subprocess", "datetime"}
    calls = [
        node.lineno
        for node in ast.walk(tree("view"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time"
    ]
    assert calls == []
