"""Train a character-level Transformer on sequences that several processes hold together.

    python examples/train_long_context.py --processes 4       # starts them on this host, two CPU devices each

All devices of all processes are one mesh, data x sequence. Each holds some of the rows of a batch, and of each row the
tokens that `to_order` has put on it, once, on the host; attention is `context_parallel_attention`. Then the same is
trained once more in one process, on one device, with plain `flash_attention`: the losses of both are printed side by
side, and the script exits with 1 if they differ by more than `TOLERANCE`.

    --save DIR --save-every 10                                # writes checkpoints (Orbax)
    --save DIR --resume                                       # goes on from the last one, on any number of processes

On GPU hosts and clusters start this file once for each process, by hand or by what the cluster has:

    python examples/train_long_context.py --processes 4 --coordinator HOST0:PORT --rank 0     # to 3, each on its host
    srun python examples/train_long_context.py --cluster      # Slurm, Open MPI, TPU pods: JAX finds the rest

A process that dies does not leave the others waiting. They end with an error within `--timeout` seconds (30) and
`SLACK` (10) of its death, with or without a launcher to watch them. Mostly at once: gloo sees that a connection is
closed, and JAX that the coordinator, process 0, is gone. What is only silent, JAX's heartbeat finds. The launcher kills
those left 5 s after the first that failed. `--kill 1:20` shows it: process 1 kills itself before step 20.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import optax
import processes
from char_lm import ROPE, Transformer, load_text, windows
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jax_flash_attn2 import context_parallel_attention, sequence_order, to_order
from jax_flash_attn2.flax import make_attention_fn

TOLERANCE = 1e-4
"""How far apart the losses may be at any step, in nats per character."""

SLACK = 10
"""Seconds beyond `--timeout` until the others have ended: the heartbeats in between, and ending."""


def attention_over(mesh, args):
    """For `nnx.MultiHeadAttention`: attention over the mesh. RoPE turns by where tokens stood, not where they lie."""
    positions = sequence_order(args.context, mesh.shape["sequence"], args.order)
    rotate = jax.vmap(ROPE, (-2, None), -2)  # over heads

    def attention_fn(query, key, value, *, is_causal, **rest):  # the rest is of masks and dropout: there are none here
        return context_parallel_attention(
            rotate(query, positions), rotate(key, positions), value,
            causal=is_causal, axis="sequence", mesh=mesh, method=args.method, order=args.order,
        )  # fmt: skip

    return attention_fn


class Batches:
    """Batch i, the same on any number of processes: tokens, the ones before them, and labels, all reordered at once."""

    def __init__(self, tokens, mesh, args):
        self.tokens, self.mesh, self.args = tokens, mesh, args
        self.sharding = NamedSharding(mesh, P(None, "data", "sequence"))

    def __getitem__(self, i):
        args = self.args
        rng = np.random.default_rng((args.seed, i))  # and so a resumed run sees what it would have seen
        rows = windows(self.tokens, rng.integers(len(self.tokens) - args.context, size=args.batch), args.context)
        before = np.pad(rows[:, :-2], ((0, 0), (1, 0)))
        batch = to_order(np.stack([rows[:, :-1], before, rows[:, 1:]]), self.mesh.shape["sequence"], args.order, axis=2)
        # Each process copies to its devices what is theirs.
        return jax.make_array_from_callback(batch.shape, self.sharding, lambda index: batch[index])


def start(vocabulary, attention_fn, mesh, args):
    """The training step, and the state before the first: weights and the optimizer's, the same on all devices."""
    model = nnx.graphdef(nnx.eval_shape(lambda: Transformer(vocabulary, args, attention_fn)))
    rate = optax.warmup_cosine_decay_schedule(0, args.lr, args.steps // 10, max(args.steps, 2), args.lr / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))

    def init():
        params = nnx.state(Transformer(vocabulary, args, attention_fn), nnx.Param)
        return {"params": params, "optimizer": optimizer.init(params)}

    def loss(params, batch):
        tokens, before, labels = batch
        logits = nnx.merge(model, params)(tokens, before)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()  # in whatever order they lie

    def step(state, batch):
        value, grads = jax.value_and_grad(loss)(state["params"], batch)
        updates, opt_state = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": opt_state}, value

    everywhere = NamedSharding(mesh, P())
    return jax.jit(step, out_shardings=everywhere), jax.jit(init, out_shardings=everywhere)()


class Checkpoints:
    """In a folder that all processes see. Each takes part in writing and reading; writing goes on beside training."""

    def __init__(self, args):
        import orbax.checkpoint as ocp  # takes a second, which only those pay who save

        self.orbax, self.every = ocp, args.save_every
        options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=1)  # we say when
        self.manager = ocp.CheckpointManager(Path(args.save).absolute(), options=options)
        self.newest = self.manager.latest_step()
        if args.resume and self.newest is None:
            raise SystemExit(f"there is no checkpoint in {args.save} to resume from")
        if self.newest is not None and not args.resume:
            raise SystemExit(
                f"{args.save} has checkpoints of {self.newest} steps; go on with --resume, or name another"
            )

    def newest_or(self, state):
        """The state of the newest checkpoint, or this one; and how many steps it has seen."""
        if self.newest is None:
            return state, 0
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        return self.manager.restore(self.newest, args=self.orbax.args.StandardRestore(like)), self.newest

    def save_if_due(self, done, state):
        if done % self.every == 0:
            self.manager.save(done, args=self.orbax.args.StandardSave(state))

    def close(self):
        self.manager.wait_until_finished()
        self.manager.close()


