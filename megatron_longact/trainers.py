"""Trainers that use megatron-core: where LongAct attaches in them, by which setting, and what fails.

`look` holds one line of the table against what is installed; it reads files and imports no trainer.
"""

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

from megatron_longact.versions import Version, check_version, version_of


@dataclass(frozen=True)
class Seam:
    """A place in the trainer's source that the hook needs: a file in its package, and what stands in it."""

    file: str
    text: str


@dataclass(frozen=True)
class Trainer:
    """One trainer; a newer version than those read is refused until somebody has read it and moved `newest`."""

    name: str
    distribution: str
    """What pip calls it."""
    package: str
    """The folder that `seams` are in, as it is imported."""
    oldest: str
    newest: str
    """Versions read, by their first two numbers."""
    seams: tuple[Seam, ...]
    setting: str
    """The exact flags or lines that attach LongAct."""
    shown: str
    """What was run, with which versions."""
    fails: tuple[str, ...]
    """What is known not to work."""
    file: str = ""
    """The file of examples/integrations that the setting names; "" if none is needed."""


_SKYRL = "backends/skyrl_train/workers/megatron"
TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer(
            name="verl",
            distribution="verl",
            package="verl",
            oldest="0.9",
            newest="0.9",
            seams=(
                Seam("workers/engine/megatron/transformer_impl.py", "def _build_lr_scheduler(self)"),
                Seam("workers/config/model.py", "import_external_libs(self.external_lib)"),
            ),
            setting="actor_rollout_ref.model.external_lib=verl_engine\n"
            "actor_rollout_ref.actor.optim.use_checkpoint_opt_param_scheduler=True",
            shown="its MegatronEngine 0.9.1 trains and resumes on megatron-core 0.18.2, without a GPU",
            fails=(
                "without use_checkpoint_opt_param_scheduler=True a resumed run chooses its rows anew",
                "LoRA on linear_qkv, Megatron-FSDP and Muon are refused, by name",
                "without use_remove_padding, or with pad_to_length, padding counts as tokens",
            ),
            file="verl_engine.py",
        ),
        Trainer(
            name="slime",
            distribution="slime",
            package="slime",
            oldest="0.2",
            newest="0.3",
            seams=(
                Seam("utils/arguments.py", "--custom-megatron-before-train-step-hook-path"),
                Seam("utils/arguments.py", "--custom-megatron-init-path"),
            ),
            setting="--custom-config-path longact.yaml\n"
            "--custom-megatron-init-path slime_hooks.check_settings\n"
            "--custom-megatron-before-train-step-hook-path slime_hooks.before_train_step",
            shown="its own training steps and checkpoints (624b824, megatron-core 0.19.2), no GPU, no Ray",
            fails=("under context parallelism the zeros that fill a sequence count as tokens",),
            file="slime_hooks.py",
        ),
        Trainer(
            name="ms-swift",
            distribution="ms-swift",
            package="swift",
            oldest="4.6",
            newest="4.6",
            seams=(
                Seam("megatron/callbacks/mapping.py", "megatron_callbacks_map"),
                Seam("megatron/trainers/base.py", "self.call_event('on_train_begin')"),
                Seam("arguments/base_args/base_args.py", "import_external_file(external_plugin)"),
            ),
            setting="--external_plugins examples/integrations/swift_plugin.py\n--callbacks longact",
            shown="its own `megatron sft` and `megatron rlhf --rlhf_type grpo`, trained and resumed on two ranks "
            "without a GPU, rollouts ready made: ms-swift 4.6.0, mcore-bridge 1.6.5, megatron-core 0.19.2",
            fails=(
                "LoRA (--tuner_type lora), Megatron-FSDP and Muon are refused, by name",
                "vLLM, and its Ray pipeline, did not run here",
            ),
            file="swift_plugin.py",
        ),
        Trainer(
            name="skyrl",
            distribution="skyrl",
            package="skyrl",
            oldest="0.4",
            newest="0.4",
            seams=(
                Seam("train/entrypoints/main_base.py", "trainer.override_entrypoint="),
                Seam(f"{_SKYRL}/megatron_worker.py", "self.model.run_pending_grad_sync()"),
                Seam(f"{_SKYRL}/megatron_model_wrapper.py", "= self._defer_finalize_model_grads"),
                Seam(f"{_SKYRL}/megatron_model_wrapper.py", "packed_seq_params = preprocess_packed_seqs("),
            ),
            setting="SKYRL_PYTHONPATH_EXPORT=true in the environment\n"
            "trainer.strategy=megatron trainer.override_entrypoint=skyrl_worker",
            shown="its MegatronPolicyWorkerBase 0.4.0 trains and resumes on megatron-core 0.19.2 with Megatron-Bridge "
            "0.6.2, without a GPU; not under Ray",
            fails=(
                "a load without scheduler states (load_lr_scheduler_states=False) starts LongAct afresh",
                "LoRA on linear_qkv, Megatron-FSDP and Muon are refused, by name",
                "Megatron-Bridge 0.6.2 lacks two functions that SkyRL imports: take the commit that SkyRL pins",
            ),
            file="skyrl_worker.py",
        ),
        Trainer(
            name="NeMo-RL",
            distribution="nemo-rl",
            package="nemo_rl",
            oldest="0.6",  # what its main, 7ea279a, says of itself
            newest="0.7",
            seams=(
                Seam("models/policy/lm_policy.py", "worker_extension_cls_fqn"),
                Seam("models/megatron/data.py", "def _pack_sequences_for_megatron("),
            ),
            setting="Policy(..., worker_extension_cls_fqn='nemo_rl_worker.LongActPolicyWorker')",
            shown="its MegatronPolicyWorkerImpl (7ea279a, Megatron-LM 14346b6) trains and resumes without a GPU; not "
            "under Ray",
            fails=(
                "without sequence_packing.enabled padding counts as tokens",
                "Megatron-FSDP, LoRA on linear_qkv and full-iteration CUDA graphs are refused, by name",
            ),
            file="nemo_rl_worker.py",
        ),
        Trainer(
            name="megatron-lm",
            distribution="megatron-core",
            package="megatron.training",
            oldest="0.16",
            newest="0.19",
            seams=(Seam("training.py", "get_megatron_optimizer("),),
            setting="torchrun ... -m megatron_longact.run PROGRAM.py <its own flags> --longact",
            shown="pretrain_gpt.py and train_rl.py, unedited: docs/megatron_rl.md",
            fails=("what docs/support.md says is refused",),
        ),
    )
}
"""By the name that `--trainer` takes."""


