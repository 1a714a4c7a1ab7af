"""The speed of the real training step of a config, on one batch in memory, beside that of others.

python -m tools.bench_step --config configs/bench_small.py --peer plain --peer open_clip
python -m tools.bench_step --config configs/siglip_b16.py --batch 256 --peer open_clip
python -m tools.bench_step --config configs/mae_b16.py --batch 512 --profile DIR

Forward, loss, backward, optimizer and guard, as in a run; no data and no TensorFlow. Peers have the
same batch and sizes and take turns with ours in one process: plain (our step with every
optimization off), flax (a dual encoder of Flax's own parts), open_clip, timm (classification),
transformers (masked autoencoding). With --apart each peer has a process of its own, started without
the variables that make ours faster (GLIBC_TUNABLES, PJRT_NPROC): as its users start it.
docs/bench_step.md says what the numbers mean.

Exit status: 0; 1 a peer could not be measured; 2 a mistake in the arguments or the config.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from vlp_jax import config as config_lib
from vlp_jax.arguments import check_arguments
from vlp_jax.benchmarking import contender as turns
from vlp_jax.benchmarking import profile as profiles
from vlp_jax.benchmarking.apart import ApartPeer, Channel
from vlp_jax.benchmarking.jax_step import JaxStep, fixed_batch, make_bench_setup
from vlp_jax.benchmarking.peak import Peak, measure_peak
from vlp_jax.benchmarking.peers import PEERS, check_devices, check_peers, make_peer, uses_torch
from vlp_jax.benchmarking.plain import one_device
from vlp_jax.benchmarking.provenance import provenance
from vlp_jax.benchmarking.result import Measured, Result, as_json, as_table, last_round
from vlp_jax.errors import UserError
from vlp_jax.objectives import Objective
from vlp_jax.parallel import startup
from vlp_jax.training.command import run_command

CPU_DEVICES = 2  # as the demo
A_PEER_FAILED = 1


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """The arguments, and the config with its overrides.

    Raises:
      UserError: an argument, a config file or a key that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", required=True, help="a config file, and its argument")
    add("--config.KEY", metavar="VALUE", help="replaces a key: --config.a.b=VALUE")
    add("--batch", type=int, metavar="N", help="examples of a step, for config.batch_size")
    add("--peer", action="append", default=[], metavar="NAME", help=f"one of {', '.join(PEERS)}")
    add("--apart", action="store_true", help="each peer in a process of its own, as it comes")
    add("--serve", metavar="NAME", choices=PEERS, help=argparse.SUPPRESS)  # what --apart starts
    add("--rounds", type=int, default=5, metavar="R", help="turns of each (default 5)")
    add("--steps", type=int, default=10, metavar="S", help="steps of a turn (default 10)")
    add(
        "--devices",
        type=int,
        metavar="N",
        help=f"that share the batch: {CPU_DEVICES} on CPU, elsewhere all, if it is not given",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile for peers of PyTorch; without it on GPU alone",
    )
    add("--json", metavar="FILE", help="also write everything there")
    add("--profile", metavar="DIR", help="trace a few steps into DIR, and list the dearest kernels")
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    arguments = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    check_arguments(arguments, "rounds", "steps", "batch", "devices")
    config = config_lib.load(arguments.config)
    config_lib.override(config, overrides)
    if arguments.batch:
        config.batch_size = arguments.batch
    config_lib.check(config)
    return arguments, config


def start_jax(arguments: argparse.Namespace) -> list[jax.Device]:
    """The devices that share the batch, after what has to be set before JAX finds them.

    Raises:
      UserError: there are fewer than are wanted.
    """
    if uses_torch(arguments.peer) or arguments.apart:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_num_cpu_devices", arguments.devices or CPU_DEVICES)
    startup.widen_cpu_thread_pool()
    devices = jax.devices()
    wanted = arguments.devices or len(devices)
    if wanted > len(devices):
        raise UserError(f"--devices {wanted}: there are {len(devices)} of {devices[0].device_kind}")
    return devices[:wanted]


