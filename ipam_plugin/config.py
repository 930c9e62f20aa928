"""The configuration file: YAML in, one frozen value out, and every mistake named in one go.

The only reader of YAML and of the environment. The Structs below are the one description of the
keys: their types, their defaults, and (in the annotation) what may stand there, in the words that the
operator sees. Durations are seconds as float inside, and a number of seconds or `250ms`, `30s`,
`10m`, `24h`, `7d` in the file. A key that is left empty has its default.
"""

import difflib
import ipaddress
import os
import re
import stat
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
import yaml

from ipam_plugin.addresses import parse_address, parse_range
from ipam_plugin.errors import ConfigError

DEFAULT_PATH = "/etc/ipam-plugin/config.yaml"
PATH_VARIABLE = "IPAM_PLUGIN_CONFIG"
EMBEDDED_ENDPOINTS = ("http://127.0.0.1:2379",)

# A file of a megabyte is no configuration; the bound keeps a wrong path (a log, a device) harmless.
_MAX_BYTES = 1 << 20

Probe = Literal["full", "fast", "off"]
ProbeFailure = Literal["warn", "refuse"]


# --- what may stand at a key ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """A value at the end of a key path: `read` returns it as the Structs want it.

    `read` raises ValueError when the value is not what `expected` says. `items` makes it a list of
    such leaves; `single` lets one item stand without the list.
    """

    expected: str
    read: Callable[[Any], object] = lambda value: value
    items: "_Leaf | None" = None
    single: bool = False


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _matching(expected: str, pattern: str) -> _Leaf:
    def read(value: Any) -> str:
        if not re.fullmatch(pattern, _text(value)):
            raise ValueError
        return str(value)

    return _Leaf(expected, read)


def _choice(*words: str) -> _Leaf:
    def read(value: Any) -> str:
        # YAML 1.1 reads an unquoted off as false, and the operator meant the word.
        word = "off" if value is False else value
        if not isinstance(word, str) or word not in words:
            raise ValueError
        return word

    return _Leaf("one of " + ", ".join(words), read)


def _whole(least: int, most: int) -> _Leaf:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError
        return value

    return _Leaf(f"a whole number from {least} to {most}", read)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")


def _seconds(text: str) -> float:
    """'250ms' -> 0.25."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError
    return float(match[1]) * _UNITS[match[2]]


def _duration(least: str, most: str, *, off: bool = False) -> _Leaf:
    low, high = _seconds(least), _seconds(most)

    def read(value: Any) -> float | None:
        if off and (value is False or value == "off"):
            return None
        if isinstance(value, bool):
            raise ValueError
        number = _seconds(value) if isinstance(value, str) else value
        if not isinstance(number, int | float) or not low <= number <= high:
            raise ValueError
        return float(number)

    words = f"a duration from {least} to {most} (a number of seconds, or like 250ms, 30s, 10m, 24h, 7d)"
    return _Leaf(words + (", or off" if off else ""), read)


class _Wrong(ValueError):
    """A ValueError whose sentence is fit for the operator."""


def _address(value: Any) -> str:
    return str(_explained(parse_address, _text(value)))


def _address_range(value: Any) -> str:
    return str(_explained(parse_range, _text(value)))


def _explained(read: Callable[[str], object], text: str) -> object:
    if len(text) > 100:  # longer than any range; the sentence would repeat all of it
        raise ValueError
    try:
        return read(text)
    except ValueError as error:
        raise _Wrong(str(error)) from error


def _key_prefix(value: Any) -> str:
    parts = _text(value).strip("/").split("/")
    # "." and ".." mean nothing to etcd, but would to whoever maps keys to paths.
    if not all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", part) and part.strip(".") for part in parts):
        raise ValueError
    return "/" + "/".join(parts) + "/"


def _path(value: Any) -> str:
    if not _text(value).startswith("/") or "\0" in value:
        raise ValueError
    return str(value)


def _socket_path(value: Any) -> str:
    # unix(7): sun_path holds 108 bytes with the terminating zero.
    if len(os.fsencode(_path(value))) > 107:
        raise ValueError
    return str(value)


