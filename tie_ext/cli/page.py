"""A web page that needs no other file and no network, and its parts, each a piece of HTML."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from tie_ext.utils.files import write_atomically


class Card(NamedTuple):
    """A number that a reader sees first."""

    value: str
    label: str
    warn: bool = False


class Shown(NamedTuple):
    """An image with what is said of it."""

    image: Tensor
    """uint8 ``(C, H, W)``."""
    caption: str
    mistake: bool = False


def write_page(path: Path, title: str, lead: str, body: Iterable[str]) -> Path:
    """Write a page; gives its path.

    Arguments:
        path: Its file.
        title: The heading, plain text.
        lead: What it says, in a sentence of plain text.
        body: HTML.
    """
    title, lead = html.escape(title), html.escape(lead)
    head = f'<header><h1>{title}</h1><p class="lead">{lead}</p></header>'
    lines = [HEAD.format(title=title), head, *body, "</main></body></html>"]
    write_atomically(path, "\n".join(lines).encode())
    return path


def cards(shown: Iterable[Card]) -> str:
    """A row of cards."""
    found = [
        f"<li{' class=warn' * card.warn}><b>{html.escape(card.value)}</b>"
        f"<span>{html.escape(card.label)}</span></li>"
        for card in shown
    ]
    return f'<ul class="cards">{"".join(found)}</ul>'


def section(title: str, *parts: str, folded: bool = False) -> str:
    """Parts under a heading, which a click opens where they are folded away."""
    title, inner = html.escape(title), "\n".join(parts)
    if folded:
        return f"<details><summary>{title}</summary>{inner}</details>"
    return f"<section><h2>{title}</h2>{inner}</section>"


def gallery(title: str, shown: Iterable[Shown]) -> str:
    """Images in rows as wide as the page, each above its caption."""
    found = []
    for image, caption, mistake in shown:
        text = html.escape(caption + " (mistake)" * mistake)
        found.append(
            f'<li{" class=warn" * mistake}><img alt="{html.escape(title)}: {text}" '
            f'src="{data_url(_png(image))}"><span>{text}</span></li>'
        )
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    return f'{heading}<ul class="gallery">{"".join(found)}</ul>'


def figure(caption: str, drawn: Figure) -> str:
    """A figure as HTML."""
    png, caption = io.BytesIO(), html.escape(caption)
    drawn.savefig(png, format="png", dpi=110, bbox_inches="tight")
    image = f'<img alt="{caption}" src="{data_url(png.getvalue())}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the columns of the first; the first column is a heading."""
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in rows[0])
    lines = [
        f'<tr><th scope="row">{html.escape(str(first))}</th>'
        + "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        + "</tr>"
        for first, *values in (row.values() for row in rows)
    ]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """Plain text, its lines as they are."""
    return f"<pre>{html.escape(text)}</pre>"


def data_url(png: bytes) -> str:
    """An image inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(image: Tensor) -> bytes:
    from PIL import Image

    png, pixels = io.BytesIO(), image.permute(1, 2, 0).squeeze(-1).numpy()
    Image.fromarray(pixels).save(png, format="png")
    return png.getvalue()


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root{{color-scheme:light dark;--text:#1d2129;--soft:#5b6270;--page:#f6f7f9;--box:#fff;
--line:#e1e4ea;--warn:#b3261e}}
@media(prefers-color-scheme:dark){{:root{{--text:#e6e8ec;--soft:#a4abb8;--page:#14161a;
--box:#1d2026;--line:#333842;--warn:#ff8a80}}}}
*{{box-sizing:border-box}}
body{{font:16px/1.55 system-ui,sans-serif;margin:0;color:var(--text);background:var(--page)}}
main{{max-width:72rem;margin:0 auto;padding:2rem 1rem 4rem}}
h1{{font-size:1.9rem;margin:0}}h2{{font-size:1.25rem;margin:2.2rem 0 .6rem}}
h3{{font-size:1rem;margin:1.1rem 0 .4rem}}
.lead{{font-size:1.15rem;max-width:46rem;margin:.4rem 0 1.4rem}}
ul{{list-style:none;margin:0;padding:0;display:grid;gap:.8rem}}
.cards{{grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr))}}
.cards li{{background:var(--box);border:1px solid var(--line);border-radius:.6rem;
padding:.8rem 1rem}}
.cards b{{display:block;font-size:1.6rem;line-height:1.2}}
.cards span,.gallery span,figcaption,summary{{color:var(--soft);font-size:.9rem}}
.gallery{{grid-template-columns:repeat(auto-fill,minmax(6.2rem,1fr))}}
.gallery img{{width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;
border-radius:.35rem;border:1px solid var(--line);background:var(--box)}}
.gallery span{{display:block;font-size:.78rem;line-height:1.3}}
.warn img{{border:2px solid var(--warn)}}.warn b,.warn span{{color:var(--warn)}}
figure{{margin:1rem 0}}figure img{{max-width:100%;border-radius:.4rem;background:#fff}}
.wide{{overflow-x:auto}}table{{border-collapse:collapse;background:var(--box)}}
td,th{{padding:.35rem .9rem;border-bottom:1px solid var(--line);text-align:right;
font-weight:400}}
th:first-child{{text-align:left}}th[scope=col]{{color:var(--soft);font-size:.9rem}}
details{{border-top:1px solid var(--line);padding:.8rem 0}}summary{{cursor:pointer}}
summary:hover{{color:var(--text)}}
pre{{background:var(--box);padding:1rem;overflow:auto;font-size:.85rem}}
</style></head><body><main>"""
"""The start of a page: one column on a phone, in the reader's colours."""