class Benchmark:
    """Ours and its peers, measured in turns; what is known is kept on disk as it grows.

    Raises:
      UserError: the config, the devices and the peers do not fit each other.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        config: ConfigDict,
        console: Console,
        keep: Callable[[Result], None],
        argv: Sequence[str],
    ):
        self._argv = argv
        self._arguments, self._config, self._console, self._keep = arguments, config, console, keep
        self._devices = start_jax(arguments)
        self._failed: dict[str, str] = {}

        def check(objective: Objective) -> None:
            check_peers(arguments.peer, objective)

        self._ours = JaxStep("ours", config, self._devices, twice=True, check=check)
        console.print(f"ours: compiled in {self._ours.facts['compile_seconds']['cold']:.1f} s")
        self._ours.run(turns.WARM_UP_STEPS)
        self._ours.read_peak_memory()
        self._peak = self._measure_peak()

    def _measure_peak(self) -> Peak:
        return measure_peak(self._devices, self._ours.setup.objective.compute_dtype)

    def run(self) -> Result:
        """All turns, and the trace if one is wanted."""
        with contextlib.ExitStack() as stack:
            return self._run(stack)

    def _run(self, stack: contextlib.ExitStack) -> Result:
        contenders: list[turns.Contender] = [self._ours]
        if self._arguments.peer:  # they take a while; so there is something, whatever happens
            self._measure(contenders, rounds=1)
        contenders += self._peers(stack)
        times = self._measure(contenders, self._arguments.rounds)
        if self._arguments.profile:
            profile = profiles.take_profile(self._ours, self._arguments.profile)
            self._ours.facts["profile"] = profiles.as_json(profile)
            self._console.print(profiles.as_table(profile), markup=False)
        return self._result(contenders, times, complete=True)

    def _peers(self, stack: contextlib.ExitStack) -> Iterator[turns.Contender]:
        for name in dict.fromkeys(self._arguments.peer):
            try:
                peer = self._make_peer(name, stack)
                peer.run(turns.WARM_UP_STEPS)
            except RuntimeError as error:  # of JAX and PyTorch, which may be out of memory
                self._failed[name] = " ".join(str(error).split())[:300]
                self._console.print(f"{name}: failed: {self._failed[name]}", markup=False)
            else:
                self._console.print(f"{name}: ready")
                yield peer

    def _make_peer(self, name: str, stack: contextlib.ExitStack) -> turns.Contender:
        if not self._arguments.apart:
            return make_peer(name, self._ours.setup, self._ours.batch, self._arguments.compile)
        check_devices(name, self._devices)
        command = [sys.executable, "-m", "tools.bench_step", *self._argv, "--serve", name]
        return stack.enter_context(ApartPeer(name, command))

    def _measure(self, contenders: list[turns.Contender], rounds: int) -> list[turns.Times]:
        def each_round(times: list[turns.Times]) -> None:
            result = self._result(contenders, times, complete=False)
            self._console.print(last_round(result))
            self._keep(result)

        return turns.measure(contenders, rounds, self._arguments.steps, each_round)

    def _result(
        self, contenders: list[turns.Contender], times: list[turns.Times], complete: bool
    ) -> Result:
        measured = [Measured(contenders[0], times[0], None)]
        for peer, own in zip(contenders[1:], times[1:], strict=True):
            measured.append(Measured(peer, own, turns.ratio(times[0], own)))
        result = Result(
            measured,
            self._config.batch_size,
            len(self._devices),
            self._ours.step_flops,
            self._peak,
            self._failed,
            complete,
        )
        if result.beats_peak:  # nothing runs between two rounds
            self._peak = max(self._peak, self._measure_peak(), key=lambda peak: peak.measured)
        return dataclasses.replace(result, peak=self._peak)


def serve(argv: Sequence[str]) -> None:
    """The peer that another process takes turns with; on one device, since none uses more."""
    channel = Channel()
    arguments, config = parse(argv)
    config = one_device(config)
    setup = make_bench_setup(config, jax.devices()[:1])
    channel.serve(make_peer(arguments.serve, setup, fixed_batch(setup), arguments.compile))


def write_json(file: str, argv: Sequence[str], config: ConfigDict, result: Result) -> None:
    """Everything that is known, with where it is from."""
    sections = ("objective", "optimizer", "tokenizer", "mesh", "microbatches")
    content = {
        **provenance("tools.bench_step", argv),
        "config": {name: to_plain(config[name]) for name in sections},
        **as_json(result),
    }
    Path(file).write_text(json.dumps(content, indent=2) + "\n")


def to_plain(value: Any) -> Any:
    """A section as a dict."""
    return value.to_dict() if isinstance(value, ConfigDict) else value


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    failed: list[str] = []

    def command() -> None:
        if "--serve" in argv:
            serve(argv)
            return
        arguments, config = parse(argv)
        console = Console(width=None if sys.stdout.isatty() else 140)

        def keep(result: Result) -> None:
            if arguments.json:
                write_json(arguments.json, argv, config, result)

        result = Benchmark(arguments, config, console, keep, argv).run()
        keep(result)
        failed.extend(result.failed)
        console.print(as_table(result), markup=False)

    status = run_command(command)
    return status or (A_PEER_FAILED if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