def _endpoint(value: Any) -> str:
    url = urlsplit(_text(value))
    if url.scheme not in ("http", "https") or url.path not in ("", "/") or url.query or url.fragment:
        raise ValueError
    if "@" in url.netloc or not re.fullmatch(r"[A-Za-z0-9._:-]+", url.hostname or ""):
        raise ValueError
    host = f"[{ipaddress.IPv6Address(url.hostname)}]" if "[" in url.netloc else url.hostname
    port = 2379 if url.port is None else url.port  # .port raises ValueError beyond 65535
    if port == 0:
        raise ValueError
    return f"{url.scheme}://{host}:{port}"


def _listen(value: Any) -> str:
    if value is False or value == "":
        return ""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", _text(value))
    if match is None or int(match[3]) > 65535:
        raise ValueError
    if match[1]:
        ipaddress.IPv6Address(match[1])
    return str(value)


_NAME = r"(?!.*\.\.)[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_name = _matching(
    "a name of up to 63 letters, digits, dots, dashes and underscores that starts and ends with a letter "
    "or digit (in quotes when it is all digits)",
    _NAME,
)
# dev_valid_name() in the kernel: 1 to 15 bytes, neither "." nor "..", no "/", ":" or white space.
_interface = _matching("the name of a network interface", r"(?!\.\.?$)[!-.0-9;-~]{1,15}")
_file = _Leaf("the absolute path of a file", _path)
_socket = _Leaf("the absolute path of a Unix socket, at most 107 bytes", _socket_path)
_flag = _Leaf("true or false", _truth)
_listen_leaf = _Leaf("ADDRESS:PORT, or '' for none", _listen)
_standby = _whole(0, 64)
_cooldown = _duration("0s", "7d")
_hold = _duration("0s", "30d")
_probation = _duration("1m", "365d")
_probe = _choice("full", "fast", "off")
_probe_failure = _choice("warn", "refuse")


# --- the keys ------------------------------------------------------------------------------------------


class EtcdConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`etcd`: how the register is reached. Endpoints are `http(s)://HOST:PORT`, all of one scheme."""

    endpoints: Annotated[
        tuple[str, ...],
        _Leaf(
            "a list of at least one URL",
            items=_Leaf("http://HOST:PORT or https://HOST:PORT, without user, password or path", _endpoint),
        ),
    ]
    ca_cert: Annotated[str | None, _file] = None
    cert: Annotated[str | None, _file] = None
    key: Annotated[str | None, _file] = None
    username: Annotated[str | None, _matching("a user name of etcd", r"\S{1,256}")] = None
    password_file: Annotated[str | None, _file] = None
    timeout: Annotated[float, _duration("100ms", "60s")] = 2.0

    def files(self) -> dict[str, str]:
        """The files that are named here, by the path of their key."""
        names = ("ca_cert", "cert", "key", "password_file")
        return {f"etcd.{name}": file for name in names if (file := getattr(self, name)) is not None}

    def exposed(self) -> list[str]:
        """A line, with its cure, for each file with a secret that every user of this machine may read or write."""
        secrets = {"etcd.key": self.key, "etcd.password_file": self.password_file}
        return [
            f"{name}: {file} can be read or written by every user of this machine: chmod o= {file}"
            for name, file in secrets.items()
            if file is not None and _is_open_to_all(file)
        ]

    def password(self) -> str | None:
        """The password, read afresh (it may be rotated) and never kept, so no repr or dump can show it.

        One line break at the end of the file is not part of it. Raises ConfigError.
        """
        if self.password_file is None:
            return None
        try:
            text = Path(self.password_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"etcd.password_file: {self.password_file}: {_reason(error)}") from error
        password = text.removesuffix("\n").removesuffix("\r")
        if not password or "\n" in password or "\0" in password:
            raise ConfigError(
                f"etcd.password_file: {self.password_file}: expected the password on one line, "
                f"found {'nothing' if not password else 'several lines'}"
            )
        return password


class SegmentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`segments.NAME`: what differs on this host for one segment. None: as at the top level."""

    interface: Annotated[str | None, _interface] = None
    exclude: Annotated[
        tuple[str, ...],
        _Leaf(
            "a list of addresses, ranges and CIDRs",
            items=_Leaf(
                "an address, a range like 10.0.0.5-10.0.0.20, or a CIDR like 10.0.0.0/28",
                _address_range,
            ),
        ),
    ] = ()
    router: Annotated[
        tuple[str, ...],
        _Leaf("an address, or a list of addresses", items=_Leaf("an address", _address), single=True),
    ] = ()
    probe: Annotated[Probe | None, _probe] = None
    probe_failure: Annotated[ProbeFailure | None, _probe_failure] = None
    standby: Annotated[int | None, _standby] = None
    cooldown: Annotated[float | None, _cooldown] = None
    hold: Annotated[float | None, _hold] = None
    probation: Annotated[float | None, _probation] = None


class DockerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`docker`: the look at dockerd's own list, which frees what it no longer knows."""

    socket: Annotated[str, _socket] = "/var/run/docker.sock"
    reconcile: Annotated[bool, _flag] = True
    grace: Annotated[float, _duration("30s", "1d")] = 300.0


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`metrics`: where Prometheus may look; '' for nowhere."""

    listen: Annotated[str, _listen_leaf] = "127.0.0.1:9179"


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`log`: what the daemon writes to standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], _choice("debug", "info", "warning", "error")] = (
        "info"
    )
    format: Annotated[Literal["text", "json"], _choice("text", "json")] = "text"


class SegmentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What holds on this host for one segment, nothing left to look up. Durations in seconds."""

    name: str
    interface: str | None
    exclude: tuple[str, ...]
    router: tuple[str, ...]
    probe: Probe
    probe_failure: ProbeFailure
    standby: int
    cooldown: float
    hold: float
    probation: float


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. Durations in seconds. `host` None: the machine's hostname, decided with `state_dir`."""

    etcd: EtcdConfig
    host: Annotated[str | None, _name] = None
    socket: Annotated[str, _socket] = "/run/ipam-plugin/ipam-plugin.sock"
    state_dir: Annotated[str, _Leaf("the absolute path of a directory", _path)] = "/var/lib/ipam-plugin"
    prefix: Annotated[
        str, _Leaf("a prefix of etcd keys like /ipam-plugin/v1/, of letters, digits and ._-", _key_prefix)
    ] = "/ipam-plugin/v1/"
    segment: Annotated[str, _name] = "default"
    segments: dict[str, SegmentConfig] = msgspec.field(default_factory=dict)
    probe: Annotated[Probe, _probe] = "full"
    probe_failure: Annotated[ProbeFailure, _probe_failure] = "warn"
    standby: Annotated[int, _standby] = 2
    cooldown: Annotated[float, _cooldown] = 300.0
    hold: Annotated[float, _hold] = 0.0
    probation: Annotated[float, _probation] = 86400.0
    deadline: Annotated[float, _duration("1s", "60s")] = 15.0
    boot_wait: Annotated[float, _duration("0s", "90s")] = 60.0
    retire_after: Annotated[float | None, _duration("10m", "3650d", off=True)] = None
    docker: DockerConfig = DockerConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()

    def for_segment(self, name: str) -> SegmentSettings:
        """The settings of segment `name`, which need not be in the file."""
        own = self.segments.get(name, SegmentConfig())
        return SegmentSettings(
            name=name,
            interface=own.interface,
            exclude=own.exclude,
            router=own.router,
            probe=self.probe if own.probe is None else own.probe,
            probe_failure=self.probe_failure if own.probe_failure is None else own.probe_failure,
            standby=self.standby if own.standby is None else own.standby,
            cooldown=self.cooldown if own.cooldown is None else own.cooldown,
            hold=self.hold if own.hold is None else own.hold,
            probation=self.probation if own.probation is None else own.probation,
        )


# --- reading -------------------------------------------------------------------------------------------


def find(argument: str | os.PathLike[str] | None, environ: Mapping[str, str] | None = None) -> Path:
    """The file to read: the argument, else what IPAM_PLUGIN_CONFIG names, else DEFAULT_PATH."""
    environ = os.environ if environ is None else environ
    return Path(argument or environ.get(PATH_VARIABLE) or DEFAULT_PATH)


