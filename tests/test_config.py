"""The configuration file: what it accepts, what it refuses and in which words, and the shipped example."""

import contextlib
import os
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import missing
from ipam_plugin import config as configuration
from ipam_plugin.config import ALL_KEYS, Config, EtcdConfig, SegmentConfig, find, load, parse
from ipam_plugin.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "config.example.yaml"
ETCD = "etcd: {endpoints: ['http://127.0.0.1:2379']}\n"


def problems(text: str, **options: Any) -> list[str]:
    """What is wrong with a file, line by line, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "FILE", **options)
    lines = str(caught.value).splitlines()
    assert all(line.startswith("FILE: ") for line in lines)
    return [line.removeprefix("FILE: ") for line in lines]


def problem(text: str, **options: Any) -> str:
    """The one thing that is wrong with a file."""
    lines = problems(text, **options)
    assert len(lines) == 1, lines
    return lines[0]


# --- the example ---------------------------------------------------------------------------------------


def test_the_example_shows_every_key_with_its_default() -> None:
    """Whoever installs the example unchanged gets exactly the defaults of the code."""
    expected = Config(
        etcd=EtcdConfig(endpoints=configuration.EMBEDDED_ENDPOINTS), segments={"default": SegmentConfig()}
    )
    assert load(EXAMPLE) == expected


def test_the_example_has_every_key_and_no_other() -> None:
    """A key that is added to the code without a line in the example is not finished."""

    def paths(tree: dict[str, Any], path: str = "") -> set[str]:
        found = set()
        for key, value in tree.items():
            found |= paths(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}"}
        return found

    shown = {path.replace("segments.default.", "segments.NAME.") for path in paths(_example())}
    assert shown == set(ALL_KEYS)


def _example() -> dict[str, Any]:
    tree = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


def test_every_setting_of_a_segment_but_its_own_three_stands_at_the_top_level_too() -> None:
    """What a segment leaves out is found under the same name at the top, with the same type."""
    own = typing.get_type_hints(SegmentConfig)
    top = typing.get_type_hints(Config)
    assert set(own) - set(top) == {"interface", "exclude", "router"}
    for name in set(own) & set(top):
        assert own[name] == top[name] | None


# --- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30.0),
        ("0.5", 0.5),
        ("250ms", 0.25),
        ("30s", 30.0),
        ("10m", 600.0),
        ("24h", 86400.0),
        ("7d", 604800.0),
    ],
)
def test_durations_are_seconds_inside(text: str, seconds: float) -> None:
    """A bare number is seconds; each unit of the documentation is understood."""
    assert parse(f"{ETCD}cooldown: {text}\n", "FILE").cooldown == seconds


@pytest.mark.parametrize(
    "text", ["-1", "true", "8d", "1w", "'30 s'", "1h30m", ".inf", ".nan", "1e400", "[]", "''", "10 minutes"]
)
def test_what_is_no_duration_is_refused_with_the_range(text: str) -> None:
    """A duration that cannot be meant never becomes some other one."""
    line = problem(f"{ETCD}cooldown: {text}\n")
    assert line.startswith("cooldown: expected a duration from 0s to 7d (a number of seconds, or like 250ms")


@pytest.mark.parametrize("text", ["off", "'off'", "false", "no"])
def test_an_unquoted_off_works_where_the_word_is_a_value(text: str) -> None:
    """YAML 1.1 reads off as false; the operator who typed the documented word is right."""
    config = parse(f"{ETCD}probe: {text}\nretire_after: {text}\nsegments: {{lan: {{probe: {text}}}}}\n", "FILE")
    assert config.probe == "off"
    assert config.retire_after is None
    assert config.for_segment("lan").probe == "off"


@pytest.mark.parametrize("prefix", ["/a/b/", "a/b", "/a/b", "a/b/"])
def test_the_prefix_begins_and_ends_with_a_slash(prefix: str) -> None:
    """However it is typed, all hosts use the same keys, and /a never covers /ab."""
    assert parse(f"{ETCD}prefix: {prefix}\n", "FILE").prefix == "/a/b/"


@pytest.mark.parametrize("prefix", ["/", "''", "/a//b/", "/a/../b/", "/a b/", "/a/./"])
def test_a_prefix_that_is_no_own_place_is_refused(prefix: str) -> None:
    """The register never shares its key space with all of etcd."""
    assert problem(f"{ETCD}prefix: {prefix}\n").startswith("prefix: expected a prefix of etcd keys")


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://10.0.0.1:2379", "http://10.0.0.1:2379"),
        ("https://etcd-1.example.org/", "https://etcd-1.example.org:2379"),
        ("http://[2001:DB8::1]:4001", "http://[2001:db8::1]:4001"),
    ],
)
def test_endpoints_are_normal(url: str, normal: str) -> None:
    """One spelling of an endpoint inside: scheme, host, port."""
    assert parse(f"etcd: {{endpoints: ['{url}']}}\n", "FILE").etcd.endpoints == (normal,)


@pytest.mark.parametrize(
    "url",
    ["10.0.0.1:2379", "ftp://a:1", "http://", "http://a:0", "http://a:99999", "http://a:b", "http://a/v3",
     "http://a?x", "http://[::1", "http://[v1.a]", "http://a b:1", "unix:///run/etcd"],
)  # fmt: skip
def test_a_wrong_endpoint_is_named_by_its_index(url: str) -> None:
    """The third member's typing error is not looked for in the first."""
    line = problem(f"etcd: {{endpoints: ['http://a:1', '{url}']}}\n")
    assert line.startswith("etcd.endpoints[1]: expected http://HOST:PORT or https://HOST:PORT")
    assert line.endswith(f"found {url!r}")


