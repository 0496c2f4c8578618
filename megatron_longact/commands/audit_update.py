"""What training changed between two Hugging Face folders, tensor by tensor, inside and outside LongAct's mask.

    longact audit BEFORE AFTER --mask mask.safetensors [--json audit.json]

Columns: rows; rows with any other bit than before; rows in the mask; of the changed ones those inside and outside the
mask; share of elements that changed; L2 norm of the change; that over the norm before; share of the whole model's
squared change. With `--longact-freeze strict` and a mask that stayed, no row outside the mask changes.
"""

import argparse
from pathlib import Path

from megatron_longact.conversion import command
from megatron_longact.conversion.audit import audit
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new


def main(argv: list[str]) -> int:
    """Compare, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--mask", type=Path, help="mask file of `longact export-mask`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    add_overwrite_arg(parser)
    args = parser.parse_args(argv)

    def report() -> str:
        check_new(args.json, overwrite=args.overwrite, flag="--json")
        result = audit(args.before, args.after, mask=args.mask)
        if args.json is not None:
            try:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(result.json() + "\n")
            except OSError as error:
                raise ValueError(f"cannot write {args.json}: {error.strerror}") from error
        return result.table()

    return command.run(report)
