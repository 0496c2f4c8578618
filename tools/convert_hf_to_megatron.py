"""`longact convert to-megatron` from a checkout: see megatron_longact/commands/convert_hf_to_megatron.py."""

import sys

from megatron_longact.commands.convert_hf_to_megatron import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