def test_a_segment_that_sets_nothing_is_as_the_top_level() -> None:
    """What a segment does not set, and a segment that is not in the file, has the top level's values."""
    config = parse(f"{ETCD}standby: 7\nhold: 10m\nsegments: {{lan: {{hold: 0, exclude: [10.0.0.7]}}}}\n", "FILE")
    lan, other = config.for_segment("lan"), config.for_segment("other")
    assert (lan.standby, lan.hold, lan.exclude) == (7, 0.0, ("10.0.0.7",))
    assert (other.standby, other.hold, other.exclude, other.interface) == (7, 600.0, (), None)


def test_every_setting_of_the_top_level_reaches_a_segment_and_can_be_changed_there() -> None:
    """A key that is added to the file and forgotten on its way to the daemon would be without effect."""
    values = {
        "probe": ("fast", "off"), "probe_failure": ("refuse", "warn"), "standby": (3, 5), "cooldown": (61.0, 62.0),
        "hold": (63.0, 64.0), "probation": (65.0, 31536000.0),
    }  # fmt: skip
    assert set(values) == set(typing.get_type_hints(SegmentConfig)) & set(typing.get_type_hints(Config))
    for key, (top, own) in values.items():
        config = parse(f"{ETCD}{key}: {top}\nsegments: {{lan: {{{key}: {own}}}}}\n", "FILE")
        assert getattr(config.for_segment("other"), key) == top
        assert getattr(config.for_segment("lan"), key) == own
    assert parse(ETCD, "FILE").for_segment("lan").probation == 24 * 3600


def test_a_router_is_one_address_or_one_for_each_family() -> None:
    """The common case needs no list."""
    for text, router in [("10.0.0.1", ("10.0.0.1",)), ("[10.0.0.1, 'FE80::1']", ("10.0.0.1", "fe80::1"))]:
        assert parse(f"{ETCD}segments: {{lan: {{router: {text}}}}}\n", "FILE").for_segment("lan").router == router


