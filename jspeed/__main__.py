"""`python -m jspeed` is the `jspeed` command."""

from __future__ import annotations

from jspeed.cli.__main__ import main

if __name__ == "__main__":
    main()
