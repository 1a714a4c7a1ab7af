"""The speed of the real training step of a config, on one batch in memory, beside other projects.

python -m tools.perf.step --config bench_small --peer plain --peer open_clip
python -m tools.perf.step --config siglip_b16 --batch 256 --peer open_clip
python -m tools.perf.step --config mae_b16 --batch 512 --profile DIR

Forward, loss, backward, optimizer and guard, as in a run; no data and no TensorFlow. Peers have the
same batch and sizes and take turns with ours in one process: plain (our step with every
optimization off), open_clip, timm (classification), transformers (masked autoencoding). With
--apart each peer has a process of its own, started without the variables that make ours faster
(GLIBC_TUNABLES, PJRT_NPROC): as its users start it.
docs/bench_step.md says what the numbers mean.

Exit status: 0; 1 a peer could not be measured; 2 a mistake in the arguments or the config.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from tools.perf import harness
from tools.perf import profile as profiles
from tools.perf.jax_step import JaxStep, Peak, fixed_batch, make_bench_setup, measure_peak
from tools.perf.peers import (
    PEERS,
    check_devices,
    check_peers,
    make_peer,
    one_device,
    uses_torch,
)
from tools.perf.peers.apart import ApartPeer, Channel
from tools.perf.result import (
    WARM_UP_STEPS,
    Contender,
    Measured,
    Result,
    as_json,
    as_table,
    last_round,
    measure,
)
from vlp_jax import config as config_lib
from vlp_jax.arguments import load_config, parse_with_overrides
from vlp_jax.commands.plan import with_source_model
from vlp_jax.errors import UserError
from vlp_jax.objectives import Objective
from vlp_jax.parallel import startup

CPU_DEVICES = 2  # as the demo: two keep two cores busier than one does
A_PEER_FAILED = 1
SECTIONS = ("objective", "optimizer", "tokenizer", "mesh", "microbatches")  # kept in the JSON


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Returns the arguments, and the config with its overrides.

    Raises:
      UserError: an argument, a config file or a key that does not exist.
    """
    parser = harness.make_parser("step", __doc__, config=True, rounds=5)
    add = parser.add_argument
    add("--batch", type=int, metavar="N", help="examples of a step, for config.batch_size")
    add("--peer", action="append", default=[], metavar="NAME", help=f"one of {', '.join(PEERS)}")
    add("--apart", action="store_true", help="start each peer in a process of its own")
    add("--serve", metavar="NAME", choices=PEERS, help=argparse.SUPPRESS)  # what --apart starts
    add("--steps", type=int, default=10, metavar="N", help="steps of a turn (default: 10)")
    told = f"devices that share the batch (default: {CPU_DEVICES} on CPU, elsewhere all)"
    add("--devices", type=int, metavar="N", help=told)
    told = "run peers of PyTorch through torch.compile (default: on GPU alone)"
    add("--compile", action=argparse.BooleanOptionalAction, help=told)
    add("--profile", metavar="DIR", help="trace a few steps into DIR, and list the dearest kernels")
    counts = ("rounds", "steps", "batch", "devices")
    arguments, overrides = parse_with_overrides(parser, argv, *counts)
    config = load_config(arguments.config, overrides)
    if arguments.batch:
        config.batch_size = arguments.batch
    config_lib.check(config)
    return arguments, config


