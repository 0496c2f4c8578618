"""Prints, as JSON, how it was started: what a program can see of its interpreter, here and in a spawned process."""

import json
import multiprocessing
import sys


def seen() -> dict[str, object]:
    return {"argv": sys.argv, "path": sys.path[0], "file": __file__}


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(json.dumps({"here": seen(), "spawned": pool.apply(seen)}))
    sys.exit(7)
