"""What lies beside the weights of a checkpoint that came from Hugging Face: config.json, and its tokenizer.

They stand in the folder `hf` of the checkpoint and move with it; a training copies them to where it saves.
"""

import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path

HF_FILES = "hf"
"""Folder of the checkpoint with config.json and the tokenizer, for the way back."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
TOKENIZER_TYPE = "HuggingFaceTokenizer"
"""Megatron's name for one that a folder of `transformers` holds."""
NEEDS_TOKENIZER = "needs_tokenizer"
"""An argument that our programs set, which have no other default; others may have one."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder has one."""
    return any(any(folder.glob(name)) for name in _TOKENIZERS)


def model_files_of(load: str | Path | None) -> Path | None:
    """The folder with config.json that a checkpoint carries, for what `--load` is given; None: it carries none."""
    one_iteration = load is not None and Path(load, "metadata.json").is_file()
    folder = Path(load or "", os.pardir if one_iteration else "", HF_FILES)
    return folder if load is not None and (folder / "config.json").is_file() else None


def keep_model_files(args: Namespace) -> None:
    """Copy them from the checkpoint that a run began with to its `--save`; on rank 0, once."""
    save = getattr(args, "save", None)
    starts = (getattr(args, name, None) for name in ("load", "pretrained_checkpoint"))
    source = next(filter(None, map(model_files_of, starts)), None)
    if not save or source is None or model_files_of(save) is not None or os.environ.get("RANK", "0") != "0":
        return
    partial = Path(save, f"{HF_FILES}.partial")
    shutil.copytree(source, partial, dirs_exist_ok=True)
    partial.rename(Path(save, HF_FILES))


def given_tokenizer() -> set[str]:
    """Those of the two flags that name a tokenizer that are on the command line."""
    return {word.partition("=")[0] for word in sys.argv} & {"--tokenizer-type", "--tokenizer-model"}


def settle_tokenizer(args: Namespace, load: str, saved: Namespace, *, before: tuple[str | None, str | None]) -> None:
    """Set the tokenizer of a run by `--use-checkpoint-args`: the one that is given, else the checkpoint's.

    saved: the checkpoint's arguments; before: type and model ahead of them. Raises `ValueError`, in one line, for a
    tokenizer that is remembered by a path which is not there.
    """
    given = given_tokenizer()
    if given or not getattr(args, "use_tokenizer_model_from_checkpoint_args", True):
        kind = None if "--tokenizer-type" in given else getattr(saved, "tokenizer_type", None)
        args.tokenizer_type, args.tokenizer_model = before[0] or kind, before[1]
        args.tokenizer_in_checkpoint = False  # an argument of ours, which Megatron saves with its own
        return
    own = model_files_of(load)
    remembered = getattr(saved, "tokenizer_type", None)
    if own and has_tokenizer(own) and (remembered is None or getattr(saved, "tokenizer_in_checkpoint", False)):
        args.tokenizer_type, args.tokenizer_model = TOKENIZER_TYPE, str(own)
        args.tokenizer_in_checkpoint = True
    elif _is_missing(getattr(saved, "tokenizer_model", None)):
        raise ValueError(
            f"the checkpoint {load} remembers the tokenizer {saved.tokenizer_model}, which is not there: give "
            f"--tokenizer-type {remembered} --tokenizer-model and where it is now"
        )


def check_tokenizer_is_known(args: Namespace) -> None:
    """Raise `ValueError` where neither flags nor checkpoint name a tokenizer, which Megatron cannot do without."""
    if getattr(args, "tokenizer_type", None) is None:
        places = [place for place in (args.load, args.pretrained_checkpoint) if place]
        start = next(filter(_is_checkpoint, places), None)
        if start is None and places:
            raise ValueError(
                f"there is no Megatron checkpoint in {' or '.join(places)}, and no --tokenizer-type and "
                "--tokenizer-model are given for a new model"
            )
        raise ValueError(
            f"the checkpoint {start} remembers no tokenizer, as the folder that it was made from had none: give "
            f"--tokenizer-type {TOKENIZER_TYPE} --tokenizer-model FOLDER, or NullTokenizer and --vocab-size"
        )


def _is_checkpoint(place: str) -> bool:
    """One, or a folder of them."""
    from megatron_longact.conversion.torch_dist import TRACKER

    return any(Path(place, name).is_file() for name in (TRACKER, "metadata.json"))


def _is_missing(model: str | None) -> bool:
    """A name with one slash, or none, may be that of a model on the hub."""
    return model is not None and not Path(model).exists() and (Path(model).is_absolute() or model.count("/") > 1)