def look(trainer: Trainer, *, megatron: str | None) -> str:
    """What to tell of the trainer that is installed here, where LongAct attaches to it.

    megatron: `megatron.core.__version__`, None where there is none. Raises `ValueError` with one line where LongAct
    does not attach: not installed, a version that nobody has read, a hook that is gone, a Megatron that is too old.
    """
    folder = package_folder(trainer.package)
    if folder is None:
        raise ValueError(f"{trainer.name} is not installed here: there is no package {trainer.package!r}")
    if megatron is None:
        raise ValueError(f"{trainer.name} has no megatron-core here: LongAct works on its Megatron engine alone")
    found = megatron if trainer.distribution == "megatron-core" else _version(trainer)
    known = (version_of(trainer.oldest), version_of(trainer.newest))
    if not known[0] <= version_of(found) <= known[1]:
        raise ValueError(f"{trainer.name} {found} is not known: the hook was written for {_range(*known)}")
    untested = check_version(version_of(megatron))
    for seam in trainer.seams:
        path = folder / seam.file
        if not path.is_file() or seam.text not in path.read_text():
            raise ValueError(f"{trainer.name} {found} has no {seam.text!r} in {seam.file}, where LongAct would attach")
    return _told(trainer, found, megatron, untested)


def _version(trainer: Trainer) -> str:
    try:
        return metadata.version(trainer.distribution)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"{trainer.name} is here, but its version is not known: pip install -e its checkout, which says it"
        ) from None


def _range(oldest: Version, newest: Version) -> str:
    return str(oldest) if oldest == newest else f"{oldest} to {newest}"


def _told(trainer: Trainer, found: str, megatron: str, untested: str | None) -> str:
    where = f"examples/integrations/{trainer.file}, copied or on PYTHONPATH, and\n" if trainer.file else ""
    core = "" if found == megatron else f" with megatron-core {megatron}"
    fails = [*([untested] if untested else []), *trainer.fails]
    return "\n".join(
        [
            f"{trainer.name} {found}{core}: LongAct attaches, by",
            indent(where + trainer.setting, "    "),
            f"shown: {trainer.shown}",
            "known not to work:",
            *(f"    {each}" for each in fails),
        ]
    )


def package_folder(name: str) -> Path | None:
    """Where the files of a package are that an import would find; only the packages around it are imported."""
    parent = name.rpartition(".")[0]
    if parent and package_folder(parent) is None:
        return None
    spec = find_spec(name)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None
