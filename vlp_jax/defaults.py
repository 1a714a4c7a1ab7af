"""Every key that a config has, and its default. Configs derive from `base()`.

`--help` prints the lines under "Keys" in the docstrings of this module.

Keys of the sections that name a component, besides the component's own arguments:
  objective.name: the task, a name in `vlp_jax.objectives.OBJECTIVES`.
  objective.weight: factor on the loss of a part; a mapping lets it begin, rise and end.
  objective.data: the dataset of `extra_data` that a part is trained on; None for `data`.
  data.source: the format, a name in `vlp_jax.data.sources.SOURCES`; "mixture" draws each example of
    a batch from one of several `parts` by their `weight`.
  data.where: fields and the value that each must have; other examples are left out.
  data.limit: how many examples to keep, the first ones after `where`.
  data.fields: name in an example -> name in the data; other fields are left out.
  data.preprocess: operations on an example and their arguments.
  data.batch_ops: operations on a whole batch and their arguments.
  data.max_bad_fraction: the largest share of examples that cannot be used before the run ends.
  data.order: "examples", "blocks" (of examples that lie together) or "auto".
  data.lanes: how many places of the files are read side by side.
  data.window: how many blocks of a lane are shuffled with each other.
  tokenizer.name: a name in `vlp_jax.data.tokenizers.TOKENIZERS`.
  tokenizer.context_length: tokens of a text, padding included.
  tokenizer.vocab_size: how many tokens there are at most.
  tokenizer.file: the tokenizer's file; None trains one on the captions.
  tokenizer.pad: "eos" pads with the end of a text; None with the file's own token.
  evaluators.name: the evaluator, a name in `vlp_jax.evaluators.EVALUATORS`.
  evaluators.data: what differs from the training data.
  evaluators.every: how often it runs, at the end of the run in any case.
  label_field: the field of the data with the class.
  image_mean: what is subtracted from each channel of an image, scaled to [0, 1].
  image_std: what each channel is divided by then.
  embed_dim: width of the embedding that images and texts share.
  source: the weights, written as in `init_from.source`.
  step: the checkpoint of a workdir; None for the newest.
  rules: as `init_from.rules`.
  into: the parameters that the source is for, by the beginning of their path; "" for all.
  take: the beginning of these paths in the source; None for the same.
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

DURATION_UNITS = ("steps", "examples", "epochs", "percent")
# Sections whose keys are the arguments of what they name; each is checked where it is built.
COMPONENT_SECTIONS = ("objective", "data", "extra_data", "tokenizer", "evaluators")
# Every data config has these keys, so that they can be overridden.
DATA_DEFAULTS = {"max_bad_fraction": 0.1, "order": "auto", "lanes": 16, "window": None}


def duration(
    steps: int | None = None,
    examples: int | None = None,
    epochs: float | None = None,
    percent: float | None = None,
) -> ConfigDict:
    """Makes a length of training in exactly one unit; `percent` refers to the whole run.

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
    """Every top-level key with its default. All configs derive from this one.

    Keys:
      seed: of everything that is random.
      batch_size: examples of a batch, over all devices together.
      microbatches: parts in which a batch is computed, one after the other, to fit in memory; the
        loss is still over the whole batch, with all its negatives.
      duration: length of the run, such as 40steps, 1000000examples or 30epochs.
      image_size: side of an image in pixels (or height and width), for the model and for all
        operations on images that do not say their own.
      steps_per_dispatch: steps that the devices are handed in one program, for steps that take less
        time than the host needs to start one; it should divide `log.every`.
      extra_data: further datasets by name, each read beside `data` with batches of its own, for the
        parts of a composite objective; several sources in one batch are `data.source="mixture"`.
      tokenizer: texts to token ids; {} where there are no texts.
      log.every: how often metrics are written.
      garbage_collection_every: steps between two collections of Python's garbage, on all processes
        together; 0 leaves it to Python.
      prefetch: batches that wait on the devices.
    """
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256
    config.microbatches = 1
    config.duration = duration(steps=1000)
    # Any type: one side, or height and width.
    config.image_size = placeholder(object)
    config.steps_per_dispatch = 1
    config.mesh = mesh()
    config.objective = ConfigDict()
    config.data = ConfigDict()
    config.extra_data = ConfigDict()
    config.tokenizer = ConfigDict()
    config.evaluators = ConfigDict()
    config.optimizer = optimizer()
    config.init_from = init_from()
    config.log = ConfigDict({"every": duration(steps=10)})
    config.checkpoint = checkpoint()
    config.guard = guard()
    config.watchdog = watchdog()
    config.writers = writers()
    config.profile = profile()
    config.garbage_collection_every = 1000
    config.prefetch = 2
    return config


def mesh() -> ConfigDict:
    """How devices form a mesh; see `vlp_jax.parallel.mesh`.

    Keys:
      preset: "dp", "fsdp", "fsdp_tp" or "hybrid"; None is as "dp", but takes any sizes.
      replica: devices along the axis of copies; None for the preset's, -1 for all that are left.
      fsdp: devices over which the parameters are spread; None and -1 as for `replica`.
      tensor: devices over which a layer is spread; None and -1 as for `replica`.
    """
    config = ConfigDict({axis: placeholder(int) for axis in ("replica", "fsdp", "tensor")})
    config.preset = placeholder(str)
    return config


def init_from() -> ConfigDict:
    """Weights that step 0 starts from; a run that resumes looks at its own checkpoint alone.

    Keys:
      source: None, the workdir of a run, hf:DIR, open_clip:FILE, big_vision:FILE.npz or timm:FILE.
      model: True takes model, tokenizer and preprocessing from the source, where the config does
        not say its own; see configs/finetune.py.
      step: the checkpoint of a workdir; None for the newest.
      rules: pairs of a regular expression of a whole path (layers stacked) and "load", "fresh" or
        "skip"; the first that fits decides.
      sources: further sources, each a section by a name of your own: see docs/interop.md.
    """
    return ConfigDict(
        {
            "source": placeholder(str),
            "model": False,
            "step": placeholder(int),
            "rules": ((".*", "load"),),
            "sources": ConfigDict(),
        }
    )