def test_an_empty_key_has_its_default() -> None:
    """`log:` with all its lines commented out, which YAML reads as nothing, is no error."""
    config = parse(f"{ETCD}docker:\nlog:\nprobe:\nsegments:\nhost:\n", "FILE")
    assert config == parse(ETCD, "FILE")


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "expected", "found"),
    [
        ("host: 12", "host", "a name", "12"),
        ("host: -a", "host", "a name", "'-a'"),
        ("socket: run/x.sock", "socket", "the absolute path of a Unix socket", "'run/x.sock'"),
        (f"socket: /{'x' * 107}", "socket", "at most 107 bytes", "…"),
        ("state_dir: ~/x", "state_dir", "the absolute path of a directory", "'~/x'"),
        ("segment: a/b", "segment", "a name", "'a/b'"),
        ("segments: [a]", "segments", "names of segments", "a list"),
        ("segments: {1: {}}", "segments", "in quotes when it is all digits", "1"),
        ("segments: {lan: 1}", "segments.lan", "keys and values", "1"),
        ("segments: {lan: {interface: eth/0}}", "segments.lan.interface", "network interface", "'eth/0'"),
        ("segments: {lan: {exclude: 10.0.0.1}}", "segments.lan.exclude", "a list of addresses", "'10.0.0.1'"),
        ("segments: {lan: {exclude: [10.0.0.1, 2]}}", "segments.lan.exclude[1]", "an address, a range", "2"),
        ("segments: {lan: {router: 10.0.0.0/8}}", "segments.lan.router[0]", "an address", "10.0.0.0/8"),
        ("segments: {lan: {standby: 65}}", "segments.lan.standby", "a whole number from 0 to 64", "65"),
        ("probe: half", "probe", "one of full, fast, off", "'half'"),
        ("probe: true", "probe", "one of full, fast, off", "true"),
        ("probation: 59s", "probation", "a duration from 1m to 365d", "'59s'"),
        ("segments: {lan: {probation: off}}", "segments.lan.probation", "a duration from 1m to 365d", "false"),
        ("probe_failure: off", "probe_failure", "one of warn, refuse", "false"),
        ("standby: 1.5", "standby", "a whole number from 0 to 64", "1.5"),
        ("standby: true", "standby", "a whole number from 0 to 64", "true"),
        ("deadline: 0.5", "deadline", "a duration from 1s to 60s", "0.5"),
        ("deadline: 2m", "deadline", "a duration from 1s to 60s", "'2m'"),
        ("boot_wait: 91", "boot_wait", "a duration from 0s to 90s", "91"),
        ("retire_after: 1s", "retire_after", "or off", "'1s'"),
        ("docker: {reconcile: 'yes'}", "docker.reconcile", "true or false", "'yes'"),
        ("metrics: {listen: 9179}", "metrics.listen", "ADDRESS:PORT", "9179"),
        ("metrics: {listen: 'a:70000'}", "metrics.listen", "ADDRESS:PORT", "'a:70000'"),
        ("log: {level: loud}", "log.level", "one of debug, info, warning, error", "'loud'"),
        ("log: text", "log", "keys and values", "'text'"),
        (f"standby: 0x{'f' * 6000}", "standby", "a whole number from 0 to 64", "a huge number"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected_and_what_was_there(
    text: str, path: str, expected: str, found: str
) -> None:
    """Path of the key, what may stand there, what stands there: on one line."""
    line = problem(f"{ETCD}{text}\n")
    assert line.startswith(f"{path}: expected ")
    assert expected in line
    assert found in line


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("10.0.0.5/24", "did you mean 10.0.0.0/24?"),
        ("10.0.0.9-10.0.0.2", "ends before it begins"),
        ("10.0.0.9-::1", "mixes IPv4 and IPv6"),
        ("10.0.0.256", "is not an IPv4 or IPv6 address"),
    ],
)
def test_a_wrong_exclusion_says_why(text: str, cure: str) -> None:
    """An exclusion that silently covers something else gives away somebody's address."""
    assert cure in problem(f"{ETCD}segments: {{lan: {{exclude: [{text}]}}}}\n")


