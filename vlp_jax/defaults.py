"""Every key that a config has, and its default. Configs derive from `base()`."""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Keys that every data section has, so that the command line can override them:
# max_bad_fraction: the largest share of examples that cannot be used before the run ends.
# order, lanes, window: the order of examples, see `vlp_jax.data.source_reader.make_order`.
DATA_DEFAULTS = {"max_bad_fraction": 0.1, "order": "auto", "lanes": 16, "window": None}


def duration(
    steps: int | None = None,
    examples: int | None = None,
    epochs: float | None = None,
    percent: float | None = None,
) -> ConfigDict:
    """Makes a length of training in exactly one unit; `percent` refers to the whole run.

    All four keys exist, so that a command line can move from one unit to another:
    `--config.duration.epochs=None --config.duration.steps=500`.
    """
    config = ConfigDict()
    config.steps = placeholder(int)
    config.examples = placeholder(int)
    config.epochs = placeholder(float)
    config.percent = placeholder(float)
    config.update({"steps": steps, "examples": examples, "epochs": epochs, "percent": percent})
    return config


def base() -> ConfigDict:
    """Returns the config with every top-level key and its default. All configs derive from it."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256  # examples of the whole mesh, not of a device
    # A batch is computed in this many parts, one after the other, to fit in memory. The loss does
    # not change: it still sees the whole batch, with all its negatives.
    config.microbatches = 1
    config.duration = duration(steps=1000)
    # Steps per compiled program. More than 1 helps if a step is shorter than the time that the host
    # needs to start a program. Logging, saving and evaluating happen between programs, and steps
    # that do not fill a program run one by one. So choose a divisor of `log.every`.
    config.steps_per_dispatch = 1
    # A preset ("dp", "fsdp", "fsdp_tp", "hybrid"; None is like "dp" but allows any sizes) and sizes
    # of the mesh axes. None leaves a size to the preset; -1 takes all remaining devices. See
    # `vlp_jax.parallel.mesh_sizes`.
    config.mesh = ConfigDict({axis: placeholder(int) for axis in ("replica", "fsdp", "tensor")})
    config.mesh.preset = placeholder(str)
    config.objective = ConfigDict()
    config.data = ConfigDict()
    config.extra_data = ConfigDict()  # further datasets by name, for parts of a composite objective
    config.tokenizer = ConfigDict()
    config.evaluators = ConfigDict()
    config.optimizer = _optimizer()
    # Weights that step 0 starts from. A run that resumes takes its own checkpoint instead.
    config.init_from = ConfigDict(
        {
            # None, the workdir of a run, hf:DIR, open_clip:FILE, big_vision:FILE.npz or timm:FILE
            "source": placeholder(str),
            "step": placeholder(int),  # of the checkpoint in a workdir; None for the newest
            # Pairs (regular expression, "load", "fresh" or "skip"). The first expression that
            # matches the whole path of a parameter, with stacked layers, decides.
            "rules": ((".*", "load"),),
            # Further sources, each a section under a name that you choose: see docs/interop.md.
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
    # Steps between Python's garbage collections, which all processes run together; 0 leaves
    # Python's automatic collection on.
    config.garbage_collection_every = 1000
    config.prefetch = 2  # batches that are copied to the devices in advance
    return config


def _profile() -> ConfigDict:
    """Returns the steps to profile, `first` to `last`; None for none. SIGUSR1 adds a few more."""
    return ConfigDict({"first": placeholder(int), "last": placeholder(int), "steps_on_signal": 5})


def _checkpoint() -> ConfigDict:
    return ConfigDict(
        {
            "every": duration(percent=10.0),
            # Also save after this many minutes without a checkpoint, checked at logged steps; 0 for
            # never. It bounds what a run that is killed loses.
            "minutes": 30.0,
            "max_failed": 5,  # saves that fail in a row (a full disk) before the run ends
            "keep_last": 2,
            "keep_every": 0,  # also keep each checkpoint at a multiple of this step; 0 for none
            "asynchronous": True,
            # Resume although the training data has changed since the checkpoint.
            "accept_other_data": False,
        }
    )


def _guard() -> ConfigDict:
    # A step whose loss or gradient is not finite is always skipped: it does not change the state.
    return ConfigDict(
        {
            # The run ends after this many skipped steps in a row, and names their examples.
            "max_skipped": 5,
            # Also skip a step whose loss is this many standard deviations above its running mean; 0
            # turns the rule off.
            "spike_deviations": 0.0,
            "spike_window": 200,  # steps of the running mean, and steps before the rule applies
        }
    )


def _watchdog() -> ConfigDict:
    # A process that makes no progress for so long exits, to be started again; 0 minutes for all
    # three turns this off.
    return ConfigDict(
        {
            "first_step_minutes": 60.0,  # from the start to the end of the first step
            "step_minutes": 10.0,  # for each later step
            "pause_minutes": 60.0,  # for an evaluation or a checkpoint
            "heartbeat_seconds": 100.0,  # a process of the job that is silent for so long is lost
        }
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        {
            # adamw; muon: Muon for the kernels of layers, AdamW for the rest; adafactor; lion
            "name": "adamw",
            "learning_rate": 1e-3,  # peak; Muon's kernels have muon.learning_rate
            "muon": ConfigDict({"learning_rate": 0.02, "momentum": 0.95}),
            "schedule": "cosine",  # cosine, rsqrt, linear or constant
            "warmup": duration(percent=5.0),
            "cooldown": duration(percent=0.0),  # a linear end to zero, which rsqrt needs
            "b1": 0.9,
            "b2": 0.98,  # adafactor: the upper bound of its decay (big_vision: 0.999)
            "eps": 1e-8,  # AdamW only
            # float32 or bfloat16; None takes bfloat16 for adafactor and float32 for the others. It
            # is part of the state's shape, so a run cannot resume with another dtype.
            "first_moment_dtype": placeholder(str),
            "weight_decay": 0.1,
            "no_decay": ("bias", "scale", "logit_scale", "logit_bias"),  # last names of parameters
            "clip_norm": 1.0,  # largest global norm of the gradient; 0 for no bound
            # Decay of the moving average of the parameters; 0 for none. Evaluation and export use
            # the average.
            "ema_decay": 0.0,
            "ema_final_decay": placeholder(float),  # reached at the end of the run; None: constant
            # Regular expressions: a parameter is averaged if one matches its whole path.
            "ema_of": (".*",),
            # Factor on the learning rate for each layer further from a tower's end (BEiT, MAE).
            "layer_decay": ConfigDict({"image": 1.0, "text": 1.0}),
            # Regular expressions: a parameter never changes if one matches its whole path, such as
            # "image/.*".
            "frozen": (),
        }
    )
