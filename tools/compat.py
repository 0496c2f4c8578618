"""`longact compat` from a checkout: see megatron_longact/commands/compat.py."""

import sys

from megatron_longact.commands.compat import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
