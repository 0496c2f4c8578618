"""`longact report` from a checkout: see megatron_longact/commands.report.py."""

import sys

from megatron_longact.commands.report import main
from megatron_longact.megatron.quiet import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
