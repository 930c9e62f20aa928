"""The errors of this program, by what the person who reads them has to do next.

Every message is one line for that person: what was asked, which pool and address, who holds it,
what to do. This module imports nothing of ours and knows neither HTTP nor etcd.
"""


class IpamError(Exception):
    """Anything this program says on purpose. Its text is one line, ready to be shown."""


class BadRequest(IpamError):
    """The caller's message is wrong (not JSON, wrong types, nonsense values): mend the request."""


class Refused(IpamError):
    """A decision, final for now; nothing was changed."""


class PoolUnknown(Refused):
    """The PoolID is none that this program made."""


class AddressTaken(Refused):
    """Somebody holds the address; the text names the holder."""


class PoolExhausted(Refused):
    """No address of the pool is free; the text carries the counts by kind."""


class NotServing(IpamError):
    """This daemon may not or cannot serve now (identity not settled, overloaded); nothing was changed."""


class EtcdRestored(NotServing):
    """etcd is back from a backup and does not know yet what is in use, so no address is given for a minute at most."""


class EtcdUnavailable(IpamError):
    """etcd did not answer in time and nothing was written."""


class OutcomeUnknown(IpamError):
    """The deadline passed after the request had been sent: it may be written, now or later (promise P4)."""


class EtcdRefused(IpamError):
    """etcd answered with a definite refusal (rights, credentials, size, quota); nothing was written."""


class SchemaRefused(EtcdRefused):
    """The register is one that this version does not understand, so nothing is written; the cure is in the text."""


class ProbeFailed(IpamError):
    """Whether the wire uses an address could not be found out (rights, interface); policy decides what follows."""


class JournalFailed(IpamError):
    """What happened while etcd was away cannot be kept on disk, so nobody may be told that it happened."""


class DockerUnavailable(IpamError):
    """dockerd did not say, or not completely, what it has; nothing follows from that."""


class ConfigError(Exception):
    """The configuration cannot be used; the text starts with the path of the key. Start-up only, exit status 2."""
