"""Progress: a bar in a terminal; elsewhere, as in a log, a line every ten seconds."""

import sys
import time
from typing import Any

from torch import Tensor
from tqdm import tqdm

SECONDS = 10.0
"""Between two lines, whatever stages they are of."""
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(tqdm):
    """A ``tqdm`` bar that is cleared at its end; lines where the standard error is no terminal."""

    last = time.time()  #: when any wrote a line
    loss: Tensor | None = None  #: a scalar to show, which is read when it is shown, for GPUs' sake

    def __init__(self, *args: Any, **kwargs: Any):
        self.lines = not sys.stderr.isatty()
        if self.lines:
            # A delay, however short, leaves out what tqdm shows at the start.
            how = {"mininterval": SECONDS, "miniters": 1, "smoothing": 0, "delay": 1e-9}
            kwargs |= {**how, "bar_format": LINE}
        super().__init__(*args, leave=False, **kwargs)
        if self.lines:
            self.last_print_t = Progress.last

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm makes bar or line of."""
        shown = super().format_dict
        return shown if self.loss is None else shown | {"postfix": f"loss {float(self.loss):.3g}"}

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show it; an empty message clears a bar."""
        if not self.lines:
            return super().display(msg, pos)
        if msg is None:
            Progress.last = time.time()
            self.fp.write(f"{self}\n")
        return False