def start_jax(arguments: argparse.Namespace) -> list[jax.Device]:
    """Starts JAX; returns the devices that share the batch.

    Raises:
      UserError: --devices asks for more than there are.
    """
    # All of this has to be set before JAX looks for its devices.
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
    """Measures ours and its peers in turns, and keeps what is known on disk as it grows.

    Raises:
      UserError: the config, the devices and the peers do not fit each other.
    """

    def __init__(self, arguments: argparse.Namespace, config: ConfigDict, argv: Sequence[str]):
        self._arguments, self._argv = arguments, argv
        self.console = harness.make_console()
        self._devices = start_jax(arguments)
        self._config = config = with_source_model(config)
        self._failed: dict[str, str] = {}

        def check(objective: Objective) -> None:
            check_peers(arguments.peer, objective)

        self._ours = JaxStep("ours", config, self._devices, twice=True, check=check)
        self.console.print(f"ours: compiled in {self._ours.facts['compile_seconds']['cold']:.1f} s")
        self._ours.run(WARM_UP_STEPS)
        # Before peers and the peak run: JAX tells the most of the whole process.
        self._ours.read_peak_memory()
        self._peak = self._measure_peak()

    def _measure_peak(self) -> Peak:
        return measure_peak(self._devices, self._ours.setup.objective.compute_dtype)

    def run(self) -> Result:
        """Runs all turns, and the trace if one is wanted."""
        with contextlib.ExitStack() as stack:
            contenders: list[Contender] = [self._ours]
            # Peers take a while to start: so there is something in the file, whatever happens.
            if self._arguments.peer:
                self._measure(contenders, rounds=1)
            contenders += self._peers(stack)
            measured = self._measure(contenders, self._arguments.rounds)
            if self._arguments.profile:
                profile = profiles.take_profile(self._ours, self._arguments.profile)
                self._ours.facts["profile"] = profiles.as_json(profile)
                self.console.print(profiles.as_table(profile), markup=False)
            return self._result(measured, complete=True)

    def _peers(self, stack: contextlib.ExitStack) -> Iterator[Contender]:
        for name in dict.fromkeys(self._arguments.peer):
            try:
                peer = self._make_peer(name, stack)
                peer.run(WARM_UP_STEPS)
            except RuntimeError as error:  # of JAX and PyTorch, which may be out of memory
                self._failed[name] = " ".join(str(error).split())[:300]
                self.console.print(f"{name}: failed: {self._failed[name]}", markup=False)
            else:
                self.console.print(f"{name}: ready")
                yield peer

    def _make_peer(self, name: str, stack: contextlib.ExitStack) -> Contender:
        if not self._arguments.apart:
            return make_peer(name, self._ours.setup, self._ours.batch, self._arguments.compile)
        # The child sees one device and could not tell.
        check_devices(name, self._devices)
        command = [sys.executable, "-m", "tools.perf.step", *self._argv, "--serve", name]
        return stack.enter_context(ApartPeer(name, command))

    def _measure(self, contenders: list[Contender], rounds: int) -> list[Measured]:
        def each_round(measured: list[Measured]) -> None:
            self.console.print(last_round(self._result(measured, complete=False)))

        return measure(contenders, rounds, self._arguments.steps, each_round)

    def _result(self, measured: list[Measured], complete: bool) -> Result:
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
            result = dataclasses.replace(result, peak=self._peak)
        self._keep(result)
        return result

    def _keep(self, result: Result) -> None:
        config = self._config.to_dict()
        content = {"config": {name: config[name] for name in SECTIONS}, **as_json(result)}
        harness.write_json(self._arguments.json, "step", self._argv, content)


def serve(argv: Sequence[str]) -> None:
    """Runs the peer that another process takes turns with, on one device: none uses more."""
    # Before anything is printed: stdout carries the answers.
    channel = Channel()
    arguments, config = parse(argv)
    config = one_device(with_source_model(config))
    setup = make_bench_setup(config, jax.devices()[:1])
    channel.serve(make_peer(arguments.serve, setup, fixed_batch(setup), arguments.compile))


def command(argv: list[str]) -> int:
    """Measures, prints and writes; returns the exit status."""
    if "--serve" in argv:
        serve(argv)
        return 0
    benchmark = Benchmark(*parse(argv), argv)
    result = benchmark.run()
    benchmark.console.print(as_table(result), markup=False)
    return A_PEER_FAILED if result.failed else 0


main = harness.main_of(command)

if __name__ == "__main__":
    sys.exit(main())
