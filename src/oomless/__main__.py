"""``python -m oomless``."""

from oomless.cli import main

main()
