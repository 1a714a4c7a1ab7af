"""Every key that a config has, and its default. Configs derive from `base()`."""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

DURATION_UNITS = ("steps", "examples", "epochs", "percent")
# Sections whose keys are the arguments of what they name; each is checked where it is built.
COMPONENT_SECTIONS = ("objective", "data", "extra_data", "tokenizer", "evaluators")
# What every data config has, so that it can be overridden. The largest share of examples that
# cannot be used; the order, and how many places of the files are read side by side (see
# `vlp_jax.data.stream.make_order`).
DATA_DEFAULTS = {"max_bad_fraction": 0.1, "order": "auto", "lanes": 16, "window": None}


def duration(
    steps: int | None = None,
    examples: int | None = None,
    epochs: float | None = None,
    percent: float | None = None,
) -> ConfigDict:
    """A length of training in exactly one unit; `percent` is of the whole run.

    All four keys exist, so that a command line can move from one unit to another.
    """
    config = ConfigDict()
    config.steps = placeholder(int)
    config.examples = placeholder(int)
    config.epochs = placeholder(float)
    config.percent = placeholder(float)
    config.update({"steps": steps, "examples": examples, "epochs": epochs, "percent": percent})
    return config


def base() -> ConfigDict:
    """Every top-level key with its default. All configs derive from this one."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256  # examples of the whole mesh, not of a device
    # Parts in which a batch is computed, one after the other, to fit in memory. The loss is that of
    # the whole batch, with all its negatives.
    config.microbatches = 1
    config.duration = duration(steps=1000)
    config.image_size = placeholder(object)
    # Steps that the devices are handed in one program, for steps that take less time than the host
    # needs to start one. Whatever the host does before a step (logging, saving, evaluating) comes
    # between programs, and what is left goes one by one: so it should divide `log.every`.
    config.steps_per_dispatch = 1
    # A preset ("dp", "fsdp", "fsdp_tp", "hybrid"; None is as "dp", but takes any sizes) and sizes
    # of the mesh axes. None is what the preset makes of it; one may be -1: all devices that are
    # left. See `vlp_jax.parallel.mesh_sizes`.
    config.mesh = ConfigDict({axis: placeholder(int) for axis in ("replica", "fsdp", "tensor")})
    config.mesh.preset = placeholder(str)
    config.objective = ConfigDict()
    config.data = ConfigDict()
    config.extra_data = ConfigDict()  # further datasets by name, for parts of a composite objective
    config.tokenizer = ConfigDict()
    config.evaluators = ConfigDict()
    config.optimizer = _optimizer()
    # Weights that step 0 starts from; a run that resumes looks at its own checkpoint alone.
    config.init_from = ConfigDict(
        {
            # None, the workdir of a run, hf:DIR, open_clip:FILE, big_vision:FILE.npz or timm:FILE
            "source": placeholder(str),
            "step": placeholder(int),  # of a workdir's checkpoints; None for the newest
            # (regular expression of a whole path with stacked layers, "load", "fresh" or "skip");
            # the first that fits decides
            "rules": ((".*", "load"),),
            # Further sources, each a section by a name of your own: see docs/interop.md.
            "sources": ConfigDict(),
        }
    )
    config.log = ConfigDict({"every": duration(steps=10)})
    config.checkpoint = _checkpoint()
    config.guard = _guard()
    config.watchdog = _watchdog()
    config.writers = ConfigDict(
        {
            "tensorboard": True,
            "wandb": ConfigDict(
                {
                    "enabled": False,
                    "project": "vlp_jax",
                    "name": placeholder(str),
                    "mode": "online",
                }
            ),
        }
    )
    config.profile = _profile()
    # Steps between two collections of Python's garbage, on all processes together; 0: Python's own.
    config.garbage_collection_every = 1000
    config.prefetch = 2  # batches that wait on the devices
    return config


def _profile() -> ConfigDict:
    """Steps to trace, `first` to `last`; None for none. SIGUSR1 traces the next few."""
    return ConfigDict({"first": placeholder(int), "last": placeholder(int), "steps_on_signal": 5})


def _checkpoint() -> ConfigDict:
    return ConfigDict(
        {
            "every": duration(percent=10.0),
            # Also after so many minutes without one, looked at where steps are logged; 0: never.
            # It is what a run that is killed loses at most.
            "minutes": 30.0,
            "max_failed": 5,  # saves that fail in a row (a full disk) before the run ends
            "keep_last": 2,
            "keep_every": 0,  # also keep each checkpoint whose step is a multiple of it; 0: none
            "asynchronous": True,
            # Go on although the training data is not that of the checkpoint.
            "accept_other_data": False,
        }
    )


def _guard() -> ConfigDict:
    # Steps that leave the state as it is: those whose loss or gradient is not finite, always.
    return ConfigDict(
        {
            "max_skipped": 5,  # one after the other; then the run ends and names the examples
            # Also those whose loss is so many standard deviations above its running mean; 0: none.
            "spike_deviations": 0.0,
            "spike_window": 200,  # steps over which the mean is taken, and before the rule holds
        }
    )


def _watchdog() -> ConfigDict:
    # What a process waits for before it ends itself, to be started again; all minutes 0: no end.
    return ConfigDict(
        {
            "first_step_minutes": 60.0,  # from the start to the end of the first step
            "step_minutes": 10.0,  # a later step (of several in a program: for each)
            "pause_minutes": 60.0,  # an evaluation, a checkpoint
            "heartbeat_seconds": 100.0,  # a process of the job that is silent for so long is lost
        }
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        {
            # adamw; muon: Muon for the kernels of layers, AdamW for the rest; adafactor; lion
            "name": "adamw",
            "learning_rate": 1e-3,  # of all but Muon's part
            "muon": ConfigDict({"learning_rate": 0.02, "momentum": 0.95}),
            "schedule": "cosine",  # cosine, rsqrt, linear or constant
            "warmup": duration(percent=5.0),
            "cooldown": duration(percent=0.0),  # a linear end to zero; rsqrt wants one
            "b1": 0.9,
            "b2": 0.98,  # adafactor: the bound that its own rises to (big_vision: 0.999)
            "eps": 1e-8,  # of AdamW
            # How the first moment is kept: float32 or bfloat16; None: bfloat16 for adafactor, else
            # float32. Changing it makes another state: a checkpoint of the other is not taken.
            "first_moment_dtype": placeholder(str),
            "weight_decay": 0.1,
            "no_decay": ("bias", "scale", "logit_scale", "logit_bias"),  # names of leaves
            "clip_norm": 1.0,  # of the global gradient; 0 for none
            "ema_decay": 0.0,  # of the parameters; 0 for none. Evaluation then uses the average
            "ema_final_decay": placeholder(float),  # to which it rises over the run; None: it stays
            "ema_of": (".*",),  # regular expressions: whose whole path one is, that is averaged
            # Factor on the learning rate for each layer further from a tower's end (BEiT, MAE).
            "layer_decay": ConfigDict({"image": 1.0, "text": 1.0}),
            # Regular expressions: a parameter stays as it is if one is its whole path ("image/.*").
            "frozen": (),
        }
    )
