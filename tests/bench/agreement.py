"""Which inversions plain networks take for the class that was asked for: by how clearly the code asks, and by what tau lets through.

    python tests/bench/agreement.py RUN PLAIN.safetensors [PLAIN.safetensors ...]

RUN is a folder of `tie-ext train`; the plain networks were trained apart, with other seeds. Adds the run to docs/results/agreement.json, from which
docs/agreement.md is made. Only inversions are looked at.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from tie_ext import TIENet, TIETrainer, uncertainty
from tie_ext.comparison import all_logits, provenance
from tie_ext.data import ImageSet
from tie_ext.files import write_json
from tie_ext.inversion import soft_code
from tie_ext.run import read_settings, to_bytes
from tie_ext.synthesis import frozen

OUT = Path(__file__).parents[2] / "docs" / "results" / "agreement.json"
PER_CLASS, PARTS = 1000, 5


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("judges", type=Path, nargs="+")
    a = parser.parse_args()
    settings = read_settings(a.run)
    net = TIENet.load(a.run / "network.safetensors").eval()
    trainer = TIETrainer(net, settings.config)
    trainer.load(a.run / "training.safetensors")
    torch.manual_seed(0)
    y = torch.arange(net.num_classes).repeat(PER_CLASS)
    code = soft_code(y, net.num_classes + 1)
    generator = trainer.synthesizers[0].generator
    with frozen(generator):
        x = generator(torch.randn(len(y), generator.latent_size), code)
    images = ImageSet(to_bytes(net, x), y)
    logits = all_logits(net, images)
    landed = logits.argmax(1) == y
    judged = torch.stack([all_logits(TIENet.load(judge), images)[:, :-1].argmax(1) == y for judge in a.judges]).double().mean(0)
    first, second = code.topk(2, dim=1).values.T
    certain = uncertainty(logits.softmax(1)) <= net.tau

    def shares(of: Tensor) -> dict[str, float]:
        return {
            "inversions": of.double().mean().item() if of.dtype == torch.bool else len(of) / len(y),
            "code": first[of].mean().item(),
            "second": second[of].mean().item(),
            "landed": landed[of].double().mean().item(),
            "judged": judged[of].mean().item(),
        }

    found = {"all": shares(torch.ones_like(certain)), "at most tau": shares(certain), "above tau": shares(~certain)}
    found |= {f"clear {i}": shares(part) for i, part in enumerate((first - second).argsort().chunk(PARTS), start=1)}
    record = json.loads(OUT.read_text()) if OUT.exists() else {}
    run = {"data": settings.data, "images": settings.images, "epochs": settings.config.epochs, "seed": settings.config.seed, "tau": float(net.tau)}
    command = f"python tests/bench/agreement.py RUN {' '.join(judge.name for judge in a.judges)}"
    record[settings.data] = {**run, "judges": [judge.stem for judge in a.judges], "shares": found, **provenance(), "command": command}
    write_json(OUT, record)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
