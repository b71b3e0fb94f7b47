"""The trained weights of the best evaluation so far, on disk, so that early stopping survives a kill.

    <output_dir>/best/step_00000040/    shards of the trained weights (torch.distributed.checkpoint) and a manifest

A resumed run repeats the steps after its checkpoint exactly. So the best of a checkpoint at step c is the newest folder
at or before c; that folder and the newer ones must stay.
"""

import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from wmtp.distributed import wait_for_all
from wmtp.files import UNFINISHED, unfinished
from wmtp.models.load import named_parameters, reshard
from wmtp.training.checkpoint import complete_checkpoints, publish_shards, verify_together


class BestWeights:
    """The best trained weights under ``<output_dir>/best``, which all ranks share. Every rank calls each method."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "best"

    def save(self, step: int, model: nn.Module, checkpoints: Path) -> None:
        """Saves the trained weights as the best; removes those that neither this run nor a checkpoint can go back to.

        Args:
            checkpoints: folder of the checkpoints that a run may be resumed from, none of them being written now.
        """
        target = self._of(step)
        torn = target.with_name(target.name + UNFINISHED)
        if dist.get_rank() == 0:
            unfinished(target).mkdir()
        wait_for_all()
        dcp.save(_trained(model), checkpoint_id=str(torn))
        if dist.get_rank() == 0:
            publish_shards(torn, target)
            oldest = next((p.name for p in complete_checkpoints(checkpoints)), target.name)
            for old in [p for p in complete_checkpoints(self.folder) if p.name <= oldest][:-1]:
                shutil.rmtree(old)
        wait_for_all()

    def forget_after(self, step: int) -> None:
        """Rank 0 removes what was saved after a step that the run goes back to."""
        for path in self.folder.glob("step_*") if dist.get_rank() == 0 else ():
            if path.name > self._of(step).name:  # also a torn one: its name is longer
                shutil.rmtree(path)

    def restore(self, step: int, model: nn.Module) -> None:
        """Reads the weights saved at a step into the model, in place.

        Raises:
            ValueError: they are not there, or a file does not match its manifest.
        """
        verify_together(self._of(step))
        reshard(model)
        state = _trained(model)
        dcp.load(state, checkpoint_id=str(self._of(step)))

    def _of(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in named_parameters(model) if parameter.requires_grad}
