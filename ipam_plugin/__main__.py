"""`python -m ipam_plugin` is the command."""

from ipam_plugin.cli import main

main()
