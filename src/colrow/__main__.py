"""``python -m colrow``: the same as the ``colrow`` command."""

import sys

from colrow.cli import main

if __name__ == "__main__":
    sys.exit(main())
