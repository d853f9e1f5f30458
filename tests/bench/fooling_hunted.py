"""One trial: a head on every layer that is taught, besides procedural images, what searchers found against it. Do others find less then?

    python tests/bench/fooling_hunted.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors

Rounds of adaptive gradient ascent, from noise and procedural images, against the head as it stands; all that was found so far is kept, and the head
is taught anew each round. The classifier stays as it is. Writes the network to docs/results/fooling/work/, where fooling.py measures it beside the
others, and what adaptive ascent from new starts finds against it after each round to docs/results/fooling/hunted/.
"""

import copy
import time

import adversarial_inputs
import torch
from adversarial_inputs import Detector, outputs, with_threshold
from attached import Trained, made_by, parser_of
from fooling import OUT, id_sets, read
from torch import Tensor

from tie_ext import TIENet
from tie_ext.cli.batches import ImageBatches
from tie_ext.models.head import GarbageHead
from tie_ext.outliers import Procedural
from tie_ext.training.config import HeadConfig
from tie_ext.training.fit_head import fit_head
from tie_ext.utils.files import write_json
from tie_ext.utils.random import seeded

ID, HELD = 4000, 2000
"""Training and held-out images that are read."""
ROUNDS, SEARCHED, STEPS = 5, 120, 60
"""Rounds; images that are searched for in each, half from noise, half from procedural images; steps of ascent."""
TAUGHT = 800
"""Steps of teaching a round."""
SHARE = 0.3
"""Share of what was found among the outliers of a round."""
JUDGED = 60
"""Images from each kind of new start by which a round is judged."""


@torch.no_grad()
def statistics(net: TIENet, x: Tensor) -> Tensor:
    """Statistics ``(B, S)`` of images."""
    return torch.cat([net.statistics(part)[1] for part in x.split(250)])


def starts(net: TIENet, count: int) -> dict[str, Tensor]:
    """Noise and procedural images, new with every call."""
    shape = (count, *net.image_shape)
    return {"noise": net.from_unit(torch.rand(shape)), "procedural": Procedural(net).draw(shape)}


def path(net: TIENet, detector: Detector, x: Tensor, y: Tensor) -> dict[int, float]:
    """Share found after each of some steps by adaptive ascent."""
    return {
        step: detector.fooled(*outputs(net, [images]), y).double().mean().item()
        for step, images in adversarial_inputs.ascend(net, x, y, detector, (10, 20, 30, 50, 100))
    }


def main() -> None:
    a = parser_of(__doc__).parse_args()
    of = Trained.read(a.network.stem)
    sets = id_sets(of.data, a.root, of.images, of.seed)
    net = TIENet.load(a.network.with_name(f"{a.network.stem}-head.safetensors"))
    assert isinstance(net.garbage, GarbageHead)
    fresh = copy.deepcopy(net.garbage.network)
    torch.manual_seed(of.seed)
    for part in fresh:
        if isinstance(part, torch.nn.Linear):
            part.reset_parameters()
    inside = torch.cat([statistics(net, x) for x, _ in ImageBatches(sets["train"].first(ID), 250)])
    outside = statistics(net, Procedural(net).draw((HeadConfig().outliers * ID, *net.image_shape)))
    held, test = sets["held"].first(HELD), sets["id"].first(HELD)
    found, rows, start = outside[:0], [], time.perf_counter()
    for number_of in range(ROUNDS + 1):
        if number_of:
            again = max(1, round(SHARE / (1 - SHARE) * len(outside) / len(found)))
            net.garbage.network.load_state_dict(fresh.state_dict())
            with torch.enable_grad():
                fit_head(
                    net.garbage,
                    inside,
                    torch.cat([outside, found.repeat(again, 1)]),
                    HeadConfig(steps=TAUGHT),
                )
        detector = with_threshold(adversarial_inputs.garbage_score, *read(net, held))
        logits, h = read(net, test)
        with seeded(1000):
            judged = starts(net, JUDGED)
        y = torch.arange(JUDGED) % net.num_classes
        shares = {kind: path(net, detector, x, y) for kind, x in judged.items()}
        alarms, garbage = (
            1 - detector.accepts(logits, h).double().mean().item(),
            (logits.argmax(1) == net.num_classes).double().mean().item(),
        )
        rows.append(
            {
                "round": number_of,
                "kept": len(found),
                "false_alarms": alarms,
                "ID in garbage": garbage,
                "found": shares,
            }
        )
        print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
        net.save(OUT / "work" / f"{a.network.stem}-hunted.safetensors")
        record = {
            "id": ID,
            "held": HELD,
            "searched": SEARCHED,
            "steps": STEPS,
            "rounds": rows,
            **made_by(a.root),
        }
        write_json(OUT / "hunted" / f"{a.network.stem}.json", record)
        if number_of < ROUNDS:
            x = torch.cat(list(starts(net, SEARCHED // 2).values()))
            y = torch.randint(net.num_classes, (len(x),))
            images = [
                images
                for _, images in adversarial_inputs.ascend(
                    net, x, y, detector, (STEPS // 3, STEPS)
                )
            ]
            found = torch.cat([found, statistics(net, torch.cat(images))])


if __name__ == "__main__":
    main()
