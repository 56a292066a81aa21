"""The training loop: config in, run folder out; killed at any moment, the same command goes on where it stood."""

import errno
import itertools
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from enum import IntEnum
from typing import Any

from engram.config import Config, UserError
from engram.data.errors import DataError
from engram.data.loader import Batch, Loader, validation_batches
from engram.distributed.dry_run import describe
from engram.distributed.machine import Machine
from engram.distributed.plan import make_plan
from engram.distributed.world import SINGLE, World
from engram.model.accounting import count_parameters
from engram.model.device import choose_device
from engram.optim.schedule import learning_rate
from engram.training import random_state
from engram.training.capacity import evaluation_too_large, explain_out_of_memory, step_too_large
from engram.training.checkpoint import latest_checkpoint, open_checkpoint
from engram.training.checkpoint_files import write_folder
from engram.training.clock import Clock
from engram.training.console import LOG_FILE_ONLY, RunConsole
from engram.training.files import write_atomically
from engram.training.initial import start_from
from engram.training.metrics import read_metrics
from engram.training.recorder import Recorder
from engram.training.run_folder import RunFolder, RunFolderError
from engram.training.saver import CheckpointSaver
from engram.training.setup import build_engine, configure_process, environment, open_data
from engram.training.shared_folder import SharedFolder
from engram.training.signals import StopRequest
from engram.training.state import RunState

logger = logging.getLogger(__name__)


class Exit(IntEnum):
    """How a run ended, as the exit status of `train.py`, where 2 is a UserError."""

    DONE = 0
    DIVERGED = 3
    INTERRUPTED = 130


