"""ipam-plugin: one register of addresses for containers that live on the physical LAN."""

__version__ = "0.2.0"