def writers() -> ConfigDict:
    """Where metrics go besides metrics.jsonl.

    Keys:
      tensorboard: True writes event files to the workdir.
      wandb.enabled: True writes to Weights & Biases.
      wandb.project: the project there.
      wandb.name: name of the run there; None for the workdir's.
      wandb.mode: "online", "offline" or "disabled".
    """
    wandb = {"enabled": False, "project": "vlp_jax", "name": placeholder(str), "mode": "online"}
    return ConfigDict({"tensorboard": True, "wandb": ConfigDict(wandb)})


def profile() -> ConfigDict:
    """Steps to trace.

    Keys:
      first: the first step that is traced; None for none.
      last: the last step that is traced.
      steps_on_signal: steps that are traced after SIGUSR1.
    """
    return ConfigDict({"first": placeholder(int), "last": placeholder(int), "steps_on_signal": 5})


def checkpoint() -> ConfigDict:
    """When checkpoints are saved, and which are kept.

    Keys:
      every: how often one is saved.
      minutes: also after so many minutes without one, looked at where steps are logged (0: never);
        a run that is killed loses no more.
      max_failed: saves that fail in a row (a full disk) before the run ends.
      keep_last: how many of the newest are kept.
      keep_every: each checkpoint whose step is a multiple of it is kept too; 0: none.
      asynchronous: True writes them while training goes on.
      accept_other_data: True goes on although the checkpoint was trained on other data.
    """
    return ConfigDict(
        {
            "every": duration(percent=10.0),
            "minutes": 30.0,
            "max_failed": 5,
            "keep_last": 2,
            "keep_every": 0,
            "asynchronous": True,
            "accept_other_data": False,
        }
    )


def guard() -> ConfigDict:
    """Steps that leave the state as it is: with a loss or gradient that is not finite, always.

    Keys:
      max_skipped: such steps in a row before the run ends and names the examples.
      spike_deviations: also skips a step whose loss is so many standard deviations above its
        running mean; 0: none.
      spike_window: steps over which the mean is taken, and before the rule holds.
    """
    return ConfigDict({"max_skipped": 5, "spike_deviations": 0.0, "spike_window": 200})


def watchdog() -> ConfigDict:
    """How long a process waits before it ends itself, to be started again; all minutes 0: for ever.

    Keys:
      first_step_minutes: from the start to the end of the first step.
      step_minutes: for a later step (for each of several in a program).
      pause_minutes: for an evaluation or a checkpoint.
      heartbeat_seconds: a process of the job that is silent for so long is lost.
    """
    return ConfigDict(
        {
            "first_step_minutes": 60.0,
            "step_minutes": 10.0,
            "pause_minutes": 60.0,
            "heartbeat_seconds": 100.0,
        }
    )


def optimizer() -> ConfigDict:
    """The optimizer and its schedule.

    Keys:
      name: "adamw", "muon" (for the kernels of layers; AdamW for the rest), "adafactor" or "lion".
      learning_rate: the highest of the schedule, of all parameters but Muon's.
      muon.learning_rate: the highest of the schedule, of the kernels that Muon trains.
      muon.momentum: decay of Muon's momentum.
      schedule: "cosine", "rsqrt", "linear" or "constant".
      warmup: linear rise of the learning rate from 0.
      cooldown: a linear end to 0, which rsqrt wants.
      b1: decay of the first moment.
      b2: decay of the second moment; for adafactor the bound that it rises to (big_vision: 0.999).
      eps: is added to the root of AdamW's second moment.
      first_moment_dtype: "float32" or "bfloat16"; None: bfloat16 for adafactor, else float32. A
        checkpoint of the other is not taken.
      weight_decay: times the learning rate it pulls parameters to 0 (decoupled).
      no_decay: names of leaves that weight decay leaves alone.
      clip_norm: largest global norm of a gradient; 0 for none.
      ema_decay: of an average of the parameters, which evaluation then uses; 0 for none.
      ema_final_decay: the decay that `ema_decay` rises to over the run; None: it stays.
      ema_of: regular expressions of the whole paths that are averaged.
      layer_decay.image: factor on the learning rate for each layer further from the end of the
        image tower (BEiT, MAE).
      layer_decay.text: the same for the text tower.
      frozen: regular expressions: a parameter whose whole path fits one stays as it is.
    """
    return ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-3,
            "muon": ConfigDict({"learning_rate": 0.02, "momentum": 0.95}),
            "schedule": "cosine",
            "warmup": duration(percent=5.0),
            "cooldown": duration(percent=0.0),
            "b1": 0.9,
            "b2": 0.98,
            "eps": 1e-8,
            "first_moment_dtype": placeholder(str),
            "weight_decay": 0.1,
            "no_decay": ("bias", "scale", "logit_scale", "logit_bias"),
            "clip_norm": 1.0,
            "ema_decay": 0.0,
            "ema_final_decay": placeholder(float),
            "ema_of": (".*",),
            "layer_decay": ConfigDict({"image": 1.0, "text": 1.0}),
            "frozen": (),
        }
    )


# The function that makes a section and has the meaning of its keys.
SECTIONS = {
    "": base,
    "mesh": mesh,
    "init_from": init_from,
    "writers": writers,
    "profile": profile,
    "checkpoint": checkpoint,
    "guard": guard,
    "watchdog": watchdog,
    "optimizer": optimizer,
}