def test_all_wrong_keys_are_named_at_once() -> None:
    """One start of the daemon shows everything there is to mend, in the order of the file."""
    lines = problems("probe: half\netcd: {timeout: x, endpoints: [1]}\nlogs: {}\nlog: {level: x}\n")
    assert [line.partition(": ")[0] for line in lines] == [
        "probe", "etcd.timeout", "etcd.endpoints[0]", "logs", "log.level"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("prob: full", "prob: there is no such key; did you mean probe?"),
        ("exclude: []", "exclude: there is no such key; did you mean segments.NAME.exclude?"),
        ("endpoints: []", "endpoints: there is no such key; did you mean etcd.endpoints?"),
        ("log: {lvel: info}", "log.lvel: there is no such key; did you mean log.level?"),
        ("log: {zzz: info}", "log.zzz: there is no such key; expected one of format, level"),
        ("1: 2", "the file: expected the name of a key, found 1"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_name(text: str, hint: str) -> None:
    """A setting that is misspelt is never silently without effect."""
    assert problem(f"{ETCD}{text}\n") == hint


def test_the_only_key_without_a_default_is_asked_for() -> None:
    """Without endpoints there is no register; the embedded etcd brings its own."""
    for text in ("", "etcd:\n", "etcd: {timeout: 1s}\n", "# nothing\n"):
        assert problem(text).startswith("etcd.endpoints: expected a list of at least one URL")
        assert parse(text, "FILE", embedded_etcd=True).etcd.endpoints == ("http://127.0.0.1:2379",)
    own = parse("etcd: {endpoints: ['http://127.0.0.1:4001']}\n", "FILE", embedded_etcd=True)
    assert own.etcd.endpoints == ("http://127.0.0.1:4001",)
    assert problem("etcd: {endpoints: []}\n", embedded_etcd=True).endswith("found an empty list")


def test_the_embedded_etcd_has_one_endpoint() -> None:
    """The child serves one; what is written to an etcd at a second one is in another register."""
    text = "etcd: {endpoints: ['http://127.0.0.1:2379', 'http://10.0.0.2:2379']}\n"
    assert problem(text, embedded_etcd=True) == (
        "etcd.endpoints: expected one URL with --embedded-etcd, found 2: it serves one, "
        "and an etcd at another would be another register"
    )
    assert len(parse(text, "FILE").etcd.endpoints) == 2


@pytest.mark.parametrize(
    "text",
    ["a: [", "\t", "a: b: c", "\x00", "!!python/object:os.system x", "!!int ''", "!!bool x", "a: 2001-99-99",
     "- 1", "just text", "? [a]\n: 1", "[" * 5000, "&a [*b]", f"a: {'1' * 5000}", "a: !!timestamp x",
     "!!set {a}", "--- 1\n--- 2"],
)  # fmt: skip
def test_what_is_no_yaml_mapping_is_a_config_error(text: str) -> None:
    """PyYAML has many ways to fail; the operator sees one."""
    with pytest.raises(ConfigError, match=r"^FILE:"):
        parse(text, "FILE")


@pytest.mark.parametrize("text", ["probe: full\nprobe: fast\n", "log: {level: info, level: debug}\n"])
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    """YAML would take the last one, and the operator edits the first."""
    with pytest.raises(ConfigError, match=r"FILE: line \d+, column \d+: .*'(probe|level)' stands there twice"):
        parse(ETCD + text, "FILE")


def test_anchors_that_blow_up_are_refused_in_no_time() -> None:
    """Nine lines of aliases stand for a billion values; the error does not print them."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert all(len(line) < 500 for line in problems(ETCD + "\n".join(lines) + "\nprobe: *a9\n"))


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
_texts = st.sampled_from(["off", "10m", "10.0.0.0/8", "10.0.0.1-10.0.0.9", "http://a:1", "/x", "default", "-", "%"])
_keys = st.sampled_from(sorted({part for path in ALL_KEYS for part in path.split(".")})) | _scalars
_trees = st.recursive(
    _scalars | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=6),
    max_leaves=25,
)


@given(st.dictionaries(_keys, _trees, max_size=10), st.booleans())
def test_any_tree_is_a_config_or_a_config_error(tree: dict[Any, Any], embedded: bool) -> None:
    """No file that PyYAML can read makes the daemon end with a traceback."""
    text = yaml.dump(tree)
    try:
        parse(text, "FILE", embedded_etcd=embedded)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert all(re.match(r"FILE: \S", line) for line in lines)
        assert all(len(line) < 1000 for line in lines)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_config_or_a_config_error(data: bytes) -> None:
    """A file that was written by something else is refused in a sentence."""
    with contextlib.suppress(ConfigError):
        parse(data, "FILE")


@given(st.text(alphabet="abc:-[]{}&*!|>'\"#?%@`,. \n\t0123456789xo", max_size=80))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    """The same for what looks like YAML."""
    with contextlib.suppress(ConfigError):
        parse(ETCD + text, "FILE")


# --- files ---------------------------------------------------------------------------------------------


def test_the_file_is_looked_for_in_the_documented_order() -> None:
    """Argument before environment before the usual place."""
    variable = {"IPAM_PLUGIN_CONFIG": "/env.yaml"}
    assert find("/arg.yaml", variable) == Path("/arg.yaml")
    assert find(None, variable) == Path("/env.yaml")
    assert find(None, {"IPAM_PLUGIN_CONFIG": ""}) == Path("/etc/ipam-plugin/config.yaml")
    assert find(None, {}) == Path("/etc/ipam-plugin/config.yaml")


def test_a_missing_file_is_refused_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the usual place may be empty, and only for trying out with the embedded etcd."""
    with pytest.raises(ConfigError, match=r"no such file; `ipam-plugin install` puts"):
        load(tmp_path / "none.yaml", embedded_etcd=True)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    monkeypatch.delenv("IPAM_PLUGIN_CONFIG", raising=False)
    monkeypatch.setattr(configuration, "DEFAULT_PATH", str(tmp_path / "usual.yaml"))
    with pytest.raises(ConfigError, match="no such file"):
        load()
    assert load(embedded_etcd=True).etcd.endpoints == ("http://127.0.0.1:2379",)
    monkeypatch.setenv("IPAM_PLUGIN_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
        load(embedded_etcd=True)


def test_a_file_without_end_is_refused() -> None:
    """A wrong path never fills the memory."""
    with pytest.raises(ConfigError, match="found more than 1048576 bytes"):
        load("/dev/zero")


TLS = "etcd: {{endpoints: ['https://a:1'], {keys}}}\n"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("cert: /dev/null", "etcd.cert: expected etcd.key beside it, found nothing"),
        ("key: /dev/null", "etcd.key: expected etcd.cert beside it, found nothing"),
        ("username: root", "etcd.username: expected etcd.password_file beside it, found nothing"),
        ("ca_cert: /no/such", "etcd.ca_cert: expected a file that can be read, found /no/such: No such file "
         "or directory"),
        ("timeout: 15s", "etcd.timeout: expected less than deadline (15 s), found 15 s: the first try would "
         "use up the whole request"),
    ],
)  # fmt: skip
def test_keys_that_need_each_other(keys: str, expected: str) -> None:
    """Half of a pair, or a file that cannot be opened, is found at the start, not at the first request."""
    assert problem(TLS.format(keys=keys)) == expected


def test_tls_and_plain_text_do_not_mix() -> None:
    """Nobody believes to be encrypted who is not."""
    assert "expected all http:// or all https://" in problem("etcd: {endpoints: ['http://a:1', 'https://b:1']}\n")
    assert problem("etcd: {endpoints: ['http://a:1'], ca_cert: /dev/null}\n") == (
        "etcd.ca_cert: expected https:// endpoints beside it, found http://"
    )


def test_the_password_is_read_from_its_file_and_shown_nowhere(tmp_path: Path) -> None:
    """No repr, log line or error shows the password; a rotated one is read afresh."""
    file = tmp_path / "password"
    file.write_text("s3cret \n")
    config = parse(f"etcd: {{endpoints: ['http://a:1'], username: u, password_file: {file}}}\n", "FILE")
    assert config.etcd.password() == "s3cret "
    assert "s3cret" not in repr(config)
    file.write_text("other")
    assert config.etcd.password() == "other"
    assert parse(ETCD, "FILE").etcd.password() is None


@pytest.mark.parametrize(("content", "found"), [("", "nothing"), ("\n", "nothing"), ("a\nb\n", "several lines")])
def test_a_password_file_holds_one_line(tmp_path: Path, content: str, found: str) -> None:
    """The wrong file, or an empty one, is found before etcd says `authentication failed`."""
    file = tmp_path / "password"
    file.write_text(content)
    line = problem(f"etcd: {{endpoints: ['http://a:1'], username: u, password_file: {file}}}\n")
    assert line == f"etcd.password_file: {file}: expected the password on one line, found {found}"


def test_a_password_in_the_wrong_place_is_not_printed() -> None:
    """The refusal goes to the journal, which more people can read than the configuration."""
    for text in ("etcd: {endpoints: ['http://root:s3cret@a:1']}\n", "etcd: {password: s3cret}\n"):
        assert "s3cret" not in "\n".join(problems(text))


@pytest.mark.root
def test_a_file_this_user_may_not_read_is_named(tmp_path: Path) -> None:
    """The private key of root is no use to the daemon's own user, and the start says so."""
    if os.getuid() != 0:
        missing("root", "giving the rights away needs root")
    file = tmp_path / "key"
    file.touch(mode=0o000)
    os.seteuid(65534)  # root's right to read everything goes with the effective uid
    try:
        line = problem(TLS.format(keys=f"cert: /dev/null, key: {file}"))
    finally:
        os.seteuid(0)
    assert line == f"etcd.key: expected a file that can be read, found {file}: Permission denied"