def train(mesh, attention_fn, args, checkpoints=None, title=None):
    """The losses, and which step the first is of (from 0). With a title, progress is shown."""
    text, _, characters = load_text()
    batches = Batches(text, mesh, args)
    step, state = start(len(characters), attention_fn, mesh, args)
    state, first = checkpoints.newest_or(state) if checkpoints else (state, 0)
    often = 0.2 if sys.stderr.isatty() else 15
    bar = tqdm(total=args.steps, initial=first, desc=title, ncols=100, mininterval=often, disable=title is None)
    losses = []
    for i in range(first, args.steps):
        misfortune(i, args)
        began = time.perf_counter()
        state, loss = step(state, batches[i])
        losses.append(float(loss))  # waits for the step, of all processes
        if checkpoints:
            checkpoints.save_if_due(i + 1, state)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {(time.perf_counter() - began) * 1e3:.0f} ms/step", refresh=False)
        bar.update()
    bar.close()
    if checkpoints:
        checkpoints.close()
    return losses, first


def misfortune(i, args):
    """What `--kill` and `--stop` ask for."""
    for when, number in ((args.kill, signal.SIGKILL), (args.stop, signal.SIGSTOP)):
        if when == (jax.process_index(), i + 1):
            print(f"process {when[0]}: {number.name} before step {when[1]}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), number)


def work(args):
    """One of several processes."""
    jax.config.update("jax_num_cpu_devices", args.devices_per_process)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    usual = {} if args.cluster else {
        "coordinator_address": args.coordinator, "num_processes": args.processes, "process_id": args.rank
    }  # fmt: skip
    jax.distributed.initialize(
        **usual, initialization_timeout=120, heartbeat_timeout_seconds=args.timeout,
        shutdown_timeout_seconds=args.timeout,
    )  # fmt: skip
    devices = len(jax.devices())
    if devices % args.data:
        raise SystemExit(f"--data must divide the {devices} devices, got {args.data}")
    mesh = jax.make_mesh((args.data, devices // args.data), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    first = jax.process_index() == 0
    if first:
        divided = f"{args.data} along data x {devices // args.data} along sequence"
        how = f"context {args.context}, {args.method}, {args.order}"
        print(f"{jax.process_count()} processes, {devices} devices: {divided}; {how}", flush=True)
    checkpoints = Checkpoints(args) if args.save else None
    title = f"{jax.process_count()} processes" if first else None
    losses, begin = train(mesh, attention_over(mesh, args), args, checkpoints, title)
    if first and args.losses:
        args.losses.write_text(json.dumps({"first": begin, "losses": losses}))
    elif first:
        print_table({title: losses}, begin)


def work_or_leave(args):
    """An error ends the process at once. The ordinary end waits for all others: for a dead one, until JAX says so."""
    try:
        work(args)
    except (Exception, SystemExit) as error:
        traceback.print_exc() if isinstance(error, Exception) else print(error, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def print_table(columns, first):
    """Some ten steps of each curve, first and last among them."""
    steps = len(next(iter(columns.values())))
    print(f"\n{'loss at step':>12}" + "".join(f"{name:>16}" for name in columns))
    for i in sorted({round(x) for x in np.linspace(0, steps - 1, min(10, steps))}):
        print(f"{first + i + 1:12}" + "".join(f"{column[i]:16.6f}" for column in columns.values()))


def compare(losses, first, args):
    """Train in this process alone, and print both curves; True if they agree."""
    jax.config.update("jax_platforms", "cpu")
    mesh = jax.make_mesh((1, 1), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    alone, _ = train(mesh, make_attention_fn(rope=ROPE), args, title="one process")
    alone = alone[first:]
    print_table({f"{args.processes} processes": losses, "one process": alone}, first)
    differences = np.abs(np.subtract(losses, alone))
    agree = bool(differences.max() <= TOLERANCE)
    print(
        f"\nThe losses {'agree' if agree else 'DISAGREE'}: largest difference {differences.max():.1e} nats per "
        f"character, at step {first + differences.argmax() + 1}; tolerance {TOLERANCE:g}."
    )
    return agree


def launch(args):
    """Start the processes, watch them, and compare; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        losses = args.losses or Path(folder, "losses.json")
        here = [sys.executable, *sys.argv, "--coordinator", f"127.0.0.1:{processes.free_port()}", "--losses", losses]
        if not processes.run_all([[*here, "--rank", str(rank)] for rank in range(args.processes)]):
            return 1
        made = json.loads(losses.read_text())
    if not made["losses"]:
        print(f"nothing to do: the checkpoint has seen {made['first']} steps of {args.steps}")
        return 0
    if args.check:
        return 0 if compare(**made, args=args) else 1
    print_table({f"{args.processes} processes": made["losses"]}, made["first"])
    return 0


def rank_and_step(text):
    rank, step = text.split(":")
    return int(rank), int(step)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--processes", type=int, default=4)
    option("--devices-per-process", type=int, default=2, help="on CPU")
    option("--data", type=int, default=2, help="how many parts of a batch; all other devices divide the sequence")
    option("--method", choices=["auto", "ring", "all_gather", "ulysses"], default="auto")
    option("--order", choices=["zigzag", "contiguous", "striped"], default="zigzag")
    option("--steps", type=int, default=40)
    option("--context", type=int, default=1024, help="how many characters the model sees")
    option("--width", type=int, default=64)
    option("--layers", type=int, default=2)
    option("--heads", type=int, default=4)
    option("--batch", type=int, default=2)
    option("--lr", type=float, default=4e-3, help="highest learning rate")
    option("--seed", type=int, default=0)
    option("--save", metavar="DIR", help="where checkpoints are; all processes must see it")
    option("--save-every", type=int, default=10, metavar="STEPS")
    option("--resume", action="store_true", help="from the last checkpoint in --save")
    option("--check", action=argparse.BooleanOptionalAction, default=True, help="train in one process too, and compare")
    option("--losses", type=Path, metavar="FILE", help="write them there, as JSON")
    option("--timeout", type=int, default=30, metavar="SECONDS", help="without a heartbeat a process is dead")
    option("--coordinator", metavar="HOST:PORT", help="of process 0; this is one of the processes")
    option("--rank", type=int, help="which one")
    option("--cluster", action="store_true", help="this is one of the processes; JAX finds out which")
    option("--kill", type=rank_and_step, metavar="RANK:STEP", help="this process kills itself before this step")
    option("--stop", type=rank_and_step, metavar="RANK:STEP", help="this one stops itself (SIGSTOP)")
    args = parser.parse_args()
    args.dtype = "float32"
    if args.resume and not args.save:
        parser.error("--resume needs --save DIR")
    if (args.rank is None) != (args.coordinator is None):
        parser.error("--rank and --coordinator belong together")
    jax.config.update("jax_default_matmul_precision", "float32")
    return work_or_leave(args) if args.cluster or args.rank is not None else launch(args)


if __name__ == "__main__":
    sys.exit(main())
