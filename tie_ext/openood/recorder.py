"""Which epoch's network OpenOOD's scripts score."""

from pathlib import Path

from openood.recorders.base_recorder import BaseRecorder
from torch import nn


class LastRecorder(BaseRecorder):
    """Recorder of trainers ``tie`` and ``attach``: ``best.ckpt`` is the newest epoch's network.

    OpenOOD's scripts score ``best.ckpt``. Its own recorder keeps the epoch with the best ID
    accuracy there, which may be from before TIE excluded anything.
    """

    best_acc: float

    def save_model(self, net: nn.Module, val_metrics: dict) -> None:
        """Save the network as ``best.ckpt`` and ``best_epoch*_acc*.ckpt``; the last one goes."""
        before = f"best_epoch{self.best_epoch_idx}_acc{self.best_acc:.4f}.ckpt"
        Path(self.output_dir, before).unlink(missing_ok=True)
        self.best_acc = 0.0  # no earlier epoch counts
        super().save_model(net, val_metrics)
