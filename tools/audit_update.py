"""`longact audit` from a checkout: see megatron_longact/commands/audit_update.py."""

import sys

from megatron_longact.commands.audit_update import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
