"""`longact emulate-fp8` from a checkout: see megatron_longact/commands/emulate_fp8.py."""

import sys

from megatron_longact.commands.emulate_fp8 import main
from megatron_longact.megatron.quiet import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
