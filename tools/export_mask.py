"""`longact export-mask` from a checkout: see megatron_longact/commands/export_mask.py."""

import sys

from megatron_longact.commands.export_mask import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