def load(path: str | os.PathLike[str] | None = None, *, embedded_etcd: bool = False) -> Config:
    """Reads the file at `path` (None: where `find` says).

    With `embedded_etcd` the endpoints default to the child's, there may be only one, and a file that is at
    none of the usual places is an empty one, so that trying out needs no file. Raises ConfigError: a line per
    wrong key.
    """
    file = find(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        if embedded_etcd and str(file) == DEFAULT_PATH:
            return parse(b"", str(file), embedded_etcd=True)
        raise ConfigError(
            f"{file}: there is no such file; `ipam-plugin install` puts an example at {DEFAULT_PATH}, "
            f"--config and {PATH_VARIABLE} name another one"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {_reason(error)}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{file}: expected a configuration file, found more than {_MAX_BYTES} bytes")
    return parse(data, str(file), embedded_etcd=embedded_etcd)


def parse(data: bytes | str, file: str, *, embedded_etcd: bool = False) -> Config:
    """As `load`, from text; `file` is only named in the errors. Named certificates and keys are opened."""
    tree = _yaml(data, file)
    problems: list[str] = []
    clean = _section(Config, tree, "", problems)
    etcd = clean.setdefault("etcd", {})
    # A wrong `etcd` or wrong endpoints were named already; here only what nobody wrote is missing.
    if isinstance(etcd, dict) and "endpoints" not in etcd and not any(_about(p, "etcd") for p in problems):
        if embedded_etcd:
            etcd["endpoints"] = list(EMBEDDED_ENDPOINTS)
        else:
            problems.append(
                "etcd.endpoints: expected a list of at least one URL like http://10.0.0.1:2379, found nothing"
                " (it is the only key without a default)"
            )
    if not problems:
        config = msgspec.convert(clean, Config)
        problems.extend(_across(config, embedded_etcd))
        if not problems:
            return config
    raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))


def _about(problem: str, path: str) -> bool:
    return problem.startswith((f"{path}: ", f"{path}.endpoints: ", f"{path}.endpoints["))


class _Loader(yaml.SafeLoader):
    """YAML's safe types, and no key twice: PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_found(key.value)} stands there twice", key.start_mark
                )
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)


def _yaml(data: bytes | str, file: str) -> object:
    try:
        return yaml.load(data, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise ConfigError(f"{file}:{where} expected YAML, but {error.problem or error.context}") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: expected YAML, found it nested too deeply") from error
    except Exception as error:
        # PyYAML lets ValueError, KeyError, IndexError and AttributeError of its scalar constructors
        # through (a date of 2001-99-99, `!!bool x`, `!!int ''`), and those are the file's fault as well.
        raise ConfigError(f"{file}: expected YAML, but {' '.join(str(error).split())}") from error


def _section(struct: type[msgspec.Struct], tree: object, path: str, problems: list[str]) -> dict[str, Any]:
    """The part of `tree` that is right, as plain values; what is wrong goes to `problems`."""
    if tree is None:
        return {}
    keys = typing.get_type_hints(struct, include_extras=True)
    if not isinstance(tree, dict):
        problems.append(f"{path or 'the file'}: expected keys and values, found {_found(tree)}")
        return {}
    clean: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str) or key not in keys:
            problems.append(_unknown(key, path, list(keys)))
        elif value is None:
            continue
        elif key == "segments":
            clean[key] = _segments(value, where, problems)
        elif isinstance(keys[key], type):
            clean[key] = _section(keys[key], value, where, problems)
        else:
            leaf = next(item for item in keys[key].__metadata__ if isinstance(item, _Leaf))
            clean.update((key, read) for read in _leaf(leaf, value, where, problems))
    return clean


def _segments(tree: object, path: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(tree, dict):
        problems.append(f"{path}: expected names of segments and their settings, found {_found(tree)}")
        return {}
    clean = {}
    for name, settings in tree.items():
        if isinstance(name, str) and re.fullmatch(_NAME, name):
            clean[name] = _section(SegmentConfig, settings, f"{path}.{name}", problems)
        else:
            problems.append(f"{path}: expected {_name.expected}, found {_found(name)}")
    return clean


def _leaf(leaf: _Leaf, value: object, path: str, problems: list[str]) -> Iterator[object]:
    """Yields the one value that was read, or nothing."""
    if leaf.items is not None:
        if leaf.single and isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or (not value and path == "etcd.endpoints"):
            problems.append(f"{path}: expected {leaf.expected}, found {_found(value)}")
            return
        yield [
            read for index, item in enumerate(value) for read in _leaf(leaf.items, item, f"{path}[{index}]", problems)
        ]
        return
    try:
        yield leaf.read(value)
    except _Wrong as error:
        problems.append(f"{path}: expected {leaf.expected}, but {error}")
    except ValueError:
        # A URL may carry a password, which must not reach a log.
        found = "one with user or password" if isinstance(value, str) and "@" in value else _found(value)
        problems.append(f"{path}: expected {leaf.expected}, found {found}")


def _found(value: object) -> str:
    """`value` for the reader: short, on one line, as it looks in YAML."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            text = repr(value[:60])
            return text if len(value) <= 60 else f"{text}…"
        case int() | float():
            # str() of an int beyond 4300 digits raises ValueError.
            return str(value) if abs(value) < 1e18 or value != value else "a huge number"
        case list():
            return "a list" if value else "an empty list"
        case dict():
            return "keys and values"
    return f"a {type(value).__name__}"


