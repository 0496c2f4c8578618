"""`longact plan` from a checkout: see megatron_longact/commands/plan.py."""

import sys

from megatron_longact.commands.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
