"""NVIDIA Apex is told from the public index's package of that name before Megatron takes either."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longact.megatron import apex
from tests import launch
from tests.test_run import ENVIRONMENT, LAUNCHER, PROGRAMS

PYRAMID = {
    "apex/__init__.py": "from pyramid_mailer.interfaces import IMailer\n",
    "apex/models.py": "",
    "apex/views.py": "",
    "apex/lib/__init__.py": "",
    "apex/tests/__init__.py": "",
    "apex-0.9.10.dev0.dist-info/METADATA": (
        "Metadata-Version: 2.4\nName: apex\nVersion: 0.9.10.dev0\n"
        "Summary: Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions\n"
    ),
    "apex-0.9.10.dev0.dist-info/top_level.txt": "apex\n",
}
"""What pip installs for `apex` from the public index, as far as it can be told by."""

PYRAMID_WITH_ITS_DEPENDENCIES = {**PYRAMID, "apex/__init__.py": ""}
"""The same where what it imports is installed as well."""

NVIDIAS = {
    **{f"apex/{part}/__init__.py": "" for part in ("multi_tensor_apply", "optimizers", "normalization", "contrib")},
    "apex/__init__.py": "from . import optimizers\n",
    "apex-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.1\nSummary: PyTorch Extensions\n",
}
KERNELS = {"amp_C.py": "", "fused_weight_gradient_mlp_cuda.py": ""}


def installed(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_other_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, PYRAMID, monkeypatch)
    found = apex.find()
    assert found is not None
    assert (found.version, found.is_nvidias, found.is_usable) == ("0.9.10.dev0", False, False)
    line = apex.remark(found, gpu=False, transformer_engine=True)
    assert line is not None
    assert "apex 0.9.10.dev0 (Pyramid toolkit" in line
    assert "is not NVIDIA Apex" in line
    assert "pip uninstall apex" in line
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    ("transformer_engine", "used"),
    [
        (True, "Megatron uses its LayerNorm and the fused weight gradient of the output layer"),
        (False, "Megatron uses its Adam, SGD, gradient norms, clipping, LayerNorm and the fused weight gradient"),
    ],
)
def test_nvidias_is_used(transformer_engine: bool, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, {**NVIDIAS, **KERNELS}, monkeypatch)
    found = apex.find()
    assert found is not None
    assert found.is_usable
    assert used in str(apex.remark(found, gpu=True, transformer_engine=transformer_engine))
    assert apex.remark(found, gpu=False, transformer_engine=transformer_engine) is None


def test_nvidias_without_kernels_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, NVIDIAS, monkeypatch)
    found = apex.find()
    assert found is not None
    assert found.is_nvidias
    assert not found.is_usable
    line = apex.remark(found, gpu=True, transformer_engine=False)
    assert str(line).startswith("NVIDIA Apex 0.1 was built without its CUDA extensions, and is not used")


def test_what_is_slower_without_it() -> None:
    bare, with_engine = (apex.remark(None, gpu=True, transformer_engine=te) for te in (False, True))
    assert "Adam, gradient norms, clipping and LayerNorm run unfused" in str(bare)
    assert "unfused" not in str(with_engine)
    assert "--no-gradient-accumulation-fusion" in str(bare)
    assert "--no-gradient-accumulation-fusion" in str(with_engine)
    assert apex.remark(None, gpu=False, transformer_engine=False) is None
    told = [apex.remark(None, gpu=True, transformer_engine=te, wants_fusion=False) for te in (False, True)]
    assert told == ["NVIDIA Apex is not installed: Adam, gradient norms, clipping and LayerNorm run unfused", None]


def test_a_usable_one_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, {**NVIDIAS, **KERNELS}, monkeypatch)
    assert apex.settle([], gpu=False) is None
    assert "apex" not in sys.modules


def show(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(folder)}
    return launch.run([sys.executable, *command], timeout=100, environment=environment)


def seen(result: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert result.returncode == 0, result.stderr
    found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_megatron_does_not_take_the_other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, program = installed(tmp_path, PYRAMID_WITH_ITS_DEPENDENCIES, monkeypatch), str(PROGRAMS / "show_apex.py")
    assert seen(show("-c", f"import runpy; runpy.run_path({program!r}, run_name='__main__')", folder=folder)) == {
        "apex": True,
        "norm": "FusedLayerNorm",
    }
    launched = show(*LAUNCHER, "--cpu", program, folder=folder)
    assert seen(launched) == {"apex": False, "norm": "WrappedTorchNorm"}
    [line] = [line for line in launched.stderr.splitlines() if "Apex" in line and line.startswith("megatron_longact:")]
    assert str(folder) in line
