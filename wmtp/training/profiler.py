"""A profile of a few optimizer steps by torch.profiler: a trace and a table of every process, in output_dir."""

from pathlib import Path
from typing import Any

import torch

from wmtp.distributed import World, wait_for_all
from wmtp.errors import UserError
from wmtp.training.run_log import RunLog

_TABLE_ROWS = 30


class Profiler:
    """Records steps of a training loop, counted from where this start of the run begins: wait, warm up, record.

    The keys are those of torchtune's ``setup_torch_profiler``, whose files do not say which process they are of.

    Args:
        output_dir: the run's folder.
        world: this process among all, each of which has a profiler.
        num_training_steps: of the whole run.
        enabled: False: every method does nothing.
        wait_steps: steps that nothing is recorded of, >= 0.
        warmup_steps: then steps that are recorded and thrown away, as the first ones distort the figures, >= 0.
        active_steps: then steps that are recorded, >= 1.
        num_cycles: how often all this is done, >= 1.
        record_shapes: group the table by the shapes of the inputs.
        profile_memory: also what each operation allocates.
        with_stack: also the Python functions, which makes traces large.
        with_flops: also the operations of matrix products.

    Raises:
        ValueError: a value out of its range, or more steps than the run has.
    """

    def __init__(
        self,
        output_dir: Path,
        world: World,
        num_training_steps: int,
        *,
        enabled: bool = True,
        wait_steps: int = 5,
        warmup_steps: int = 2,
        active_steps: int = 2,
        num_cycles: int = 1,
        record_shapes: bool = True,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
    ) -> None:
        traced: dict[str, Any] = {"record_shapes": record_shapes, "profile_memory": profile_memory}
        traced |= {"with_stack": with_stack, "with_flops": with_flops}
        counts = {"wait_steps": (wait_steps, 0), "warmup_steps": (warmup_steps, 0)}
        for key, (count, least) in (
            counts | {"active_steps": (active_steps, 1), "num_cycles": (num_cycles, 1)}
        ).items():
            if count < least:
                raise UserError(f"{key} must be >= {least}, got {count}")
        self._before, self._cycle = wait_steps + warmup_steps, wait_steps + warmup_steps + active_steps
        if enabled and self._cycle > num_training_steps:
            raise UserError(
                f"wait_steps + warmup_steps + active_steps is {self._cycle}, the run has {num_training_steps} steps; "
                "lower wait_steps, or raise max_steps"
            )
        self._folder, self._world, self._enabled = output_dir / "profiler", world, enabled
        self._schedule = {"wait": wait_steps, "warmup": warmup_steps, "active": active_steps, "repeat": num_cycles}
        self._traced, self._written = traced, list[str]()

    def start(self, step: int) -> None:
        """Begins before the loop.

        Args:
            step: optimizer steps done.
        """
        self._first_step, self._profile = step, None
        if self._enabled:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(**self._schedule),
                on_trace_ready=self._write,
                **self._traced,
            )
            self._profile.start()

    def step(self) -> None:
        """Marks the end of an optimizer step."""
        if self._profile is not None:
            self._profile.step()

    def stop(self, log: RunLog) -> None:
        """Ends after the loop, on every rank: one line says where traces and tables are; MLflow gets them."""
        if self._profile is None:
            return
        self._profile.stop()
        wait_for_all()  # the other processes' files
        if not self._written:
            done, first = self._profile.step_num, self._before + 1
            log.info(
                f"profiler: recorded nothing, this start has done {done} steps and step {first} would be the first"
            )
            return
        log.info(f"profiled {', '.join(self._written)}: traces (for ui.perfetto.dev) and tables in {self._folder}")
        log.artifact(self._folder)

    def _write(self, profile: torch.profiler.profile) -> None:
        recorded = (profile.step_num - 1) % self._cycle + 1 - self._before  # less at the end of the run
        if recorded < 1:
            return
        last = self._first_step + profile.step_num
        name = f"steps_{last - recorded + 1}-{last}"
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"{name}.rank{self._world.rank}"
        profile.export_chrome_trace(f"{file}.pt.trace.json.gz")
        order = f"self_{'cpu' if self._world.device.type == 'cpu' else 'device'}_time_total"
        averages = profile.key_averages(group_by_input_shape=self._traced["record_shapes"])
        Path(f"{file}.txt").write_text(averages.table(sort_by=order, row_limit=_TABLE_ROWS) + "\n")
        self._written.append(name.replace("_", " ").replace("-", " to "))
