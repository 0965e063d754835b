"""`python -m torch_moe_ops COMMAND`: see cli/."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
