"""How many images a monitor takes to find a change of the images, written to docs/results/.

python tests/bench/drift.py --root DATA --cache FOLDER
"""

import argparse
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from judged import Judged, judged
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from tie_ext.cli.tables import table
from tie_ext.pytorch_ood import Monitor
from tie_ext.scores.monitor import BETS, bet, gains, kept, p_value
from tie_ext.utils.files import read_json, write_json
from tie_ext.utils.provenance import provenance

RECORD = Path(__file__).parents[2] / "docs" / "results" / "drift.json"
FIGURE = RECORD.parents[1] / "figures" / "drift.png"
SHOWN = "blur, deviation 1 pixel"
HELD_OUT = (40, 200, 1000)
BEFORE, AFTER, STREAMS = 100, 600, 10
"""Unchanged images, changed images, and streams, of which the median is taken."""


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Images ``(B, 1, S, S)`` of [0, 1] as JPEG gives them back."""
    out = []
    for image in (x[:, 0] * 255).round().byte().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=quality)
        out.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(out))[:, None].float() / 255


def resized(x: Tensor, size: int) -> Tensor:
    """Images brought to another size and back, bilinearly."""
    small = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[2:], mode="bilinear", antialias=True)


def noisy(x: Tensor, deviation: float) -> Tensor:
    """Images with white noise."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + deviation * noise).clamp(0, 1)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "blur, deviation 0.6 pixels": lambda x: gaussian_blur(x, 5, 0.6),
    "blur, deviation 1 pixel": lambda x: gaussian_blur(x, 5, 1.0),
    "brightness + 20 %": lambda x: (1.2 * x).clamp(0, 1),
    "brightness + 60 %": lambda x: (1.6 * x).clamp(0, 1),
    "noise, deviation 0.05": partial(noisy, deviation=0.05),
    "noise, deviation 0.15": partial(noisy, deviation=0.15),
    "resized to 24 pixels and back": partial(resized, size=24),
    "resized to 16 pixels and back": partial(resized, size=16),
    "JPEG, quality 30": partial(jpeg, quality=30),
    "JPEG, quality 5": partial(jpeg, quality=5),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    flags = parser.parse_args()
    of = judged("clothes", flags.root, flags.cache)
    pool = of.known[: max(HELD_OUT) + BEFORE]
    after = of.known[len(pool) :][:AFTER]
    clean = scores(of.detector, pool)
    found = {}
    for name, change in CHANGES.items():
        changed = scores(of.detector, change(after))
        found[name] = {str(n): powers(of.detector, clean, changed, n) for n in HELD_OUT}
        found[name]["rejected"] = (changed > of.detector.threshold).double().mean().item()
        print(name, found[name], flush=True)
    figure(of, clean, after)
    rates = {str(n): naive(n) for n in HELD_OUT[:2]}
    places = {"DATA": flags.root, "FOLDER": flags.cache}
    write_json(
        RECORD, {"changes": found, "after": len(after), "naive": rates} | provenance(places=places)
    )


def scores(detector, x: Tensor) -> Tensor:
    return torch.cat([detector.predict(part) for part in x.split(100)])


def powers(detector, clean: Tensor, changed: Tensor, held_out: int) -> dict:
    """Images after the change until the alarm, in each stream, and the false alarms before it."""
    waits, false = [], 0
    for seed in range(STREAMS):
        rng = torch.Generator().manual_seed(seed)
        own = clean[torch.randperm(len(clean), generator=rng)]
        detector.recalibrate(0.05, own[:held_out])
        monitor = Monitor(detector)
        before = own[held_out : held_out + BEFORE]
        false += monitor.update(before).alarm is not None
        order = torch.randperm(len(changed), generator=rng)
        for part in changed[order].split(50):
            if (alarm := monitor.update(part).alarm) is not None:
                break
        waits.append(None if alarm is None else alarm - len(before))
    return {"waits": waits, "false_alarms": false}


def naive(held_out: int, streams: int = 1000, images: int = 2000) -> float:
    """Share of unchanged streams in which the same bets raise an alarm, were scores ranked among
    the held-out ones alone."""
    rng = np.random.default_rng(0)
    held, stream = rng.standard_normal((streams, held_out)), rng.standard_normal((streams, images))
    capital, largest = np.zeros((streams, BETS)), np.ones(streams)
    for t in range(1, images + 1):
        above = (held > stream[:, t - 1 : t]).sum(axis=1)
        gain = gains(p_value(above, 0, held_out, 1 - rng.random(streams)))
        capital = bet(capital, t, gain)
        largest = np.maximum(largest, capital.sum(axis=1) + kept(t))
    return float((largest >= 1000).mean())


def figure(of: Judged, clean: Tensor, after: Tensor) -> None:
    """Evidence over a stream that is blurred from its middle on."""
    of.detector.recalibrate(0.05, clean[:200])
    blurred = scores(of.detector, CHANGES[SHOWN](after[:200]))
    drawing = Figure(figsize=(7, 2.6), layout="constrained")
    ax = drawing.subplots()
    for stream, label in ((clean[200:600], "unchanged"), (blurred, f"{SHOWN} from image 200 on")):
        stream = stream if label == "unchanged" else torch.cat([clean[200:400], blurred])
        monitor = Monitor(of.detector)
        seen = [monitor.update(score).evidence for score in stream]
        ax.semilogy(range(1, len(seen) + 1), seen, label=label)
        drift = monitor.drift
        if drift.alarm is not None:
            ax.plot(drift.alarm, 1000, "k.")
            words = f" alarm at {drift.alarm}: scores {drift.direction} since {drift.since}"
            ax.text(drift.alarm, 1000, words, va="top", fontsize=8)
    ax.axhline(1000, color="k", linewidth=0.8, linestyle=":")
    ax.set(xlabel="images", ylabel="evidence", ylim=(0.5, 1e7))
    ax.legend(fontsize=8, loc="upper left", frameon=False)
    drawing.savefig(FIGURE, dpi=100)


def power() -> str:
    """The table of docs/how-to/drift.md."""
    rows = []
    for name, found in _record()["changes"].items():
        row = {"change": name, "rejected": f"{100 * found['rejected']:.0f} %"}
        for n in HELD_OUT:
            waits = found[str(n)]["waits"]
            hits = [wait for wait in waits if wait is not None]
            middle = median(wait if wait is not None else math.inf for wait in waits)
            text = "-" if not hits else f"{len(hits)} of {len(waits)} streams"
            row[f"{n} held out"] = text if middle == math.inf else f"{middle:.0f}"
        rows.append(row)
    return table(rows)


def false() -> str:
    """Alarms without a change."""
    none = [_record()["changes"]["none"][str(n)] for n in HELD_OUT]
    alarms = sum(of["false_alarms"] + sum(wait is not None for wait in of["waits"]) for of in none)
    return f"{alarms} of {sum(len(of['waits']) for of in none)}"


def _record() -> dict:
    return read_json(RECORD, "the record of drift")


PLACES: dict[str, Callable[[], str]] = {
    "power": power,
    "false": false,
    "after": lambda: str(_record()["after"]),
    "naive": lambda: f"{100 * _record()['naive']['40']:.0f} %",
}
"""What stands in docs/how-to/drift.md."""


if __name__ == "__main__":
    main()