def _unknown(key: object, path: str, valid: list[str]) -> str:
    where = f"{path}." if path else ""
    if not isinstance(key, str):
        return f"{path or 'the file'}: expected the name of a key, found {_found(key)}"
    shown = key if re.fullmatch(r"[!-~]{1,60}", key) else _found(key)
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    elsewhere = [full for full in ALL_KEYS if full.rpartition(".")[2] == key]
    if near:
        hint = f"did you mean {where}{near[0]}?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    else:
        hint = "expected one of " + ", ".join(sorted(valid))
    return f"{where}{shown}: there is no such key; {hint}"


def _key_paths(struct: type[msgspec.Struct], path: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(struct, include_extras=True).items():
        if name == "segments":
            yield from _key_paths(SegmentConfig, f"{path}segments.NAME.")
        elif isinstance(hint, type):
            yield from _key_paths(hint, f"{path}{name}.")
        else:
            yield f"{path}{name}"


ALL_KEYS = tuple(_key_paths(Config))
"""The path of every key that may have a value: `host`, `etcd.endpoints`, `segments.NAME.exclude`."""


def _across(config: Config, embedded_etcd: bool) -> Iterator[str]:
    """What no single key can show: keys that need each other, and the files they name."""
    etcd = config.etcd
    if embedded_etcd and len(etcd.endpoints) > 1:
        yield (
            f"etcd.endpoints: expected one URL with --embedded-etcd, found {len(etcd.endpoints)}: it serves one, "
            "and an etcd at another would be another register"
        )
    schemes = {endpoint.partition(":")[0] for endpoint in etcd.endpoints}
    if len(schemes) > 1:
        yield "etcd.endpoints: expected all http:// or all https://, found both"
    if len(set(etcd.endpoints)) < len(etcd.endpoints):
        yield "etcd.endpoints: expected each URL once, found one twice"
    for name, file in (("ca_cert", etcd.ca_cert), ("cert", etcd.cert), ("key", etcd.key)):
        # With http:// they would be ignored, and the operator would believe that TLS is on.
        if file is not None and "https" not in schemes:
            yield f"etcd.{name}: expected https:// endpoints beside it, found http://"
    for name, value, needed, other in (
        ("cert", etcd.cert, "key", etcd.key),
        ("key", etcd.key, "cert", etcd.cert),
        ("username", etcd.username, "password_file", etcd.password_file),
        ("password_file", etcd.password_file, "username", etcd.username),
    ):
        if value is not None and other is None:
            yield f"etcd.{name}: expected etcd.{needed} beside it, found nothing"
    for name, file in etcd.files().items():
        if name != "etcd.password_file":  # password() says more of it
            try:
                Path(file).read_bytes()
            except OSError as error:
                yield f"{name}: expected a file that can be read, found {file}: {_reason(error)}"
    try:
        etcd.password()
    except ConfigError as error:
        yield str(error)
    if etcd.timeout >= config.deadline:
        yield (
            f"etcd.timeout: expected less than deadline ({config.deadline:g} s), found {etcd.timeout:g} s: "
            "the first try would use up the whole request"
        )


def _is_open_to_all(file: str) -> bool:
    """Whether its mode, and those of the directories above it, let everybody in; not so what is no longer there."""
    real = Path(os.path.realpath(file))
    try:
        reached = all(directory.stat().st_mode & stat.S_IXOTH for directory in real.parents)
        return reached and bool(real.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except OSError:
        return False


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
