"""What Megatron makes of a package that is called apex."""

import json

if __name__ == "__main__":
    from megatron.core.models import backends

    print(json.dumps({"apex": backends.HAVE_APEX, "norm": backends.LNImpl.__name__}))
