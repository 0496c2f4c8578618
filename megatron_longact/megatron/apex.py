"""NVIDIA Apex: whether it is there, what Megatron takes from it, and what is slower without it.

Megatron imports `apex` as it is imported itself, and takes whatever is called so. A package of that name on the public
index is another one, so the package is looked at, without being imported, before Megatron is.
Source: the `import apex`, `amp_C` and `fused_weight_gradient_mlp_cuda` of megatron/core (0.19).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

_PARTS_OF_NVIDIAS = ("multi_tensor_apply", "optimizers", "normalization")
_OUTPUT_LAYER = "the fused weight gradient of the output layer (--gradient-accumulation-fusion)"
_UNFUSED = "Adam, gradient norms, clipping and LayerNorm run unfused"
_NO_FUSION = "--no-gradient-accumulation-fusion"


@dataclass(frozen=True)
class Apex:
    """What an import of `apex` would find."""

    folder: Path
    version: str
    summary: str
    is_nvidias: bool
    has_kernels: bool
    """Whether it was built with its CUDA extensions, without which none of its parts works."""

    @property
    def is_usable(self) -> bool:
        """Whether Megatron can use it."""
        return self.is_nvidias and self.has_kernels


def find() -> Apex | None:
    """The package that `import apex` would find, which is not imported; None if there is none."""
    spec = _spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    about = next(iter(distributions(name="apex", path=[str(folder.parent)])), None)
    return Apex(
        folder,
        version="" if about is None else about.version,
        summary="" if about is None else about.metadata.get("Summary") or "",
        is_nvidias=all((folder / part).is_dir() for part in _PARTS_OF_NVIDIAS),
        has_kernels=_spec("amp_C") is not None,
    )


def _spec(name: str) -> ModuleSpec | None:
    """As `find_spec`; None too for a name that was hidden."""
    return None if name in sys.modules and sys.modules[name] is None else find_spec(name)


def settle(flags: Sequence[str], *, gpu: bool) -> str | None:
    """Keep a package that is of no use from Megatron, which then does without; what there is to say, in one line.

    Call it before Megatron is imported. flags: those of the program. gpu: whether the run is on GPUs; without one only
    the wrong package is named.
    """
    found = find()
    if found is not None and not found.is_usable:
        sys.modules["apex"] = None  # type: ignore[assignment]  # `import apex` raises ModuleNotFoundError
    engine = _spec("transformer_engine") is not None
    return remark(found, gpu=gpu, transformer_engine=engine, wants_fusion=_NO_FUSION not in flags)


def remark(found: Apex | None, *, gpu: bool, transformer_engine: bool, wants_fusion: bool = True) -> str | None:
    """One line on what Megatron gets from Apex, or lacks without it; None where that makes no difference.

    wants_fusion: without `--no-gradient-accumulation-fusion`.
    """
    if found is not None and not found.is_nvidias:
        is_called = f"{found.version} ({found.summary})" if found.summary else found.version or "without a version"
        return (
            f"the package apex {is_called} in {found.folder.parent} is not NVIDIA Apex: Megatron goes on without it; "
            "pip uninstall apex, and build NVIDIA's from github.com/NVIDIA/apex if you want it"
        )
    if not gpu:
        return None
    if found is not None and found.has_kernels:
        used = "LayerNorm" if transformer_engine else "Adam, SGD, gradient norms, clipping, LayerNorm"
        fused = _OUTPUT_LAYER if _spec("fused_weight_gradient_mlp_cuda") is not None else None
        return f"NVIDIA Apex {found.version}: Megatron uses its " + " and ".join(filter(None, (used, fused)))
    lacks = "NVIDIA Apex is not installed"
    if found is not None:
        lacks = f"NVIDIA Apex {found.version} was built without its CUDA extensions, and is not used"
    if not wants_fusion or _spec("fused_weight_gradient_mlp_cuda") is not None:
        return None if transformer_engine else f"{lacks}: {_UNFUSED}"
    slower = f"{_OUTPUT_LAYER} is not there; give {_NO_FUSION}"
    return f"{lacks}: {slower}" if transformer_engine else f"{lacks}, nor is Transformer Engine: {_UNFUSED}, {slower}"