class Trainer:
    """Trains the model of a config in its run folder, from the start or from the folder's latest checkpoint.

    Same config, machine, torch and number of threads: same weights to the bit, however often the run was killed (on a
    GPU, as far as its kernels sum in a fixed order).
    """

    def __init__(self, config: Config, folder: RunFolder | SharedFolder | None = None, world: World = SINGLE) -> None:
        """`folder`: the run folder, where the caller has entered it already; with several ranks, a SharedFolder."""
        self.config = config
        self.world = world
        self._entered = folder
        train = config.train
        self.last_step = min(train.steps, train.stop_after or train.steps)
        self.micro_batch_size = train.micro_batch_size or train.batch_size

    def fit(self) -> Exit:
        """Train until `train.steps`, or `train.stop_after`, and save. Raises UserError."""
        with ExitStack() as stack:
            self.folder = self._entered or stack.enter_context(RunFolder(self.config))
            try:
                return self._fit_logged()
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                what = "the disk is full: free space" if full else f"{error.strerror or error}: put that right"
                raise RunFolderError(
                    f"{error.filename or self.folder.path}: {what}, and the same command goes on from the last "
                    "checkpoint"
                ) from error

    def _fit_logged(self) -> Exit:
        with ExitStack() as stack:
            log_file = self.folder.path / "log.txt"
            self.console = stack.enter_context(RunConsole(log_file, self.config.train.steps, self.world.rank))
            try:
                if (note := self.folder.finished_note) is not None:
                    logger.info(note)
                    return Exit.DONE
                return self._fit(stack)
            except (UserError, OSError) as error:
                # Whoever called prints it.
                logger.error("%s", error, extra=LOG_FILE_ONLY)
                raise

    def _fit(self, stack: ExitStack) -> Exit:
        for name in self.folder.leftovers:
            logger.info("removed %s, which a killed process left unfinished", name)
        self.state = self._build()
        stack.callback(self.state.loader.close)
        origin = self._begin()
        # Some read more of a checkpoint than others.
        self.world.meet()
        # Says now, not at the first evaluation, if the validation split is too small.
        self._validation_batches()
        run_id = self.folder.start(
            {**environment(self.state.device, self.world.size), **self.state.identity(), **origin}
        )
        self._record_parameters()
        self.recorder = stack.enter_context(
            Recorder(
                self.config, self.folder.path, run_id, self.state.step, self.console, silent=not self.world.is_first
            )
        )
        train = self.config.train
        self.saver = CheckpointSaver(self.folder.path, train.keep_checkpoints, self.world, train.async_checkpoints)
        with StopRequest() as stop, self.saver, explain_out_of_memory(step_too_large(self.config, self.state.device)):
            status = self._loop(stop)
        self.recorder.ended(status)
        if status is Exit.DONE and self.state.step == self.config.train.steps:
            self._finish()
        return status

    def _build(self) -> RunState:
        config, world = self.config, self.world
        plan = world.first_says(lambda: make_plan(config, world.size))
        configure_process(config.train)
        device = choose_device(config.train.device, "train.device")
        # One prepares what the others then find.
        data = world.in_turn(lambda: open_data(config, self.console.terminal))
        random_state.seed_all(config.seed)
        engine = build_engine(plan, data, device, world)
        if config.distributed is not None or config.train.tables is not None:
            logger.info("plan:\n%s", describe(plan, Machine()), extra=LOG_FILE_ONLY)
        loader = Loader(
            data.training,
            config.data.sequence_length,
            config.train.batch_size,
            config.data.shuffle_seed,
            rank=world.rank,
            world_size=world.size,
            prefetch=config.data.prefetch,
        )
        return RunState(config, data, device, engine, loader, world)

    def _begin(self) -> dict[str, Any]:
        """Go on from the run's latest checkpoint, or start; -> what is worth knowing of where the weights come from."""
        for change in self.folder.rounding_changes:
            logger.warning("%s: from here on the run is not to the bit the one that was started", change)
        # What one rank sees of a shared disk is what all go on from.
        saved = self.world.first_says(lambda: latest_checkpoint(self.folder.path))
        if saved is not None:
            with self.world.together():
                checkpoint = open_checkpoint(saved, self.world)
            self.state.restore(checkpoint)
            logger.info("going on from %s", saved)
        elif (given := self.config.train.init_from) is not None:
            origin = start_from(given, self.config, self.state.engine, self.state.data.tokenizer.digest, self.world)
            logger.info("starting from the weights of %s, step %d", origin["checkpoint"], origin["step"])
            return {"init_from": origin}
        return {}

    def _loop(self, stop: StopRequest) -> Exit:
        state, train = self.state, self.config.train
        self.console.start(state.step)
        self.clock = Clock(state.step, self.config.tokens_per_step)
        while state.step < self.last_step:
            line = self._step(next(state.loader))
            if line is None:
                return Exit.DIVERGED
            self._report(line)
            with self.clock.paused():
                self.saver.poll()
            stopping = self.world.any(stop.received)
            if stopping or state.step % train.checkpoint_every == 0 or state.step == self.last_step:
                with self.clock.paused():
                    self.saver.save(state.step, state.contents())
            if stopping and state.step < self.last_step:
                self.saver.wait()
                logger.info("interrupted after step %d: the same command goes on from there", state.step)
                return Exit.INTERRUPTED
        if state.step < train.steps:
            how = "as train.stop_after says" if state.step == self.last_step else "beyond train.stop_after"
            logger.info("stopped after step %d, %s: without it, the run goes on", state.step, how)
        return Exit.DONE

    def _step(self, batch: Batch) -> dict[str, Any] | None:
        """Take one step and return its metrics, or None where the run has diverged."""
        state, train, optim = self.state, self.config.train, self.config.optim
        self._check_tokens(batch)
        lr = learning_rate(state.step, optim, train.steps)
        gradient = state.engine.compute_gradient(batch, lambda: self._check_tokens(state.loader.peek()))
        line: dict[str, Any] = {
            "step": state.step + 1,
            "tokens": state.tokens + self.config.tokens_per_step,
            "loss": gradient.loss,
            "lr": lr,
            "grad_norm": gradient.norm,
        }
        if gradient.finite:
            if train.statistics_every and line["step"] % train.statistics_every == 0:
                with self.clock.paused():
                    line |= state.engine.layer_statistics(batch)
            state.engine.apply_gradient(lr)
        else:
            what = f"step {line['step']}: loss {gradient.loss}, gradient norm {gradient.norm}"
            if state.skipped >= train.skip_nonfinite:
                self._write_post_mortem(batch, line, what)
                return None
            state.skipped += 1
            logger.warning("%s: skipped, %d of %d", what, state.skipped, train.skip_nonfinite)
            state.engine.discard_gradient()
        state.step += 1
        return line

    def _report(self, line: dict[str, Any]) -> None:
        """Evaluate if it is time to, and write the metrics of a step that is logged."""
        step, train = line["step"], self.config.train
        # Before an evaluation asks for rows of its own.
        measures = self.state.engine.measures()
        evaluate = step % train.eval_every == 0 or step == train.steps
        statistics = train.statistics_every and step % train.statistics_every == 0
        if evaluate:
            too_large = evaluation_too_large(self.config, self.state.device)
            with self.clock.paused(), explain_out_of_memory(too_large):
                line["val_loss"] = self.state.engine.validation_loss(self._validation_batches())
            if line["val_loss"] < self.state.best_val_loss:
                self.state.best_val_loss, self.state.best_step = line["val_loss"], step
        if step == 1 or step % train.log_every == 0 or evaluate or statistics:
            line |= measures
            line["tokens_per_second"] = self.clock.lap(step)
            self.recorder.write(line, self.clock.seconds_left(step, self.last_step))
        else:
            self.recorder.advance(step)

    def _validation_batches(self) -> Iterator[Batch]:
        data, length = self.state.data.validation, self.config.data.sequence_length
        batches = validation_batches(data, length, self.config.eval.batch_size, self.config.eval.tokens)
        return map(self._check_tokens, batches)

    def _check_tokens(self, batch: Batch) -> Batch:
        highest, size = int(batch.tokens.max()), self.config.model.vocab_size
        if highest >= size:
            raise DataError(
                f"{self.config.data.path}: a shard holds token {highest}, but model.vocab_size is {size}: the file is "
                "damaged; check it with python -m engram.data inspect, and prepare the folder again"
            )
        return batch

    def _write_post_mortem(self, batch: Batch, line: dict[str, Any], what: str) -> None:
        """Save what the diverged step started from: weights and moments before it, its batch, its metrics."""
        state, folder = self.state, self.folder.path / f"postmortem_{line['step']:06d}"
        logger.error("%s: diverged; %s holds weights, batch and the parameters concerned (state.json)", what, folder)
        # JSON has no NaN.
        failure = {key: repr(value) if key in ("loss", "grad_norm") else value for key, value in line.items()}
        failure["nonfinite_gradients"] = state.engine.nonfinite_gradients()
        state.engine.discard_gradient()
        contents = state.contents()
        own_part = "batch" if self.world.is_first else f"batch-{self.world.rank:05d}"
        tensors = itertools.chain(contents.files(), [(own_part, batch._asdict())])
        write_folder(
            folder, replace(contents, tensors=tensors, state={**contents.state, "failure": failure}), self.world
        )

    def _record_parameters(self) -> None:
        counts = count_parameters(self.config.model)
        table = (
            f"total {counts.total:,} (vocabulary {counts.vocabulary:,} apart), activated {counts.activated:,}, "
            f"memory {counts.memory:,}, sparse {counts.sparse:,}\n\n{self.state.engine.roles_table()}\n"
        )
        train = self.config.train
        logger.info(
            "%s: %s, %s, %s parameters (%s in n-gram tables), %s steps x %s tokens",
            self.folder.path,
            self.state.device,
            train.dtype,
            f"{counts.total + counts.vocabulary:,}",
            f"{counts.memory:,}",
            f"{train.steps:,}",
            f"{self.config.tokens_per_step:,}",
        )
        if self.state.step == 0:
            logger.info("parameters: %s", table, extra=LOG_FILE_ONLY)
        if self.world.is_first:
            write_atomically(self.folder.path / "parameters.txt", table)

    def _finish(self) -> None:
        state = self.state
        last = self.world.first_says(self._last_line)
        summary = {key: last.get(key) for key in ("step", "tokens", "loss", "val_loss")}
        summary |= {
            "best_val_loss": state.best_val_loss if state.best_step else None,
            "best_step": state.best_step or None,
            "skipped_steps": state.skipped,
        }
        self.folder.finish(summary)
        if state.skipped:
            logger.warning("%d of %d steps skipped: loss or gradient not finite", state.skipped, state.step)
        if summary["val_loss"] is None:
            logger.warning(
                "finished after step %d, but the validation loss is not finite: the model is of no use; lower optim.lr "
                "or optim.clip_norm in another run_dir",
                state.step,
            )
        else:
            logger.info("finished after step %d: validation loss %.4f", state.step, summary["val_loss"])
        logger.info("next: python -m eval report %s", self.folder.path)

    def _last_line(self) -> dict[str, Any]:
        path = self.folder.path / "metrics.jsonl"
        last = (read_metrics(path) or [{}])[-1]
        if last.get("step") != self.state.step:
            raise RunFolderError(
                f"{path}: does not hold step {self.state.step}, the last one: the folder was removed or changed while "
                "the run was trained; remove what is left of it, and train the run anew"
            )
        return last
