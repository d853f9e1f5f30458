"""Which epoch's network OpenOOD's scripts score."""

from pathlib import Path

from openood.recorders.base_recorder import BaseRecorder
from torch import nn


class LastRecorder(BaseRecorder):
    """Recorder of trainers ``tie`` and ``attach``: ``best.ckpt``, which OpenOOD's scripts score, is the newest epoch's.

    OpenOOD's own keeps the epoch with the best ID accuracy, which may be from before TIE expelled anything: its garbage class and tau are then
    those of no outlier.
    """

    best_acc: float

    def save_model(self, net: nn.Module, val_metrics: dict) -> None:
        """Save the network as ``best.ckpt`` and ``best_epoch*_acc*.ckpt``, in place of the epoch before."""
        Path(
            self.output_dir, f"best_epoch{self.best_epoch_idx}_acc{self.best_acc:.4f}.ckpt"
        ).unlink(missing_ok=True)
        self.best_acc = 0.0  # no epoch before this one counts
        super().save_model(net, val_metrics)
