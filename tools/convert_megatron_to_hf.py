"""`longact convert to-hf` from a checkout: see megatron_longact/commands/convert_megatron_to_hf.py."""

import sys

from megatron_longact.commands.convert_megatron_to_hf import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
