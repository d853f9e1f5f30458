"""docs/research/explain.md, of the record of explained.py; tables.py writes it."""

import json
from pathlib import Path

from page import percent

from tie_ext.cli.tables import table

DOCS = Path(__file__).parents[2] / "docs"
RECORD = DOCS / "results" / "explained.json"
HEAD = """# What a class looks like to a network

A classifier that knows bags from boots has never been asked to draw one. *Inversion* asks: a second network, the generator, starts with noise and
learns to make images that the classifier, which stays as it is, takes for a bag. What comes out shows what the classifier goes by. Any classifier
will do; it needs no garbage class and nothing of TIE.

    tie-ext explain RUN

of a run of `tie-ext train` or `tie-ext attach` writes `RUN/explain.html`. In Python, for any trained classifier:

```python
from tie_ext import explain

found = explain(model, train_loader, num_classes=10)
found.inversions  # (10, 4, C, S, S)
found.nearest  # beside each, the nearest training image of its class
found.layers.calibrate(test_loader)  # ID images that were not trained on: what is usual
found.layers.compare(x).relative_distance  # for each image and layer: above 1 = farther out than 95 % of ID images
```

## How to read the pictures

- **Inversions beside training images.** What both share is what the network knows of the class. What only the training image has, such as a print
  on a shirt, the network does not look at. What only the inversion has, such as a grey veil, it does not mind. People see less in inversions than
  networks do: often no more than an outline, as of trousers or a boot. That, too, says what networks go by.
- **Layers of a rejected image.** A bar for each layer, the first at the top: how far its statistics lie outside those of ID images. Early layers see
  strokes and textures, late ones shapes and classes. An image that is odd in the first layer is drawn otherwise than ID images are (other contrast,
  other strokes); one that is odd in late layers alone is a new thing drawn in the same way.

A high probability of the class alone makes a *fooling image*, which looks like nothing ([fooling.md](fooling.md)). So each layer's statistics are
held to those of the class's training images too, and images are moved while they are found; `tie_ext/training/explain.py` has the formula.

## Does anybody else see the class?

Networks trained apart, from other seeds and on other images, are asked what the inversions are. Percent that are called the class asked for.
Where others do not see the class, a picture shows what this one network goes by, stripes of the generator included; more `--steps` may help.
"""


def page() -> str:
    """The page; empty where there is no record yet."""
    if not RECORD.exists():
        return ""
    record = json.loads(RECORD.read_text())
    rows = [
        {
            "network": name,
            "inversions": of["inversions"],
            "steps": of["steps"],
            "by itself": percent([of["agreement"]], 1),
            "by others": " / ".join(percent([share], 1) for share in of["judged"].values()) or "-",
        }
        for name, of in record.items()
    ]
    commands = "\n".join(f"    python tests/bench/{of['command']}" for of in record.values())
    pictures = "\n".join(
        f"![{name}: inversions at the left, nearest training images at the right](../figures/explain_{name}.png)\n"
        for name in record
        if (DOCS / "figures" / f"explain_{name}.png").exists()
    )
    return f"{HEAD}\n{table(rows)}\n\nMade by\n\n{commands}\n\n{pictures}"
